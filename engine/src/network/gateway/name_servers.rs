//! The name servers that the gateway asks, by hickory.

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError, NoRecords};
use hickory_resolver::proto::op::{Query, ResponseCode};
use hickory_resolver::proto::rr::Record;
use hickory_resolver::system_conf::read_system_conf;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// How long one name server may take, and how often it is asked.
const SERVER_TIMEOUT: Duration = Duration::from_secs(3);
const ATTEMPTS: usize = 2;
/// Questions that may be on their way to name servers at once, of all children of a fork.
const QUESTIONS: usize = 64;
/// Answers that are kept for the children of a fork.
const CACHE: u64 = 1024;
/// Asks name servers; the answers are kept for all children.
pub struct NameServers {
    resolver: Option<TokioResolver>,
    /// How many questions may be on their way at once, of all children.
    asking: Semaphore,
}

impl NameServers {
    /// Asks `servers`, or those of the host's /etc/resolv.conf when there are none. To be called in the gateway's runtime.
    pub fn new(servers: &[SocketAddr]) -> NameServers {
        let (config, mut options) = match configuration(servers) {
            Ok(configuration) => configuration,
            Err(error) => {
                tracing::warn!(%error, "children cannot ask for names: this host names no name server");
                return NameServers::of(None);
            }
        };
        options.timeout = SERVER_TIMEOUT;
        options.attempts = ATTEMPTS;
        options.cache_size = CACHE;
        // One server after the other: each question takes few sockets.
        options.num_concurrent_reqs = 1;
        // The host's own table is its own.
        options.use_hosts_file = ResolveHosts::Never;
        options.preserve_intermediates = true;
        options.try_tcp_on_error = true;
        let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        match builder.with_options(options).build() {
            Ok(resolver) => NameServers::of(Some(resolver)),
            Err(error) => {
                tracing::warn!(%error, "children cannot ask for names");
                NameServers::of(None)
            }
        }
    }

    fn of(resolver: Option<TokioResolver>) -> NameServers {
        NameServers { resolver, asking: Semaphore::new(QUESTIONS) }
    }

    /// The records of a name, and how long they live; or what to answer instead.
    pub async fn records(&self, query: &Query) -> Result<(Vec<Record>, Duration), ResponseCode> {
        let resolver = self.resolver.as_ref().ok_or(ResponseCode::ServFail)?;
        let _asking = self.asking.acquire().await.map_err(|_| ResponseCode::ServFail)?;
        match resolver.lookup(query.name().clone(), query.query_type()).await {
            Ok(lookup) => {
                let left = lookup.valid_until().saturating_duration_since(Instant::now());
                Ok((lookup.answers().to_vec(), left))
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(NoRecords { response_code, .. }))) => {
                Err(response_code)
            }
            Err(error) => {
                tracing::debug!(%error, name = %query.name(), "a name server does not answer");
                Err(ResponseCode::ServFail)
            }
        }
    }
}

fn configuration(servers: &[SocketAddr]) -> io::Result<(ResolverConfig, ResolverOpts)> {
    if servers.is_empty() {
        let (config, options) = read_system_conf().map_err(io::Error::other)?;
        // Search domains are the child's own business.
        let servers = config.name_servers().to_vec();
        return Ok((ResolverConfig::from_name_servers(servers), options));
    }
    let server = |address: &SocketAddr| {
        let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
            connection.port = address.port();
            connection
        });
        NameServerConfig::new(address.ip(), true, connections.into())
    };
    let config = ResolverConfig::from_name_servers(servers.iter().map(server).collect());
    Ok((config, ResolverOpts::default()))
}
