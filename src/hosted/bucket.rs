//! What is pushed to a bucket. The bucket is the truth, which other hosts read and perhaps another
//! writer changes: it is asked before anything is changed, written in an order in which no reader
//! sees a link to nothing, and the cache in front of it is told at once.

use std::path::Path;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::sync::OnceCell;

use super::{Hosted, HostedError};
use crate::config::{HostedSettings, S3Settings};
use crate::mirror::Mirror;
use crate::oci::{Digest, Manifest, Reference, Subject, Tag};
use crate::store::layout::Repository;
use crate::store::s3::{BucketError, Limits, TagLink, Writer};
use crate::store::upload::UPLOAD_STALE;

/// Small requests that one push has under way at the same time.
const AT_ONCE: usize = 32;

/// A bucket that this agent writes.
pub(super) struct InBucket {
    settings: S3Settings,
    /// Opened by the first push, so that an agent starts without S3.
    opened: OnceCell<Writer>,
}

impl InBucket {
    pub(super) fn new(settings: S3Settings) -> Self {
        Self {
            settings,
            opened: OnceCell::new(),
        }
    }

    pub(super) async fn open(&self) -> Result<&Writer, BucketError> {
        let open = || Box::pin(Writer::open(&self.settings, Limits::default()));
        self.opened.get_or_try_init(open).await
    }

    /// Brings a file whose bytes are those of `digest` to the bucket as a blob of a repository.
    pub(super) async fn put_blob(
        &self,
        of: &Repository,
        path: &Path,
        digest: &Digest,
    ) -> Result<(), BucketError> {
        let writer = self.open().await?;
        writer.put_blob(path, digest).await?;
        writer.link_layer(of, digest).await
    }

    /// Gives a repository a blob of another one; says whether that one has it.
    pub(super) async fn mount(
        &self,
        of: &Repository,
        digest: &Digest,
        from: &Repository,
    ) -> Result<bool, BucketError> {
        let writer = self.open().await?;
        if !has_blob(writer, from, digest).await? {
            return Ok(false);
        }
        writer.link_layer(of, digest).await?;
        Ok(true)
    }

    /// What of that which a manifest refers to its repository does not have.
    pub(super) async fn lacks(
        &self,
        of: &Repository,
        blobs: Vec<Digest>,
        manifests: Vec<Digest>,
    ) -> Result<Vec<Digest>, BucketError> {
        let writer = self.open().await?;
        let blobs = blobs.into_iter().map(|digest| (digest, true));
        let manifests = manifests.into_iter().map(|digest| (digest, false));
        let looks = blobs
            .chain(manifests)
            .map(async |(digest, is_blob): (Digest, bool)| {
                let there = if is_blob {
                    has_blob(writer, of, &digest).await?
                } else {
                    writer.has_revision(of, &digest).await?
                };
                Ok((!there).then_some(digest))
            });
        let lacking = stream::iter(looks).buffered(AT_ONCE);
        lacking
            .try_filter_map(async |digest| Ok(digest))
            .try_collect()
            .await
    }

    /// What tags are now, so that they are moved only from there.
    async fn versions(
        &self,
        of: &Repository,
        tags: &[Tag],
    ) -> Result<Vec<(Tag, Option<TagLink>)>, BucketError> {
        let writer = self.open().await?;
        let tags = tags.to_vec();
        let asked = tags.into_iter().map(async |tag: Tag| {
            let link = writer.tag(of, &tag).await?;
            Ok((tag, link))
        });
        stream::iter(asked).buffered(AT_ONCE).try_collect().await
    }

    /// Aborts what was begun to be sent, and given up by this process or another.
    pub(super) async fn abort_stale_uploads(&self) -> Result<usize, BucketError> {
        self.open().await?.abort_stale_uploads(UPLOAD_STALE).await
    }
}

/// Whether a repository has a blob, and its bytes are there.
async fn has_blob(writer: &Writer, of: &Repository, digest: &Digest) -> Result<bool, BucketError> {
    let linked = writer.has_link(of, digest);
    let (linked, size) = tokio::try_join!(linked, writer.blob_size(digest))?;
    Ok(linked && size.is_some())
}

