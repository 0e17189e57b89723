//! What upstreams have sent is brought to the shared bucket: in the background, a few at a time, and
//! only as far as nobody waits for it. What is dropped because there is too much of it, or because S3
//! fails, is brought there when it is next asked for.

use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures_util::StreamExt as _;
use futures_util::stream;
use quick_cache::sync::Cache;
use tokio::sync::mpsc::{self, Receiver, Sender};

use super::Shared;
use crate::failpoint::failpoint;
use crate::mirror::{Mirror, Source};
use crate::oci::{Digest, Tag};
use crate::store::layout::{self, Repository};
use crate::store::s3::{BucketError, Writer};
use crate::store::upload::UPLOAD_STALE;

/// What waits to be brought to the bucket, at most.
const WAITING: usize = 1024;
/// What is brought there at the same time; the memory that takes is the writer's to bound.
const AT_ONCE: usize = 4;
/// What is known to be in the bucket, or on its way.
const KNOWN: usize = 64 * 1024;
/// Groups of digests, of which one at a time is brought there.
const ORDERS: usize = 64;
/// Attempts at each, as far as another one may help.
const ATTEMPTS: u32 = 6;
/// The pause after the first of them; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// How long what the bucket says of a tag may have been written before, although it is still true.
const TAG_REFRESH: Duration = Duration::from_hours(1);
/// How often the bucket is told of repositories that have turned private, as long as it has not been.
const TELL_INTERVAL: Duration = Duration::from_secs(5);
/// How often uploads to the bucket are looked for that somebody has given up.
const ABORT_INTERVAL: Duration = Duration::from_hours(1);
/// How often the log says that something could not be brought there.
const SAY_INTERVAL: Duration = Duration::from_mins(1);

/// Something that is to be brought to the bucket.
struct Job {
    source: Source,
    what: What,
}

/// What it is. Its bytes are on the disk.
#[derive(Clone, PartialEq, Eq, Hash)]
enum What {
    Blob(Digest),
    Manifest(Digest),
    /// A tag, and the manifest that its upstream has said it is.
    Tag(Tag, Digest),
}

/// What waits, and what need not.
pub(super) struct Queue {
    sender: Sender<Job>,
    receiver: Mutex<Option<Receiver<Job>>>,
    /// What was brought there, or is to be, and since when.
    known: Cache<(Repository, What), Instant>,
    /// Repositories in the bucket that are somebody else's.
    foreign: Cache<Repository, Instant>,
    /// Held while something of the same digest is brought there: the next finds it there.
    orders: [tokio::sync::Mutex<()>; ORDERS],
    said: Mutex<Option<Instant>>,
}

impl Default for Queue {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        Self {
            sender,
            receiver: Mutex::new(Some(receiver)),
            known: Cache::new(KNOWN),
            foreign: Cache::new(super::NOTES),
            orders: std::array::from_fn(|_| tokio::sync::Mutex::default()),
            said: Mutex::default(),
        }
    }
}

impl Queue {
    fn order(&self, what: &What) -> &tokio::sync::Mutex<()> {
        let (What::Blob(digest) | What::Manifest(digest) | What::Tag(_, digest)) = what;
        let mut hasher = DefaultHasher::new();
        digest.hash(&mut hasher);
        let place = usize::try_from(hasher.finish() % ORDERS as u64).unwrap_or(0);
        &self.orders[place]
    }
}

impl Shared {
    /// Whether this is the mirrors' own part of the bucket, which is noted before anything is brought
    /// there. What a writer keeps is left alone.
    async fn claim(&self, writer: &Writer, of: &Repository) -> Result<bool, BucketError> {
        if let Some((Some(true), _)) = self.notes.get(of) {
            return Ok(true);
        }
        let refresh = |seen: Instant| seen.elapsed() < TAG_REFRESH;
        if self.queue.foreign.get(of).is_some_and(refresh) {
            return Ok(false);
        }
        let noted = writer.is_public(of).await?;
        if noted.is_none() && writer.has_any(of).await? {
            self.queue.foreign.insert(of.clone(), Instant::now());
            tracing::warn!(
                bucket = self.settings.bucket, repository = %of,
                "the bucket has {of} from somebody else than a mirror: its manifests and tags are \
                 left as they are (give the mirrors a bucket or `storage.s3.prefix` of their own)"
            );
            return Ok(false);
        }
        if noted != Some(true) {
            writer.set_public(of, true).await?;
        }
        self.notes.insert(of.clone(), (Some(true), Instant::now()));
        Ok(true)
    }

    fn say_failed(&self, job: &Job, error: &BucketError) {
        let mut said = self
            .queue
            .said
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let repository = &job.source.stored;
        if said.is_some_and(|said| said.elapsed() < SAY_INTERVAL) {
            tracing::debug!(%repository, %error, "not brought to the shared cache: {error}");
            return;
        }
        *said = Some(Instant::now());
        tracing::warn!(
            %repository, %error,
            "not brought to the shared cache, which is tried again when it is next asked for: {error}"
        );
    }
}

