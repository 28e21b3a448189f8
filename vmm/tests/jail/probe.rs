//! Tries everything of `attempts.rs` in processes that enter the jail as machines do, once with and once without the
//! system call filter, and prints what happened. Whatever succeeds fails the test.

use crate::attempts::{ATTEMPTS, Around, Attempt};
use forkd_vmm::jail::{FILE_BYTES, Isolation, Jail, JailOptions, UffdUse};
use forkd_vmm::sys::{self, ConfinedFork, Forked, Lifetime};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use std::fs::File;
use std::io::{Read, Write};

/// What came of an attempt.
enum Outcome {
    Possible,
    Refused(Errno),
    Ended(i32),
}

impl Outcome {
    fn text(&self) -> String {
        match self {
            Outcome::Possible => "possible".to_owned(),
            Outcome::Refused(errno) => {
                let text = std::io::Error::from(*errno).to_string();
                text.split(" (os error").next().unwrap_or_default().to_lowercase()
            }
            Outcome::Ended(signal) if *signal == Signal::SYS.as_raw() => "ended (SIGSYS)".to_owned(),
            Outcome::Ended(signal) => format!("ended (signal {signal})"),
        }
    }
}

/// The test: forks a process that takes the zygote's part, and reads its table.
pub fn run() {
    let (mut read, write) = rustix::pipe::pipe().map(|(a, b)| (File::from(a), File::from(b))).unwrap();
    let owner = rustix::process::getpid();
    match sys::fork_process(Lifetime::BoundToParent).unwrap() {
        Forked::Child => {
            drop(read);
            let wrong = take_the_zygotes_part(owner, write);
            sys::exit_now(i32::from(wrong))
        }
        Forked::Parent(zygote) => {
            drop(write);
            let mut table = String::new();
            read.read_to_string(&mut table).unwrap();
            println!("{table}");
            let ended = rustix::process::waitid(WaitId::Pid(zygote), WaitIdOptions::EXITED).unwrap();
            assert!(table.contains("| start 1000 threads |"), "the probe did not get to its end");
            assert_eq!(ended.and_then(|ended| ended.exit_status()), Some(0), "something was possible");
        }
    }
}

fn take_the_zygotes_part(owner: Pid, mut table: File) -> bool {
    let jail = Jail::build().expect("the jail can be built here");
    assert_eq!(jail.isolation(), Isolation::Privileged, "these tests need root");
    let (console, foreign) = (memory_file(), memory_file());
    let mut cell = JailOptions { number: 1, file_bytes: FILE_BYTES, uffd: UffdUse::None };
    let sibling = match sys::fork_confined(jail.place(None)).unwrap() {
        ConfinedFork::Child => {
            jail.enter(&cell, &[]).unwrap();
            loop {
                std::thread::sleep(std::time::Duration::from_secs(60));
            }
        }
        ConfinedFork::Parent { pid, pidfd } => (pid, pidfd),
    };
    writeln!(table, "| attempt | in the jail | in the jail without its filter |\n|---|---|---|").unwrap();
    let mut wrong = false;
    for attempt in ATTEMPTS {
        let mut outcomes = Vec::new();
        for filtered in [true, false] {
            cell.number += 1;
            let (mut read, mut write) =
                rustix::pipe::pipe().map(|(a, b)| (File::from(a), File::from(b))).unwrap();
            match sys::fork_confined(jail.place(None)).unwrap() {
                ConfinedFork::Child => {
                    let files = [console.as_fd(), write.as_fd()];
                    let (opened, filter) = jail.confine(&cell, &files).expect("the jail can be entered");
                    if filtered {
                        filter.install().expect("the filter can be installed");
                    }
                    let around = Around {
                        owner: owner.as_raw_nonzero().get(),
                        sibling: sibling.0.as_raw_nonzero().get(),
                        kvm: opened.hypervisor.as_fd().as_raw_fd(),
                        console: console.as_raw_fd(),
                        foreign: foreign.as_raw_fd(),
                    };
                    let code = (attempt.run)(&around).map_or_else(Errno::raw_os_error, |()| 0);
                    let _ = write.write_all(&code.to_ne_bytes());
                    sys::exit_now(0)
                }
                ConfinedFork::Parent { pidfd, .. } => {
                    drop(write);
                    outcomes.push(outcome(&mut read, &pidfd));
                }
            }
        }
        wrong |= is_wrong(attempt, &outcomes);
        writeln!(table, "| {} | {} | {} |", attempt.what, outcomes[0].text(), outcomes[1].text()).unwrap();
    }
    let alive = rustix::process::waitid(
        WaitId::PidFd(sibling.1.as_fd()),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    );
    let harmed = !matches!(alive, Ok(None));
    if harmed {
        writeln!(table, "the sibling did not survive").unwrap();
    }
    wrong || harmed
}

fn is_wrong(attempt: &Attempt, outcomes: &[Outcome]) -> bool {
    let possible = |outcome: &Outcome| matches!(outcome, Outcome::Possible);
    possible(&outcomes[0]) || attempt.twice && possible(&outcomes[1])
}

fn outcome(read: &mut File, pidfd: &OwnedFd) -> Outcome {
    let mut code = [0; 4];
    let answered = read.read_exact(&mut code).is_ok();
    let ended = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).unwrap();
    match (answered, ended.and_then(|ended| ended.terminating_signal())) {
        (true, _) if i32::from_ne_bytes(code) == 0 => Outcome::Possible,
        (true, _) => Outcome::Refused(Errno::from_raw_os_error(i32::from_ne_bytes(code))),
        (false, Some(signal)) => Outcome::Ended(signal),
        (false, None) => panic!("the process of an attempt ended without an answer"),
    }
}

fn memory_file() -> OwnedFd {
    rustix::fs::memfd_create("console", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
}
