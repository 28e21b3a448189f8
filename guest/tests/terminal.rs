//! Execs with a terminal, as other users, as logins, and detached, by the real agent.

mod support;

use std::time::Duration;

use forkd_abi::protocol::{ExecRequest, FrameKind, Request, Response, Tty, write_control, write_frame};
use forkd_engine::fork::agent::ClientError;
use support::{Agent, SOON, code, eventually, next, next_response, request, runs, signal};

const SIZE: Tty = Tty { rows: 31, cols: 97, term: None };

fn shell(script: &str) -> ExecRequest {
    request(&["/bin/sh", "-c", script])
}

fn on_terminal(script: &str) -> ExecRequest {
    ExecRequest { tty: Some(SIZE), ..shell(script) }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Reads output until it ends with `end`.
fn read_until(stream: &mut std::os::unix::net::UnixStream, end: &str) -> String {
    let mut text = String::new();
    while !text.ends_with(end) {
        let frame = next(stream);
        assert_eq!(frame.kind, FrameKind::Stdout, "{text:?}");
        text.push_str(std::str::from_utf8(&frame.payload).unwrap());
    }
    text
}

#[test]
fn a_terminal_has_its_size_its_name_and_its_job_control() {
    let agent = Agent::start();
    let tty = Tty { term: Some("vt220".to_owned()), ..SIZE };
    let script = "stty size; tty; echo $TERM; echo err >&2; exec 3<>/dev/tty && echo mine >&3; exit 5";
    let asked = ExecRequest { tty: Some(tty), ..shell(script) };
    let ran = agent.run_request(asked, Some(Vec::new())).unwrap();
    let lines: Vec<&str> = ran.text().lines().map(str::trim_end).collect();
    assert_eq!((ran.exit, lines[0], &lines[2..]), (code(5), "31 97", &["vt220", "err", "mine"][..]));
    assert!(lines[1].starts_with("/dev/pts/"), "{lines:?}");
    assert_eq!(ran.stderr, "");
}

#[test]
fn keys_are_bytes_and_the_interrupt_key_interrupts() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    let asked = ExecRequest {
        stdin: true,
        ..on_terminal("trap 'echo caught; exit 9' INT; echo go; read x; sleep 60")
    };
    write_control(&mut stream, &Request::Exec(asked)).unwrap();
    let Response::Started { .. } = next_response(&mut stream) else { panic!("not started") };
    read_until(&mut stream, "go\r\n");
    write_frame(&mut stream, FrameKind::Stdin, b"\x03").unwrap();
    let text = read_until(&mut stream, "caught\r\n");
    assert!(text.starts_with("^C"), "{text:?}");
    assert_eq!(next_response(&mut stream), Response::Exited(code(9)));
}

#[test]
fn another_size_is_told() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    let asked = on_terminal("trap 'stty size; exit' WINCH; echo go; while :; do sleep 0.1; done");
    write_control(&mut stream, &Request::Exec(asked)).unwrap();
    let Response::Started { .. } = next_response(&mut stream) else { panic!("not started") };
    read_until(&mut stream, "go\r\n");
    write_control(&mut stream, &Request::Resize { rows: 50, cols: 132 }).unwrap();
    read_until(&mut stream, "50 132\r\n");
    assert_eq!(next_response(&mut stream), Response::Exited(code(0)));
}

#[test]
fn a_size_without_a_terminal_is_refused() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    write_control(&mut stream, &Request::Exec(request(&["sleep", "60"]))).unwrap();
    let Response::Started { pid } = next_response(&mut stream) else { panic!("not started") };
    write_control(&mut stream, &Request::Resize { rows: 1, cols: 1 }).unwrap();
    let Response::Error { message, .. } = next_response(&mut stream) else { panic!("not refused") };
    assert!(message.contains("no terminal"), "{message}");
    eventually("it is killed", || !runs(pid));
}

