//! The body of an answer, and what is counted and logged of it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use futures_util::Stream;
use http::{Method, StatusCode};
use http_body::{Frame, SizeHint};
use prometheus_client::metrics::counter::Counter;

/// The body of an answer.
pub struct Body {
    content: Content,
    /// Where the bytes are counted, for those of images.
    served: Option<Counter>,
    access: Option<Access>,
    sent: u64,
    /// How the body ended, for the access log.
    end: &'static str,
}

enum Content {
    Empty,
    Full(Bytes),
    Stream(Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>),
}

/// What the access log says of a request, when its answer has ended.
pub(super) struct Access {
    pub(super) method: Method,
    pub(super) path: String,
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
            sent: 0,
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

    /// Bytes that come; an error breaks the connection off.
    pub fn stream(stream: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Self {
        Self::new(Content::Stream(Box::pin(stream)))
    }

    /// Counts what is sent, and logs the request when its answer has ended.
    pub(super) fn observed(mut self, served: Option<Counter>, access: Option<Access>) -> Self {
        self.served = served;
        self.access = access;
        self
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = self.get_mut();
        let next = match &mut this.content {
            Content::Empty => None,
            Content::Full(bytes) => Some(Ok(std::mem::take(bytes))),
            Content::Stream(stream) => match stream.as_mut().poll_next(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(next) => next,
            },
        };
        if !matches!(this.content, Content::Stream(_)) {
            this.content = Content::Empty;
        }
        match &next {
            Some(Ok(bytes)) => {
                this.sent += bytes.len() as u64;
                if let Some(served) = &this.served {
                    served.inc_by(bytes.len() as u64);
                }
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "an answer broke off");
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
            path = access.path,
            status = access.status.as_u16(),
            bytes = self.sent,
            milliseconds = u64::try_from(access.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            agent = access.agent,
            end = self.end,
            "request",
        );
    }
}
