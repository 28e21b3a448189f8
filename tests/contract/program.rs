//! forkd run where nothing of the user's can be seen in what it prints.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use crate::golden::Names;
use crate::support::{Lab, Run};

/// forkd with the environment of a lab and nothing of ours but PATH.
pub fn command(lab: &Lab, args: &[&str]) -> Command {
    let theirs = lab.command(args);
    let mut command = Command::new(theirs.get_program());
    command.args(args).current_dir(lab.path("work")).stdin(Stdio::null()).env_clear();
    command.envs(theirs.get_envs().filter_map(|(name, value)| Some((name, value?))));
    // A width for help: without a terminal it is taken from here.
    command.env("COLUMNS", "100").env("HOME", lab.path("home"));
    command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    command
}

pub fn run(lab: &Lab, args: &[&str]) -> Run {
    command(lab, args).output().unwrap().into()
}

/// The synthetic snapshot, always with the same pack.
pub fn dated_snapshot(lab: &Lab, tag: &str) {
    date(&lab.snapshot(tag, 16));
}

/// Gives the files of a snapshot a fixed time: a pack has the times of its files.
pub fn date(snapshot: &Path) {
    for entry in fs::read_dir(snapshot).unwrap().flatten() {
        let file = File::options().append(true).open(entry.path()).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1_767_323_045)).unwrap();
    }
}

/// The names of a lab's places.
pub fn names(lab: &Lab) -> Names {
    let mut names = Names::default();
    names.path(lab.path("work").parent().unwrap(), "lab");
    names
}

/// A command line and everything that came of it.
pub fn transcript(args: &[&str], run: &Run) -> String {
    let code = run.code.map_or("none".to_owned(), |code| code.to_string());
    let quoted: Vec<_> = args.iter().map(|arg| quoted(arg)).collect();
    let streams = section("stdout", &run.stdout) + &section("stderr", &run.stderr);
    format!("$ forkd {}\nexit code {code}\n{streams}", quoted.join(" "))
}

fn quoted(arg: &str) -> String {
    if arg.is_empty() || arg.contains([' ', '\'', '"']) { format!("{arg:?}") } else { arg.to_owned() }
}

fn section(name: &str, text: &str) -> String {
    match text {
        "" => format!("--- {name}: nothing\n"),
        whole if whole.ends_with('\n') => format!("--- {name}\n{whole}"),
        open => format!("--- {name}\n{open}\n--- {name} has no newline at its end\n"),
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