#[test]
fn the_end_of_input_is_ctrl_d() {
    let agent = Agent::start();
    let ran = agent.run_request(on_terminal("stty -echo; cat; echo end"), Some(b"line\n".to_vec())).unwrap();
    assert_eq!(ran.exit, code(0));
    assert!(ran.text().ends_with("line\r\nend\r\n"), "{:?}", ran.text());
}

#[test]
fn the_last_output_on_a_terminal_is_not_lost() {
    let agent = Agent::start();
    for _ in 0..20 {
        let ran =
            agent.run_request(on_terminal("head -c 30000 /dev/zero | tr '\\0' x; printf end"), None).unwrap();
        assert_eq!(ran.stdout.len(), 30003);
        assert!(ran.text().ends_with("xend"));
    }
}

#[test]
fn a_host_that_goes_away_hangs_the_terminal_up() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    write_control(&mut stream, &Request::Exec(on_terminal("sleep 60 & echo $!; wait"))).unwrap();
    let Response::Started { pid } = next_response(&mut stream) else { panic!("not started") };
    let line = read_until(&mut stream, "\n");
    let grandchild: u32 = line.trim().parse().unwrap();
    assert!(runs(pid) && runs(grandchild));
    drop(stream);
    eventually("both are gone", || !runs(pid) && !runs(grandchild));
}

#[test]
fn a_time_limit_ends_what_ignores_a_hangup() {
    let agent = Agent::start();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let asked = on_terminal("trap '' HUP TERM INT; echo $$; while :; do sleep 0.1; done");
    let result = agent.client().exec(asked, None, &mut out, &mut err, Some(Duration::from_millis(400)));
    assert!(matches!(result, Err(ClientError::Timeout { .. })), "{result:?}");
    let pid = String::from_utf8(out).unwrap().trim().parse().unwrap();
    eventually("it is killed", || !runs(pid));
}

#[test]
fn what_is_detached_outlives_its_host() {
    let agent = Agent::start();
    let pid = agent.client().start(shell("echo lost; exec sleep 60"), SOON).unwrap();
    assert!(runs(pid));
    agent.client().ping(SOON).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(runs(pid));
    agent.run(&["kill", &pid.to_string()]).unwrap();
    eventually("it is reaped", || !runs(pid));
    let result = agent.client().start(request(&["no-such-program"]), SOON);
    assert!(matches!(result, Err(ClientError::NotStarted { code: 127, .. })), "{result:?}");
    let result = agent.client().start(on_terminal("true"), SOON);
    assert!(matches!(result, Err(ClientError::Agent { .. })), "{result:?}");
}

#[test]
fn what_cannot_be_started_has_the_exit_code_of_shells() {
    let agent = Agent::start();
    let login = |argv: &[&str]| ExecRequest { login: true, ..request(argv) };
    for (asked, wanted) in [
        (request(&["no-such-program"]), 127),
        (request(&["/no/such/program"]), 127),
        (request(&["/etc"]), 126),
        (request(&["/etc/passwd"]), 126),
        (login(&["no-such-program"]), 127),
        (login(&["/etc"]), 126),
    ] {
        if asked.login && !is_root() {
            continue;
        }
        match agent.run_request(asked.clone(), None) {
            Err(ClientError::NotStarted { code, .. }) => assert_eq!(code, wanted, "{asked:?}"),
            other => panic!("{asked:?}: {:?}", other.map(|ran| ran.exit)),
        }
    }
}

