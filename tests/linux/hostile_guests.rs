//! Guests that do their worst from inside: their siblings and the host stay responsive, and they can be ended.

use super::harness::{Bed, Hub, alive, wait_until};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a guest does, as a program for its own Python or shell, and for how long it is watched.
const DEEDS: [(&str, &[&str]); 5] = [
    ("fills its memory", &["python3", "-c", "b = []\nwhile True: b.append(bytearray(1 << 20))"]),
    ("is a fork bomb", &["sh", "-c", "bomb() { bomb | bomb & }; bomb; sleep 60"]),
    (
        "floods vsock",
        &[
            "python3",
            "-c",
            "import socket, itertools\n\
             for port in itertools.count(1):\n\
             \tends = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\n\
             \ttry: ends.connect((2, port % 65536))\n\
             \texcept OSError: pass\n",
        ],
    ),
    (
        "spins on every CPU",
        &[
            "sh",
            "-c",
            "for cpu in $(grep -c processor /proc/cpuinfo); do while :; do :; done & done; while :; do :; done",
        ],
    ),
    (
        "writes every page",
        &[
            "python3",
            "-c",
            "b = bytearray(400 << 20)\nwhile True:\n\tfor at in range(0, len(b), 4096): b[at] ^= 1",
        ],
    ),
];
const LOOKS: usize = 3;
/// How long a guest misbehaves before anybody looks.
const HEAD_START: Duration = Duration::from_secs(2);
/// Beyond this a sibling is not responsive. An evaluation takes 0.1 s on an idle host; here two machines, one of them busy
/// with all its might, share two processors with the tests.
const SIBLING_WITHIN: Duration = Duration::from_secs(20);
/// Beyond this the host is not.
const HOST_WITHIN: Duration = Duration::from_secs(2);

fn timed<T>(work: impl FnOnce() -> T) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}

fn show(times: &[Duration]) -> String {
    let list: Vec<_> = times.iter().map(|time| time.as_millis().to_string()).collect();
    list.join(" ")
}

#[test]
fn the_worst_of_guests_disturbs_neither_its_sibling_nor_the_host() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    println!(
        "| a guest that | its sibling answers after (ms) | the host starts a process in (ms) |\n|---|---|---|"
    );
    for (deed, program) in DEEDS {
        let report = bed.json(&hub, &["fork", "deeplethe/python-numpy", "-n", "2", "--detach"]);
        let child = |at: usize| {
            let child = &report["children"][at];
            (child["id"].as_str().unwrap(), child["pid"].as_i64().unwrap())
        };
        let ((culprit, pid), (sibling, other)) = (child(0), child(1));
        let mut command = bed.command(&hub);
        command.args(["exec", culprit, "--"]).args(program).stdout(Stdio::null()).stderr(Stdio::null());
        let mut running = command.spawn().unwrap();
        std::thread::sleep(HEAD_START);
        let (mut answers, mut starts) = (Vec::new(), Vec::new());
        for _ in 0..LOOKS {
            answers.push(timed(|| {
                let answer = bed.json(&hub, &["eval", sibling, "int(numpy.arange(1000).sum())"]);
                assert_eq!(answer["answer"], "499500", "{deed}");
            }));
            starts.push(timed(|| assert!(Command::new("true").status().unwrap().success())));
        }
        println!("| {deed} | {} | {} |", show(&answers), show(&starts));
        assert!(answers.iter().all(|time| *time < SIBLING_WITHIN), "{deed}: {answers:?}");
        assert!(starts.iter().all(|time| *time < HOST_WITHIN), "{deed}: {starts:?}");
        assert_eq!(
            bed.json(&hub, &["kill", "--all"])["killed"].as_u64().map(|killed| killed >= 1),
            Some(true)
        );
        let gone = || !alive(pid) && !alive(other) && !bed.has_run_dirs();
        assert!(wait_until(Duration::from_secs(10), gone), "{deed}: something is left");
        let _ = running.kill();
        running.wait().unwrap();
    }
}
