//! The help of every verb, found by walking the printed lists of commands, and the completions of bash.

use crate::golden::Golden;
use crate::program::run;
use crate::support::Lab;

/// The verbs that a help lists.
fn verbs(help: &str) -> Vec<String> {
    let list = help.split_once("\nCommands:\n").map_or("", |(_, rest)| rest);
    // A long help has an empty line behind every verb, and its description further in.
    let section = list.split("\nOptions:\n").next().unwrap();
    let lines = section.lines().filter_map(|line| line.strip_prefix("  "));
    lines
        .filter(|line| !line.starts_with(' '))
        .filter_map(|line| Some(line.split(' ').next()?.to_owned()))
        .collect()
}

fn walk(lab: &Lab, golden: &mut Golden, path: &[String]) {
    let mut args: Vec<&str> = path.iter().map(String::as_str).collect();
    args.push("--help");
    let help = run(lab, &args).ok();
    assert_eq!(help.stderr, "", "{args:?}");
    let name = if path.is_empty() { "forkd".to_owned() } else { path.join("-") };
    golden.check(&format!("{name}.txt"), &help.stdout);
    for verb in verbs(&help.stdout) {
        walk(lab, golden, &[path, &[verb]].concat());
    }
}

#[test]
fn help_and_completions_are_what_they_were() {
    let lab = Lab::new();
    let mut golden = Golden::open("help");
    walk(&lab, &mut golden, &[]);
    golden.check("completions.bash", &run(&lab, &["completions", "bash"]).ok().stdout);
    golden.check("version.txt", &run(&lab, &["--version"]).ok().stdout);
    golden.finish();
}