#[test]
fn a_program_becomes_a_user_with_its_groups_and_home() {
    if !is_root() {
        return;
    }
    let agent = Agent::start();
    let run = |user: &str, script: &str| {
        let asked = ExecRequest { user: Some(user.to_owned()), ..shell(script) };
        agent.run_request(asked, None).unwrap()
    };
    let ran = run(
        "nobody",
        "id -u; id -g; id -G; echo $HOME $USER $LOGNAME; grep -E '^(CapEff|SigIgn)' /proc/self/status; kill -7 $$",
    );
    let lines: Vec<&str> = ran.text().lines().collect();
    assert_eq!(ran.exit, signal(7));
    assert_eq!(lines[..4], ["65534", "65534", "65534", "/nonexistent nobody nobody"]);
    // SIGPIPE, which Rust ignores, is signal 13; what else is ignored comes from whoever runs the tests.
    let ignored = u64::from_str_radix(lines[4].trim_start_matches("SigIgn:\t"), 16).unwrap();
    assert_eq!(ignored & 1 << 12, 0, "{}", lines[4]);
    assert_eq!(lines[5], "CapEff:\t0000000000000000");
    assert_eq!(run("1234:daemon", "id -u; id -g; id -G; echo $HOME").text(), "1234\n1\n1\n/\n");
    assert_eq!(run("0:0", "id -u").text(), "0\n");
    let given = ExecRequest { env: [("HOME".to_owned(), "/tmp".to_owned())].into(), ..shell("echo $HOME") };
    let given = ExecRequest { user: Some("nobody".to_owned()), ..given };
    assert_eq!(agent.run_request(given, None).unwrap().text(), "/tmp\n");
    for (user, words) in [("no-such-user", "no user \"no-such-user\""), ("root:no-such", "no group")] {
        let asked = ExecRequest { user: Some(user.to_owned()), ..shell("true") };
        match agent.run_request(asked, None) {
            Err(ClientError::Agent { message } | ClientError::NotStarted { message, .. }) => {
                assert!(message.contains(words), "{message}");
            }
            other => panic!("{user}: {:?}", other.map(|ran| ran.exit)),
        }
    }
    let asked =
        ExecRequest { cwd: Some("/root".to_owned()), user: Some("nobody".to_owned()), ..shell("pwd") };
    let result = agent.run_request(asked, None);
    if !std::fs::metadata("/root")
        .is_ok_and(|meta| std::os::unix::fs::PermissionsExt::mode(&meta.permissions()) & 1 != 0)
    {
        assert!(matches!(
            &result,
            Err(ClientError::Agent { message } | ClientError::NotStarted { message, .. })
                if message.contains("cannot be entered")
        ));
    }
}

#[test]
fn a_user_owns_its_terminal() {
    if !is_root() {
        return;
    }
    let agent = Agent::start();
    let asked = ExecRequest {
        user: Some("nobody".to_owned()),
        ..on_terminal("stat -c %u $(tty); : >/dev/tty && echo mine")
    };
    assert_eq!(agent.run_request(asked, None).unwrap().text(), "65534\r\nmine\r\n");
}

#[test]
fn a_login_is_the_users_shell_at_home() {
    if !is_root() {
        return;
    }
    let agent = Agent::start();
    let login = ExecRequest { login: true, stdin: true, ..ExecRequest::default() };
    let ran =
        agent.run_request(login.clone(), Some(b"echo $0; pwd; echo $SHELL; exit 3\n".to_vec())).unwrap();
    let lines: Vec<&str> = ran.text().lines().collect();
    assert_eq!(ran.exit, code(3));
    let shell = lines[2];
    assert_eq!(lines[..2], [format!("-{}", shell.rsplit('/').next().unwrap()).as_str(), "/root"]);
    let with_program = ExecRequest { argv: vec!["pwd".to_owned()], stdin: false, ..login };
    assert_eq!(agent.run_request(with_program, None).unwrap().text(), "/root\n");
}

#[test]
fn what_is_run_sees_the_environment_of_the_recipe() {
    let agent = Agent::with_machine_file(
        r#"{"warm":{"argv":["/bin/sh","-c","echo '{\"ready\":true}'; exec cat"],"env":{"OF_THE_RECIPE":"yes"}}}"#,
    );
    let ran = agent.run_request(shell("echo $OF_THE_RECIPE"), None).unwrap();
    assert_eq!(ran.text(), "yes\n");
}
