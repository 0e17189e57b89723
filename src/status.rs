//! What `/status` answers and `registry-agent status` prints.

pub mod fleet;
pub mod wiring;

use std::fmt::{self, Write as _};
use std::time::{Duration, SystemTime};

use indicatif::{DecimalBytes, HumanCount};
use serde::{Deserialize, Serialize};
use url::Url;

use crate::agent::Shared;
use crate::config::Serving;
use crate::fleet::drive::View;
use crate::health::MirrorHealth;
use crate::host::watch::State;
use crate::metrics::Metrics;
use crate::mirror::Mirror;
use crate::upstream::Budget;
use fleet::FleetStatus;
use wiring::wiring;

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
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// The mirror that this host's engines are told.
    pub mirror: MirrorStatus,
    /// How the engines are wired, by what wires them; absent where nothing does.
    pub wiring: Option<State>,
    /// Its place in a fleet; absent where it takes part in none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fleet: Option<FleetStatus>,
    /// What it serves; nothing by a client.
    #[serde(flatten)]
    pub serving: Option<ServingStatus>,
}

/// The mirror that this host's engines are told, as this agent sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MirrorStatus {
    /// Its address, `host.mirror`.
    pub address: String,
    /// Whether it answered when it was last asked.
    pub serves: bool,
    /// Seconds since it began, or ceased, to.
    pub since_seconds: u64,
    /// How it last failed, where it did not answer.
    pub failure: Option<String>,
}

/// What an agent serves.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServingStatus {
    /// Where the registry listens.
    pub listen: String,
    /// What it did since it started.
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
    pub async fn now(shared: &Shared) -> Self {
        let settings = shared.settings();
        let health = shared.health.borrow().clone();
        let serving = match (&settings.serving, &shared.mirror) {
            (Some(serving), Some(mirror)) => {
                Some(ServingStatus::now(serving, mirror, &shared.metrics).await)
            }
            _ => None,
        };
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            role: settings.role().as_str().to_owned(),
            ready: health.ready,
            problems: health.problems,
            uptime_seconds: shared.started.elapsed().as_secs(),
            mirror: MirrorStatus::new(&shared.mirror_health.borrow()),
            wiring: wiring(),
            fleet: shared
                .fleet
                .as_ref()
                .map(|fleet| FleetStatus::new(&fleet.view(), &settings.fleet)),
            serving,
        }
    }
}

impl MirrorStatus {
    fn new(health: &MirrorHealth) -> Self {
        Self {
            address: health.address.as_str().trim_end_matches('/').to_owned(),
            serves: health.serves,
            since_seconds: health.since.elapsed().as_secs(),
            failure: health.failure.clone(),
        }
    }
}

