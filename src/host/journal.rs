//! What was on this host before it was changed, so that it can be again.
//!
//! The state folder holds two files, each written whole or not at all:
//!
//! - `transaction.json`, while something is being changed: what was there, and how far it got. Who
//!   finds one at its start undoes it, unless the proof is recorded in it: then it is finished.
//! - `original.json`: what every file was before the first of many changes, and what it was made
//!   since. `rollback` takes the host back to that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::facts::FileFacts;
use super::plan::{Proof, UnitAction, Verb};
use super::read;
use super::write::{self, WriteError};

/// The form of both files.
const VERSION: u32 = 1;
/// What either is at most, in bytes: written as well as read. Two texts of [`read::LIMIT`] bytes that
/// are all line ends or tabs, which JSON writes in two, are a quarter of it.
const LIMIT: u64 = 16 * read::LIMIT;
const TRANSACTION: &str = "transaction.json";
const ORIGINAL: &str = "original.json";

/// The state folder.
#[derive(Debug, Clone)]
pub struct Journal {
    folder: PathBuf,
}

/// The journal could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk.
    #[error("the journal: {0}")]
    Write(#[from] WriteError),
    /// The folder.
    #[error("can't make the state folder {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What came back.
        source: io::Error,
    },
    /// It could not be read again.
    #[error(
        "the journal {} would have {size} bytes, and at most {LIMIT} are read: the files that are to \
         change are too large for it ({})", path.display(), list(files)
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// What would be in it, in bytes.
        size: u64,
        /// The files of the host that it is about.
        files: Vec<PathBuf>,
    },
    /// Something else has written there.
    #[error(
        "the journal {} can't be understood: {why}. It says what this host was before it was \
         changed, so nothing is done without it and it is left as it is. Put it right, or, if the \
         engines' configuration is as it should be, move it away and try again", path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

fn list(files: &[PathBuf]) -> String {
    let files: Vec<String> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    files.join(", ")
}

/// A change that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transaction {
    /// Whether daemons may have been told of it.
    pub told: bool,
    /// Whether the new state is proved: then it stays, and is taken back otherwise.
    pub proved: bool,
    /// Files before and after, in the order in which they are written.
    pub files: Vec<Change>,
    /// The folders that it makes, the outermost first.
    pub folders: Vec<PathBuf>,
    /// The units' jobs.
    pub actions: Vec<UnitAction>,
    /// What has to be true at its end.
    pub proofs: Vec<Proof>,
    /// The units, as they were.
    pub units: BTreeMap<String, UnitBefore>,
    /// What it tells the engines to use; none where it takes that back.
    pub mirror: Option<String>,
    /// The files that it takes back for good.
    #[serde(default)]
    pub forgotten: BTreeSet<PathBuf>,
}

/// One file of a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// The file.
    pub path: PathBuf,
    /// What was there.
    pub before: FileFacts,
    /// What is to be there.
    pub after: FileFacts,
    /// The units that read it.
    #[serde(default)]
    pub units: Vec<String>,
}

/// A unit before a transaction.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitBefore {
    /// `active`, `inactive`, `failed`, ...
    pub active_state: String,
    /// Its main process: as long as it is the same, the daemon was not restarted.
    pub main_pid: u32,
    /// docker's mirrors, where its daemon was to prove some and answered.
    pub mirrors: Option<Vec<String>>,
}

/// What this host was before it was changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Originals {
    /// Each file that was ever changed.
    pub files: BTreeMap<PathBuf, Original>,
    /// The folders that were made, the outermost first.
    pub folders: Vec<PathBuf>,
    /// The units, as they were.
    pub units: BTreeMap<String, UnitBefore>,
    /// Every mirror that the engines were told of, so that one which is not ours any more is known
    /// for what it is.
    pub mirrors: BTreeSet<String>,
}

/// One file that was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Original {
    /// Before the first change.
    pub before: FileFacts,
    /// What it was made last.
    pub made: FileFacts,
    /// Whether somebody else has changed it in between: what it was before is not what they want.
    pub edited: bool,
    /// What its readers needed to be told, for each unit the strongest.
    pub verbs: BTreeMap<String, Verb>,
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    journal: T,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

