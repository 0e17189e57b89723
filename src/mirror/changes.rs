//! What this process itself changes in the bucket that it serves: the cache is told at once, and
//! nobody is given what was asked for before.

use std::sync::Arc;
use std::time::Instant;

use quick_cache::sync::Cache;

use super::{Mirror, Source};
use crate::config::{Role, S3Settings};
use crate::oci::{Digest, Manifest, Reference, Tag};
use crate::store::layout::Repository;
use crate::store::s3::{Bucket, BucketError};
use crate::store::{StoreError, upload};

/// Changes that are remembered: more than there are downloads that began before any of them.
const CHANGES: usize = 16 * 1024;

/// Something of a repository that can change.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// A tag, or a manifest.
    Manifest(Repository, Reference),
    /// A blob.
    Blob(Repository, Digest),
}

/// What was changed, and when.
pub(super) struct Changes {
    /// Whether this process changes anything: only a writer does.
    any: bool,
    at: Cache<Place, Instant>,
    /// Held while the cache is told of a change, or is given what an answer has brought.
    order: tokio::sync::Mutex<()>,
}

impl Changes {
    pub(super) fn new(role: Role) -> Self {
        Self {
            any: role == Role::Writer,
            at: Cache::new(CHANGES),
            order: tokio::sync::Mutex::default(),
        }
    }

    /// Whether something was changed after `asked`.
    pub(super) fn since(&self, place: &Place, asked: Instant) -> bool {
        self.at.get(place).is_some_and(|changed| changed >= asked)
    }
}

impl Mirror {
    /// Where a repository is that is pushed to the bucket; `None` where no bucket is served.
    pub fn in_bucket(&self, of: &Repository) -> Option<Source> {
        let bucket = self.bucket()?;
        Some(Source {
            name: of.as_str().parse().ok()?,
            stored: of.clone(),
            upstream: bucket,
        })
    }

    /// The bucket that pulls are answered from, where it is this one.
    pub async fn opened_bucket(
        &self,
        settings: &S3Settings,
    ) -> Option<Result<Bucket, BucketError>> {
        let upstream = self.bucket().filter(|it| it.is_the_bucket(settings))?;
        upstream.opened_bucket().await
    }

    /// Keeps what an answer has brought, unless that was changed here after it was `asked` for.
    pub(super) async fn keep<T, F>(
        &self,
        places: &[Place],
        asked: Instant,
        keep: impl FnOnce() -> F,
    ) -> Result<Option<T>, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        if !self.0.changes.any {
            return keep().await.map(Some);
        }
        let _order = self.0.changes.order.lock().await;
        let changed = |place| self.0.changes.since(place, asked);
        if places.iter().any(changed) {
            return Ok(None);
        }
        keep().await.map(Some)
    }

    /// Tells the cache of a change that the bucket has taken, after which nobody joins a question
    /// that was asked before it.
    async fn told<T, F>(&self, places: Vec<Place>, tell: impl FnOnce() -> F) -> T
    where
        F: Future<Output = T>,
    {
        let _order = self.0.changes.order.lock().await;
        for place in places {
            match &place {
                Place::Manifest(of, reference) => {
                    let key = (of.clone(), reference.clone());
                    self.0.manifests.leave(&key);
                    self.0.descriptions.leave(&key);
                    if let Reference::Tag(tag) = reference {
                        self.0.tags.leave(&(of.clone(), tag.clone()));
                    }
                }
                Place::Blob(..) => {}
            }
            self.0.changes.at.insert(place, Instant::now());
        }
        tell().await
    }

    /// A manifest has been pushed to the bucket.
    pub async fn pushed_manifest(&self, of: &Repository, manifest: &Arc<Manifest>) {
        let reference = Reference::Digest(manifest.digest.clone());
        let size = manifest.bytes.len() as u64;
        let put = || self.0.store.put_manifest(of, manifest, None);
        let place = Place::Manifest(of.clone(), reference);
        let kept = self.told(vec![place], || self.with_room(size, put)).await;
        if let Err(error) = kept {
            tracing::warn!(repository = %of, digest = %manifest.digest, %error, "a pushed manifest could not be cached: {error}");
        }
    }

    /// A tag has been moved in the bucket, to a manifest that was told of.
    pub async fn pushed_tag(
        &self,
        of: &Repository,
        tag: &Tag,
        digest: &Digest,
    ) -> Result<(), StoreError> {
        let put = || self.0.store.put_tag(of, tag, digest);
        let place = Place::Manifest(of.clone(), Reference::Tag(tag.clone()));
        self.told(vec![place], || async {
            match self.with_room(0, put).await {
                Ok(()) => Ok(()),
                // What it was must not be served any longer.
                Err(error) => {
                    tracing::warn!(repository = %of, %tag, %error, "a pushed tag could not be cached: {error}");
                    self.0.store.delete_tag(of, tag).await.map(|_| ())
                }
            }
        })
        .await
    }

    /// A blob has been pushed to the bucket from the upload `id`, which becomes the cache's. Nothing
    /// that was asked for before says otherwise: that a blob is not there is never kept.
    pub async fn pushed_blob(
        &self,
        of: &Repository,
        id: upload::UploadId,
        pushed: upload::Upload,
        digest: &Digest,
    ) {
        let store = &self.0.store;
        if let Err(error) = store.commit_upload(of, id, pushed, digest).await {
            tracing::warn!(repository = %of, %digest, %error, "a pushed blob could not be cached: {error}");
            // It is fetched when somebody wants it.
            let _ = store.cancel_upload(of, id).await;
        }
    }

    /// A blob that the bucket has was given to one more repository.
    pub async fn mounted(&self, of: &Repository, digest: &Digest) {
        let here = self.0.store.blob(digest).await;
        if here.is_ok_and(|blob| blob.is_some()) {
            self.link_layer(of, digest).await;
        }
    }

    /// A tag has been removed from the bucket.
    pub async fn removed_tag(&self, of: &Repository, tag: &Tag) -> Result<(), StoreError> {
        let place = Place::Manifest(of.clone(), Reference::Tag(tag.clone()));
        let deleted = self.told(vec![place], || self.0.store.delete_tag(of, tag));
        deleted.await.map(|_| ())
    }

    /// A manifest has been removed from the bucket, and with it what tags it was.
    pub async fn removed_manifest(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<(), StoreError> {
        for tag in self.0.store.tags_of(of, digest).await? {
            self.removed_tag(of, &tag).await?;
        }
        let place = Place::Manifest(of.clone(), Reference::Digest(digest.clone()));
        let deleted = self.told(vec![place], || self.0.store.delete_manifest(of, digest));
        deleted.await.map(|_| ())
    }

    /// A blob has been taken from a repository in the bucket.
    pub async fn removed_blob(&self, of: &Repository, digest: &Digest) -> Result<(), StoreError> {
        let place = Place::Blob(of.clone(), digest.clone());
        let unlinked = self.told(vec![place], || self.0.store.unlink_layer(of, digest));
        unlinked.await.map(|_| ())
    }
}