impl ServingStatus {
    async fn now(serving: &Serving, mirror: &Mirror, metrics: &Metrics) -> Self {
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
            listen: serving.listen.to_string(),
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

/// The one line that systemd shows: `ready: mirror of docker.io, 1,204 hits 31 misses, 41 GB saved,
/// hub budget 87/100; docker wired`.
pub fn line(shared: &Shared) -> String {
    let settings = shared.settings();
    let health = shared.health.borrow().clone();
    let mut line = format!(
        "{}: {} of ",
        if health.ready { "ready" } else { "not ready" },
        settings.role().as_str(),
    );
    match &shared.mirror {
        Some(mirror) => line.push_str(&serving_line(mirror, &shared.metrics)),
        None => line.push_str(settings.host.mirror.as_str().trim_end_matches('/')),
    }
    let wiring = wiring().map(|state| state.summary);
    let fleet = shared.fleet.as_ref().map(|fleet| fleet_line(&fleet.view()));
    for more in wiring.iter().chain(&fleet).chain(&health.problems) {
        line.push_str("; ");
        // systemd takes a line.
        line.extend(more.chars().map(|c| if c.is_control() { ' ' } else { c }));
    }
    line
}

fn fleet_line(view: &View) -> String {
    let group = view.facts.as_ref().and_then(|facts| facts.group.as_ref());
    let healthy = group.map(|group| format!(", {} healthy", group.is.healthy()));
    let state = view.state.as_str();
    format!("fleet: {state}{}", healthy.unwrap_or_default())
}

fn serving_line(mirror: &Mirror, metrics: &Metrics) -> String {
    let upstreams = mirror.upstreams();
    let names: Vec<&str> = upstreams
        .iter()
        .map(|upstream| upstream.registry().as_str())
        .collect();
    let cache = CacheStatus::now(metrics);
    let mut line = format!(
        "{}, {} hits {} misses, {} saved",
        names.join(", "),
        HumanCount(cache.hits),
        HumanCount(cache.misses),
        round(cache.saved_bytes),
    );
    for upstream in &upstreams {
        if let Some(Budget { remaining, limit }) = upstream.last_contact().budget {
            let limit = limit.map(|limit| format!("/{limit}")).unwrap_or_default();
            let registry = upstream.registry();
            let registry = if registry.is_docker_hub() {
                "hub"
            } else {
                registry.as_str()
            };
            // Writing to a String can't fail.
            let _ = write!(line, ", {registry} budget {remaining}{limit}");
        }
    }
    line
}

/// Bytes as people say them: `41 GB`, `4.1 GB`.
fn round(bytes: u64) -> String {
    let (mut unit, mut tenths) = ("B", u128::from(bytes) * 10);
    for larger in ["kB", "MB", "GB", "TB", "PB"] {
        if tenths < 10_000 {
            break;
        }
        (unit, tenths) = (larger, tenths / 1000);
    }
    if tenths >= 100 || tenths % 10 == 0 {
        format!("{} {unit}", tenths / 10)
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    }
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
        let mut rows = vec![
            ("version", self.version.clone()),
            ("role", self.role.clone()),
            ("ready", ready.to_owned()),
            ("uptime", uptime.to_string()),
        ];
        if let Some(serving) = &self.serving {
            serving.rows(&mut rows, &ago)?;
        }
        let MirrorStatus {
            address,
            serves,
            since_seconds,
            failure,
        } = &self.mirror;
        let has = if *serves { "has" } else { "has not" };
        let since = ago(*since_seconds);
        rows.push((
            "engines",
            format!("told {address}, which {has} served for {since}"),
        ));
        if let Some(failure) = failure {
            rows.push(("", failure.clone()));
        }
        rows.extend(self.wiring.iter().flat_map(wiring::rows));
        rows.extend(self.fleet.iter().flat_map(FleetStatus::rows));
        for problem in &self.problems {
            rows.push(("problem", problem.clone()));
        }
        for (name, value) in rows {
            writeln!(f, "{name:<10} {value}")?;
        }
        Ok(())
    }
}

/// A name, and what there is to say; a further line of the same has none.
type Row = (&'static str, String);

impl ServingStatus {
    /// What people read of it.
    fn rows(&self, rows: &mut Vec<Row>, ago: &dyn Fn(u64) -> String) -> fmt::Result {
        let cache = &self.cache;
        rows.extend([
            ("listen", self.listen.clone()),
            ("hits", HumanCount(cache.hits).to_string()),
            ("misses", HumanCount(cache.misses).to_string()),
            ("stale", HumanCount(cache.stale).to_string()),
            ("downloads", cache.fills.to_string()),
            ("served", DecimalBytes(cache.served_bytes).to_string()),
            ("fetched", DecimalBytes(cache.fetched_bytes).to_string()),
            ("saved", DecimalBytes(cache.saved_bytes).to_string()),
            ("storage", self.storage.root.clone()),
        ]);
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
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_the_engines_are_wired_is_told_to_people_and_machines() {
        let told = serde_json::json!({
            "version": "1.2.3", "role": "client", "ready": true, "problems": [],
            "uptime_seconds": 61,
            "mirror": {
                "address": "http://mirror", "serves": true, "since_seconds": 60, "failure": null,
            },
            "wiring": {
                "summary": "docker wired", "line": "engines wired to http://mirror",
                "mirror": "http://mirror", "engines": ["docker.service has http://mirror/"],
                "last_apply": {"at": 1_763_000_000, "failure": null}, "drift": null,
                "refusals": ["containerd.service: a restart. Allow it"],
                "notes": ["docker-latest.service is masked"],
                "keep_mirror": [], "blocked": null, "configuration": null,
                "next_step": "`registry-agent plan`",
            },
        });
        let status: Status = serde_json::from_value(told.clone()).unwrap();
        assert_eq!(serde_json::to_value(&status).unwrap(), told);
        let text = status.to_string();
        let lines: Vec<&str> = text
            .lines()
            .skip_while(|it| !it.starts_with("wiring"))
            .collect();
        let changed = lines[2];
        assert!(
            changed.starts_with("changed ") && changed.ends_with(" ago, proved"),
            "{text}"
        );
        let rest = [&lines[..2], &lines[3..]].concat();
        assert_eq!(
            rest,
            [
                "wiring     docker wired",
                "           docker.service has http://mirror/",
                "refused    containerd.service: a restart. Allow it",
                "note       docker-latest.service is masked",
                "next step  `registry-agent plan`",
            ]
        );
    }

    #[test]
    fn bytes_are_said_as_people_say_them() {
        for (bytes, said) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1 kB"),
            (4_149_000_000, "4.1 GB"),
            (41_900_000_000, "41 GB"),
            (999_999_999, "999 MB"),
            (u64::MAX, "18446 PB"),
        ] {
            assert_eq!(round(bytes), said);
        }
    }
}
