//! Blobs that are being downloaded. Every call blocks, as in [`super::filesystem`].

use std::fs::{self, FileTimes, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use super::filesystem::{Filesystem, absent, make_parent, sync_parent};
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
        failpoint!(FillOpened);
        Ok(Partial {
            file: Arc::new(BlobFile::new(file, lease)),
            path,
            length,
            hasher,
        })
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
        failpoint!(FillRenamed);
        sync_parent(&target)
    }

    /// Removes a download that is not what it should be.
    pub fn discard_fill(&self, digest: &Digest) -> Result<(), StoreError> {
        let path = self.root.join(layout::fill(digest));
        match fs::remove_file(&path) {
            Err(e) if !absent(&e) => Err(StoreError::new("remove", &path, e)),
            _ => Ok(()),
        }
    }
}
