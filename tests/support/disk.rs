//! A small disk, and files that look as if they were used long ago.

use std::fs::{File, FileTimes};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::write_file;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// A tmpfs that only this thread and the processes it starts can see, mounted without access times
/// as people mount disks for speed. It needs root.
pub struct Disk(PathBuf);

impl Disk {
    /// Makes one of so many bytes at `path`.
    #[track_caller]
    pub fn mount(path: &Path, bytes: usize) -> Self {
        std::fs::create_dir_all(path).expect("a mount point");
        unshare(CloneFlags::CLONE_NEWNS).expect("root, for a mount namespace of the test's own");
        let (none, private) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        mount(none, "/", none, private, none).expect("mounts of the test's own");
        let size = format!("size={bytes}");
        let tmpfs = Some("tmpfs");
        mount(tmpfs, path, tmpfs, MsFlags::MS_NOATIME, Some(size.as_str())).expect("a tmpfs");
        Self(path.to_owned())
    }

    /// Leaves no byte free, until the file that it says is removed.
    #[track_caller]
    pub fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        write_file(&path, b"");
        let file = File::options().append(true).open(&path);
        let mut file = file.expect("the file just written");
        let piece = [1; 4096];
        while file.write_all(&piece).is_ok() {}
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Makes a file look as if it was last used and changed so many hours ago.
#[track_caller]
pub fn age(path: &Path, hours: u64) {
    let then = SystemTime::now() - Duration::from_hours(hours);
    let times = FileTimes::new().set_accessed(then).set_modified(then);
    let file = File::options().write(true).open(path);
    file.and_then(|file| file.set_times(times))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
