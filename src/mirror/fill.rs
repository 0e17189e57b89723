//! The download of a blob: one request to the upstream, one growing file, any number of readers.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::BodyExt;
use tokio::sync::watch;

use super::flight::{Flight, Flights};
use super::{Mirror, MirrorError, Source, blob_error};
use crate::oci::Digest;
use crate::store::StoreError;
use crate::store::filesystem::Partial;
use crate::store::layout::Repository;
use crate::store::lease::BlobFile;
use crate::upstream::{FetchedBlob, UpstreamError};

/// How many bytes at a blob's end no reader gets before the whole has been verified.
///
/// Any number above 0 keeps a wrong blob from ending a 200. This one also means that for a blob of
/// up to this size nothing at all is sent before it is known to be right, so that its failure is an
/// error that clients act on, not a connection that breaks.
pub const HOLDBACK: u64 = 1024 * 1024;

/// Bytes that are written and hashed at once.
const BATCH: usize = 256 * 1024;

/// Breaks in a row, without a byte in between, after which a download that readers depend on is
/// given up.
const BREAKS: u32 = 6;
/// The same while nobody has been sent anything: then an early error is better, because clients go
/// elsewhere with it.
const BREAKS_BEFORE_THE_FIRST_BYTE: u32 = 2;
/// The pause after the first break; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// How far a download is.
#[derive(Debug, Clone)]
pub(super) struct Progress {
    /// The file it goes into, once there is one.
    pub(super) file: Option<Arc<BlobFile>>,
    /// Bytes from the start that readers may have.
    pub(super) readable: u64,
    /// The size of the blob in bytes, once it is known.
    pub(super) total: Option<u64>,
    /// How it ended: verified, or why not.
    pub(super) outcome: Option<Result<(), MirrorError>>,
}

/// The downloads under way.
#[derive(Default)]
pub(super) struct Fills(Flights<Digest, (Repository, Progress)>);

/// A download that somebody follows.
pub(super) struct Fill {
    digest: Digest,
    repository: Repository,
    flight: Flight<(Repository, Progress)>,
}

impl Fills {
    /// Joins the download of a blob, beginning it from `source` where none is under way.
    pub(super) fn join(&self, mirror: &Mirror, source: &Source, digest: &Digest) -> Fill {
        let mut repository = source.stored.clone();
        let flight = self.0.join(digest.clone(), |sender| {
            let progress = Progress {
                file: None,
                readable: 0,
                total: None,
                outcome: None,
            };
            sender.send_replace(Some((source.stored.clone(), progress)));
            let (mirror, source, digest) = (mirror.clone(), source.clone(), digest.clone());
            async move { run(mirror, source, digest, sender).await }
        });
        if let Some((initiator, _)) = &*flight.state.borrow() {
            repository.clone_from(initiator);
        }
        Fill {
            digest: digest.clone(),
            repository,
            flight,
        }
    }
}

impl Fill {
    /// The repository for which it was begun.
    pub(super) fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Waits until it is as far as `enough` says, or has ended.
    pub(super) async fn wait(
        &mut self,
        enough: impl Fn(&Progress) -> bool,
    ) -> Result<Progress, MirrorError> {
        let reached = self
            .flight
            .state
            .wait_for(|state| {
                state
                    .as_ref()
                    .is_some_and(|(_, progress)| progress.outcome.is_some() || enough(progress))
            })
            .await
            .ok()
            .and_then(|state| state.as_ref().map(|(_, progress)| progress.clone()));
        reached.ok_or_else(|| MirrorError::Abandoned(self.digest.to_string()))
    }
}

/// One download, from the first request to the blob in the store.
async fn run(
    mirror: Mirror,
    source: Source,
    digest: Digest,
    sender: watch::Sender<Option<(Repository, Progress)>>,
) {
    let metrics = &mirror.0.metrics;
    metrics.fills.inc();
    let download = Download {
        mirror: &mirror,
        source: &source,
        digest: &digest,
        sender: &sender,
    };
    if let Err(error) = download.run().await {
        if !matches!(error, MirrorError::BlobUnknown(_)) {
            metrics.fill_failures.inc();
            tracing::warn!(repository = %source.stored, %digest, %error, "a download failed");
        }
        download.publish(|progress| progress.outcome = Some(Err(error.clone())));
    }
    metrics.fills.dec();
}

struct Download<'a> {
    mirror: &'a Mirror,
    source: &'a Source,
    digest: &'a Digest,
    sender: &'a watch::Sender<Option<(Repository, Progress)>>,
}

