//! Whether this agent can do its work: one watched value that the readiness page, the status line
//! and the load balancer's check all read, so that they can't disagree.
//!
//! Only what this host itself lacks makes it unready. An upstream that is down never does: what is
//! cached is served all the same.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

mod mirror;
mod own_port;

pub use mirror::{MirrorHealth, MirrorProbe, MirrorWatch};
pub use own_port::OwnPort;
pub(crate) use own_port::{head, is_alert};

use crate::config::{HealthSettings, HostSettings};
use crate::metrics::Metrics;
use crate::store::Store;

/// How the agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Whether it can serve what it has.
    pub ready: bool,
    /// What is wrong, or could become so, in sentences for people.
    pub problems: Vec<String>,
    /// What only another host would cure, in a sentence: its disk is broken.
    pub fatal: Option<String>,
}

/// The value, for those who look at it or wait for it to change.
pub type HealthWatch = watch::Receiver<Health>;

/// A probe that takes longer has failed: a disk that hangs is as bad as one that refuses.
const PROBE_DEADLINE: Duration = Duration::from_secs(10);

impl Health {
    /// Before the first probe.
    pub fn starting() -> Self {
        Self {
            ready: false,
            problems: vec!["starting".to_owned()],
            fatal: None,
        }
    }
}

/// What is wrong.
struct Problem {
    text: String,
    /// The disk itself is broken: no start of the agent would mend it.
    is_of_the_disk: bool,
}

/// What an agent needs for its work.
pub enum Need {
    /// Its storage: it serves.
    Storage(Store),
    /// The mirror elsewhere: it is a client.
    Mirror(Box<MirrorProbe>),
}

impl Need {
    async fn probe(&mut self, host: &HostSettings) -> Result<(), Problem> {
        match self {
            Self::Storage(store) => probe(store).await,
            Self::Mirror(mirror) => mirror.probe(host).await.map_err(|text| Problem {
                text,
                is_of_the_disk: false,
            }),
        }
    }
}

/// Probes what the agent needs for ever, and publishes what it finds. `settings` is asked anew each
/// time.
pub async fn watch(
    mut need: Need,
    settings: impl Fn() -> (HealthSettings, HostSettings),
    sender: watch::Sender<Health>,
    metrics: Arc<Metrics>,
) {
    let mut failures = 0;
    let mut succeeded = false;
    loop {
        let (
            HealthSettings {
                interval,
                threshold,
            },
            host,
        ) = settings();
        let problem = need.probe(&host).await.err();
        succeeded |= problem.is_none();
        let was_ready = sender.borrow().ready;
        let health = match problem {
            None => {
                failures = 0;
                Health {
                    ready: true,
                    problems: Vec::new(),
                    fatal: None,
                }
            }
            Some(problem) => {
                failures += 1;
                // A single failure does not undo what was proved; nothing was before the first.
                let Problem {
                    text,
                    is_of_the_disk,
                } = problem;
                Health {
                    ready: was_ready && failures < threshold,
                    fatal: (is_of_the_disk && failures >= threshold).then(|| text.clone()),
                    problems: vec![text],
                }
            }
        };
        metrics.ready.set(u64::from(health.ready));
        sender.send_if_modified(|current| {
            if *current == health {
                return false;
            }
            match (was_ready, health.ready) {
                (false, true) => tracing::info!("ready"),
                (true, false) => tracing::error!("not ready: {}", health.problems.join("; ")),
                (false, false) => {
                    tracing::warn!("still not ready: {}", health.problems.join("; "));
                }
                _ if !health.problems.is_empty() => {
                    tracing::warn!("still ready, with problems: {}", health.problems.join("; "));
                }
                _ => tracing::info!("recovered"),
            }
            *current = health;
            true
        });
        let eager = interval.min(mirror::EAGER);
        tokio::time::sleep(if succeeded { interval } else { eager }).await;
    }
}

async fn probe(store: &Store) -> Result<(), Problem> {
    match tokio::time::timeout(PROBE_DEADLINE, store.probe()).await {
        Ok(Ok(())) => Ok(()),
        // A mirror whose disk is full still serves what it has.
        Ok(Err(error)) if error.is_full() => {
            tracing::warn!(%error, "the disk is full: nothing more is cached: {error}");
            Ok(())
        }
        Ok(Err(error)) => Err(Problem {
            text: error.to_string(),
            is_of_the_disk: error.is_of_the_disk(),
        }),
        Err(_) => Err(Problem {
            text: format!(
                "{} did not take a small file within {}",
                store.root().display(),
                humantime::format_duration(PROBE_DEADLINE)
            ),
            is_of_the_disk: true,
        }),
    }
}
