//! Who we are to a host: from the URL, the environment or a netrc file, and which hosts may learn it.
//!
//! Credentials go to the scheme, host and port of URLs the user named ([`super::HttpClient::authorize`]) and nowhere
//! else: not to other hosts a registry points at, not to where a redirect leads.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

use netrc::{Authenticator, Netrc};
use reqwest::header::HeaderValue;

use super::address::Address;
use super::credential::Credential;

/// The environment variable with a token for the hub.
pub const TOKEN_VARIABLE: &str = "FORKD_HUB_TOKEN";

/// Where credentials come from. The default knows none but those in URLs.
#[derive(Clone, Default)]
pub struct Credentials {
    token: Option<String>,
    netrc: Option<PathBuf>,
}

/// The hosts that may learn who we are.
#[derive(Debug, Default)]
pub(super) struct Keyring {
    sources: Credentials,
    /// By host name; `default` stands for all others.
    netrc: OnceLock<BTreeMap<String, Credential>>,
    /// By scheme, host and port.
    named: Mutex<BTreeMap<String, Option<Credential>>>,
}

impl Credentials {
    /// [`TOKEN_VARIABLE`], and the netrc file at `$NETRC` or `~/.netrc`, which is read when it is first needed.
    pub fn from_env() -> Self {
        let token = std::env::var(TOKEN_VARIABLE).ok();
        Self { netrc: Netrc::get_file(), ..Self::default() }.with_token(token.as_deref().unwrap_or_default())
    }

    /// The same with another token; an empty one is none.
    pub fn with_token(self, token: &str) -> Self {
        let token = token.trim();
        let usable = HeaderValue::from_str(token).is_ok();
        if !usable {
            tracing::warn!("the token in {TOKEN_VARIABLE} holds characters no HTTP header may: not used");
        }
        Self { token: (usable && !token.is_empty()).then(|| token.to_owned()), ..self }
    }

    /// The same with another netrc file.
    pub fn with_netrc(self, file: PathBuf) -> Self {
        Self { netrc: Some(file), ..self }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("token", &self.token.is_some())
            .field("netrc", &self.netrc)
            .finish()
    }
}

impl Keyring {
    pub(super) fn new(sources: Credentials) -> Self {
        Self { sources, ..Self::default() }
    }

    /// The host of `address` may learn who we are: what its URL said, else the token, else its netrc entry.
    pub(super) fn authorize(&self, address: &Address, in_url: Option<Credential>) {
        let token = || self.sources.token.clone().map(Credential::Bearer);
        let credential = in_url.or_else(token).or_else(|| self.of_netrc(address.host()));
        let mut named = self.named.lock().expect("no panics while held");
        let known = named.entry(address.origin()).or_default();
        if credential.is_some() {
            *known = credential;
        }
    }

    /// What to tell the host of `address`.
    pub(super) fn credential_for(&self, address: &Address) -> Option<Credential> {
        self.named.lock().expect("no panics while held").get(&address.origin()).cloned().flatten()
    }

    fn of_netrc(&self, host: &str) -> Option<Credential> {
        let file = self.sources.netrc.as_ref()?;
        let hosts = self.netrc.get_or_init(|| match Netrc::from_file(file) {
            Ok(netrc) => {
                let basic = |Authenticator { login: user, password, .. }| Credential::Basic { user, password };
                netrc.hosts.into_iter().map(|(host, entry)| (host, basic(entry))).collect()
            }
            // The parser's own words might quote a password.
            Err(_) => {
                tracing::warn!(file = %file.display(), "cannot be read as a netrc file: no credentials from it");
                BTreeMap::new()
            }
        });
        hosts.get(host).or_else(|| hosts.get("default")).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Basic { user: user.into(), password: password.into() })
    }

    fn keyring(credentials: Credentials, named: &str) -> Keyring {
        let keyring = Keyring::new(credentials);
        let (address, in_url) = Address::parse(named).unwrap();
        keyring.authorize(&address, in_url);
        keyring
    }

    fn told(keyring: &Keyring, url: &str) -> Option<Credential> {
        keyring.credential_for(&Address::parse(url).unwrap().0)
    }

    #[test]
    fn only_the_named_scheme_host_and_port_are_told() {
        let keyring = keyring(Credentials::default().with_token(" t\n"), "https://hub/registry.json");
        assert_eq!(told(&keyring, "https://hub/packs/x"), Some(Credential::Bearer("t".into())));
        assert_eq!(told(&keyring, "https://hub:443/packs/x"), Some(Credential::Bearer("t".into())));
        for other in ["http://hub/x", "https://hub:444/x", "https://hub.evil/x", "https://evil/hub"] {
            assert_eq!(told(&keyring, other), None, "{other}");
        }
    }

    #[test]
    fn the_url_comes_before_the_token_and_that_before_netrc() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("netrc");
        let text = "machine hub login me password \"hush hush\"\nmachine other\n  login you\n  password x\n";
        std::fs::write(&file, text).unwrap();
        let from_netrc = Credentials::default().with_netrc(file.clone());
        let all = from_netrc.clone().with_token("t");
        assert_eq!(told(&keyring(all.clone(), "http://u:p%40@hub/"), "http://hub/x"), basic("u", "p@"));
        assert_eq!(told(&keyring(all, "http://hub/"), "http://hub/x"), Some(Credential::Bearer("t".into())));
        let keyring_of_file = keyring(from_netrc.clone(), "http://hub:8080/");
        assert_eq!(told(&keyring_of_file, "http://hub:8080/x"), basic("me", "hush hush"));
        assert_eq!(told(&keyring_of_file, "http://other/x"), None, "in the file, but not named");
        assert_eq!(told(&keyring(from_netrc.clone(), "http://third/"), "http://third/"), None);
        std::fs::write(&file, format!("{text}default login d password d\n")).unwrap();
        assert_eq!(told(&keyring(from_netrc.clone(), "http://third/"), "http://third/"), basic("d", "d"));
        std::fs::write(&file, "machine hub loggin me").unwrap();
        assert_eq!(told(&keyring(from_netrc, "http://hub/"), "http://hub/"), None, "malformed is none");
    }

    #[test]
    fn nothing_shows_a_secret() {
        let credentials = Credentials::default().with_token("hush");
        let keyring = keyring(credentials.clone(), "http://u:hush@hub/");
        let shown = format!("{credentials:?} {keyring:?} {:?}", Credential::Bearer("hush".into()));
        assert!(!shown.contains("hush"), "{shown}");
        assert_eq!(Credentials::default().with_token("a\u{1}b").token, None);
    }
}
