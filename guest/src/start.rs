//! `forkd-agent --start ORDER [PROGRAM ARGUMENT...]`: becomes a user, and then the program.
//!
//! The agent starts itself so where a program is to run as another user or as a login would. What goes wrong is said in
//! one response on descriptor 3, which closes by itself when the program begins.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use forkd_abi::protocol::{Response, encode_control};
use rustix::fs::{Gid, Uid, fchown};
use rustix::process::chdir;
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::agent::program::{Refusal, StartOrder, program_path};
use crate::agent::sys;
use crate::users::{self, Account};

/// Returns only when the program could not be started, and has said why.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let report = match sys::inherited(sys::REPORT) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("forkd-agent: started without a place to report to: {error}");
            return ExitCode::FAILURE;
        }
    };
    let Err(refusal) = start(arguments);
    if let Ok(text) = encode_control(&Response::from(refusal)) {
        let _ = File::from(report).write_all(&text);
    }
    ExitCode::FAILURE
}

fn start(mut arguments: impl Iterator<Item = OsString>) -> Result<std::convert::Infallible, Refusal> {
    let order = arguments.next().unwrap_or_default();
    let order: StartOrder = serde_json::from_slice(order.as_encoded_bytes())
        .map_err(|error| Refusal::new(format!("the order to start a program: {error}")))?;
    let mut argv: Vec<String> = arguments.map(|argument| argument.to_string_lossy().into_owned()).collect();
    let account = users::find(order.user.as_deref().unwrap_or_default()).map_err(Refusal::new)?;
    let mut env: BTreeMap<String, String> = std::env::vars().collect();
    let shell = login_shell(&account, &env);
    let named = [("HOME", &account.home), ("USER", &account.name), ("LOGNAME", &account.name)];
    for (key, value) in named.into_iter().chain(order.login.then_some(("SHELL", &shell))) {
        if !order.given.iter().any(|given| given == key) {
            env.insert(key.to_owned(), value.clone());
        }
    }
    let mut name = None;
    if argv.is_empty() && order.login {
        // The dash makes it a login shell.
        name = Some(format!("-{}", shell.rsplit('/').next().unwrap_or(&shell)));
        argv.push(shell);
    }
    become_user(&account)
        .map_err(|error| Refusal::new(format!("cannot become user {}: {error}", account.name)))?;
    let program = argv.first().cloned().unwrap_or_default();
    enter(&order, &account, &program)?;
    let path = program_path(&argv, &env)?;
    let error = Command::new(path)
        .arg0(name.as_ref().unwrap_or(&program))
        .args(&argv[1..])
        .env_clear()
        .envs(&env)
        .exec();
    Err(Refusal::of_program(&program, &error))
}

/// The shell that is listed, or the environment's, or the one that every machine has.
fn login_shell(account: &Account, env: &BTreeMap<String, String>) -> String {
    let shell = account.shell.clone().or_else(|| env.get("SHELL").filter(|shell| !shell.is_empty()).cloned());
    shell.unwrap_or_else(|| "/bin/sh".to_owned())
}

/// Takes on the user's ids, and gives it the terminal, if there is one.
fn become_user(account: &Account) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    if rustix::termios::isatty(io::stdin()) {
        fchown(io::stdin(), Some(uid), None)?;
    }
    let groups: Vec<Gid> = account.groups.iter().copied().map(Gid::from_raw).collect();
    set_thread_groups(&groups)?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

fn enter(order: &StartOrder, account: &Account, program: &str) -> Result<(), Refusal> {
    match &order.cwd {
        Some(cwd) => chdir(cwd.as_str()).map_err(|_| Refusal::no_directory(program, cwd)),
        // A user without a home directory starts where everybody is.
        None if order.login => chdir(account.home.as_str())
            .or_else(|_| chdir("/"))
            .map_err(|_| Refusal::no_directory(program, &account.home)),
        None => Ok(()),
    }
}
