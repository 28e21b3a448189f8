//! The `forkd` program: hands the command line to [`forkd::run`] and nothing else.
//!
//! No thread and no tokio runtime exists before a command asks for one: `forkd fork` must be able to fork its
//! zygote out of a process that still has a single thread.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    forkd::run(std::env::args_os())
}
