//! Blobs that are open, and parts of their files.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;

use super::lease::BlobFile;

/// A blob of the store, open for reading. It stays readable when it is removed meanwhile.
#[derive(Debug, Clone)]
pub struct Blob {
    /// The bytes.
    pub file: Arc<BlobFile>,
    /// How many, in bytes.
    pub size: u64,
}

/// A part of a file of the store.
#[derive(Debug, Clone)]
pub struct FilePart {
    /// The file.
    pub file: Arc<BlobFile>,
    /// Where the part begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

impl FilePart {
    /// Reads at most `limit` bytes of its beginning, and takes them off.
    pub async fn read(&mut self, limit: u64) -> io::Result<Bytes> {
        let (file, offset) = (Arc::clone(&self.file), self.offset);
        let length = usize::try_from(self.length.min(limit)).map_err(io::Error::other)?;
        let bytes: Bytes = tokio::task::spawn_blocking(move || {
            let mut buffer = vec![0; length];
            let read = file.read_at(&mut buffer, offset)?;
            buffer.truncate(read);
            io::Result::Ok(buffer.into())
        })
        .await
        .map_err(io::Error::other)??;
        self.take(bytes.len())?;
        Ok(bytes)
    }

    /// Takes `count` bytes off its beginning, which have been read or sent.
    pub fn take(&mut self, count: usize) -> io::Result<()> {
        if count == 0 {
            // A file of the store never shrinks, unless something else than this agent cuts it.
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "a file of the store is too short",
            ));
        }
        self.offset += count as u64;
        self.length -= count as u64;
        Ok(())
    }
}
