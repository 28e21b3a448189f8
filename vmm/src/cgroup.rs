//! cgroups (version 2) of machines: what one may take of the host's memory, processors and processes.
//!
//! ```text
//! <ancestor>/forkd/<name>      one a machine, named by its child or build
//! ```
//! `<ancestor>` is this process's own cgroup or the nearest one above it in which this user may make others and that
//! has controllers to hand down. `forkd` itself stays, empty: another process may be about to use it. A host without
//! such a place sets no limits; `forkd doctor` says so.

use crate::memory::MemoryLayout;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Name of the cgroup that holds those of all machines.
const PARENT: &str = "forkd";
/// Controllers that limits are made of.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];
/// File of a cgroup with the controllers that those below it have.
const HANDED_DOWN: &str = "cgroup.subtree_control";
/// Page tables of the host and of KVM, and KVM's reverse maps: at most 26 bytes a page of guest memory, and some air.
const PAGE_TABLES: u64 = 64;
/// What a machine's process takes besides, bytes: its program, vsock buffers.
const OVERHEAD: u64 = 64 << 20;
/// Most threads of a machine, KVM's own among them.
const THREADS: u64 = 64;
/// Period of `cpu.max`, µs; the kernel's default.
const PERIOD_US: u64 = 100_000;
/// Longest file of the kernel's that is read, bytes.
const TEXT_MAX: usize = 4096;
/// Age of a cgroup from which on it has its process, or never will.
const YOUNG: Duration = Duration::from_secs(10);
/// How long the processes of a killed fork may take to leave.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a machine may take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Name of its cgroup; no other machine of this host may have it.
    pub name: String,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Processors; `None` for as many as it can get.
    pub cpus: Option<f64>,
}

impl Limits {
    /// Enough memory for any guest of this layout.
    pub fn of(name: String, layout: &MemoryLayout) -> Limits {
        let ram = layout.ram_bytes();
        Limits { name, memory_bytes: ram + ram / PAGE_TABLES + OVERHEAD, cpus: None }
    }
}

/// There are no limits to be had, or they could not be set.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup2 file system.
    #[error("cgroup version 2 is not mounted")]
    NotMounted,
    /// There is one, but not for us.
    #[error("no cgroup from {} upwards has memory, cpu or pids limits for this user to hand on", from.display())]
    NotDelegated {
        /// This process's own.
        from: PathBuf,
    },
    /// A file of it.
    #[error("{operation} {} failed", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The cgroup that holds those of machines.
#[derive(Debug)]
pub struct Groups {
    path: PathBuf,
    dir: OwnedFd,
    controllers: Vec<&'static str>,
}

/// The cgroup of one machine.
#[derive(Debug)]
pub struct Group {
    name: String,
    dir: OwnedFd,
}

impl Groups {
    /// How many controllers limits are made of.
    pub const ALL: usize = CONTROLLERS.len();

    /// Finds a place for machines' cgroups, and makes it.
    pub fn find() -> Result<Groups, CgroupError> {
        let read = |path: &str| fs::read_to_string(path).map_err(file_error("reading", Path::new(path)));
        let (mounts, own) = (read("/proc/self/mountinfo")?, read("/proc/self/cgroup")?);
        let mount = mounts.lines().find_map(cgroup2_mount).ok_or(CgroupError::NotMounted)?;
        let own = mount.directory(&own);
        let places = own.ancestors().take_while(|path| path.starts_with(&mount.point));
        // The nearest with all of them, or else the nearest with most.
        let mut best = None::<Groups>;
        for place in places.filter(|place| !listed(place, "cgroup.controllers").is_empty()) {
            let Ok(next) = Groups::below(place) else { continue };
            let most = best.as_ref().map_or(0, |best| best.controllers.len());
            let worse = if next.controllers.len() > most { best.replace(next) } else { Some(next) };
            if let Some(worse) = worse {
                // Others may use it.
                let _ = fs::remove_dir(&worse.path);
            }
            if best.as_ref().is_some_and(|best| best.controllers.len() == Groups::ALL) {
                break;
            }
        }
        best.ok_or(CgroupError::NotDelegated { from: own })
    }

