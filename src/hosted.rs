//! What is pushed here: pulls, pushes, lists and deletes of hosted names, which no upstream is ever
//! asked for. What is on the disk is the truth, or, for a writer of one, what is in the bucket:
//! then pulls are the mirror's, with the bucket for its upstream.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::MutexGuard;

mod bucket;
mod payload;
pub mod tokens;
mod uploads;
pub mod users;

pub use payload::{Payload, Unread};
pub use uploads::{Chunk, Held};

use bucket::{InBucket, Pushing};
use uploads::Uploads;

use crate::config::{HostedSettings, Role, Serving, Sparse, Storage};
use crate::metrics::Metrics;
use crate::mirror::Mirror;
use crate::oci::{
    Digest, MANIFEST_LIMIT, Manifest, Name, Patterns, Pushed, PushedError, Reference, RegistryHost,
    Subject, Tag,
};
use crate::store::layout::Repository;
use crate::store::s3::BucketError;
use crate::store::{Blob, Page, Store, StoreError};

/// How many writes to manifests and tags go on at once; those to one repository never do.
const ORDERS: usize = 64;
/// The most descriptors that a page of referrers has.
const REFERRERS: usize = 1000;
/// The most bytes of descriptors that it has: annotations may be large, and clients read no larger
/// index than the largest manifest.
const REFERRERS_BYTES: usize = MANIFEST_LIMIT;

