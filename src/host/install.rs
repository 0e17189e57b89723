//! The agent's own units: written where they differ, enabled, started; and taken away again.

mod manager;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::facts::UnitFacts;
use crate::config::{AdminAddress, Settings};

/// Serves.
pub const AGENT: &str = "registry-agent.service";
/// Holds its ports.
pub const SOCKET: &str = "registry-agent.socket";
/// Wires the engines.
pub const HOST: &str = "registry-agent-host.service";

/// The folder that the service manager gives the agent, as the units name it.
pub const RUNTIME_DIRECTORY: &str = "/run/registry-agent";
/// The folder for its state, as the units name it.
pub const STATE_DIRECTORY: &str = "/var/lib/registry-agent";

/// Where packages install the binary, as the units have it.
const PACKAGED: &str = "/usr/bin/registry-agent";
/// What systemd reads, relative to the root: the administrator's folder, and the package's.
pub const UNITS: [&str; 2] = ["etc/systemd/system", "usr/lib/systemd/system"];
/// What systemd-sysusers reads, likewise.
const SYSUSERS: [&str; 2] = ["etc/sysusers.d", "usr/lib/sysusers.d"];
const SYSUSERS_FILE: &str = "registry-agent.conf";
const SOCKET_DROP_IN: &str = "etc/systemd/system/registry-agent.socket.d/10-listen.conf";
const HOST_DROP_IN: &str = "etc/systemd/system/registry-agent-host.service.d/10-write.conf";

/// What is read of a unit file or drop-in, in bytes: none of ours is larger.
const LIMIT: u64 = 1024 * 1024;

const AGENT_UNIT: &str = include_str!("../../units/registry-agent.service");
const SOCKET_UNIT: &str = include_str!("../../units/registry-agent.socket");
const HOST_UNIT: &str = include_str!("../../units/registry-agent-host.service");
const USERS: &str = include_str!("../../units/registry-agent.sysusers.conf");

/// What is needed of the service manager.
pub trait Units: Sync {
    /// What it has loaded under this name.
    fn unit(&self, name: &str) -> impl Future<Output = Result<UnitFacts, String>> + Send;
    /// Has it read all unit files again.
    fn daemon_reload(&self) -> impl Future<Output = Result<(), String>> + Send;
    /// Creates the links of `[Install]`, and says whether one was missing. What is loaded knows of
    /// none of them before [`Units::daemon_reload`].
    fn enable(&self, units: &[&str]) -> impl Future<Output = Result<bool, String>> + Send;
    /// Removes them, and says whether there was one, likewise.
    fn disable(&self, units: &[&str]) -> impl Future<Output = Result<bool, String>> + Send;
    /// Starts a unit, and waits until it has.
    fn start(&self, unit: &str) -> impl Future<Output = Result<(), String>> + Send;
    /// Stops a unit, and waits until it has; no error where it did not run.
    fn stop(&self, unit: &str) -> impl Future<Output = Result<(), String>> + Send;
    /// Asks for a restart and waits for nothing: it may be our own.
    fn enqueue_restart(&self, unit: &str) -> impl Future<Output = Result<(), String>> + Send;
    /// Creates the users of the files in sysusers.d: systemd-sysusers(8).
    fn create_users(&self) -> impl Future<Output = Result<(), String>> + Send;
}

