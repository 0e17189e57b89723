//! A blob's bytes: from a file that is whole or still grows, and, while the store can't keep more,
//! as they come from the upstream.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::Stream;

use super::MirrorError;
use super::fill::{End, Fill};
use super::passing::Passing;
use crate::store::{Blob, FilePart};

/// The longest part that is given out at once, in bytes. What is counted as sent when a client
/// leaves is off by at most so much.
const PART: u64 = 4 * 1024 * 1024;

/// A piece of a blob.
#[derive(Debug)]
pub enum Piece {
    /// It is in a file.
    File(FilePart),
    /// It is in memory, and nowhere else.
    Bytes(Bytes),
}

impl Piece {
    /// Takes bytes off its beginning, of a file's at most `limit`; `None` when nothing is left.
    pub async fn take(&mut self, limit: u64) -> io::Result<Option<Bytes>> {
        match self {
            Self::File(part) if part.length > 0 => part.read(limit).await.map(Some),
            Self::Bytes(bytes) if !bytes.is_empty() => Ok(Some(std::mem::take(bytes))),
            Self::File(_) | Self::Bytes(_) => Ok(None),
        }
    }
}

/// A blob that can be read.
pub struct BlobContent {
    /// Its size in bytes; `None` while it arrives from an upstream that does not say.
    pub size: Option<u64>,
    from: From,
}

enum From {
    Store(Blob),
    Fill(Fill),
    Passing(Box<Passing>),
}

impl BlobContent {
    /// A blob of the store.
    pub fn stored(blob: Blob) -> Self {
        Self {
            size: Some(blob.size),
            from: From::Store(blob),
        }
    }

    /// A blob that arrives: waits until its size is known, or something of it can be read.
    pub(super) async fn filling(mut fill: Fill) -> Result<Self, MirrorError> {
        let progress = fill
            .wait(|progress| progress.total.is_some() || progress.readable > 0)
            .await?;
        match progress.end {
            Some(End::Failed(error)) => return Err(error),
            // Where there is nothing to hold back, the answer's head is all of it.
            Some(End::Unstored(hasher)) if progress.total == Some(0) => fill.verify(hasher)?,
            _ => {}
        }
        Ok(Self {
            size: progress.total,
            from: From::Fill(fill),
        })
    }

    /// Waits until all of it is here and has been verified, or passes through; then its size is
    /// known.
    pub async fn whole(&mut self) -> Result<(), MirrorError> {
        if let From::Fill(fill) = &mut self.from {
            let progress = fill.wait(|_| false).await?;
            match progress.end {
                Some(End::Failed(error)) => return Err(error),
                // It can't be verified before it is sent, and nothing but its size would tell the
                // client that it ends short.
                Some(End::Unstored(_)) if progress.total.is_none() => return Err(fill.given_up()),
                _ => {}
            }
            self.size = progress.total;
        }
        Ok(())
    }

    /// Waits until the byte at `start` can be read, so that a download that fails before is an
    /// error and not an answer that breaks off.
    pub async fn ready(&mut self, start: u64) -> Result<(), MirrorError> {
        let From::Fill(fill) = &mut self.from else {
            return Ok(());
        };
        let progress = fill.wait(|progress| progress.readable > start).await?;
        if progress.readable > start {
            return Ok(());
        }
        match progress.end {
            Some(End::Failed(error)) => Err(error),
            Some(End::Unstored(hasher)) => {
                let mut passing = fill.pass_through(start, progress.total);
                if start == 0 {
                    passing.verify(hasher);
                }
                passing.open().await?;
                self.from = From::Passing(Box::new(passing));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The pieces from `start` up to, and without, `end`; to the blob's end without `end`. It fails
    /// when the download does: then it has not given the last byte.
    ///
    /// Of a blob that passes through unstored, only who reads it from its first byte can know that
    /// it is right; another part of it comes as the upstream has it.
    pub fn pieces(
        self,
        start: u64,
        end: Option<u64>,
    ) -> impl Stream<Item = io::Result<Piece>> + Send {
        let reader = Reader {
            from: self.from,
            at: start,
            from_start: start == 0,
            end: end.or(self.size),
        };
        futures_util::stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|piece| (piece, reader)))
        })
    }
}

struct Reader {
    from: From,
    at: u64,
    /// Whether it reads all bytes that the digest is of, or could.
    from_start: bool,
    end: Option<u64>,
}

impl Reader {
    async fn next(&mut self) -> io::Result<Option<Piece>> {
        loop {
            if self.end.is_some_and(|end| self.at >= end) {
                return Ok(None);
            }
            let (file, until) = match &mut self.from {
                From::Store(blob) => (Arc::clone(&blob.file), blob.size),
                From::Passing(passing) => {
                    let next = passing.next().await.map_err(io::Error::other)?;
                    return Ok(next.map(|bytes| self.cut(bytes)));
                }
                From::Fill(download) => {
                    let at = self.at;
                    let progress = download
                        .wait(|progress| progress.readable > at)
                        .await
                        .map_err(io::Error::other)?;
                    match (progress.file, progress.end) {
                        (Some(file), _) if progress.readable > at => (file, progress.readable),
                        (_, Some(End::Failed(error))) => return Err(io::Error::other(error)),
                        (_, Some(End::Unstored(hasher))) => {
                            let mut passing = download.pass_through(at, progress.total);
                            if self.from_start {
                                passing.verify(hasher);
                            }
                            self.from = From::Passing(Box::new(passing));
                            continue;
                        }
                        // Verified, and read to its end.
                        _ => return Ok(None),
                    }
                }
            };
            let until = self.end.unwrap_or(u64::MAX).min(until);
            let length = until.saturating_sub(self.at).min(PART);
            let part = FilePart {
                file,
                offset: self.at,
                length,
            };
            self.at += length;
            return Ok(Some(Piece::File(part)));
        }
    }

    /// The part of what arrived that was asked for.
    fn cut(&mut self, mut bytes: Bytes) -> Piece {
        let left = self.end.map_or(u64::MAX, |end| end - self.at);
        bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        self.at += bytes.len() as u64;
        Piece::Bytes(bytes)
    }
}
