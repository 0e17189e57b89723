//! The store in S3: distribution's layout in a bucket, as registry:2 and registry:3 write it.
//!
//! - [`Bucket`] only reads: it has no method that could change anything, and needs no rights but
//!   `s3:GetObject` and `s3:ListBucket`. [`Writer`] is a bucket that can be written as well.
//! - A blob is a [`BlobStream`] of parallel ranged requests (`ranges`); lists descend with a
//!   delimiter (`list`); what is written is seen by nobody before it is whole (`writer`); mirrors
//!   that share a bucket note there what everybody may see (`shared`).
//! - What is written may be used again (`reuse`), or is removed when nobody needs it (`collect`).
//! - `client` finds region and credentials, `error` makes sense of what S3 answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde_json::Value;

pub mod audit;
mod client;
mod collect;
mod credentials;
mod error;
mod list;
mod multipart;
mod presign;
mod ranges;
mod reuse;
mod shared;
mod width;
mod writer;

pub use error::BucketError;
pub use ranges::{BlobStream, Limits};
pub use writer::Writer;

use client::Clients;
use error::{Asker, Refusal};
use ranges::Ranges;

use super::layout::{self, Prefix, Repository};
use crate::config::S3Settings;
use crate::oci::{Digest, MANIFEST_LIMIT, Manifest, Tag};

/// The largest `link` that is read, in bytes: a sha512 digest has 135.
const LINK_LIMIT: usize = 1024;
/// The largest descriptor of a referrer that is read, in bytes: it repeats what annotations a manifest
/// has, and they may be nearly all of it.
const DESCRIPTOR_LIMIT: usize = MANIFEST_LIMIT + 4096;
/// The most bytes that all referrers of one manifest have which are listed.
const DESCRIPTORS_LIMIT: usize = 64 * 1024 * 1024;
/// The most referrers of one manifest that are listed.
const REFERRERS_LIMIT: usize = 10_000;
/// Small requests that one call has under way at the same time.
const AT_ONCE: usize = 32;
/// Attempts at a small object whose body breaks off.
const ATTEMPTS: u32 = 4;

/// The version of an object, by which a later request finds out whether it is still the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ETag(String);

/// What a tag points to, in the bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagLink {
    /// The manifest.
    pub digest: Digest,
    /// The version of the tag itself.
    pub etag: ETag,
    /// When it was last written, where the store says so.
    pub modified: Option<SystemTime>,
}

/// What has become of a tag since it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tagged {
    /// It is what it was.
    Unchanged,
    /// It is this now.
    Changed(TagLink),
    /// It is gone.
    Absent,
}

/// A bucket to read from. Cheap to clone; clones share connections, credentials and memory.
#[derive(Debug, Clone)]
pub struct Bucket(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    clients: Clients,
    asker: Asker,
    prefix: Prefix,
    ranges: Arc<Ranges>,
    /// Whether LIST was refused: then it can't say of a 403 what it means.
    may_not_list: AtomicBool,
    /// Whether the log says already that 403 is taken for "not there".
    hidden_said: AtomicBool,
    /// Whether anything could be read: then it is not `s3:GetObject` that is missing.
    has_read: AtomicBool,
}

/// A small object.
enum Fetched {
    Absent,
    Unchanged,
    Found {
        bytes: Bytes,
        etag: ETag,
        /// When it was written, where the store says it.
        modified: Option<SystemTime>,
    },
}

/// A link that is there, and when it was written, where the store says it.
struct Linked(Option<SystemTime>);

/// What HEAD says of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    /// In bytes.
    size: u64,
    /// When it was written, where the store says it.
    modified: Option<SystemTime>,
}

impl Bucket {
    /// Finds region and credentials for a bucket. Whether the bucket itself is there, and may be
    /// read, is seen at the first request, so that an agent starts without S3.
    pub async fn open(settings: &S3Settings, limits: Limits) -> Result<Self, BucketError> {
        let clients = client::connect(settings).await?;
        let asker = Asker {
            bucket: settings.bucket.clone(),
            region: clients.region.clone(),
        };
        Ok(Self(Arc::new(Inner {
            clients,
            asker,
            prefix: Prefix::new(&settings.prefix),
            ranges: Arc::new(Ranges::new(limits)),
            may_not_list: AtomicBool::new(false),
            hidden_said: AtomicBool::new(false),
            has_read: AtomicBool::new(false),
        })))
    }

