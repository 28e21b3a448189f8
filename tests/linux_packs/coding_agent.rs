//! `coding-agent`: five copies clone a real package, install what it needs, and mend a bug in it, each in its own way. The
//! servers are the test's own.

use super::lab::{Guest, Lab};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// What each copy makes of the line that is wrong; the first one is right.
const LINES: [&str; 5] = [
    "del self.data[id(obj)]",
    "del self.data[hash(obj)]",
    "self.data.get(id(obj))",
    "self.data.clear()",
    "raise KeyError(id(obj))",
];
const TESTS: usize = 177;

/// As `git diff` writes it.
fn patch(line: &str) -> String {
    format!(
        "--- a/transaction/weakset.py\n\
         +++ b/transaction/weakset.py\n\
         @@ -49,7 +49,7 @@\n \
         \x20   # Same as a Set, remove obj from the collection, and raise\n \
         \x20   # KeyError if obj not in the collection.\n \
         \x20   def remove(self, obj):\n\
         -        del self.data[obj]\n\
         +        {line}\n \n \
         \x20   def clear(self):\n \
         \x20       self.data.clear()\n"
    )
}

/// What a worker's `test` answers.
struct Tested {
    exit: u32,
    passed: usize,
    failed: usize,
}

fn tested(lab: &Lab, guest: &Guest) -> Tested {
    let answer = lab.eval(guest, "{**(t := test('/root/transaction', '-q')), 'failed': len(t['failed'])}");
    let number = |name: &str| {
        let (_, rest) = answer.split_once(&format!("'{name}': ")).unwrap_or_else(|| panic!("{answer}"));
        rest.split([',', '}']).next().unwrap().parse().unwrap()
    };
    Tested { exit: number("exit") as u32, passed: number("passed"), failed: number("failed") }
}

fn run(lab: &Lab, arguments: &[&str]) -> String {
    lab.run(arguments).success()
}

/// The whole work of one copy.
fn work(lab: &Lab, guest: &Guest, line: &str) -> Tested {
    let id = guest.id.as_str();
    let authority = lab.internet.certificate();
    run(lab, &["cp", authority.to_str().unwrap(), &format!("{id}:/root/ca.pem")]);
    run(
        lab,
        &["exec", id, "--", "git", "clone", "-q", "git://git.test/transaction.git", "/root/transaction"],
    );
    let install = "pip('install', '-q', '--index-url', 'https://pypi-mirror.test/simple', '--cert', '/root/ca.pem', \
        '-r', '/root/transaction/requirements.txt')";
    assert_eq!(lab.eval(guest, install), "0");
    let buggy = tested(lab, guest);
    assert_eq!((buggy.exit, buggy.passed + buggy.failed), (1, TESTS), "before it is mended");
    let file = lab.bed.path(&format!("{id}.patch"));
    fs::write(&file, patch(line)).unwrap();
    run(lab, &["cp", file.to_str().unwrap(), &format!("{id}:/root/change.patch")]);
    run(lab, &["exec", id, "--", "git", "-C", "/root/transaction", "apply", "/root/change.patch"]);
    tested(lab, guest)
}

#[test]
fn five_agents_clone_install_and_mend_and_one_of_them_is_right() {
    let lab = Lab::new();
    let wheels = Path::new(env!("CARGO_TARGET_TMPDIR")).join("coding-agent");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/linux_packs/coding_agent.py");
    let made = Command::new("python3").arg(script).arg(wheels).arg(lab.internet.served()).status().unwrap();
    assert!(made.success());
    let guests =
        lab.fork_of("coding-agent", LINES.len(), &["--allow=git.test:9418", "--allow=pypi-mirror.test:443"]);
    let started = Instant::now();
    let results: Vec<Tested> = std::thread::scope(|scope| {
        let work = |(guest, line)| {
            scope.spawn({
                let lab = &lab;
                move || work(lab, guest, line)
            })
        };
        let workers: Vec<_> = guests.iter().zip(LINES).map(work).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    println!(
        "five copies cloned, installed, tested, mended and tested in {:.0} s",
        started.elapsed().as_secs_f64()
    );
    for (line, tested) in LINES.iter().zip(&results) {
        assert_eq!(tested.passed + tested.failed, TESTS, "{line}");
        assert_eq!((tested.exit == 0, tested.failed == 0), (*line == LINES[0], *line == LINES[0]), "{line}");
    }
    // The same by programs that are started, as an agent does that knows nothing of the worker.
    let id = guests[0].id.as_str();
    let pytest = "cd /root/transaction && python3 -m pytest -q transaction/tests/test_weakset.py | tail -1";
    assert!(run(&lab, &["exec", id, "--", "sh", "-c", pytest]).contains(" passed"));
    assert_eq!(
        run(&lab, &["exec", id, "--", "git", "-C", "/root/transaction", "diff", "--shortstat"]).trim(),
        "1 file changed, 1 insertion(+), 1 deletion(-)"
    );
    assert!(run(&lab, &["exec", id, "--", "gh", "--version"]).starts_with("gh version 2.23.0"));
    lab.kill_all();
}
