//! Where the kernel's source comes from: the distribution's package, or a tree of the user's.

use std::fs;
use std::path::{Path, PathBuf};

use crate::build::tools::{self, Tool};
use crate::interrupt::Interrupt;
use crate::progress::{Amount, Progress};

use super::error::KernelError;

/// Where Debian's and Ubuntu's source packages put their archives.
const SOURCE_DIR: &str = "/usr/src";
/// Installed when there is none: the series our configuration is checked against, and the distribution's default.
const SOURCE_PACKAGES: [&str; 2] = ["linux-source-6.12", "linux-source"];
/// Programs (or a header, for libraries) a build needs, and the Debian package each is in.
const NEEDED: [(&str, &str); 9] = [
    ("make", "build-essential"),
    ("gcc", "build-essential"),
    ("ld", "binutils"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("xz", "xz-utils"),
    ("tar", "tar"),
    ("/usr/include/libelf.h", "libelf-dev"),
];

/// A kernel source, packed or not.
#[derive(Debug)]
pub struct KernelSource {
    /// Names exactly this source: a package with its version, or a directory.
    pub identity: String,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Archive(PathBuf),
    Tree(PathBuf),
}

/// Finds the source, installing it and the tools when we may.
pub fn prepare(
    tree: Option<&Path>,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<KernelSource, KernelError> {
    let archive = || newest_archive(Path::new(SOURCE_DIR));
    let mut packages = missing_tools();
    if let Some(tree) = tree {
        install(&packages, progress, interrupt)?;
        return user_tree(tree);
    }
    let mut found = archive();
    if found.is_none() {
        if !tools::can_install() {
            packages.push(SOURCE_PACKAGES[0]);
            return Err(KernelError::Missing { packages: packages.into_iter().map(str::to_owned).collect() });
        }
        let wanted = |name| [packages.as_slice(), &[name]].concat();
        install(&wanted(SOURCE_PACKAGES[0]), progress, interrupt)
            .or_else(|_| install(&wanted(SOURCE_PACKAGES[1]), progress, interrupt))?;
        found = archive();
    } else {
        install(&packages, progress, interrupt)?;
    }
    let archive = found.ok_or_else(|| KernelError::NoSource { directory: SOURCE_DIR.into() })?;
    Ok(KernelSource { identity: archive_identity(&archive, interrupt)?, place: Place::Archive(archive) })
}

fn missing_tools() -> Vec<&'static str> {
    let present = |name: &str| {
        if name.starts_with('/') { Path::new(name).exists() } else { tools::find(name).is_some() }
    };
    let mut packages: Vec<_> =
        NEEDED.iter().filter(|(name, _)| !present(name)).map(|(_, package)| *package).collect();
    packages.dedup();
    packages
}

fn install(packages: &[&str], progress: &dyn Progress, interrupt: &Interrupt) -> Result<(), KernelError> {
    if packages.is_empty() {
        return Ok(());
    }
    if !tools::can_install() {
        return Err(KernelError::Missing {
            packages: packages.iter().map(|name| (*name).to_owned()).collect(),
        });
    }
    let what = format!("installing {}", packages.join(" "));
    let task = progress.begin(&what, Amount::Unknown);
    tools::install(packages, interrupt, |_| task.say(&what))
        .map_err(|source| KernelError::Tool { step: "installing packages", source })
}

fn user_tree(path: &Path) -> Result<KernelSource, KernelError> {
    let not_a_source = || KernelError::NotASource { path: path.to_owned() };
    let tree = fs::canonicalize(path).map_err(|_| not_a_source())?;
    if !["Makefile", "Kconfig", "arch/x86/Kconfig"].iter().all(|file| tree.join(file).is_file()) {
        return Err(not_a_source());
    }
    Ok(KernelSource { identity: format!("tree {}", tree.display()), place: Place::Tree(tree) })
}

/// The archive of the highest version among `linux-source-VERSION.tar.xz` and Ubuntu's
/// `linux-source-VERSION/linux-source-VERSION.tar.bz2`.
pub fn newest_archive(directory: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(directory).ok()?.flatten();
    let candidates = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let version = name.strip_prefix("linux-source-")?;
        if let Some(version) = version.strip_suffix(".tar.xz") {
            return Some((version_key(version)?, entry.path()));
        }
        let inside = entry.path().join(format!("{name}.tar.bz2"));
        inside.is_file().then_some((version_key(version)?, inside))
    });
    candidates.max().map(|(_, path)| path)
}

/// "6.12" as numbers, so that it comes after "6.1".
fn version_key(version: &str) -> Option<Vec<u32>> {
    version.split('.').map(|part| part.parse().ok()).collect()
}

/// The package an archive belongs to, with its version; its digest where dpkg does not know it.
fn archive_identity(archive: &Path, interrupt: &Interrupt) -> Result<String, KernelError> {
    let owner = Tool::new("dpkg-query", interrupt).arg("--search").arg(archive).capture();
    // "linux-source-6.12: /usr/src/linux-source-6.12.tar.xz"
    if let Some((package, _)) = owner.as_deref().unwrap_or_default().split_once(": ") {
        let show = ["--show", "--showformat=${Package} ${Version}\\n", package];
        if let Ok(identity) = Tool::new("dpkg-query", interrupt).args(show).capture() {
            return Ok(identity.trim().to_owned());
        }
    }
    let digest = tools::sha256_file(archive);
    digest
        .map(|digest| format!("archive {digest}"))
        .map_err(|source| KernelError::File { path: archive.to_owned(), source })
}

impl KernelSource {
    /// Whether it is a package, whose identity says all about its contents.
    pub fn is_package(&self) -> bool {
        matches!(self.place, Place::Archive(_))
    }

    /// The unpacked source: below `work` for an archive, in its own place for a tree (which is only read).
    pub fn unpack(
        &self,
        work: &Path,
        progress: &dyn Progress,
        interrupt: &Interrupt,
    ) -> Result<PathBuf, KernelError> {
        let archive = match &self.place {
            Place::Tree(tree) => return Ok(tree.clone()),
            Place::Archive(archive) => archive,
        };
        let tree = work.join("source");
        fs::create_dir(&tree).map_err(|source| KernelError::File { path: tree.clone(), source })?;
        let what = format!("unpacking {}", self.identity);
        let task = progress.begin(&what, Amount::Unknown);
        Tool::new("tar", interrupt)
            .args(["--extract", "--no-same-owner", "--strip-components=1", "--checkpoint=2000"])
            .arg("--file")
            .arg(archive)
            .arg("--directory")
            .arg(&tree)
            .run(|_| task.say(&what))
            .map_err(|source| KernelError::Tool { step: "unpacking the kernel's source", source })?;
        Ok(tree)
    }
}