/// What was being done, and what came back.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The units can't start this binary.
    #[error(
        "{} can't be started by systemd: {why}. Copy it to /usr/local/bin/registry-agent (as root, \
         mode 755), and run `/usr/local/bin/registry-agent install`",
        .binary.display()
    )]
    Binary {
        /// The binary.
        binary: PathBuf,
        /// What is in the way.
        why: &'static str,
    },
    /// A file can't be written or removed.
    #[error("can't {what} {}: {source}", .file.display())]
    File {
        /// `write`, `read` or `remove`.
        what: &'static str,
        /// The file.
        file: PathBuf,
        /// What came back.
        source: io::Error,
    },
    /// The service manager refuses.
    #[error(
        "can't {what}: {problem}; `systemctl status registry-agent.service \
             registry-agent.socket registry-agent-host.service` says more"
    )]
    Units {
        /// What was asked for.
        what: String,
        /// What came back.
        problem: String,
    },
    /// Somebody has said that a unit is not to run.
    #[error(
        "{unit} is masked: somebody has said that it is not to run, so nothing was changed. If it is \
         to run after all: `systemctl unmask {unit}`, and `registry-agent install` again"
    )]
    Masked {
        /// The unit.
        unit: &'static str,
    },
    /// What the agent is configured with can't be known.
    #[error("the units are written, and not started: {0}")]
    Configuration(String),
    /// The engines are still wired.
    #[error("not all engines could be unwired, so no unit was removed: {0}")]
    Unwire(String),
}

/// What was done, in sentences for people; nothing where all was as it should be.
pub type Done = Vec<String>;

/// What the units have to be, beyond what they are in every host.
#[derive(Debug, Clone)]
pub struct Told {
    /// The agent's configuration.
    pub settings: Arc<Settings>,
    /// The folders outside of `/etc` that the engines' files are in, to which the host's part is let
    /// write; where they are not known, it may do what it might before.
    pub folders: Option<BTreeSet<PathBuf>>,
}

/// Writes, enables and starts the units of the binary at `binary` (an absolute path without links),
/// as far as that is not done yet. `root` is `/`, or a folder that stands for it.
///
/// `told` is asked when the agent's unit is loaded, since a drop-in that was there before it may name
/// another configuration.
pub async fn install(
    root: &Path,
    binary: &Path,
    told: impl Future<Output = Result<Told, String>>,
    units: &impl Units,
) -> Result<Done, InstallError> {
    check_binary(root, binary)?;
    for name in [SOCKET, AGENT, HOST] {
        let unit = did(units.unit(name).await, format!("look at {name}"))?;
        // The link to /dev/null would be written over.
        if unit.load_state == "masked" || is_masked(&root.join(UNITS[0]).join(name)) {
            return Err(InstallError::Masked { unit: name });
        }
    }
    let mut done = Done::new();
    let users = write_all(
        root,
        &SYSUSERS,
        [(SYSUSERS_FILE, USERS.to_owned())],
        &mut done,
    )?;
    if users {
        did(units.create_users().await, "create the user registry-agent")?;
    }
    let texts = [
        (AGENT, AGENT_UNIT),
        (SOCKET, SOCKET_UNIT),
        (HOST, HOST_UNIT),
    ];
    let texts = texts.map(|(name, text)| (name, for_binary(text, binary)));
    let changed = write_all(root, &UNITS, texts, &mut done)?;
    let mut loaded = BTreeMap::new();
    for name in [SOCKET, AGENT, HOST] {
        let unit = did(units.unit(name).await, format!("look at {name}"))?;
        loaded.insert(name, unit);
    }
    if changed || loaded.values().any(|unit| unit.need_daemon_reload) {
        read_again(units, &mut done).await?;
    }
    let told = told.await.map_err(InstallError::Configuration)?;
    let sockets = put(
        &root.join(SOCKET_DROP_IN),
        drop_in(&told.settings).as_deref(),
        &mut done,
    )?;
    let folders = match &told.folders {
        Some(folders) => put(
            &root.join(HOST_DROP_IN),
            write_drop_in(folders).as_deref(),
            &mut done,
        )?,
        None => false,
    };
    if sockets || folders {
        read_again(units, &mut done).await?;
    }
    let disabled: Vec<&str> = names(&loaded, |unit| unit.unit_file_state != "enabled");
    if !disabled.is_empty()
        && did(
            units.enable(&disabled).await,
            format!("enable {}", disabled.join(", ")),
        )?
    {
        done.push(format!("enabled {}", disabled.join(", ")));
        // The agent's `Wants=` are links too: without this, one that crashes comes back alone.
        did(
            units.daemon_reload().await,
            "have systemd read its units again",
        )?;
    }
    let runs = loaded[AGENT].active_state == "active";
    let listening = loaded[SOCKET].active_state == "active";
    let without_socket = runs && !listening;
    // At boot the socket is open before the agent runs, and before the configuration is there.
    let reopen = sockets && (runs || listening) || without_socket;
    if reopen {
        // A socket whose service runs without it can't be started.
        did(
            units.stop(AGENT).await,
            format!("stop {AGENT}, to open its sockets anew"),
        )?;
        did(
            units.stop(SOCKET).await,
            format!("stop {SOCKET}, to open it anew"),
        )?;
    } else if runs && (changed || !runs_this(root, &loaded[AGENT], binary)) {
        did(
            units.enqueue_restart(AGENT).await,
            format!("restart {AGENT}"),
        )?;
        done.push(format!("asked for a restart of {AGENT}"));
    } else if folders && loaded[HOST].active_state == "active" {
        did(units.enqueue_restart(HOST).await, format!("restart {HOST}"))?;
        done.push(format!("asked for a restart of {HOST}"));
    }
    let idle = names(&loaded, |unit| reopen || unit.active_state != "active");
    for name in idle {
        let started = units.start(name).await;
        let started = started.map_err(|problem| match in_the_way(&told.settings) {
            Some(other) if name == SOCKET => format!("{problem}\n{other}"),
            _ => problem,
        });
        did(started, format!("start {name}"))?;
        done.push(format!("started {name}"));
    }
    Ok(done)
}

