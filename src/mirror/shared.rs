//! The cache that all mirrors of a fleet share in a bucket, behind the disk of each.
//!
//! What is not on the disk is looked for in the bucket, and only then asked of the upstream; what an
//! upstream has sent is brought to the bucket by and by (`upload`). The bucket is a help and no more:
//! it is waited for shortly, left alone while it fails (`breaker`), and what it has is checked as
//! what an upstream sends.
//!
//! It is given out by the rules of the disk, where a link says that an upstream has shown a
//! repository to have something. In the bucket such a link counts together with a note, by a mirror,
//! that everybody could see the repository; without both, the upstream is asked first. Nothing is
//! brought there that was not seen to be public.
//!
//! Tags are asked of the upstream as ever. What the bucket says of one is for a mirror that has
//! nothing else, while the upstream can't be asked.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quick_cache::sync::Cache;
use tokio::sync::OnceCell;

mod breaker;
mod upload;

use breaker::Breaker;
use upload::Queue;

use super::{Mirror, MirrorError, Served, Source, age};
use crate::config::{Role, S3Settings, Serving, Storage};
use crate::oci::{Digest, Manifest, Reference, Tag};
use crate::store::TagLink;
use crate::store::layout::Repository;
use crate::store::s3::{BlobStream, BucketError, Limits, Writer};
use crate::upstream::PUBLIC_FOR;

/// How long the bucket is waited for where the upstream can be asked as well.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long it may send nothing of a blob that has begun, before the upstream is asked for the rest.
pub(super) const STALL: Duration = Duration::from_secs(5);
/// Repositories of which it is remembered what the bucket says of them.
const NOTES: usize = 16 * 1024;
/// Repositories that have turned private, and of which the bucket is still to be told.
const UNTOLD: usize = 16 * 1024;
/// Blobs whose copy in the bucket is wrong, that are remembered.
const WRONG: usize = 1024;

/// The bucket that the mirrors share.
pub(super) struct Shared {
    settings: S3Settings,
    opened: OnceCell<Writer>,
    breaker: Breaker,
    /// What the bucket says of repositories, and when it did.
    notes: Cache<Repository, (Option<bool>, Instant)>,
    /// Repositories that this process has seen not to be public, whatever the bucket still says.
    untold: Mutex<HashSet<Repository>>,
    /// What is not its digest's in the bucket: never read from there, and replaced.
    wrong: Cache<Digest, ()>,
    queue: Queue,
}

/// A blob of the bucket.
pub(super) struct Found {
    pub(super) stream: BlobStream,
    /// Whether the bucket knows that everybody may see the repository, and that it has the blob.
    pub(super) linked: bool,
}

impl Shared {
    /// The bucket of a mirror that has one.
    pub(super) fn of(serving: &Serving) -> Option<Self> {
        let (Role::Mirror, Storage::S3 { bucket, .. }) = (serving.role, &serving.storage) else {
            return None;
        };
        Some(Self {
            settings: bucket.as_ref().clone(),
            opened: OnceCell::new(),
            breaker: Breaker::default(),
            notes: Cache::new(NOTES),
            untold: Mutex::default(),
            wrong: Cache::new(WRONG),
            queue: Queue::default(),
        })
    }

    async fn open(&self) -> Result<&Writer, BucketError> {
        let open = || Box::pin(Writer::open(&self.settings, Limits::default()));
        self.opened.get_or_try_init(open).await
    }

    /// Asks the bucket for what can be had without it: `None` where it fails, or takes too long. The
    /// SDK's futures are large, and belong on the heap.
    async fn ask<T>(
        &self,
        what: &str,
        asking: impl Future<Output = Result<T, BucketError>>,
    ) -> Option<T> {
        if !self.breaker.may_ask(PATIENCE) {
            return None;
        }
        let reason = match tokio::time::timeout(PATIENCE, asking).await {
            Ok(Ok(answer)) => {
                self.breaker.answered();
                return Some(answer);
            }
            // It does answer, if with something that is no use.
            Ok(Err(error @ (BucketError::Wrong { .. } | BucketError::Changed { .. }))) => {
                self.breaker.answered();
                tracing::warn!(bucket = self.settings.bucket, %error, "the shared cache: {error}");
                return None;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => {
                let patience = humantime::format_duration(PATIENCE);
                format!("S3 did not answer for {what} in {patience}")
            }
        };
        let pause = self.breaker.failed();
        tracing::warn!(
            bucket = self.settings.bucket, %reason,
            "the shared cache is left alone for {} ms, and what is missing is asked of upstreams: {reason}",
            pause.as_millis()
        );
        None
    }

    fn untold(&self) -> MutexGuard<'_, HashSet<Repository>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was learned of who may see a repository: at once for this process, and by and by for the
    /// others.
    pub(super) fn learned(&self, of: &Repository, public: bool) {
        let mut untold = self.untold();
        if public {
            untold.remove(of);
        } else if untold.len() < UNTOLD {
            untold.insert(of.clone());
        }
    }

    /// Whether the bucket says that everybody may see a repository.
    pub(super) async fn is_public(&self, of: &Repository) -> bool {
        if self.untold().contains(of) {
            return false;
        }
        if let Some((note, read)) = self.notes.get(of)
            && read.elapsed() < PUBLIC_FOR
        {
            return note == Some(true);
        }
        let asking = Box::pin(async { self.open().await?.is_public(of).await });
        let Some(note) = self.ask("a note", asking).await else {
            return false;
        };
        self.notes.insert(of.clone(), (note, Instant::now()));
        note == Some(true)
    }

    /// A blob from `offset` on, and whether a repository is known to have it: in one round trip.
    async fn blob(&self, of: &Repository, digest: &Digest, offset: u64) -> Option<Found> {
        if self.wrong.get(digest).is_some() {
            return None;
        }
        let asking = Box::pin(async {
            let writer = self.open().await?;
            let (linked, stream) =
                tokio::join!(writer.has_link(of, digest), writer.blob(digest, offset));
            Ok(stream?.map(|stream| (stream, linked.unwrap_or(false))))
        });
        let (found, public) = tokio::join!(self.ask("a blob", asking), self.is_public(of));
        let (stream, linked) = found??;
        Some(Found {
            stream,
            linked: linked && public,
        })
    }

    /// The copy of a blob in the bucket is not what its digest says.
    pub(super) fn is_wrong(&self, digest: &Digest) {
        tracing::warn!(
            bucket = self.settings.bucket, %digest,
            "what the shared cache has of a blob is wrong: it is fetched from its upstream, and replaced"
        );
        self.wrong.insert(digest.clone(), ());
    }
}

impl Mirror {
    /// A blob as the fleet has it, from `offset` on; `None` where the upstream is to be asked for it.
    pub(super) async fn blob_of_fleet(
        &self,
        source: &Source,
        digest: &Digest,
        offset: u64,
    ) -> Result<Option<Found>, MirrorError> {
        let Some(shared) = &self.0.shared else {
            return Ok(None);
        };
        let Some(found) = shared.blob(&source.stored, digest, offset).await else {
            self.0.metrics.shared_misses.inc();
            return Ok(None);
        };
        if !found.linked {
            match self.ask_for_blob(source, digest).await {
                Ok(_) => {}
                Err(error @ MirrorError::BlobUnknown(_)) => return Err(error),
                // It says that itself, or perhaps answers another time.
                Err(_) => {
                    self.0.metrics.shared_misses.inc();
                    return Ok(None);
                }
            }
        }
        self.0.metrics.shared_hits.inc();
        Ok(Some(found))
    }

