//! Uploads under way: one request at a time for each, many at once, each in bounded memory.
//!
//! Between two requests nothing of an upload is open, and only its length and the state of its hash
//! are in memory. After a restart both are found again by reading what is there.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedMutexGuard, watch};

use super::bucket::InBucket;
use super::{Home, Hosted, HostedError, Payload};
use crate::oci::{Algorithm, Digest};
use crate::store::layout::Repository;
use crate::store::upload::{Committed, Session, Upload, UploadId};

/// Uploads that are in memory; of more, those that were not used for longest are read again.
const SESSIONS: usize = 4096;
/// How long a request waits for another one to the same upload before it is refused: whoever only
/// asks how far it is must not be in the way of who goes on, nor who has just left.
const BUSY: Duration = Duration::from_secs(1);
/// Bytes of all uploads that are in memory, about: each has a piece that is being written, and one
/// that arrives.
const MEMORY: usize = 32 * 1024 * 1024;
/// Bytes that are written at once, while few clients push, and while many do.
const PIECES: (usize, usize) = (64 * 1024, 1024 * 1024);
/// Of however small frames: each has a cost of its own.
const PIECES_AT_ONCE: usize = 1024;

/// The uploads of this process.
#[derive(Default)]
pub(super) struct Uploads {
    known: Mutex<HashMap<UploadId, Known>>,
    receiving: AtomicUsize,
}

struct Known {
    repository: Repository,
    slot: Arc<Slot>,
    used: Instant,
}

/// An upload; who holds its state goes on with it.
struct Slot {
    state: Arc<tokio::sync::Mutex<State>>,
    cancelled: watch::Sender<bool>,
}

enum State {
    /// What is on the disk has to be read.
    Unread(Algorithm),
    /// So much is there.
    At(Box<Session>),
}

impl Slot {
    fn new(state: State) -> Self {
        Self {
            state: Arc::new(tokio::sync::Mutex::new(state)),
            cancelled: watch::channel(false).0,
        }
    }
}

/// An upload that a request goes on with; no other one can meanwhile.
pub struct Held {
    id: UploadId,
    repository: Repository,
    state: OwnedMutexGuard<State>,
    cancelled: watch::Receiver<bool>,
    /// How much is there.
    session: Session,
    /// How much was there when the request came.
    before: Session,
}

impl Held {
    /// Its name.
    pub fn id(&self) -> UploadId {
        self.id
    }

    /// Bytes that are there.
    pub fn length(&self) -> u64 {
        self.session.length
    }
}

/// Which bytes of an upload a request brings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Where they begin, where that is said.
    pub start: Option<u64>,
    /// How many there are, where that is said.
    pub length: Option<u64>,
}

impl Uploads {
    fn known(&self) -> MutexGuard<'_, HashMap<UploadId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slot of an upload, made where there is none.
    fn slot(&self, of: &Repository, id: UploadId, state: State) -> Option<Arc<Slot>> {
        let mut known = self.known();
        if known.len() >= SESSIONS && !known.contains_key(&id) {
            let idle = known
                .iter()
                .filter(|(_, it)| it.slot.state.try_lock().is_ok());
            let oldest = idle.min_by_key(|(_, it)| it.used).map(|(id, _)| *id);
            // Where all are in use, there is one for each connection at most.
            oldest.map(|id| known.remove(&id));
        }
        let known = known.entry(id).or_insert_with(|| Known {
            repository: of.clone(),
            slot: Arc::new(Slot::new(state)),
            used: Instant::now(),
        });
        known.used = Instant::now();
        (known.repository == *of).then(|| Arc::clone(&known.slot))
    }

    fn forget(&self, id: UploadId) {
        self.known().remove(&id);
    }
}

/// One of the uploads that bytes arrive for.
struct Receiving<'a>(&'a AtomicUsize);

impl<'a> Receiving<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }

    /// How much to gather before it is written.
    fn piece(&self) -> usize {
        let each = MEMORY / 2 / self.0.load(Ordering::Relaxed).max(1);
        each.clamp(PIECES.0, PIECES.1)
    }
}

impl Drop for Receiving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Hosted {
    /// Begins an upload to a repository, which is one of our own from then on.
    pub async fn begin(&self, of: &Repository, by: Algorithm) -> Result<Held, HostedError> {
        if self.0.leaving.load(Ordering::Relaxed) {
            return Err(HostedError::Leaving);
        }
        self.claim(of).await?;
        let id = UploadId::random()?;
        let begin = || self.0.store.begin_upload(of, id);
        if let Err(error) = self.0.room.with_room(0, begin).await {
            let _ = self.0.store.cancel_upload(of, id).await;
            return Err(error.into());
        }
        let session = Session::new(by);
        let slot = self.0.uploads.slot(of, id, State::At(Box::new(session)));
        let slot = slot.ok_or(HostedError::UploadUnknown)?;
        self.hold_slot(of, id, &slot).await
    }

