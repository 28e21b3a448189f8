//! Ways into a copy of a real Linux guest: exec, a shell on a terminal, files. Needs what `linux.rs` needs, `script` and
//! tmux. `FORKD_DOORS_FILES` and `FORKD_DOORS_MIB` say how many files and MiB are copied; few by default.
//! `FORKD_DOORS_TAG` names another machine, for what python-numpy's memory does not hold.

#[path = "linux/copies.rs"]
mod copies;
#[path = "linux/harness.rs"]
mod harness;

use copies::Copies;
use harness::wait_until;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For anything in the guest, whose kernel is emulated here.
const LONG: Duration = Duration::from_secs(120);

/// One copy, and forkd as a user runs it.
struct Guest {
    copies: Copies,
    id: String,
}

impl Guest {
    fn fork(more: &[&str]) -> Guest {
        let tag = std::env::var("FORKD_DOORS_TAG").unwrap_or_else(|_| "python-numpy".to_owned());
        Guest::of(&tag, more)
    }

    /// A copy of another machine.
    fn of(tag: &str, more: &[&str]) -> Guest {
        let copies = Copies::of(tag, more);
        let id = copies.id(0).to_owned();
        Guest { copies, id }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.copies.bed.command(&self.copies.hub);
        command.args(arguments);
        command
    }

    /// Exit code and all output of `forkd exec OPTIONS ID -- COMMAND`.
    fn exec(&self, options: &[&str], command: &[&str]) -> (Option<i32>, String) {
        self.copies.run(&[&["exec"], options, &[&self.id, "--"], command].concat()).both()
    }

    fn shell(&self, script: &str) -> String {
        let (code, text) = self.exec(&[], &["sh", "-c", script]);
        assert_eq!(code, Some(0), "{text}");
        text
    }

    /// The words of a command line that run forkd with this test's directories.
    fn line(&self, arguments: &str) -> String {
        let command = self.command(&[]);
        let set = command
            .get_envs()
            .filter_map(|(name, value)| Some(format!("{}='{}'", name.to_str()?, value?.to_str()?)));
        let set = set.collect::<Vec<_>>().join(" ");
        format!("{set} '{}' {arguments}", command.get_program().to_str().unwrap())
    }

