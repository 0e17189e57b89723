//! Where blobs, manifests and tags are kept. The files are the truth: nothing is kept in memory
//! that can't be read again, and opening a store never scans it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use serde_json::Value;

pub mod audit;
pub mod filesystem;
pub mod layout;

use filesystem::{Disk, Filesystem, Partial};
use layout::Repository;

use crate::oci::{Digest, Manifest, Tag};

/// The store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk refused.
    #[error("can't {action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// What came back.
        source: io::Error,
    },
    /// Another process serves this root.
    #[error(
        "{0} is in use by another registry-agent: stop that one, or give this one a \
         `storage.filesystem.root` of its own"
    )]
    Locked(PathBuf),
}

impl StoreError {
    fn new(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether what was to be changed is not there.
    fn is_absent(&self) -> bool {
        matches!(self, Self::Io { source, .. } if filesystem::absent(source))
    }

    /// Whether the disk is full, or this user's share of it.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ))
    }
}

/// A blob of the store, open for reading. It stays readable when it is removed meanwhile.
#[derive(Debug, Clone)]
pub struct Blob {
    /// The bytes.
    pub file: Arc<File>,
    /// How many, in bytes.
    pub size: u64,
}

/// A part of a file of the store.
#[derive(Debug, Clone)]
pub struct FilePart {
    /// The file.
    pub file: Arc<File>,
    /// Where the part begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

impl FilePart {
    /// Reads at most `limit` bytes of its beginning, and takes them off.
    pub async fn read(&mut self, limit: u64) -> io::Result<Bytes> {
        let (file, offset) = (Arc::clone(&self.file), self.offset);
        let length = usize::try_from(self.length.min(limit)).map_err(io::Error::other)?;
        let bytes: Bytes = tokio::task::spawn_blocking(move || {
            let mut buffer = vec![0; length];
            let read = file.read_at(&mut buffer, offset)?;
            buffer.truncate(read);
            io::Result::Ok(buffer.into())
        })
        .await
        .map_err(io::Error::other)??;
        self.take(bytes.len())?;
        Ok(bytes)
    }

    /// Takes `count` bytes off its beginning, which have been read or sent.
    pub fn take(&mut self, count: usize) -> io::Result<()> {
        if count == 0 {
            // A file of the store never shrinks, unless something else than this agent cuts it.
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "a file of the store is too short",
            ));
        }
        self.offset += count as u64;
        self.length -= count as u64;
        Ok(())
    }
}

/// What a tag points to.
#[derive(Debug, Clone)]
pub struct TagLink {
    /// The manifest.
    pub digest: Digest,
    /// When the upstream last said so.
    pub confirmed: SystemTime,
}

/// Bytes of manifests that are kept in memory. A manifest has a few thousand.
const MANIFEST_MEMORY: u64 = 16 * 1024 * 1024;
/// Tags that are kept in memory.
const TAG_MEMORY: usize = 16 * 1024;

/// The store, for async callers: a call runs on the blocking pool, and is finished there even when
/// its caller goes away.
///
/// What was read or written last is kept in memory as well. Only this process writes to the root,
/// so that it is never older than the files. [`audit`] may remove files meanwhile; what is in memory
/// then is still right, since a manifest is its digest's and a tag what its upstream said last.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    files: Filesystem,
    manifests: Cache<(Repository, Digest), Arc<Manifest>, BySize>,
    tags: Cache<(Repository, Tag), TagLink>,
}

/// Weighs a manifest by the memory it takes, about.
#[derive(Debug, Clone)]
struct BySize;

impl Weighter<(Repository, Digest), Arc<Manifest>> for BySize {
    fn weight(&self, _: &(Repository, Digest), manifest: &Arc<Manifest>) -> u64 {
        let references = manifest.blobs.len() + manifest.manifests.len();
        (manifest.bytes.len() + references * size_of::<Digest>() + 1024) as u64
    }
}