    /// A place for machines' cgroups below a given one.
    pub fn below(ancestor: &Path) -> Result<Groups, CgroupError> {
        // Whoever moves a process needs this in the nearest cgroup above both ends.
        let members = ancestor.join("cgroup.procs");
        rustix::fs::access(&members, Access::WRITE_OK).map_err(refused("writing", &members))?;
        hand_down(ancestor);
        let path = ancestor.join(PARENT);
        match rustix::fs::mkdir(&path, Mode::from(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(refused("creating", &path)(errno)),
        }
        hand_down(&path);
        let dir = open(CWD, &path).map_err(refused("opening", &path))?;
        Ok(Groups { controllers: listed(&path, HANDED_DOWN), path, dir })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which limits there are.
    pub fn controllers(&self) -> &[&'static str] {
        &self.controllers
    }

    /// A new cgroup, with its limits set.
    pub fn create(&self, limits: &Limits) -> Result<Group, CgroupError> {
        let path = self.path.join(&limits.name);
        if limits.name.contains('/') {
            return Err(refused("creating", &path)(Errno::INVAL));
        }
        rustix::fs::mkdirat(&self.dir, &limits.name, Mode::from(0o755))
            .map_err(refused("creating", &path))?;
        let made =
            open(&self.dir, Path::new(&limits.name)).map_err(refused("opening", &path)).and_then(|dir| {
                for (file, value) in self.settings(limits) {
                    write(&dir, file, &value).map_err(refused("writing", &path.join(file)))?;
                }
                Ok(Group { name: limits.name.clone(), dir })
            });
        if made.is_err() {
            let _ = self.remove_directory(&limits.name);
        }
        made
    }

    fn settings(&self, limits: &Limits) -> Vec<(&'static str, String)> {
        let mut settings = Vec::new();
        for controller in &self.controllers {
            match *controller {
                "memory" => {
                    settings.push(("memory.max", limits.memory_bytes.to_string()));
                    settings.push(("memory.oom.group", "1".to_owned()));
                }
                "pids" => settings.push(("pids.max", THREADS.to_string())),
                _ => settings.extend(limits.cpus.map(|cpus| {
                    let quota = (cpus * PERIOD_US as f64).round().max(1000.0) as u64;
                    ("cpu.max", format!("{quota} {PERIOD_US}"))
                })),
            }
        }
        settings
    }

    /// Removes cgroups in which nobody is, whoever made them. Returns how many there were.
    pub fn remove_empty(&self) -> Result<usize, CgroupError> {
        let entries = fs::read_dir(&self.path).map_err(file_error("listing", &self.path))?;
        // One that is younger may be about to get its process.
        let old = |entry: &fs::DirEntry| {
            let made = entry.metadata().and_then(|metadata| metadata.modified()).ok();
            made.and_then(|made| made.elapsed().ok()).is_some_and(|age| age > YOUNG)
        };
        let removed = entries.flatten().filter(old).filter(|entry| rustix::fs::rmdir(entry.path()).is_ok());
        Ok(removed.count())
    }

    /// Removes a cgroup whose process is over.
    pub fn remove(&self, group: &Group) -> Result<(), CgroupError> {
        self.remove_directory(&group.name).map_err(refused("removing", &self.path.join(&group.name)))
    }

    fn remove_directory(&self, name: &str) -> Result<(), Errno> {
        rustix::fs::unlinkat(&self.dir, name, AtFlags::REMOVEDIR)
    }
}

impl Group {
    /// Whether the kernel has killed a process of it for its memory limit.
    pub fn ran_out_of_memory(&self) -> bool {
        let events = read(&self.dir, "memory.events").unwrap_or_default();
        events.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count.trim() != "0")
    }
}

impl AsFd for Groups {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// Ends what still runs in the cgroups of a dead fork below `parent` (a [`Groups::path`]) and removes them. Returns how
/// many there were.
pub fn remove_dead(parent: &Path, fork: &str) -> Result<usize, CgroupError> {
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(file_error("listing", parent)(error)),
    };
    let prefix = format!("{fork}-");
    let mut removed = 0;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with(&prefix)) {
            remove_with_members(&entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

fn remove_with_members(path: &Path) -> Result<(), CgroupError> {
    // Kernels before 5.14 lack this file; the processes of a dead fork are dying there too.
    let _ = fs::write(path.join("cgroup.kill"), "1");
    let deadline = Instant::now() + LEAVE_TIMEOUT;
    loop {
        match rustix::fs::rmdir(path) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(errno) => return Err(refused("removing", path)(errno)),
        }
    }
}

/// Hands down what controllers a cgroup has. One that has processes of its own cannot, unless it is the root.
fn hand_down(path: &Path) {
    let handed = listed(path, HANDED_DOWN);
    for name in listed(path, "cgroup.controllers").iter().filter(|name| !handed.contains(name)) {
        let _ = fs::write(path.join(HANDED_DOWN), format!("+{name}"));
    }
}

/// Which of our controllers a file of a cgroup lists.
fn listed(path: &Path, file: &str) -> Vec<&'static str> {
    let text = fs::read_to_string(path.join(file)).unwrap_or_default();
    CONTROLLERS.into_iter().filter(|name| text.split_whitespace().any(|word| word == *name)).collect()
}

/// A mounted cgroup2 file system.
#[derive(Debug, PartialEq)]
struct Cgroup2 {
    /// Which of its directories is mounted.
    root: PathBuf,
    /// Where.
    point: PathBuf,
}

/// Reads a line of mountinfo (proc_pid_mountinfo(5)): `36 35 98:0 ROOT POINT options fields... - TYPE source options`.
fn cgroup2_mount(line: &str) -> Option<Cgroup2> {
    let (fields, kind) = line.split_once(" - ")?;
    let mut fields = fields.split(' ').skip(3);
    let (root, point) = (fields.next()?, fields.next()?);
    kind.starts_with("cgroup2 ").then(|| Cgroup2 { root: root.into(), point: point.into() })
}

impl Cgroup2 {
    /// The directory of the cgroup that /proc/PID/cgroup names (`0::/path`).
    fn directory(&self, proc_cgroup: &str) -> PathBuf {
        let own = proc_cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
        // It may lie outside of what is mounted here.
        match Path::new(own).strip_prefix(&self.root) {
            Ok(below) if !own.contains("/..") => self.point.join(below),
            _ => self.point.clone(),
        }
    }
}

fn open(parent: impl AsFd, name: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

fn write(dir: impl AsFd, name: &str, value: &str) -> Result<(), Errno> {
    let file = rustix::fs::openat(dir, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, value.as_bytes()).map(|_| ())
}

fn read(dir: impl AsFd, name: &str) -> Option<String> {
    let file = rustix::fs::openat(dir, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut bytes = vec![0; TEXT_MAX];
    let length = rustix::io::read(&file, &mut bytes).ok()?;
    bytes.truncate(length);
    String::from_utf8(bytes).ok()
}

fn file_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::File { operation, path, source }
}

fn refused(operation: &'static str, path: &Path) -> impl FnOnce(Errno) -> CgroupError {
    let failed = file_error(operation, path);
    move |errno| failed(errno.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_and_the_own_cgroup_are_found() {
        let line = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        let mount = cgroup2_mount(line).unwrap();
        assert_eq!(mount.point, Path::new("/sys/fs/cgroup"));
        assert_eq!(mount.directory("1:cpu:/x\n0::/user.slice/a\n"), Path::new("/sys/fs/cgroup/user.slice/a"));
        assert_eq!(mount.directory("0::/../x\n"), Path::new("/sys/fs/cgroup"));
        assert_eq!(cgroup2_mount("31 23 0:27 / /proc rw - proc proc rw"), None);
        let part = Cgroup2 { root: "/box".into(), point: "/cg".into() };
        assert_eq!(part.directory("0::/box/a"), Path::new("/cg/a"));
        assert_eq!(part.directory("0::/elsewhere"), Path::new("/cg"));
    }

    #[test]
    fn limits_become_the_kernels_settings() {
        let (path, dir) = (PathBuf::new(), OwnedFd::from(fs::File::open("/").unwrap()));
        let groups = Groups { path, dir, controllers: vec!["memory", "cpu", "pids"] };
        let layout = MemoryLayout::new(512, 0).unwrap();
        let limits = Limits { cpus: Some(1.5), ..Limits::of("a-1".to_owned(), &layout) };
        let settings = groups.settings(&limits);
        let value = |file| settings.iter().find(|(name, _)| *name == file).map(|(_, value)| value.as_str());
        assert_eq!(value("memory.max"), Some("612368384"));
        assert_eq!(value("cpu.max"), Some("150000 100000"));
        assert_eq!(value("pids.max"), Some("64"));
        let free = groups.settings(&Limits { cpus: None, ..limits });
        assert!(free.iter().all(|(name, _)| *name != "cpu.max"));
    }
}
