//! A blob's bytes, from a file that is whole or still grows.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::Stream;

use super::MirrorError;
use super::fill::Fill;
use crate::store::Blob;

/// Bytes that are read at once. A slow client holds a few of these in memory and no more.
const CHUNK: u64 = 128 * 1024;

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

    /// The bytes from `start` up to, and without, `end`; to the blob's end without `end`. It fails
    /// when the download does: then it has not given the last byte.
    pub fn read(
        self,
        start: u64,
        end: Option<u64>,
    ) -> impl Stream<Item = io::Result<Bytes>> + Send {
        let reader = Reader {
            from: self.from,
            at: start,
            end: end.or(self.size),
        };
        futures_util::stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|bytes| (bytes, reader)))
        })
    }
}

struct Reader {
    from: From,
    at: u64,
    end: Option<u64>,
}

impl Reader {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
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
        let length = self
            .end
            .unwrap_or(u64::MAX)
            .min(until)
            .saturating_sub(self.at)
            .min(CHUNK);
        let bytes = read_at(file, self.at, length).await?;
        if bytes.is_empty() {
            // A file of the store never shrinks, unless something else than this agent cuts it.
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file is too short",
            ));
        }
        self.at += bytes.len() as u64;
        Ok(Some(bytes))
    }
}

async fn read_at(file: Arc<File>, at: u64, length: u64) -> io::Result<Bytes> {
    tokio::task::spawn_blocking(move || {
        let mut buffer = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        let read = file.read_at(&mut buffer, at)?;
        buffer.truncate(read);
        Ok(buffer.into())
    })
    .await
    .map_err(io::Error::other)?
}
