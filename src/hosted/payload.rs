//! What a client sends: piece by piece, and not for ever.

use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::Body;
use http_body_util::BodyExt as _;

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type BoxBody = Pin<Box<dyn Body<Data = Bytes, Error = BoxError> + Send>>;

/// The body of a request.
pub struct Payload {
    /// `None` when all of it was read, or no more can be.
    body: Option<BoxBody>,
    /// How long a client may send nothing.
    idle: Duration,
}

/// A body that can't be had as a whole.
#[derive(Debug)]
pub enum Unread {
    /// It has more bytes than it may.
    TooLarge,
    /// Its client has left, or let its time pass.
    Broken(io::Error),
}

impl Payload {
    /// The body of a request whose client may be silent for `idle` at a time.
    pub fn new<B>(body: B, idle: Duration) -> Self
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        Self {
            body: Some(Box::pin(body.map_err(Into::into))),
            idle,
        }
    }

    /// The next bytes; `None` at its end.
    pub async fn next(&mut self) -> Option<io::Result<Bytes>> {
        loop {
            let body = self.body.as_mut()?;
            let Ok(frame) = tokio::time::timeout(self.idle, body.frame()).await else {
                self.body = None;
                let silent = "the client has sent nothing for `clients.idle`";
                return Some(Err(io::Error::new(io::ErrorKind::TimedOut, silent)));
            };
            match frame {
                None => {
                    self.body = None;
                    return None;
                }
                Some(Err(error)) => {
                    self.body = None;
                    return Some(Err(io::Error::new(io::ErrorKind::ConnectionReset, error)));
                }
                // Trailers say nothing that is of use here.
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) if !bytes.is_empty() => return Some(Ok(bytes)),
                    _ => {}
                },
            }
        }
    }

    /// All of it, if it has no more than `limit` bytes.
    pub async fn whole(&mut self, limit: usize) -> Result<Bytes, Unread> {
        let announced = self
            .body
            .as_ref()
            .map_or(0, |body| body.size_hint().lower());
        if announced > limit as u64 {
            return Err(Unread::TooLarge);
        }
        let mut whole = BytesMut::new();
        while let Some(bytes) = self.next().await {
            let bytes = bytes.map_err(Unread::Broken)?;
            if whole.len() + bytes.len() > limit {
                return Err(Unread::TooLarge);
            }
            whole.extend_from_slice(&bytes);
        }
        Ok(whole.freeze())
    }

    /// Reads, and forgets, what is left of it up to `limit` bytes: many clients send all before they
    /// read an answer, and would find the connection closed instead.
    pub async fn drain(&mut self, limit: u64) {
        let mut drained = 0;
        while drained < limit {
            match self.next().await {
                Some(Ok(bytes)) => drained += bytes.len() as u64,
                _ => return,
            }
        }
    }
}
