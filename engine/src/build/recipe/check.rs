//! Which values of a recipe make sense. Says the first that does not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Component, Path};

use forkd_abi::generation::HOSTNAME_MAX;
use forkd_abi::protocol::{Ready, ServiceCommand, WarmCommand};

use super::format::{
    NodePackages, Probe, PythonPackages, Recipe, RecipeBase, RecipeFile, RecipeUser, Rehearse, RunStep,
};
use super::node;
use super::place::KeyPath;
use crate::local::snapshots::{check_scratch, check_vcpus};

/// Longest probe, in bytes: it must fit a frame of the agent's protocol.
const PROBE_MAX: usize = 256 << 10;
/// Longest script of a `[[run]]`, and all strings of a command together, in bytes: the kernel takes no more.
const COMMAND_MAX: usize = 100 << 10;
/// Most entries of a list.
const ENTRIES_MAX: usize = 1000;
/// Most services, and most of what is rehearsed and probed.
const FEW_MAX: usize = 100;
/// Guest memory a recipe may ask for, in MiB.
const MEMORY_MIB: RangeInclusive<u32> = 64..=16_384;
/// How long a warm command or a service may be given, in seconds.
const TIMEOUT_S: RangeInclusive<u32> = 1..=3600;
/// Numbers of users that are no part of the distribution.
const UIDS: RangeInclusive<u32> = 1..=60_000;
/// Where a recipe's files may not go: the agent's own folder, and what is mounted over at boot.
const RESERVED: [&str; 6] = ["/forkd", "/proc", "/sys", "/dev", "/run", "/tmp"];

/// What is wrong, and where.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) key: KeyPath,
    pub(super) why: String,
}

type Checked = Result<(), Fault>;

fn fault<T>(key: KeyPath, why: impl Into<String>) -> Result<T, Fault> {
    Err(Fault { key, why: why.into() })
}

/// The first thing that is wrong.
pub(super) fn check(recipe: &Recipe) -> Checked {
    check_name(&recipe.name).or_else(|why| fault(KeyPath::of("name"), why))?;
    if recipe.description.len() > 1000 || recipe.description.contains(char::is_control) {
        return fault(KeyPath::of("description"), "not one line of at most 1000 bytes");
    }
    check_machine(recipe)?;
    check_base(&recipe.base)?;
    recipe.python.as_ref().map_or(Ok(()), |python| check_python(python, &recipe.directory))?;
    recipe.node.as_ref().map_or(Ok(()), |node| check_node(node, &recipe.directory))?;
    check_users(&recipe.user)?;
    few("files", recipe.files.len(), ENTRIES_MAX)?;
    for (at, file) in recipe.files.iter().enumerate() {
        check_file(file, &recipe.directory, at)?;
    }
    few("run", recipe.run.len(), ENTRIES_MAX)?;
    for (at, step) in recipe.run.iter().enumerate() {
        check_run(step, at)?;
    }
    check_env(&recipe.env, || KeyPath::of("env"))?;
    check_services(&recipe.service)?;
    recipe.warm.as_ref().map_or(Ok(()), check_warm)?;
    check_rehearse(&recipe.rehearse, recipe.warm.is_some())?;
    few("probe", recipe.probe.len(), FEW_MAX)?;
    for (at, probe) in recipe.probe.iter().enumerate() {
        check_probe(probe, recipe.warm.is_some(), at)?;
    }
    check_ports(recipe)
}

fn few(name: &'static str, count: usize, most: usize) -> Checked {
    if count > most { fault(KeyPath::of(name), format!("more than {most}")) } else { Ok(()) }
}

fn check_machine(recipe: &Recipe) -> Checked {
    within("memory_mib", recipe.memory_mib, MEMORY_MIB)?;
    if let Err(error) = check_vcpus(recipe.vcpus) {
        return fault(KeyPath::of("vcpus"), error.to_string());
    }
    if let Err(error) = check_scratch(recipe.scratch_mib) {
        return fault(KeyPath::of("scratch_mib"), error.to_string());
    }
    within("readiness.timeout_s", recipe.readiness.timeout_s, TIMEOUT_S)
}

fn within(key: &'static str, value: u32, range: RangeInclusive<u32>) -> Checked {
    if range.contains(&value) {
        return Ok(());
    }
    let (least, most) = range.into_inner();
    fault(KeyPath::of(key), format!("{value} is not between {least} and {most}"))
}