/// Unwires the engines, stops the units, and removes what [`install`] has written. What the agent
/// has stored stays, and so does its user, whose files those are.
///
/// `unwire` is called when the host's part has stopped, and puts back what it still has to.
pub async fn uninstall(
    root: &Path,
    units: &impl Units,
    unwire: impl Future<Output = Result<(), String>>,
) -> Result<Done, InstallError> {
    let mut done = Done::new();
    let mut known = Vec::new();
    // The host's part first: it withdraws while the agent still serves.
    for name in [HOST, AGENT, SOCKET] {
        let unit = did(units.unit(name).await, format!("look at {name}"))?;
        if unit.load_state == "not-found" {
            continue;
        }
        known.push(name);
        if name == HOST && unit.active_state != "inactive" {
            did(units.stop(name).await, format!("stop {name}"))?;
            done.push(format!("stopped {name}"));
        }
    }
    unwire.await.map_err(InstallError::Unwire)?;
    for name in known.iter().filter(|name| **name != HOST) {
        did(units.stop(name).await, format!("stop {name}"))?;
        done.push(format!("stopped {name}"));
    }
    let mut removed = false;
    if !known.is_empty() {
        removed = did(
            units.disable(&known).await,
            format!("disable {}", known.join(", ")),
        )?;
        done.push(format!("disabled {}", known.join(", ")));
    }
    for name in [AGENT, SOCKET, HOST] {
        removed |= put(&root.join(UNITS[0]).join(name), None, &mut done)?;
    }
    for drop_in in [SOCKET_DROP_IN, HOST_DROP_IN].map(|file| root.join(file)) {
        removed |= put(&drop_in, None, &mut done)?;
        // Only if nobody else has a drop-in there.
        let _ = fs::remove_dir(drop_in.with_file_name(""));
    }
    let users = root.join(SYSUSERS[0]);
    if put(&users.join(SYSUSERS_FILE), None, &mut done)? {
        // Not every distribution has it: where nobody else uses it, it was made for this.
        let _ = fs::remove_dir(users);
    }
    // The agent's unit preserves it for the socket, which is gone too.
    let runtime = Path::new(RUNTIME_DIRECTORY);
    let _ = fs::remove_dir(root.join(runtime.strip_prefix("/").unwrap_or(runtime)));
    if removed {
        did(
            units.daemon_reload().await,
            "have systemd read its units again",
        )?;
    }
    Ok(done)
}

async fn read_again(units: &impl Units, done: &mut Done) -> Result<(), InstallError> {
    did(
        units.daemon_reload().await,
        "have systemd read its units again",
    )?;
    done.push("systemd has read its units again".to_owned());
    Ok(())
}