impl Mirror {
    /// Has a blob that was asked for, and is here, brought to the bucket, if there is a bucket and that
    /// is not done.
    pub(in crate::mirror) fn share_blob(&self, source: &Source, digest: &Digest) {
        self.share(source, || What::Blob(digest.clone()));
    }

    /// The same with one that was just fetched: whatever was known of it, the bucket did not have it.
    pub(in crate::mirror) fn share_fetched_blob(&self, source: &Source, digest: &Digest) {
        if let Some(shared) = &self.0.shared {
            let key = (source.stored.clone(), What::Blob(digest.clone()));
            shared.queue.known.remove(&key);
        }
        self.share_blob(source, digest);
    }

    /// The same with a manifest.
    pub(in crate::mirror) fn share_manifest(&self, source: &Source, digest: &Digest) {
        self.share(source, || What::Manifest(digest.clone()));
    }

    /// The same with what the upstream has just said a tag is.
    pub(in crate::mirror) fn share_tag(&self, source: &Source, tag: &Tag, digest: &Digest) {
        self.share(source, || What::Tag(tag.clone(), digest.clone()));
    }

    fn share(&self, source: &Source, what: impl FnOnce() -> What) {
        let Some(shared) = &self.0.shared else { return };
        if source.stored.is_of_account() {
            return;
        }
        let key = (source.stored.clone(), what());
        let again = match &key.1 {
            What::Tag(..) => TAG_REFRESH,
            What::Blob(_) | What::Manifest(_) => Duration::MAX,
        };
        let known = shared.queue.known.get(&key);
        if known.is_some_and(|since| since.elapsed() < again) {
            return;
        }
        shared.queue.known.insert(key.clone(), Instant::now());
        let job = Job {
            source: source.clone(),
            what: key.1.clone(),
        };
        if shared.queue.sender.try_send(job).is_err() {
            shared.queue.known.remove(&key);
            self.0.metrics.shared_dropped.inc();
            tracing::debug!(
                repository = %source.stored,
                "not brought to the shared cache: {WAITING} others wait already"
            );
        }
    }

