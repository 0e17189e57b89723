//! Blobs that are used again, so that no collection (`collect`) takes them meanwhile.
//!
//! A bucket knows when a key was written, and not when it was used. So who is about to name a blob
//! that is there already writes a key beside it (`used`), and its repository's link again, where
//! those are old: then they are young, and no collection takes what is young. Each side first says
//! what it is about to do and then looks at what the other one has said, which S3 shows at once
//! (it is strongly consistent, lists included). Of the two, one at least sees the other:
//!
//! - who uses a blob writes `used`, and then looks for `collecting-*`;
//! - a collection writes `collecting-*`, and then looks for `used`.
//!
//! That holds between any two processes, however many there are, and nothing is left in the way by
//! one that dies: a `collecting-*` counts for [`COLLECTING_STALE`], and no longer.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::list::Object;
use super::{BucketError, Head, Writer, layout};
use crate::oci::Digest;
use crate::store::collect::GRACE;
use crate::store::layout::Repository;

/// What is younger is in use for as long again, and need not be written.
const YOUNG: Duration = Duration::from_hours(12);
const _: () = assert!(YOUNG.as_secs() < GRACE.as_secs());
/// For so long a removal that was announced may still happen. No request takes as long.
pub(super) const COLLECTING_STALE: Duration = Duration::from_mins(10);
/// How long an upload waits for the end of a removal.
const WAIT: Duration = Duration::from_secs(30);
/// Between two looks whether it has ended.
const PAUSE: Duration = Duration::from_millis(250);

/// A blob that was asked for to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// It is there, with so many bytes, and stays.
    Here(u64),
    /// It is not there.
    Absent,
    /// It is being removed.
    Collecting,
}

/// A blob of a repository that is there, and stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsedLayer {
    /// In bytes.
    pub size: u64,
    /// Whether its link was so old that it was written again: a removal that was decided before may
    /// still take that.
    pub renewed: bool,
}

/// How old something is. What is of the future, or of no time, has no age.
pub(super) fn age(modified: Option<SystemTime>) -> Duration {
    let age = modified.and_then(|at| SystemTime::now().duration_since(at).ok());
    age.unwrap_or_default()
}

/// Whether a collection may take something, by its time.
pub(super) fn is_unused(modified: Option<SystemTime>) -> bool {
    age(modified) > GRACE
}

/// Whether a collection says by this key that it is removing something.
pub(super) fn is_collecting(key: &Object) -> bool {
    key.name.starts_with(layout::COLLECTING) && age(key.modified) < COLLECTING_STALE
}

impl Writer {
    /// The size of a blob of a repository in bytes, for somebody who is about to name it in a
    /// manifest; `None` where the repository does not have it. It stays for as long as what has just
    /// been pushed.
    pub async fn use_layer(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<Option<UsedLayer>, BucketError> {
        let path = layout::layer_link(of, digest);
        let linked = self.link(&path, digest);
        let (linked, head) = tokio::try_join!(linked, self.head_of(digest))?;
        let (Some(linked), Some(head)) = (linked, head) else {
            return Ok(None);
        };
        if age(linked.0) < YOUNG {
            let (size, renewed) = (head.size, false);
            return Ok(Some(UsedLayer { size, renewed }));
        }
        let Use::Here(size) = self.use_blob(digest, head).await? else {
            return Ok(None);
        };
        self.put_link(&path, digest).await?;
        let renewed = true;
        Ok(Some(UsedLayer { size, renewed }))
    }

    /// Whether a repository's link to a blob is there, and so old that a collection may have decided
    /// to take it.
    pub async fn has_old_link(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<bool, BucketError> {
        let path = layout::layer_link(of, digest);
        let linked = self.link(&path, digest).await?;
        Ok(linked.is_some_and(|linked| age(linked.0) >= YOUNG))
    }

    /// The size of a blob in bytes, whoever's it is, for somebody who is about to link to it; `None`
    /// where it is not there, or soon will not be.
    pub async fn use_any(&self, digest: &Digest) -> Result<Option<u64>, BucketError> {
        let Some(head) = self.head_of(digest).await? else {
            return Ok(None);
        };
        Ok(match self.use_blob(digest, head).await? {
            Use::Here(size) => Some(size),
            Use::Absent | Use::Collecting => None,
        })
    }

    /// The same, where `None` says that it can be written: it is waited for the end of its removal.
    pub(super) async fn use_or_miss(&self, digest: &Digest) -> Result<Option<u64>, BucketError> {
        let deadline = Instant::now() + WAIT;
        loop {
            let Some(head) = self.head_of(digest).await? else {
                return Ok(None);
            };
            match self.use_blob(digest, head).await? {
                Use::Here(size) => return Ok(Some(size)),
                Use::Absent => return Ok(None),
                Use::Collecting if Instant::now() > deadline => {
                    let key = self.0.prefix.key(&layout::blob(digest));
                    return Err(BucketError::Collecting { key });
                }
                Use::Collecting => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    async fn head_of(&self, digest: &Digest) -> Result<Option<Head>, BucketError> {
        let key = self.0.prefix.key(&layout::blob(digest));
        self.look_at_key(&key).await
    }

    async fn use_blob(&self, digest: &Digest, head: Head) -> Result<Use, BucketError> {
        if age(head.modified) < YOUNG {
            return Ok(Use::Here(head.size));
        }
        self.put_mark(&layout::used(digest)).await?;
        let folder = layout::blob_folder(digest);
        // A handful of keys. `collecting-` stands before `data`: of a removal that ends while they
        // are listed, either the first is seen, or the second is not.
        let keys = self.objects(&folder, None).await?.files;
        if keys.iter().any(is_collecting) {
            return Ok(Use::Collecting);
        }
        let data = keys.iter().find(|key| key.name == "data");
        Ok(data.map_or(Use::Absent, |data| Use::Here(data.size)))
    }

    /// Whether links of a repository are being removed.
    pub async fn is_collecting(&self, of: &Repository) -> Result<bool, BucketError> {
        let keys = self.objects(&layout::collecting(of), None).await?.files;
        Ok(keys.iter().any(|key| age(key.modified) < COLLECTING_STALE))
    }
}
