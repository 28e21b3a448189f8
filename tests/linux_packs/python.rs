//! This host's Python with the packages that a test asks for, pinned, in a folder of the build.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder of packages.
pub struct Python {
    packages: PathBuf,
}

fn beside(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/linux_packs").join(name)
}

impl Python {
    /// With what a requirements file beside this one lists, fetched once.
    pub fn with(requirements: &str) -> Python {
        let file = beside(requirements);
        let packages = Path::new(env!("CARGO_TARGET_TMPDIR")).join(requirements);
        let lock = std::fs::read_to_string(&file).unwrap();
        let done = packages.join("done");
        if std::fs::read_to_string(&done).ok().as_ref() != Some(&lock) {
            let mut pip = Command::new("python3");
            pip.args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--require-hashes",
            ]);
            pip.args(["--upgrade", "--target"]).arg(&packages).arg("--requirement").arg(&file);
            assert!(pip.status().unwrap().success(), "pip cannot fetch {requirements}");
            std::fs::write(done, lock).unwrap();
        }
        Python { packages }
    }

    /// Without packages.
    pub fn plain() -> Python {
        Python { packages: PathBuf::new() }
    }

    /// Runs a program beside this file, which must succeed, and reads the JSON document that it prints.
    pub fn json(&self, program: &str, arguments: &[&str]) -> Value {
        let mut python = Command::new("python3");
        python.arg("-u").arg(beside(program)).args(arguments).env("PYTHONPATH", &self.packages);
        let output = python.output().unwrap();
        let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(output.status.success(), "{program}: {stdout}{stderr}");
        serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}"))
    }
}
