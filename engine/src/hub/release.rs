//! Packs as assets of a repository's releases on GitHub: the release's name, the asset's address, and the command that
//! makes the one and uploads the other. Nothing here speaks to GitHub. Used by [`publish`](super::publish).

use std::path::{Path, PathBuf};
use std::str::FromStr;

use forkd_fs::format::is_plain_name;
use serde::Serialize;

use crate::hub::registry::Registry;
use crate::reference::PackageName;

/// "Each file included in a release must be under 2 GiB": docs.github.com, *About releases*, storage quotas.
const ASSET_SIZE_MAX: u64 = 2 << 30;

/// `owner/name` of a repository on GitHub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    owner: String,
    name: String,
}

/// A text that names no repository.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{text}` is not a repository on GitHub: owner/name")]
pub struct InvalidRepository {
    /// The text.
    pub text: String,
}

impl FromStr for Repository {
    type Err = InvalidRepository;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (owner, name) = text
            .split_once('/')
            .filter(|(owner, name)| is_plain_name(owner) && is_plain_name(name))
            .ok_or_else(|| InvalidRepository { text: text.to_owned() })?;
        Ok(Repository { owner: owner.to_owned(), name: name.to_owned() })
    }
}

impl std::fmt::Display for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

/// A release that is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Release {
    /// Its tag: `hub-NAME-VERSION`.
    pub tag: String,
    /// Where its asset will be.
    pub url: String,
    /// The commands that make it, for a shell.
    pub commands: Vec<String>,
}

/// Why a pack cannot be the asset of a release.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// GitHub renames such a file, so its address would be another.
    #[error("{} would get another name on GitHub", pack.display())]
    AssetName {
        /// The pack.
        pack: PathBuf,
    },
    /// It is larger than an asset may be.
    #[error("{} has {size} bytes, and an asset of a release has less than {ASSET_SIZE_MAX}", pack.display())]
    AssetSize {
        /// The pack.
        pack: PathBuf,
        /// Its size.
        size: u64,
    },
    /// No shell can be given this.
    #[error("{} cannot be written in a command", pack.display())]
    Quote {
        /// The pack.
        pack: PathBuf,
    },
}

impl Release {
    /// The release for a pack of `size` bytes. Its tag is one that no entry of the registry has.
    ///
    /// # Errors
    /// [`ReleaseError`] as its variants say.
    pub fn of(
        registry: &Registry,
        repository: &Repository,
        package: &PackageName,
        version: &str,
        pack: &Path,
        size: u64,
        description: &str,
    ) -> Result<Release, ReleaseError> {
        let named = || pack.to_owned();
        let asset = pack.file_name().and_then(|name| name.to_str());
        let asset = asset.filter(|name| is_plain_name(name) && !name.ends_with('.'));
        let asset = asset.ok_or_else(|| ReleaseError::AssetName { pack: named() })?;
        if size >= ASSET_SIZE_MAX {
            return Err(ReleaseError::AssetSize { pack: named(), size });
        }
        let mut tag = format!("hub-{}-{version}", package.name);
        if uses(registry, &tag) {
            tag = format!("hub-{}-{}-{version}", package.owner, package.name);
        }
        let path = pack.to_str().ok_or_else(|| ReleaseError::Quote { pack: named() })?;
        // What begins with a dash would be an option.
        let path = if path.starts_with('-') { format!("./{path}") } else { path.to_owned() };
        let title = format!("Hub: {package} {version}");
        let repository_name = repository.to_string();
        let create = ["gh", "release", "create", &tag, &path, "--repo", &repository_name];
        let about = ["--target", "main", "--title", &title, "--notes", description];
        let words = create.into_iter().chain(about);
        let create = shlex::try_join(words).map_err(|_| ReleaseError::Quote { pack: named() })?;
        let url = format!("https://github.com/{repository}/releases/download/{tag}/{asset}");
        Ok(Release { tag, url, commands: vec![create] })
    }
}

fn uses(registry: &Registry, tag: &str) -> bool {
    let mut entries = registry.packages.values().flat_map(|package| package.versions.values());
    entries.any(|entry| entry.release_tag.as_deref() == Some(tag))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::registry::{Package, PackageVersion};

    fn release(registry: &Registry, package: &str, pack: &str) -> Result<Release, ReleaseError> {
        let repository = "acme/packs".parse().unwrap();
        let package = package.parse().unwrap();
        Release::of(registry, &repository, &package, "v2", Path::new(pack), 7, "Bob's, with $HOME and `id`")
    }

    #[test]
    fn the_command_makes_the_release_that_the_address_names() {
        let made = release(&Registry::default(), "o/n", "/tmp/a b/n.forkd-snapshot.tar.zst").unwrap();
        assert_eq!(made.tag, "hub-n-v2");
        assert_eq!(
            made.url,
            "https://github.com/acme/packs/releases/download/hub-n-v2/n.forkd-snapshot.tar.zst"
        );
        let [command] = made.commands.as_slice() else { panic!("{made:?}") };
        // The shell itself says what it makes of it.
        let said =
            std::process::Command::new("sh").arg("-c").arg(format!("printf '%s\\n' {command}")).output();
        let said = String::from_utf8(said.unwrap().stdout).unwrap();
        let words: Vec<_> = said.lines().collect();
        assert_eq!(
            words,
            [
                "gh",
                "release",
                "create",
                "hub-n-v2",
                "/tmp/a b/n.forkd-snapshot.tar.zst",
                "--repo",
                "acme/packs",
                "--target",
                "main",
                "--title",
                "Hub: o/n v2",
                "--notes",
                "Bob's, with $HOME and `id`"
            ]
        );
    }

    #[test]
    fn two_packages_of_one_name_have_two_releases() {
        let entry = PackageVersion { release_tag: Some("hub-n-v2".to_owned()), ..PackageVersion::default() };
        let package = Package { versions: [("v2".to_owned(), entry)].into(), ..Package::default() };
        let registry = Registry { packages: [("a/n".to_owned(), package)].into(), ..Registry::default() };
        assert_eq!(release(&registry, "b/n", "p.tar.zst").unwrap().tag, "hub-b-n-v2");
    }

    #[test]
    fn what_would_not_be_found_there_is_refused() {
        let refused = |pack: &str| release(&Registry::default(), "o/n", pack).unwrap_err();
        for pack in ["/tmp/a b.tar.zst", "pack.", ".hidden", "/", "ü.tar.zst"] {
            assert!(matches!(refused(pack), ReleaseError::AssetName { .. }), "{pack}");
        }
        let (repository, package) = ("a/b".parse().unwrap(), "o/n".parse().unwrap());
        let large =
            Release::of(&Registry::default(), &repository, &package, "v1", Path::new("p"), 2 << 30, "");
        assert!(matches!(large, Err(ReleaseError::AssetSize { size: 0x8000_0000, .. })));
        for text in ["", "a", "a/", "/b", "a/b/c", "a/b c", "-a/b"] {
            assert!(text.parse::<Repository>().is_err(), "{text}");
        }
    }
}
