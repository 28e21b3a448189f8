//! Where a hub's registry is.

use std::path::{Path, PathBuf};

use forkd_fs::source::redact_url;
use forkd_fs::store::PackSource;
use url::Url;

use super::format::{FILE_NAME, RegistryError};

/// Where a registry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HubAddress {
    /// The http(s) URL of a registry.json.
    Url(Url),
    /// The path of a registry.json.
    Path(PathBuf),
}

impl HubAddress {
    /// Reads `--hub` / `FORKD_HUB_URL`: a URL or path of a registry.json or of its folder. Without one, a registry.json
    /// in the working directory is taken.
    pub fn find(hub: Option<&str>) -> Result<HubAddress, RegistryError> {
        match hub.filter(|hub| !hub.is_empty()) {
            Some(hub) => HubAddress::parse(hub),
            None if Path::new(FILE_NAME).is_file() => HubAddress::parse(FILE_NAME),
            None => Err(RegistryError::NoHub),
        }
    }

    /// What [`HubAddress::find`] takes to come back here, user and password included.
    pub fn spelled_out(&self) -> String {
        match self {
            HubAddress::Url(url) => url.to_string(),
            HubAddress::Path(path) => path.display().to_string(),
        }
    }

    pub(super) fn parse(hub: &str) -> Result<HubAddress, RegistryError> {
        let invalid = || RegistryError::Address { address: hub.to_owned() };
        if !hub.contains("://") {
            // Absolute, because the mount's daemon leaves the working directory.
            return std::path::absolute(registry_in(Path::new(hub)))
                .map(HubAddress::Path)
                .map_err(|_| invalid());
        }
        let mut url = Url::parse(hub).map_err(|_| invalid())?;
        match url.scheme() {
            "file" => Ok(HubAddress::Path(registry_in(&url.to_file_path().map_err(|()| invalid())?))),
            "http" | "https" => {
                if !url.path().ends_with(".json") {
                    let mut segments = url.path_segments_mut().map_err(|()| invalid())?;
                    segments.pop_if_empty().push(FILE_NAME);
                }
                Ok(HubAddress::Url(url))
            }
            _ => Err(invalid()),
        }
    }

    /// Where `url`, as an entry of the registry at this address spells it, leads. A registry on the web cannot point
    /// at local files; a local one can point at both.
    pub(super) fn join(&self, url: &str) -> Result<PackSource, &'static str> {
        match self {
            HubAddress::Url(base) => {
                let joined = base.join(url).map_err(|_| "its url is malformed")?;
                match joined.scheme() {
                    "http" | "https" => Ok(PackSource::Url(joined.into())),
                    _ => Err("its url is neither http nor https"),
                }
            }
            HubAddress::Path(path) => match Url::parse(url) {
                Ok(absolute) if matches!(absolute.scheme(), "http" | "https") => {
                    Ok(PackSource::Url(absolute.into()))
                }
                Ok(absolute) if absolute.scheme() == "file" => {
                    absolute.to_file_path().map(PackSource::Path).map_err(|()| "its file URL is malformed")
                }
                Ok(_) => Err("its url is neither http, https nor file"),
                Err(_) => Ok(PackSource::Path(path.parent().unwrap_or(Path::new(".")).join(url))),
            },
        }
    }
}

/// Without user and password.
impl std::fmt::Display for HubAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            // Shown in messages and in /proc/mounts.
            HubAddress::Url(url) => f.write_str(&redact_url(url.as_str())),
            HubAddress::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

fn registry_in(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(FILE_NAME) } else { path.to_owned() }
}
