//! Runs a program inside a root tree while it is built: with the tree as its root, in namespaces of its own, without
//! network unless it is wanted, and with few of root's capabilities.
//!
//! That is no wall against the tree's own root: it keeps a program from doing harm by mistake. Who builds a recipe
//! trusts it, as whoever installs a package does.

use std::collections::BTreeMap;
use std::path::Path;

use super::accounts;
use super::error::RecipeError;
use super::site::Site;
use super::tree::RootDiskTree;
use crate::build::tools;

/// What is mounted on, so it has to be there.
pub(super) const MOUNT_POINTS: [&str; 5] = ["/proc", "/sys", "/dev", "/run", "/tmp"];
/// Where a stage's files are seen from inside.
pub(super) const STAGE: &str = "/run/forkd";
/// All that a step may need to make files of every owner, and run as anybody.
const CAPABILITIES: &str = "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+setfcap,\
    +net_bind_service";
/// Mounts what programs expect, and becomes the program. Its mounts and processes end with its namespaces.
const SCRIPT: &str = r#"
tree=$1 stage=$2; shift 2
mount -t tmpfs -o mode=0755,nosuid tmpfs "$tree/dev"
for device in null zero full random urandom tty; do
    : > "$tree/dev/$device"
    mount --bind "/dev/$device" "$tree/dev/$device"
done
mkdir "$tree/dev/shm" "$tree/dev/pts"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$tree/dev/shm"
ln -s /proc/self/fd "$tree/dev/fd"
ln -s /proc/self/fd/0 "$tree/dev/stdin"
ln -s /proc/self/fd/1 "$tree/dev/stdout"
ln -s /proc/self/fd/2 "$tree/dev/stderr"
mount -t proc -o nosuid,nodev,noexec proc "$tree/proc"
mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs "$tree/run"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$tree/tmp"
if [ -n "$stage" ]; then
    mkdir "$tree/run/forkd"
    mount --bind "$stage" "$tree/run/forkd"
    mount -o remount,bind,ro "$tree/run/forkd"
fi
exec chroot "$tree" "$@"
"#;

/// A program to be run.
pub(super) struct Command<'a> {
    pub(super) argv: Vec<&'a str>,
    /// `NAME|UID[:GROUP|GID]`; root when absent.
    pub(super) user: Option<&'a str>,
    pub(super) cwd: Option<&'a str>,
    pub(super) env: BTreeMap<&'a str, &'a str>,
    pub(super) network: bool,
    /// A directory of this machine that it sees at [`STAGE`].
    pub(super) stage: Option<&'a Path>,
}

/// Runs it to its end; what it prints is told.
pub(super) fn run(
    site: &Site<'_>,
    tree: &RootDiskTree,
    step: &str,
    command: &Command<'_>,
) -> Result<(), RecipeError> {
    for point in MOUNT_POINTS {
        tree.make_directory(Path::new(point)).map_err(RecipeError::file(Path::new(point)))?;
    }
    let account = accounts::find(tree, command.user.unwrap_or("0"))
        .map_err(|error| RecipeError::Lacks { step: step.to_owned(), why: error.to_string() })?;
    let mut env = BTreeMap::from([
        ("PATH".to_owned(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
        ("HOME".to_owned(), account.home.clone()),
        // What is compiled while a program runs trusts times that the image does not keep.
        ("PYTHONDONTWRITEBYTECODE".to_owned(), "1".to_owned()),
    ]);
    if let Some(name) = &account.name {
        env.insert("USER".to_owned(), name.clone());
        env.insert("LOGNAME".to_owned(), name.clone());
    }
    let mut around = vec!["--mount", "--ipc", "--uts"];
    let resolver = Path::new("/etc/resolv.conf");
    if command.network {
        env.extend(tools::proxies());
        let text = std::fs::read(resolver).unwrap_or_default();
        tree.put(resolver, &mut text.as_slice(), 0o644).map_err(RecipeError::file(resolver))?;
    } else {
        around.push("--net");
    }
    env.extend(command.env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    let groups = if account.name.is_some() { "--init-groups" } else { "--clear-groups" };
    let done = site
        .isolated("unshare")
        .args(around)
        .args(["--", "/bin/sh", "-euc", SCRIPT, "forkd"])
        .arg(tree.path())
        .arg(command.stage.unwrap_or(Path::new("")))
        .args(["/usr/bin/setpriv", &format!("--bounding-set={CAPABILITIES}")])
        .args([format!("--reuid={}", account.uid), format!("--regid={}", account.gid), groups.to_owned()])
        .args(["/usr/bin/env", "-i"])
        .args(env.iter().map(|(key, value)| format!("{key}={value}")))
        .args(["/bin/sh", "-c", "cd \"$0\" && exec \"$@\"", command.cwd.unwrap_or("/")])
        .args(&command.argv)
        .run(|line| site.say(line))
        .map_err(RecipeError::tool(step));
    if command.network {
        tree.remove(resolver).map_err(RecipeError::file(resolver))?;
    }
    done
}
