//! What is remembered of an upstream's answers: when it last gave one, and how many pulls it allows.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use http::header::RETRY_AFTER;
use http::{HeaderMap, StatusCode};

use super::UpstreamError;
use crate::metrics::{Metrics, RegistryLabels, UpstreamLabels};
use crate::oci::RegistryHost;

/// How long an upstream that was late is not waited for.
const SUSPECT_FOR: Duration = Duration::from_secs(5);
/// The longest that an upstream can shut itself out: a wrong header must not do it for good.
const LONGEST_PAUSE: Duration = Duration::from_hours(1);
/// The most that a freshness window is stretched.
const STRETCH: f64 = 60.0;

/// The pulls that an upstream allows. Source: Docker Hub's `ratelimit-remaining: 20;w=21600`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Pulls that are left.
    pub remaining: u64,
    /// Pulls that there are in all, where it says so.
    pub limit: Option<u64>,
}

/// What is known of an upstream from its last answers.
#[derive(Debug, Clone, Default)]
pub struct LastContact {
    /// When it last answered at all.
    pub answered: Option<SystemTime>,
    /// When it last did not, and why.
    pub failed: Option<(SystemTime, String)>,
    /// The pulls it allows.
    pub budget: Option<Budget>,
}

#[derive(Default)]
struct State {
    contact: LastContact,
    /// Whether the last request got no answer.
    failing: bool,
    suspect_until: Option<Instant>,
    /// Whether the last that it said of its pulls is that none is left.
    exhausted: bool,
    /// Until when it does not want to be asked.
    pause_until: Option<Instant>,
}

impl State {
    fn is_pausing(&self) -> bool {
        self.pause_until.is_some_and(|until| Instant::now() < until)
    }
}

/// The memory of one upstream, whichever of its endpoints answers.
pub(super) struct Record {
    registry: String,
    state: Mutex<State>,
    metrics: Option<Arc<Metrics>>,
}

impl Record {
    pub(super) fn new(registry: &RegistryHost, metrics: Option<Arc<Metrics>>) -> Self {
        Self {
            registry: registry.to_string(),
            state: Mutex::default(),
            metrics,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn last_contact(&self) -> LastContact {
        self.state().contact.clone()
    }

    /// Notes an answer; `pulls` is whether it can speak of our pulls, as one for a manifest does: a
    /// limit on tokens, blobs, or what is asked as nobody, is another.
    pub(super) fn answered(&self, status: StatusCode, headers: &HeaderMap, pulls: bool) {
        self.count(status.as_str());
        let mut state = self.state();
        if std::mem::take(&mut state.failing) && self.metrics.is_some() {
            tracing::info!(registry = self.registry, "an upstream answers again");
        }
        state.contact.answered = Some(SystemTime::now());
        state.suspect_until = None;
        if !pulls {
            return;
        }
        if let Some(budget) = budget(headers) {
            state.contact.budget = Some(budget);
            state.exhausted = budget.remaining == 0;
            if let Some(metrics) = &self.metrics {
                let registry = self.registry.clone();
                let labels = RegistryLabels { registry };
                let gauge = metrics.rate_limit_remaining.get_or_create(&labels);
                gauge.set(i64::try_from(budget.remaining).unwrap_or(i64::MAX));
            }
        } else if status.is_success() && !state.is_pausing() {
            state.exhausted = false;
        }
        if status == StatusCode::TOO_MANY_REQUESTS {
            state.exhausted = true;
            state.pause_until = retry_after(headers, LONGEST_PAUSE);
        } else if !state.exhausted {
            state.pause_until = None;
        }
    }

    /// Notes that no answer came.
    pub(super) fn failed(&self, error: &UpstreamError) {
        self.count("error");
        let mut state = self.state();
        // Said once, not for each of the thousands of requests that an outage lasts.
        if !std::mem::replace(&mut state.failing, true) && self.metrics.is_some() {
            tracing::warn!(registry = self.registry, %error, "an upstream does not answer: {error}");
        }
        state.contact.failed = Some((SystemTime::now(), error.to_string()));
    }

    fn count(&self, outcome: &str) {
        let Some(metrics) = &self.metrics else { return };
        let labels = UpstreamLabels {
            registry: self.registry.clone(),
            outcome: outcome.to_owned(),
        };
        metrics.upstream_requests.get_or_create(&labels).inc();
    }

    pub(super) fn suspect(&self) {
        self.state().suspect_until = Some(Instant::now() + SUSPECT_FOR);
    }

    pub(super) fn is_suspect(&self) -> bool {
        self.state()
            .suspect_until
            .is_some_and(|until| Instant::now() < until)
    }

    /// Whether the last that it said of its pulls is that none is left.
    pub(super) fn is_exhausted(&self) -> bool {
        self.state().exhausted
    }

    /// Whether it has said when to come back (`Retry-After`), and that is not yet.
    pub(super) fn is_pausing(&self) -> bool {
        self.state().is_pausing()
    }

    /// A freshness window, longer the fewer pulls are left: a tag that is not asked about does not
    /// change, and costs no pull.
    pub(super) fn stretched(&self, window: Duration) -> Duration {
        match self.state().contact.budget {
            Some(Budget {
                remaining,
                limit: Some(limit),
            }) => stretch(window, remaining, limit),
            _ => window,
        }
    }
}

/// With half of the pulls left, the window as it is; below, as many times longer as that half is
/// larger than what is left, [`STRETCH`] times at the most.
fn stretch(window: Duration, remaining: u64, limit: u64) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "a factor, not a count")]
    let factor = (limit as f64 / 2.0) / (remaining as f64).max(f64::MIN_POSITIVE);
    window.mul_f64(factor.clamp(1.0, STRETCH))
}

