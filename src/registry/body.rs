//! The body of an answer, and what is counted and logged of it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Buf, Bytes};
use futures_util::{Stream, TryStreamExt};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, Method, Response, StatusCode};
use http_body::{Frame, SizeHint};
use prometheus_client::metrics::counter::Counter;

use super::activity::Turn;
use super::sendfile::{Chunk, Outbox};
use crate::mirror::Piece;

/// Bytes that are read at once, where a file can't be sent as it is, while few are. A slow client
/// holds one or two such pieces in memory and no more.
const READ: u64 = 128 * 1024;
/// Bytes that are read at once while many are.
const LEAST_READ: u64 = 16 * 1024;
/// Bytes of pieces in memory, above which they get smaller.
const READ_MEMORY: u64 = 8 * 1024 * 1024;
/// Bodies that are read piece by piece.
static READERS: AtomicU64 = AtomicU64::new(0);

/// One of the bodies that are read piece by piece.
struct Reader;

impl Reader {
    fn new() -> Self {
        READERS.fetch_add(1, Ordering::Relaxed);
        Self
    }

    /// How much to read at once: the more readers there are, the less each may hold.
    fn size() -> u64 {
        let readers = READERS.load(Ordering::Relaxed).max(1);
        (READ_MEMORY / readers).clamp(LEAST_READ, READ)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        READERS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The type of an answer that is for people.
pub const TEXT: &str = "text/plain; charset=utf-8";

/// The body of an answer.
pub struct Body {
    content: Content,
    /// Where the bytes are counted, for those of images.
    served: Option<Counter>,
    access: Option<Box<Access>>,
    /// Whose turn it is, where the connection has a deadline for its client.
    turn: Option<Turn>,
    counts_frames: bool,
    sent: u64,
    /// How many bytes make it whole, where that was promised.
    promised: Option<u64>,
    /// How the body ended, for the access log.
    end: &'static str,
}

enum Content {
    Empty,
    Full(Bytes),
    Stream(Pin<Box<dyn Stream<Item = io::Result<Chunk>> + Send>>),
}

/// What the access log says of a request, when its answer has ended.
pub(super) struct Access {
    pub(super) method: Method,
    pub(super) target: String,
    pub(super) agent: String,
    pub(super) status: StatusCode,
    pub(super) started: Instant,
}

impl Body {
    fn new(content: Content) -> Self {
        let end = if matches!(content, Content::Stream(_)) {
            "client left"
        } else {
            "complete"
        };
        Self {
            content,
            served: None,
            access: None,
            turn: None,
            counts_frames: false,
            sent: 0,
            promised: None,
            end,
        }
    }

    /// No bytes.
    pub fn empty() -> Self {
        Self::new(Content::Empty)
    }

    /// These bytes.
    pub fn full(bytes: Bytes) -> Self {
        Self::new(Content::Full(bytes))
    }

    /// An answer with these bytes, all of them at once.
    pub fn answer(
        status: StatusCode,
        content_type: &'static str,
        bytes: impl Into<Bytes>,
    ) -> Response<Self> {
        let bytes = bytes.into();
        let mut response = Response::new(Self::empty());
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(CONTENT_LENGTH, bytes.len().into());
        *response.body_mut() = Self::full(bytes);
        response
    }

    /// The pieces that come, those in files sent as they are where the connection has an outbox, and
    /// read otherwise; an error breaks the connection off.
    pub(super) fn pieces(
        pieces: impl Stream<Item = io::Result<Piece>> + Send + 'static,
        outbox: Option<Outbox>,
    ) -> Self {
        if let Some(outbox) = outbox {
            return Self::stream(pieces.map_ok(move |piece| match piece {
                Piece::File(part) => outbox.put(part),
                Piece::Bytes(bytes) => Chunk::Bytes(bytes),
            }));
        }
        let reader = Arc::new(Reader::new());
        Self::stream(
            pieces
                .map_ok(move |piece| {
                    let start = (piece, Arc::clone(&reader));
                    futures_util::stream::try_unfold(start, |(mut piece, reader)| async move {
                        let bytes = piece.take(Reader::size()).await?;
                        Ok(bytes.map(|bytes| (Chunk::Bytes(bytes), (piece, reader))))
                    })
                })
                .try_flatten(),
        )
    }

    /// Pieces that come; an error breaks the connection off.
    fn stream(stream: impl Stream<Item = io::Result<Chunk>> + Send + 'static) -> Self {
        Self::new(Content::Stream(Box::pin(stream)))
    }

    /// Counts what is sent, of `promised` bytes where the answer says so, and logs the request when
    /// it has ended.
    pub(super) fn observed(
        mut self,
        promised: Option<u64>,
        served: Option<Counter>,
        access: Option<Access>,
    ) -> Self {
        self.promised = promised;
        self.served = served;
        self.access = access.map(Box::new);
        self
    }

    /// Tells a connection whose turn it is while this is being sent: it is ours to its end, or,
    /// where `counts_frames`, the client's after each frame until the next is asked for.
    pub(super) fn taking(mut self, turn: Turn, counts_frames: bool) -> Self {
        self.turn = Some(turn);
        self.counts_frames = counts_frames;
        self
    }
}

impl http_body::Body for Body {
    type Data = Chunk;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Chunk>, io::Error>>> {
        let this = self.get_mut();
        let next = match &mut this.content {
            Content::Empty => None,
            Content::Full(bytes) => Some(Ok(Chunk::Bytes(std::mem::take(bytes)))),
            Content::Stream(stream) => match stream.as_mut().poll_next(context) {
                Poll::Pending => {
                    if let Some(turn) = &mut this.turn {
                        turn.ours();
                    }
                    return Poll::Pending;
                }
                Poll::Ready(next) => next,
            },
        };
        if let Some(turn) = &mut this.turn
            && this.counts_frames
        {
            turn.clients();
        }
        if !matches!(this.content, Content::Stream(_)) {
            this.content = Content::Empty;
        }
        match &next {
            Some(Ok(chunk)) => {
                this.sent += chunk.remaining() as u64;
                if let Some(served) = &this.served {
                    served.inc_by(chunk.remaining() as u64);
                }
                // After the last byte that was promised, nobody asks whether there are more.
                if this.promised == Some(this.sent) {
                    this.end = "complete";
                }
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "an answer broke off: {error}");
                this.end = "broken off";
            }
            None => this.end = "complete",
        }
        Poll::Ready(next.map(|next| next.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.content, Content::Empty)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Empty => SizeHint::with_exact(0),
            Content::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Stream(_) => SizeHint::default(),
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        let Some(access) = self.access.take() else {
            return;
        };
        tracing::info!(
            target: "access",
            method = %access.method,
            path = access.target,
            status = access.status.as_u16(),
            bytes = self.sent,
            milliseconds = u64::try_from(access.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            agent = access.agent,
            end = self.end,
            // The journal shows people nothing but this.
            "{} {} {}",
            access.method,
            access.target,
            access.status.as_u16(),
        );
    }
}
