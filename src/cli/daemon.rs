//! Arguments of the daemon.

use super::shared::{CacheArgs, HubSource};
use crate::units;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, value_parser};
use forkd_engine::local::daemon::{DaemonLimits, DaemonOptions, Listen, OnExit, TlsFiles, socket};
use forkd_engine::local::paths::Paths;
use std::net::SocketAddr;
use std::path::PathBuf;

/// `forkd serve`.
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Where to listen: unix:PATH, or an address and TCP port, for which --token-file is needed
    /// [default: daemon.sock in forkd's run directory]
    #[arg(long, value_name = "unix:PATH|ADDR:PORT", value_parser = parse_listen)]
    pub listen: Option<Listen>,
    /// Who may use it over TCP: a file with a line `[NAME] TOKEN` for each
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// TLS on the TCP port: the certificate and what leads to a root, PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// What becomes of sandboxes when the daemon ends: the next one finds them, or they end, too
    #[arg(long, value_name = "WHAT", default_value = "keep",
          value_parser = PossibleValuesParser::new(["keep", "end"]).map(|what| match what.as_str() {
              "end" => OnExit::End,
              _ => OnExit::Keep,
          }))]
    pub on_exit: OnExit,
    /// How many processes wait ready to fork, so that a request is one message
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = parse_count(0))]
    pub ready: usize,
    /// The most sandboxes that live at a time
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = parse_count(1))]
    pub max_sandboxes: usize,
    /// The most connections at a time
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = parse_count(1))]
    pub max_connections: usize,
    /// The most programs, evaluations and file transfers at a time
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = parse_count(1))]
    pub max_streams: usize,
    /// The longest file that is taken
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = units::parse_size)]
    pub max_file_size: u64,
    /// Write one line of JSON for each action into FILE
    #[arg(long, value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// Have systemd start the daemon, with these options, when its socket is asked first: write the units into DIR, or
    /// where systemd looks for them, and return
    #[arg(long, value_name = "DIR")]
    pub install_unit: Option<Option<PathBuf>>,
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
}

impl DaemonArgs {
    /// As the daemon takes it.
    pub fn options(&self, paths: &Paths) -> DaemonOptions {
        let tls = self.tls_cert.clone().zip(self.tls_key.clone());
        DaemonOptions {
            listen: self.listen.clone().unwrap_or_else(|| Listen::Unix(socket(paths))),
            token_file: self.token_file.clone(),
            tls: tls.map(|(certificate, key)| TlsFiles { certificate, key }),
            hub: self.hub.hub.clone(),
            on_exit: self.on_exit,
            ready: self.ready,
            limits: DaemonLimits {
                sandboxes: self.max_sandboxes,
                connections: self.max_connections,
                streams: self.max_streams,
                file_bytes: self.max_file_size,
            },
            audit_log: self.audit_log.clone(),
            cache: (self.cache.cache_size, self.cache.cache_reserve),
        }
    }
}

fn parse_listen(text: &str) -> Result<Listen, String> {
    match text.strip_prefix("unix:") {
        Some("") => Err("unix: lacks its path".to_owned()),
        Some(path) => Ok(Listen::Unix(PathBuf::from(path))),
        None => text
            .parse::<SocketAddr>()
            .map(Listen::Tcp)
            .map_err(|_| "neither unix:PATH nor an address with a port, such as 127.0.0.1:8088".to_owned()),
    }
}

/// From `least` to 10000.
fn parse_count(least: u64) -> impl TypedValueParser<Value = usize> {
    value_parser!(u64).range(least..=10_000).map(|count| usize::try_from(count).unwrap_or(usize::MAX))
}
