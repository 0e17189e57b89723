//! A blob as parallel ranged requests that are read in order.
//!
//! The first request asks for the first part, so that one round trip brings the first byte, and its
//! answer tells the size. The parts after it are asked for ahead, as many at once as make it faster
//! (`width`) and as the memory of all blobs together allows; without any of that memory a blob still
//! goes on, one part after the other, held back by who reads it.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use futures_util::future::{Either, select};
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use super::error::{Refusal, total};
use super::width::Width;
use super::{Bucket, BucketError, pause};

/// How long S3 may send nothing before a request is given up, and asked again.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);
/// Failures in a row, without progress in between, after which a blob is given up.
const FAILURES: u32 = 8;
/// Bytes between two failures that make the second a first one again.
const PROGRESS: u64 = 64 * 1024;
/// Pieces that wait for who reads a part that has no memory of its own.
const WAITING: usize = 4;
/// The unit of memory that is shared out, in bytes.
const UNIT: u64 = 1024;

/// How much of blobs is asked for ahead of who reads them.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The size of a range in bytes. Below 8 MiB, requests cost more than they bring.
    pub part: u64,
    /// The bytes of all ranges that are ahead of their readers, of all blobs together.
    pub memory: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            part: 8 * 1024 * 1024,
            memory: 56 * 1024 * 1024,
        }
    }
}

/// What all blobs of a bucket share.
#[derive(Debug)]
pub(super) struct Ranges {
    limits: Limits,
    memory: Arc<Semaphore>,
    usual: Usual,
}

impl Ranges {
    pub(super) fn new(limits: Limits) -> Self {
        let units = usize::try_from(limits.memory / UNIT).unwrap_or(Semaphore::MAX_PERMITS);
        Self {
            limits,
            memory: Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS))),
            usual: Usual::default(),
        }
    }
}

/// How long S3 takes to begin an answer, and how many second requests that still allows.
#[derive(Debug)]
struct Usual {
    /// The moving average, in microseconds.
    first_byte: AtomicU64,
    /// What second requests are paid from: an S3 that is slow as a whole is not asked twice as much.
    credit: AtomicI64,
}

impl Default for Usual {
    fn default() -> Self {
        Self {
            first_byte: AtomicU64::new(60_000),
            credit: AtomicI64::new(Self::MOST_CREDIT),
        }
    }
}

impl Usual {
    /// What a second request costs, in answers.
    const HEDGE: i64 = 10;
    const MOST_CREDIT: i64 = 80;
    const LEAST: Duration = Duration::from_millis(300);
    const MOST: Duration = Duration::from_secs(5);

