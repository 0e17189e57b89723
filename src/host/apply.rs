//! What a change of this host needs besides its files.

use std::path::Path;
use std::time::Duration;

use super::facts::UnitFacts;
use super::plan::{Check, UnitAction};

/// What apply needs of the host besides its files.
pub trait System: Sync {
    /// Runs the job to its end, or fails by the deadline. Only systemd's `done` is success.
    fn run(
        &self,
        action: &UnitAction,
        deadline: Duration,
    ) -> impl Future<Output = Result<(), SystemError>> + Send;
    /// Forgets that the unit has failed, so that it may be started again.
    fn reset_failed(&self, unit: &str) -> impl Future<Output = Result<(), SystemError>> + Send;
    /// `RegistryConfig.Mirrors` of the daemon of this unit.
    fn docker_mirrors(
        &self,
        unit: &str,
    ) -> impl Future<Output = Result<Vec<String>, SystemError>> + Send;
    /// The unit as it is now.
    fn unit(&self, unit: &str) -> impl Future<Output = Result<UnitFacts, SystemError>> + Send;
    /// Runs a daemon's own check over staged content; Err(text of the refusal).
    fn check(
        &self,
        check: &Check,
        staged: &Path,
    ) -> impl Future<Output = Result<(), SystemError>> + Send;
}

/// Says what was being done, to what, what came back.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SystemError(pub String);
