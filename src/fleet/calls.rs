//! Every call to others: bounded, counted, and what fails said once.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::aws::AwsError;
use super::dns::DnsError;
use crate::metrics::{FleetCallLabels, Metrics};

/// For a look or a step with all its pages.
const DEADLINE: Duration = Duration::from_secs(30);

/// How a call failed.
pub(super) trait Failure: fmt::Display {
    /// Whether fewer requests are asked for.
    fn is_throttled(&self) -> bool;
}

impl Failure for AwsError {
    fn is_throttled(&self) -> bool {
        self.is_throttled()
    }
}

impl Failure for DnsError {
    fn is_throttled(&self) -> bool {
        self.is_throttled()
    }
}

/// What was called, and what fails now.
pub(super) struct Calls {
    metrics: Arc<Metrics>,
    failing: BTreeMap<&'static str, String>,
}

impl Calls {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            failing: BTreeMap::new(),
        }
    }

    /// What fails now, by what was called.
    pub fn failing(&self) -> &BTreeMap<&'static str, String> {
        &self.failing
    }

    /// Makes a call; nothing where it fails.
    pub async fn make<T, E: Failure>(
        &mut self,
        operation: &'static str,
        call: impl Future<Output = Result<T, E>>,
    ) -> Option<T> {
        let (result, answer) = match tokio::time::timeout(DEADLINE, call).await {
            Ok(Ok(answer)) => ("ok", Ok(answer)),
            Ok(Err(error)) if error.is_throttled() => ("throttled", Err(error.to_string())),
            Ok(Err(error)) => ("error", Err(error.to_string())),
            Err(_) => (
                "timeout",
                Err(format!(
                    "no answer within {}",
                    humantime::format_duration(DEADLINE)
                )),
            ),
        };
        let labels = FleetCallLabels { operation, result };
        self.metrics.fleet_calls.get_or_create(&labels).inc();
        match answer {
            Ok(answer) => {
                if self.failing.remove(operation).is_some() {
                    tracing::info!(operation, "{operation} is answered again");
                }
                Some(answer)
            }
            Err(error) => {
                if !self.failing.contains_key(operation) {
                    tracing::warn!(operation, %error, "{operation}: {error}");
                }
                self.failing.insert(operation, error);
                None
            }
        }
    }
}
