//! The collection of what is in a bucket and nobody needs: links of repositories to blobs that none
//! of their manifests names, blobs that nothing names or links to, and uploads that were given up.
//!
//! It marks, and sweeps only when all of the bucket could be read. Pushes go on meanwhile, by this
//! process and by others, and lose nothing:
//!
//! - What was written, or used again (`reuse`), within [`GRACE`](crate::store::collect::GRACE) stays.
//! - A blob is looked at once more after it was announced that it goes, so that whoever uses it by
//!   then is seen, and who uses it later sees that it goes.
//! - So are the links of a repository, and its new manifests after their removal: what one of these
//!   names is linked again.
//!
//! What is not this writer's (`is_own`) loses no link, and what it has is needed. The memory that it
//! takes is 36 bytes for each blob that is needed, and bounded by [`NEEDED`] and [`CANDIDATES`].

mod keys;

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::list::Object;
use super::reuse::is_unused;
use super::{Bucket, BucketError, Fetched, Writer, layout};
use crate::failpoint::failpoint;
use crate::oci::{Algorithm, Digest, MANIFEST_LIMIT};
use crate::store::Page;
use crate::store::collect::{Collected, GRACE, LISTED, Reason, Total, named_in};
use crate::store::layout::Repository;

pub(super) use keys::{Keys, of_blob};

/// The most blobs that may be needed.
const NEEDED: usize = 8_000_000;
/// The most links, and the most blobs, that one run removes.
const CANDIDATES: usize = 100_000;
/// Repositories whose names are in memory.
const REPOSITORIES: usize = 1000;
/// Repositories that are read at the same time, and manifests of each.
const AT_ONCE: (usize, usize) = (8, 4);
/// Blobs that are removed at the same time.
const REMOVALS: usize = 16;
/// How far the clocks of a host and of S3 may be apart: S3 refuses what is further.
const SKEW: Duration = Duration::from_mins(15);

/// Digests, of which only so much is kept that two will not be taken for one another; if they were,
/// both would stay.
#[derive(Default)]
pub(super) struct Digests(HashSet<u128>);

impl Digests {
    fn short(digest: &Digest) -> u128 {
        // Of 64 digits or more, all hexadecimal.
        u128::from_str_radix(&digest.hex()[..32], 16).unwrap_or_default()
    }

    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.0.contains(&Self::short(digest))
    }

    /// Adds one; false where there are too many.
    pub(super) fn add(&mut self, digest: &Digest) -> bool {
        self.0.insert(Self::short(digest));
        self.0.len() <= NEEDED
    }
}

/// What was read of a repository.
struct Marked {
    of: Repository,
    /// What it needs.
    needed: Vec<Digest>,
    /// Blobs that it has a link to and that no manifest of it names.
    unnamed: Vec<Digest>,
    /// A manifest of it that can't be read.
    unreadable: Option<Digest>,
    /// Keys by which a collection that has died announced something.
    leftovers: Vec<String>,
}

struct Collection<'a> {
    writer: &'a Writer,
    is_own: &'a (dyn Fn(&Repository) -> bool + Sync),
    dry_run: bool,
    /// What ends the names of the keys by which it announces what goes.
    name: u64,
    begun: SystemTime,
    needed: Digests,
    /// Keys that say nothing any more.
    leftovers: Vec<String>,
    collected: Collected,
}

/// The digest of a link's key below a folder of links.
pub(super) fn of_link(name: &str) -> Option<Digest> {
    let (algorithm, rest) = name.split_once('/')?;
    let hex = rest.strip_suffix("/link")?;
    format!("{algorithm}:{hex}").parse().ok()
}

impl Bucket {
    /// The keys below a folder, a page at a time: each page is given to `see`.
    pub(super) async fn each_page(
        &self,
        folder: &str,
        mut see: impl FnMut(Vec<Object>) -> Result<(), BucketError>,
    ) -> Result<(), BucketError> {
        let prefix = format!("{folder}/");
        let mut token: Option<String> = None;
        loop {
            let page = self.objects(&prefix, token.as_deref()).await?;
            see(page.files)?;
            token = page.more;
            if token.is_none() {
                return Ok(());
            }
        }
    }

