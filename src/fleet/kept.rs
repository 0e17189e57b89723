//! What outlives the process: a file in the state folder, replaced as a whole and synced before the
//! steps that it is about.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::memory::Kept;

/// The file's name in the state folder.
const NAME: &str = "fleet.json";
/// The same for the starts that were in vain.
const STARTS: &str = "fleet-starts.json";
/// So many restarts have to be in vain.
const RESTARTS: usize = 3;
const MOST_STARTS: usize = 10;
/// Older ones are forgotten.
const STARTS_COUNT_FOR: Duration = Duration::from_hours(1);
/// What is read of it, in bytes: it holds a few names and times.
const LIMIT: u64 = 256 * 1024;

/// The file, and what it holds.
pub(super) struct KeptFile {
    path: PathBuf,
    held: Option<Kept>,
    failing: bool,
}

impl KeptFile {
    /// The file in this folder, and what was kept there. One that can't be read is as one that is
    /// not there: then an instance that was told to go hears so again, from the group.
    pub fn open(folder: &Path) -> (Self, Kept) {
        let path = folder.join(NAME);
        let kept = match read(&path) {
            Ok(kept) => kept,
            Err(error) => {
                let file = path.display();
                tracing::warn!(%error, "{file} can't be read, and is as if it were not there: {error}");
                None
            }
        };
        let file = Self {
            path,
            held: kept.clone(),
            failing: false,
        };
        (file, kept.unwrap_or_default())
    }

    /// Has the disk hold this, if it does not yet. A disk that refuses is said once, and keeps
    /// nobody from acting: an instance with a broken disk is the one that has to be replaced.
    pub async fn keep(&mut self, kept: &Kept) {
        if self.held.as_ref() == Some(kept) {
            return;
        }
        let (path, wanted) = (self.path.clone(), kept.clone());
        let written = tokio::task::spawn_blocking(move || write(&path, &wanted)).await;
        match written.map_err(io::Error::other).flatten() {
            Ok(()) => {
                self.held = Some(kept.clone());
                self.failing = false;
            }
            Err(error) => {
                let file = self.path.display();
                if !self.failing {
                    tracing::error!(%error, "{file} can't be written, so a restart will not know what was done: {error}");
                }
                self.failing = true;
            }
        }
    }
}

/// The starts since this agent last served at its own address: one that never does, however often the
/// watchdog starts it again, is cured by no further start.
pub(super) struct Starts {
    path: PathBuf,
    /// When, since this host booted.
    times: Vec<Duration>,
}

impl Starts {
    /// Begins another one. A disk that keeps no count counts nothing.
    pub async fn another(folder: &Path, now: Duration) -> Self {
        let path = folder.join(STARTS);
        let file = path.clone();
        let times = tokio::task::spawn_blocking(move || {
            let before: Vec<Duration> = read(&file).ok().flatten().unwrap_or_default();
            // Those of before a boot are later than now, mostly, or are old.
            let lately = before.into_iter().filter(|at| {
                now.checked_sub(*at)
                    .is_some_and(|ago| ago <= STARTS_COUNT_FOR)
            });
            let mut times: Vec<Duration> = lately.collect();
            times.push(now);
            times.drain(..times.len().saturating_sub(MOST_STARTS));
            if let Err(error) = write(&file, &times) {
                tracing::debug!(%error, "starts can't be counted: {error}");
            }
            times
        });
        Self {
            path,
            times: times.await.unwrap_or_default(),
        }
    }

    /// Whether there were three restarts, and none of them helped.
    pub fn are_in_vain(&self) -> bool {
        self.times.len() > RESTARTS
    }

    /// The agent serves: the next start is the first again.
    pub async fn were_not_in_vain(&mut self) {
        if self.times.is_empty() {
            return;
        }
        self.times.clear();
        let path = self.path.clone();
        // Left there, it makes the next starts look like more than they are for an hour at most.
        let _ = tokio::task::spawn_blocking(move || fs::remove_file(path)).await;
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    file.take(LIMIT).read_to_end(&mut text)?;
    Ok(Some(serde_json::from_slice(&text)?))
}

fn write(path: &Path, kept: &impl Serialize) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&serde_json::to_vec_pretty(kept)?)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::facts::InstanceId;

    fn kept() -> Kept {
        Kept {
            instance: Some(InstanceId::new("i-1")),
            replacement_asked: true,
            ..Kept::default()
        }
    }

    #[tokio::test]
    async fn what_was_kept_is_there_for_the_next_process() {
        let folder = tempfile::tempdir().unwrap();
        let (mut file, before) = KeptFile::open(folder.path());
        assert_eq!(before, Kept::default());
        file.keep(&kept()).await;
        assert_eq!(KeptFile::open(folder.path()).1, kept());
        // Nothing else is left behind.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_file_that_is_broken_is_as_none_and_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let mut half = File::create_new(folder.path().join(NAME)).unwrap();
        half.write_all(b"{ half").unwrap();
        let (mut file, before) = KeptFile::open(folder.path());
        assert_eq!(before, Kept::default());
        file.keep(&kept()).await;
        assert_eq!(KeptFile::open(folder.path()).1, kept());
    }

    #[tokio::test]
    async fn starts_count_until_one_of_them_serves() {
        let folder = tempfile::tempdir().unwrap();
        let start = |seconds| Starts::another(folder.path(), Duration::from_secs(seconds));
        for seconds in [10, 70, 130] {
            assert!(!start(seconds).await.are_in_vain());
        }
        let mut fourth = start(190).await;
        assert!(fourth.are_in_vain());
        fourth.were_not_in_vain().await;
        assert!(!fourth.are_in_vain());
        assert!(!start(200).await.are_in_vain());
        // An hour later, or after a boot, they are forgotten.
        for seconds in [210, 220, 230] {
            start(seconds).await;
        }
        assert!(!start(3900).await.are_in_vain());
        assert!(!start(5).await.are_in_vain());
    }

    #[tokio::test]
    async fn a_disk_that_refuses_is_asked_again_at_the_next_time() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("state");
        let (mut file, _) = KeptFile::open(&inside);
        // Not a folder, so that nothing can be written below, by root neither.
        File::create_new(&inside).unwrap();
        file.keep(&kept()).await;
        assert!(file.failing);
        fs::remove_file(&inside).unwrap();
        file.keep(&kept()).await;
        assert!(!file.failing);
        assert_eq!(KeptFile::open(&inside).1, kept());
    }
}
