//! `manifest.toml`: what a pack is and what a host must have to run it. Read by every command that shows or restores a
//! pack; written by the snapshot and by [`crate::writer`].

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::format::{self, MAX_FILE_SIZE, MAX_FILES, PACK_VERSION};

/// Largest manifest accepted, in bytes: a hundred times a usual one. Parsed, one can take a hundred times as much memory.
pub const MAX_MANIFEST_LEN: u64 = 256 << 10;

/// [`Requires::vmstate_version`] of a pack whose `vmstate` is another monitor's: its files are there to be read, its machine
/// is not to be restored.
pub const FOREIGN_VMSTATE: u32 = 0;

/// A pack's own description. Fields unknown to this version are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Layout of the pack; [`PACK_VERSION`].
    pub forkd_pack_version: u32,
    /// Name the snapshot was made under.
    pub tag: String,
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// What the root disk was made from, e.g. `debian:bookworm`.
    #[serde(default)]
    pub base_image: String,
    /// When the snapshot was taken, RFC 3339.
    pub created_at: String,
    /// Version of the forkd that made it.
    pub forkd_version: String,
    /// What a restore needs from the host.
    pub requires: Requires,
    /// The other members, with the digests of their plain contents.
    #[serde(default)]
    pub files: Vec<ManifestFile>,
    /// What proves its warm state, for whoever records its trace again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<ManifestProbe>,
}

/// Code for the machine's warm worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestProbe {
    /// In the worker's language.
    pub code: String,
    /// What it must answer, letter by letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect: Option<String>,
}

/// One member of the pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Plain file name, e.g. `memory.bin`.
    pub path: String,
    /// Plain size in bytes.
    pub size: u64,
    /// Digest of the plain contents, holes counted as zeros.
    pub sha256: Digest,
}

/// What a host must offer to restore the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requires {
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// The virtualisation the state was taken on; it restores on the same kind only.
    pub kvm_kind: KvmKind,
    /// Guest kernel build, e.g. `6.12.48-forkd`.
    pub kernel: String,
    /// Layout of the `vmstate` member; [`FOREIGN_VMSTATE`] if it is none of ours.
    pub vmstate_version: u32,
    /// CPU features the guest was shown and may use, named as /proc/cpuinfo names them.
    #[serde(default)]
    pub cpu_features: Vec<String>,
    /// The processor's maker as CPUID spells it, e.g. `GenuineIntel`; empty when it does not matter.
    #[serde(default)]
    pub cpu_vendor: String,
}

/// How a host runs guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvmKind {
    /// Without hardware virtualisation (the kvm_pvm module).
    Pvm,
    /// Intel VT-x or AMD-V.
    Hardware,
}

impl std::fmt::Display for KvmKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pvm => "pvm",
            Self::Hardware => "hardware",
        })
    }
}

/// Why bytes are not a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// More than [`MAX_MANIFEST_LEN`].
    #[error("manifest.toml has {len} bytes, at most {MAX_MANIFEST_LEN} are read")]
    TooLong {
        /// Its length in bytes.
        len: u64,
    },
    /// Not UTF-8.
    #[error("manifest.toml is not UTF-8 text")]
    NotText(#[source] std::str::Utf8Error),
    /// Not TOML, or a field is missing or of the wrong type.
    #[error("manifest.toml cannot be read: {}", .0.message())]
    Syntax(#[source] Box<toml::de::Error>),
    /// A pack of another layout.
    #[error("manifest.toml says forkd_pack_version = {found}, this forkd reads {PACK_VERSION}")]
    Version {
        /// What it says.
        found: u32,
    },
    /// A file whose name is not a plain file name.
    #[error("manifest.toml lists a file named {name:?}; only plain file names are allowed")]
    Name {
        /// The name, as written.
        name: String,
    },
    /// The same name twice.
    #[error("manifest.toml lists {name} twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A size no file in a pack can have, or too many files.
    #[error("manifest.toml is out of bounds: {what}")]
    Bounds {
        /// What is too large.
        what: String,
    },
}

impl Requires {
    /// Whether the machine's state is another monitor's.
    pub fn is_foreign(&self) -> bool {
        self.vmstate_version == FOREIGN_VMSTATE
    }
}

impl Manifest {
    /// Reads a manifest and checks every name and size in it.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() as u64 > MAX_MANIFEST_LEN {
            return Err(ManifestError::TooLong { len: bytes.len() as u64 });
        }
        let text = std::str::from_utf8(bytes).map_err(ManifestError::NotText)?;
        // The version first: another layout's fields would only give a confusing syntax error.
        let found = pack_version(text)?;
        if found != PACK_VERSION {
            return Err(ManifestError::Version { found });
        }
        let manifest: Self = toml::from_str(text).map_err(|e| ManifestError::Syntax(Box::new(e)))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The manifest as text that [`Manifest::parse`] reads back.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("strings, integers below 2^63 and tables always serialise")
    }

    /// The entry of the file `name`.
    pub fn file(&self, name: &str) -> Option<&ManifestFile> {
        self.files.iter().find(|file| file.path == name)
    }

    fn check(&self) -> Result<(), ManifestError> {
        if self.files.len() > MAX_FILES as usize {
            return Err(ManifestError::Bounds { what: format!("{} files", self.files.len()) });
        }
        for (position, file) in self.files.iter().enumerate() {
            if !format::is_plain_name(&file.path) || file.path == format::MANIFEST {
                return Err(ManifestError::Name { name: file.path.clone() });
            }
            if self.files[..position].iter().any(|other| other.path == file.path) {
                return Err(ManifestError::Duplicate { name: file.path.clone() });
            }
            if file.size > MAX_FILE_SIZE {
                return Err(ManifestError::Bounds { what: format!("{} has {} bytes", file.path, file.size) });
            }
        }
        Ok(())
    }
}