fn did<T>(result: Result<T, String>, what: impl Into<String>) -> Result<T, InstallError> {
    result.map_err(|problem| {
        let what = what.into();
        // A job's error says itself what could not be done.
        let said = problem.strip_prefix(&format!("can't {what}: "));
        let problem = said.map(str::to_owned).unwrap_or(problem);
        InstallError::Units { what, problem }
    })
}

fn names<'a>(
    units: &BTreeMap<&'a str, UnitFacts>,
    such: impl Fn(&UnitFacts) -> bool,
) -> Vec<&'a str> {
    // In the order in which they are started.
    let order = [SOCKET, AGENT, HOST].into_iter();
    let such = order.filter(|name| units.get(name).is_some_and(&such));
    such.filter_map(|name| units.get_key_value(name).map(|(name, _)| *name))
        .collect()
}

/// Whether the unit's file is a mask that systemd may not have read yet: systemctl(1), `mask`.
fn is_masked(file: &Path) -> bool {
    fs::read_link(file).is_ok_and(|to| to == Path::new("/dev/null"))
}

/// The units hide homes and temporary folders from what they start; and what others may write to,
/// root does not start.
fn check_binary(root: &Path, binary: &Path) -> Result<(), InstallError> {
    let refuse = |why| {
        Err(InstallError::Binary {
            binary: binary.to_owned(),
            why,
        })
    };
    let below = |folder: &str| binary.starts_with(folder);
    if ["/home", "/root", "/run"].into_iter().any(below) {
        return refuse("the units can't see homes and runtime folders");
    }
    if ["/tmp", "/var/tmp", "/dev/shm"].into_iter().any(below) {
        return refuse("it is in a temporary folder, which is emptied");
    }
    if binary
        .components()
        .any(|part| part == Component::Normal("target".as_ref()))
    {
        return refuse("it is where it was built, and the next build replaces it");
    }
    let file = root.join(binary.strip_prefix("/").unwrap_or(binary));
    let metadata = fs::metadata(&file).map_err(|source| InstallError::File {
        what: "read",
        file,
        source,
    })?;
    let owner = fs::metadata(root).map_or(0, |root| root.uid());
    if metadata.uid() != owner || metadata.permissions().mode() & 0o022 != 0 {
        return refuse("others than root may change it");
    }
    Ok(())
}

fn for_binary(unit: &str, binary: &Path) -> String {
    // What is special in a command line: systemd.service(5), "Command lines".
    let escaped: String = binary
        .display()
        .to_string()
        .chars()
        .flat_map(|c| match c {
            '%' | '$' => vec![c, c],
            ' ' | '"' | '\'' | ';' => vec!['\\', c],
            '\\' => vec!['\\', '\\'],
            c => vec![c],
        })
        .collect();
    unit.replace(
        &format!("ExecStart={PACKAGED} "),
        &format!("ExecStart={escaped} "),
    )
}

/// Why the socket unit can't listen, which systemd says to its journal alone.
fn in_the_way(settings: &Settings) -> Option<String> {
    let listen = settings.serving.as_ref()?.listen;
    let error = TcpListener::bind(listen).err()?;
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => {
            ": `ss --listening --tcp --processes` says by whom; stop that, or set `listen` to \
             another address"
        }
        _ => "",
    };
    Some(format!(
        "{listen} (`listen`) can't be opened: {error}{remedy}"
    ))
}

/// What the socket unit listens on, where that is not what it says itself.
fn drop_in(settings: &Settings) -> Option<String> {
    let registry = settings
        .serving
        .as_ref()
        .map(|serving| serving.listen.to_string());
    let admin = match &settings.admin {
        AdminAddress::Tcp(address) => address.to_string(),
        // A specifier begins with %: systemd.unit(5).
        AdminAddress::Unix(path) => path.display().to_string().replace('%', "%%"),
    };
    let lines: Vec<String> = registry
        .into_iter()
        .chain([admin])
        .map(|address| format!("ListenStream={address}"))
        .collect();
    let unit = SOCKET_UNIT
        .lines()
        .filter(|line| line.starts_with("ListenStream="));
    (!unit.eq(lines.iter())).then(|| {
        let lines = lines.join("\n");
        format!(
            "# By `registry-agent install`: `listen` and `admin` of the configuration.\n\
             [Socket]\nListenStream=\n{lines}\n"
        )
    })
}

