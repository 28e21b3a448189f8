//! The bench scripts still run: nobody does that between two measurements, and what they call changes.

#[path = "support/program.rs"]
mod program;

use std::process::Command;

const HERE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches");

/// Runs a command to its end, which must be a good one; returns what it printed.
fn done(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{errors}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

const SCRIPTS: [&str; 8] = ["ttfi", "fanout", "fault", "mount", "net", "forward", "packs", "branch"];

#[test]
fn every_script_says_what_it_measures_and_needs() {
    for script in SCRIPTS {
        let help = done(Command::new("python3").arg(format!("{HERE}/{script}.py")).arg("--help"));
        for part in ["--runs", "--csv", "\nNeeds: "] {
            assert!(help.contains(part), "{part}: {help}");
        }
    }
}

#[test]
fn every_script_says_what_is_missing_before_it_starts() {
    for script in SCRIPTS {
        let mut command = Command::new("python3");
        let output = command.arg(format!("{HERE}/{script}.py")).arg("/absent/forkd").output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(
            errors.starts_with(&format!("{script}.py cannot run here:\n  /absent/forkd is no program")),
            "{errors}"
        );
    }
}

#[test]
fn a_small_fan_out_is_measured_beside_its_floor() {
    let dir = tempfile::tempdir().unwrap();
    let (csv, svg) = (dir.path().join("fanout.csv"), dir.path().join("fanout.svg"));
    let printed = done(
        Command::new("python3")
            .arg(format!("{HERE}/fanout.py"))
            .arg(program::forkd())
            .args(["--synthetic", "--counts", "2", "--runs", "1", "--csv"])
            .arg(&csv)
            .arg("--svg")
            .arg(&svg),
    );
    let table = std::fs::read_to_string(csv).unwrap();
    for way in ["floor", "local", "eager"] {
        assert!(table.contains(&format!("2,{way},last first instruction,ms,")), "{printed}\n{table}");
        assert!(table.contains(&format!("2,{way},failed,children,0.0000,")), "{printed}\n{table}");
    }
    assert!(std::fs::read_to_string(svg).unwrap().contains("</svg>"));
}