impl Journal {
    /// Opens the state folder, making it where it is missing.
    pub fn open(folder: &Path) -> Result<Self, JournalError> {
        // What files held may be nobody else's to read.
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|source| JournalError::Folder {
            path: folder.to_owned(),
            source,
        })?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    /// The state folder of a host, for reading: it need not be there.
    pub fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The state folder of a host: what systemd gives the unit (systemd.exec(5),
    /// `StateDirectory=`), or else where it would be.
    pub fn default_folder(root: &Path) -> PathBuf {
        match std::env::var_os("STATE_DIRECTORY") {
            Some(folder) if root == Path::new("/") => folder.into(),
            _ => root.join("var/lib/registry-agent-host"),
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the change is that somebody has not ended.
    pub fn transaction_file(&self) -> PathBuf {
        self.folder.join(TRANSACTION)
    }

    /// The change that somebody has not ended.
    pub fn transaction(&self) -> Result<Option<Transaction>, JournalError> {
        self.read(TRANSACTION)
    }

    /// Fails where what this change needs to be taken back could be written and not be read again:
    /// before anything is changed.
    pub fn check(&self, transaction: &Transaction) -> Result<(), JournalError> {
        let originals = self.originals()?.after(transaction);
        let sizes = [
            (TRANSACTION, self.encoded(TRANSACTION, transaction)?.len()),
            (ORIGINAL, self.encoded(ORIGINAL, &originals)?.len()),
        ];
        for (name, size) in sizes {
            let size = u64::try_from(size).unwrap_or(u64::MAX);
            if size > LIMIT {
                let files = originals.files.keys().cloned();
                return Err(JournalError::TooLarge {
                    path: self.folder.join(name),
                    size,
                    files: files.collect(),
                });
            }
        }
        Ok(())
    }

    /// Records how far a change got. It is on the disk when this returns.
    pub fn record(&self, transaction: &Transaction) -> Result<(), JournalError> {
        self.write(TRANSACTION, transaction)
    }

    /// Ends a change that was taken back.
    pub fn close(&self) -> Result<(), JournalError> {
        Ok(write::remove(&self.folder.join(TRANSACTION))?)
    }

    /// What this host was before it was changed. Empty where it never was.
    pub fn originals(&self) -> Result<Originals, JournalError> {
        Ok(self.read(ORIGINAL)?.unwrap_or_default())
    }

    /// Every mirror that the engines were told of.
    pub fn previous_mirrors(&self) -> Result<BTreeSet<String>, JournalError> {
        Ok(self.originals()?.mirrors)
    }

    /// Keeps what a proved change did. It can be done twice.
    pub fn keep(&self, transaction: &Transaction) -> Result<(), JournalError> {
        let before = self.originals()?;
        let after = before.clone().after(transaction);
        if after.files.is_empty() && !transaction.forgotten.is_empty() {
            return Ok(write::remove(&self.folder.join(ORIGINAL))?);
        }
        if after != before {
            self.write(ORIGINAL, &after)?;
        }
        Ok(())
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, JournalError> {
        let path = self.folder.join(name);
        let corrupt = |why: String| JournalError::Corrupt {
            path: path.clone(),
            why,
        };
        let content = match write::read_at_most(&path, LIMIT)? {
            FileFacts::Absent => return Ok(None),
            FileFacts::Unreadable(why) => return Err(corrupt(why)),
            FileFacts::Text { content, .. } => content,
        };
        // First the version alone: a newer agent's journal has other fields.
        let VersionOnly { version } =
            serde_json::from_str(&content).map_err(|e| corrupt(e.to_string()))?;
        if version != VERSION {
            return Err(corrupt(format!(
                "it has version {version}, and this agent reads version {VERSION}: run the agent \
                 that wrote it"
            )));
        }
        let versioned: Versioned<T> =
            serde_json::from_str(&content).map_err(|e| corrupt(e.to_string()))?;
        Ok(Some(versioned.journal))
    }

    fn encoded<T: Serialize>(&self, name: &str, journal: &T) -> Result<String, JournalError> {
        let versioned = Versioned {
            version: VERSION,
            journal,
        };
        let content = serde_json::to_string_pretty(&versioned);
        let content = content.map_err(|e| JournalError::Corrupt {
            path: self.folder.join(name),
            why: e.to_string(),
        })?;
        Ok(content + "\n")
    }

    fn write<T: Serialize>(&self, name: &str, journal: &T) -> Result<(), JournalError> {
        let path = self.folder.join(name);
        let content = self.encoded(name, journal)?;
        let facts = FileFacts::Text {
            content,
            mode: 0o600,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            selinux: None,
            link_to: None,
        };
        Ok(write::put(&path, &facts)?)
    }
}

impl Originals {
    /// Whether nothing was ever changed, or all of it is taken back.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// What is known once this change is proved.
    #[must_use]
    pub fn after(mut self, transaction: &Transaction) -> Self {
        self.add(transaction);
        self.files
            .retain(|path, _| !transaction.forgotten.contains(path));
        let files = &self.files;
        self.folders
            .retain(|folder| files.keys().any(|path| path.starts_with(folder)));
        let readers = |unit: &String| files.values().any(|file| file.verbs.contains_key(unit));
        self.units.retain(|unit, _| readers(unit));
        self
    }

    fn add(&mut self, transaction: &Transaction) {
        let verbs: BTreeMap<String, Verb> = strongest(&transaction.actions);
        for change in &transaction.files {
            let original = self.files.entry(change.path.clone());
            let original = original.or_insert_with(|| Original {
                before: change.before.clone(),
                made: change.before.clone(),
                edited: false,
                verbs: BTreeMap::new(),
            });
            // The second time that the same transaction is kept, it is the agent's own work.
            if !write::same(&original.made, &change.before)
                && !write::same(&original.made, &change.after)
            {
                original.edited = true;
            }
            original.made = change.after.clone();
            // Of another file's reader this one says nothing: podman's is no reason to ask docker.
            let readers = verbs.iter().filter(|(unit, _)| change.units.contains(unit));
            for (unit, verb) in readers {
                let kept = original.verbs.entry(unit.clone()).or_insert(*verb);
                *kept = stronger(*kept, *verb);
            }
            // A daemon that was not told, since it did not run, has read it by then.
            let asked = transaction.proofs.iter().filter_map(|proof| match proof {
                Proof::DockerMirrors { unit, .. } => Some(unit),
                Proof::Active { .. } => None,
            });
            for unit in asked.filter(|unit| change.units.contains(unit)) {
                original.verbs.entry(unit.clone()).or_insert(Verb::Reload);
            }
        }
        for folder in &transaction.folders {
            if !self.folders.contains(folder) {
                self.folders.push(folder.clone());
            }
        }
        for (unit, before) in &transaction.units {
            let known = self.units.entry(unit.clone());
            known.or_insert_with(|| before.clone());
        }
        self.mirrors.extend(transaction.mirror.clone());
    }
}

/// For each unit, the job that does what all of them do.
pub fn strongest(actions: &[UnitAction]) -> BTreeMap<String, Verb> {
    let mut verbs = BTreeMap::new();
    for action in actions {
        let verb = verbs.entry(action.unit.clone()).or_insert(action.verb);
        *verb = stronger(*verb, action.verb);
    }
    verbs
}

/// The job that does what both do.
pub fn stronger(a: Verb, b: Verb) -> Verb {
    match (a, b) {
        (Verb::Reload, Verb::Reload) => Verb::Reload,
        _ => Verb::Restart,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(content: &str) -> FileFacts {
        FileFacts::Text {
            content: content.to_owned(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            selinux: None,
            link_to: None,
        }
    }

    fn transaction(before: &str, after: &str, mirror: &str) -> Transaction {
        Transaction {
            told: true,
            proved: true,
            files: vec![Change {
                path: "/etc/docker/daemon.json".into(),
                before: text(before),
                after: text(after),
                units: vec!["docker.service".to_owned()],
            }],
            folders: vec!["/etc/docker".into()],
            actions: Vec::new(),
            proofs: Vec::new(),
            units: BTreeMap::new(),
            mirror: Some(mirror.to_owned()),
            forgotten: BTreeSet::new(),
        }
    }

    #[test]
    fn what_was_first_is_kept_across_many_changes_and_an_edit_in_between_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path()).unwrap();
        assert_eq!(journal.originals().unwrap(), Originals::default());
        for (before, after, edited) in [
            ("mine", "wired", false),
            ("wired", "withdrawn", false),
            ("withdrawn", "wired", false),
            ("edited", "wired again", true),
            ("wired again", "withdrawn", true),
        ] {
            let change = transaction(before, after, "http://127.0.0.1:5000");
            // A crash after keeping it has the next start keep it again.
            journal.keep(&change).unwrap();
            journal.keep(&change).unwrap();
            let originals = journal.originals().unwrap();
            let original = &originals.files[Path::new("/etc/docker/daemon.json")];
            assert_eq!(original.before, text("mine"), "{after}");
            assert_eq!(original.made, text(after));
            assert_eq!(original.edited, edited, "{after}");
            assert_eq!(originals.folders, [PathBuf::from("/etc/docker")]);
        }
        let other = transaction("withdrawn", "moved", "http://mirror:5000");
        journal.keep(&other).unwrap();
        let mirrors = journal.previous_mirrors().unwrap();
        let expected = ["http://127.0.0.1:5000", "http://mirror:5000"].map(str::to_owned);
        assert_eq!(mirrors, BTreeSet::from(expected));
        journal
            .keep(&Transaction {
                forgotten: ["/etc/docker/daemon.json".into()].into(),
                ..other
            })
            .unwrap();
        assert_eq!(journal.originals().unwrap(), Originals::default());
    }

    #[test]
    fn nobody_else_may_read_what_files_held() {
        use std::os::unix::fs::MetadataExt as _;

        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("state")).unwrap();
        let change = transaction("mine", "wired", "http://127.0.0.1:5000");
        journal.record(&change).unwrap();
        journal.keep(&change).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(journal.folder()), 0o700);
        for name in [TRANSACTION, ORIGINAL] {
            assert_eq!(mode(&journal.folder().join(name)), 0o600, "{name}");
        }
    }

    #[test]
    fn a_journal_that_is_not_understood_is_named_and_left_alone() {
        for (content, why) in [
            ("", "EOF"),
            ("{\"version\": 1", "EOF"),
            ("{\"version\": 1, \"journal\": {}}", "told"),
            ("{\"version\": 2, \"other\": 1}", "has version 2"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let journal = Journal::open(folder.path()).unwrap();
            let path = folder.path().join(TRANSACTION);
            write::put(&path, &text(content)).unwrap();
            let said = journal.transaction().unwrap_err().to_string();
            assert!(said.contains(path.to_str().unwrap()), "{said}");
            assert!(said.contains(why), "{said}");
            assert!(write::same(&write::read(&path).unwrap(), &text(content)));
        }
    }

    #[test]
    fn a_file_is_the_business_of_its_own_readers_only() {
        let mut transaction = transaction("{}", "[]", "http://127.0.0.1:5000");
        transaction.actions = vec![UnitAction {
            unit: "docker.service".to_owned(),
            verb: Verb::Reload,
            why: "a test".to_owned(),
        }];
        let drop_in = PathBuf::from("/etc/containers/registries.conf.d/50-registry-agent.conf");
        transaction.files.push(Change {
            path: drop_in.clone(),
            before: FileFacts::Absent,
            after: text("podman's"),
            units: Vec::new(),
        });
        let mut originals = Originals::default();
        originals.add(&transaction);
        let readers = |path: &Path| {
            originals.files[path]
                .verbs
                .keys()
                .cloned()
                .collect::<Vec<_>>()
        };
        assert_eq!(
            readers(Path::new("/etc/docker/daemon.json")),
            ["docker.service"]
        );
        assert_eq!(readers(&drop_in), Vec::<String>::new());
    }
}
