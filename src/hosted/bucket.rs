//! What is pushed to a bucket. The bucket is the truth, which other hosts read and perhaps another
//! writer changes: it is asked before anything is changed, written in an order in which no reader
//! sees a link to nothing, and the cache in front of it is told at once.

use std::path::Path;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use quick_cache::sync::Cache;
use tokio::sync::OnceCell;

use super::{Hosted, HostedError};
use crate::config::{HostedSettings, S3Settings};
use crate::mirror::Mirror;
use crate::oci::{Digest, Manifest, Reference, Subject, Tag};
use crate::store::layout::Repository;
use crate::store::s3::{Bucket, BucketError, Limits, TagLink, Writer};
use crate::store::upload::UPLOAD_STALE;

/// Small requests that one push has under way at the same time.
const AT_ONCE: usize = 32;
/// Blobs of which it is remembered whose they are, and links that were renewed.
const REMEMBERED: usize = 16 * 1024;

/// A bucket that this agent writes.
pub(super) struct InBucket {
    settings: S3Settings,
    /// Whose pulls are answered from the same bucket.
    mirror: Mirror,
    /// Opened by the first push, so that an agent starts without S3.
    opened: OnceCell<Writer>,
    /// A repository that was seen to have a blob, for who asks for one without knowing whose it is.
    seen: Cache<Digest, Repository>,
    /// Links that were old, and that clients were told of: a `gc` which had decided before that they
    /// go may have taken them since.
    renewed: Cache<(Repository, Digest), ()>,
}

/// What a manifest that is pushed refers to.
struct Referred {
    /// What its repository does not have.
    lacking: Vec<Digest>,
    /// Blobs whose links may just be being removed.
    unsure: Vec<Digest>,
}

impl InBucket {
    pub(super) fn new(settings: S3Settings, mirror: Mirror) -> Self {
        Self {
            settings,
            mirror,
            opened: OnceCell::new(),
            seen: Cache::new(REMEMBERED),
            renewed: Cache::new(REMEMBERED),
        }
    }

    /// The bucket, by the connections and in the memory that pulls have as well.
    pub(super) async fn open(&self) -> Result<&Writer, BucketError> {
        let open = async || {
            let bucket = match self.mirror.opened_bucket(&self.settings).await {
                Some(bucket) => bucket?,
                // Another one is pulled from since the last reload, which a push does not follow.
                None => Bucket::open(&self.settings, Limits::default()).await?,
            };
            Ok(Writer::over(bucket, &self.settings))
        };
        self.opened.get_or_try_init(|| Box::pin(open())).await
    }

    fn saw(&self, of: &Repository, digest: &Digest) {
        self.seen.insert(digest.clone(), of.clone());
    }

    /// Brings a file whose bytes are those of `digest` to the bucket as a blob of a repository.
    pub(super) async fn put_blob(
        &self,
        of: &Repository,
        path: &Path,
        digest: &Digest,
    ) -> Result<(), BucketError> {
        let writer = self.open().await?;
        if !writer.put_blob(path, digest).await? {
            return self.link(writer, of, digest).await;
        }
        // What has just come was linked by nobody.
        writer.link_layer(of, digest).await?;
        self.saw(of, digest);
        Ok(())
    }

    /// Links to a blob that was there, and stays.
    async fn link(
        &self,
        writer: &Writer,
        of: &Repository,
        digest: &Digest,
    ) -> Result<(), BucketError> {
        if writer.has_old_link(of, digest).await? {
            self.renewed.insert((of.clone(), digest.clone()), ());
        }
        writer.link_layer(of, digest).await?;
        self.saw(of, digest);
        Ok(())
    }

