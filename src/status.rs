//! What `/status` answers and `registry-agent status` prints.

use std::fmt::{self, Write as _};
use std::time::{Duration, SystemTime};

use indicatif::{DecimalBytes, HumanCount};
use serde::{Deserialize, Serialize};
use url::Url;

use crate::config::Settings;
use crate::health::Health;
use crate::metrics::Metrics;
use crate::mirror::Mirror;
use crate::upstream::Budget;

/// The state of an agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Its version.
    pub version: String,
    /// Its role.
    pub role: String,
    /// Whether it can serve what it has.
    pub ready: bool,
    /// What is wrong, in sentences for people.
    pub problems: Vec<String>,
    /// Where the registry listens.
    pub listen: String,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// What it did since then.
    pub cache: CacheStatus,
    /// Where it keeps things.
    pub storage: StorageStatus,
    /// Whom it mirrors.
    pub upstreams: Vec<UpstreamStatus>,
}

/// What was served from where, since the start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CacheStatus {
    /// Requests for blobs and manifests that the store answered.
    pub hits: u64,
    /// Those that an upstream answered.
    pub misses: u64,
    /// Answers that no upstream could confirm.
    pub stale: u64,
    /// Downloads under way.
    pub fills: i64,
    /// Bytes sent to clients.
    pub served_bytes: u64,
    /// Bytes received from upstreams.
    pub fetched_bytes: u64,
    /// Bytes that no upstream had to send: served, less fetched.
    pub saved_bytes: u64,
}

/// The disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StorageStatus {
    /// The root folder.
    pub root: String,
    /// Its disk's size in bytes; absent where the disk does not say.
    pub size_bytes: Option<u64>,
    /// What can still be written, in bytes.
    pub available_bytes: Option<u64>,
    /// What is in use of it, in bytes, by whomever.
    pub used_bytes: Option<u64>,
    /// How much may be stored (`80% of what others leave of the disk`, `500.00 GB`).
    pub cache_limit: String,
    /// The bytes of all blobs and manifests; absent before they were counted.
    pub cache_bytes: Option<u64>,
}

/// An upstream.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UpstreamStatus {
    /// The name clients know it by.
    pub registry: String,
    /// Where its API is.
    pub urls: Vec<String>,
    /// Seconds since it last answered.
    pub answered_seconds_ago: Option<u64>,
    /// Seconds since it last failed to.
    pub failed_seconds_ago: Option<u64>,
    /// How it last failed.
    pub failure: Option<String>,
    /// Pulls left in its window.
    pub budget_remaining: Option<u64>,
    /// Pulls that the window has.
    pub budget_limit: Option<u64>,
}

impl Status {
    /// The state now.
    pub async fn now(
        settings: &Settings,
        mirror: &Mirror,
        health: &Health,
        metrics: &Metrics,
        uptime: Duration,
    ) -> Self {
        let disk = mirror.store().disk().await.ok();
        let seconds_ago = |at: SystemTime| {
            SystemTime::now()
                .duration_since(at)
                .unwrap_or_default()
                .as_secs()
        };
        let upstreams = mirror.upstreams().into_iter().map(|upstream| {
            let last = upstream.last_contact();
            UpstreamStatus {
                registry: upstream.registry().to_string(),
                urls: upstream
                    .settings()
                    .urls
                    .iter()
                    .map(Url::to_string)
                    .collect(),
                answered_seconds_ago: last.answered.map(seconds_ago),
                failed_seconds_ago: last.failed.as_ref().map(|(at, _)| seconds_ago(*at)),
                failure: last.failed.map(|(_, failure)| failure),
                budget_remaining: last.budget.map(|budget| budget.remaining),
                budget_limit: last.budget.and_then(|budget| budget.limit),
            }
        });
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            role: settings.role.as_str().to_owned(),
            ready: health.ready,
            problems: health.problems.clone(),
            listen: settings.listen.to_string(),
            uptime_seconds: uptime.as_secs(),
            cache: CacheStatus::now(metrics),
            storage: StorageStatus {
                root: mirror.store().root().display().to_string(),
                size_bytes: disk.map(|disk| disk.size),
                available_bytes: disk.map(|disk| disk.available),
                used_bytes: disk.map(|disk| disk.used),
                cache_limit: mirror.cache_limit().to_string(),
                cache_bytes: mirror.store().bytes(),
            },
            upstreams: upstreams.collect(),
        }
    }
}

