//! This host, as it is: its service manager, its daemons, its files and its agent, for the verbs and
//! the loop that plan and change it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use serde::Deserialize;

use super::agent_unit::{self, EnvironmentError};
use super::facts::Facts;
use super::install;
use super::journal::{Journal, Originals};
use super::plan::{self, Plan, Wanted};
use super::system::Host as ThisSystem;
use super::watch::{self, Probe, Terms, Word};
use super::{observe, read};
use crate::admin::client;
use crate::config::{self, AdminAddress, Settings, Sources};
use crate::systemd::{Manager, notify};

/// The root of this host's files.
pub const ROOT: &str = "/";

/// What can't be done without.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// The configuration is wrong.
    #[error("{0}")]
    Configuration(#[from] config::Errors),
    /// The service manager can't be reached.
    #[error("{0}")]
    Manager(#[from] crate::systemd::ManagerError),
    /// What the agent's unit says can't be followed.
    #[error("{0}")]
    Unit(#[from] EnvironmentError),
}

/// This host.
pub struct ThisHost {
    manager: Manager,
    system: ThisSystem,
    sources: Sources,
    settings: RwLock<Arc<Settings>>,
}

/// The part of the agent's `/status` that is asked for.
#[derive(Deserialize)]
struct AgentStatus {
    mirror: AgentMirror,
}

#[derive(Deserialize)]
struct AgentMirror {
    address: String,
    serves: bool,
    failure: Option<String>,
}

impl ThisHost {
    /// Connects to the system bus, and reads the configuration of the agent that its unit starts,
    /// unless another one is named.
    pub async fn connect(sources: Sources) -> Result<Self, LiveError> {
        let manager = Manager::system().await?;
        let unit = manager.unit(install::AGENT).await?;
        let sources = agent_unit::sources(Path::new(ROOT), &unit, sources)?;
        let loaded = config::load(&sources)?;
        for warning in &loaded.warnings {
            tracing::warn!("{warning}");
        }
        Ok(Self {
            system: ThisSystem::new(manager.clone(), ROOT),
            manager,
            sources,
            settings: RwLock::new(Arc::new(loaded.settings)),
        })
    }

    /// The same for taking the engines back, which needs no more than the journal: where the
    /// configuration can't be read, the defaults are in force, and why comes with it.
    pub async fn connect_anyway(sources: Sources) -> Result<(Self, Option<LiveError>), LiveError> {
        let why = match Self::connect(sources.clone()).await {
            Ok(host) => return Ok((host, None)),
            Err(error @ LiveError::Manager(_)) => return Err(error),
            Err(error) => error,
        };
        let manager = Manager::system().await?;
        let host = Self {
            system: ThisSystem::new(manager.clone(), ROOT),
            manager,
            sources,
            settings: RwLock::new(Arc::new(config::defaults()?)),
        };
        Ok((host, Some(why)))
    }

    /// The service manager.
    pub fn manager(&self) -> &Manager {
        &self.manager
    }

    /// The configuration that is in force.
    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Where this host's agent is asked.
    fn admin(&self) -> AdminAddress {
        client::address(self.settings().admin.clone(), &self.sources)
    }

    async fn ask_agent(&self) -> Result<(), String> {
        let admin = self.admin();
        let answer = client::status(&admin).await;
        let answer = answer.map_err(|error| format!("the agent at {admin} was asked: {error}"))?;
        let status: AgentStatus = serde_json::from_slice(&answer)
            .map_err(|error| format!("the agent at {admin} answered something else: {error}"))?;
        let AgentMirror {
            address,
            serves,
            failure,
        } = status.mirror;
        let wanted = address_of(&self.settings());
        if address.trim_end_matches('/') != wanted {
            return Err(format!(
                "the agent looks at {address} and not at {wanted}: it has another configuration, \
                 or has not read it again (`systemctl reload registry-agent`)"
            ));
        }
        if serves {
            return Ok(());
        }
        Err(failure.unwrap_or_else(|| "the agent has not asked it yet".to_owned()))
    }
}

/// What the engines are told, without the slash that a URL has at its end.
fn address_of(settings: &Settings) -> String {
    let mirror = settings.host.mirror.as_str();
    mirror.trim_end_matches('/').to_owned()
}

/// Reads this host's facts. The addresses that the journal has are those that were wired before.
pub async fn facts(
    manager: Option<&Manager>,
    settings: &Settings,
) -> Result<observe::Observed, String> {
    let root = Path::new(ROOT);
    let journal = Journal::at(Journal::default_folder(root));
    let (originals, note) = match journal.originals() {
        Ok(originals) => (originals, None),
        Err(error) if nix::unistd::geteuid().is_root() => return Err(error.to_string()),
        Err(_) => {
            let note = "what this host was wired to before is for root to read: a plan made as \
                        root may change more";
            (Originals::default(), Some(note.to_owned()))
        }
    };
    let previous = originals.mirrors.iter().cloned().collect();
    let observed = observe::facts(manager, root, &settings.host, previous).await;
    let mut observed = observed.map_err(|error| error.to_string())?;
    // What was made for an engine that is not managed any more is looked at as well.
    observed.facts.originals = originals;
    for path in plan::further_paths(&observed.facts, &settings.host) {
        let file = read::file(root, &path);
        observed.facts.files.insert(path, file);
    }
    observed.notes.extend(note);
    Ok(observed)
}

impl watch::Host for ThisHost {
    type System = ThisSystem;

    fn system(&self) -> &ThisSystem {
        &self.system
    }

    fn terms(&self) -> Terms {
        let settings = self.settings();
        Terms {
            mirror: address_of(&settings),
            withdraw_after: settings.host.withdraw_after,
            drift: settings.host.drift,
        }
    }

    fn reload(&self) -> Result<(), String> {
        let loaded = config::load(&self.sources).map_err(|errors| errors.to_string())?;
        for warning in &loaded.warnings {
            tracing::warn!("{warning}");
        }
        let mut settings = self
            .settings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *settings = Arc::new(loaded.settings);
        Ok(())
    }

    async fn look(&self, wanted: Wanted) -> Result<(Plan, Vec<PathBuf>), String> {
        let settings = self.settings();
        let observed = facts(Some(&self.manager), &settings).await?;
        let plan = planned(&observed, &settings, wanted)?;
        Ok((plan, observed.facts.files.into_keys().collect()))
    }

    async fn serves(&self) -> Probe {
        match self.ask_agent().await {
            Ok(()) => Probe::Serves,
            Err(why) => Probe::Fails(why),
        }
    }

    fn tell(&self, word: Word) {
        match word {
            Word::Ready => notify::ready(),
            Word::Status(line) => notify::status(&line),
            Word::Stopping(within) => {
                notify::stopping_within("the engines are told to do without the mirror", within);
            }
        }
    }
}

/// The folders outside of `/etc` in which files of this host's engines are changed, or were: what the
/// service has to be let write to. Folders that are there, and none that the whole system is in.
pub async fn folders_to_write(
    manager: &Manager,
    settings: &Settings,
) -> Result<BTreeSet<PathBuf>, String> {
    let root = Path::new(ROOT);
    let observed = facts(Some(manager), settings).await?;
    let plan = planned(&observed, settings, Wanted::Wired)?;
    let journal = Journal::at(Journal::default_folder(root));
    let changed = journal.originals().map_err(|error| error.to_string())?;
    let files = plan.files.into_iter().map(|change| change.path);
    let files = files.chain(changed.files.into_keys());
    let folders = files.filter_map(|file| {
        let folder = read::real_folder(root, &file)?;
        let there = read::existing(root, &folder)?;
        // `/opt/docker`, and not `/opt`.
        let own = there.components().count() > 2 && !there.starts_with("/etc");
        own.then(|| there.to_owned())
    });
    Ok(folders.collect())
}

/// The plan for what was observed, with what could not be.
pub fn planned(
    observed: &observe::Observed,
    settings: &Settings,
    wanted: Wanted,
) -> Result<Plan, String> {
    let facts: &Facts = &observed.facts;
    let mut plan = plan::plan(facts, &settings.host, wanted).map_err(|error| error.to_string())?;
    plan.notes.extend(observed.notes.iter().cloned());
    Ok(plan)
}
