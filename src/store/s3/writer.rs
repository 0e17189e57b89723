//! What changes a bucket.
//!
//! A writer's order, so that no reader ever sees a link to nothing: blobs ([`Writer::put_blob`]),
//! their links ([`Writer::link_layer`]), the manifest ([`Writer::put_manifest`]), and the tag last
//! ([`Writer::put_tag`]).

use std::fs::File;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ServerSideEncryption, StorageClass};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde_json::Value;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

use super::error::Refusal;
use super::{AT_ONCE, Bucket, BucketError, DESCRIPTOR_LIMIT, ETag, Limits, layout};
use crate::config::{Encryption, S3Settings};
use crate::oci::{Digest, Manifest, Tag};
use crate::store::layout::Repository;

/// Up to this size, in bytes, a blob is sent by one request.
const SINGLE: u64 = 16 * 1024 * 1024;
/// The bytes of all bodies that are in memory to be sent.
const MEMORY: u64 = 64 * 1024 * 1024;
/// The unit of memory that is shared out, in bytes.
const UNIT: u64 = 1024;
/// The most keys that a tag may have: one for each manifest that it ever was.
const TAG_KEYS: usize = 100_000;

/// A bucket that can be written. It reads as well.
#[derive(Debug, Clone)]
pub struct Writer {
    bucket: Bucket,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    storage_class: Option<StorageClass>,
    encryption: Option<Encryption>,
    memory: Arc<Semaphore>,
    /// Whether the store obeys `If-Match` and `If-None-Match` of a write, once that was tried.
    fences: OnceCell<bool>,
}

impl Deref for Writer {
    type Target = Bucket;

    fn deref(&self) -> &Bucket {
        &self.bucket
    }
}

/// What has to be true of a key for it to be written.
#[derive(Debug, Clone, Copy)]
pub(super) enum Condition<'a> {
    /// Nothing.
    Always,
    /// It is not there.
    New,
    /// It is still this.
    Is(&'a ETag),
}

impl<'a> Condition<'a> {
    fn of(known: Option<&'a ETag>) -> Self {
        known.map_or(Self::New, Self::Is)
    }
}

impl Writer {
    /// Opens a bucket to write to it, as [`Bucket::open`] does to read.
    pub async fn open(settings: &S3Settings, limits: Limits) -> Result<Self, BucketError> {
        let bucket = Bucket::open(settings, limits).await?;
        Ok(Self::over(bucket, settings))
    }

    /// Writes to a bucket that was opened by the same settings, over the same connections.
    pub fn over(bucket: Bucket, settings: &S3Settings) -> Self {
        let units = usize::try_from(MEMORY / UNIT).unwrap_or(Semaphore::MAX_PERMITS);
        Self {
            bucket,
            shared: Arc::new(Shared {
                storage_class: settings.storage_class.as_deref().map(StorageClass::from),
                encryption: settings.encryption.clone(),
                memory: Arc::new(Semaphore::new(units)),
                fences: OnceCell::new(),
            }),
        }
    }

    /// The half that only reads.
    pub fn bucket(&self) -> &Bucket {
        &self.bucket
    }

    pub(super) fn storage_class(&self) -> Option<StorageClass> {
        self.shared.storage_class.clone()
    }

    pub(super) fn encryption(&self) -> Option<ServerSideEncryption> {
        Some(match self.shared.encryption.as_ref()? {
            Encryption::Aes256 => ServerSideEncryption::Aes256,
            Encryption::Kms { .. } => ServerSideEncryption::AwsKms,
        })
    }

    pub(super) fn kms_key(&self) -> Option<String> {
        match self.shared.encryption.as_ref()? {
            Encryption::Aes256 => None,
            Encryption::Kms { key } => key.clone(),
        }
    }

    /// Waits until so many bytes may be held in memory. More than there are at all are all.
    pub(super) async fn memory(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let units = u32::try_from(bytes.min(MEMORY).div_ceil(UNIT)).unwrap_or(u32::MAX);
        let memory = Arc::clone(&self.shared.memory);
        memory.acquire_many_owned(units).await.ok()
    }

    pub(super) async fn size_of(&self, key: &str) -> Result<Option<u64>, BucketError> {
        self.bucket.size(key).await
    }