/// What lets the host's part write where the engines' files are, if that is not in `/etc`.
fn write_drop_in(folders: &BTreeSet<PathBuf>) -> Option<String> {
    // A folder that goes must not keep the service from starting: `-`. Quotes for blanks, and a
    // specifier begins with %: systemd.exec(5), systemd.unit(5).
    let line = |folder: &PathBuf| {
        let folder = folder.display().to_string().replace('%', "%%");
        format!("ReadWritePaths=\"-{folder}\"\n")
    };
    let lines: String = folders.iter().map(line).collect();
    (!lines.is_empty()).then(|| {
        format!(
            "# By `registry-agent install`: the engines' files are there, which the unit's own\n\
             # ReadWritePaths= does not have.\n\
             [Service]\n{lines}"
        )
    })
}

/// Writes the files that are not what they should be, in the administrator's folder, and removes
/// those there that only hide the same file of a package. Whether anything changed.
fn write_all<const N: usize>(
    root: &Path,
    [ours, theirs]: &[&str; 2],
    files: [(&str, String); N],
    done: &mut Done,
) -> Result<bool, InstallError> {
    let mut changed = false;
    for (name, text) in files {
        let packaged = read(&root.join(theirs).join(name))?;
        let wanted = (packaged.as_deref() != Some(text.as_bytes())).then_some(text);
        changed |= put(&root.join(ours).join(name), wanted.as_deref(), done)?;
    }
    Ok(changed)
}

fn read(file: &Path) -> Result<Option<Vec<u8>>, InstallError> {
    let mut bytes = Vec::new();
    let read = File::open(file).and_then(|file| file.take(LIMIT + 1).read_to_end(&mut bytes));
    match read {
        Ok(length) if length as u64 > LIMIT => Err(InstallError::File {
            what: "read",
            file: file.to_owned(),
            source: io::Error::other(format!("it is larger than {LIMIT} bytes")),
        }),
        Ok(_) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(InstallError::File {
            what: "read",
            file: file.to_owned(),
            source,
        }),
    }
}

/// Has a file hold a text, or not be there. Whether anything changed.
fn put(file: &Path, text: Option<&str>, done: &mut Done) -> Result<bool, InstallError> {
    if read(file)?.as_deref() == text.map(str::as_bytes) {
        return Ok(false);
    }
    let (what, put) = match text {
        Some(text) => ("write", replace(file, text)),
        None => ("remove", fs::remove_file(file)),
    };
    put.map_err(|source| InstallError::File {
        what,
        file: file.to_owned(),
        source,
    })?;
    let did = if text.is_some() { "wrote" } else { "removed" };
    done.push(format!("{did} {}", file.display()));
    Ok(true)
}

/// A crash leaves the file before or the one after, never half of one.
fn replace(file: &Path, text: &str) -> io::Result<()> {
    let folder = file.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let mut staged = tempfile::Builder::new()
        .prefix(".registry-agent.")
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(folder)?;
    staged.write_all(text.as_bytes())?;
    // The umask has cut the mode above.
    staged
        .as_file()
        .set_permissions(fs::Permissions::from_mode(0o644))?;
    staged.as_file().sync_all()?;
    staged.persist(file).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

/// Whether the unit's process was started from this very file, and not from what it replaced.
fn runs_this(root: &Path, unit: &UnitFacts, binary: &Path) -> bool {
    let identity = |path: PathBuf| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let running = identity(root.join(format!("proc/{}/exe", unit.main_pid)));
    running == identity(root.join(binary.strip_prefix("/").unwrap_or(binary)))
}

#[cfg(test)]
mod tests;