impl CacheStatus {
    fn now(metrics: &Metrics) -> Self {
        let (served, fetched) = (metrics.served_bytes.get(), metrics.fetched_bytes.get());
        Self {
            hits: metrics.blob_hits.get() + metrics.manifest_hits.get(),
            misses: metrics.blob_misses.get() + metrics.manifest_misses.get(),
            stale: metrics.stale_served.get(),
            fills: metrics.fills.get(),
            served_bytes: served,
            fetched_bytes: fetched,
            saved_bytes: served.saturating_sub(fetched),
        }
    }
}

/// The one line that systemd shows:
/// `ready: mirror of docker.io, 1,204 hits 31 misses, 41.00 GB saved, budget 87/100`.
pub fn line(settings: &Settings, mirror: &Mirror, health: &Health, metrics: &Metrics) -> String {
    let upstreams = mirror.upstreams();
    let names: Vec<&str> = upstreams
        .iter()
        .map(|upstream| upstream.registry().as_str())
        .collect();
    let cache = CacheStatus::now(metrics);
    let mut line = format!(
        "{}: {} of {}, {} hits {} misses, {} saved",
        if health.ready { "ready" } else { "not ready" },
        settings.role.as_str(),
        names.join(", "),
        HumanCount(cache.hits),
        HumanCount(cache.misses),
        DecimalBytes(cache.saved_bytes),
    );
    for upstream in &upstreams {
        if let Some(Budget { remaining, limit }) = upstream.last_contact().budget {
            let limit = limit.map(|limit| format!("/{limit}")).unwrap_or_default();
            let registry = upstream.registry();
            // Writing to a String can't fail.
            let _ = write!(line, ", {registry} budget {remaining}{limit}");
        }
    }
    for problem in &health.problems {
        line.push_str("; ");
        line.push_str(problem);
    }
    line
}

impl StorageStatus {
    /// How much is stored of what may be: `12.00 GB of at most 500.00 GB`.
    fn cache(&self) -> String {
        let limit = &self.cache_limit;
        let mut text = match self.cache_bytes {
            Some(bytes) => format!("{} of at most {limit}", DecimalBytes(bytes)),
            None => format!("at most {limit}"),
        };
        if let (Some(used), Some(available)) = (self.used_bytes, self.available_bytes)
            && limit.contains('%')
        {
            let share = used.saturating_mul(100) / (used + available).max(1);
            // Writing to a String can't fail.
            let _ = write!(text, "; {share}% of the disk is in use");
        }
        text
    }
}

impl fmt::Display for Status {
    /// The table that people read.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let uptime = humantime::format_duration(Duration::from_secs(self.uptime_seconds));
        let ready = if self.ready { "yes" } else { "no" };
        let ago =
            |seconds: u64| humantime::format_duration(Duration::from_secs(seconds)).to_string();
        let cache = &self.cache;
        let mut rows = vec![
            ("version", self.version.clone()),
            ("role", self.role.clone()),
            ("ready", ready.to_owned()),
            ("listen", self.listen.clone()),
            ("uptime", uptime.to_string()),
            ("hits", HumanCount(cache.hits).to_string()),
            ("misses", HumanCount(cache.misses).to_string()),
            ("stale", HumanCount(cache.stale).to_string()),
            ("downloads", cache.fills.to_string()),
            ("served", DecimalBytes(cache.served_bytes).to_string()),
            ("fetched", DecimalBytes(cache.fetched_bytes).to_string()),
            ("saved", DecimalBytes(cache.saved_bytes).to_string()),
            ("storage", self.storage.root.clone()),
        ];
        if let (Some(size), Some(available)) =
            (self.storage.size_bytes, self.storage.available_bytes)
        {
            rows.push((
                "disk",
                format!("{} free of {}", DecimalBytes(available), DecimalBytes(size)),
            ));
        }
        rows.push(("cache", self.storage.cache()));
        for upstream in &self.upstreams {
            let mut text = format!("{} at {}", upstream.registry, upstream.urls.join(", "));
            match upstream.answered_seconds_ago {
                Some(seconds) => write!(text, ", answered {} ago", ago(seconds))?,
                None => text.push_str(", not asked yet"),
            }
            if let Some(remaining) = upstream.budget_remaining {
                let limit = upstream.budget_limit.map(|limit| format!(" of {limit}"));
                write!(
                    text,
                    ", {remaining}{} pulls left",
                    limit.unwrap_or_default()
                )?;
            }
            rows.push(("upstream", text));
            if let (Some(seconds), Some(failure)) = (upstream.failed_seconds_ago, &upstream.failure)
            {
                rows.push(("", format!("last failure {} ago: {failure}", ago(seconds))));
            }
        }
        for problem in &self.problems {
            rows.push(("problem", problem.clone()));
        }
        for (name, value) in rows {
            writeln!(f, "{name:<10} {value}")?;
        }
        Ok(())
    }
}
