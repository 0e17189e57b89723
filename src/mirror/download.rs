//! The download of a blob: one request to the upstream, one growing file, any number of readers.

use std::collections::VecDeque;
use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::watch;

use super::fill::{End, Progress};
use super::shared::STALL;
use super::{Mirror, MirrorError, Place, Source, blob_error};
use crate::failpoint::failpoint;
use crate::oci::{Digest, Hasher};
use crate::store::{Partial, StoreError};

use crate::store::layout::Repository;
use crate::upstream::{BlobBody, FetchedBlob, UpstreamError};

/// How many bytes at a blob's end no reader gets before the whole has been verified.
///
/// Any number above 0 keeps a wrong blob from ending a 200. This one also means that for a blob of
/// up to this size nothing at all is sent before it is known to be right, so that its failure is an
/// error that clients act on, not a connection that breaks.
pub const HOLDBACK: u64 = 1024 * 1024;

/// Bytes that are written and hashed at once.
const BATCH: usize = 256 * 1024;

/// Bytes between two breaks that make the second a first one again: an upstream that sends a byte
/// for each connection is one that does not send.
const PROGRESS: u64 = 64 * 1024;
/// Breaks in a row, without progress in between, after which a download that readers depend on is
/// given up.
pub(super) const BREAKS: u32 = 6;
/// The same while nobody has been sent anything: then an early error is better, because clients go
/// elsewhere with it.
const BREAKS_BEFORE_THE_FIRST_BYTE: u32 = 2;
/// The pause after the first break; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// One download, from the first request to the blob in the store. A failure is its last state.
pub(super) async fn run(
    mirror: Mirror,
    source: Source,
    digest: Digest,
    sender: watch::Sender<Option<(Repository, Progress)>>,
) -> Option<(Repository, Progress)> {
    let metrics = &mirror.0.metrics;
    metrics.fills.inc();
    let download = Download {
        mirror: &mirror,
        source: &source,
        digest: &digest,
        sender: &sender,
        begun: Instant::now(),
        inherited: AtomicBool::new(false),
        shared: Mutex::new(Help::Untried),
    };
    if let Err(error) = download.run().await {
        if !matches!(error, MirrorError::BlobUnknown(_)) {
            metrics.fill_failures.inc();
            tracing::warn!(repository = %source.stored, %digest, %error, "a download failed: {error}");
        }
        metrics.fills.dec();
        let last = sender.borrow().clone();
        return last.map(|(repository, progress)| {
            let end = Some(End::Failed(error));
            (repository, Progress { end, ..progress })
        });
    }
    metrics.fills.dec();
    None
}

struct Download<'a> {
    mirror: &'a Mirror,
    source: &'a Source,
    digest: &'a Digest,
    sender: &'a watch::Sender<Option<(Repository, Progress)>>,
    begun: Instant,
    /// Whether its beginning may be anything ([`Partial::trusted`]). Then nobody is given a byte
    /// before all of it is right.
    inherited: AtomicBool,
    /// What the fleet's bucket has had to do with it.
    shared: Mutex<Help>,
}

/// What the fleet's bucket has to do with a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Help {
    /// It was not asked.
    Untried,
    /// Bytes of it are from there, or all of them; whether the bucket also says whose it is.
    Given { linked: bool },
    /// Bytes of it are from there, but not the last.
    Broken,
    /// It is not asked any more.
    Unused,
}

/// Where bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Upstream,
    Bucket,
}

/// How a body ended before its end.
enum Ended {
    /// Nothing came for so long.
    Late(Duration),
    /// Its connection broke.
    Broken(Box<dyn Error + Send + Sync>),
}

/// Why a download stopped, and what can still be made of it.
enum Break {
    /// The upstream failed; what has arrived is good.
    Upstream(Box<Partial>, UpstreamError),
    /// The fleet's bucket failed; the rest is the upstream's.
    Bucket(Box<Partial>, String),
    /// It can't go on at all.
    Stop(Stop),
}