/// A tag and a host name at once.
fn check_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    // Host names of forks are this one and a number.
    let fits = (1..=HOSTNAME_MAX - 12).contains(&name.len());
    if fits && name.bytes().all(plain) && !name.starts_with('-') && !name.ends_with('-') {
        Ok(())
    } else {
        Err(format!("{name:?} is not 1 to {} of a-z 0-9 -, with - only inside", HOSTNAME_MAX - 12))
    }
}

/// A word that no program takes for an option, or for several.
fn is_word(text: &str, extra: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || extra.contains(c);
    (1..=100).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && text.chars().all(plain)
}

fn check_base(base: &RecipeBase) -> Checked {
    match (&base.suite, &base.recipe) {
        (Some(suite), None) if !is_word(suite, "-") => {
            return fault(KeyPath::of("base.suite"), format!("{suite:?} is no name of a release"));
        }
        (Some(_), Some(_)) => return fault(KeyPath::of("base.recipe"), "there is a suite already"),
        (None, None) => return fault(KeyPath::of("base"), "neither a suite nor a recipe"),
        (Some(_), None) | (None, Some(_)) => {}
    }
    few("base.packages", base.packages.len(), ENTRIES_MAX)?;
    match base.packages.iter().find(|package| !is_word(package, "+-.")) {
        Some(package) => fault(KeyPath::of("base.packages"), format!("{package:?} is no name of a package")),
        None => Ok(()),
    }
}

/// A path of the recipe's folder, as it is then.
fn check_source(from: &Path, directory: &Path, key: KeyPath) -> Result<fs::Metadata, Fault> {
    let shown = from.display();
    let plain = from.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !plain || from.as_os_str().is_empty() {
        return fault(key, format!("{shown:?} is not a path below the recipe's folder"));
    }
    match fs::canonicalize(directory.join(from)).and_then(|path| Ok((fs::metadata(&path)?, path))) {
        Err(error) => fault(key, format!("{shown:?}: {error}")),
        Ok((_, path)) if !path.starts_with(directory) => {
            fault(key, format!("{shown:?} is a link that leads out of the recipe's folder"))
        }
        Ok((metadata, _)) if !metadata.is_file() && !metadata.is_dir() => {
            fault(key, format!("{shown:?} is neither a regular file nor a directory"))
        }
        Ok((metadata, _)) => Ok(metadata),
    }
}

/// A place in the machine for something of the recipe's.
fn check_target(to: &Path, key: KeyPath) -> Checked {
    let wrong = |key, why: &str| fault(key, format!("{:?} {why}", to.display().to_string()));
    let mut parts = to.components();
    let absolute = parts.next() == Some(Component::RootDir);
    let names = parts.clone().count();
    let text = to.to_str().unwrap_or("\0");
    if !parts.all(|part| matches!(part, Component::Normal(_)))
        || !absolute
        || names == 0
        || text.ends_with('/')
        || text.contains(char::is_control)
        || text.len() > 4000
    {
        return wrong(key, "is not a plain absolute path");
    }
    match RESERVED.iter().find(|reserved| to.starts_with(reserved)) {
        Some(reserved) => wrong(key, &format!("is in {reserved}, which is not the recipe's")),
        None => Ok(()),
    }
}

fn check_python(python: &PythonPackages, directory: &Path) -> Checked {
    let key = || KeyPath::of("python.requirements");
    if check_source(&python.requirements, directory, key())?.is_file() {
        Ok(())
    } else {
        fault(key(), format!("{:?} is not a file", python.requirements.display().to_string()))
    }
}

fn check_node(packages: &NodePackages, directory: &Path) -> Checked {
    let key = || KeyPath::of("node.from");
    check_source(&packages.from, directory, key())?;
    for name in node::INPUTS {
        if !check_source(&packages.from.join(name), directory, key())?.is_file() {
            return fault(key(), format!("{name} is not a file"));
        }
    }
    check_target(&packages.to, KeyPath::of("node.to"))?;
    few("node.programs", packages.programs.len(), ENTRIES_MAX)?;
    match packages.programs.iter().find(|program| !is_word(program, "-._")) {
        Some(program) => fault(KeyPath::of("node.programs"), format!("{program:?} is no name of a program")),
        None => Ok(()),
    }
}

