//! A large body in parts, straight to its key.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use memmap2::MmapMut;

use super::error::Refusal;
use super::writer::Writer;
use super::{BucketError, layout};
use crate::oci::Algorithm;

/// The least size of a part, in bytes.
const PART: u64 = 8 * 1024 * 1024;
/// The most parts that S3 takes.
const PARTS: u64 = 10_000;
/// Parts of one body that are sent at the same time.
const AT_ONCE: usize = 8;

/// A part of a file.
struct Piece {
    number: i32,
    at: u64,
    size: u64,
}

/// The parts of a body of `size` bytes, which is not empty.
fn pieces(size: u64) -> Vec<Piece> {
    let part = PART.max(size.div_ceil(PARTS));
    (0..size.div_ceil(part))
        .zip(1..)
        .map(|(index, number)| {
            let at = index * part;
            Piece {
                number,
                at,
                size: part.min(size - at),
            }
        })
        .collect()
}

/// An upload that has not been completed: it is aborted when nobody goes on with it.
struct Unfinished {
    client: Client,
    bucket: String,
    key: String,
    id: String,
    open: bool,
}

impl Unfinished {
    async fn abort(&mut self) {
        self.open = false;
        abort(&self.client, &self.bucket, &self.key, &self.id).await;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Without a runtime the process ends, and the next one aborts it by its age.
        if let (true, Ok(runtime)) = (self.open, tokio::runtime::Handle::try_current()) {
            let (client, bucket) = (self.client.clone(), self.bucket.clone());
            let (key, id) = (self.key.clone(), self.id.clone());
            runtime.spawn(async move { abort(&client, &bucket, &key, &id).await });
        }
    }
}

async fn abort(client: &Client, bucket: &str, key: &str, id: &str) {
    let request = client.abort_multipart_upload();
    let request = request.bucket(bucket).key(key).upload_id(id);
    if let Err(error) = request.send().await {
        let error = error.into_service_error();
        tracing::warn!(
            key,
            "an upload could not be aborted, which is tried again by its age: {error}"
        );
    }
}

impl Writer {
    /// Sends a file in parts. Who stops waiting aborts it.
    pub(super) async fn send_in_parts(
        &self,
        path: &Path,
        file: Arc<File>,
        size: u64,
        key: &str,
    ) -> Result<(), BucketError> {
        let clients = &self.0.clients;
        let what = format!("POST {key}?uploads");
        let request = clients.small.create_multipart_upload();
        let request = request
            .bucket(self.name())
            .key(key)
            .set_storage_class(self.storage_class())
            .set_server_side_encryption(self.encryption())
            .set_ssekms_key_id(self.kms_key());
        let created = request.send().await;
        let created = created.map_err(|error| self.refused(&what, &error))?;
        let mut upload = Unfinished {
            client: clients.small.clone(),
            bucket: self.name().to_owned(),
            key: key.to_owned(),
            id: created.upload_id.unwrap_or_default(),
            open: true,
        };
        let sent = self.send_parts(path, &file, size, key, &upload.id).await;
        let completed = match sent {
            Ok(parts) => self.complete(key, &upload.id, parts, size).await,
            Err(error) => Err(error),
        };
        match completed {
            Ok(()) => upload.open = false,
            Err(_) => upload.abort().await,
        }
        completed
    }

    async fn send_parts(
        &self,
        path: &Path,
        file: &Arc<File>,
        size: u64,
        key: &str,
        id: &str,
    ) -> Result<Vec<CompletedPart>, BucketError> {
        let parts = stream::iter(pieces(size).into_iter().map(async |piece| {
            let _memory = self.memory(piece.size).await;
            let number = piece.number;
            let bytes = read(path, Arc::clone(file), piece).await?;
            let what = format!("PUT {key}?partNumber={number}");
            let request = self.0.clients.sending.upload_part();
            let request = request
                .bucket(self.name())
                .key(key)
                .upload_id(id)
                .part_number(number)
                .body(ByteStream::from(bytes))
                .customize();
            let request = if self.0.clients.unsigned {
                request.disable_payload_signing()
            } else {
                request
            };
            let sent = request.send().await;
            let sent = sent.map_err(|error| self.refused(&what, &error))?;
            let part = CompletedPart::builder()
                .part_number(number)
                .set_e_tag(sent.e_tag)
                .set_checksum_crc32(sent.checksum_crc32)
                .build();
            Ok::<_, BucketError>(part)
        }));
        // In the order in which they are done: one that is slow keeps no others waiting.
        let parts = parts.buffer_unordered(AT_ONCE);
        let mut parts: Vec<CompletedPart> = parts.try_collect().await?;
        parts.sort_unstable_by_key(CompletedPart::part_number);
        Ok(parts)
    }