    /// Takes an upload to go on with it.
    pub async fn hold(&self, of: &Repository, id: UploadId) -> Result<Held, HostedError> {
        let unread = State::Unread(Algorithm::Sha256);
        let slot = self.0.uploads.slot(of, id, unread);
        let slot = slot.ok_or(HostedError::UploadUnknown)?;
        let held = self.hold_slot(of, id, &slot).await?;
        // One that was given up is removed from the disk, and its session stays in memory.
        if !self.0.store.has_upload(of, id).await? {
            drop(held);
            self.0.uploads.forget(id);
            return Err(HostedError::UploadUnknown);
        }
        Ok(held)
    }

    async fn hold_slot(
        &self,
        of: &Repository,
        id: UploadId,
        slot: &Arc<Slot>,
    ) -> Result<Held, HostedError> {
        let state = tokio::time::timeout(BUSY, Arc::clone(&slot.state).lock_owned());
        let mut state = state.await.map_err(|_| HostedError::UploadBusy)?;
        if *slot.cancelled.borrow() {
            return Err(HostedError::UploadUnknown);
        }
        let session = match &*state {
            State::At(session) => Session::clone(session),
            State::Unread(algorithm) => match self.0.store.find_upload(of, id, *algorithm).await? {
                Some(session) => {
                    *state = State::At(Box::new(session.clone()));
                    session
                }
                None => {
                    self.0.uploads.forget(id);
                    return Err(HostedError::UploadUnknown);
                }
            },
        };
        Ok(Held {
            id,
            repository: of.clone(),
            state,
            cancelled: slot.cancelled.subscribe(),
            before: session.clone(),
            session,
        })
    }

    /// Takes what a request brings. All that arrives of it stays, also where the client leaves
    /// before its end; of a chunk that is not as long as it says, nothing does.
    pub async fn receive(
        &self,
        held: &mut Held,
        payload: &mut Payload,
        chunk: Chunk,
    ) -> Result<(), HostedError> {
        let upload = self.open(held, chunk).await?;
        let (upload, received) = self.receive_into(upload, held, payload, chunk.length).await;
        let Some(mut upload) = upload else {
            return received;
        };
        if matches!(received, Err(HostedError::WrongSize { .. })) {
            upload = self
                .0
                .store
                .reset_upload(upload, held.session.clone())
                .await?;
        }
        let brought = upload.session.length - held.session.length;
        self.0.metrics.pushed_bytes.inc_by(brought);
        held.session = upload.session;
        *held.state = State::At(Box::new(held.session.clone()));
        received
    }

    async fn open(&self, held: &mut Held, chunk: Chunk) -> Result<Upload, HostedError> {
        let length = held.session.length;
        if let Some(start) = chunk.start
            && start != length
        {
            return Err(HostedError::OutOfOrder { start, length });
        }
        let opened = self
            .0
            .store
            .open_upload(&held.repository, held.id, held.session.clone());
        match opened.await? {
            Some(upload) => {
                // Until it is known how this ends.
                let algorithm = held.session.hasher.algorithm();
                *held.state = State::Unread(algorithm);
                Ok(upload)
            }
            None => {
                self.0.uploads.forget(held.id);
                Err(HostedError::UploadUnknown)
            }
        }
    }

    /// While one piece is written and hashed, the next arrives.
    async fn receive_into(
        &self,
        upload: Upload,
        held: &mut Held,
        payload: &mut Payload,
        expected: Option<u64>,
    ) -> (Option<Upload>, Result<(), HostedError>) {
        let receiving = Receiving::new(&self.0.uploads.receiving);
        let mut received = 0;
        let mut upload = Some(upload);
        let mut writing = None;
        loop {
            let gather = gather(payload, &mut held.cancelled, receiving.piece());
            let (pieces, mut end) = gather.await;
            received += pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
            if expected.is_some_and(|expected| received > expected)
                || matches!(end, Some(Ok(()))) && expected.is_some_and(|it| received != it)
            {
                let said = expected.unwrap_or_default();
                end = Some(Err(HostedError::WrongSize { said, received }));
            }
            if let Some(task) = writing.take() {
                match written(task).await {
                    Ok(back) => upload = Some(back),
                    Err((back, error)) => return (back, Err(error)),
                }
            }
            if !pieces.is_empty()
                && let Some(upload) = upload.take()
            {
                let hosted = self.clone();
                writing = Some(tokio::spawn(
                    async move { hosted.append(upload, pieces).await },
                ));
            }
            if let Some(end) = end {
                return match writing.take() {
                    None => (upload, end),
                    Some(task) => match written(task).await {
                        Ok(back) => (Some(back), end),
                        Err((back, error)) => (back, Err(error)),
                    },
                };
            }
        }
    }