    pub(super) fn refused<E>(&self, what: &str, error: &SdkError<E, HttpResponse>) -> BucketError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let asker = &self.bucket.0.asker;
        asker.error(what, "s3:PutObject", asker.refusal(what, error))
    }

    /// Brings a file to the bucket as a blob, straight to its final key, unless it is there with the
    /// same size already, where it is in use from now on; says whether it was sent. That its bytes are
    /// what `digest` says is for the caller to have seen. Who stops waiting leaves nothing behind.
    pub async fn put_blob(&self, path: &Path, digest: &Digest) -> Result<bool, BucketError> {
        self.bring_blob(path, digest, false).await
    }

    /// The same in place of what is there, which is not what its digest says.
    pub async fn replace_blob(&self, path: &Path, digest: &Digest) -> Result<(), BucketError> {
        self.bring_blob(path, digest, true).await.map(drop)
    }

    async fn bring_blob(
        &self,
        path: &Path,
        digest: &Digest,
        replace: bool,
    ) -> Result<bool, BucketError> {
        let failed = |source: std::io::Error| BucketError::File {
            path: path.to_owned(),
            source: Arc::new(source),
        };
        let opened = {
            let path = path.to_owned();
            tokio::task::spawn_blocking(move || {
                let file = File::open(&path)?;
                let size = file.metadata()?.len();
                Ok((file, size))
            })
        };
        let opened = opened
            .await
            .unwrap_or_else(|e| Err(std::io::Error::other(e)));
        let (file, size) = opened.map_err(failed)?;
        if !replace && self.use_or_miss(digest).await? == Some(size) {
            return Ok(false);
        }
        let path_of_blob = layout::blob(digest);
        let key = self.bucket.0.prefix.key(&path_of_blob);
        if size > SINGLE {
            let sent = self.send_in_parts(path, Arc::new(file), size, &key).await;
            return sent.map(|()| true);
        }
        let _memory = self.memory(size).await;
        let read = tokio::task::spawn_blocking(move || {
            use std::io::Read;
            let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
            file.take(SINGLE).read_to_end(&mut bytes)?;
            Ok(Bytes::from(bytes))
        });
        let read = read.await.unwrap_or_else(|e| Err(std::io::Error::other(e)));
        let bytes = read.map_err(failed)?;
        self.put(&path_of_blob, bytes, Condition::Always).await?;
        Ok(true)
    }

    /// Records that a repository has a blob, whose bytes must be there already.
    pub async fn link_layer(&self, of: &Repository, digest: &Digest) -> Result<(), BucketError> {
        self.put_link(&layout::layer_link(of, digest), digest).await
    }

    /// Stores a manifest for a repository: its bytes, then its link.
    pub async fn put_manifest(
        &self,
        of: &Repository,
        manifest: &Manifest,
    ) -> Result<(), BucketError> {
        let path = layout::blob(&manifest.digest);
        let bytes = manifest.bytes.clone();
        self.put(&path, bytes, Condition::Always).await?;
        let link = layout::revision_link(of, &manifest.digest);
        self.put_link(&link, &manifest.digest).await
    }

    /// Moves a tag to a manifest that is stored already, if it is still what it was when it was read
    /// (`known`; `None`: if there was none), and else is [`BucketError::Conflict`]. A store that
    /// does not know such conditions moves it in any case, which the log says once.
    pub async fn put_tag(
        &self,
        of: &Repository,
        tag: &Tag,
        digest: &Digest,
        known: Option<&ETag>,
    ) -> Result<ETag, BucketError> {
        let condition = if self.fences().await? {
            Condition::of(known)
        } else {
            Condition::Always
        };
        let index = layout::tag_index_link(of, tag, digest);
        self.put_link(&index, digest).await?;
        let text = Bytes::copy_from_slice(digest.as_str().as_bytes());
        let put = self.put(&layout::tag_link(of, tag), text, condition).await;
        if let Err(BucketError::Conflict { .. }) = &put
            && let Some(now) = self.bucket.tag(of, tag).await?
            && now.digest == *digest
        {
            // It was our own write, the answer to which was lost, or one of the same.
            return Ok(now.etag);
        }
        put
    }

    /// Records that one manifest of a repository refers to another, by a descriptor of it.
    pub async fn put_referrer(
        &self,
        of: &Repository,
        subject: &Digest,
        referrer: &Digest,
        descriptor: &Value,
    ) -> Result<(), BucketError> {
        let path = layout::referrer_to(of, subject, referrer);
        let text = descriptor.to_string();
        if text.len() > DESCRIPTOR_LIMIT {
            let reason = format!("would have more than {DESCRIPTOR_LIMIT} bytes");
            return Err(self.bucket.wrong(&path, reason));
        }
        self.put(&path, text.into(), Condition::Always).await?;
        Ok(())
    }

    /// Removes what one manifest says of another it refers to.
    pub async fn remove_referrer(
        &self,
        of: &Repository,
        subject: &Digest,
        referrer: &Digest,
    ) -> Result<(), BucketError> {
        self.remove(&layout::referrer_to(of, subject, referrer))
            .await
    }

    /// Removes a tag, and what it was before: the tag itself first, so that nobody sees half of it.
    pub async fn remove_tag(&self, of: &Repository, tag: &Tag) -> Result<(), BucketError> {
        self.remove(&layout::tag_link(of, tag)).await?;
        let rest = self.bucket.files(&layout::tag(of, tag), TAG_KEYS).await?;
        let removed = stream::iter(rest.into_iter().map(async |path| self.remove(&path).await));
        removed.buffer_unordered(AT_ONCE).try_collect().await
    }

    /// Takes a manifest away from a repository. Its bytes stay.
    pub async fn remove_manifest(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<(), BucketError> {
        self.remove(&layout::revision_link(of, digest)).await
    }

    /// Takes a blob away from a repository. Its bytes stay.
    pub async fn remove_layer(&self, of: &Repository, digest: &Digest) -> Result<(), BucketError> {
        self.remove(&layout::layer_link(of, digest)).await
    }

    /// Removes the bytes of a blob, whoever's it is.
    pub async fn remove_blob(&self, digest: &Digest) -> Result<(), BucketError> {
        self.remove(&layout::blob(digest)).await
    }

    pub(super) async fn put_link(&self, path: &str, to: &Digest) -> Result<(), BucketError> {
        let text = Bytes::copy_from_slice(to.as_str().as_bytes());
        self.put(path, text, Condition::Always).await?;
        Ok(())
    }

    pub(super) async fn put(
        &self,
        path: &str,
        bytes: Bytes,
        condition: Condition<'_>,
    ) -> Result<ETag, BucketError> {
        let key = self.bucket.0.prefix.key(path);
        match self.put_if(&key, bytes, condition).await? {
            Put::Done(etag) => Ok(etag),
            Put::Conflict => Err(BucketError::Conflict { key }),
            Put::Unknown => Err(BucketError::Status {
                what: format!("PUT {key}"),
                status: 501,
                code: "NotImplemented".to_owned(),
                message: "the store does not know this request".to_owned(),
            }),
        }
    }

    async fn put_if(
        &self,
        key: &str,
        bytes: Bytes,
        condition: Condition<'_>,
    ) -> Result<Put, BucketError> {
        let request = self.bucket.0.clients.sending.put_object();
        let request = request
            .bucket(self.name())
            .key(key)
            .body(ByteStream::from(bytes))
            .set_storage_class(self.storage_class())
            .set_server_side_encryption(self.encryption())
            .set_ssekms_key_id(self.kms_key());
        let request = match condition {
            Condition::Always => request,
            Condition::New => request.if_none_match("*"),
            Condition::Is(etag) => request.if_match(&etag.0),
        };
        let request = request.customize();
        let request = if self.bucket.0.clients.unsigned {
            request.disable_payload_signing()
        } else {
            request
        };
        let what = format!("PUT {key}");
        let error = match request.send().await {
            Ok(put) => return Ok(Put::Done(ETag(put.e_tag.unwrap_or_default()))),
            Err(error) => error,
        };
        match self.bucket.0.asker.refusal(&what, &error) {
            Refusal::Conflict => Ok(Put::Conflict),
            // What was to be replaced is gone.
            Refusal::Absent if matches!(condition, Condition::Is(_)) => Ok(Put::Conflict),
            Refusal::NotImplemented => Ok(Put::Unknown),
            refusal => Err(self.bucket.0.asker.error(&what, "s3:PutObject", refusal)),
        }
    }

    /// Whether the store obeys conditions. One that does not know them takes the write in silence,
    /// which can't be seen from its answer: so a key of our own is written twice as a new one.
    async fn fences(&self) -> Result<bool, BucketError> {
        let tried = self.shared.fences.get_or_try_init(async || {
            let path = layout::probe(fastrand::u64(..));
            let key = self.bucket.0.prefix.key(&path);
            let first = self.put_if(&key, Bytes::new(), Condition::New).await?;
            let fences = matches!(first, Put::Done(_)) && {
                let second = self.put_if(&key, Bytes::new(), Condition::New).await?;
                matches!(second, Put::Conflict)
            };
            self.remove(&path).await?;
            if !fences {
                tracing::warn!(
                    bucket = self.name(),
                    "this store does not obey conditional writes (If-None-Match): two writers of the \
                     same tag at the same time are not noticed, and the last one wins"
                );
            }
            Ok(fences)
        });
        tried.await.copied()
    }

    /// Writes a key that has nothing but its name and its time.
    pub(super) async fn put_mark(&self, path: &str) -> Result<(), BucketError> {
        self.put(path, Bytes::new(), Condition::Always).await?;
        Ok(())
    }

    /// Removes a key; that it is not there is no error.
    pub(super) async fn remove(&self, path: &str) -> Result<(), BucketError> {
        self.remove_by(&self.bucket.0.clients.small, path).await
    }

    /// Removes a key by one request, which is never repeated: a second one could come after somebody
    /// has written the key again.
    pub(super) async fn remove_once(&self, path: &str) -> Result<(), BucketError> {
        self.remove_by(&self.bucket.0.clients.pieces, path).await
    }

    async fn remove_by(&self, client: &Client, path: &str) -> Result<(), BucketError> {
        let key = self.bucket.0.prefix.key(path);
        let what = format!("DELETE {key}");
        let request = client.delete_object();
        match request.bucket(self.name()).key(&key).send().await {
            Ok(_) => Ok(()),
            Err(error) => match self.bucket.0.asker.refusal(&what, &error) {
                Refusal::Absent => Ok(()),
                refusal => Err(self.bucket.0.asker.error(&what, "s3:DeleteObject", refusal)),
            },
        }
    }
}

/// What became of a conditional write.
enum Put {
    Done(ETag),
    /// The condition does not hold.
    Conflict,
    /// The store does not know conditions.
    Unknown,
}
