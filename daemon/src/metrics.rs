//! What /metrics shows, in the text format of OpenMetrics.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// A kind of request, and how it was answered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// The method.
    pub method: String,
    /// The path, with names for what varies.
    pub route: String,
    /// The status.
    pub status: u16,
}

/// Where sandboxes stand.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StateLabels {
    /// As `forkd ps` shows it.
    pub state: String,
}

/// All figures.
pub struct Metrics {
    registry: Registry,
    /// Requests that were answered.
    pub requests: Family<RequestLabels, Counter>,
    /// Forks that were done.
    pub forks: Counter,
    /// Forks that failed.
    pub failed_forks: Counter,
    /// Sandboxes that were made.
    pub created: Counter,
    /// From the request to the first instruction, s.
    pub first_instruction: Histogram,
    /// From the request until a sandbox was ready, s.
    pub ready: Histogram,
    /// Connections that are open.
    pub connections: Gauge,
    /// Connections that were refused because there were too many.
    pub refused_connections: Counter,
    sandboxes: Family<StateLabels, Gauge>,
    running_forks: Gauge,
}

impl Default for Metrics {
    fn default() -> Metrics {
        // 1 ms to 32 s.
        let buckets = || Histogram::new(exponential_buckets(0.001, 2.0, 16));
        let mut metrics = Metrics {
            registry: Registry::with_prefix("forkd"),
            requests: Family::default(),
            forks: Counter::default(),
            failed_forks: Counter::default(),
            created: Counter::default(),
            first_instruction: buckets(),
            ready: buckets(),
            connections: Gauge::default(),
            refused_connections: Counter::default(),
            sandboxes: Family::default(),
            running_forks: Gauge::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register("http_requests", "Requests that were answered", self.requests.clone());
        registry.register("forks", "Forks that were done", self.forks.clone());
        registry.register("failed_forks", "Forks that failed", self.failed_forks.clone());
        registry.register("sandboxes_created", "Sandboxes that were made", self.created.clone());
        let help = "From the request to a sandbox's first instruction";
        registry.register_with_unit("first_instruction", help, Unit::Seconds, self.first_instruction.clone());
        let help = "From the request until a sandbox was ready";
        registry.register_with_unit("ready", help, Unit::Seconds, self.ready.clone());
        registry.register("connections", "Connections that are open", self.connections.clone());
        let help = "Connections that were refused because there were too many";
        registry.register("refused_connections", help, self.refused_connections.clone());
        registry.register("sandboxes", "Sandboxes that live", self.sandboxes.clone());
        registry.register("running_forks", "Forks that have such", self.running_forks.clone());
    }

    /// All of it, with what was counted last.
    pub fn text(&self, counted: (std::collections::BTreeMap<&'static str, usize>, usize)) -> String {
        let (sandboxes, forks) = counted;
        self.sandboxes.clear();
        for (state, count) in sandboxes {
            let labels = StateLabels { state: state.to_owned() };
            self.sandboxes.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.running_forks.set(i64::try_from(forks).unwrap_or(i64::MAX));
        let mut text = String::new();
        // A String takes everything.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
