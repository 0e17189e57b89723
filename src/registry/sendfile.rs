//! Blobs from the page cache to the socket, without passing through this process.
//!
//! hyper writes what a body's frames hold, and can't be told to send a file. So a frame that stands
//! for a part of a file shows hyper a slice of [`STANDIN`], as long as the part, and puts the part
//! itself into the connection's [`Outbox`]. hyper hands that slice down to the socket unread; there
//! [`SendfileStream`] knows it by its address and calls sendfile(2) for the part instead.
//!
//! This needs a connection of its own (HTTP/1, no TLS): only there do frames reach the socket in
//! the order in which they were made, and untouched. Everywhere else bodies are plain bytes.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes};
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use nix::sys::sendfile::sendfile64;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use crate::store::FilePart;

/// The most that is sent at once, in bytes.
const STEP: usize = 2 * 1024 * 1024;

/// What is no longer, in bytes, is copied together and sent by send(2): a small answer's head and
/// body are, and a copy of them costs less than writev(2) does more.
const SMALL: usize = 4096;

/// Never read: only where it is matters. All zeros, so that it takes no memory.
static STANDIN: [u8; STEP] = [0; STEP];

/// The parts of files that a connection has yet to send, in their order.
#[derive(Debug, Clone, Default)]
pub struct Outbox(Arc<Mutex<VecDeque<FilePart>>>);

impl Outbox {
    /// Puts a part in, and gives the frame that stands for it.
    pub(super) fn put(&self, part: FilePart) -> Chunk {
        let length = part.length;
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(part);
        Chunk::Part(length)
    }

    /// Sends of the first part what the socket takes, at most `limit` bytes, and says how many.
    fn send(&self, socket: &TcpStream, limit: usize) -> io::Result<usize> {
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(part) = parts.front_mut() else {
            return Err(io::Error::other(
                "a frame of a file that is not in the outbox",
            ));
        };
        let limit = usize::try_from(part.length)
            .unwrap_or(usize::MAX)
            .min(limit);
        let mut offset = i64::try_from(part.offset).map_err(io::Error::other)?;
        let sent = match sendfile64(socket, &*part.file, Some(&mut offset), limit) {
            // The client's side: full for now, or gone.
            Err(errno @ (Errno::EAGAIN | Errno::EINTR | Errno::EPIPE | Errno::ECONNRESET)) => {
                return Err(errno.into());
            }
            Err(errno) => {
                tracing::error!(error = %errno, "a file of the store could not be sent");
                return Err(errno.into());
            }
            Ok(sent) => sent,
        };
        part.take(sent)
            .inspect_err(|error| tracing::error!(%error, "an answer broke off: {error}"))?;
        if part.length == 0 {
            parts.pop_front();
        }
        Ok(sent)
    }
}

/// A piece of a body, as hyper sees it.
#[derive(Debug)]
pub enum Chunk {
    /// These bytes.
    Bytes(Bytes),
    /// So many bytes of the parts in the connection's [`Outbox`].
    Part(u64),
}

impl Buf for Chunk {
    fn remaining(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Part(length) => usize::try_from(*length).unwrap_or(usize::MAX),
        }
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Part(_) => &STANDIN[..self.remaining().min(STEP)],
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::Bytes(bytes) => bytes.advance(count),
            Self::Part(length) => *length -= count as u64,
        }
    }
}

/// Whether a slice stands for a part of a file.
fn stands_in(slice: &[u8]) -> bool {
    STANDIN.as_ptr_range().contains(&slice.as_ptr()) && !slice.is_empty()
}

/// A client's connection that can send parts of files.
#[derive(Debug)]
pub(super) struct SendfileStream {
    socket: TcpStream,
    outbox: Outbox,
}

impl SendfileStream {
    pub(super) fn new(socket: TcpStream) -> (TokioIo<Self>, Outbox) {
        let outbox = Outbox::default();
        (
            TokioIo::new(Self {
                socket,
                outbox: outbox.clone(),
            }),
            outbox,
        )
    }
}

impl AsyncRead for SendfileStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for SendfileStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let plain = slices
            .iter()
            .position(|slice| stands_in(slice))
            .unwrap_or(slices.len());
        if plain > 0 || slices.is_empty() {
            let plain = &slices[..plain];
            let socket = Pin::new(&mut self.socket);
            let length: usize = plain.iter().map(|slice| slice.len()).sum();
            if plain.len() < 2 || length > SMALL {
                return socket.poll_write_vectored(context, plain);
            }
            let mut together = [0; SMALL];
            let mut rest = &mut together[..];
            for slice in plain {
                rest.put_slice(slice);
            }
            return socket.poll_write(context, &together[..length]);
        }
        loop {
            ready!(self.socket.poll_write_ready(context))?;
            let sent = self.socket.try_io(Interest::WRITABLE, || {
                self.outbox.send(&self.socket, slices[0].len())
            });
            match sent {
                // The socket's buffer is full: wait until it is not.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                sent => return Poll::Ready(sent),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
