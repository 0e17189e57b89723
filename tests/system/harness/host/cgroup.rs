//! A host's own control group. systemd-nspawn with `--keep-unit` makes groups with fixed names
//! below its own: two hosts in one group would be one.

use std::fs;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::harness::poll;

/// The group in each hierarchy that systemd uses, removed on drop.
pub struct Cgroup {
    folders: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes an empty one.
    pub fn new(name: &str) -> Self {
        let folders: Vec<PathBuf> = hierarchies()
            .iter()
            .map(|hierarchy| hierarchy.join(name))
            .collect();
        for folder in &folders {
            fs::create_dir(folder)
                .unwrap_or_else(|error| panic!("making {}: {error}", folder.display()));
        }
        Self { folders }
    }

    /// What a command is prefixed with to run in the group.
    pub fn enter(&self) -> Vec<String> {
        const JOIN: &str =
            r#"while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done; shift; exec "$@""#;
        let folders = self
            .folders
            .iter()
            .map(|folder| folder.display().to_string());
        let shell = ["sh", "-ec", JOIN, "sh"].map(ToOwned::to_owned);
        shell
            .into_iter()
            .chain(folders)
            .chain(["--".to_owned()])
            .collect()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for folder in &self.folders {
            remove(folder);
        }
    }
}

/// Where systemd keeps track of processes: the unified hierarchy, and on machines that still
/// have the old ones, the one that it names.
pub fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("reading the mount table");
    let mounts = mounts.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let (path, kind, options) = (fields.get(1)?, fields.get(2)?, fields.get(3)?);
        let used = *kind == "cgroup2"
            || *kind == "cgroup" && options.split(',').any(|option| option == "name=systemd");
        used.then(|| PathBuf::from(path))
    });
    mounts.collect()
}

/// Removes a group and those in it. Its processes are dead, but the kernel may not be done.
pub fn remove(group: &Path) {
    let removed = poll::within(Duration::from_secs(10), || remove_tree(group));
    if let Err(error) = removed {
        eprintln!("removing the control group {}: {error}", group.display());
    }
}

fn remove_tree(group: &Path) -> Result<(), Error> {
    let entries = match fs::read_dir(group) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