    fn answered(&self, after: Duration) {
        let now = u64::try_from(after.as_micros()).unwrap_or(u64::MAX / 8);
        let before = self.first_byte.load(Ordering::Relaxed);
        self.first_byte
            .store((before * 7 + now) / 8, Ordering::Relaxed);
        if self.credit.load(Ordering::Relaxed) < Self::MOST_CREDIT {
            self.credit.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Without a byte for so long, a request is taken for stuck.
    fn stuck(&self) -> Duration {
        let usual = Duration::from_micros(self.first_byte.load(Ordering::Relaxed));
        (usual * 6).clamp(Self::LEAST, Self::MOST)
    }

    fn may_hedge(&self) -> bool {
        let take = |credit: i64| (credit >= Self::HEDGE).then_some(credit - Self::HEDGE);
        self.credit
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .is_ok()
    }
}

/// The bytes of a blob from some offset on, in order.
pub struct BlobStream {
    blob: Arc<Blob>,
    total: u64,
    offset: u64,
    /// The next byte to be given.
    at: u64,
    /// The first byte that is in no part yet.
    unasked: u64,
    parts: VecDeque<Part>,
    width: Width,
    /// How many times S3 has asked for less, as far as that was heeded.
    slowed: u64,
}

/// A range that is under way.
struct Part {
    end: u64,
    pieces: Receiver<Result<Bytes, BucketError>>,
    /// Its memory, given back as it is read; none for one that is held back by its reader.
    memory: Option<OwnedSemaphorePermit>,
    task: AbortHandle,
}

impl Drop for Part {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The object that is read.
struct Blob {
    bucket: Bucket,
    key: String,
    /// The version of the first answer: later ones must be of the same.
    etag: Option<String>,
    slowed: AtomicU64,
}

/// Why there is no body to read.
enum Failure {
    Absent,
    NoRange(Option<u64>),
    Error(BucketError),
}

impl From<BucketError> for Failure {
    fn from(error: BucketError) -> Self {
        Self::Error(error)
    }
}

/// An answer of which nothing was read yet.
struct Opened {
    body: ByteStream,
    total: u64,
    etag: Option<String>,
}

/// Asks for the first part of an object from `offset` on.
pub(super) async fn open(
    bucket: &Bucket,
    key: String,
    offset: u64,
) -> Result<Option<BlobStream>, BucketError> {
    let part = bucket.0.ranges.limits.part;
    let blob = Blob {
        bucket: bucket.clone(),
        key,
        etag: None,
        slowed: AtomicU64::new(0),
    };
    let mut failures = 0;
    let (opened, total) = loop {
        let end = offset.saturating_add(part);
        let asked = blob.hedged(blob.ask(offset, end), || blob.ask(offset, end));
        match asked.await {
            Ok(opened) => {
                let total = opened.total;
                break (Some(opened), total);
            }
            Err(Failure::Absent) => return Ok(None),
            // It has no byte from there on: an empty blob, or one of which all is here.
            Err(Failure::NoRange(total)) => {
                let total = match total {
                    Some(total) => Some(total),
                    None => bucket.size(&blob.key).await?,
                };
                match total {
                    None => return Ok(None),
                    Some(total) if total == offset => break (None, total),
                    Some(total) => {
                        let reason = format!("has {total} bytes, and none from {offset} on");
                        return Err(BucketError::Wrong {
                            key: blob.key,
                            reason,
                        });
                    }
                }
            }
            Err(Failure::Error(error)) => blob.again(&mut failures, error).await?,
        }
    };
    let mut stream = BlobStream {
        total,
        offset,
        at: offset,
        unasked: offset,
        parts: VecDeque::new(),
        width: Width::new(Instant::now()),
        slowed: 0,
        blob: Arc::new(Blob {
            etag: opened.as_ref().and_then(|opened| opened.etag.clone()),
            ..blob
        }),
    };
    if let Some(opened) = opened {
        stream.begin(Some(opened.body), None);
    }
    Ok(Some(stream))
}

impl BlobStream {
    /// The size of the whole blob in bytes.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Where it begins, in bytes from the blob's start.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next bytes; `None` after the last, or after an error. To stop waiting loses nothing.
    pub async fn next(&mut self) -> Option<Result<Bytes, BucketError>> {
        if self.at == self.total {
            return None;
        }
        self.ask_ahead();
        let part = self.parts.front_mut()?;
        let piece = part.pieces.recv().await.unwrap_or_else(|| {
            Err(BucketError::Transport {
                what: format!("GET {}", self.blob.key),
                error: "its task died".to_owned(),
            })
        });
        match piece {
            Ok(bytes) => {
                let size = bytes.len() as u64;
                self.at += size;
                let left = units(part.end - self.at);
                if let Some(memory) = &mut part.memory {
                    let read = memory.num_permits().saturating_sub(left);
                    drop(memory.split(read));
                }
                if self.at == part.end {
                    self.parts.pop_front();
                }
                let part = self.blob.bucket.0.ranges.limits.part;
                self.width.delivered(size, part, Instant::now());
                Some(Ok(bytes))
            }
            Err(error) => {
                self.parts.clear();
                self.at = self.total;
                Some(Err(error))
            }
        }
    }

    /// Asks for as many parts as may be under way now; for one in any case.
    fn ask_ahead(&mut self) {
        let slowed = self.blob.slowed.load(Ordering::Relaxed);
        if slowed > self.slowed {
            self.slowed = slowed;
            self.width.slowed();
        }
        if self.parts.is_empty() {
            self.begin(None, None);
        }
        while self.unasked < self.total && self.parts.len() <= self.width.get() {
            let ranges = &self.blob.bucket.0.ranges;
            let wanted = units(ranges.limits.part.min(self.total - self.unasked));
            let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
            let memory = Arc::clone(&ranges.memory).try_acquire_many_owned(wanted);
            let Ok(memory) = memory else { break };
            self.begin(None, Some(memory));
        }
    }

    /// Begins with the next part, of which `body` is the answer if there is one already.
    fn begin(&mut self, body: Option<ByteStream>, memory: Option<OwnedSemaphorePermit>) {
        let at = self.unasked;
        let part = self.blob.bucket.0.ranges.limits.part;
        let end = at.saturating_add(part).min(self.total);
        // What has memory never waits for its reader.
        let capacity = match &memory {
            Some(_) => usize::try_from(end - at).unwrap_or(usize::MAX),
            None => WAITING,
        };
        let (sender, pieces) = mpsc::channel(capacity.clamp(1, Semaphore::MAX_PERMITS));
        let task = tokio::spawn(Arc::clone(&self.blob).pump(at, end, body, sender)).abort_handle();
        self.unasked = end;
        self.parts.push_back(Part {
            end,
            pieces,
            memory,
            task,
        });
    }
}

/// How many units of memory so many bytes take.
fn units(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(UNIT)).unwrap_or(usize::MAX)
}

impl Blob {
    /// Sends the bytes from `at` to `end`, however often they have to be asked for.
    async fn pump(
        self: Arc<Self>,
        mut at: u64,
        end: u64,
        mut body: Option<ByteStream>,
        sender: Sender<Result<Bytes, BucketError>>,
    ) {
        let (mut failures, mut progress) = (0, 0);
        while at < end {
            match self.step(&mut body, at, end).await {
                Ok(mut bytes) => {
                    // A store that knows no ranges goes on to the object's end.
                    let wanted = usize::try_from(end - at).unwrap_or(usize::MAX);
                    bytes.truncate(wanted);
                    // It holds all of the buffer that it was read into, which may be several times
                    // as large, and of which the limit of memory knows nothing.
                    let bytes = Bytes::copy_from_slice(&bytes);
                    at += bytes.len() as u64;
                    progress += bytes.len() as u64;
                    if progress >= PROGRESS {
                        (failures, progress) = (0, 0);
                    }
                    if sender.send(Ok(bytes)).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    body = None;
                    if let Err(error) = self.again(&mut failures, error).await {
                        let _ = sender.send(Err(error)).await;
                        return;
                    }
                }
            }
        }
    }

    /// Waits a moment before the next attempt, if there is to be one.
    async fn again(&self, failures: &mut u32, error: BucketError) -> Result<(), BucketError> {
        *failures += 1;
        if !error.is_transient() || *failures == FAILURES {
            return Err(error);
        }
        if matches!(error, BucketError::Slow { .. }) {
            self.slowed.fetch_add(1, Ordering::Relaxed);
        }
        tracing::debug!(key = self.key, %error, "a range is asked for again: {error}");
        tokio::time::sleep(pause(*failures)).await;
        Ok(())
    }

    /// The next bytes of `body`, or of a new answer from `at` on, which then takes its place.
    async fn step(
        &self,
        body: &mut Option<ByteStream>,
        at: u64,
        end: u64,
    ) -> Result<Bytes, BucketError> {
        let own = async {
            match body.as_mut() {
                Some(body) => Ok((None, self.piece(body).await?)),
                None => self.fresh(at, end).await,
            }
        };
        let stepped = self.hedged(own, || self.fresh(at, end)).await;
        let (fresh, bytes) = stepped.map_err(|failure| match failure {
            Failure::Error(error) => error,
            Failure::Absent | Failure::NoRange(_) => BucketError::Changed {
                key: self.key.clone(),
            },
        })?;
        if fresh.is_some() {
            *body = fresh;
        }
        Ok(bytes)
    }

    async fn fresh(&self, at: u64, end: u64) -> Result<(Option<ByteStream>, Bytes), Failure> {
        let mut opened = self.ask(at, end).await?;
        let bytes = self.piece(&mut opened.body).await?;
        Ok((Some(opened.body), bytes))
    }

    /// Waits for `own`, and, where nothing comes of it for several times as long as usual, for a
    /// second request as well: whichever is first.
    async fn hedged<T, F>(
        &self,
        own: impl Future<Output = Result<T, Failure>>,
        again: impl FnOnce() -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let usual = &self.bucket.0.ranges.usual;
        let mut own = pin!(own);
        if let Ok(result) = timeout(usual.stuck(), &mut own).await {
            return result;
        }
        let race = async {
            if !usual.may_hedge() {
                return own.await;
            }
            tracing::debug!(
                key = self.key,
                "a range is stuck, and is asked for a second time"
            );
            match select(own, pin!(again())).await {
                Either::Left((Err(Failure::Error(_)), other)) => other.await,
                Either::Right((Err(Failure::Error(_)), own)) => own.await,
                Either::Left((result, _)) | Either::Right((result, _)) => result,
            }
        };
        timeout(PATIENCE, race).await.unwrap_or_else(|_| {
            let what = format!("GET {}", self.key);
            Err(BucketError::Timeout { what }.into())
        })
    }

    /// One request for the bytes from `at` to `end`, to the head of its answer.
    async fn ask(&self, at: u64, end: u64) -> Result<Opened, Failure> {
        let inner = &self.bucket.0;
        let asked = Instant::now();
        let request = inner.clients.pieces.get_object();
        let request = request
            .bucket(self.bucket.name())
            .key(&self.key)
            .range(format!("bytes={at}-{}", end - 1))
            .set_if_match(self.etag.clone());
        let what = format!("GET {}", self.key);
        // It is large, and held for every part: on the heap it is so once.
        let object = match Box::pin(request.send()).await {
            Ok(object) => object,
            Err(error) => {
                return Err(match inner.asker.refusal(&what, &error) {
                    Refusal::NoRange(total) => Failure::NoRange(total),
                    Refusal::Conflict => Failure::Error(BucketError::Changed {
                        key: self.key.clone(),
                    }),
                    refusal => match self.bucket.absence(&what, &self.key, refusal).await {
                        Ok(()) => Failure::Absent,
                        Err(error) => Failure::Error(error),
                    },
                });
            }
        };
        inner.ranges.usual.answered(asked.elapsed());
        inner
            .has_read
            .store(true, std::sync::atomic::Ordering::Relaxed);
        let wrong = |reason: &str| {
            Failure::Error(BucketError::Wrong {
                key: self.key.clone(),
                reason: reason.to_owned(),
            })
        };
        let total = match object.content_range() {
            Some(range) => {
                let from_here = range.strip_prefix(&format!("bytes {at}-")).is_some();
                let total = total(range).filter(|_| from_here);
                total.ok_or_else(|| wrong("was answered with another range than was asked for"))?
            }
            None if at == 0 => object
                .content_length()
                .and_then(|size| u64::try_from(size).ok())
                .ok_or_else(|| wrong("has no size"))?,
            None => return Err(wrong("can't be read by ranges: the store ignores them")),
        };
        Ok(Opened {
            body: object.body,
            total,
            etag: object.e_tag,
        })
    }

    /// The next bytes of an answer, at least one.
    async fn piece(&self, body: &mut ByteStream) -> Result<Bytes, BucketError> {
        let transport = |error: String| BucketError::Transport {
            what: format!("GET {}", self.key),
            error,
        };
        loop {
            match body.next().await {
                Some(Ok(bytes)) if bytes.is_empty() => {}
                Some(Ok(bytes)) => return Ok(bytes),
                Some(Err(error)) => return Err(transport(error.to_string())),
                None => return Err(transport("the answer ended early".to_owned())),
            }
        }
    }
}
