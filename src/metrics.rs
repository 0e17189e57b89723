//! What is counted, and its Prometheus text. `status` and the unit's status line read the same
//! counters, so that they can't disagree.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Labels of a request that a client made.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// `blob`, `manifest`, `tags`, `catalog`, `base`, `root` or `other`.
    pub route: &'static str,
    /// The HTTP status of the answer.
    pub status: u16,
}

/// Labels of a request that an upstream was asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct UpstreamLabels {
    /// The registry (`docker.io`).
    pub registry: String,
    /// The HTTP status of the answer, or `error` where none came.
    pub outcome: String,
}

/// Labels of what is counted for each upstream.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RegistryLabels {
    /// The registry (`docker.io`).
    pub registry: String,
}

/// Labels of a call that the fleet part made.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FleetCallLabels {
    /// What was called (`DescribeAutoScalingGroups`).
    pub operation: &'static str,
    /// `ok`, `throttled`, `error` or `timeout`.
    pub result: &'static str,
}

/// Labels of where this instance is in its fleet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FleetStateLabels {
    /// `serving`, `drain`...
    pub state: &'static str,
}

/// All counters of the agent.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests answered, whatever the answer; a sum that is not told beside its parts.
    pub answers: Counter,
    /// Requests answered, by route and status.
    pub requests: Family<RequestLabels, Counter>,
    /// Blob requests that the store answered.
    pub blob_hits: Counter,
    /// Blob requests that had to wait for an upstream.
    pub blob_misses: Counter,
    /// Manifest requests that the store answered, with or without a revalidation.
    pub manifest_hits: Counter,
    /// Manifest requests for which the upstream sent a manifest.
    pub manifest_misses: Counter,
    /// Bytes of blobs and manifests sent to clients.
    pub served_bytes: Counter,
    /// Bytes of blobs and manifests that clients have pushed.
    pub pushed_bytes: Counter,
    /// Bytes of blobs and manifests received from upstreams.
    pub fetched_bytes: Counter,
    /// Answers that were older than the freshness window, because the upstream could not confirm.
    pub stale_served: Counter,
    /// Requests to upstreams.
    pub upstream_requests: Family<UpstreamLabels, Counter>,
    /// Downloads that ended without a blob.
    pub fill_failures: Counter,
    /// Downloads that went on after a break.
    pub fill_resumptions: Counter,
    /// Downloads that the store could not keep, and that went on to their readers.
    pub passed_through: Counter,
    /// Blobs and manifests that the shared bucket had.
    pub shared_hits: Counter,
    /// Blobs and manifests that the shared bucket was asked for in vain.
    pub shared_misses: Counter,
    /// Bytes of blobs and manifests received from the shared bucket.
    pub shared_bytes: Counter,
    /// Blobs and manifests that were brought to the shared bucket.
    pub shared_uploads: Counter,
    /// What was not, because too much waited already.
    pub shared_dropped: Counter,
    /// What was not, because S3 refused or failed.
    pub shared_failures: Counter,
    /// Downloads under way.
    pub fills: Gauge,
    /// Blobs and manifests that were evicted.
    pub evicted_blobs: Counter,
    /// Their bytes.
    pub evicted_bytes: Counter,
    /// Bytes of the blobs and manifests that are stored, once they were counted.
    cache_bytes: OnceLock<Gauge>,
    /// Pulls that an upstream says are left in its window.
    pub rate_limit_remaining: Family<RegistryLabels, Gauge>,
    /// Connections of clients that are open.
    pub connections: Gauge,
    /// Connections that were closed at once, because their client had half of all.
    pub refused_connections: Counter,
    /// Answers under way.
    pub running: Gauge,
    /// Calls that the fleet part made.
    pub fleet_calls: Family<FleetCallLabels, Counter>,
    /// Times that this instance did not ask to be replaced, although something is fatal.
    pub fleet_guard_refusals: Counter,
    /// 1 for the state that this instance is in; nothing without a fleet.
    pub fleet_state: Family<FleetStateLabels, Gauge>,
    /// Instances of the fleet that are in service and healthy, and that are wanted, once the group
    /// was seen.
    fleet_instances: OnceLock<(Gauge, Gauge)>,
    /// 1 while ready, else 0.
    pub ready: Gauge<u64, AtomicU64>,
}

