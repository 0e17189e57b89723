//! The host itself, as apply needs it: systemd over D-Bus, docker by its socket, and the daemons'
//! own checks.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::apply::{System, SystemError};
use super::docker_api;
use super::facts::UnitFacts;
use super::observe::command_line;
use super::plan::{Check, UnitAction, Verb};
use super::program;
use super::read::below;
use crate::systemd::{JobVerb, Manager};

/// `dockerd --validate` reads one file, in a fraction of a second.
const CHECK: Duration = Duration::from_secs(30);

/// The host that this process is on.
#[derive(Debug, Clone)]
pub struct Host {
    manager: Manager,
    root: PathBuf,
}

impl Host {
    /// The host with this systemd, whose files are below this root (`/`).
    pub fn new(manager: Manager, root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        Self { manager, root }
    }
}

impl From<Verb> for JobVerb {
    fn from(verb: Verb) -> Self {
        match verb {
            Verb::Reload => Self::Reload,
            Verb::Restart => Self::Restart,
        }
    }
}

impl System for Host {
    async fn run(&self, action: &UnitAction, deadline: Duration) -> Result<(), SystemError> {
        let job = self.manager.run(&action.unit, action.verb.into(), deadline);
        job.await.map_err(error)
    }

    async fn reset_failed(&self, unit: &str) -> Result<(), SystemError> {
        self.manager.reset_failed(unit).await.map_err(error)
    }

    async fn docker_mirrors(&self, unit: &str) -> Result<Vec<String>, SystemError> {
        let facts = self.manager.unit(unit).await.map_err(error)?;
        let Some(command_line) = command_line(&self.root, facts.main_pid) else {
            return Err(SystemError(format!(
                "can't ask {unit} for its mirrors: it has no main process ({}, {}). Why is in \
                 `journalctl -u {unit}`",
                facts.active_state, facts.sub_state
            )));
        };
        let Some(socket) = docker_api::socket(&self.root, &facts.name, &command_line) else {
            return Err(SystemError(format!(
                "can't ask {unit} for its mirrors: it listens on TCP only. Give it a Unix socket \
                 as well (`-H unix:///run/docker.sock`)"
            )));
        };
        let daemon = docker_api::ask(&self.root, &socket).await.map_err(error)?;
        Ok(daemon.info.mirrors)
    }

    async fn unit(&self, unit: &str) -> Result<UnitFacts, SystemError> {
        self.manager.unit(unit).await.map_err(error)
    }

    async fn is_shutting_down(&self) -> bool {
        // A manager that does not answer says so to whoever asks it for a job.
        self.manager.is_shutting_down().await.unwrap_or_default()
    }

    async fn check(&self, check: &Check, staged: &Path) -> Result<(), SystemError> {
        let Check::DockerdValidate { command } = check;
        let Some((program, arguments)) = command.split_first() else {
            return Err(SystemError(format!(
                "can't check {}: the plan names no dockerd to check it with. Make the plan again",
                staged.display()
            )));
        };
        let own = [
            OsStr::new("--validate"),
            OsStr::new("--config-file"),
            staged.as_os_str(),
        ];
        let arguments = arguments.iter().map(OsStr::new).chain(own);
        let program = Path::new(program);
        let ended = program::run(&below(&self.root, program), arguments, CHECK).await;
        let said = match ended {
            Ok(ended) if ended.status.success() => return Ok(()),
            Ok(ended) => match (ended.stderr.as_str(), ended.stdout.as_str()) {
                ("", "") => ended.status.to_string(),
                ("", said) | (said, _) => said.to_owned(),
            },
            Err(e) => e.to_string(),
        };
        Err(SystemError(format!(
            "`{} --validate` refuses {}: {said}",
            command.join(" "),
            staged.display()
        )))
    }
}

fn error(error: impl std::fmt::Display) -> SystemError {
    SystemError(error.to_string())
}