    /// The bucket's name.
    pub fn name(&self) -> &str {
        &self.0.asker.bucket
    }

    /// Whether the bucket can be read at all: that an empty one can is enough.
    pub async fn probe(&self) -> Result<(), BucketError> {
        self.list(&layout::repositories(), Some(1), None).await?;
        Ok(())
    }

    /// Which manifest a tag is.
    pub async fn tag(&self, of: &Repository, tag: &Tag) -> Result<Option<TagLink>, BucketError> {
        match self.read_tag(of, tag, None).await? {
            Tagged::Changed(link) => Ok(Some(link)),
            Tagged::Absent | Tagged::Unchanged => Ok(None),
        }
    }

    /// Whether a tag is still what it was when it was read (`If-None-Match`).
    pub async fn revalidate_tag(
        &self,
        of: &Repository,
        tag: &Tag,
        known: &ETag,
    ) -> Result<Tagged, BucketError> {
        self.read_tag(of, tag, Some(known)).await
    }

    async fn read_tag(
        &self,
        of: &Repository,
        tag: &Tag,
        known: Option<&ETag>,
    ) -> Result<Tagged, BucketError> {
        let path = layout::tag_link(of, tag);
        Ok(match self.fetch(&path, LINK_LIMIT, known).await? {
            Fetched::Absent => Tagged::Absent,
            Fetched::Unchanged => Tagged::Unchanged,
            Fetched::Found {
                bytes,
                etag,
                modified,
            } => Tagged::Changed(TagLink {
                digest: self.digest(&path, &bytes)?,
                etag,
                modified,
            }),
        })
    }

    /// The digest that a link holds.
    fn digest(&self, path: &str, bytes: &[u8]) -> Result<Digest, BucketError> {
        let text = std::str::from_utf8(bytes).ok();
        text.and_then(|text| text.trim_ascii().parse().ok())
            .ok_or_else(|| self.wrong(path, "is a link without a digest"))
    }

    fn wrong(&self, path: &str, reason: impl Into<String>) -> BucketError {
        BucketError::Wrong {
            key: self.0.prefix.key(path),
            reason: reason.into(),
        }
    }

    async fn is_linked(&self, path: &str, to: &Digest) -> Result<bool, BucketError> {
        Ok(self.link(path, to).await?.is_some())
    }

    /// When a link was written, where it is there, and is one to this.
    async fn link(&self, path: &str, to: &Digest) -> Result<Option<Linked>, BucketError> {
        Ok(match self.fetch(path, LINK_LIMIT, None).await? {
            Fetched::Found {
                bytes, modified, ..
            } => (self.digest(path, &bytes)? == *to).then_some(Linked(modified)),
            Fetched::Absent | Fetched::Unchanged => None,
        })
    }

    /// Whether a repository is known to have a blob.
    pub async fn has_link(&self, of: &Repository, digest: &Digest) -> Result<bool, BucketError> {
        self.is_linked(&layout::layer_link(of, digest), digest)
            .await
    }

