//! A blob's bytes, from a file that is whole or still grows.

use std::io;
use std::sync::Arc;

use futures_util::Stream;

use super::MirrorError;
use super::fill::Fill;
use crate::store::{Blob, FilePart};

/// The longest part that is given out at once, in bytes. What is counted as sent when a client
/// leaves is off by at most so much.
const PART: u64 = 4 * 1024 * 1024;

/// A blob that can be read.
pub struct BlobContent {
    /// Its size in bytes; `None` while it arrives from an upstream that does not say.
    pub size: Option<u64>,
    from: From,
}

enum From {
    Store(Blob),
    Fill(Fill),
}

impl BlobContent {
    pub(super) fn stored(blob: Blob) -> Self {
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
        if let Some(Err(error)) = progress.outcome {
            return Err(error);
        }
        Ok(Self {
            size: progress.total,
            from: From::Fill(fill),
        })
    }

    /// Waits until all of it is here and has been verified; then its size is known.
    pub async fn whole(&mut self) -> Result<(), MirrorError> {
        if let From::Fill(fill) = &mut self.from {
            let progress = fill.wait(|_| false).await?;
            if let Some(Err(error)) = progress.outcome {
                return Err(error);
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
        match progress.outcome {
            Some(Err(error)) => Err(error),
            _ => Ok(()),
        }
    }

    /// The parts of files that hold the bytes from `start` up to, and without, `end`; to the blob's
    /// end without `end`. It fails when the download does: then it has not given the last byte.
    pub fn parts(
        self,
        start: u64,
        end: Option<u64>,
    ) -> impl Stream<Item = io::Result<FilePart>> + Send {
        let reader = Reader {
            from: self.from,
            at: start,
            end: end.or(self.size),
        };
        futures_util::stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|part| (part, reader)))
        })
    }
}

struct Reader {
    from: From,
    at: u64,
    end: Option<u64>,
}

impl Reader {
    async fn next(&mut self) -> io::Result<Option<FilePart>> {
        if self.end.is_some_and(|end| self.at >= end) {
            return Ok(None);
        }
        let (file, until) = match &mut self.from {
            From::Store(blob) => (Arc::clone(&blob.file), blob.size),
            From::Fill(download) => {
                let at = self.at;
                let progress = download
                    .wait(|progress| progress.readable > at)
                    .await
                    .map_err(io::Error::other)?;
                match (progress.file, progress.outcome) {
                    (Some(file), _) if progress.readable > at => (file, progress.readable),
                    (_, Some(Err(error))) => return Err(io::Error::other(error)),
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
        Ok(Some(part))
    }
}
