//! How many bytes of blobs and manifests are stored, which no filesystem can say at once.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use super::StoreError;
use crate::oci::Digest;

/// The sum of the sizes of all blobs: counted once by a scan, and kept up to date from then on.
#[derive(Debug, Default)]
pub struct Usage(Mutex<Sum>);

#[derive(Debug, Default)]
struct Sum {
    /// Unknown before the first scan.
    bytes: Option<u64>,
    /// What came during the scan under way, which the scan may or may not have met.
    during: Option<(HashSet<Digest>, u64)>,
}

impl Usage {
    /// The sum, once it is known.
    pub fn bytes(&self) -> Option<u64> {
        self.lock().bytes
    }

    /// Does what brings `size` bytes more in, and counts them.
    pub fn add(
        &self,
        digest: &Digest,
        size: u64,
        action: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        // Held meanwhile, so that a scan begins either before all of it or after.
        let mut sum = self.lock();
        action()?;
        sum.bytes = sum.bytes.map(|bytes| bytes + size);
        // What was written over is there for the scan to meet, as large as it was.
        if let Some((met, added)) = &mut sum.during
            && size > 0
            && met.insert(digest.clone())
        {
            *added += size;
        }
        Ok(())
    }

    /// Counts what was removed, which must not be while a scan is under way.
    pub fn remove(&self, size: u64) {
        let mut sum = self.lock();
        sum.bytes = sum.bytes.map(|bytes| bytes.saturating_sub(size));
    }

    /// A scan begins.
    pub fn scan_begins(&self) {
        self.lock().during = Some((HashSet::new(), 0));
    }

    /// Whether the scan is to pass over a blob that it has met, because it has been counted.
    pub fn is_counted(&self, digest: &Digest) -> bool {
        let sum = self.lock();
        sum.during
            .as_ref()
            .is_some_and(|(added, _)| added.contains(digest))
    }

    /// The scan has ended, having met so many bytes that were not counted yet.
    pub fn scan_ends(&self, bytes: u64) {
        let mut sum = self.lock();
        let added = sum.during.take().map_or(0, |(_, added)| added);
        sum.bytes = Some(bytes + added);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Sum> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Algorithm;

    #[test]
    fn what_comes_during_a_scan_is_counted_once() {
        let usage = Usage::default();
        let [met, missed] = [b"met", b"mis"].map(|blob| Digest::of(Algorithm::Sha256, blob));
        usage.add(&met, 1, || Ok(())).unwrap();
        assert_eq!(usage.bytes(), None);
        usage.scan_begins();
        usage.add(&met, 10, || Ok(())).unwrap();
        assert!(usage.is_counted(&met) && !usage.is_counted(&missed));
        usage.add(&missed, 100, || Ok(())).unwrap();
        usage.scan_ends(1000);
        assert_eq!(usage.bytes(), Some(1110));
        usage.remove(110);
        usage.add(&met, 1, || Ok(())).unwrap();
        assert_eq!(usage.bytes(), Some(1001));
    }
}