fn check_users(users: &[RecipeUser]) -> Checked {
    few("user", users.len(), ENTRIES_MAX)?;
    let mut names = BTreeSet::new();
    for (at, user) in users.iter().enumerate() {
        let key = |key| KeyPath::within("user", at, key);
        let named = is_word(&user.name, "-_") && user.name.len() <= 32;
        if !named || user.name.starts_with(|c: char| c.is_ascii_digit()) {
            return fault(key("name"), format!("{:?} is no name of a user", user.name));
        }
        if !names.insert(&user.name) {
            return fault(key("name"), format!("{} is there twice", user.name));
        }
        if let Some(uid) = user.uid.filter(|uid| !UIDS.contains(uid)) {
            return fault(key("uid"), format!("{uid} is not between 1 and {}", UIDS.end()));
        }
        if let Some(home) = &user.home {
            check_target(home, key("home"))?;
            if home.to_str().is_some_and(|home| home.contains(':')) {
                return fault(key("home"), "a colon cannot be part of it");
            }
        }
    }
    Ok(())
}

fn check_file(file: &RecipeFile, directory: &Path, at: usize) -> Checked {
    let key = |key| KeyPath::within("files", at, key);
    let metadata = check_source(&file.from, directory, key("from"))?;
    check_target(&file.to, key("to"))?;
    if metadata.is_dir() && (file.mode.is_some() || file.executable.is_some()) {
        let named = if file.mode.is_some() { "mode" } else { "executable" };
        return fault(key(named), "a directory's files keep theirs");
    }
    if file.mode.is_some() && file.executable.is_some() {
        return fault(key("executable"), "there is a mode already");
    }
    if let Some(mode) = file.mode.filter(|mode| *mode > 0o7777) {
        return fault(key("mode"), format!("{mode:#o} is more than 0o7777"));
    }
    check_user(file.owner.as_deref(), || key("owner"))
}

/// `NAME|UID[:GROUP|GID]`
fn check_user(user: Option<&str>, key: impl FnOnce() -> KeyPath) -> Checked {
    let Some(user) = user else { return Ok(()) };
    let mut parts = user.split(':');
    let fits = parts.clone().count() <= 2 && parts.all(|part| is_word(part, "-_"));
    if fits { Ok(()) } else { fault(key(), format!("{user:?} is not NAME|UID[:GROUP|GID]")) }
}

fn check_argv(argv: &[String], key: impl FnOnce() -> KeyPath) -> Checked {
    if argv.first().is_none_or(String::is_empty) || argv.iter().any(|argument| argument.contains('\0')) {
        return fault(key(), "not a program and its arguments");
    }
    let length: usize = argv.iter().map(|argument| argument.len() + 1).sum();
    if length > COMMAND_MAX {
        return fault(key(), format!("longer than {COMMAND_MAX} bytes"));
    }
    Ok(())
}

fn check_env(env: &BTreeMap<String, String>, key: impl Fn() -> KeyPath) -> Checked {
    let bad = |name: &str| name.is_empty() || name.contains(['=', '\0']);
    let wrong = |(name, value): &(&String, &String)| bad(name) || value.contains('\0');
    if let Some((name, _)) = env.iter().find(wrong) {
        return fault(key(), format!("{name:?} cannot be set"));
    }
    let length: usize = env.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    if length > COMMAND_MAX { fault(key(), format!("longer than {COMMAND_MAX} bytes")) } else { Ok(()) }
}

fn check_cwd(cwd: Option<&str>, key: impl FnOnce() -> KeyPath) -> Checked {
    match cwd {
        Some(cwd) if !cwd.starts_with('/') || cwd.contains('\0') => {
            fault(key(), format!("{cwd:?} is not absolute"))
        }
        _ => Ok(()),
    }
}

fn check_run(step: &RunStep, at: usize) -> Checked {
    let key = |key| KeyPath::within("run", at, key);
    match &step.script {
        None => check_argv(&step.argv, || key("argv"))?,
        Some(_) if !step.argv.is_empty() => return fault(key("script"), "there is an argv already"),
        Some(script) if script.trim().is_empty() || script.len() > COMMAND_MAX || script.contains('\0') => {
            return fault(key("script"), format!("not 1 to {COMMAND_MAX} bytes of a script"));
        }
        Some(_) => {}
    }
    check_user(step.user.as_deref(), || key("user"))?;
    check_cwd(step.cwd.as_deref(), || key("cwd"))
}