/// When an upstream that limits us may be asked again, where it says so; at `longest` from now.
pub(super) fn retry_after(headers: &HeaderMap, longest: Duration) -> Option<Instant> {
    let said = headers.get(RETRY_AFTER)?.to_str().ok()?;
    let seconds = said.trim().parse().ok()?;
    Some(Instant::now() + Duration::from_secs(seconds).min(longest))
}

fn budget(headers: &HeaderMap) -> Option<Budget> {
    let number = |name: &str| -> Option<u64> {
        let value = headers.get(name)?.to_str().ok()?;
        value.split(';').next()?.trim().parse().ok()
    };
    Some(Budget {
        remaining: number("ratelimit-remaining")?,
        limit: number("ratelimit-limit"),
    })
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    #[test]
    fn the_window_stretches_as_pulls_run_out() {
        let minute = Duration::from_mins(1);
        for (remaining, limit, minutes) in [
            (100, 100, 1),
            (50, 100, 1),
            (25, 100, 2),
            (10, 100, 5),
            (1, 100, 50),
            (0, 100, 60),
            (0, 0, 1),
        ] {
            let stretched = stretch(minute, remaining, limit);
            assert_eq!(stretched.as_secs(), minutes * 60, "{remaining} of {limit}");
        }
    }

    #[test]
    fn no_pull_left_is_known_until_the_upstream_says_otherwise() {
        let record = Record::new(&RegistryHost::docker_hub(), None);
        let header = |name: &'static str, value| {
            let value = HeaderValue::from_static(value);
            HeaderMap::from_iter([(HeaderName::from_static(name), value)])
        };
        let left = |left| header("ratelimit-remaining", left);
        for (status, headers, pulls, exhausted) in [
            (200, left("1;w=21600"), true, false),
            (200, left("0;w=21600"), true, true),
            (200, HeaderMap::new(), false, true),
            (200, left("9;w=21600"), false, true),
            (200, left("3;w=21600"), true, false),
            (429, HeaderMap::new(), false, false),
            (429, HeaderMap::new(), true, true),
            (500, HeaderMap::new(), true, true),
            (200, HeaderMap::new(), true, false),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            record.answered(status, &headers, pulls);
            assert_eq!(record.is_exhausted(), exhausted, "{status} {headers:?}");
            assert!(!record.is_pausing());
        }
        let too_many = StatusCode::TOO_MANY_REQUESTS;
        record.answered(too_many, &header("retry-after", "30"), true);
        assert!(record.is_exhausted() && record.is_pausing());
    }

    #[test]
    fn an_answer_ends_the_suspicion() {
        let record = Record::new(&RegistryHost::docker_hub(), None);
        record.suspect();
        assert!(record.is_suspect());
        record.answered(StatusCode::NOT_FOUND, &HeaderMap::new(), true);
        assert!(!record.is_suspect());
    }
}
