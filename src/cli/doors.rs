//! Arguments of the commands that reach into a running child.

use crate::units;
use clap::Args;
use std::time::Duration;

/// How a command is run in a child.
#[derive(Debug, Clone, Args)]
pub struct CommandArgs {
    /// NAME=VALUE for the command's environment (repeatable)
    #[arg(long, short = 'e', value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// The command's working directory in the guest
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Run it as this user of the guest, names as in its /etc/passwd and /etc/group [default: root]
    #[arg(long, short = 'u', value_name = "NAME|UID[:GROUP|GID]")]
    pub user: Option<String>,
}

/// `forkd exec`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: the command's own; 128 and the signal's number when a signal ended it; 124 timed out, \
    126 cannot be run, 127 not found; 1 when forkd failed."
)]
pub struct ExecArgs {
    /// The child, as `forkd ps` names it
    pub id: String,
    /// How it is run.
    #[command(flatten)]
    pub how: CommandArgs,
    /// Pass our stdin on
    #[arg(long, short = 'i')]
    pub interactive: bool,
    /// Give the command a terminal; keys, Ctrl-C among them, go to it
    #[arg(long, short = 't')]
    pub tty: bool,
    /// Return once it is started; it goes on without input and output
    #[arg(long, short = 'd', conflicts_with_all = ["interactive", "tty", "timeout"])]
    pub detach: bool,
    /// Kill it when it runs longer, e.g. 30s or 5m
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration)]
    pub timeout: Option<Duration>,
    /// The command
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// `forkd shell`.
#[derive(Debug, Args)]
pub struct ShellArgs {
    /// The child, as `forkd ps` names it
    pub id: String,
    /// How it is run.
    #[command(flatten)]
    pub how: CommandArgs,
    /// Run this instead of the shell
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// `forkd cp`.
#[derive(Debug, Args)]
#[command(
    override_usage = "forkd cp [OPTIONS] ID:/PATH DEST|-\n       forkd cp [OPTIONS] SRC|- ID:/PATH",
    after_help = "A directory that exists is copied into, by the source's own name; `SRC/.` copies what is in SRC. \
        `-` is a tar archive on stdin or stdout. Devices, FIFOs, sockets and extended attributes are not copied; \
        out of a child, neither are set-user-id bits."
)]
pub struct CpArgs {
    /// What is copied: ID:/PATH, a path of this host (./ in front of one with a colon), or - for a tar archive
    #[arg(value_name = "SRC")]
    pub from: String,
    /// Where to: likewise
    #[arg(value_name = "DEST")]
    pub to: String,
    /// Into a child: keep user and group ids, instead of all being root's
    #[arg(long, short = 'a')]
    pub archive: bool,
    /// If SRC is a symbolic link, copy what it leads to
    #[arg(long, short = 'L')]
    pub follow_link: bool,
}