    /// Whether a repository is known to have a manifest.
    pub async fn has_revision(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<bool, BucketError> {
        let path = layout::revision_link(of, digest);
        self.is_linked(&path, digest).await
    }

    /// Reads a manifest of a repository. Its link and its bytes are asked for at the same time.
    pub async fn manifest(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<Option<Arc<Manifest>>, BucketError> {
        let path = layout::blob(digest);
        let linked = self.has_revision(of, digest);
        let bytes = self.fetch(&path, MANIFEST_LIMIT, None);
        let (true, Fetched::Found { bytes, .. }) = tokio::try_join!(linked, bytes)? else {
            return Ok(None);
        };
        if Digest::of(digest.algorithm(), &bytes) != *digest {
            return Err(self.wrong(&path, "is not what its digest says"));
        }
        let manifest = Manifest::parse(bytes, digest.clone());
        let manifest = manifest.map_err(|error| self.wrong(&path, format!("is {error}")))?;
        Ok(Some(Arc::new(manifest)))
    }

    /// The size of a blob in bytes, whoever's it is.
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, BucketError> {
        let key = self.0.prefix.key(&layout::blob(digest));
        self.size(&key).await
    }

    async fn size(&self, key: &str) -> Result<Option<u64>, BucketError> {
        Ok(self.look_at_key(key).await?.map(|head| head.size))
    }

    async fn look_at_key(&self, key: &str) -> Result<Option<Head>, BucketError> {
        let request = self.0.clients.small.head_object();
        let answer = Box::pin(request.bucket(self.name()).key(key).send()).await;
        let what = format!("HEAD {key}");
        match answer {
            Ok(head) => {
                self.0.has_read.store(true, Ordering::Relaxed);
                let size = head
                    .content_length()
                    .and_then(|size| u64::try_from(size).ok());
                let size = size.ok_or_else(|| BucketError::Wrong {
                    key: key.to_owned(),
                    reason: "has no size".to_owned(),
                })?;
                let modified = head.last_modified.and_then(|at| at.try_into().ok());
                Ok(Some(Head { size, modified }))
            }
            Err(error) => {
                let refusal = self.0.asker.refusal(&what, &error);
                self.absence(&what, key, refusal).await?;
                Ok(None)
            }
        }
    }

    /// The bytes of a blob from `offset` on, whoever's it is; `None` if it is not there. Returns
    /// when the first byte is there.
    pub async fn blob(
        &self,
        digest: &Digest,
        offset: u64,
    ) -> Result<Option<BlobStream>, BucketError> {
        let key = self.0.prefix.key(&layout::blob(digest));
        ranges::open(self, key, offset).await
    }

    /// What refers to a manifest of a repository: descriptors, in the order of their digests.
    pub async fn referrers(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<Vec<Value>, BucketError> {
        let folder = layout::referrers_to(of, digest);
        let paths = self.files(&folder, REFERRERS_LIMIT).await?;
        let descriptors = stream::iter(paths.into_iter().map(async |path| {
            match self.fetch(&path, DESCRIPTOR_LIMIT, None).await? {
                // It was removed meanwhile.
                Fetched::Absent | Fetched::Unchanged => Ok(None),
                Fetched::Found { bytes, .. } => match serde_json::from_slice::<Value>(&bytes) {
                    Ok(descriptor) => Ok(Some((bytes.len(), descriptor))),
                    Err(_) => Err(self.wrong(&path, "is no descriptor")),
                },
            }
        }));
        let mut descriptors = descriptors.buffered(AT_ONCE);
        let (mut listed, mut bytes) = (Vec::new(), 0);
        while let Some(found) = descriptors.try_next().await? {
            let Some((size, descriptor)) = found else {
                continue;
            };
            bytes += size;
            if bytes > DESCRIPTORS_LIMIT {
                let reason = format!("holds more than {DESCRIPTORS_LIMIT} bytes of referrers");
                return Err(self.wrong(&folder, reason));
            }
            listed.push(descriptor);
        }
        Ok(listed)
    }

    /// Reads an object of at most `limit` bytes, again from its start where it breaks off.
    async fn fetch(
        &self,
        path: &str,
        limit: usize,
        known: Option<&ETag>,
    ) -> Result<Fetched, BucketError> {
        let key = self.0.prefix.key(path);
        let mut failures = 0;
        loop {
            // Its future is large: on the heap it is no part of those of its callers.
            match Box::pin(self.fetch_once(&key, limit, known)).await {
                Err(error @ (BucketError::Transport { .. } | BucketError::Timeout { .. })) => {
                    failures += 1;
                    if failures == ATTEMPTS {
                        return Err(error);
                    }
                    tracing::debug!(%error, "an object is read once more: {error}");
                    tokio::time::sleep(pause(failures)).await;
                }
                fetched => return fetched,
            }
        }
    }

    async fn fetch_once(
        &self,
        key: &str,
        limit: usize,
        known: Option<&ETag>,
    ) -> Result<Fetched, BucketError> {
        let request = self.0.clients.small.get_object();
        let request = request.bucket(self.name()).key(key);
        let request = request.set_if_none_match(known.map(|etag| etag.0.clone()));
        let what = format!("GET {key}");
        let mut object = match request.send().await {
            Ok(object) => object,
            Err(error) => {
                return match self.0.asker.refusal(&what, &error) {
                    Refusal::Unchanged => Ok(Fetched::Unchanged),
                    refusal => {
                        self.absence(&what, key, refusal).await?;
                        Ok(Fetched::Absent)
                    }
                };
            }
        };
        self.0.has_read.store(true, Ordering::Relaxed);
        let mut bytes = BytesMut::new();
        loop {
            let next = tokio::time::timeout(ranges::PATIENCE, object.body.next()).await;
            match next {
                Err(_) => return Err(BucketError::Timeout { what }),
                Ok(None) => break,
                Ok(Some(Err(error))) => {
                    let error = error.to_string();
                    return Err(BucketError::Transport { what, error });
                }
                Ok(Some(Ok(piece))) if bytes.len() + piece.len() > limit => {
                    return Err(BucketError::Wrong {
                        key: key.to_owned(),
                        reason: format!("has more than {limit} bytes"),
                    });
                }
                Ok(Some(Ok(piece))) => bytes.extend_from_slice(&piece),
            }
        }
        let modified = object.last_modified.and_then(|at| at.try_into().ok());
        Ok(Fetched::Found {
            bytes: bytes.freeze(),
            modified,
            etag: ETag(object.e_tag.unwrap_or_default()),
        })
    }

    /// Takes an answer about a key for "not there", or for an error.
    async fn absence(&self, what: &str, key: &str, refusal: Refusal) -> Result<(), BucketError> {
        match refusal {
            Refusal::Absent => Ok(()),
            Refusal::Hidden => Box::pin(self.hidden(what, key)).await,
            refusal => Err(self.0.asker.error(what, "s3:GetObject", refusal)),
        }
    }

    /// What 403 means of a key. S3 says so instead of 404 where the role may not list, and also
    /// where it may list below a prefix alone (`s3:prefix`, as in our own policy), which a GET does
    /// not name. So the key is listed: where that is allowed, it tells what is missing, the key or
    /// the right to read it.
    async fn hidden(&self, what: &str, key: &str) -> Result<(), BucketError> {
        if !self.0.may_not_list.load(Ordering::Relaxed) {
            let list = self.0.clients.small.list_objects_v2();
            let list = list.bucket(self.name()).prefix(key).max_keys(1);
            let asked = format!("LIST {key}");
            match list.send().await {
                Ok(list) if list.contents().iter().any(|it| it.key() == Some(key)) => {
                    return Err(BucketError::Denied {
                        what: what.to_owned(),
                        code: "AccessDenied".to_owned(),
                        advice: format!(
                            "the key is there: the role needs s3:GetObject on \
                             arn:aws:s3:::{}/{key}, and kms:Decrypt where it is encrypted by a key",
                            self.name()
                        ),
                    });
                }
                Ok(_) => return Ok(()),
                Err(error) => match self.0.asker.refusal(&asked, &error) {
                    Refusal::Hidden => self.0.may_not_list.store(true, Ordering::Relaxed),
                    refusal => return Err(self.0.asker.error(&asked, "s3:ListBucket", refusal)),
                },
            }
        }
        self.say_hidden(what);
        Ok(())
    }

    /// Says once that 403 is taken for "not there", and what would make it a 404.
    fn say_hidden(&self, what: &str) {
        if self.0.hidden_said.swap(true, Ordering::Relaxed) {
            return;
        }
        let bucket = self.name();
        let rights = if self.0.has_read.load(Ordering::Relaxed) {
            format!("s3:ListBucket on arn:aws:s3:::{bucket}")
        } else {
            format!(
                "s3:ListBucket on arn:aws:s3:::{bucket}, or s3:GetObject on arn:aws:s3:::{bucket}/{}*",
                self.0.prefix.as_str()
            )
        };
        tracing::warn!(
            bucket,
            "S3 answered {what} with 403, as it does for a key that is not there where the role may \
             not list: it is taken for not there. The role lacks {rights}"
        );
    }
}

/// How long to wait after so many failures in a row.
fn pause(failures: u32) -> Duration {
    let longest = Duration::from_millis(50) * 2u32.pow(failures.min(6));
    longest.mul_f32(fastrand::f32())
}
