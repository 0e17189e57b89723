//! Names and folders of a test run, and the removal of what a killed run left.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MntFlags, umount2};

use super::command;
use super::host::{hierarchies, remove_cgroup};
use super::network::remove_leftover;

/// What every network namespace of a test run begins with, then the process id.
const PREFIX: &str = "registry-agent-test-";

/// A name that nothing else on this machine has: `registry-agent-test-<pid>-<n>-<label>`.
pub fn unique_name(label: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{PREFIX}{}-{n}-{label}", process::id())
}

/// The Debian root that hosts are booted from. Never written to.
pub fn host_image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        // Before the first name is used: no leftover can be in its way.
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/host-image");
        let image = PathBuf::from(command::run(&[script]).trim());
        remove_leftovers(&runs(&image));
        image
    })
}

fn runs(image: &Path) -> PathBuf {
    image
        .parent()
        .expect("the image is in a folder")
        .join("runs")
}

/// A folder on a real disk, removed on drop.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes an empty one, named after `label`.
    pub fn new(label: &str) -> Self {
        let path = runs(host_image()).join(unique_name(label));
        make_folder(&path);
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file or folder in it, as text for a command line.
    pub fn at(&self, name: &str) -> String {
        let path = self.path.join(name);
        path.to_str()
            .expect("the cache folder's path is UTF-8")
            .to_owned()
    }

    /// Makes a folder in it.
    pub fn folder(&self, name: &str) -> String {
        make_folder(&self.path.join(name));
        self.at(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

fn make_folder(path: &Path) {
    // Hosts' services run as their own users and pass through it.
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path);
    made.unwrap_or_else(|error| panic!("making {}: {error}", path.display()));
}

/// Removes a run's folder, detaching what is mounted in it first.
fn remove(path: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let inside = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for mount in inside.filter(|mount| Path::new(mount).starts_with(path)) {
        if let Err(error) = umount2(mount, MntFlags::MNT_DETACH) {
            eprintln!("unmounting {mount}: {error}");
            // Deleting through a mount would delete what is not ours.
            return;
        }
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            eprintln!("removing {}: {error}", path.display());
        }
        _ => {}
    }
}

/// Ends the hosts, and removes the namespaces and folders, of runs whose process is gone.
fn remove_leftovers(runs: &Path) {
    for name in names_in(Path::new("/run/netns")).filter(|name| is_leftover(name)) {
        remove_leftover(&name);
    }
    for hierarchy in hierarchies() {
        for name in names_in(&hierarchy).filter(|name| is_leftover(name)) {
            remove_cgroup(&hierarchy.join(name));
        }
    }
    for name in names_in(runs).filter(|name| is_leftover(name)) {
        remove(&runs.join(name));
    }
}

fn names_in(folder: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

fn is_leftover(name: &str) -> bool {
    let pid = name
        .strip_prefix(PREFIX)
        .and_then(|rest| rest.split('-').next());
    pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
}
