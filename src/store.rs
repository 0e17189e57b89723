//! Where blobs, manifests and tags are kept. The files are the truth: nothing is kept in memory
//! that can't be read again, and opening a store never scans it.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use nix::errno::Errno;
use quick_cache::sync::Cache;
use quick_cache::{Equivalent, Weighter};
use serde_json::Value;

pub mod audit;
mod catalog;
pub mod collect;
pub mod filesystem;
pub mod layout;
pub mod lease;
mod own;
mod part;
mod partial;
pub mod s3;
mod sweep;
pub mod upload;
mod usage;

pub use catalog::Page;
pub use part::{Blob, FilePart};
pub use partial::Partial;
pub use sweep::{Removed, Stored};

use filesystem::{Disk, Filesystem, USE_INTERVAL};
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

    /// Whether the disk itself is broken: it is read-only, gone, or fails.
    pub fn is_of_the_disk(&self) -> bool {
        let Self::Io { source, .. } = self else {
            return false;
        };
        let broken = [
            Errno::EROFS,
            Errno::EIO,
            Errno::ENODEV,
            Errno::ENXIO,
            Errno::EUCLEAN,
            Errno::ESTALE,
            Errno::ENOTCONN,
        ];
        let errno = source.raw_os_error().map(Errno::from_raw);
        errno.is_some_and(|errno| broken.contains(&errno))
    }

    /// Whether the disk is full, or this user's share of it.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ))
    }
}

/// A download, and what it did not take of what was to be appended.
pub struct Appended {
    /// The download.
    pub partial: Partial,
    /// What is not in it, and why.
    pub refused: Option<(VecDeque<Bytes>, StoreError)>,
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
    manifests: Cache<(Repository, Digest), Arc<Kept>, BySize>,
    tags: Cache<(Repository, Tag), TagLink>,
    opened: Instant,
}

/// A manifest in memory.
#[derive(Debug)]
struct Kept {
    manifest: Arc<Manifest>,
    /// When its file was last told that it is used, in seconds since the store was opened.
    touched: AtomicU64,
}

impl Inner {
    fn seconds(&self) -> u64 {
        self.opened.elapsed().as_secs()
    }

    fn kept(&self, manifest: Arc<Manifest>) -> Arc<Kept> {
        Arc::new(Kept {
            manifest,
            touched: self.seconds().into(),
        })
    }

    /// Whether this use of a manifest in memory is the one to be told its file.
    fn is_to_be_told(&self, kept: &Kept) -> bool {
        let (now, before) = (self.seconds(), kept.touched.load(Ordering::Relaxed));
        now - before >= USE_INTERVAL.as_secs()
            && kept
                .touched
                .compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }
}

/// The key of something of a repository, to look it up without making one.
#[derive(Hash)]
struct Key<'a, T>(&'a Repository, &'a T);

impl<T: Eq> Equivalent<(Repository, T)> for Key<'_, T> {
    fn equivalent(&self, key: &(Repository, T)) -> bool {
        (self.0, self.1) == (&key.0, &key.1)
    }
}

/// Weighs a manifest by the memory it takes, about.
#[derive(Debug, Clone)]
struct BySize;

impl Weighter<(Repository, Digest), Arc<Kept>> for BySize {
    fn weight(&self, _: &(Repository, Digest), kept: &Arc<Kept>) -> u64 {
        let manifest = &kept.manifest;
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
            opened: Instant::now(),
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
        self.run_whole(move |store| call(&store.files)).await
    }

