//! URLs as the HTTP source uses them: requested in full, shown without what may be secret in them.

use std::fmt;

use reqwest::Url;

use super::credential::Credential;
use super::error::HttpError;

/// An http(s) URL without user information, and how messages call it. Its `Debug` shows no secrets either.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Address {
    url: Url,
    label: String,
}

impl Address {
    /// Takes a URL somebody named apart: where it leads and the user and password in it.
    pub(super) fn parse(text: &str) -> Result<(Self, Option<Credential>), HttpError> {
        let parsed = Url::parse(text).ok();
        let usable = |url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host();
        let Some(mut url) = parsed.filter(usable) else {
            return Err(HttpError::Url { url: redact_url(text) });
        };
        let credential = Credential::of_userinfo(&url);
        strip_userinfo(&mut url);
        url.set_fragment(None);
        Ok((Self { url, label: redact_url(text) }, credential))
    }

    /// Where a redirect from here to `location` leads. Never from https to http, where others could read along.
    pub(super) fn redirected_to(&self, location: &str) -> Result<Self, HttpError> {
        let from = || self.label.clone();
        let (next, _) = match self.url.join(location) {
            Ok(next) => Self::parse(next.as_str())?,
            Err(_) => return Err(HttpError::Url { url: redact_url(location) }),
        };
        if self.is_secure() && !next.is_secure() {
            return Err(HttpError::Downgrade { url: from(), to: next.label });
        }
        Ok(next)
    }

    pub(super) fn url(&self) -> &Url {
        &self.url
    }

    /// For messages.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// Whether it is an https URL.
    pub(super) fn is_secure(&self) -> bool {
        self.url.scheme() == "https"
    }

    /// Scheme, host and port.
    pub(super) fn origin(&self) -> String {
        self.url.origin().ascii_serialization()
    }

    /// The host's name, as a netrc file has it.
    pub(super) fn host(&self) -> &str {
        self.url.host_str().unwrap_or_default()
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

fn strip_userinfo(url: &mut Url) {
    // Fails only for URLs without a host.
    let _ = url.set_username("");
    let _ = url.set_password(None);
}

/// `text` as messages may show it: a URL without the user and password in it, and without its query, where signed URLs
/// carry their signature. Anything else is returned as it is.
pub fn redact_url(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else {
        // Perhaps a mistyped URL, whose password is as secret.
        return match (text.find("//"), text.rfind('@')) {
            (Some(slashes), Some(at)) if slashes < at => format!("{}//{}", &text[..slashes], &text[at + 1..]),
            _ => text.to_owned(),
        };
    };
    let (named, query) = (!url.username().is_empty() || url.password().is_some(), url.query().is_some());
    if !named && !query && url.fragment().is_none() {
        return text.to_owned();
    }
    strip_userinfo(&mut url);
    url.set_query(None);
    url.set_fragment(None);
    if query { format!("{url}?…") } else { url.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        Address::parse(text).unwrap().0
    }

    #[test]
    fn only_http_urls_are_taken() {
        for good in ["http://127.0.0.1:1/x", "https://host/x", "http://u:p@host/x?y#z"] {
            assert!(Address::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "x", "/path", "file:///x", "ftp://host/x", "http://"] {
            assert!(matches!(Address::parse(bad), Err(HttpError::Url { .. })), "{bad}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let secret = address("https://me:hush@host:8443/a/b.zst?sig=hush#hush");
        assert_eq!(secret.url().as_str(), "https://host:8443/a/b.zst?sig=hush");
        assert_eq!(secret.label(), "https://host:8443/a/b.zst?…");
        assert!(!format!("{secret:?}").contains("hush"));
        assert_eq!(redact_url("htp//me:hush@host/x"), "htp//host/x");
        for plain in ["http://host:80/x", "/some/path", "owner/name@v1", ""] {
            assert_eq!(redact_url(plain), plain);
        }
    }

    #[test]
    fn redirects_stay_within_http_and_never_become_insecure() {
        let (plain, secure) = (address("http://a/x/y"), address("https://a/x/y"));
        assert_eq!(plain.redirected_to("../z?q").unwrap().url().as_str(), "http://a/z?q");
        assert_eq!(plain.redirected_to("//u:p@b/z").unwrap().url().as_str(), "http://b/z");
        assert_eq!(plain.redirected_to("https://b/z").unwrap().url().as_str(), "https://b/z");
        let refused = secure.redirected_to("http://a/x?hush").unwrap_err();
        assert!(matches!(&refused, HttpError::Downgrade { to, .. } if to == "http://a/x?…"), "{refused}");
        assert!(matches!(plain.redirected_to("file:///etc/passwd"), Err(HttpError::Url { .. })));
    }
}