/// Why a download can't go on.
enum Stop {
    /// The store takes no more of it.
    Store(Box<Partial>, StoreError),
    /// It is wrong, or can't be had.
    End(MirrorError),
}

impl From<Stop> for Break {
    fn from(stop: Stop) -> Self {
        Self::Stop(stop)
    }
}

impl From<MirrorError> for Break {
    fn from(error: MirrorError) -> Self {
        Self::Stop(Stop::End(error))
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
            self.mirror.admit(self.source, self.digest).await?;
            self.publish(|progress| {
                *progress = Progress {
                    file: Some(blob.file),
                    readable: blob.size,
                    total: Some(blob.size),
                    end: Some(End::Whole),
                };
            });
            return Ok(());
        }
        let opened = self.mirror.with_room(0, || store.open_fill(self.digest));
        let partial = match opened.await {
            Ok(partial) => partial,
            Err(error) => return self.pass_by(&error).await,
        };
        self.inherited.store(!partial.trusted, Ordering::Relaxed);
        let partial = match self.verified(partial).await {
            Err(Stop::End(MirrorError::Mismatch { .. })) if self.may_begin_anew() => {
                store.discard_fill(self.digest).await?;
                self.publish(|progress| progress.total = None);
                match store.open_fill(self.digest).await {
                    Ok(partial) => self.verified(partial).await,
                    Err(error) => return self.pass_by(&error).await,
                }
            }
            verified => verified,
        };
        let partial = match partial {
            Ok(partial) => partial,
            Err(Stop::Store(partial, error)) => {
                self.pass_on(&partial, &error).await;
                return Ok(());
            }
            Err(Stop::End(error)) => {
                // What broke off is kept: the next request goes on from there. What is wrong is
                // not.
                if matches!(error, MirrorError::Mismatch { .. }) {
                    store.discard_fill(self.digest).await?;
                }
                return Err(error);
            }
        };
        let size = partial.length;
        // Right from the first byte to the last: readers need not wait for the disk.
        self.publish(|progress| {
            progress.readable = size;
            progress.total = Some(size);
            progress.end = Some(End::Whole);
        });
        let kept = self.keep(Arc::new(partial)).await;
        if kept.is_ok() && self.help() != (Help::Given { linked: true }) {
            self.mirror.share_fetched_blob(self.source, self.digest);
        }
        if let Err(error) = kept {
            // Everybody has their bytes; what is lost is the cache's copy, which the next request
            // makes again.
            tracing::error!(digest = %self.digest, %error, "a blob could not be kept: {error}");
            self.mirror.0.metrics.fill_failures.inc();
            store.discard_fill(self.digest).await?;
        }
        self.mirror.keep_within_limit().await;
        Ok(())
    }

    fn help(&self) -> Help {
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_help(&self, help: Help) {
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = help;
    }

    /// Whether it is wrong because of what the upstream has not sent, and nobody has had any of it.
    fn may_begin_anew(&self) -> bool {
        let inherited = self.inherited.swap(false, Ordering::Relaxed);
        if inherited {
            tracing::warn!(
                repository = %self.source.stored, digest = %self.digest,
                "what was left of an earlier download is not right: it begins anew"
            );
        }
        let helped = matches!(self.help(), Help::Given { .. } | Help::Broken);
        if helped {
            self.set_help(Help::Unused);
            if let Some(shared) = &self.mirror.0.shared {
                shared.is_wrong(self.digest);
            }
        }
        inherited || helped && !self.may_have_been_read()
    }

    /// Downloads what is missing, and checks the whole.
    async fn verified(&self, partial: Partial) -> Result<Partial, Stop> {
        let right = |partial: &Partial| partial.hasher.clone().finish() == *self.digest;
        self.publish(|progress| progress.file = Some(Arc::clone(&partial.file)));
        // Killed between its last byte and its name: nothing is missing. But it may have been for
        // another repository, and who reads it has to be admitted as to any blob that is here.
        if partial.length > 0 && right(&partial) {
            let admitted = self.mirror.admit(self.source, self.digest).await;
            admitted.map_err(Stop::End)?;
            return Ok(partial);
        }
        let partial = self.download(partial).await?;
        failpoint!(FillUnchecked);
        if right(&partial) {
            return Ok(partial);
        }
        Err(Stop::End(self.source.mismatch(self.digest)))
    }

    /// How many of `length` bytes readers may have while the digest is not known to be right.
    fn readable(&self, length: u64, total: Option<u64>) -> u64 {
        if self.inherited.load(Ordering::Relaxed) {
            0
        } else {
            readable(length, total)
        }
    }

    /// Makes what has been verified a blob of the store.
    async fn keep(&self, partial: Arc<Partial>) -> Result<(), StoreError> {
        let store = &self.mirror.0.store;
        failpoint!(FillVerified);
        store.sync_fill(&partial).await?;
        let repository = &self.source.stored;
        let commit = || store.commit_fill(repository, self.digest, &partial);
        let place = [Place::Blob(repository.clone(), self.digest.clone())];
        let commit = || self.mirror.with_room(0, commit);
        let committed = self.mirror.keep(&place, self.begun, commit);
        match committed.await? {
            Some(true) => {}
            Some(false) => self.mirror.link_layer(repository, self.digest).await,
            // It was deleted, or pushed, meanwhile.
            None => store.discard_fill(self.digest).await?,
        }
        failpoint!(FillLinked);
        Ok(())
    }

    /// Lets the readers ask for the blob themselves: nothing of it could be stored.
    async fn pass_by(&self, error: &StoreError) -> Result<(), MirrorError> {
        let asked = self.mirror.ask_for_blob(self.source, self.digest).await;
        let total = match asked {
            Err(error @ MirrorError::BlobUnknown(_)) => return Err(error),
            // Whether it can be had by GET is for them to see.
            asked => asked.ok().flatten(),
        };
        self.unstored(error, |progress| {
            progress.total = total;
            progress.end = Some(End::Unstored(Hasher::new(self.digest.algorithm())));
        });
        Ok(())
    }

    /// Lets the readers go on by themselves from where the store took no more.
    async fn pass_on(&self, partial: &Partial, error: &StoreError) {
        // First, since that is what makes room; who reads it has it open.
        if let Err(error) = self.mirror.0.store.discard_fill(self.digest).await {
            tracing::warn!(digest = %self.digest, %error, "a download could not be removed: {error}");
        }
        self.unstored(error, |progress| {
            // There is more to come, which is held back until all of it is right.
            progress.readable = partial.length;
            progress.end = Some(End::Unstored(partial.hasher.clone()));
        });
    }

    fn unstored(&self, error: &StoreError, end: impl FnOnce(&mut Progress)) {
        self.mirror.0.metrics.passed_through.inc();
        tracing::warn!(
            repository = %self.source.stored, digest = %self.digest, %error,
            "a blob can't be stored: it passes through: {error}"
        );
        self.publish(end);
    }

    /// Downloads until all is there, going on where it broke off.
    async fn download(&self, mut partial: Partial) -> Result<Partial, Stop> {
        let mut breaks = 0;
        loop {
            let before = partial.length;
            let error;
            (partial, error) = match self.attempt(partial).await {
                Ok(partial) => return Ok(partial),
                Err(Break::Stop(stop)) => return Err(stop),
                Err(Break::Bucket(kept, reason)) => {
                    partial = *kept;
                    self.set_help(Help::Broken);
                    tracing::warn!(
                        repository = %self.source.stored, digest = %self.digest, at = partial.length,
                        "the shared cache broke off, and the upstream is asked for the rest: {reason}"
                    );
                    continue;
                }
                Err(Break::Upstream(partial, error)) => (*partial, error),
            };
            breaks = if partial.length - before >= PROGRESS {
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
                | UpstreamError::Status { .. } => self.may_have_been_read(),
                UpstreamError::Denied { .. }
                | UpstreamError::NotFound { .. }
                | UpstreamError::Protocol { .. }
                | UpstreamError::TooLarge { .. } => false,
            };
            let limit = if self.may_have_been_read() {
                BREAKS
            } else {
                BREAKS_BEFORE_THE_FIRST_BYTE
            };
            if !retry || breaks >= limit {
                return Err(Stop::End(blob_error(error)));
            }
            self.mirror.0.metrics.fill_resumptions.inc();
            tracing::info!(
                repository = %self.source.stored, digest = %self.digest, at = partial.length, %error,
                "a download broke off and goes on: {error}"
            );
            tokio::time::sleep(pause(breaks)).await;
        }
    }

    /// Whether bytes of this download may have been sent to somebody.
    fn may_have_been_read(&self) -> bool {
        self.sender
            .borrow()
            .as_ref()
            .is_some_and(|(_, progress)| progress.readable > 0)
    }

    /// The blob from `at` on as the fleet's bucket has it, if that is worth asking.
    async fn shared(&self, at: u64) -> Result<Option<FetchedBlob>, MirrorError> {
        if self.help() != Help::Untried {
            return Ok(None);
        }
        let found = self.mirror.blob_of_fleet(self.source, self.digest, at);
        let Some(found) = found.await? else {
            self.set_help(Help::Unused);
            return Ok(None);
        };
        let total = found.stream.total();
        self.set_help(Help::Given {
            linked: found.linked,
        });
        Ok(Some(FetchedBlob {
            offset: at,
            total: Some(total),
            body: BlobBody::Bucket(Box::new(found.stream)),
        }))
    }

    /// One request, and its body to the end or to where it breaks.
    async fn attempt(&self, partial: Partial) -> Result<Partial, Break> {
        let Source { upstream, name, .. } = self.source;
        let shared = self.shared(partial.length).await?;
        let origin = if shared.is_some() {
            Origin::Bucket
        } else {
            Origin::Upstream
        };
        let fetched = match shared {
            Some(fetched) => fetched,
            None => {
                let asked = upstream.blob(name, self.digest, partial.length).await;
                match self.mirror.learn(self.source, asked).await {
                    Ok(Some(fetched)) => fetched,
                    // Nothing is missing: it was killed between its last byte and its name.
                    Ok(None) => return Ok(partial),
                    Err(error) => return Err(Break::Upstream(Box::new(partial), error)),
                }
            }
        };
        let FetchedBlob {
            offset,
            total,
            mut body,
        } = fetched;
        let what = format!("the blob {}", self.digest);
        if let Some(total) = total {
            self.check_total(total, partial.length)?;
        }
        self.publish(|progress| {
            progress.total = total.or(progress.total);
            progress.readable = self.readable(partial.length, progress.total);
        });
        // An upstream without ranges begins again at 0: what is here already is passed over.
        let mut skip = partial.length - offset;
        let mut partial = partial;
        loop {
            let (mut batch, end) = self.batch(&mut body, origin).await;
            for piece in &mut batch {
                let passed = skip.min(piece.len() as u64);
                skip -= passed;
                // `passed` is at most the length of a piece in memory.
                let _ = piece.split_to(usize::try_from(passed).unwrap_or(piece.len()));
            }
            let size = batch.iter().map(|piece| piece.len() as u64).sum::<u64>();
            let metrics = &self.mirror.0.metrics;
            let received = match origin {
                Origin::Upstream => &metrics.fetched_bytes,
                Origin::Bucket => &metrics.shared_bytes,
            };
            received.inc_by(size);
            if total.is_some_and(|total| partial.length + size > total) {
                return Err(self.source.mismatch(self.digest).into());
            }
            partial = self.append(partial, batch, total).await?;
            self.publish(|progress| {
                progress.readable = self.readable(partial.length, progress.total);
            });
            match end {
                None => {}
                Some(Ok(())) if total.is_some_and(|total| partial.length < total) => {
                    let error = upstream.transport(&what, "it ended early".to_owned());
                    return Err(Break::Upstream(Box::new(partial), error));
                }
                Some(Ok(())) => return Ok(partial),
                Some(Err(ended)) => return Err(self.ended(partial, origin, &what, &ended)),
            }
        }
    }

    fn ended(&self, partial: Partial, origin: Origin, what: &str, ended: &Ended) -> Break {
        let (partial, upstream) = (Box::new(partial), &self.source.upstream);
        match (origin, ended) {
            (Origin::Upstream, Ended::Late(idle)) => {
                Break::Upstream(partial, upstream.timeout_error(what, *idle))
            }
            (Origin::Upstream, Ended::Broken(error)) => {
                Break::Upstream(partial, upstream.transport_error(what, &**error))
            }
            (Origin::Bucket, Ended::Late(idle)) => {
                let idle = humantime::format_duration(*idle);
                Break::Bucket(partial, format!("S3 sent nothing for {idle}"))
            }
            (Origin::Bucket, Ended::Broken(error)) => Break::Bucket(partial, error.to_string()),
        }
    }

    /// Appends what has arrived, of `total` bytes, making room for it and the rest where the disk is
    /// full.
    async fn append(
        &self,
        mut partial: Partial,
        mut bytes: VecDeque<Bytes>,
        total: Option<u64>,
    ) -> Result<Partial, Stop> {
        loop {
            let appended = self.mirror.0.store.append(partial, bytes).await;
            let appended = appended.map_err(|error| Stop::End(error.into()))?;
            partial = appended.partial;
            let Some((left, error)) = appended.refused else {
                return Ok(partial);
            };
            let size = left.iter().map(|piece| piece.len() as u64).sum::<u64>();
            let wanted = total.map_or(size, |total| total.saturating_sub(partial.length));
            if !error.is_full() || !self.mirror.make_room(wanted).await {
                return Err(Stop::Store(Box::new(partial), error));
            }
            bytes = left;
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
            return Err(self.source.mismatch(self.digest));
        }
        Ok(())
    }

    /// The pieces of the body that are there now, at least one and about [`BATCH`] bytes, and how
    /// the body ended if it did.
    async fn batch(
        &self,
        body: &mut BlobBody,
        origin: Origin,
    ) -> (VecDeque<Bytes>, Option<Result<(), Ended>>) {
        let idle = match origin {
            Origin::Upstream => self.source.upstream.timeouts().idle,
            Origin::Bucket => STALL,
        };
        let mut pieces = VecDeque::new();
        let mut size = 0;
        while size < BATCH {
            let next = if pieces.is_empty() {
                match tokio::time::timeout(idle, body.next()).await {
                    Ok(next) => next,
                    Err(_) => return (pieces, Some(Err(Ended::Late(idle)))),
                }
            } else {
                match body.next().now_or_never() {
                    Some(next) => next,
                    None => break,
                }
            };
            match next {
                None => return (pieces, Some(Ok(()))),
                Some(Err(e)) => return (pieces, Some(Err(Ended::Broken(e)))),
                Some(Ok(data)) => {
                    size += data.len();
                    pieces.push_back(data);
                }
            }
        }
        (pieces, None)
    }
}

/// How long to wait after so many breaks in a row.
pub(super) fn pause(breaks: u32) -> Duration {
    let pause = FIRST_PAUSE * 2u32.pow(breaks.saturating_sub(1));
    pause.mul_f32(0.5 + fastrand::f32() / 2.0)
}

/// How many of `length` bytes readers may have while the digest is not known to be right.
fn readable(length: u64, total: Option<u64>) -> u64 {
    match total {
        Some(total) => length.min(total.saturating_sub(HOLDBACK)),
        None => length.saturating_sub(HOLDBACK),
    }
}