/// Why a download stopped, and what can still be made of it.
enum Break {
    /// The upstream failed; what has arrived is good.
    Upstream(Box<Partial>, UpstreamError),
    /// It can't go on at all.
    End(MirrorError),
}

impl From<StoreError> for Break {
    fn from(error: StoreError) -> Self {
        Self::End(error.into())
    }
}

impl Download<'_> {
    fn publish(&self, change: impl FnOnce(&mut Progress)) {
        self.sender.send_modify(|state| {
            if let Some((_, progress)) = state {
                change(progress);
            }
        });
    }

    async fn run(&self) -> Result<(), MirrorError> {
        let store = &self.mirror.0.store;
        // The download before this one may have ended between our look and our joining.
        if let Some(blob) = store.blob(self.digest).await? {
            self.mirror
                .link_layer(&self.source.stored, self.digest)
                .await;
            self.publish(|progress| {
                *progress = Progress {
                    file: Some(blob.file),
                    readable: blob.size,
                    total: Some(blob.size),
                    outcome: Some(Ok(())),
                };
            });
            return Ok(());
        }
        let partial = store.open_fill(self.digest).await?;
        let resumed = partial.length > 0;
        self.publish(|progress| progress.file = Some(Arc::clone(&partial.file)));
        let partial = match self.download(partial).await {
            Ok(partial) => partial,
            Err(error) => {
                // What broke off is kept: the next request goes on from there. What is wrong, or
                // fills the disk, is not.
                if matches!(error, MirrorError::Mismatch { .. } | MirrorError::Store(_)) {
                    store.discard_fill(self.digest).await?;
                }
                return Err(error);
            }
        };
        let size = partial.length;
        if partial.hasher.clone().finish() != *self.digest {
            tracing::warn!(
                repository = %self.source.stored, digest = %self.digest, size, resumed,
                "a download does not match its digest"
            );
            store.discard_fill(self.digest).await?;
            return Err(self.mismatch());
        }
        // Right from the first byte to the last: readers need not wait for the disk.
        self.publish(|progress| {
            progress.readable = size;
            progress.total = Some(size);
            progress.outcome = Some(Ok(()));
        });
        if let Err(error) = store
            .commit_fill(&self.source.stored, self.digest, partial)
            .await
        {
            // Everybody has their bytes; what is lost is the cache's copy, which the next request
            // makes again.
            tracing::error!(digest = %self.digest, %error, "a blob could not be kept");
            self.mirror.0.metrics.fill_failures.inc();
            store.discard_fill(self.digest).await?;
        }
        self.mirror.keep_within_limit().await;
        Ok(())
    }

    fn mismatch(&self) -> MirrorError {
        MirrorError::Mismatch {
            upstream: self.source.upstream.registry().clone(),
            name: self.source.name.clone(),
            wanted: self.digest.clone(),
        }
    }

    /// Downloads until all is there, going on where it broke off.
    async fn download(&self, mut partial: Partial) -> Result<Partial, MirrorError> {
        let mut breaks = 0;
        loop {
            let before = partial.length;
            let error;
            (partial, error) = match self.attempt(partial).await {
                Ok(partial) => return Ok(partial),
                Err(Break::End(error)) => return Err(error),
                Err(Break::Upstream(partial, error)) => (*partial, error),
            };
            breaks = if partial.length > before {
                1
            } else {
                breaks + 1
            };
            let retry = match &error {
                UpstreamError::Transport { .. } => true,
                // An upstream that limits, fails or hangs does not get better by asking again at
                // once, and clients have another place to go; but those who have been sent half
                // of the blob have not.
                UpstreamError::Timeout { .. }
                | UpstreamError::Limited { .. }
                | UpstreamError::Status { .. } => self.has_readers_in_the_middle(),
                UpstreamError::Denied { .. }
                | UpstreamError::NotFound { .. }
                | UpstreamError::Protocol { .. } => false,
            };
            let limit = if self.has_readers_in_the_middle() {
                BREAKS
            } else {
                BREAKS_BEFORE_THE_FIRST_BYTE
            };
            if !retry || breaks >= limit {
                return Err(blob_error(error));
            }
            self.mirror.0.metrics.fill_resumptions.inc();
            tracing::info!(
                repository = %self.source.stored, digest = %self.digest, at = partial.length, %error,
                "a download broke off and goes on"
            );
            let pause = FIRST_PAUSE * 2u32.pow(breaks.saturating_sub(1));
            tokio::time::sleep(pause.mul_f32(0.5 + fastrand::f32() / 2.0)).await;
        }
    }

    /// Whether bytes of this download may have been sent to somebody.
    fn has_readers_in_the_middle(&self) -> bool {
        self.sender
            .borrow()
            .as_ref()
            .is_some_and(|(_, progress)| progress.readable > 0)
    }

    /// One request, and its body to the end or to where it breaks.
    async fn attempt(&self, partial: Partial) -> Result<Partial, Break> {
        let Source { upstream, name, .. } = self.source;
        let fetched = match upstream.blob(name, self.digest, partial.length).await {
            Ok(Some(fetched)) => fetched,
            // Nothing is missing: it was killed between its last byte and its name.
            Ok(None) => return Ok(partial),
            Err(error) => return Err(Break::Upstream(Box::new(partial), error)),
        };
        let FetchedBlob {
            offset,
            total,
            mut body,
        } = fetched;
        let what = format!("the blob {}", self.digest);
        if let Some(total) = total {
            self.check_total(total, partial.length)
                .map_err(Break::End)?;
        }
        self.publish(|progress| {
            progress.total = total.or(progress.total);
            progress.readable = readable(partial.length, progress.total);
        });
        // An upstream without ranges begins again at 0: what is here already is passed over.
        let mut skip = partial.length - offset;
        let mut partial = partial;
        loop {
            let (mut batch, end) = self.batch(&mut body, &what).await;
            for piece in &mut batch {
                let passed = skip.min(piece.len() as u64);
                skip -= passed;
                // `passed` is at most the length of a piece in memory.
                let _ = piece.split_to(usize::try_from(passed).unwrap_or(piece.len()));
            }
            let size = batch.iter().map(|piece| piece.len() as u64).sum::<u64>();
            self.mirror.0.metrics.fetched_bytes.inc_by(size);
            if total.is_some_and(|total| partial.length + size > total) {
                return Err(Break::End(self.mismatch()));
            }
            partial = self.mirror.0.store.append(partial, batch).await?;
            self.publish(|progress| progress.readable = readable(partial.length, progress.total));
            match end {
                None => {}
                Some(Ok(())) if total.is_some_and(|total| partial.length < total) => {
                    let error = upstream.transport(&what, "it ended early".to_owned());
                    return Err(Break::Upstream(Box::new(partial), error));
                }
                Some(Ok(())) => return Ok(partial),
                Some(Err(error)) => return Err(Break::Upstream(Box::new(partial), error)),
            }
        }
    }

    /// An upstream that changes its mind about a blob's size, or has less than it has sent, is
    /// wrong about one of them.
    fn check_total(&self, total: u64, have: u64) -> Result<(), MirrorError> {
        let known = self
            .sender
            .borrow()
            .as_ref()
            .and_then(|(_, progress)| progress.total);
        if have > total || known.is_some_and(|known| known != total) {
            return Err(self.mismatch());
        }
        Ok(())
    }

    /// The pieces of the body that are there now, at least one and about [`BATCH`] bytes, and how
    /// the body ended if it did.
    async fn batch(
        &self,
        body: &mut hyper::body::Incoming,
        what: &str,
    ) -> (Vec<Bytes>, Option<Result<(), UpstreamError>>) {
        let upstream = &self.source.upstream;
        let idle = upstream.timeouts().idle;
        let mut pieces = Vec::new();
        let mut size = 0;
        while size < BATCH {
            let next = if pieces.is_empty() {
                match tokio::time::timeout(idle, body.frame()).await {
                    Ok(next) => next,
                    Err(_) => return (pieces, Some(Err(upstream.timeout_error(what, idle)))),
                }
            } else {
                match body.frame().now_or_never() {
                    Some(next) => next,
                    None => break,
                }
            };
            match next {
                None => return (pieces, Some(Ok(()))),
                Some(Err(e)) => return (pieces, Some(Err(upstream.transport_error(what, &e)))),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        size += data.len();
                        pieces.push(data);
                    }
                }
            }
        }
        (pieces, None)
    }
}

/// How many of `length` bytes readers may have while the digest is not known to be right.
fn readable(length: u64, total: Option<u64>) -> u64 {
    match total {
        Some(total) => length.min(total.saturating_sub(HOLDBACK)),
        None => length.saturating_sub(HOLDBACK),
    }
}