/// Something of a hosted name can't be had, or done.
#[derive(Debug, thiserror::Error)]
pub enum HostedError {
    /// The repository has no such blob.
    #[error("{0} has no blob {1}")]
    BlobUnknown(Repository, Digest),
    /// The repository has no such manifest or tag.
    #[error("{0} has no manifest {1}")]
    ManifestUnknown(Repository, Reference),
    /// Nothing was ever pushed to the repository.
    #[error("nothing has been pushed to {0}")]
    NameUnknown(Repository),
    /// There is no such upload, or there is no longer.
    #[error("there is no such upload: it has ended, was cancelled, or was given up after a day")]
    UploadUnknown,
    /// Another request goes on with the upload.
    #[error("another request is going on with this upload")]
    UploadBusy,
    /// A chunk does not follow what is there.
    #[error("the chunk begins at byte {start}, and {length} bytes are here")]
    OutOfOrder {
        /// Where the chunk begins.
        start: u64,
        /// How much is there.
        length: u64,
    },
    /// A chunk is not as long as it says.
    #[error("the request says that it has {said} bytes, and {received} came")]
    WrongSize {
        /// How long it is said to be.
        said: u64,
        /// How long it is, or more.
        received: u64,
    },
    /// What was sent has another digest.
    #[error("what was sent is {found}, not {said}: nothing of it was kept")]
    Mismatch {
        /// What it was said to be.
        said: Digest,
        /// What it is.
        found: Digest,
    },
    /// The client has left, or let its time pass.
    #[error("the request has broken off: {0}")]
    Broken(io::Error),
    /// The manifest is none.
    #[error("{0}")]
    Manifest(#[from] PushedError),
    /// The manifest refers to what is not here.
    #[error("the manifest refers to what {0} does not have: push that first")]
    Lacks(Repository, Vec<Digest>),
    /// The tag stays what it is.
    #[error("{0}:{1} is immutable (`immutable_tags`), and is {2}")]
    Immutable(Repository, Tag, Digest),
    /// Another agent takes pushes for this name.
    #[error("this registry takes pushes for {shard} alone (`shard`), and not for {name}")]
    OtherShard {
        /// What was to be pushed to.
        name: Repository,
        /// What could be.
        shard: String,
    },
    /// This instance leaves its fleet.
    #[error("this registry is about to go, and takes no new uploads: try again, at another one")]
    Leaving,
    /// Nothing can be deleted.
    #[error("nothing can be deleted from this registry: `delete` is false in its configuration")]
    NoDeletes,
    /// Another writer has moved the tag since this push began.
    #[error("another writer has moved {0}:{1} meanwhile: look at what it is now, and push again")]
    Moved(Repository, Tag),
    /// The storage has failed.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// The bucket could not be read or written.
    #[error("{0}")]
    Bucket(#[from] BucketError),
}

/// A page of referrers.
pub struct ReferrersPage {
    /// Their descriptors.
    pub descriptors: Vec<Value>,
    /// The last that was looked at, where there are more.
    pub more_after: Option<Digest>,
}

/// The hosted names. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct Hosted(Arc<Inner>);

/// Where what is pushed is kept.
enum Home {
    /// In the store, which is also where it is received.
    Disk,
    /// In a bucket; the store has what is being received, and a cache.
    Bucket(Box<InBucket>),
}

struct Inner {
    home: Home,
    store: Store,
    /// Makes room for pushes, where the disk is full of what can be fetched again.
    room: Mirror,
    metrics: Arc<Metrics>,
    uploads: Uploads,
    /// No upload is begun any more.
    leaving: AtomicBool,
    /// Held while manifests and tags of some repositories change.
    orders: [tokio::sync::Mutex<()>; ORDERS],
}

/// Which hosted repository a request is about: none where it is about an upstream's.
pub fn repository(settings: &HostedSettings, name: &Name, ns: Option<&str>) -> Option<Repository> {
    if settings.names.is_empty() {
        return None;
    }
    // What is hosted stands where Docker Hub's would, and is never another registry's.
    let of_hub = |host: &str| {
        host.parse::<RegistryHost>()
            .is_ok_and(|it| it.is_docker_hub())
    };
    if ns.is_some_and(|ns| !of_hub(ns)) {
        return None;
    }
    let rest = name
        .first()
        .filter(|first| of_hub(first))
        .and_then(|_| name.rest());
    let name = rest.as_ref().unwrap_or(name);
    let hosted = settings.names.matches(name.as_str());
    hosted.then(|| Repository::hosted(name))
}

impl Hosted {
    /// The hosted names over the mirror's storage, or in the bucket of a writer.
    pub fn new(serving: &Serving, room: Mirror, metrics: Arc<Metrics>) -> Self {
        let home = match (serving.role, &serving.storage) {
            // The only place where something is made that can write to a bucket.
            (Role::Writer, Storage::S3 { bucket, .. }) => {
                let settings = bucket.as_ref().clone();
                Home::Bucket(Box::new(InBucket::new(settings, room.clone())))
            }
            _ => Home::Disk,
        };
        Self(Arc::new(Inner {
            home,
            store: room.store().clone(),
            room,
            metrics,
            uploads: Uploads::default(),
            leaving: AtomicBool::new(false),
            orders: std::array::from_fn(|_| tokio::sync::Mutex::default()),
        }))
    }

    /// Begins no upload from now on. Those that were begun go on.
    pub fn refuse_uploads(&self) {
        self.0.leaving.store(true, Ordering::Relaxed);
    }

    /// Tells the storage which names are hosted there.
    pub fn tell(store: &Store, serving: &Serving) {
        match &serving.storage {
            Storage::Filesystem { .. } => {
                store.host(serving.hosted.names.clone(), serving.hosted.adopt.clone());
            }
            // All that is on the disk is a cache.
            Storage::S3 { .. } => store.host(Patterns::default(), Patterns::default()),
        }
    }

    /// Whether what is hosted is in a bucket: then it is pulled as a reader's.
    pub fn is_in_bucket(&self) -> bool {
        matches!(self.0.home, Home::Bucket(_))
    }

    fn pushing(&self) -> Option<Pushing<'_>> {
        match &self.0.home {
            Home::Disk => None,
            Home::Bucket(bucket) => Some(Pushing {
                bucket,
                cache: &self.0.room,
            }),
        }
    }

    /// Removes the uploads that were given up.
    pub async fn remove_stale_uploads(&self) {
        if let Home::Bucket(bucket) = &self.0.home {
            match bucket.abort_stale_uploads().await {
                Ok(0) => {}
                Ok(uploads) => {
                    tracing::info!(uploads, "unfinished uploads to the bucket were aborted");
                }
                Err(error) => {
                    tracing::warn!(%error, "unfinished uploads to the bucket could not be aborted: {error}");
                }
            }
        }
        let any = self.is_in_bucket();
        match self.0.store.remove_stale_uploads(any).await {
            Ok(0) => {}
            Ok(uploads) => tracing::info!(uploads, "uploads that were given up were removed"),
            Err(error) => {
                tracing::warn!(%error, "uploads that were given up could not be removed: {error}");
            }
        }
    }

    async fn order(&self, of: &Repository) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        of.hash(&mut hasher);
        let place = usize::try_from(hasher.finish() % ORDERS as u64).unwrap_or(0);
        self.0.orders[place].lock().await
    }

