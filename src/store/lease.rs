//! Who has which blob open. What somebody has open is not evicted.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use crate::oci::Digest;

/// How many leases there are on each blob that has any.
#[derive(Debug, Default, Clone)]
pub struct Leases(Arc<Mutex<HashMap<Digest, usize>>>);

impl Leases {
    /// Takes one more on a blob, which need not be there yet.
    pub fn take(&self, digest: &Digest) -> Lease {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *held.entry(digest.clone()).or_default() += 1;
        Lease {
            digest: digest.clone(),
            leases: self.clone(),
        }
    }

    /// Whether there is one on a blob.
    pub fn held(&self, digest: &Digest) -> bool {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(digest)
    }

    /// Does what nobody may see who has the blob open, and only if nobody has. Until it is done
    /// nobody can take a lease, so it must be short.
    pub fn unless_held<T>(&self, digest: &Digest, action: impl FnOnce() -> T) -> Option<T> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (!held.contains_key(digest)).then(action)
    }
}

/// Keeps a blob from being evicted.
#[derive(Debug)]
pub struct Lease {
    digest: Digest,
    leases: Leases,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut held = self.leases.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.digest);
            }
        }
    }
}

/// A blob's open file, and the lease on it.
#[derive(Debug)]
pub struct BlobFile {
    file: File,
    _lease: Lease,
}

impl BlobFile {
    pub(super) fn new(file: File, lease: Lease) -> Self {
        Self {
            file,
            _lease: lease,
        }
    }
}

impl Deref for BlobFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl AsFd for BlobFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Algorithm;

    #[test]
    fn a_blob_is_held_until_its_last_lease_is_gone() {
        let digest = Digest::of(Algorithm::Sha256, b"blob");
        let leases = Leases::default();
        assert_eq!(leases.unless_held(&digest, || 1), Some(1));
        let (first, second) = (leases.take(&digest), leases.take(&digest));
        drop(first);
        assert!(leases.held(&digest));
        assert_eq!(leases.unless_held(&digest, || 1), None);
        drop(second);
        assert!(!leases.held(&digest));
    }
}
