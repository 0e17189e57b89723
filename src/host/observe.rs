//! Reading a host's facts: units from systemd, arguments from the processes, the rest from the
//! daemons and their files. Nothing is changed, nothing is guessed from the distribution's name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use futures_util::future::{join_all, try_join_all};

use super::facts::{
    BuildkitFacts, ContainerdFacts, DockerFacts, Engines, Facts, FileFacts, PodmanFacts, UnitFacts,
};
use super::read::{self, below};
use super::{docker_api, plan};
use super::{program, read::LIMIT};
use crate::config::{HostSettings, Manage};
use crate::systemd::{Manager, ManagerError};

/// What was found, and what could not be and does not prevent a plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The facts.
    pub facts: Facts,
    /// Sentences for whoever runs this: a daemon that runs and does not answer, for one.
    pub notes: Vec<String>,
}

/// Reads everything that a plan is made from, below this root (`/`).
///
/// Without a manager there are no engines but those that need no daemon; whoever has none says why.
/// A manager that fails is an error: facts that lack a daemon which is there make a wrong plan.
///
/// The plan says which files matter to these settings. `previous` is what the journal says the
/// engines were wired to before.
pub async fn facts(
    manager: Option<&Manager>,
    root: &Path,
    settings: &HostSettings,
    previous: Vec<String>,
) -> Result<Observed, ManagerError> {
    let (docker, containerd, crio, buildkit) = tokio::try_join!(
        units(manager, &["docker.service", "docker-latest.service"]),
        units(manager, &["containerd.service"]),
        units(manager, &["crio.service"]),
        units(manager, &["buildkit.service", "buildkitd.service"]),
    )?;
    let podman = observe_podman(root, crio.into_iter().next());
    let (docker, containerd) = tokio::join!(
        join_all(docker.into_iter().map(|unit| observe_docker(root, unit))),
        observe_containerd(root, containerd.into_iter().next(), settings),
    );
    let (docker, notes): (Vec<_>, Vec<_>) = docker.into_iter().unzip();
    let engines = Engines {
        docker,
        containerd,
        podman,
        buildkit: running(buildkit).map(|unit| BuildkitFacts {
            command_line: command_line(root, unit.main_pid),
            unit,
        }),
    };
    let mut facts = Facts {
        engines,
        previous,
        ..Facts::default()
    };
    // A file may name others.
    loop {
        let further = plan::further_paths(&facts, settings);
        if further.is_empty() {
            break;
        }
        let read = further.into_iter().map(|path| {
            let file = read::file(root, &path);
            (path, file)
        });
        facts.files.extend(read);
    }
    facts.read_only = read_only(root, &facts.files);
    Ok(Observed {
        facts,
        notes: notes.into_iter().flatten().collect(),
    })
}

/// Which of these files this process can't replace: a service sees most of the host read-only.
fn read_only(root: &Path, files: &BTreeMap<PathBuf, FileFacts>) -> BTreeMap<PathBuf, PathBuf> {
    let targets = files.iter().map(|(path, file)| match file {
        FileFacts::Text {
            link_to: Some(target),
            ..
        } => target,
        _ => path,
    });
    let found = targets.filter_map(|path| {
        let folder = read::read_only_folder(root, path)?;
        Some((path.clone(), folder))
    });
    found.collect()
}

/// Those of these units that are there, also masked or broken, and each once: one may be another's
/// alias.
async fn units(manager: Option<&Manager>, names: &[&str]) -> Result<Vec<UnitFacts>, ManagerError> {
    let Some(manager) = manager else {
        return Ok(Vec::new());
    };
    let found = try_join_all(names.iter().map(|name| manager.unit(name))).await?;
    let mut units: Vec<UnitFacts> = Vec::new();
    for unit in found {
        if unit.load_state != "not-found" && units.iter().all(|known| known.name != unit.name) {
            units.push(unit);
        }
    }
    Ok(units)
}

/// The one that runs, or else the first.
fn running(mut units: Vec<UnitFacts>) -> Option<UnitFacts> {
    let index = units
        .iter()
        .position(|unit| unit.main_pid != 0)
        .unwrap_or(0);
    (index < units.len()).then(|| units.swap_remove(index))
}