impl Metrics {
    /// Sets how many bytes are stored, where that is known. Until it is, the metric is not there.
    pub fn set_cache_bytes(&self, bytes: Option<u64>) {
        if let Some(bytes) = bytes {
            let gauge = self.cache_bytes.get_or_init(Gauge::default);
            gauge.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }

    /// Sets how many instances of the fleet are healthy, and how many are wanted. Until then neither
    /// metric is there.
    pub fn set_fleet_instances(&self, healthy: usize, wanted: u32) {
        let (of_healthy, of_wanted) = self.fleet_instances.get_or_init(Default::default);
        of_healthy.set(i64::try_from(healthy).unwrap_or(i64::MAX));
        of_wanted.set(wanted.into());
    }

    /// The Prometheus text exposition (`OpenMetrics` 1.0).
    pub fn encode(&self) -> String {
        let mut registry = Registry::with_prefix("registry_agent");
        macro_rules! register {
            ($($field:ident: $help:literal),+ $(,)?) => {
                $(registry.register(stringify!($field), $help, self.$field.clone());)+
            };
        }
        register! {
            requests: "Requests answered",
            blob_hits: "Blob requests that the store answered",
            blob_misses: "Blob requests that had to wait for an upstream",
            manifest_hits: "Manifest requests that the store answered",
            manifest_misses: "Manifest requests for which the upstream sent a manifest",
            served_bytes: "Bytes of blobs and manifests sent to clients",
            pushed_bytes: "Bytes of blobs and manifests that clients have pushed",
            fetched_bytes: "Bytes of blobs and manifests received from upstreams",
            stale_served: "Answers older than the freshness window",
            upstream_requests: "Requests to upstreams",
            fill_failures: "Downloads that ended without a blob",
            fill_resumptions: "Downloads that went on after a break",
            passed_through: "Downloads that the store could not keep",
            shared_hits: "Blobs and manifests that the shared bucket had",
            shared_misses: "Blobs and manifests that the shared bucket was asked for in vain",
            shared_bytes: "Bytes of blobs and manifests received from the shared bucket",
            shared_uploads: "Blobs and manifests that were brought to the shared bucket",
            shared_dropped: "What was not brought to the shared bucket: too much waited",
            shared_failures: "What was not brought to the shared bucket: S3 refused or failed",
            fills: "Downloads under way",
            evicted_blobs: "Blobs and manifests that were evicted",
            evicted_bytes: "Bytes of the blobs and manifests that were evicted",
            rate_limit_remaining: "Pulls that an upstream says are left in its window",
            connections: "Connections of clients that are open",
            refused_connections: "Connections closed at once, because their client had half of all",
            running: "Answers under way",
            fleet_calls: "Calls that the fleet part made",
            fleet_guard_refusals: "Times that a replacement was not asked for, although something is fatal",
            fleet_state: "1 for where this instance is in its fleet",
            ready: "1 while ready",
        }
        if let Some((healthy, wanted)) = self.fleet_instances.get() {
            let help = "Instances of the fleet that are in service and healthy";
            registry.register("fleet_healthy_instances", help, healthy.clone());
            registry.register(
                "fleet_wanted",
                "Instances that the fleet should have",
                wanted.clone(),
            );
        }
        if let Some(gauge) = self.cache_bytes.get() {
            let help = "Bytes of the blobs and manifests that are stored";
            registry.register("cache_bytes", help, gauge.clone());
        }
        let mut text = String::new();
        // Writing to a String can't fail; an empty page is the least wrong answer if it ever does.
        if prometheus_client::encoding::text::encode(&mut text, &registry).is_err() {
            text.clear();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_each_counter_with_its_labels() {
        let metrics = Metrics::default();
        metrics
            .requests
            .get_or_create(&RequestLabels {
                route: "blob",
                status: 200,
            })
            .inc_by(3);
        let text = metrics.encode();
        assert!(
            text.contains("registry_agent_requests_total{route=\"blob\",status=\"200\"} 3\n"),
            "{text}"
        );
        assert!(
            text.contains("registry_agent_blob_hits_total 0\n"),
            "{text}"
        );
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