/// A bucket, and the cache in front of it.
pub(super) struct Pushing<'a> {
    pub(super) bucket: &'a InBucket,
    pub(super) cache: &'a Mirror,
}

impl Pushing<'_> {
    /// Stores a manifest, and moves `tags` to it from what they are now.
    pub(super) async fn put_manifest(
        &self,
        settings: &HostedSettings,
        of: &Repository,
        manifest: &Arc<Manifest>,
        tags: &[Tag],
        (blobs, manifests): (Vec<Digest>, Vec<Digest>),
    ) -> Result<(), HostedError> {
        // First, so that whoever moves one meanwhile is noticed.
        let versions = self.bucket.versions(of, tags).await?;
        for (tag, version) in &versions {
            let now = version.as_ref().map(|link| &link.digest);
            Hosted::check_immutable(settings, of, tag, now, Some(&manifest.digest))?;
        }
        let lacking = self.bucket.lacks(of, blobs, manifests).await?;
        if !lacking.is_empty() {
            return Err(HostedError::Lacks(of.clone(), lacking));
        }
        let writer = self.bucket.open().await?;
        writer.put_manifest(of, manifest).await?;
        if let Some(subject) = Subject::of(manifest) {
            let (subject, descriptor) = (subject.digest, subject.descriptor);
            writer
                .put_referrer(of, &subject, &manifest.digest, &descriptor)
                .await?;
        }
        self.cache.pushed_manifest(of, manifest).await;
        for (tag, version) in versions {
            let known = version.as_ref().map(|link| &link.etag);
            let moved = writer.put_tag(of, &tag, &manifest.digest, known).await;
            moved.map_err(|error| match error {
                BucketError::Conflict { .. } => HostedError::Moved(of.clone(), tag.clone()),
                error => error.into(),
            })?;
            self.cache.pushed_tag(of, &tag, &manifest.digest).await?;
        }
        Ok(())
    }

    /// Removes a tag, or a manifest with all tags that are it; says whether it was there.
    pub(super) async fn delete_manifest(
        &self,
        settings: &HostedSettings,
        of: &Repository,
        reference: &Reference,
    ) -> Result<bool, HostedError> {
        let writer = self.bucket.open().await?;
        match reference {
            Reference::Tag(tag) => {
                let Some(link) = writer.tag(of, tag).await? else {
                    return Ok(false);
                };
                Hosted::check_immutable(settings, of, tag, Some(&link.digest), None)?;
                writer.remove_tag(of, tag).await?;
                self.cache.removed_tag(of, tag).await?;
                Ok(true)
            }
            Reference::Digest(digest) => {
                if !writer.has_revision(of, digest).await? {
                    return Ok(false);
                }
                let tags = writer.tags_of(of, digest).await?;
                for tag in &tags {
                    Hosted::check_immutable(settings, of, tag, Some(digest), None)?;
                }
                for tag in &tags {
                    writer.remove_tag(of, tag).await?;
                    self.cache.removed_tag(of, tag).await?;
                }
                // Who refers to another one is listed there no longer than it is here.
                let manifest = writer.manifest(of, digest).await?;
                if let Some(subject) = manifest.as_deref().and_then(Subject::of) {
                    writer.remove_referrer(of, &subject.digest, digest).await?;
                }
                writer.remove_manifest(of, digest).await?;
                self.cache.removed_manifest(of, digest).await?;
                Ok(true)
            }
        }
    }

    /// Whether there is such a repository.
    pub(super) async fn exists(&self, of: &Repository) -> Result<bool, BucketError> {
        self.bucket.open().await?.exists(of).await
    }

    /// Takes a blob from a repository; says whether it had it.
    pub(super) async fn delete_blob(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<bool, HostedError> {
        let writer = self.bucket.open().await?;
        if !writer.has_link(of, digest).await? {
            return Ok(false);
        }
        writer.remove_layer(of, digest).await?;
        self.cache.removed_blob(of, digest).await?;
        Ok(true)
    }
}