async fn observe_docker(root: &Path, unit: UnitFacts) -> (DockerFacts, Option<String>) {
    let command_line = command_line(root, unit.main_pid);
    let mut note = None;
    let daemon = match command_line
        .as_deref()
        .map(|line| docker_api::socket(root, &unit.name, line))
    {
        None => None,
        Some(None) => {
            note = Some(format!(
                "{} listens on TCP only, so what it is configured as can't be asked: it takes a \
                 Unix socket (`-H unix:///run/docker.sock`) beside",
                unit.name
            ));
            None
        }
        Some(Some(socket)) => match docker_api::ask(root, &socket).await {
            Ok(daemon) => Some(daemon),
            Err(error) => {
                let name = &unit.name;
                note = Some(format!(
                    "{name} runs, but {error}; see `journalctl -u {name}`"
                ));
                None
            }
        },
    };
    let (version, info) = match daemon {
        Some(daemon) => (Some(daemon.version), Some(daemon.info)),
        None => (version_of(root, &unit).await, None),
    };
    let facts = DockerFacts {
        unit,
        version,
        command_line,
        info,
    };
    (facts, note)
}

/// Its version decides only in which form a configuration that is not there yet is written, and
/// asking takes longer than all the rest.
async fn observe_containerd(
    root: &Path,
    unit: Option<UnitFacts>,
    settings: &HostSettings,
) -> Option<ContainerdFacts> {
    let program = program::find(root, "containerd");
    if unit.is_none() && program.is_none() {
        return None;
    }
    let version = match (&unit, &program) {
        _ if settings.containerd != Manage::Always => None,
        (Some(unit), _) if !unit.exec_start.is_empty() => version_of(root, unit).await,
        (_, Some(program)) => program::version(root, program).await,
        (_, None) => None,
    };
    Some(ContainerdFacts {
        command_line: unit
            .as_ref()
            .and_then(|unit| command_line(root, unit.main_pid)),
        unit,
        version,
    })
}

/// Their version decides nothing, and asking takes longer than all the rest: `podman --version`
/// starts half of podman.
fn observe_podman(root: &Path, crio: Option<UnitFacts>) -> Option<PodmanFacts> {
    let programs = ["podman", "buildah", "skopeo"];
    let here = crio.is_some()
        || programs
            .iter()
            .any(|name| program::find(root, name).is_some());
    here.then_some(PodmanFacts {
        version: None,
        crio,
        configuration: podman_configuration(root),
    })
}

/// containers-registries.conf(5) and containers-registries.conf.d(5).
fn podman_configuration(root: &Path) -> Vec<PathBuf> {
    let main = PathBuf::from("/etc/containers/registries.conf");
    let folder = Path::new("/etc/containers/registries.conf.d");
    let entries = fs::read_dir(below(root, folder)).into_iter().flatten();
    let names = entries.filter_map(|entry| Some(folder.join(entry.ok()?.file_name())));
    let mut drop_ins: Vec<PathBuf> = names
        .filter(|path| path.extension().is_some_and(|it| it == "conf"))
        .collect();
    drop_ins.sort();
    let main = below(root, &main).exists().then_some(main);
    main.into_iter().chain(drop_ins).collect()
}

/// The version of the program that the unit starts.
async fn version_of(root: &Path, unit: &UnitFacts) -> Option<String> {
    let program = unit.exec_start.first()?.first()?;
    program::version(root, Path::new(program)).await
}

/// The arguments of a process; nothing where there is none (any more).
pub(super) fn command_line(root: &Path, pid: u32) -> Option<Vec<String>> {
    if pid == 0 {
        return None;
    }
    let path = PathBuf::from(format!("/proc/{pid}/cmdline"));
    let bytes = bounded(&below(root, &path)).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    // Each argument ends in a NUL (proc(5)); a process that ends has none.
    let words: Vec<String> = text
        .strip_suffix('\0')?
        .split('\0')
        .map(str::to_owned)
        .collect();
    Some(words)
}

fn bounded(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read;

    let mut bytes = Vec::new();
    fs::File::open(path)?.take(LIMIT).read_to_end(&mut bytes)?;
    Ok(bytes)
}
