//! Blobs that are being downloaded. Every call blocks, as in [`super::filesystem`].

use std::collections::HashSet;
use std::fs::{self, File, FileTimes, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

use super::filesystem::{Filesystem, absent, make_parent, place, sync_parent};
use super::lease::BlobFile;
use super::{StoreError, layout};
use crate::failpoint::failpoint;
use crate::oci::{Digest, Hasher};

/// A blob that is being downloaded.
pub struct Partial {
    /// Open for reading and writing; readers keep it through the rename.
    pub file: Arc<BlobFile>,
    /// Where it is until then.
    pub path: PathBuf,
    /// Bytes that are there.
    pub length: u64,
    /// Has taken those bytes.
    pub hasher: Hasher,
    /// Whether those bytes are as they arrived. A process that was killed, with the machine perhaps,
    /// may have left anything there: the disk was not asked to keep it.
    pub trusted: bool,
}

impl Partial {
    /// Brings it to the disk.
    pub fn sync(&self) -> Result<(), StoreError> {
        let synced = self.file.sync_all();
        synced.map_err(|e| StoreError::new("sync", &self.path, e))
    }

    /// Appends bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file
            .write_all_at(bytes, self.length)
            .map_err(|e| StoreError::new("write", &self.path, e))?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        failpoint!(FillBegun);
        Ok(())
    }
}

impl Filesystem {
    /// Opens the file that a blob is downloaded into, with what an earlier download left in it and
    /// the hash of that.
    pub fn open_fill(&self, digest: &Digest) -> Result<Partial, StoreError> {
        let path = self.root.join(layout::fill(digest));
        // Held through the commit and by the readers that follow, so that nobody loses it.
        let lease = self.leases.take(digest);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|e| StoreError::new("create", folder, e))?;
        }
        let error = |e| StoreError::new("read", &path, e);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|e| StoreError::new("open", &path, e))?;
        let trusted = self.take_synced(digest, &file)?;
        let mut hasher = Hasher::new(digest.algorithm());
        let mut length = 0;
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match file.read_at(&mut buffer, length).map_err(error)? {
                0 => break,
                read => {
                    hasher.update(&buffer[..read]);
                    length += read as u64;
                }
            }
        }
        let trusted = trusted || length == 0 || self.growing().contains(digest);
        if trusted {
            self.growing().insert(digest.clone());
        }
        failpoint!(FillOpened);
        Ok(Partial {
            file: Arc::new(BlobFile::new(file, lease)),
            path,
            length,
            hasher,
            trusted,
        })
    }

    /// Whether an agent that stopped in order has left this download, which is cut to what is on the
    /// disk for certain.
    fn take_synced(&self, digest: &Digest, file: &File) -> Result<bool, StoreError> {
        let path = self.root.join(layout::synced(digest));
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if absent(&e) => return Ok(false),
            Err(e) => return Err(StoreError::new("read", &path, e)),
        };
        // Of what comes from here on it says nothing. If a crash brings it back, it is still true.
        remove(&path)?;
        let error = |e| StoreError::new("cut", &self.root.join(layout::fill(digest)), e);
        let length = file.metadata().map_err(error)?.len();
        match text.parse() {
            Ok(synced) if (1..=length).contains(&synced) => {
                file.set_len(synced).map_err(error)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Brings the downloads of this process to the disk, and records how much of each that is: the
    /// next process gives it to readers at once, where it would have to see all of it first.
    pub fn sync_fills(&self) -> Result<(), StoreError> {
        let growing: Vec<Digest> = self.growing().iter().cloned().collect();
        for digest in growing {
            let path = self.root.join(layout::fill(&digest));
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(e) if absent(&e) => continue,
                Err(e) => return Err(StoreError::new("open", &path, e)),
            };
            // Taken before: what is appended meanwhile may be on the disk, or not.
            let length = file
                .metadata()
                .map_err(|e| StoreError::new("read", &path, e))?
                .len();
            file.sync_all()
                .map_err(|e| StoreError::new("sync", &path, e))?;
            let target = self.root.join(layout::synced(&digest));
            place(self.stage(&target, length.to_string().as_bytes())?, &target)?;
            sync_parent(&target)?;
        }
        Ok(())
    }

    pub(super) fn growing(&self) -> std::sync::MutexGuard<'_, HashSet<Digest>> {
        self.growing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a download that has been verified and synced a blob of the store.
    pub fn commit_fill(&self, digest: &Digest, partial: &Partial) -> Result<(), StoreError> {
        let target = self.root.join(layout::blob(digest));
        // The kernel's own idea of its last use may be a day old, when it was begun.
        let now = FileTimes::new().set_accessed(SystemTime::now());
        partial
            .file
            .set_times(now)
            .map_err(|e| StoreError::new("touch", &partial.path, e))?;
        make_parent(&target)?;
        failpoint!(FillSynced);
        self.usage.add(digest, partial.length, || {
            fs::rename(&partial.path, &target).map_err(|e| StoreError::new("write", &target, e))
        })?;
        self.growing().remove(digest);
        failpoint!(FillRenamed);
        sync_parent(&target)
    }

    /// Removes a download that is not what it should be.
    pub fn discard_fill(&self, digest: &Digest) -> Result<(), StoreError> {
        self.growing().remove(digest);
        remove(&self.root.join(layout::fill(digest)))
    }
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(e) if !absent(&e) => Err(StoreError::new("remove", path, e)),
        _ => Ok(()),
    }
}
