//! Programs that fail, hang, print much, start others and mount; locks.

use super::*;
use tempfile::TempDir;

fn shell<'a>(script: &str, interrupt: &'a Interrupt) -> Tool<'a> {
    Tool::new("sh", interrupt).args(["-c", script])
}

#[test]
fn lines_of_both_streams_arrive_in_order_and_in_the_log() {
    let interrupt = Interrupt::default();
    let mut log = Vec::new();
    let mut lines = Vec::new();
    let tool = shell("echo a; echo b >&2; printf 'c\\rd\\n\\ne'", &interrupt).log(&mut log);
    tool.run(|line| lines.push(line.to_owned())).unwrap();
    assert_eq!(lines, ["a", "b", "c", "d", "e"]);
    assert_eq!(log, b"a\nb\nc\nd\ne\n");
}

#[test]
fn failures_show_how_and_with_which_last_words() {
    let interrupt = Interrupt::default();
    let error = shell("seq 100; echo broken >&2; exit 3", &interrupt).capture().unwrap_err();
    let ToolError::Failed { tail, status, .. } = &error else { panic!("{error}") };
    assert_eq!(status.code(), Some(3));
    assert_eq!(tail.lines().count(), TAIL_LINES);
    assert!(tail.ends_with("100\nbroken"), "{tail}");
    let error = Tool::new("no-such-program", &interrupt).capture().unwrap_err();
    assert!(matches!(error, ToolError::Start { .. }));
}

#[test]
fn an_interrupt_ends_the_program_and_its_children() {
    let interrupt = Interrupt::default();
    let setter = interrupt.clone();
    let mut child = 0;
    let started = Instant::now();
    let result = shell("sleep 60 & echo $!; wait", &interrupt).run(|line| {
        child = line.parse().unwrap();
        setter.set();
    });
    assert!(matches!(result, Err(ToolError::Interrupted(_))), "{result:?}");
    assert!(started.elapsed() < GRACE);
    let pid = Pid::from_raw(child).unwrap();
    assert!(
        rustix::process::test_kill_process(pid).is_err()
            || !Path::new(&format!("/proc/{child}/exe")).exists()
    );
    assert!(matches!(shell("true", &interrupt).capture(), Err(ToolError::Interrupted(_))));
}

#[test]
fn what_a_program_starts_and_mounts_ends_with_it() {
    if !can_isolate() {
        println!("skipped: this takes root");
        return;
    }
    let (dir, interrupt) = (TempDir::new().unwrap(), Interrupt::default());
    let path = dir.path().to_str().unwrap();
    let script = format!(
        "mount -t tmpfs none {path} && touch {path}/file && ls {path}\n\
         setsid sleep 1000007 >/dev/null 2>&1 &\n readlink /proc/self/ns/pid"
    );
    let said = Tool::isolated("sh", &interrupt).args(["-c", &script]).capture().unwrap();
    let ours = std::fs::read_link("/proc/self/ns/pid").unwrap();
    let lines: Vec<_> = said.lines().collect();
    assert!(lines[0] == "file" && lines[1] != ours.to_str().unwrap(), "{said}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let left = shell("ps -eo stat,args | grep -v ^Z | grep -c '[s]leep 1000007'", &interrupt).capture();
    assert!(matches!(left, Err(ToolError::Failed { .. })), "{left:?}");
    let failed = Tool::isolated("sh", &interrupt).args(["-c", "echo no; exit 3"]).capture();
    let Err(ToolError::Failed { tool, status, tail }) = failed else { panic!("{failed:?}") };
    assert_eq!((tool.as_str(), status.code(), tail.as_str()), ("sh", Some(3), "no"));
}

#[test]
fn an_interrupt_ends_an_isolated_program_that_does_not_hear_of_it_too() {
    if !can_isolate() {
        println!("skipped: this takes root");
        return;
    }
    let interrupt = Interrupt::default();
    let (setter, mut started) = (interrupt.clone(), Instant::now());
    let script = "setsid sleep 1000011 >/dev/null 2>&1 & echo up; exec sleep 1000011";
    let result = Tool::isolated("sh", &interrupt).args(["-c", script]).run(|_| {
        started = Instant::now();
        setter.set();
    });
    assert!(matches!(result, Err(ToolError::Interrupted(_))), "{result:?}");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let fresh = Interrupt::default();
    let left = shell("ps -eo stat,args | grep -v ^Z | grep -c '[s]leep 1000011'", &fresh).capture();
    assert!(matches!(left, Err(ToolError::Failed { .. })), "{left:?}");
}

#[test]
fn a_daemon_left_behind_does_not_hold_us_up() {
    let interrupt = Interrupt::default();
    let started = Instant::now();
    let text = shell("sleep 5 & echo $!", &interrupt).capture().unwrap();
    assert!(started.elapsed() < Duration::from_secs(3));
    shell(&format!("kill {text}"), &interrupt).capture().unwrap();
}

#[test]
fn a_log_that_cannot_be_written_stops_the_program() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let interrupt = Interrupt::default();
    let result = shell("yes", &interrupt).log(&mut Full).run(|_| {});
    assert!(matches!(result, Err(ToolError::Output { .. })), "{result:?}");
}

#[test]
fn long_lines_are_cut() {
    let interrupt = Interrupt::default();
    let text = shell("head -c 100000 /dev/zero | tr '\\0' x; echo; echo next", &interrupt).capture().unwrap();
    let lengths: Vec<usize> = text.lines().map(str::len).collect();
    assert_eq!(lengths, [LINE_MAX, 4]);
}

#[test]
fn a_lock_is_waited_for_and_the_wait_can_be_interrupted() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("build.lock");
    let interrupt = Interrupt::default();
    let held = lock(&path, &interrupt, || panic!("nobody has it")).unwrap();
    let (path_too, setter) = (path.clone(), interrupt.clone());
    let second = thread::spawn(move || lock(&path_too, &interrupt, || setter.set()).map(drop));
    let result = second.join().unwrap();
    assert!(matches!(result, Err(ToolError::Interrupted(_))), "{result:?}");
    let path_too = path.clone();
    let third = thread::spawn(move || lock(&path_too, &Interrupt::default(), || {}).map(drop));
    thread::sleep(Duration::from_millis(50));
    assert!(!third.is_finished());
    drop(held);
    third.join().unwrap().unwrap();
    let nowhere = lock(&root.path().join("no/lock"), &Interrupt::default(), || {});
    assert!(matches!(nowhere, Err(ToolError::Lock { .. })));
}

#[test]
fn parts_do_not_run_into_each_other() {
    let one = sha256_parts([&b"ab"[..], b"c"]);
    assert_ne!(one, sha256_parts([&b"a"[..], b"bc"]));
    assert_eq!(one.len(), 64);
}