    /// Makes a repository one of our own, before anything is written to it.
    async fn claim(&self, of: &Repository) -> Result<(), HostedError> {
        if self.is_in_bucket() {
            return Ok(());
        }
        let claim = || self.0.store.claim(of);
        if self.0.room.with_room(0, claim).await? {
            tracing::warn!(
                repository = %of,
                "what was cached of {of} from an upstream is set aside: it is hosted, and the \
                 first push to it has come"
            );
        }
        Ok(())
    }

    /// Whether a push to a repository is taken here.
    pub fn check_push(settings: &HostedSettings, of: &Repository) -> Result<(), HostedError> {
        match &settings.shard {
            Some(shard) if !shard.matches(of.as_str()) => Err(HostedError::OtherShard {
                name: of.clone(),
                shard: shard.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// A blob of a repository.
    pub async fn blob(&self, of: &Repository, digest: &Digest) -> Result<Blob, HostedError> {
        let store = &self.0.store;
        let unknown = || HostedError::BlobUnknown(of.clone(), digest.clone());
        if !store.is_own(of) {
            return Err(unknown());
        }
        // In this order: while it is open no collection takes the link, nor for a while afterwards.
        let blob = store.blob(digest).await?.ok_or_else(unknown)?;
        if !store.has_link(of, digest).await? {
            return Err(unknown());
        }
        self.0.metrics.blob_hits.inc();
        Ok(blob)
    }

    /// A manifest that is in memory.
    pub fn manifest_at_once(
        &self,
        of: &Repository,
        reference: &Reference,
    ) -> Option<Arc<Manifest>> {
        let store = &self.0.store;
        if !store.is_own(of) {
            return None;
        }
        let manifest = match reference {
            Reference::Digest(digest) => store.recent_manifest(of, digest),
            Reference::Tag(tag) => store.recent_manifest(of, &store.recent_tag(of, tag)?.digest),
        }?;
        self.0.metrics.manifest_hits.inc();
        Some(manifest)
    }

    /// A manifest by tag or digest.
    pub async fn manifest(
        &self,
        of: &Repository,
        reference: &Reference,
    ) -> Result<Arc<Manifest>, HostedError> {
        let store = &self.0.store;
        let unknown = || HostedError::ManifestUnknown(of.clone(), reference.clone());
        self.check_exists(of).await?;
        let digest = match reference {
            Reference::Digest(digest) => digest.clone(),
            Reference::Tag(tag) => store.tag(of, tag).await?.ok_or_else(unknown)?.digest,
        };
        let manifest = store.manifest(of, &digest).await?.ok_or_else(unknown)?;
        self.0.metrics.manifest_hits.inc();
        Ok(manifest)
    }

    /// Whether anything was ever pushed to a repository.
    async fn check_exists(&self, of: &Repository) -> Result<(), HostedError> {
        let store = &self.0.store;
        if store.is_marked(of) || store.is_own(of) && store.has_any(of).await? {
            return Ok(());
        }
        Err(HostedError::NameUnknown(of.clone()))
    }

    /// A page of a repository's tags: `last` excluded, at most `limit`; and whether there are more.
    pub async fn tags(
        &self,
        of: &Repository,
        limit: usize,
        last: Option<&str>,
    ) -> Result<(Vec<String>, bool), HostedError> {
        self.check_exists(of).await?;
        if limit == 0 {
            return Ok((Vec::new(), false));
        }
        let page = Page {
            after: last.unwrap_or_default().to_owned(),
            // Whether there are more is told by one more.
            limit: limit.saturating_add(1),
        };
        let tags = self.0.store.tags(of, page).await?;
        let more = tags.len() > limit;
        let tags = tags.iter().take(limit).map(ToString::to_string).collect();
        Ok((tags, more))
    }

    /// A page of what says that it is about a manifest, after `last`, and of one type where one is
    /// said: manifests with it as their `subject`, also those that a client from before the API has
    /// listed under the fallback tag.
    pub async fn referrers(
        &self,
        of: &Repository,
        subject: &Digest,
        artifact_type: Option<&str>,
        last: Option<&Digest>,
    ) -> Result<ReferrersPage, HostedError> {
        let store = &self.0.store;
        let mut page = ReferrersPage {
            descriptors: Vec::new(),
            more_after: None,
        };
        if !store.is_own(of) {
            return Ok(page);
        }
        let mut about = store.about(of, subject).await?;
        if let Some(list) = self.fallback(of, subject).await? {
            about.extend(list.manifests.iter().cloned());
            about.sort_unstable();
            about.dedup();
        }
        let mut bytes = 0;
        for digest in about {
            if last.is_some_and(|last| digest <= *last) {
                continue;
            }
            if page.descriptors.len() == REFERRERS {
                page.more_after = last_of(&page.descriptors);
                break;
            }
            let Some(manifest) = store.manifest(of, &digest).await? else {
                continue;
            };
            let Some(referrer) = Subject::of(&manifest).filter(|it| it.digest == *subject) else {
                continue;
            };
            if artifact_type.is_some_and(|wanted| referrer.artifact_type.as_deref() != Some(wanted))
            {
                continue;
            }
            bytes += referrer.descriptor.to_string().len();
            if bytes > REFERRERS_BYTES && !page.descriptors.is_empty() {
                page.more_after = last_of(&page.descriptors);
                break;
            }
            page.descriptors.push(referrer.descriptor);
        }
        Ok(page)
    }

    /// The list of referrers that a client from before the API keeps. Source: distribution-spec 1.1,
    /// "Referrers Tag Schema".
    async fn fallback(
        &self,
        of: &Repository,
        subject: &Digest,
    ) -> Result<Option<Arc<Manifest>>, HostedError> {
        let hex = &subject.hex()[..64];
        let Ok(tag) = format!("{}-{hex}", subject.algorithm().as_str()).parse::<Tag>() else {
            return Ok(None);
        };
        let Some(link) = self.0.store.tag(of, &tag).await? else {
            return Ok(None);
        };
        Ok(self.0.store.manifest(of, &link.digest).await?)
    }

    /// Takes a manifest, and moves `tags` to it; gives what it is about.
    pub async fn push_manifest(
        &self,
        settings: &HostedSettings,
        of: &Repository,
        (bytes, digest, content_type): (Bytes, Digest, Option<&str>),
        tags: &[Tag],
    ) -> Result<Option<Digest>, HostedError> {
        let Pushed {
            manifest,
            blobs,
            subject,
        } = Pushed::parse(bytes, digest, content_type)?;
        self.claim(of).await?;
        let _order = self.order(of).await;
        let manifests = match settings.sparse {
            Sparse::Never => manifest.manifests.clone(),
            Sparse::Indexes | Sparse::Always => Vec::new(),
        };
        let size = manifest.bytes.len() as u64;
        let manifest = Arc::new(manifest);
        if let Some(pushing) = self.pushing() {
            let blobs = match settings.sparse {
                Sparse::Always => Vec::new(),
                Sparse::Never | Sparse::Indexes => blobs,
            };
            pushing
                .put_manifest(settings, of, &manifest, tags, (blobs, manifests))
                .await?;
            self.0.metrics.pushed_bytes.inc_by(size);
            return Ok(subject);
        }
        for tag in tags {
            self.check_moves(settings, of, tag, Some(&manifest.digest))
                .await?;
        }
        // Whether or not any may be missing: what is here is in use from now on.
        let lacking = self.0.store.lacks(of, blobs, manifests).await?;
        if settings.sparse != Sparse::Always && !lacking.is_empty() {
            return Err(HostedError::Lacks(of.clone(), lacking));
        }
        let put = || self.0.store.put_own_manifest(of, &manifest, tags);
        self.0.room.with_room(size, put).await?;
        self.0.metrics.pushed_bytes.inc_by(size);
        Ok(subject)
    }

    /// Whether a tag may become another manifest, or none.
    async fn check_moves(
        &self,
        settings: &HostedSettings,
        of: &Repository,
        tag: &Tag,
        to: Option<&Digest>,
    ) -> Result<(), HostedError> {
        if settings.immutable_tags.is_empty() {
            return Ok(());
        }
        let now = self.0.store.tag(of, tag).await?.map(|link| link.digest);
        Self::check_immutable(settings, of, tag, now.as_ref(), to)
    }

    /// Whether a tag that is `now` may become `to`.
    fn check_immutable(
        settings: &HostedSettings,
        of: &Repository,
        tag: &Tag,
        now: Option<&Digest>,
        to: Option<&Digest>,
    ) -> Result<(), HostedError> {
        match now {
            Some(now)
                if Some(now) != to && settings.immutable_tags.matches(&format!("{of}:{tag}")) =>
            {
                let now = now.clone();
                Err(HostedError::Immutable(of.clone(), tag.clone(), now))
            }
            _ => Ok(()),
        }
    }

    /// Removes a tag, or a manifest with all tags that are it. Nobody is given them once this has
    /// returned.
    pub async fn delete_manifest(
        &self,
        settings: &HostedSettings,
        of: &Repository,
        reference: &Reference,
    ) -> Result<(), HostedError> {
        if !settings.delete {
            return Err(HostedError::NoDeletes);
        }
        let unknown = || HostedError::ManifestUnknown(of.clone(), reference.clone());
        if let Some(pushing) = self.pushing() {
            let _order = self.order(of).await;
            if pushing.delete_manifest(settings, of, reference).await? {
                return Ok(());
            }
            return Err(if pushing.exists(of).await? {
                unknown()
            } else {
                HostedError::NameUnknown(of.clone())
            });
        }
        self.check_exists(of).await?;
        self.claim(of).await?;
        let store = &self.0.store;
        let _order = self.order(of).await;
        let deleted = match reference {
            Reference::Tag(tag) => {
                self.check_moves(settings, of, tag, None).await?;
                store.delete_tag(of, tag).await?
            }
            Reference::Digest(digest) => {
                let tags = store.tags_of(of, digest).await?;
                for tag in &tags {
                    self.check_moves(settings, of, tag, None).await?;
                }
                for tag in &tags {
                    store.delete_tag(of, tag).await?;
                }
                store.delete_manifest(of, digest).await?
            }
        };
        deleted.then_some(()).ok_or_else(unknown)
    }

    /// Removes a blob from a repository. Nobody is given it there once this has returned.
    pub async fn delete_blob(
        &self,
        settings: &HostedSettings,
        of: &Repository,
        digest: &Digest,
    ) -> Result<(), HostedError> {
        if !settings.delete {
            return Err(HostedError::NoDeletes);
        }
        let unknown = || HostedError::BlobUnknown(of.clone(), digest.clone());
        if let Some(pushing) = self.pushing() {
            let deleted = pushing.delete_blob(of, digest).await?;
            return deleted.then_some(()).ok_or_else(unknown);
        }
        if !self.0.store.is_own(of) {
            return Err(unknown());
        }
        self.claim(of).await?;
        if self.0.store.unlink_layer(of, digest).await? {
            Ok(())
        } else {
            Err(unknown())
        }
    }

    /// The size of a blob of a repository in the bucket, for a client that leaves out of its push what
    /// is there.
    pub async fn use_layer(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<Option<u64>, HostedError> {
        match &self.0.home {
            Home::Bucket(bucket) => Ok(bucket.use_layer(of, digest).await?),
            Home::Disk => Ok(None),
        }
    }

    /// Gives a repository a blob of another one that is hosted here, or, where none is named, of any;
    /// says whether that could be done. Which repositories of a bucket have a blob is known only of
    /// those that this process was asked about.
    pub async fn mount(
        &self,
        of: &Repository,
        digest: &Digest,
        from: Option<&Repository>,
    ) -> Result<bool, HostedError> {
        if let Home::Bucket(bucket) = &self.0.home {
            let mounted = bucket.mount(of, digest, from).await?;
            if mounted {
                self.0.room.mounted(of, digest).await;
            }
            return Ok(mounted);
        }
        let store = &self.0.store;
        let there = match from {
            Some(from) => store.is_own(from) && store.has_link(from, digest).await?,
            None => store.has_somewhere(digest).await?,
        };
        if !there {
            return Ok(false);
        }
        self.claim(of).await?;
        let mount = || store.mount(of, digest);
        Ok(self.0.room.with_room(0, mount).await?)
    }
}

fn last_of(descriptors: &[Value]) -> Option<Digest> {
    descriptors.last()?["digest"].as_str()?.parse().ok()
}