    /// Brings to the bucket what is to be there, for as long as the agent runs.
    pub async fn look_after_shared(self) {
        let Some(shared) = &self.0.shared else { return };
        let receiver = shared.queue.receiver.lock();
        let receiver = receiver.unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut receiver) = receiver else { return };
        let jobs = stream::poll_fn(move |context| receiver.poll_recv(context));
        let bringing = jobs.for_each_concurrent(AT_ONCE, |job| {
            let mirror = self.clone();
            async move { Box::pin(mirror.bring(job)).await }
        });
        let telling = async {
            loop {
                tokio::time::sleep(TELL_INTERVAL).await;
                Box::pin(shared.tell_private()).await;
            }
        };
        let aborting = async {
            loop {
                Box::pin(shared.abort_stale()).await;
                tokio::time::sleep(ABORT_INTERVAL).await;
            }
        };
        tokio::join!(bringing, telling, aborting);
    }

    async fn bring(self, job: Job) {
        let Some(shared) = &self.0.shared else { return };
        let _order = shared.queue.order(&job.what).lock().await;
        let mut failures = 0;
        loop {
            match Box::pin(self.try_to_bring(shared, &job)).await {
                Ok(true) => return,
                Ok(false) => break,
                Err(error) => {
                    failures += 1;
                    if !error.is_transient() || failures == ATTEMPTS {
                        shared.say_failed(&job, &error);
                        self.0.metrics.shared_failures.inc();
                        break;
                    }
                    let pause = FIRST_PAUSE * 2u32.pow(failures);
                    tokio::time::sleep(pause.mul_f32(fastrand::f32())).await;
                }
            }
        }
        let key = (job.source.stored, job.what);
        shared.queue.known.remove(&key);
    }

    /// Whether everybody may see what an upstream has sent of a repository.
    async fn may_share(&self, source: &Source) -> bool {
        let Source {
            upstream, stored, ..
        } = source;
        let seen_private = upstream.learned(&source.name) == Some(false);
        if upstream.settings().share_private || self.0.store.is_shared(stored) || seen_private {
            return false;
        }
        // As it is noted on the disk, since what is in the bucket was brought there by this.
        !upstream.is_guarded() || self.0.store.is_public(stored).await.unwrap_or(false)
    }

    /// Says whether it is there now, or is nothing to be brought there.
    async fn try_to_bring(&self, shared: &Shared, job: &Job) -> Result<bool, BucketError> {
        if !self.may_share(&job.source).await {
            return Ok(false);
        }
        let writer = shared.open().await?;
        let of = &job.source.stored;
        let ours = shared.claim(writer, of).await?;
        match &job.what {
            What::Blob(digest) => self.bring_blob(shared, writer, of, digest, ours).await,
            What::Manifest(digest) if ours => self.bring_manifest(writer, of, digest).await,
            What::Tag(tag, digest) if ours => {
                // No link to nothing.
                let there = self.bring_manifest(writer, of, digest).await?;
                Ok(there && self.bring_tag(writer, of, tag, digest).await?)
            }
            What::Manifest(_) | What::Tag(..) => Ok(true),
        }
    }

    /// Brings a blob there, and then the link to it. One that is not linked here (yet) is not known to
    /// be its repository's.
    async fn bring_blob(
        &self,
        shared: &Shared,
        writer: &Writer,
        of: &Repository,
        digest: &Digest,
        ours: bool,
    ) -> Result<bool, BucketError> {
        let store = &self.0.store;
        // Held, so that it is not evicted meanwhile.
        let Ok(Some(blob)) = store.blob(digest).await else {
            return Ok(false);
        };
        if !store.has_link(of, digest).await.unwrap_or(false) {
            return Ok(false);
        }
        let wrong = shared.wrong.get(digest).is_some();
        if wrong || writer.blob_size(digest).await? != Some(blob.size) {
            let path = store.root().join(layout::blob(digest));
            // Of the upstream's bytes that was seen; since then they have been on a disk.
            if !is_right(path.clone(), digest.clone()).await {
                tracing::warn!(%digest, "a stored blob is not its digest's, and is not shared: see `verify`");
                return Ok(true);
            }
            writer.replace_blob(&path, digest).await?;
            shared.wrong.remove(digest);
            self.0.metrics.shared_uploads.inc();
        }
        failpoint!(SharedSent);
        if ours && !writer.has_link(of, digest).await? {
            writer.link_layer(of, digest).await?;
        }
        Ok(true)
    }

    async fn bring_manifest(
        &self,
        writer: &Writer,
        of: &Repository,
        digest: &Digest,
    ) -> Result<bool, BucketError> {
        match writer.manifest(of, digest).await {
            Ok(Some(_)) => return Ok(true),
            // What is wrong there is replaced.
            Ok(None) | Err(BucketError::Wrong { .. }) => {}
            Err(error) => return Err(error),
        }
        let Ok(Some(manifest)) = self.0.store.manifest(of, digest).await else {
            return Ok(false);
        };
        writer.put_manifest(of, &manifest).await?;
        self.0.metrics.shared_uploads.inc();
        Ok(true)
    }

    /// Moves a tag, unless another mirror has done so after the upstream said this.
    async fn bring_tag(
        &self,
        writer: &Writer,
        of: &Repository,
        tag: &Tag,
        digest: &Digest,
    ) -> Result<bool, BucketError> {
        // What was said last: the job may have waited for long.
        let confirmed = match self.0.store.tag(of, tag).await {
            Ok(Some(link)) if link.digest == *digest => link.confirmed,
            _ => return Ok(false),
        };
        let now = match writer.tag(of, tag).await {
            // Somebody has put there what is no link.
            Err(BucketError::Wrong { .. }) => return Ok(true),
            now => now?,
        };
        if let Some(link) = &now {
            let written = link.modified.unwrap_or(SystemTime::UNIX_EPOCH);
            let newer = written > confirmed;
            let recent = written + TAG_REFRESH > confirmed;
            if newer || link.digest == *digest && recent {
                return Ok(true);
            }
        }
        let known = now.as_ref().map(|link| &link.etag);
        match writer.put_tag(of, tag, digest, known).await {
            // Another mirror has been told something as new.
            Ok(_) | Err(BucketError::Conflict { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

impl Shared {
    /// Says in the bucket which repositories are not public any longer, of those that are there.
    async fn tell_private(&self) {
        let untold: Vec<Repository> = self.untold().iter().cloned().collect();
        for of in untold {
            let told = async {
                let writer = self.open().await?;
                if writer.is_public(&of).await? == Some(true) {
                    writer.set_public(&of, false).await?;
                    self.notes.insert(of.clone(), (Some(false), Instant::now()));
                } else {
                    self.notes.remove(&of);
                }
                Ok::<_, BucketError>(())
            };
            if let Err(error) = told.await {
                tracing::warn!(
                    repository = %of, %error,
                    "the shared cache could not be told that {of} is not public, which is tried again: {error}"
                );
                return;
            }
            self.untold().remove(&of);
        }
    }

    async fn abort_stale(&self) {
        let aborted = async { self.open().await?.stale_uploads(UPLOAD_STALE, false).await };
        match aborted.await {
            Ok(0) => {}
            Ok(uploads) => {
                tracing::info!(uploads, "unfinished uploads to the bucket were aborted");
            }
            Err(error) => {
                tracing::warn!(%error, "unfinished uploads to the bucket could not be aborted: {error}");
            }
        }
    }
}

/// Whether a file is what a digest says.
async fn is_right(path: PathBuf, digest: Digest) -> bool {
    let hashed = tokio::task::spawn_blocking(move || Ok(hash(&path, &digest)? == digest));
    let hashed: Result<std::io::Result<bool>, _> = hashed.await;
    matches!(hashed, Ok(Ok(true)))
}

fn hash(path: &Path, digest: &Digest) -> std::io::Result<Digest> {
    let mut file = File::open(path)?;
    let mut hasher = crate::oci::Hasher::new(digest.algorithm());
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            read => hasher.update(&buffer[..read]),
        }
    }
}
