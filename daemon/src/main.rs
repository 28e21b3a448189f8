//! The `forkd-daemon` program: hands its arguments to [`forkd_daemon::run`] and nothing else.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    forkd_daemon::run(std::env::args_os())
}
