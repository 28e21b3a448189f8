//! Names of packages as users type them. A leaf: everything may call it.

use std::str::FromStr;

use forkd_fs::format::is_plain_name;

/// The version every package has, which moves.
pub const LATEST: &str = "latest";

/// `owner/name`, both plain names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackageName {
    /// Before the slash.
    pub owner: String,
    /// After it.
    pub name: String,
}

/// `owner/name[@version]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The package.
    pub package: PackageName,
    /// The version, `latest` when none was given.
    pub version: String,
}

/// A text that names no package.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{text}` is not a package name")]
pub struct InvalidReference {
    /// The text.
    pub text: String,
}

impl std::fmt::Display for PackageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.package, self.version)
    }
}

impl FromStr for PackageName {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        match text.split_once('/') {
            Some((owner, name)) if is_plain_name(owner) && is_plain_name(name) => {
                Ok(PackageName { owner: owner.to_owned(), name: name.to_owned() })
            }
            _ => Err(InvalidReference { text: text.to_owned() }),
        }
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let invalid = || InvalidReference { text: text.to_owned() };
        let (package, version) = text.split_once('@').unwrap_or((text, LATEST));
        if !is_plain_name(version) {
            return Err(invalid());
        }
        Ok(Reference { package: package.parse().map_err(|_| invalid())?, version: version.to_owned() })
    }
}
