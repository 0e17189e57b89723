//! What the mirrors of a fleet tell one another by a bucket, beside what they keep there: whether
//! everybody could see a repository when its upstream was last asked.
//!
//! The note is also the claim: what a bucket has of a repository without one was brought there by
//! somebody else, a writer perhaps.

use bytes::Bytes;

use super::writer::Condition;
use super::{Bucket, BucketError, Fetched, LINK_LIMIT, Writer, layout};
use crate::store::layout::Repository;

/// What a note holds where everybody could see the repository. Anything else says the opposite: a
/// note that no mirror may delete is overwritten.
const PUBLIC: &[u8] = b"public";
const PRIVATE: &[u8] = b"private";

impl Bucket {
    /// Whether a mirror has noted that everybody could see a repository; `None` where none has noted
    /// anything.
    pub async fn is_public(&self, of: &Repository) -> Result<Option<bool>, BucketError> {
        let path = layout::public(of);
        Ok(match self.fetch(&path, LINK_LIMIT, None).await? {
            Fetched::Found { bytes, .. } => Some(bytes == PUBLIC),
            Fetched::Absent | Fetched::Unchanged => None,
        })
    }

    /// Whether a repository has anything at all.
    pub async fn has_any(&self, of: &Repository) -> Result<bool, BucketError> {
        let (manifests, layers) = (layout::manifests(of), layout::all_layers(of));
        let looks = tokio::try_join!(self.is_folder(&manifests), self.is_folder(&layers));
        looks.map(|(manifests, layers)| manifests || layers)
    }
}

impl Writer {
    /// Notes whether everybody can see a repository.
    pub async fn set_public(&self, of: &Repository, public: bool) -> Result<(), BucketError> {
        let note = Bytes::from_static(if public { PUBLIC } else { PRIVATE });
        self.put(&layout::public(of), note, Condition::Always)
            .await?;
        Ok(())
    }
}
