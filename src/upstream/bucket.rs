//! A bucket in a registry's place: what a reader serves is fetched from S3 as a mirror's is from its
//! upstream, once for everybody, verified, and kept on the disk in front.

use std::fmt;

use http::{HeaderMap, StatusCode};
use quick_cache::sync::Cache;
use tokio::sync::OnceCell;
use url::Url;

use super::error::Question;
use super::record::Record;
use super::requests::{BlobBody, FetchedBlob, FetchedManifest, FetchedTags};
use super::{Upstream, UpstreamError};
use crate::config::{S3Settings, UpstreamSettings};
use crate::oci::{Digest, Name, Reference, RegistryHost, Tag};
use crate::store::Page;
use crate::store::layout::{Prefix, Repository};
use crate::store::s3::{Bucket, BucketError, Limits, TagLink, Tagged};

/// Tags whose version in the bucket is remembered, so that they are asked for by it.
const TAGS: usize = 16 * 1024;
/// The most tags of a page where the client does not say.
const TAGS_LIMIT: usize = 10_000;

/// The bucket behind an [`Upstream`].
pub(super) struct FromBucket {
    settings: S3Settings,
    /// Opened by the first request, so that an agent starts without S3.
    opened: OnceCell<Bucket>,
    tags: Cache<(Name, Tag), TagLink>,
}

impl fmt::Debug for FromBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FromBucket").field(&self.settings).finish()
    }
}

/// What stands for a bucket where a registry's settings are shown.
pub(super) fn shown(settings: &S3Settings) -> UpstreamSettings {
    let endpoint = settings.endpoint.as_ref();
    let host = endpoint.and_then(|url| {
        let port = url.port().map_or(String::new(), |port| format!(":{port}"));
        format!("{}{port}", url.host_str()?).parse().ok()
    });
    let amazon = || "s3.amazonaws.com".parse().ok();
    let prefix = Prefix::new(&settings.prefix);
    let url = Url::parse(&format!("s3://{}/{}", settings.bucket, prefix.as_str()));
    UpstreamSettings {
        registry: host
            .or_else(amazon)
            .unwrap_or_else(RegistryHost::docker_hub),
        urls: url.into_iter().collect(),
        credentials: None,
        share_private: false,
    }
}

/// The place of a repository in the bucket.
pub(super) fn repository(name: &Name) -> Repository {
    Repository::from_path(name.to_string())
}

/// One request, with all that its errors have to say.
pub(super) struct Asking<'a> {
    pub(super) bucket: &'a FromBucket,
    pub(super) record: &'a Record,
    pub(super) question: Question<'a>,
}

impl FromBucket {
    pub(super) fn new(settings: S3Settings) -> Self {
        Self {
            settings,
            opened: OnceCell::new(),
            tags: Cache::new(TAGS),
        }
    }

    pub(super) fn settings(&self) -> &S3Settings {
        &self.settings
    }

    async fn open(&self) -> Result<&Bucket, BucketError> {
        let open = || Box::pin(Bucket::open(&self.settings, Limits::default()));
        self.opened.get_or_try_init(open).await
    }
}

