//! Machines' processes in their jail: what one that was taken over can do (a probe tries), and that a machine works in
//! there. Without libtest: it runs tests in threads, and a process with threads cannot fork machines.

#[path = "jail/attempts.rs"]
mod attempts;
mod common;
#[path = "jail/machines.rs"]
mod machines;
#[path = "jail/probe.rs"]
mod probe;
#[path = "jail/trace.rs"]
mod trace;

use std::process::{Command, ExitCode};

/// Name, what it does, and whether it is only run when asked for.
const TESTS: &[(&str, fn(), bool)] = &[
    ("whatever_a_machine_tries_is_refused", probe::run, false),
    ("a_machine_runs_in_its_jail", machines::runs, false),
    ("its_threads_and_vsock_work_and_it_is_not_anybody", machines::is_nobody, false),
    ("the_owner_hears_that_the_filter_ended_it", machines::filtered, false),
    ("machines_end_with_a_killed_owner", machines::orphaned, false),
    ("machines_run_where_there_are_no_namespaces", machines::fewer_privileges, false),
    ("a_machine_is_born_in_its_cgroup", machines::grouped, false),
    ("what_the_jail_costs", machines::cost, true),
];

/// As much of libtest's command line as cargo and nextest use.
fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let given = |flag: &str| arguments.iter().any(|argument| argument == flag);
    // Values of flags that have one are no names.
    let names = arguments.iter().filter(|argument| {
        !argument.starts_with('-') && *argument != "terse" && argument.parse::<u32>().is_err()
    });
    let names: Vec<_> = names.collect();
    let wanted = |name: &str| {
        let matches = |pattern: &&String| {
            if given("--exact") { name == pattern.as_str() } else { name.contains(pattern.as_str()) }
        };
        names.is_empty() || names.iter().any(matches)
    };
    let any = given("--include-ignored");
    let chosen: Vec<_> = TESTS
        .iter()
        .filter(|(name, _, ignored)| wanted(name) && (any || *ignored == given("--ignored")))
        .collect();
    if given("--list") {
        chosen.iter().for_each(|(name, ..)| println!("{name}: test"));
    } else if given("--exact") {
        chosen.iter().for_each(|(_, test, _)| test());
    } else {
        // One process each: some start threads.
        let this = std::env::current_exe().expect("this program's path");
        for (name, ..) in &chosen {
            let mut alone = Command::new(&this);
            let passed =
                alone.args(["--exact", "--include-ignored", name]).status().expect("this program").success();
            println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
            if !passed {
                return ExitCode::FAILURE;
            }
        }
        println!("test result: ok. {} passed", chosen.len());
    }
    ExitCode::SUCCESS
}
