//! What one host is told about who we are. Its `Debug` shows no secrets.

use std::fmt;

use reqwest::{RequestBuilder, Url};

/// What one host is told.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credential {
    Basic { user: String, password: String },
    Bearer(String),
}

impl Credential {
    /// The user and password in a URL.
    pub(super) fn of_userinfo(url: &Url) -> Option<Self> {
        let decode = |text| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
        let (user, password) = (url.username(), url.password());
        let named = !user.is_empty() || password.is_some();
        named.then(|| Self::Basic { user: decode(user), password: decode(password.unwrap_or_default()) })
    }

    /// Adds it to a request.
    pub(super) fn dress(&self, request: RequestBuilder) -> RequestBuilder {
        match self {
            Self::Basic { user, password } => request.basic_auth(user, Some(password)),
            Self::Bearer(token) => request.bearer_auth(token),
        }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic(…)",
            Self::Bearer(_) => "Bearer(…)",
        })
    }
}
