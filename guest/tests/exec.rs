//! Programs run by the real agent: output, input, limits, and what happens to them when the host goes away.

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use forkd_abi::protocol::{ExecRequest, FrameKind, Request, Response, write_control, write_frame};
use forkd_engine::fork::agent::{AgentClient, ClientError};
use support::{Agent, SOON, code, eventually, next, next_response, request, runs, signal};

fn shell(script: &str) -> ExecRequest {
    request(&["/bin/sh", "-c", script])
}

#[test]
fn output_exit_code_and_signal_arrive() {
    let agent = Agent::start();
    let ran = agent.run_request(shell("echo out; echo err >&2; exit 7"), None).unwrap();
    assert_eq!((ran.exit, ran.text(), ran.stderr.as_str()), (code(7), "out\n", "err\n"));
    let ran = agent.run_request(shell("kill -9 $$"), None).unwrap();
    assert_eq!(ran.exit, signal(9));
    assert_eq!(agent.run(&["true"]).unwrap().exit, code(0), "found in PATH");
}

#[test]
fn environment_is_small_and_overridable() {
    let agent = Agent::start();
    let env =
        BTreeMap::from([("HOME".to_owned(), "/tmp".to_owned()), ("WORD".to_owned(), "a b=c".to_owned())]);
    let asked = ExecRequest { env, cwd: Some("/usr".to_owned()), ..shell("pwd; env") };
    let ran = agent.run_request(asked, None).unwrap();
    let lines: Vec<&str> = ran.text().lines().collect();
    assert_eq!(lines[0], "/usr");
    for wanted in ["HOME=/tmp", "WORD=a b=c", "LANG=C.UTF-8", "NPY_DISABLE_CPU_FEATURES=AVX2"] {
        assert!(lines.contains(&wanted), "{wanted} missing in {lines:?}");
    }
    assert!(!ran.text().contains("SECRET_OF_THE_HOST"), "{lines:?}");
}

#[test]
fn programs_start_with_ordinary_signals_and_descriptors() {
    const LOOK: &str =
        "grep -E '^Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd; cut -d' ' -f5,6 /proc/$$/stat; echo $$";
    let agent = Agent::start();
    let ran = agent.run_request(shell(LOOK), None).unwrap();
    // A test inherits things from who runs it, so the measure is what it hands to a program itself.
    let own =
        std::process::Command::new("/bin/sh").args(["-c", LOOK]).stdin(std::process::Stdio::null()).output();
    let own = String::from_utf8(own.unwrap().stdout).unwrap();
    let (lines, own_lines): (Vec<&str>, Vec<&str>) = (ran.text().lines().collect(), own.lines().collect());
    assert_eq!(lines[..lines.len() - 2], own_lines[..own_lines.len() - 2]);
    let pid = lines[lines.len() - 1];
    assert_eq!(lines[lines.len() - 2], format!("{pid} {pid}"), "a group and a session of its own");
}

#[test]
fn what_cannot_be_started_says_why() {
    let agent = Agent::start();
    let cases = [
        (request(&["no-such-program"]), "no such program in PATH"),
        (request(&["/no/such/program"]), "No such file"),
        (request(&["/etc"]), "denied"),
        (request(&[]), "no program given"),
        (request(&[""]), "no program given"),
        (request(&["a\0b"]), "no such program"),
        (request(&["/bin/true", "a\0b"]), "NUL"),
        (
            ExecRequest { cwd: Some("/nowhere".to_owned()), ..request(&["true"]) },
            "\"/nowhere\" cannot be entered",
        ),
        (ExecRequest { env: [("A=B".to_owned(), String::new())].into(), ..request(&["true"]) }, "\"A=B\""),
    ];
    for (asked, words) in cases {
        match agent.run_request(asked.clone(), None) {
            Err(ClientError::Agent { message } | ClientError::NotStarted { message, .. }) => {
                assert!(message.contains(words), "{asked:?}: {message}");
            }
            other => panic!("{asked:?}: {:?}", other.map(|ran| ran.exit)),
        }
    }
}

#[test]
fn input_comes_back_whole() {
    let agent = Agent::start();
    let input: Vec<u8> = (0..6_000_000u32).map(|i| (i / 7 % 251) as u8).collect();
    let ran = agent.run_request(request(&["cat"]), Some(input.clone())).unwrap();
    assert_eq!(ran.exit, code(0));
    assert!(ran.stdout == input, "{} bytes of {} came back", ran.stdout.len(), input.len());
    assert_eq!(agent.run_request(request(&["cat"]), Some(Vec::new())).unwrap().stdout, b"");
}

#[test]
fn input_nobody_reads_holds_nothing_up() {
    let agent = Agent::start();
    let input = vec![b'x'; 8 << 20];
    assert_eq!(agent.run_request(request(&["true"]), Some(input.clone())).unwrap().exit, code(0));
    let ran = agent.run_request(shell("head -c 3; exec 0<&-; sleep 0.1; echo; exit 4"), Some(input)).unwrap();
    assert_eq!((ran.exit, ran.text()), (code(4), "xxx\n"));
    let ran = agent.run(&["cat"]).unwrap();
    assert_eq!((ran.exit, ran.text()), (code(0), ""), "without stdin a program reads /dev/null");
}

#[test]
fn the_last_output_before_the_end_is_not_lost() {
    let agent = Agent::start();
    for _ in 0..20 {
        let ran = agent.run_request(shell("head -c 60000 /dev/zero; echo end >&2"), None).unwrap();
        assert_eq!((ran.stdout.len(), ran.stderr.as_str()), (60000, "end\n"));
    }
}