    async fn complete(
        &self,
        key: &str,
        id: &str,
        parts: Vec<CompletedPart>,
        size: u64,
    ) -> Result<(), BucketError> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts));
        let what = format!("POST {key}?uploadId");
        let request = self.0.clients.sending.complete_multipart_upload();
        let request = request.bucket(self.name()).key(key).upload_id(id);
        let completed = request.multipart_upload(parts.build()).send().await;
        let Err(error) = completed else { return Ok(()) };
        // The answer to the first attempt may have been lost.
        if matches!(self.0.asker.refusal(&what, &error), Refusal::Absent)
            && self.size_of(key).await? == Some(size)
        {
            return Ok(());
        }
        Err(self.refused(&what, &error))
    }

    /// Aborts the uploads of blobs that were begun longer ago than `age` and never completed, or, for
    /// a dry run, leaves them; says how many there were.
    pub async fn stale_uploads(&self, age: Duration, dry_run: bool) -> Result<usize, BucketError> {
        let before = SystemTime::now() - age;
        let mut found = 0;
        for algorithm in Algorithm::ALL {
            let prefix = self.0.prefix.key(&format!("{}/", layout::blobs(algorithm)));
            let what = format!("LIST {prefix}?uploads");
            let (mut key, mut id) = (None, None);
            loop {
                let request = self.0.clients.small.list_multipart_uploads();
                let request = request
                    .bucket(self.name())
                    .prefix(&prefix)
                    .set_key_marker(key)
                    .set_upload_id_marker(id);
                let page = request.send().await;
                let page = page.map_err(|error| {
                    let refusal = self.0.asker.refusal(&what, &error);
                    let right = "s3:ListBucketMultipartUploads";
                    self.0.asker.error(&what, right, refusal)
                })?;
                for upload in page.uploads() {
                    let begun = upload.initiated().map(|at| SystemTime::try_from(*at));
                    let stale = matches!(begun, Some(Ok(begun)) if begun < before);
                    // Some stores list what the prefix does not cover.
                    if let (true, Some(key), Some(id)) = (stale, upload.key(), upload.upload_id())
                        && key.starts_with(&prefix)
                    {
                        if !dry_run {
                            abort(&self.0.clients.small, self.name(), key, id).await;
                        }
                        found += 1;
                    }
                }
                (key, id) = (page.next_key_marker, page.next_upload_id_marker);
                if page.is_truncated != Some(true) || key.is_none() {
                    break;
                }
            }
        }
        Ok(found)
    }
}

/// Reads a part of a file into memory of its own, which goes back to the system when the part is
/// sent: the allocator keeps such pieces for each thread that ever had one.
async fn read(path: &Path, file: Arc<File>, piece: Piece) -> Result<Bytes, BucketError> {
    let size = usize::try_from(piece.size).unwrap_or(usize::MAX);
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = MmapMut::map_anon(size)?;
        file.read_exact_at(&mut bytes, piece.at)?;
        Ok(Bytes::from_owner(bytes))
    });
    let read = read.await.unwrap_or_else(|e| Err(std::io::Error::other(e)));
    read.map_err(|source| BucketError::File {
        path: path.to_owned(),
        source: Arc::new(source),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_body_and_are_never_too_many_or_too_small() {
        const GIB: u64 = 1 << 30;
        for size in [1, PART, PART + 1, GIB, 200 * GIB, 5 * 1024 * GIB - 1] {
            let pieces = pieces(size);
            assert!(pieces.len() as u64 <= PARTS, "{size}: {}", pieces.len());
            let mut at = 0;
            for (piece, number) in pieces.iter().zip(1..) {
                assert_eq!((piece.at, piece.number), (at, number), "{size}");
                at += piece.size;
                assert!(piece.size >= PART || at == size, "{size}");
            }
            assert_eq!(at, size);
        }
    }
}
