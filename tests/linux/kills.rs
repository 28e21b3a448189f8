//! kill -9 of every process that takes part in a fork, in every phase of it: nothing may be left, siblings go on, and
//! the user is told. Short in the gate; `FORKD_SOAK=full` kills 200 times (`make soak`).

use super::harness::{Bed, Hub, mounts_of, processes_of, soak, wait_until};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const KILLS: usize = 10;
const KILLS_FULL: usize = 200;
const CHILDREN: usize = 2;
/// How long a fork may take whatever happens to it.
const ENDS_WITHIN: Duration = Duration::from_secs(120);
/// How long the processes of a fork may take to follow the one that was killed.
const GONE_WITHIN: Duration = Duration::from_secs(5);
/// How long the hub stays away.
const HUB_AWAY: Duration = Duration::from_millis(300);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Supervisor,
    Zygote,
    Machine,
    Hub,
}

/// How far the fork was when it was hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    NoZygote,
    Fetching,
    Spawning,
    Running,
    Over,
}

/// A row of the table.
#[derive(Debug, Default)]
struct Row {
    times: usize,
    processes_left: usize,
    left_after_cleanup: usize,
    seen: BTreeMap<String, usize>,
}

fn children_of(pid: u32) -> Vec<u32> {
    let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    // It may have ended by itself.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// Numbers that look random and are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound.max(1)
    }
}

fn start(bed: &Bed, hub: &Hub) -> Child {
    let code = "int(numpy.arange(1000).sum())";
    let count = CHILDREN.to_string();
    let mut command = bed.command(hub);
    command.args(["fork", "deeplethe/python-numpy", "-n", &count, "--eval", code]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn phase_of(fork: &mut Child) -> Phase {
    if fork.try_wait().unwrap().is_some() {
        return Phase::Over;
    }
    match children_of(fork.id()).first().map(|zygote| children_of(*zygote).len()) {
        None => Phase::NoZygote,
        Some(0) => Phase::Fetching,
        Some(machines) if machines < CHILDREN => Phase::Spawning,
        Some(_) => Phase::Running,
    }
}

/// Kills the victim, if it exists. A hub comes back after a moment.
fn strike(victim: Victim, fork: &Child, hub: Hub) -> Hub {
    let zygote = children_of(fork.id()).first().copied();
    match victim {
        Victim::Supervisor => kill(fork.id()),
        Victim::Zygote => zygote.into_iter().for_each(kill),
        Victim::Machine => zygote.and_then(|pid| children_of(pid).pop()).into_iter().for_each(kill),
        Victim::Hub => {
            let hub = hub.stop();
            std::thread::sleep(HUB_AWAY);
            return hub.start_again();
        }
    }
    hub
}

fn end_of(fork: &mut Child) -> (ExitStatus, String) {
    let deadline = Instant::now() + ENDS_WITHIN;
    let status = loop {
        match fork.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                kill(fork.id());
                panic!("a fork hangs");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let mut text = String::new();
    fork.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    fork.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (status, text)
}

/// What the user saw, without what differs from run to run.
fn summary(status: ExitStatus, text: &str) -> String {
    let answers = text.matches("499500").count();
    let told = ["was killed", "does not answer", "ended at once", "is gone", "cannot be reached", "failed"];
    let named = told.into_iter().find(|words| text.contains(words)).unwrap_or("");
    match (status.code(), status.signal()) {
        (Some(code), _) => {
            format!("exit {code}, {answers} answers{}{named}", if named.is_empty() { "" } else { ", " })
        }
        (None, signal) => format!("signal {}", signal.unwrap_or(0)),
    }
}

#[test]
fn whoever_is_killed_and_whenever_nothing_is_left() {
    let full = soak();
    let bed = Bed::new();
    let mut hub = Hub::serve(&bed, &["--rtt", "20ms", "--bandwidth", "50MB/s"]);
    let began = Instant::now();
    let (status, text) = end_of(&mut start(&bed, &hub));
    assert!(status.success() && text.matches("499500").count() == CHILDREN, "{text}");
    let undisturbed = began.elapsed();
    let (mut random, mut table) = (Random(0x9e37_79b9), BTreeMap::<(Victim, Phase), Row>::new());
    for round in 0..if full { KILLS_FULL } else { KILLS } {
        let victim = [Victim::Supervisor, Victim::Machine, Victim::Zygote, Victim::Hub][round % 4];
        if random.below(2) == 0 {
            // Cold: everything comes from the hub.
            let _ = fs::remove_dir_all(bed.path("cache"));
        }
        let mut fork = start(&bed, &hub);
        std::thread::sleep(Duration::from_micros(random.below(undisturbed.as_micros() as u64)));
        let phase = phase_of(&mut fork);
        hub = strike(victim, &fork, hub);
        let (status, text) = end_of(&mut fork);
        let run = bed.path("run");
        let row = table.entry((victim, phase)).or_default();
        row.times += 1;
        *row.seen.entry(summary(status, &text)).or_default() += 1;
        wait_until(GONE_WITHIN, || processes_of(&run).is_empty());
        row.processes_left += processes_of(&run).len();
        bed.run(&hub, &["cleanup"]).success();
        row.left_after_cleanup += usize::from(bed.has_run_dirs()) + mounts_of(&run);
        let sibling = victim == Victim::Machine && phase == Phase::Running;
        assert!(!sibling || text.contains("499500"), "a killed machine took its sibling with it: {text}");
    }
    println!(
        "| killed | when | times | processes left | left after cleanup | seen |\n|---|---|---|---|---|---|"
    );
    for ((victim, phase), row) in &table {
        let Row { times, processes_left, left_after_cleanup, seen } = row;
        println!("| {victim:?} | {phase:?} | {times} | {processes_left} | {left_after_cleanup} | {seen:?} |");
    }
    assert!(table.values().all(|row| row.processes_left + row.left_after_cleanup == 0), "something is left");
}