/// The `forkd_pack_version` of a manifest of any layout.
pub(crate) fn pack_version(text: &str) -> Result<u32, ManifestError> {
    #[derive(Deserialize)]
    struct VersionOnly {
        forkd_pack_version: u32,
    }
    toml::from_str::<VersionOnly>(text)
        .map(|found| found.forkd_pack_version)
        .map_err(|e| ManifestError::Syntax(Box::new(e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn sample() -> Manifest {
        Manifest {
            forkd_pack_version: PACK_VERSION,
            tag: "python-numpy".into(),
            description: "numpy imported".into(),
            base_image: "debian:bookworm".into(),
            created_at: "2026-01-02T03:04:05Z".into(),
            forkd_version: "0.1.0".into(),
            requires: Requires {
                memory_mib: 512,
                vcpus: 1,
                kvm_kind: KvmKind::Pvm,
                kernel: "6.12".into(),
                vmstate_version: 1,
                cpu_features: vec!["sse4_2".into(), "avx2".into()],
                cpu_vendor: "GenuineIntel".into(),
            },
            files: vec![ManifestFile { path: "memory.bin".into(), size: 1 << 29, sha256: Digest::of(b"m") }],
            probe: Some(ManifestProbe { code: "1 + 1\n\"x\"".into(), expect: None }),
        }
    }

    #[test]
    fn toml_round_trips() {
        let manifest = sample();
        assert_eq!(Manifest::parse(manifest.to_toml().as_bytes()).unwrap(), manifest);
    }

    #[test]
    fn bad_manifests_are_named() {
        let with = |path: &str, size: u64| {
            let mut manifest = sample();
            manifest.files.push(ManifestFile { path: path.into(), size, sha256: Digest::of(b"") });
            Manifest::parse(manifest.to_toml().as_bytes())
        };
        for name in ["../x", "/etc/passwd", "", "a/b", ".hidden", "manifest.toml"] {
            assert!(matches!(with(name, 1), Err(ManifestError::Name { .. })), "{name}");
        }
        assert!(matches!(with("memory.bin", 1), Err(ManifestError::Duplicate { .. })));
        assert!(matches!(with("x", MAX_FILE_SIZE + 1), Err(ManifestError::Bounds { .. })));
        assert!(matches!(Manifest::parse(&[0xff]), Err(ManifestError::NotText(_))));
        assert!(matches!(Manifest::parse(b""), Err(ManifestError::Syntax(_))));
        assert!(matches!(Manifest::parse(b"forkd_pack_version = 3"), Err(ManifestError::Syntax(_))));
        assert!(matches!(
            Manifest::parse(b"forkd_pack_version = 1\ntag = \"x\""),
            Err(ManifestError::Version { found: 1 })
        ));
        let long = vec![b'#'; MAX_MANIFEST_LEN as usize + 1];
        assert!(matches!(Manifest::parse(&long), Err(ManifestError::TooLong { .. })));
    }
}