impl Asking<'_> {
    /// Makes an answer of what the bucket said, and notes whether it said anything.
    fn answer<T>(&self, asked: Result<Option<T>, BucketError>) -> Result<T, UpstreamError> {
        let none = HeaderMap::new();
        let error = match asked {
            Ok(Some(answer)) => {
                self.record.answered(StatusCode::OK, &none, false);
                return Ok(answer);
            }
            Ok(None) => {
                self.record.answered(StatusCode::NOT_FOUND, &none, false);
                return Err(self.question.status(StatusCode::NOT_FOUND));
            }
            Err(error) => error,
        };
        Err(match &error {
            BucketError::Wrong { .. } | BucketError::Changed { .. } => {
                self.record.answered(StatusCode::OK, &none, false);
                self.question.protocol(error.to_string())
            }
            BucketError::Slow { .. } => {
                self.record
                    .answered(StatusCode::SERVICE_UNAVAILABLE, &none, false);
                self.question.status(StatusCode::SERVICE_UNAVAILABLE)
            }
            _ => {
                let unanswered = self.question.transport(error.to_string());
                self.record.failed(&unanswered);
                unanswered
            }
        })
    }

    /// Which manifest a tag is: by one request, which brings nothing where it is what it was.
    async fn tag(&self, name: &Name, tag: &Tag) -> Result<Option<Digest>, BucketError> {
        let bucket = self.bucket.open().await?;
        let (of, key) = (repository(name), (name.clone(), tag.clone()));
        let tagged = match self.bucket.tags.get(&key) {
            Some(known) => match bucket.revalidate_tag(&of, tag, &known.etag).await? {
                Tagged::Unchanged => return Ok(Some(known.digest)),
                tagged => tagged,
            },
            None => match bucket.tag(&of, tag).await? {
                Some(link) => Tagged::Changed(link),
                None => Tagged::Absent,
            },
        };
        Ok(match tagged {
            Tagged::Changed(link) => {
                self.bucket.tags.insert(key, link.clone());
                Some(link.digest)
            }
            Tagged::Absent | Tagged::Unchanged => {
                self.bucket.tags.remove(&key);
                None
            }
        })
    }

    async fn digest(
        &self,
        name: &Name,
        reference: &Reference,
    ) -> Result<Option<Digest>, BucketError> {
        match reference {
            Reference::Tag(tag) => self.tag(name, tag).await,
            Reference::Digest(digest) => {
                let bucket = self.bucket.open().await?;
                let here = bucket.has_revision(&repository(name), digest).await?;
                Ok(here.then(|| digest.clone()))
            }
        }
    }

    pub(super) async fn manifest_digest(
        &self,
        name: &Name,
        reference: &Reference,
    ) -> Result<Option<Digest>, UpstreamError> {
        let digest = Box::pin(self.digest(name, reference)).await;
        self.answer(digest).map(Some)
    }

    pub(super) async fn manifest(
        &self,
        name: &Name,
        reference: &Reference,
    ) -> Result<FetchedManifest, UpstreamError> {
        let asked = async {
            let digest = match reference {
                Reference::Digest(digest) => Some(digest.clone()),
                Reference::Tag(tag) => self.tag(name, tag).await?,
            };
            let Some(digest) = digest else {
                return Ok(None);
            };
            let bucket = self.bucket.open().await?;
            let manifest = bucket.manifest(&repository(name), &digest).await?;
            Ok(manifest.map(|manifest| FetchedManifest {
                bytes: manifest.bytes.clone(),
                digest: Some(digest),
            }))
        };
        let asked = Box::pin(asked).await;
        self.answer(asked)
    }

    pub(super) async fn blob_size(
        &self,
        name: &Name,
        digest: &Digest,
    ) -> Result<Option<u64>, UpstreamError> {
        let asked = async {
            let bucket = self.bucket.open().await?;
            let of = repository(name);
            let linked = bucket.has_link(&of, digest);
            let (linked, size) = tokio::try_join!(linked, bucket.blob_size(digest))?;
            Ok(size.filter(|_| linked))
        };
        let asked = Box::pin(asked).await;
        self.answer(asked).map(Some)
    }

    /// The blob from `offset` on. Whether the repository has it, and its bytes, are asked for at the
    /// same time: it costs one round trip.
    pub(super) async fn blob(
        &self,
        name: &Name,
        digest: &Digest,
        offset: u64,
    ) -> Result<Option<FetchedBlob>, UpstreamError> {
        let asked = async {
            let bucket = self.bucket.open().await?;
            let of = repository(name);
            let linked = bucket.has_link(&of, digest);
            let (linked, blob) = tokio::try_join!(linked, bucket.blob(digest, offset))?;
            Ok(blob.filter(|_| linked))
        };
        let asked = Box::pin(asked).await;
        let blob = self.answer(asked)?;
        if offset > 0 && offset == blob.total() {
            return Ok(None);
        }
        Ok(Some(FetchedBlob {
            offset,
            total: Some(blob.total()),
            body: BlobBody::Bucket(Box::new(blob)),
        }))
    }

    /// Where a client gets a blob from S3 itself, if that is how it is to be: `None` where it is not.
    pub(super) async fn presigned(&self, digest: &Digest) -> Result<Option<String>, UpstreamError> {
        let asked = async {
            let bucket = self.bucket.open().await?;
            bucket.presigned(digest).await.map(Some)
        };
        let asked = Box::pin(asked).await;
        self.answer(asked)
    }

    /// `None` where no key says that something refers to it: then a tag may.
    pub(super) async fn referrers(
        &self,
        name: &Name,
        digest: &Digest,
    ) -> Result<Option<Vec<serde_json::Value>>, UpstreamError> {
        let asked = async {
            let bucket = self.bucket.open().await?;
            bucket.referrers(&repository(name), digest).await.map(Some)
        };
        let asked = Box::pin(asked).await;
        let descriptors = self.answer(asked)?;
        Ok(Some(descriptors).filter(|descriptors| !descriptors.is_empty()))
    }

    pub(super) async fn tags(
        &self,
        name: &Name,
        limit: Option<usize>,
        last: Option<&str>,
    ) -> Result<FetchedTags, UpstreamError> {
        let limit = limit.unwrap_or(TAGS_LIMIT).min(TAGS_LIMIT);
        let asked = async {
            let bucket = self.bucket.open().await?;
            let page = Page {
                after: last.unwrap_or_default().to_owned(),
                // Whether there are more is told by one more.
                limit: limit + 1,
            };
            let tags = bucket.tags(&repository(name), &page).await?;
            // One whose tags are all deleted is still a repository.
            let known =
                last.is_some() || !tags.is_empty() || bucket.exists(&repository(name)).await?;
            Ok(known.then_some(tags))
        };
        let asked = Box::pin(asked).await;
        let tags = self.answer(asked)?;
        let mut tags: Vec<String> = tags.iter().map(ToString::to_string).collect();
        let more = tags.len() > limit;
        tags.truncate(limit);
        Ok(FetchedTags { tags, more })
    }

    pub(super) async fn repositories(&self, page: &Page) -> Result<Vec<Repository>, UpstreamError> {
        let asked = async {
            let bucket = self.bucket.open().await?;
            bucket.repositories(page).await.map(Some)
        };
        let asked = Box::pin(asked).await;
        self.answer(asked)
    }
}