    /// Whether a process has an argument that all of `pattern` matches. It must not match itself: `100[4]`.
    fn runs(&self, pattern: &str) -> bool {
        let script =
            format!("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -xe '{pattern}' || true");
        !self.shell(&script).is_empty()
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn exec_ends_as_its_command_does() {
    let guest = Guest::fork(&["--env", "OF_THE_CHILD=yes"]);
    for (command, expected) in [
        (&["sh", "-c", "exit 7"][..], 7),
        (&["sh", "-c", "kill -9 $$"], 137),
        (&["no-such-program"], 127),
        (&["/etc/passwd"], 126),
    ] {
        let (code, text) = guest.exec(&[], command);
        assert_eq!(code, Some(expected), "{command:?}: {text}");
    }
    assert_eq!(guest.shell("echo $OF_THE_CHILD"), "yes\n");
    let (code, text) =
        guest.exec(&["--user", "nobody"], &["sh", "-c", "id -u; echo $HOME; cat /proc/1/environ"]);
    assert_eq!((code, text.starts_with("65534\n/nonexistent\n")), (Some(1), true), "{text}");
    assert!(text.contains("ermission denied"), "{text}");
    let (code, text) = guest.exec(&["--user", "no-such-user"], &["true"]);
    assert_eq!((code, text.contains("no user \"no-such-user\"")), (Some(1), true), "{text}");
}

#[test]
fn exec_ends_with_its_time_its_client_or_its_signal() {
    let guest = Guest::fork(&[]);
    let (code, text) = guest.exec(&["--timeout", "3s"], &["sleep", "1001"]);
    assert_eq!((code, text.contains("3s")), (Some(124), true), "{text}");
    assert!(wait_until(LONG, || !guest.runs("100[1]")), "it outlives its time");

    let start = |first: &str, then: &str| {
        let mut client = guest.command(&["exec", &guest.id, "--", "sh", "-c"]);
        let client = client.arg(format!("{first}; echo started; {then}")).stdout(Stdio::piped());
        let mut client = client.spawn().unwrap();
        client.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
        client
    };
    let mut client = start(":", "exec sleep 1002");
    client.kill().unwrap();
    client.wait().unwrap();
    assert!(wait_until(LONG, || !guest.runs("100[2]")), "it outlives its client");

    let mut client = start("trap 'exit 5' INT", "while :; do sleep 0.2; done");
    interrupt(&client);
    assert_eq!(client.wait().unwrap().code(), Some(5), "the signal was not passed on");
    let mut client = start("trap '' INT", "while :; do sleep 0.2; done");
    interrupt(&client);
    std::thread::sleep(Duration::from_secs(1));
    interrupt(&client);
    assert_eq!(client.wait().unwrap().code(), Some(130), "the second does not end the client");

    let started = guest.copies.json(&["exec", "--detach", &guest.id, "--", "sleep", "1003"]);
    assert!(started["pid"].as_u64().unwrap() > 1);
    assert!(guest.runs("100[3]"), "what is detached ended");
}

fn interrupt(client: &Child) {
    Command::new("kill").args(["-INT", &client.id().to_string()]).status().unwrap();
}

#[test]
fn exec_has_a_terminal_when_there_is_one() {
    let guest = Guest::fork(&[]);
    let line = guest.line(&format!("exec -it {} -- sh -c 'stty size; tty; echo $TERM; exit 6'", guest.id));
    let mut script = Command::new("script");
    script.args([
        "-qec",
        &format!("stty rows 33 cols 99; TERM=vt102 {line}; echo =$?; stty -a"),
        "/dev/null",
    ]);
    // It would pass on the end of its input as a key.
    let (silence, _held) = std::io::pipe().unwrap();
    let output = script.stdin(silence).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines[0], lines[2], lines[3]), ("33 99", "vt102", "=6"), "{text}");
    assert!(lines[1].starts_with("/dev/pts/"), "{text}");
    // Its mode is what it was.
    let modes: Vec<&str> = text.split_whitespace().collect();
    assert!(["icanon", "echo", "isig"].iter().all(|mode| modes.contains(mode)), "{text}");
    let (code, text) = guest.exec(&["-it"], &["true"]);
    assert_eq!((code, text.contains("stdin is not a terminal")), (Some(2), true), "{text}");
}

/// A terminal that the test can look at.
struct Tmux {
    socket: String,
}

