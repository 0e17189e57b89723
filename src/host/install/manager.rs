//! The real service manager, as installing needs it.

use std::path::Path;
use std::time::Duration;

use super::Units;
use crate::host::facts::UnitFacts;
use crate::host::program;
use crate::systemd::{JobVerb, Manager};

/// How long a unit of ours may take to start or to stop: a stop may drain answers, and put the
/// engines' files back.
const JOB: Duration = Duration::from_mins(3);
/// systemd-sysusers(8) writes a few lines.
const SYSUSERS: Duration = Duration::from_secs(30);

impl Units for Manager {
    async fn unit(&self, name: &str) -> Result<UnitFacts, String> {
        Self::unit(self, name).await.map_err(text)
    }

    async fn daemon_reload(&self) -> Result<(), String> {
        Self::daemon_reload(self).await.map_err(text)
    }

    async fn enable(&self, units: &[&str]) -> Result<bool, String> {
        Self::enable(self, units).await.map_err(text)
    }

    async fn disable(&self, units: &[&str]) -> Result<bool, String> {
        Self::disable(self, units).await.map_err(text)
    }

    async fn start(&self, unit: &str) -> Result<(), String> {
        self.run(unit, JobVerb::Start, JOB).await.map_err(text)
    }

    async fn stop(&self, unit: &str) -> Result<(), String> {
        self.run(unit, JobVerb::Stop, JOB).await.map_err(text)
    }

    async fn enqueue_restart(&self, unit: &str) -> Result<(), String> {
        self.enqueue(unit, JobVerb::Restart).await.map_err(text)
    }

    async fn create_users(&self) -> Result<(), String> {
        let root = Path::new("/");
        let Some(program) = program::find(root, "systemd-sysusers") else {
            return Err(
                "systemd-sysusers is not installed: create the system user registry-agent by hand"
                    .to_owned(),
            );
        };
        let ended = program::run(&program, [] as [&str; 0], SYSUSERS).await;
        let ended = ended.map_err(|error| format!("{}: {error}", program.display()))?;
        if ended.status.success() {
            return Ok(());
        }
        Err(format!("{}: {}", program.display(), ended.stderr))
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