    /// The bytes of a manifest, if they are what its digest says.
    pub(super) async fn manifest_bytes(
        &self,
        digest: &Digest,
    ) -> Result<Option<bytes::Bytes>, BucketError> {
        let path = layout::blob(digest);
        match self.fetch(&path, MANIFEST_LIMIT, None).await {
            Ok(Fetched::Found { bytes, .. }) => {
                let right = Digest::of(digest.algorithm(), &bytes) == *digest;
                Ok(right.then_some(bytes))
            }
            Ok(Fetched::Absent | Fetched::Unchanged) | Err(BucketError::Wrong { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The manifests of a repository whose links were written after `since`, where that is said.
    async fn revisions(
        &self,
        of: &Repository,
        since: Option<SystemTime>,
    ) -> Result<Vec<Digest>, BucketError> {
        let mut found = Vec::new();
        self.each_page(&layout::all_revisions(of), |keys| {
            let new =
                |key: &Object| since.is_none_or(|since| key.modified.is_none_or(|at| at >= since));
            let keys = keys.iter().filter(|key| new(key));
            found.extend(keys.filter_map(|key| of_link(&key.name)));
            if found.len() > NEEDED {
                return Err(self.too_many(of));
            }
            Ok(())
        })
        .await?;
        Ok(found)
    }

    fn too_many(&self, of: &Repository) -> BucketError {
        let folder = layout::repository(of);
        self.wrong(&folder, format!("names more than {NEEDED} blobs and manifests: this version's `gc` can't hold as many in memory"))
    }
}

impl Writer {
    /// Removes what nobody needs, or only says what that is. Links go only where `is_own` says so.
    /// What can't be read ends it; until all of the bucket was read, nothing is removed.
    pub async fn collect(
        &self,
        is_own: &(dyn Fn(&Repository) -> bool + Sync),
        dry_run: bool,
    ) -> Result<Collected, BucketError> {
        let root = format!("s3://{}/{}", self.name(), self.0.prefix.as_str());
        let root = PathBuf::from(root.trim_end_matches('/'));
        let mut collection = Collection {
            writer: self,
            is_own,
            dry_run,
            name: fastrand::u64(..),
            begun: SystemTime::now(),
            needed: Digests::default(),
            leftovers: Vec::new(),
            collected: Collected {
                root,
                ..Collected::default()
            },
        };
        let links = collection.mark().await?;
        let blobs = collection.unneeded().await?;
        let uploads = match self.stale_uploads(GRACE, true).await {
            Ok(found) => Some(found),
            Err(BucketError::Status { status: 501, .. }) => None,
            Err(error) => return Err(error),
        };
        collection.sweep_links(links).await?;
        collection.sweep_blobs(blobs).await?;
        collection.sweep_leftovers().await?;
        if uploads.is_some_and(|found| found > 0) && !dry_run {
            self.stale_uploads(GRACE, false).await?;
        }
        collection.collected.uploads_unknown = uploads.is_none();
        collection.collected.uploads = Total {
            count: uploads.unwrap_or_default() as u64,
            bytes: 0,
        };
        Ok(collection.collected)
    }
}

impl Collection<'_> {
    fn need(&mut self, of: &Repository, digest: &Digest) -> Result<(), BucketError> {
        if self.needed.add(digest) {
            return Ok(());
        }
        Err(self.writer.too_many(of))
    }

    fn left(&mut self, leftovers: impl Iterator<Item = String>) {
        let room = CANDIDATES - self.leftovers.len();
        self.leftovers.extend(leftovers.take(room));
    }

    /// Reads all repositories; gives the links that go, by their repositories.
    async fn mark(&mut self) -> Result<Vec<(Repository, Vec<Digest>)>, BucketError> {
        let having = [layout::MANIFESTS, layout::LAYERS];
        let (mut links, mut count) = (Vec::new(), 0);
        let mut page = Page {
            after: String::new(),
            limit: REPOSITORIES,
        };
        loop {
            let writer = self.writer;
            let names = writer.repositories_with(&having, &page).await?;
            let Some(last) = names.last() else { break };
            page.after = last.as_str().to_owned();
            let is_own = self.is_own;
            let marking = names.into_iter().map(async |of: Repository| {
                let own = is_own(&of);
                writer.marked(of, own).await
            });
            let mut marking = stream::iter(marking).buffer_unordered(AT_ONCE.0);
            while let Some(marked) = marking.try_next().await? {
                for digest in &marked.needed {
                    self.need(&marked.of, digest)?;
                }
                if let Some(manifest) = &marked.unreadable
                    && self.collected.unreadable.len() < LISTED
                {
                    let unreadable = format!("{}@{manifest}", marked.of);
                    self.collected.unreadable.push(unreadable);
                }
                let mut going = marked.unnamed;
                let left = CANDIDATES - count;
                if going.len() > left {
                    self.collected.more = true;
                    for digest in going.drain(left..) {
                        self.need(&marked.of, &digest)?;
                    }
                }
                self.left(marked.leftovers.into_iter());
                count += going.len();
                if !going.is_empty() {
                    links.push((marked.of, going));
                }
            }
        }
        Ok(links)
    }

    /// The blobs that nothing needs and nobody has used for long, with their sizes.
    async fn unneeded(&mut self) -> Result<Vec<(Digest, u64)>, BucketError> {
        let mut unneeded = Vec::new();
        let (needed, more) = (&self.needed, &mut self.collected.more);
        let leftovers = &mut self.leftovers;
        for algorithm in Algorithm::ALL {
            // Its keys stand together, and perhaps on two pages.
            let mut last: Option<Keys> = None;
            let mut end = |keys: Keys| {
                let room = CANDIDATES - leftovers.len();
                leftovers.extend(keys.leftovers().take(room));
                if let Some(size) = keys.unused().filter(|_| !needed.has(&keys.digest)) {
                    if unneeded.len() < CANDIDATES {
                        unneeded.push((keys.digest, size));
                    } else {
                        *more = true;
                    }
                }
            };
            let folder = layout::blobs(algorithm);
            let pages = self.writer.each_page(&folder, |page| {
                for object in page {
                    let Some((digest, name)) = of_blob(algorithm, &object.name) else {
                        continue;
                    };
                    let name = name.to_owned();
                    if last.as_ref().is_none_or(|last| last.digest != digest)
                        && let Some(ended) = last.replace(Keys::new(digest))
                    {
                        end(ended);
                    }
                    if let Some(last) = &mut last {
                        last.add(&Object { name, ..object });
                    }
                }
                Ok(())
            });
            pages.await?;
            if let Some(ended) = last {
                end(ended);
            }
        }
        Ok(unneeded)
    }

    async fn sweep_links(
        &mut self,
        links: Vec<(Repository, Vec<Digest>)>,
    ) -> Result<(), BucketError> {
        let this = &*self;
        let unlinking = links
            .into_iter()
            .map(async |(of, going): (Repository, Vec<Digest>)| {
                let kept = if this.dry_run {
                    HashSet::new()
                } else {
                    this.unlink(&of, &going).await?
                };
                Ok::<_, BucketError>((of, going, kept))
            });
        let unlinking = stream::iter(unlinking).buffered(AT_ONCE.0);
        let unlinked: Vec<_> = unlinking.try_collect().await?;
        for (of, going, kept) in unlinked {
            for digest in going {
                if kept.contains(&digest) {
                    self.need(&of, &digest)?;
                } else {
                    let path = layout::layer_link(&of, &digest);
                    self.collected.add(path, 0, Reason::Link);
                }
            }
        }
        Ok(())
    }

    async fn sweep_leftovers(&mut self) -> Result<(), BucketError> {
        if self.dry_run {
            return Ok(());
        }
        let (writer, leftovers) = (self.writer, std::mem::take(&mut self.leftovers));
        let removing = leftovers
            .into_iter()
            .map(async |path: String| writer.remove(&path).await);
        let removing = stream::iter(removing).buffer_unordered(REMOVALS);
        removing.try_collect().await
    }

    /// Removes links of a repository; gives those that stay, since they were used by now.
    async fn unlink(
        &self,
        of: &Repository,
        going: &[Digest],
    ) -> Result<HashSet<Digest>, BucketError> {
        let writer = self.writer;
        let announced = format!("{}{:016x}", layout::collecting(of), self.name);
        writer.put_mark(&announced).await?;
        let mut old = HashSet::new();
        writer
            .each_page(&layout::all_layers(of), |keys| {
                let keys = keys.iter().filter(|key| is_unused(key.modified));
                old.extend(keys.filter_map(|key| of_link(&key.name)));
                Ok(())
            })
            .await?;
        let mut kept: HashSet<Digest> = going
            .iter()
            .filter(|it| !old.contains(it))
            .cloned()
            .collect();
        let gone: Vec<&Digest> = going.iter().filter(|it| old.contains(it)).collect();
        let removing = gone.iter().map(async |digest: &&Digest| {
            let path = layout::layer_link(of, digest);
            writer.remove_once(&path).await
        });
        let removing = stream::iter(removing).buffer_unordered(REMOVALS);
        removing.try_collect::<()>().await?;
        failpoint!(CollectUnlinked);
        // A manifest that came meanwhile was told that what it names is there.
        for manifest in writer.revisions(of, Some(self.begun - SKEW)).await? {
            let bytes = writer.manifest_bytes(&manifest).await?;
            let named = bytes.and_then(|bytes| named_in(&bytes)).unwrap_or_default();
            for digest in named {
                if gone.contains(&&digest) {
                    writer
                        .put_link(&layout::layer_link(of, &digest), &digest)
                        .await?;
                    kept.insert(digest);
                }
            }
        }
        writer.remove(&announced).await?;
        Ok(kept)
    }

    async fn sweep_blobs(&mut self, blobs: Vec<(Digest, u64)>) -> Result<(), BucketError> {
        let this = &*self;
        let going = blobs
            .into_iter()
            .filter(|(digest, _)| !this.needed.has(digest));
        let removing = going.map(async |(digest, size): (Digest, u64)| {
            let is_unused = |keys: &Keys| keys.unused().is_some();
            let gone = this.dry_run || this.writer.remove_if(&digest, this.name, is_unused).await?;
            Ok(gone.then_some((digest, size)))
        });
        let mut removing = stream::iter(removing).buffer_unordered(REMOVALS);
        let mut gone = Vec::new();
        while let Some(removed) = removing.try_next().await? {
            gone.extend(removed);
        }
        drop(removing);
        gone.sort_unstable();
        for (digest, size) in gone {
            self.collected
                .add(layout::blob(&digest), size, Reason::Blob);
        }
        Ok(())
    }
}

impl Bucket {
    /// Reads what a repository needs.
    async fn marked(&self, of: Repository, own: bool) -> Result<Marked, BucketError> {
        let mut marked = Marked {
            needed: self.revisions(&of, None).await?,
            unnamed: Vec::new(),
            unreadable: None,
            leftovers: Vec::new(),
            of,
        };
        let revisions = marked.needed.clone();
        let mut named = HashSet::new();
        let reading = revisions.into_iter().map(async |digest: Digest| {
            let bytes = self.manifest_bytes(&digest).await?;
            let blobs = bytes.and_then(|bytes| named_in(&bytes));
            Ok::<_, BucketError>((digest, blobs))
        });
        let mut reading = stream::iter(reading).buffer_unordered(AT_ONCE.1);
        while let Some((digest, blobs)) = reading.try_next().await? {
            match blobs {
                Some(blobs) => named.extend(blobs),
                None => marked.unreadable = Some(digest),
            }
        }
        drop(reading);
        let collects = own && marked.unreadable.is_none();
        marked.unreadable = marked.unreadable.filter(|_| own);
        let folder = layout::all_layers(&marked.of);
        self.each_page(&folder, |keys| {
            for key in keys {
                let Some(digest) = of_link(&key.name) else {
                    if own && key.name.starts_with(layout::COLLECTING) && is_unused(key.modified) {
                        marked.leftovers.push(format!("{folder}/{}", key.name));
                    }
                    continue;
                };
                if collects && is_unused(key.modified) && !named.contains(&digest) {
                    marked.unnamed.push(digest);
                } else {
                    marked.needed.push(digest);
                }
            }
            if marked.needed.len() + marked.unnamed.len() > NEEDED {
                return Err(self.too_many(&marked.of));
            }
            Ok(())
        })
        .await?;
        marked.needed.extend(named);
        Ok(marked)
    }
}
