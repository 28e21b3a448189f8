//! Fetching a hub's registry, or using the copy of it while the hub is away.

use std::time::Duration;

use forkd_fs::source::{HttpClient, HttpError};

use super::address::HubAddress;
use super::catalogue::Catalogue;
use super::copies::RegistryCopies;
use super::format::{MAX_LEN, Registry, RegistryError, read_capped};

/// How long a hub may refuse before the copy of its registry serves.
const PATIENCE_WITH_COPY: Duration = Duration::from_millis(500);

impl HubAddress {
    /// Fetches and checks the registry: one GET. While the hub cannot be reached, the copy kept of it when it was last
    /// read serves instead, with a warning.
    pub async fn load(self, http: &HttpClient, copies: &RegistryCopies) -> Result<Catalogue, RegistryError> {
        let Some(copy) = copies.find(&self) else { return self.fetch(http, copies).await };
        let error = match self.fetch_within(Some(PATIENCE_WITH_COPY), http, copies).await {
            Err(RegistryError::Fetch(error)) if is_away(&error) => error,
            // It is there, and may only want a moment.
            Err(RegistryError::Fetch(HttpError::Deadline { .. })) => return self.fetch(http, copies).await,
            fetched => return fetched,
        };
        let registry = Registry::parse(&copy.bytes, &self.to_string())?;
        tracing::warn!(
            hub = %self,
            error = %crate::chain::chain(&error),
            "the hub cannot be reached: using its registry as it was {} ago",
            humantime::format_duration(Duration::from_secs(copy.age.as_secs()))
        );
        Ok(Catalogue { registry, address: self })
    }

    /// Fetches and checks the registry as it is now, and keeps a copy for when the hub is away.
    pub async fn fetch(
        &self,
        http: &HttpClient,
        copies: &RegistryCopies,
    ) -> Result<Catalogue, RegistryError> {
        self.fetch_within(None, http, copies).await
    }

    async fn fetch_within(
        &self,
        patience: Option<Duration>,
        http: &HttpClient,
        copies: &RegistryCopies,
    ) -> Result<Catalogue, RegistryError> {
        let bytes = match self {
            HubAddress::Url(url) => {
                http.authorize(url.as_str());
                match patience {
                    Some(patience) => http.get_within(url.as_str(), MAX_LEN, patience).await?,
                    None => http.get(url.as_str(), MAX_LEN).await?,
                }
            }
            HubAddress::Path(path) => read_capped(path)?.into(),
        };
        let registry = Registry::parse(&bytes, &self.to_string())?;
        copies.keep(self, &bytes);
        Ok(Catalogue { registry, address: self.clone() })
    }
}

/// Whether a host is away, rather than there and saying no.
fn is_away(error: &HttpError) -> bool {
    match error {
        HttpError::Deadline { last, .. } => is_away(last),
        HttpError::Connect { .. } | HttpError::Transfer { .. } | HttpError::Stalled { .. } => true,
        _ => false,
    }
}
