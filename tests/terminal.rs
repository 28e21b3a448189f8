//! Log lines on a terminal, and where there is none.

mod support;

use std::process::Command;

use support::Lab;

/// Everything that a forkd with something to warn about prints, on a terminal (`script` makes one) or into a file.
fn printed(lab: &Lab, terminal: bool, no_color: Option<&str>) -> String {
    let forkd = lab.command::<&str>(&[]);
    let line = format!("'{}' images --hub /nowhere", forkd.get_program().to_str().unwrap());
    let (shell, arguments) = if terminal {
        ("script", vec!["-qec", line.as_str(), "/dev/null"])
    } else {
        ("sh", vec!["-c", line.as_str()])
    };
    let mut command = Command::new(shell);
    command.args(arguments).current_dir(lab.path("work")).env_remove("NO_COLOR").env_remove("FORKD_LOG");
    for (name, value) in forkd.get_envs().filter_map(|(name, value)| Some((name, value?))) {
        command.env(name, value);
    }
    command.envs(no_color.map(|value| ("NO_COLOR", value)));
    // No HTTP header can have it.
    let output = command.env("FORKD_HUB_TOKEN", "a\u{1}b").env("TERM", "xterm").output().unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(text.contains("holds characters no HTTP header may"), "{text}");
    text
}

#[test]
fn log_lines_are_coloured_on_terminals_only_and_not_with_no_color() {
    let lab = Lab::new();
    for (terminal, no_color, coloured) in [
        (true, None, true),
        (true, Some(""), true),
        (true, Some("1"), false),
        (false, None, false),
        (false, Some(""), false),
    ] {
        let text = printed(&lab, terminal, no_color);
        assert_eq!(text.contains('\u{1b}'), coloured, "terminal {terminal}, NO_COLOR {no_color:?}: {text:?}");
    }
}