fn check_services(services: &[ServiceCommand]) -> Checked {
    few("service", services.len(), FEW_MAX)?;
    let mut names = BTreeSet::new();
    for (at, service) in services.iter().enumerate() {
        let key = |key| KeyPath::within("service", at, key);
        if !is_word(&service.name, "-_") {
            return fault(key("name"), format!("{:?} is not a word of a-z 0-9 - _", service.name));
        }
        if !names.insert(&service.name) {
            return fault(key("name"), format!("{} is there twice", service.name));
        }
        check_argv(&service.argv, || key("argv"))?;
        check_user(service.user.as_deref(), || key("user"))?;
        check_env(&service.env, || key("env"))?;
        check_cwd(service.cwd.as_deref(), || key("cwd"))?;
        if !TIMEOUT_S.contains(&service.timeout_s) {
            let why = format!("{} is not between 1 and {}", service.timeout_s, TIMEOUT_S.end());
            return fault(key("timeout_s"), why);
        }
        match &service.ready {
            Some(Ready::Tcp(0)) => return fault(key("ready"), "0 is no port"),
            Some(Ready::Exec(argv)) => check_argv(argv, || key("ready"))?,
            Some(Ready::Http(url)) => check_url(url, || key("ready"))?,
            Some(Ready::Line(line)) if line.is_empty() || line.len() > 1000 || line.contains('\n') => {
                return fault(key("ready"), "not a part of a line");
            }
            Some(Ready::Tcp(_) | Ready::Line(_)) | None => {}
        }
    }
    Ok(())
}

fn check_url(url: &str, key: impl FnOnce() -> KeyPath) -> Checked {
    let parsed = url::Url::parse(url).is_ok_and(|parsed| parsed.scheme() == "http" && parsed.has_host());
    let plain = !url.contains(|c: char| c.is_control() || c == ' ') && url.len() <= 4000;
    if parsed && plain { Ok(()) } else { fault(key(), format!("{url:?} is not an http:// URL")) }
}

fn check_warm(warm: &WarmCommand) -> Checked {
    check_argv(&warm.argv, || KeyPath::of("warm.argv"))?;
    check_env(&warm.env, || KeyPath::of("warm.env"))?;
    check_user(warm.user.as_deref(), || KeyPath::of("warm.user"))?;
    check_cwd(warm.cwd.as_deref(), || KeyPath::of("warm.cwd"))
}

fn check_code(code: &str, key: impl FnOnce() -> KeyPath) -> Checked {
    if code.trim().is_empty() || code.len() > PROBE_MAX {
        return fault(key(), format!("not 1 to {PROBE_MAX} bytes of code"));
    }
    Ok(())
}

fn check_rehearse(rehearse: &Rehearse, has_worker: bool) -> Checked {
    if !rehearse.evals.is_empty() && !has_worker {
        return fault(KeyPath::of("rehearse.evals"), "there is no [warm] command to answer them");
    }
    few("rehearse", rehearse.evals.len() + rehearse.execs.len() + rehearse.requests.len(), FEW_MAX)?;
    rehearse.evals.iter().try_for_each(|code| check_code(code, || KeyPath::of("rehearse.evals")))?;
    rehearse.execs.iter().try_for_each(|argv| check_argv(argv, || KeyPath::of("rehearse.execs")))?;
    rehearse.requests.iter().try_for_each(|url| check_url(url, || KeyPath::of("rehearse.requests")))
}

fn check_probe(probe: &Probe, has_worker: bool, at: usize) -> Checked {
    let key = |key| KeyPath::within("probe", at, key);
    match (&probe.eval, &probe.exec, &probe.http) {
        (Some(_), None, None) if !has_worker => {
            fault(KeyPath::of("probe"), "there is no [warm] command to answer it")
        }
        (Some(code), None, None) => check_code(code, || key("code")),
        (None, Some(argv), None) => check_argv(argv, || key("exec")),
        (None, None, Some(url)) => check_url(url, || key("http")),
        _ => fault(key(""), "not exactly one of eval, exec and http"),
    }
}

fn check_ports(recipe: &Recipe) -> Checked {
    few("port", recipe.port.len(), ENTRIES_MAX)?;
    let mut names = BTreeSet::new();
    for (at, port) in recipe.port.iter().enumerate() {
        let key = |key| KeyPath::within("port", at, key);
        if !is_word(&port.name, "-") || port.name.bytes().all(|byte| byte.is_ascii_digit()) {
            return fault(key("name"), format!("{:?} is no name of a port", port.name));
        }
        if !names.insert(&port.name) {
            return fault(key("name"), format!("{} is there twice", port.name));
        }
        if port.number == 0 {
            return fault(key("number"), "0 is no port");
        }
    }
    Ok(())
}