#[test]
fn a_background_process_does_not_keep_the_exec_open() {
    let agent = Agent::start();
    let started = Instant::now();
    let ran = agent.run_request(shell("sleep 30 & echo $!"), None).unwrap();
    assert_eq!(ran.exit, code(0));
    assert!(started.elapsed() < Duration::from_secs(5));
    let pid = ran.text().trim().parse().unwrap();
    assert!(runs(pid), "it lives on");
    agent.run(&["kill", &pid.to_string()]).unwrap();
}

#[test]
fn a_reader_that_does_not_read_stops_the_writer_and_nobody_else() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    write_control(&mut stream, &Request::Exec(request(&["yes"]))).unwrap();
    let Response::Started { pid } = next_response(&mut stream) else { panic!("not started") };
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(agent.run(&["echo", "hi"]).unwrap().text(), "hi\n");
    assert!(agent.resident_kib() < 16 << 10, "{} KiB", agent.resident_kib());
    // What comes now is whole frames of what `yes` writes.
    let mut total = 0;
    while total < 4 << 20 {
        let frame = next(&mut stream);
        assert_eq!(frame.kind, FrameKind::Stdout);
        assert!(frame.payload.iter().all(|byte| matches!(byte, b'y' | b'\n')));
        total += frame.payload.len();
    }
    drop(stream);
    eventually("yes is killed", || !runs(pid));
}

#[test]
fn a_host_that_goes_away_takes_the_process_group_with_it() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    write_control(&mut stream, &Request::Exec(shell("sleep 60 & echo $!; wait"))).unwrap();
    let Response::Started { pid } = next_response(&mut stream) else { panic!("not started") };
    let grandchild: u32 = String::from_utf8(next(&mut stream).payload).unwrap().trim().parse().unwrap();
    assert!(runs(pid) && runs(grandchild));
    drop(stream);
    eventually("both are killed", || !runs(pid) && !runs(grandchild));
}

#[test]
fn a_host_that_goes_away_in_the_middle_of_input_is_noticed() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    let asked = ExecRequest { stdin: true, ..request(&["sleep", "60"]) };
    write_control(&mut stream, &Request::Exec(asked)).unwrap();
    let Response::Started { pid } = next_response(&mut stream) else { panic!("not started") };
    // More than the agent keeps for a process that does not read, so that it no longer reads either.
    stream.set_nonblocking(true).unwrap();
    let block = vec![0; 64 << 10];
    while write_frame(&mut stream, FrameKind::Stdin, &block).is_ok() {}
    std::thread::sleep(Duration::from_millis(50));
    assert!(runs(pid));
    drop(stream);
    eventually("it is killed", || !runs(pid));
}

#[test]
fn signals_reach_the_process_group() {
    let agent = Agent::start();
    let client = agent.client();
    let signaller = client.signaller().unwrap();
    let sender = signaller.clone();
    let sender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        sender.send(15).unwrap();
    });
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let exit =
        client.exec_with(&signaller, request(&["sleep", "60"]), None, &mut stdout, &mut stderr, Some(SOON));
    let exit = exit.unwrap();
    assert_eq!(exit, signal(15));
    sender.join().unwrap();

    for bad in [0, -9, 65, i32::MAX, i32::MIN] {
        let mut stream = agent.raw();
        write_control(&mut stream, &Request::Exec(request(&["sleep", "60"]))).unwrap();
        let Response::Started { pid } = next_response(&mut stream) else { panic!("not started") };
        write_control(&mut stream, &Request::Signal { signal: bad }).unwrap();
        assert!(matches!(next_response(&mut stream), Response::Error { .. }), "{bad}");
        eventually("the exec ends with its connection", || !runs(pid));
    }
}

#[test]
fn a_program_that_runs_too_long_is_killed() {
    let agent = Agent::start();
    let client = agent.client();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let limit = Duration::from_millis(200);
    let asked = shell("echo $$; while :; do :; done");
    let result = client.exec(asked, None, &mut out, &mut err, Some(limit));
    assert!(matches!(result, Err(ClientError::Timeout { after }) if after == limit), "{result:?}");
    let pid = String::from_utf8(out).unwrap().trim().parse().unwrap();
    eventually("it is killed", || !runs(pid));
}

#[test]
fn many_at_once() {
    let agent = Agent::start();
    agent.client().ping(SOON).unwrap();
    let socket = agent.socket();
    let threads: Vec<_> = (0..40)
        .map(|i| {
            let socket = socket.clone();
            std::thread::spawn(move || {
                let (mut out, mut err) = (Vec::new(), Vec::new());
                let input = vec![i as u8; 100_000];
                let stdin = Box::new(std::io::Cursor::new(input.clone())) as Box<dyn Read + Send>;
                let client = AgentClient::connect_direct(&socket, SOON).unwrap();
                let asked = shell(&format!("cat; exit {i}"));
                let exit = client.exec(asked, Some(stdin), &mut out, &mut err, Some(SOON)).unwrap();
                assert_eq!(exit, code(i));
                assert!(out == input);
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_local_writer_that_fails_ends_the_exec() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let agent = Agent::start();
    let result = agent.client().exec(request(&["yes"]), None, &mut Full, &mut Vec::new(), Some(SOON));
    assert!(matches!(result, Err(ClientError::Local { .. })), "{result:?}");
}