impl Upstream {
    /// The bucket that is asked, if it is one, about `what`.
    pub(super) fn asking<'a>(&'a self, what: &'a str) -> Option<Asking<'a>> {
        Some(Asking {
            bucket: self.bucket.as_ref()?,
            record: &self.record,
            question: self.question(what),
        })
    }

    /// Whether it is a bucket.
    pub fn is_bucket(&self) -> bool {
        self.bucket.is_some()
    }

    /// Whether its clients are sent to it.
    pub fn redirects(&self) -> bool {
        let bucket = self.bucket.as_ref();
        bucket.is_some_and(|bucket| bucket.settings().redirect)
    }

    /// Where a client gets a blob from the bucket itself; `None` where it can't. Whether it may have
    /// it is for the caller to know.
    pub async fn presigned(&self, digest: &Digest) -> Result<Option<String>, UpstreamError> {
        match self.asking("a URL") {
            Some(asking) => asking.presigned(digest).await,
            None => Ok(None),
        }
    }

    /// Whether it is this bucket.
    pub fn is_the_bucket(&self, settings: &S3Settings) -> bool {
        let bucket = self.bucket.as_ref();
        bucket.is_some_and(|bucket| bucket.settings() == settings)
    }

    /// The bucket itself, for who also writes to it; `None` where it is none.
    pub async fn opened_bucket(&self) -> Option<Result<Bucket, BucketError>> {
        let bucket = self.bucket.as_ref()?;
        Some(bucket.open().await.cloned())
    }

    /// The repositories in the bucket; `None` where it is none.
    pub async fn repositories(
        &self,
        page: &Page,
    ) -> Option<Result<Vec<Repository>, UpstreamError>> {
        let asking = self.asking("the catalog")?;
        Some(asking.repositories(page).await)
    }
}