    /// The size of a blob, as the fleet knows it while its upstream can't be asked.
    pub(super) async fn blob_size_of_fleet(
        &self,
        source: &Source,
        digest: &Digest,
    ) -> Option<Option<u64>> {
        let shared = self.0.shared.as_ref()?;
        if !self.may_be_stale(source).await || !shared.is_public(&source.stored).await {
            return None;
        }
        let asking = Box::pin(async {
            let writer = shared.open().await?;
            let linked = writer.has_link(&source.stored, digest);
            let (linked, size) = tokio::try_join!(linked, writer.blob_size(digest))?;
            Ok(size.filter(|_| linked))
        });
        shared.ask("a blob's size", asking).await?.map(Some)
    }

    /// A manifest as the fleet has it. That its repository has it, publicly, is `proved` already, or
    /// is known to the bucket, or is asked of the upstream by HEAD, which costs no pull.
    pub(super) async fn manifest_of_fleet(
        &self,
        source: &Source,
        digest: &Digest,
        proved: bool,
    ) -> Option<Arc<Manifest>> {
        let shared = self.0.shared.as_ref()?;
        let of = &source.stored;
        let asking = Box::pin(async { shared.open().await?.manifest(of, digest).await });
        let known = async { proved || shared.is_public(of).await };
        let (found, known) = tokio::join!(shared.ask("a manifest", asking), known);
        let manifest = found.flatten();
        if manifest.is_some() && !known {
            let reference = Reference::Digest(digest.clone());
            let asked = source.upstream.manifest_digest(&source.name, &reference);
            let asked = asked.await;
            self.learn(source, asked).await.ok()?;
        }
        let metrics = &self.0.metrics;
        let counted = if manifest.is_some() {
            &metrics.shared_hits
        } else {
            &metrics.shared_misses
        };
        counted.inc();
        if let Some(manifest) = &manifest {
            metrics.shared_bytes.inc_by(manifest.bytes.len() as u64);
        }
        manifest
    }

    /// What a tag was when a mirror of the fleet last saw it confirmed, for want of anything else.
    pub(super) async fn tag_of_fleet(
        &self,
        source: &Source,
        tag: &Tag,
        reason: &str,
    ) -> Option<Served> {
        let shared = self.0.shared.as_ref()?;
        let of = &source.stored;
        if !self.may_be_stale(source).await || !shared.is_public(of).await {
            return None;
        }
        let asking = Box::pin(async { shared.open().await?.tag(of, tag).await });
        let link = shared.ask("a tag", asking).await??;
        let store = &self.0.store;
        let here = store.manifest(of, &link.digest).await.ok().flatten();
        let manifest = match here {
            Some(manifest) => manifest,
            None => self.manifest_of_fleet(source, &link.digest, true).await?,
        };
        // A store that does not say when is one that may have said it long ago.
        let confirmed = link.modified.unwrap_or(std::time::UNIX_EPOCH);
        let keep = async {
            let size = manifest.bytes.len() as u64;
            self.with_room(size, || store.put_manifest(of, &manifest, None))
                .await?;
            let kept = || TagLink {
                digest: link.digest.clone(),
                confirmed,
            };
            self.with_room(0, || store.put_new_tag(of, tag, kept()))
                .await
        };
        if let Err(error) = keep.await {
            tracing::warn!(repository = %of, %tag, %error, "a tag could not be kept: {error}");
        }
        self.0.metrics.stale_served.inc();
        tracing::debug!(repository = %of, %tag, reason, "served stale, as the fleet has it");
        Some(Served {
            manifest,
            age: age(confirmed),
            stale: Some(reason.to_owned()),
        })
    }
}