impl Store {
    /// Opens the store at `root`. Blocks.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let entries = usize::try_from(MANIFEST_MEMORY / 4096).unwrap_or(usize::MAX);
        Ok(Self(Arc::new(Inner {
            files: Filesystem::open(root)?,
            manifests: Cache::with_weighter(entries, MANIFEST_MEMORY, BySize),
            tags: Cache::new(TAG_MEMORY),
        })))
    }

    /// The root folder.
    pub fn root(&self) -> &Path {
        self.0.files.root()
    }

    async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Filesystem) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = Arc::clone(&self.0);
        match tokio::task::spawn_blocking(move || call(&store.files)).await {
            Ok(result) => result,
            Err(e) => match e.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(e) => Err(StoreError::new("use", self.root(), io::Error::other(e))),
            },
        }
    }

    /// Opens a blob, if it is here.
    pub async fn blob(&self, digest: &Digest) -> Result<Option<Blob>, StoreError> {
        let digest = digest.clone();
        self.run(move |store| store.blob(&digest)).await
    }

    /// Whether a repository is known to have a blob.
    pub async fn has_link(&self, of: &Repository, digest: &Digest) -> Result<bool, StoreError> {
        let (repository, digest) = (of.clone(), digest.clone());
        self.run(move |store| store.has_link(&repository, &digest))
            .await
    }

    /// Whether a manifest of a repository names a blob.
    pub async fn names_layer(&self, of: &Repository, digest: &Digest) -> Result<bool, StoreError> {
        let (repository, digest) = (of.clone(), digest.clone());
        self.run(move |store| store.names_layer(&repository, &digest))
            .await
    }

    /// Records that a repository has a blob, whose bytes must be here already.
    pub async fn link_layer(&self, of: &Repository, digest: &Digest) -> Result<(), StoreError> {
        let (repository, digest) = (of.clone(), digest.clone());
        self.run(move |store| store.link_layer(&repository, &digest))
            .await
    }

    /// Reads a manifest of a repository, if it is here.
    pub async fn manifest(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<Option<Arc<Manifest>>, StoreError> {
        let key = (of.clone(), digest.clone());
        // The place is held while the file is read: what is written meanwhile takes it away, so
        // that what was read can't cover what is newer.
        let place = match self.0.manifests.get_value_or_guard_async(&key).await {
            Ok(manifest) => return Ok(Some(manifest)),
            Err(place) => place,
        };
        let read = self.run(move |store| store.manifest(&key.0, &key.1));
        let Some(manifest) = read.await?.map(Arc::new) else {
            return Ok(None);
        };
        let _ = place.insert(Arc::clone(&manifest));
        Ok(Some(manifest))
    }

    /// Which manifest a tag is, and when that was last confirmed.
    pub async fn tag(&self, of: &Repository, tag: &Tag) -> Result<Option<TagLink>, StoreError> {
        let key = (of.clone(), tag.clone());
        let place = match self.0.tags.get_value_or_guard_async(&key).await {
            Ok(link) => return Ok(Some(link)),
            Err(place) => place,
        };
        let read = self.run(move |store| store.tag(&key.0, &key.1));
        let Some(link) = read.await? else {
            return Ok(None);
        };
        let _ = place.insert(link.clone());
        Ok(Some(link))
    }

    /// Stores a manifest for a repository, and moves `tag` to it.
    pub async fn put_manifest(
        &self,
        of: &Repository,
        manifest: &Arc<Manifest>,
        tag: Option<&Tag>,
    ) -> Result<(), StoreError> {
        let (repository, written) = (of.clone(), Arc::clone(manifest));
        self.run(move |store| store.put_manifest(&repository, &written))
            .await?;
        let key = (of.clone(), manifest.digest.clone());
        self.0.manifests.insert(key, Arc::clone(manifest));
        match tag {
            Some(tag) => self.put_tag(of, tag, &manifest.digest).await,
            None => Ok(()),
        }
    }

    /// Moves a tag to a manifest that is stored already, as confirmed now.
    pub async fn put_tag(
        &self,
        of: &Repository,
        tag: &Tag,
        digest: &Digest,
    ) -> Result<(), StoreError> {
        let (repository, moved, to) = (of.clone(), tag.clone(), digest.clone());
        self.run(move |store| store.put_tag(&repository, &moved, &to))
            .await?;
        self.confirmed(of, tag, digest);
        Ok(())
    }

    /// Records that the upstream has confirmed now that a tag is the manifest it was.
    pub async fn confirm_tag(
        &self,
        of: &Repository,
        tag: &Tag,
        digest: &Digest,
    ) -> Result<(), StoreError> {
        let (repository, confirmed) = (of.clone(), tag.clone());
        let touched = self.run(move |store| store.confirm_tag(&repository, &confirmed));
        match touched.await {
            Ok(()) => {
                self.confirmed(of, tag, digest);
                Ok(())
            }
            Err(error) => {
                // A repair took the link, and maybe the manifest: both are fetched and stored again
                // at the next request.
                if error.is_absent() {
                    self.0.tags.remove(&(of.clone(), tag.clone()));
                    self.0.manifests.remove(&(of.clone(), digest.clone()));
                }
                Err(error)
            }
        }
    }

    fn confirmed(&self, of: &Repository, tag: &Tag, digest: &Digest) {
        let link = TagLink {
            digest: digest.clone(),
            confirmed: SystemTime::now(),
        };
        self.0.tags.insert((of.clone(), tag.clone()), link);
    }

    /// What was last kept of the referrers of a manifest.
    pub async fn referrers(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<Option<Vec<Value>>, StoreError> {
        let (repository, digest) = (of.clone(), digest.clone());
        self.run(move |store| store.referrers(&repository, &digest))
            .await
    }

    /// Keeps the referrers of a manifest.
    pub async fn put_referrers(
        &self,
        of: &Repository,
        digest: &Digest,
        list: &[Value],
    ) -> Result<(), StoreError> {
        let (repository, digest, list) = (of.clone(), digest.clone(), list.to_vec());
        self.run(move |store| store.put_referrers(&repository, &digest, &list))
            .await
    }

    /// The tags of a repository, sorted.
    pub async fn tags(&self, of: &Repository) -> Result<Vec<Tag>, StoreError> {
        let repository = of.clone();
        self.run(move |store| store.tags(&repository)).await
    }

    /// The repositories that have manifests, sorted.
    pub async fn repositories(&self) -> Result<Vec<Repository>, StoreError> {
        self.run(Filesystem::repositories).await
    }

    /// Opens the file that a blob is downloaded into.
    pub async fn open_fill(&self, digest: &Digest) -> Result<Partial, StoreError> {
        let digest = digest.clone();
        self.run(move |store| store.open_fill(&digest)).await
    }

    /// Appends to a download. The partial is lost with an error.
    pub async fn append(
        &self,
        mut partial: Partial,
        bytes: Vec<Bytes>,
    ) -> Result<Partial, StoreError> {
        self.run(move |_| {
            for piece in bytes {
                partial.append(&piece)?;
            }
            Ok(partial)
        })
        .await
    }

    /// Makes a download that has been verified a blob of a repository.
    pub async fn commit_fill(
        &self,
        of: &Repository,
        digest: &Digest,
        partial: Partial,
    ) -> Result<(), StoreError> {
        let (repository, digest) = (of.clone(), digest.clone());
        self.run(move |store| {
            store.commit_fill(&digest, &partial)?;
            store.link_layer(&repository, &digest)
        })
        .await
    }

    /// Removes a download that is not what it should be.
    pub async fn discard_fill(&self, digest: &Digest) -> Result<(), StoreError> {
        let digest = digest.clone();
        self.run(move |store| store.discard_fill(&digest)).await
    }

    /// Proves that the store can be written and read back.
    pub async fn probe(&self) -> Result<(), StoreError> {
        self.run(Filesystem::probe).await
    }

    /// The disk that holds the store.
    pub async fn disk(&self) -> Result<Disk, StoreError> {
        self.run(Filesystem::disk).await
    }
}
