use super::*;

#[test]
fn warm_commands_survive_the_kernel_command_line() {
    let warm =
        WarmCommand { argv: vec!["sh".into(), "-c".into(), "echo \"a b\" é".into()], ..Default::default() };
    let parameter = warm.to_parameter().unwrap();
    assert!(parameter.bytes().all(|byte| byte.is_ascii_hexdigit()));
    assert_eq!(WarmCommand::from_parameter(&parameter), Some(warm));
    for bad in ["", "7", "zz", "7b", "é"] {
        assert_eq!(WarmCommand::from_parameter(bad), None, "{bad}");
    }
}

#[test]
fn frames_survive_the_round_trip() {
    let mut stream = Vec::new();
    write_frame(&mut stream, FrameKind::Stdin, b"").unwrap();
    write_frame(&mut stream, FrameKind::Stdout, &vec![7; MAX_PAYLOAD]).unwrap();
    write_control(&mut stream, &Request::Ping).unwrap();
    let mut reader = stream.as_slice();
    let empty = read_frame(&mut reader).unwrap().unwrap();
    assert_eq!(empty, Frame { kind: FrameKind::Stdin, payload: Vec::new() });
    let big = read_frame(&mut reader).unwrap().unwrap();
    assert_eq!((big.kind, big.payload.len()), (FrameKind::Stdout, MAX_PAYLOAD));
    let control = read_frame(&mut reader).unwrap().unwrap();
    assert_eq!(decode_control::<Request>(&control.payload).unwrap(), Request::Ping);
    assert_eq!(read_frame(&mut reader).unwrap(), None);
}

#[test]
fn every_truncation_is_noticed() {
    let mut stream = Vec::new();
    write_frame(&mut stream, FrameKind::Stderr, b"abc").unwrap();
    for len in 1..stream.len() {
        assert!(matches!(read_frame(&mut &stream[..len]), Err(ProtocolError::Truncated)), "{len}");
    }
}

#[test]
fn lengths_and_kinds_are_bounded_before_anything_is_read() {
    let too_long = [0, 1, 0, 16, 0]; // 1 MiB + 1
    assert!(matches!(read_frame(&mut too_long.as_slice()), Err(ProtocolError::TooLong { len: 0x10_0001 })));
    let huge = [2, 0xff, 0xff, 0xff, 0xff];
    assert!(matches!(read_frame(&mut huge.as_slice()), Err(ProtocolError::TooLong { .. })));
    for kind in 4..=255u8 {
        assert!(
            matches!(read_frame(&mut [kind, 0, 0, 0, 0].as_slice()), Err(ProtocolError::Kind(k)) if k == kind)
        );
    }
    let long = vec![0; MAX_PAYLOAD + 1];
    assert!(matches!(
        write_frame(&mut Vec::new(), FrameKind::Stdout, &long),
        Err(ProtocolError::TooLong { .. })
    ));
}

#[test]
fn json_is_the_documented_one() {
    let request: Request = decode_control(br#"{"op":"exec","argv":["ls","-l"],"cwd":"/tmp"}"#).unwrap();
    let Request::Exec(exec) = request else { panic!("not an exec") };
    assert_eq!((exec.argv.len(), exec.cwd.as_deref(), exec.stdin), (2, Some("/tmp"), false));
    assert_eq!(decode_control::<Request>(br#"{"op":"status"}"#).unwrap(), Request::Status { wait: false });
    let status = Status { worker: WorkerState::Ready, generation: 3, connections: 1 };
    let text = String::from_utf8(encode_control(&Response::Status(status)).unwrap()).unwrap();
    assert_eq!(text, r#"{"reply":"status","worker":{"state":"ready"},"generation":3,"connections":1}"#);
    for bad in [&b"{}"[..], b"", b"{\"op\":\"format_disk\"}", b"{\"op\":\"ping\"", b"\xff\xfe", b"[]"] {
        assert!(matches!(decode_control::<Request>(bad), Err(ProtocolError::Json { .. })));
    }
}

#[test]
fn what_is_not_used_is_not_sent() {
    let plain = Request::Exec(ExecRequest { argv: vec!["ls".into()], ..Default::default() });
    let text = String::from_utf8(encode_control(&plain).unwrap()).unwrap();
    assert_eq!(text, r#"{"op":"exec","argv":["ls"],"env":{},"cwd":null,"stdin":false}"#);
    let text = String::from_utf8(encode_control(&Response::error("no")).unwrap()).unwrap();
    assert_eq!(text, r#"{"reply":"error","message":"no"}"#);
}