impl Tmux {
    fn start(line: &str) -> Tmux {
        let tmux = Tmux { socket: format!("forkd-test-{}", std::process::id()) };
        tmux.run(&["-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "30", line]);
        tmux
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = Command::new("tmux").args(["-L", &self.socket]).args(arguments).output().unwrap();
        assert!(output.status.success(), "tmux {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn keys(&self, keys: &[&str]) {
        self.run(&[&["send-keys"], keys].concat());
    }

    fn shows(&self, text: &str) {
        let shown = wait_until(LONG, || self.run(&["capture-pane", "-p"]).contains(text));
        assert!(shown, "{text:?} does not appear:\n{}", self.run(&["capture-pane", "-p"]));
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let _ = Command::new("tmux").args(["-L", &self.socket, "kill-server"]).output();
    }
}

#[test]
fn a_shell_is_usable_on_a_real_terminal() {
    let guest = Guest::fork(&[]);
    let tmux = Tmux::start(&format!("{}; sleep 1000", guest.line(&format!("shell {}", guest.id))));
    tmux.keys(&["echo size=$(stty size) home=$PWD", "Enter"]);
    tmux.shows("size=30 100 home=/root");
    tmux.run(&["resize-window", "-x", "120", "-y", "40"]);
    tmux.keys(&["echo now=$(stty size)", "Enter"]);
    tmux.shows("now=40 120");
    tmux.keys(&["sleep 1004; echo code=$?", "Enter"]);
    assert!(wait_until(LONG, || guest.runs("100[4]")));
    tmux.keys(&["C-c"]);
    assert!(wait_until(LONG, || !guest.runs("100[4]")), "Ctrl-C does not reach it");
    // A program that takes the whole screen and single keys.
    let program = "python3 -c 'import curses; print(\"key\", curses.wrapper(lambda s: \
        (s.addstr(20, 40, f\"at {4 * 5},40\"), s.getch())[1]))'";
    tmux.keys(&["-l", program]);
    tmux.keys(&["Enter"]);
    tmux.shows("at 20,40");
    let screen = tmux.run(&["capture-pane", "-p"]);
    assert_eq!(screen.lines().nth(20).and_then(|line| line.find("at 20,40")), Some(40), "{screen}");
    tmux.keys(&["x"]);
    tmux.shows("key 120");
    tmux.keys(&["exit", "Enter"]);
    assert!(wait_until(LONG, || !guest.runs("-.*s[h]")), "the shell lives on");
}

#[test]
fn an_editor_is_usable_on_a_real_terminal() {
    let guest = Guest::of("tools", &[]);
    let tmux = Tmux::start(&format!("{}; sleep 1000", guest.line(&format!("shell {}", guest.id))));
    tmux.keys(&["cd /tmp; seq 5 >list; vim.tiny -u NONE -N list; echo left=$?", "Enter"]);
    tmux.shows("5L, 10B");
    // Inserted, moved by arrow keys, undone, replaced.
    tmux.keys(&["-l", "Gothe seventh"]);
    tmux.keys(&["Escape", "Up", "x", "u"]);
    tmux.keys(&["-l", ":%s/3/third/"]);
    tmux.keys(&["Enter"]);
    tmux.shows("third");
    // It fills a window that has become larger: six lines of text, and one of messages.
    tmux.run(&["resize-window", "-x", "120", "-y", "40"]);
    let fills = || tmux.run(&["capture-pane", "-p"]).lines().filter(|line| *line == "~").count() == 33;
    assert!(wait_until(LONG, fills), "not redrawn:\n{}", tmux.run(&["capture-pane", "-p"]));
    tmux.keys(&["-l", ":wq"]);
    tmux.keys(&["Enter"]);
    tmux.shows("left=0");
    assert_eq!(guest.shell("cat /tmp/list"), "1\n2\nthird\n4\n5\nthe seventh\n");
    // Asked to end by Ctrl-C, it says how.
    tmux.keys(&["clear; vim.tiny -u NONE -N; echo ended=$?", "Enter"]);
    tmux.shows("VIM - Vi IMproved");
    tmux.keys(&["C-c"]);
    tmux.shows("to exit Vim");
    tmux.keys(&["-l", ":q!"]);
    tmux.keys(&["Enter"]);
    tmux.shows("ended=0");
    tmux.keys(&["exit", "Enter"]);
    assert!(wait_until(LONG, || !guest.runs("-.*s[h]")), "the shell lives on");
}

/// A tree of files of many sizes, some of them links.
fn tree(dir: &Path, files: u64) {
    for number in 0..files {
        let place = dir.join(format!("d{}", number % 40));
        if number < 40 {
            fs::create_dir_all(&place).unwrap();
        }
        let contents: Vec<u8> = (0..number * 37 % 9000).map(|i| (i * number % 251) as u8).collect();
        let path = place.join(format!("f{number}"));
        fs::write(&path, contents).unwrap();
        if number % 100 == 7 {
            fs::hard_link(&path, place.join(format!("h{number}"))).unwrap();
            std::os::unix::fs::symlink(format!("f{number}"), place.join(format!("l{number}"))).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        }
    }
}

/// Modes, times, names, targets and digests.
const LISTING: &str = "cd $DIR && find . -printf '%y %m %Ts %P %l\\n' | sort | sha256sum && \
    find . -type f | sort | xargs sha256sum | sha256sum";

fn listing(dir: &Path) -> String {
    let output = Command::new("sh").args(["-c", LISTING]).env("DIR", dir).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_tree_goes_in_and_comes_out_as_it_was() {
    let guest = Guest::fork(&[]);
    let files = number("FORKD_DOORS_FILES", 200);
    let source = guest.copies.bed.path("source");
    tree(&source, files);
    let inside = format!("{}:/tmp/copy", guest.id);
    let started = Instant::now();
    let report = guest.copies.json(&["cp", source.to_str().unwrap(), &inside]);
    let took_in = started.elapsed();
    assert!(report["entries"].as_u64().unwrap() > files);
    assert_eq!(guest.shell(&format!("export DIR=/tmp/copy; {LISTING}")), listing(&source));
    let back = guest.copies.bed.path("back");
    let started = Instant::now();
    guest.copies.json(&["cp", &inside, back.to_str().unwrap()]);
    println!("{files} files: in {took_in:.1?}, out {:.1?}", started.elapsed());
    assert_eq!(listing(&back), listing(&source));

    // Into a directory that exists, by name; its contents; and as an archive.
    fs::create_dir(guest.copies.bed.path("dir")).unwrap();
    let dir = guest.copies.bed.path("dir");
    let part = format!("{}:/tmp/copy/d7", guest.id);
    guest.copies.run(&["cp", &part, dir.to_str().unwrap()]).success();
    assert_eq!(listing(&dir.join("d7")), listing(&source.join("d7")));
    guest.copies.run(&["cp", &format!("{part}/f7"), dir.join("one").to_str().unwrap()]).success();
    assert_eq!(fs::read(dir.join("one")).unwrap(), fs::read(source.join("d7/f7")).unwrap());
    let archive = guest.command(&["cp", &part, "-"]).output().unwrap().stdout;
    let mut tar =
        Command::new("tar").args(["-tf", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    tar.stdin.take().unwrap().write_all(&archive).unwrap();
    let listed = String::from_utf8(tar.wait_with_output().unwrap().stdout).unwrap();
    assert!(listed.contains("d7/f7\n"), "{listed}");
    for (arguments, said) in [
        ([&part as &str, dir.join("one").to_str().unwrap()], "is a file"),
        ([&format!("{}:/no/such", guest.id), "-"], "/no/such"),
        ([dir.to_str().unwrap(), &format!("{}:/no/such/place/", guest.id)], "/no/such"),
        ([dir.to_str().unwrap(), &format!("{}:relative", guest.id)], "absolute"),
        (["a", "b"], "neither side"),
    ] {
        let text = guest.copies.run(&[&["cp"][..], &arguments].concat()).failure();
        assert!(text.contains(said), "{arguments:?}: {text}");
    }
}

#[test]
fn a_large_file_goes_through_without_being_held() {
    let guest = Guest::fork(&[]);
    let mib = number("FORKD_DOORS_MIB", 8);
    let source = guest.copies.bed.path("large");
    let mut file = fs::File::create(&source).unwrap();
    let mut random = fs::File::open("/dev/urandom").unwrap().take(mib << 20);
    std::io::copy(&mut random, &mut file).unwrap();
    let back = guest.copies.bed.path("back");
    let inside = format!("{}:/dev/shm/large", guest.id);
    for (way, from, to) in
        [("in", source.to_str().unwrap(), inside.as_str()), ("out", &inside, back.to_str().unwrap())]
    {
        let started = Instant::now();
        let mut client = guest.command(&["cp", from, to]).spawn().unwrap();
        let mut resident = 0;
        while client.try_wait().unwrap().is_none() {
            resident = resident.max(resident_kib(client.id()));
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(client.wait().unwrap().success());
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "{way}: {mib} MiB in {seconds:.2} s, {:.1} MiB/s, forkd {resident} KiB",
            mib as f64 / seconds
        );
        assert!(resident < 64 << 10, "forkd has {resident} KiB");
    }
    assert!(Command::new("cmp").arg(&source).arg(&back).status().unwrap().success());
}

fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