    /// Appends, and once more after an eviction where the disk is too full.
    async fn append(
        &self,
        upload: Upload,
        pieces: Vec<Bytes>,
    ) -> Result<Upload, (Option<Upload>, HostedError)> {
        let append = self.0.store.append_upload(upload, pieces);
        let (upload, refused) = append.await.map_err(|error| (None, error.into()))?;
        let Some((pieces, error)) = refused else {
            return Ok(upload);
        };
        let bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        if !error.is_full() || !self.0.room.make_room(bytes).await {
            return Err((Some(upload), error.into()));
        }
        let append = self.0.store.append_upload(upload, pieces);
        let (upload, refused) = append.await.map_err(|error| (None, error.into()))?;
        match refused {
            None => Ok(upload),
            Some((_, error)) => Err((Some(upload), error.into())),
        }
    }

    /// Makes an upload a blob of its repository.
    pub async fn commit(&self, mut held: Held, digest: &Digest) -> Result<(), HostedError> {
        let upload = self.open(&mut held, Chunk::default()).await?;
        let (of, id) = (held.repository.clone(), held.id);
        if let Home::Bucket(bucket) = &self.0.home {
            return self.send(bucket, held, upload, digest).await;
        }
        let committed = self.0.store.commit_upload(&of, id, upload, digest).await?;
        self.0.uploads.forget(id);
        match committed {
            Committed::Blob => Ok(()),
            Committed::Mismatch(found) => Err(HostedError::Mismatch {
                said: digest.clone(),
                found,
            }),
        }
    }

    /// Sends an upload to the bucket, once it is known to be right, and leaves it to the cache. Where
    /// that fails, it is again what it was before the request, so that the same request can be made
    /// once more.
    async fn send(
        &self,
        bucket: &InBucket,
        mut held: Held,
        upload: Upload,
        digest: &Digest,
    ) -> Result<(), HostedError> {
        let (of, id) = (held.repository.clone(), held.id);
        let hashed = self.0.store.digest_upload(upload, digest.algorithm());
        let (upload, found) = hashed.await?;
        if found != *digest {
            self.0.store.cancel_upload(&of, id).await?;
            self.0.uploads.forget(id);
            let said = digest.clone();
            return Err(HostedError::Mismatch { said, found });
        }
        let mut cancelled = held.cancelled.clone();
        let sent = tokio::select! {
            biased;
            // Who cancels it removes it from the disk.
            _ = cancelled.wait_for(|cancelled| *cancelled) => {
                return Err(HostedError::UploadUnknown);
            }
            sent = bucket.put_blob(&of, upload.path(), digest) => sent,
        };
        if let Err(error) = sent {
            *held.state = State::At(Box::new(held.before.clone()));
            return Err(error.into());
        }
        self.0.room.pushed_blob(&of, id, upload, digest).await;
        self.0.uploads.forget(id);
        Ok(())
    }

    /// Sees to it that an upload of which nothing is there is hashed as its digest will be.
    pub fn hash_by(&self, held: &mut Held, algorithm: Algorithm) {
        if held.session.length == 0 {
            held.session = Session::new(algorithm);
            held.before = held.session.clone();
            *held.state = State::At(Box::new(held.session.clone()));
        }
    }

    /// Gives an upload up, also one that a request is going on with.
    pub async fn cancel(&self, of: &Repository, id: UploadId) -> Result<(), HostedError> {
        let unread = State::Unread(Algorithm::Sha256);
        let slot = self.0.uploads.slot(of, id, unread);
        let slot = slot.ok_or(HostedError::UploadUnknown)?;
        slot.cancelled.send_replace(true);
        // The one who goes on with it stops at once.
        let state = slot.state.lock().await;
        let there = match &*state {
            State::At(_) => true,
            State::Unread(_) => self.0.store.has_upload(of, id).await?,
        };
        let cancelled = self.0.store.cancel_upload(of, id).await;
        self.0.uploads.forget(id);
        cancelled?;
        if there {
            Ok(())
        } else {
            Err(HostedError::UploadUnknown)
        }
    }
}

type Appending = tokio::task::JoinHandle<Result<Upload, (Option<Upload>, HostedError)>>;

async fn written(task: Appending) -> Result<Upload, (Option<Upload>, HostedError)> {
    match task.await {
        Ok(written) => written,
        // It has panicked, which is in the log.
        Err(_) => Err((None, HostedError::UploadUnknown)),
    }
}

/// Gathers about so many bytes; says how the body has ended, where it has.
async fn gather(
    payload: &mut Payload,
    cancelled: &mut watch::Receiver<bool>,
    piece: usize,
) -> (Vec<Bytes>, Option<Result<(), HostedError>>) {
    let (mut pieces, mut gathered) = (Vec::new(), 0);
    while gathered < piece && pieces.len() < PIECES_AT_ONCE {
        let next = tokio::select! {
            biased;
            _ = cancelled.wait_for(|cancelled| *cancelled) => {
                return (Vec::new(), Some(Err(HostedError::UploadUnknown)));
            }
            next = payload.next() => next,
        };
        match next {
            Some(Ok(bytes)) => {
                gathered += bytes.len();
                pieces.push(bytes);
            }
            Some(Err(error)) => return (pieces, Some(Err(HostedError::Broken(error)))),
            None => return (pieces, Some(Ok(()))),
        }
    }
    (pieces, None)
}
