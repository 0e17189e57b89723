//! The keys of one blob, and their removal.

use std::time::SystemTime;

use super::super::list::Object;
use super::super::reuse::{is_collecting, is_unused};
use super::super::{BucketError, Writer, layout};
use crate::failpoint::failpoint;
use crate::oci::{Algorithm, Digest};

/// The blob of a key below the folder of blobs of an algorithm, and the rest of the key.
pub(in super::super) fn of_blob(algorithm: Algorithm, name: &str) -> Option<(Digest, &str)> {
    let mut parts = name.splitn(3, '/');
    let (digits, hex, rest) = (parts.next()?, parts.next()?, parts.next()?);
    let digest: Digest = format!("{}:{hex}", algorithm.as_str()).parse().ok()?;
    hex.starts_with(digits).then_some((digest, rest))
}

/// The keys of a blob.
pub(in super::super) struct Keys {
    pub(super) digest: Digest,
    /// Its bytes: how many, and when they were written.
    pub(in super::super) data: Option<(u64, Option<SystemTime>)>,
    /// Whether it says that it was used again, and not long ago.
    used: bool,
    /// Other keys beside it, which go with it; and whether each was written long ago.
    others: Vec<(String, bool)>,
}

impl Keys {
    pub(super) fn new(digest: Digest) -> Self {
        Self {
            digest,
            data: None,
            used: false,
            others: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, key: &Object) {
        if key.name == "data" {
            self.data = Some((key.size, key.modified));
        } else if key.name == layout::USED {
            let old = is_unused(key.modified);
            self.used |= !old;
            self.others.push((key.name.clone(), old));
        } else if key.name.starts_with(layout::COLLECTING) && !is_collecting(key) {
            // Of a collection that has died.
            let old = is_unused(key.modified);
            self.others.push((key.name.clone(), old));
        }
    }

    /// The paths of keys that say nothing any more: a collection has died, or the blob is gone.
    pub(super) fn leftovers(&self) -> impl Iterator<Item = String> {
        let folder = layout::blob_folder(&self.digest);
        let gone = self.data.is_none();
        let left = self
            .others
            .iter()
            .filter(move |(name, old)| *old && (gone || name.starts_with(layout::COLLECTING)));
        left.map(move |(name, _)| format!("{folder}{name}"))
    }

    /// Its size, where nobody has written or used it for long.
    pub(super) fn unused(&self) -> Option<u64> {
        let old = self.data.filter(|(_, modified)| is_unused(*modified));
        old.filter(|_| !self.used).map(|(size, _)| size)
    }
}

impl Writer {
    /// Removes a blob where `goes` says so of its keys, which are looked at when it is announced that
    /// it goes; says whether it is gone. Where it is not known what became of the request, the
    /// announcement stays until that is certain.
    pub(in super::super) async fn remove_if(
        &self,
        digest: &Digest,
        name: u64,
        goes: impl Fn(&Keys) -> bool,
    ) -> Result<bool, BucketError> {
        let announced = layout::collecting_blob(digest, name);
        self.put_mark(&announced).await?;
        let folder = layout::blob_folder(digest);
        let mut keys = Keys::new(digest.clone());
        for key in self.objects(&folder, None).await?.files {
            keys.add(&key);
        }
        let gone = keys.data.is_some() && goes(&keys);
        if gone {
            self.remove_once(&layout::blob(digest)).await?;
            failpoint!(CollectSwept);
            for (left, _) in keys.others {
                self.remove(&format!("{folder}{left}")).await?;
            }
        }
        self.remove(&announced).await?;
        Ok(gone)
    }
}
