//! `forkd serve --install-unit`: has systemd start the daemon when its socket is first asked.

use crate::failure::CommandError;
use crate::output::Output;
use serde::Serialize;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Where units of the whole machine, and of one user below its configuration directory, go.
const OF_THE_MACHINE: &str = "/etc/systemd/system";
const OF_A_USER: &str = "systemd/user";

#[derive(Debug, Serialize)]
struct Installed {
    files: Vec<PathBuf>,
    start: String,
}

/// Writes both units into `directory`, or where systemd looks for this user's. `arguments` are the daemon's.
pub fn install(
    directory: Option<&Path>,
    socket: &Path,
    arguments: &[String],
    output: &Output,
) -> Result<ExitCode, CommandError> {
    let root = rustix::process::geteuid().is_root();
    let directory = match (directory, root) {
        (Some(directory), _) => directory.to_owned(),
        (None, true) => PathBuf::from(OF_THE_MACHINE),
        (None, false) => configuration().ok_or_else(no_home)?.join(OF_A_USER),
    };
    let failed = |path: &Path| {
        let program = format!("systemd with {}", path.display());
        move |source| CommandError::Daemon { program, source }
    };
    fs::create_dir_all(&directory).map_err(failed(&directory))?;
    let program = std::env::current_exe().map_err(failed(&directory))?;
    let units =
        [("forkd.socket", socket_unit(socket)), ("forkd.service", service_unit(&program, arguments, root))];
    let mut files = Vec::new();
    for (name, text) in units {
        let path = directory.join(name);
        fs::write(&path, text).map_err(failed(&path))?;
        files.push(path);
    }
    let user = if root { "" } else { "--user " };
    let start = format!("systemctl {user}daemon-reload && systemctl {user}enable --now forkd.socket");
    output.report(&Installed { files, start }, |installed| {
        let written = installed.files.iter().map(|file| format!("wrote {}\n", file.display()));
        format!("{}start it with: {}\n", written.collect::<String>(), installed.start)
    });
    Ok(ExitCode::SUCCESS)
}

fn configuration() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")))
}

fn no_home() -> CommandError {
    let source = io::Error::new(io::ErrorKind::NotFound, "neither XDG_CONFIG_HOME nor HOME is set");
    CommandError::Daemon { program: "systemd".to_owned(), source }
}

fn socket_unit(socket: &Path) -> String {
    format!(
        "[Unit]\nDescription=forkd's socket\n\n[Socket]\nListenStream={}\nSocketMode=0600\nDirectoryMode=0700\n\n\
         [Install]\nWantedBy=sockets.target\n",
        socket.display()
    )
}

/// Only the daemon itself is ended with the unit: sandboxes outlive it unless it was told otherwise. Their limits need
/// cgroups of their own.
fn service_unit(program: &Path, arguments: &[String], root: bool) -> String {
    let words =
        [program.display().to_string(), "serve".to_owned()].into_iter().chain(arguments.iter().cloned());
    let line = words.map(|word| quoted(&word)).collect::<Vec<_>>().join(" ");
    // systemd gives a service of the machine no HOME.
    let home = if root { "Environment=HOME=/root\n" } else { "" };
    format!(
        "[Unit]\nDescription=forkd: sandboxes over REST\nRequires=forkd.socket\nAfter=network.target\n\n\
         [Service]\nExecStart={line}\n{home}KillMode=process\nDelegate=yes\nLimitNOFILE=infinity\nRestart=on-failure\n\n\
         [Install]\nWantedBy=default.target\n"
    )
}

/// A word of a command line as systemd.service(5) reads it.
fn quoted(word: &str) -> String {
    let escaped = word.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    match escaped.contains([' ', '\t', '"', '\'', ';']) {
        true => format!("\"{escaped}\""),
        false => escaped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stay_words() {
        let unit =
            service_unit(Path::new("/opt/a b/forkd"), &["--hub".to_owned(), "100%$x\"y".to_owned()], true);
        assert!(unit.contains("ExecStart=\"/opt/a b/forkd\" serve --hub \"100%%$$x\\\"y\"\n"), "{unit}");
    }
}