    async fn run_whole<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = Arc::clone(&self.0);
        match tokio::task::spawn_blocking(move || call(&store)).await {
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

    /// Records that a repository has a blob, whose bytes must be here already. What is pushed here
    /// is not touched by this and the like, which keep what comes from an upstream: a download may
    /// end after its name was hosted.
    pub async fn link_layer(&self, of: &Repository, digest: &Digest) -> Result<(), StoreError> {
        if self.is_marked(of) {
            return Ok(());
        }
        let (repository, digest) = (of.clone(), digest.clone());
        self.run(move |store| store.link_layer(&repository, &digest))
            .await
    }

    /// Reads a manifest of a repository, if it is here, which counts as its use.
    pub async fn manifest(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<Option<Arc<Manifest>>, StoreError> {
        let key = (of.clone(), digest.clone());
        // The place is held while the file is read: what is written meanwhile takes it away, so
        // that what was read can't cover what is newer.
        let place = match self.0.manifests.get_value_or_guard_async(&key).await {
            Ok(kept) => return Ok(Some(self.used(&kept))),
            Err(place) => place,
        };
        let read = self.run(move |store| {
            let manifest = store.manifest(&key.0, &key.1)?;
            if manifest.is_some() {
                store.touch(&key.1);
            }
            Ok(manifest)
        });
        let Some(manifest) = read.await?.map(Arc::new) else {
            return Ok(None);
        };
        let _ = place.insert(self.0.kept(Arc::clone(&manifest)));
        Ok(Some(manifest))
    }

    /// A manifest of a repository, where it is in memory.
    pub fn recent_manifest(&self, of: &Repository, digest: &Digest) -> Option<Arc<Manifest>> {
        let kept = self.0.manifests.get(&Key(of, digest))?;
        Some(self.used(&kept))
    }

    /// Which manifest a tag is, where that is in memory.
    pub fn recent_tag(&self, of: &Repository, tag: &Tag) -> Option<TagLink> {
        self.0.tags.get(&Key(of, tag))
    }

    /// Gives what is in memory, and notes in the files, now and then, that it is in use.
    fn used(&self, kept: &Kept) -> Arc<Manifest> {
        if self.0.is_to_be_told(kept) {
            let (store, digest) = (Arc::clone(&self.0), kept.manifest.digest.clone());
            tokio::task::spawn_blocking(move || store.files.touch(&digest));
        }
        Arc::clone(&kept.manifest)
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
        if self.is_marked(of) {
            return Ok(());
        }
        let key = (of.clone(), manifest.digest.clone());
        let manifest_of = Arc::clone(manifest);
        self.run_whole(move |store| {
            // It is not evicted from the files before it is in memory, nor between its files.
            let _lease = store.files.leases.take(&key.1);
            store.files.put_manifest(&key.0, &manifest_of)?;
            store.manifests.insert(key, store.kept(manifest_of));
            Ok(())
        })
        .await?;
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
        if self.is_marked(of) {
            return Ok(());
        }
        let (repository, moved, to) = (of.clone(), tag.clone(), digest.clone());
        self.run(move |store| store.put_tag(&repository, &moved, &to))
            .await?;
        self.confirmed(of, tag, digest);
        Ok(())
    }

    /// Keeps what a tag was at some time, where nothing is known of it: what is, may be newer.
    pub async fn put_new_tag(
        &self,
        of: &Repository,
        tag: &Tag,
        link: TagLink,
    ) -> Result<(), StoreError> {
        if self.is_marked(of) {
            return Ok(());
        }
        let (repository, named, kept) = (of.clone(), tag.clone(), link.clone());
        let put = self.run(move |store| {
            let new = store.tag(&repository, &named)?.is_none();
            if new {
                store.put_tag(&repository, &named, &kept.digest)?;
                store.confirm_tag(&repository, &named, kept.confirmed)?;
            }
            Ok(new)
        });
        if put.await? {
            self.0.tags.insert((of.clone(), tag.clone()), link);
        }
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
        let now = SystemTime::now();
        let touched = self.run(move |store| store.confirm_tag(&repository, &confirmed, now));
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

    /// Whether something was kept of a repository that perhaps only an account could see, and it has
    /// not been proved since that everybody can.
    pub fn is_shared(&self, repository: &Repository) -> bool {
        self.0.files.is_shared(repository)
    }

    /// Whether everybody could see a repository when that was last noted.
    pub async fn is_public(&self, repository: &Repository) -> Result<bool, StoreError> {
        let repository = repository.clone();
        self.run(move |store| store.is_public(&repository)).await
    }

    /// Notes whether everybody can see a repository.
    pub async fn set_public(&self, of: &Repository, public: bool) -> Result<(), StoreError> {
        let repository = of.clone();
        self.run(move |store| store.set_public(&repository, public))
            .await
    }

    /// A page of the tags of a repository, in their order.
    pub async fn tags(&self, of: &Repository, page: Page) -> Result<Vec<Tag>, StoreError> {
        let repository = of.clone();
        self.run(move |store| store.tags(&repository, &page)).await
    }

    /// A page of the repositories that have manifests, in the order of their names.
    pub async fn repositories(&self, page: Page) -> Result<Vec<Repository>, StoreError> {
        self.run(move |store| store.repositories(&page)).await
    }

    /// Opens the file that a blob is downloaded into.
    pub async fn open_fill(&self, digest: &Digest) -> Result<Partial, StoreError> {
        let digest = digest.clone();
        self.run(move |store| store.open_fill(&digest)).await
    }

    /// Appends to a download.
    pub async fn append(
        &self,
        mut partial: Partial,
        mut bytes: VecDeque<Bytes>,
    ) -> Result<Appended, StoreError> {
        self.run(move |_| {
            let mut refused = None;
            while let Some(piece) = bytes.front() {
                if let Err(error) = partial.append(piece) {
                    refused = Some((bytes, error));
                    break;
                }
                bytes.pop_front();
            }
            Ok(Appended { partial, refused })
        })
        .await
    }

    /// Brings a download to the disk. What could not be, never can: the disk may have lost it.
    pub async fn sync_fill(&self, partial: &Arc<Partial>) -> Result<(), StoreError> {
        let partial = Arc::clone(partial);
        self.run(move |_| partial.sync()).await
    }

    /// Makes a download that has been verified and synced a blob of a repository, and says whether
    /// that could be linked as well: at once, so that hardly anybody finds the one without the other.
    pub async fn commit_fill(
        &self,
        of: &Repository,
        digest: &Digest,
        partial: &Arc<Partial>,
    ) -> Result<bool, StoreError> {
        let (repository, digest, partial) = (of.clone(), digest.clone(), Arc::clone(partial));
        self.run(move |store| {
            store.commit_fill(&digest, &partial)?;
            Ok(store.is_own(&repository) || store.link_layer(&repository, &digest).is_ok())
        })
        .await
    }

    /// Brings the downloads to the disk, for the process after this one to go on with.
    pub async fn sync_fills(&self) -> Result<(), StoreError> {
        self.run(Filesystem::sync_fills).await
    }

    /// Removes a download that is not what it should be.
    pub async fn discard_fill(&self, digest: &Digest) -> Result<(), StoreError> {
        let digest = digest.clone();
        self.run(move |store| store.discard_fill(&digest)).await
    }

    /// The bytes of all blobs and manifests; `None` before they were counted.
    pub fn bytes(&self) -> Option<u64> {
        self.0.files.usage.bytes()
    }

    /// Counts the bytes of all blobs and manifests. Not to be called while it, or
    /// [`Self::inventory`] or [`Self::remove`], is under way.
    pub async fn count(&self) -> Result<(), StoreError> {
        self.run(Filesystem::count).await
    }

    /// The bytes of all downloads, those that are under way and those that were given up.
    pub async fn fill_bytes(&self) -> Result<u64, StoreError> {
        self.run(Filesystem::fill_bytes).await
    }

    /// All blobs and manifests, sorted by digest, and after them all downloads. It counts their bytes as well.
    pub async fn inventory(&self) -> Result<Vec<Stored>, StoreError> {
        self.run(Filesystem::inventory).await
    }

    /// Removes of what [`Self::inventory`] has listed what is at these places, unless it is being
    /// used now.
    pub async fn remove(
        &self,
        listed: Vec<Stored>,
        places: Vec<usize>,
    ) -> Result<Removed, StoreError> {
        self.run_whole(move |store| {
            let victims: Vec<&Stored> = places.into_iter().map(|at| &listed[at]).collect();
            store.files.remove(&victims, |digest, repositories, tags| {
                for repository in repositories {
                    store
                        .manifests
                        .remove(&(repository.clone(), digest.clone()));
                }
                for tag in tags {
                    store.tags.remove(tag);
                }
            })
        })
        .await
    }

    /// Removes what nobody waits for any longer, downloads that were given up and referrers of what
    /// is not here, and says how many bytes the downloads had.
    pub async fn remove_stale(&self) -> Result<u64, StoreError> {
        self.run(|store| {
            let now = SystemTime::now();
            store.remove_stale_referrers(now)?;
            store.remove_stale_fills(now)
        })
        .await
    }

    /// Removes downloads that were given up, and says how many bytes they had.
    pub async fn remove_stale_fills(&self) -> Result<u64, StoreError> {
        self.run(|store| store.remove_stale_fills(SystemTime::now()))
            .await
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_borrowed_key_finds_what_is_under_an_owned_one() {
        let repository = |path: &str| Repository::from_path(path.to_owned());
        let (one, other) = (repository("library/one"), repository("library/other"));
        let tag: Tag = "latest".parse().unwrap();
        let cache = Cache::new(4);
        cache.insert((one.clone(), tag.clone()), 1);
        assert_eq!(cache.get(&Key(&one, &tag)), Some(1));
        assert_eq!(cache.get(&Key(&other, &tag)), None);
    }
}