    /// Gives a repository a blob of another one, or, where none is named, of one that was seen to
    /// have it; says whether that one has it.
    pub(super) async fn mount(
        &self,
        of: &Repository,
        digest: &Digest,
        from: Option<&Repository>,
    ) -> Result<bool, BucketError> {
        // Which repositories have a blob can't be asked of a bucket.
        let Some(from) = from.cloned().or_else(|| self.seen.get(digest)) else {
            return Ok(false);
        };
        let writer = self.open().await?;
        let linked = writer.has_link(&from, digest);
        let (linked, size) = tokio::try_join!(linked, writer.use_any(digest))?;
        if !linked || size.is_none() {
            return Ok(false);
        }
        self.link(writer, of, digest).await?;
        Ok(true)
    }

    /// The size of a blob of a repository, for a client that leaves out of its push what is there:
    /// that stays for as long as it may take to push the manifest.
    pub(super) async fn use_layer(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<Option<u64>, BucketError> {
        let Some(used) = self.open().await?.use_layer(of, digest).await? else {
            return Ok(None);
        };
        self.saw(of, digest);
        if used.renewed {
            self.renewed.insert((of.clone(), digest.clone()), ());
        }
        Ok(Some(used.size))
    }

    /// Looks for a blob that a manifest refers to; `None` where its repository does not have it, and
    /// whether its link may just be being removed.
    async fn look_for(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<Option<bool>, BucketError> {
        let writer = self.open().await?;
        if let Some(used) = writer.use_layer(of, digest).await? {
            return Ok(Some(used.renewed));
        }
        // Its client was told that it is there.
        if self.renewed.get(&(of.clone(), digest.clone())).is_none()
            || writer.use_any(digest).await?.is_none()
        {
            return Ok(None);
        }
        writer.link_layer(of, digest).await?;
        Ok(Some(true))
    }

    /// Looks for what a manifest refers to.
    async fn referred(
        &self,
        of: &Repository,
        blobs: Vec<Digest>,
        manifests: Vec<Digest>,
    ) -> Result<Referred, BucketError> {
        let writer = self.open().await?;
        // Before the links are looked at: who begins to remove some later sees that they were used.
        let collecting = writer.is_collecting(of).await?;
        let blobs = blobs.into_iter().map(|digest| (digest, true));
        let manifests = manifests.into_iter().map(|digest| (digest, false));
        let looks = blobs
            .chain(manifests)
            .map(async |(digest, is_blob): (Digest, bool)| {
                let found = if is_blob {
                    let unsure = self.look_for(of, &digest).await?;
                    unsure.map(|unsure| unsure || collecting)
                } else {
                    writer.has_revision(of, &digest).await?.then_some(false)
                };
                Ok::<_, BucketError>((digest, found))
            });
        let mut looks = stream::iter(looks).buffered(AT_ONCE);
        let (mut lacking, mut unsure) = (Vec::new(), Vec::new());
        while let Some((digest, found)) = looks.try_next().await? {
            match found {
                None => lacking.push(digest),
                Some(true) => unsure.push(digest),
                Some(false) => {}
            }
        }
        Ok(Referred { lacking, unsure })
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
        let writer = self.open().await?;
        writer.stale_uploads(UPLOAD_STALE, false).await
    }
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
        let referred = self.bucket.referred(of, blobs, manifests).await?;
        if !referred.lacking.is_empty() {
            return Err(HostedError::Lacks(of.clone(), referred.lacking));
        }
        let writer = self.bucket.open().await?;
        writer.put_manifest(of, manifest).await?;
        // A `gc` that goes on looks for new manifests when it has removed links: either it has seen
        // this one, or what it has removed is linked here.
        let unsure = referred.unsure.into_iter();
        let linked = unsure.map(async |digest: Digest| writer.link_layer(of, &digest).await);
        let linked = stream::iter(linked).buffer_unordered(AT_ONCE);
        linked.try_collect::<()>().await?;
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
        self.bucket.renewed.remove(&(of.clone(), digest.clone()));
        writer.remove_layer(of, digest).await?;
        self.cache.removed_blob(of, digest).await?;
        Ok(true)
    }
}
