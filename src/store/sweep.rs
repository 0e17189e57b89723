//! What is stored, and how it is removed again. Every call blocks, as in [`super::filesystem`].
//!
//! Nothing here is synced: what a crash brings back is removed another time, and a link to nothing
//! that it brings back is read as no link.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::StoreError;
use super::catalog::Page;
use super::filesystem::{Filesystem, absent, open_quietly};
use super::layout::{self, Repository};
use crate::oci::{Algorithm, Digest, Tag};

/// A download that nothing was added to for so long, and that is not under way, is not gone on
/// with; nor is anybody interested in the referrers of a manifest that is not here, if nobody has
/// asked for them for so long.
const STALE: Duration = Duration::from_hours(24);

/// A blob or manifest of the store, or what a download has left of one.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// When it was last used itself, or last grew.
    pub used: SystemTime,
    /// Whether somebody reads or writes it.
    pub held: bool,
    /// Whether it was pushed here: then it stays.
    pub pushed: bool,
    /// What it refers to, by the places in the list that it is in; `None` for what is no manifest.
    pub refers_to: Option<Box<[u32]>>,
    /// Whether it is a download, under way or given up.
    pub partial: bool,
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Removed {
    /// How many blobs and manifests.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Where a manifest is to be found, besides its bytes.
#[derive(Default)]
struct Links {
    repositories: Vec<Repository>,
    tags: Vec<(Repository, Tag)>,
}

impl Filesystem {
    /// Counts all bytes that are stored.
    pub fn count(&self) -> Result<(), StoreError> {
        self.usage.scan_begins();
        let mut bytes = 0;
        self.each_blob(|digest, size, _| {
            if !self.usage.is_counted(&digest) {
                bytes += size;
            }
        })?;
        self.usage.scan_ends(bytes);
        Ok(())
    }

    /// The bytes of all downloads, those that are under way and those that were given up.
    pub fn fill_bytes(&self) -> Result<u64, StoreError> {
        let mut bytes = 0;
        self.each_fill(|_, size, _| bytes += size)?;
        Ok(bytes)
    }

    /// All blobs and manifests, sorted by digest, and after them all downloads. It takes about 150 bytes of memory for each.
    pub fn inventory(&self) -> Result<Vec<Stored>, StoreError> {
        self.usage.scan_begins();
        let (mut all, mut bytes) = (Vec::new(), 0);
        self.each_blob(|digest, size, used| {
            if !self.usage.is_counted(&digest) {
                bytes += size;
            }
            all.push(Stored {
                held: self.leases.held(&digest),
                digest,
                size,
                used,
                pushed: false,
                refers_to: None,
                partial: false,
            });
        })?;
        self.usage.scan_ends(bytes);
        all.sort_unstable_by(|a, b| a.digest.cmp(&b.digest));
        let place = |all: &[Stored], digest: &Digest| {
            all.binary_search_by(|stored| stored.digest.cmp(digest))
                .ok()
        };
        for digest in self.pushed()? {
            if let Some(at) = place(&all, &digest) {
                all[at].pushed = true;
            }
        }
        for repository in self.repositories(&Page::all())? {
            for revision in self.revisions(&repository)? {
                let Some(at) = place(&all, &revision) else {
                    continue;
                };
                if all[at].refers_to.is_some() {
                    continue;
                }
                // One that can't be read is a manifest all the same, and refers to nothing.
                let manifest = self.manifest(&repository, &revision)?;
                let references = manifest.iter().flat_map(|manifest| {
                    let references = manifest.blobs.iter().chain(&manifest.manifests);
                    references.filter_map(|digest| u32::try_from(place(&all, digest)?).ok())
                });
                let references: Box<[u32]> = references.collect();
                all[at].refers_to = Some(references);
            }
        }
        self.each_fill(|digest, size, used| {
            all.push(Stored {
                held: self.leases.held(&digest),
                digest,
                size,
                used,
                pushed: false,
                refers_to: None,
                partial: true,
            });
        })?;
        Ok(all)
    }

    /// Calls back for each download, with its size and when it last grew.
    fn each_fill(&self, mut each: impl FnMut(Digest, u64, SystemTime)) -> Result<(), StoreError> {
        for algorithm in Algorithm::ALL {
            for digest in self.digests(&layout::fills(algorithm), algorithm)? {
                // One that has ended since is a blob, or nothing.
                let path = self.root.join(layout::fill(&digest));
                if let Ok(metadata) = fs::metadata(&path) {
                    let grew = metadata.modified();
                    each(
                        digest,
                        metadata.len(),
                        grew.map_err(|e| StoreError::new("read", &path, e))?,
                    );
                }
            }
        }
        Ok(())
    }

    /// Calls back for each blob and manifest, with its size and when it was last used.
    pub(super) fn each_blob(
        &self,
        mut each: impl FnMut(Digest, u64, SystemTime),
    ) -> Result<(), StoreError> {
        for algorithm in Algorithm::ALL {
            let folder = layout::blobs(algorithm);
            for prefix in self.list(&folder)? {
                for digest in self.digests(&format!("{folder}/{prefix}"), algorithm)? {
                    let path = self.root.join(layout::blob(&digest));
                    // A folder without its file was left behind when that was removed.
                    let Ok(metadata) = fs::metadata(&path) else {
                        continue;
                    };
                    let used = metadata
                        .accessed()
                        .map_err(|e| StoreError::new("read", &path, e))?;
                    each(digest, metadata.len(), used);
                }
            }
        }
        Ok(())
    }

    pub(super) fn digests(
        &self,
        folder: &str,
        algorithm: Algorithm,
    ) -> Result<Vec<Digest>, StoreError> {
        let names = self.list(folder)?;
        let digest = |hex: String| format!("{}:{hex}", algorithm.as_str()).parse().ok();
        Ok(names.into_iter().filter_map(digest).collect())
    }

    pub(super) fn revisions(&self, repository: &Repository) -> Result<Vec<Digest>, StoreError> {
        let mut all = Vec::new();
        for algorithm in Algorithm::ALL {
            let folder = layout::revisions(repository, algorithm);
            all.append(&mut self.digests(&folder, algorithm)?);
        }
        Ok(all)
    }

    /// Removes downloads that were given up, and says how many bytes they had.
    pub fn remove_stale_fills(&self, now: SystemTime) -> Result<u64, StoreError> {
        let mut stale = Vec::new();
        self.each_fill(|digest, _, grew| {
            if now.duration_since(grew).is_ok_and(|age| age > STALE) {
                stale.push((digest, grew));
            }
        })?;
        let mut bytes = 0;
        for (digest, grew) in stale {
            bytes += self.remove_fill(&digest, grew)?;
        }
        Ok(bytes)
    }

    /// Removes a download that is not under way and has not grown since, and says how many bytes it
    /// had.
    fn remove_fill(&self, digest: &Digest, grew: SystemTime) -> Result<u64, StoreError> {
        let path = self.root.join(layout::fill(digest));
        let removed = self.leases.unless_held(digest, || {
            let metadata = fs::metadata(&path).ok()?;
            let same = metadata.modified().ok()? == grew;
            same.then(|| {
                self.growing().remove(digest);
                remove_file(&self.root.join(layout::synced(digest)))?;
                remove_file(&path).map(|()| metadata.len())
            })
        });
        removed.flatten().unwrap_or(Ok(0))
    }

    /// Removes what was kept of the referrers of manifests that are not here.
    pub fn remove_stale_referrers(&self, now: SystemTime) -> Result<(), StoreError> {
        for repository in self.repositories_with(layout::REFERRERS, "_of", &Page::all())? {
            for algorithm in Algorithm::ALL {
                for digest in
                    self.digests(&layout::referrers_of(&repository, algorithm), algorithm)?
                {
                    let path = self.root.join(layout::referrers(&repository, &digest));
                    let modified = fs::metadata(&path).and_then(|metadata| metadata.modified());
                    let age = modified.ok().and_then(|it| now.duration_since(it).ok());
                    if age.is_some_and(|age| age > STALE)
                        && !self.has_manifest(&repository, &digest)?
                    {
                        // With the algorithm's folder and `_of`; a repository's own is found again.
                        remove_with_folders(&path, 2)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Removes blobs and manifests, in the order in which no reader ever sees a link to nothing:
    /// a manifest's tags, its revisions, its bytes. What somebody has opened meanwhile, or has
    /// used since it was listed, stays. `forget` is called before anybody can ask for a manifest
    /// that is gone.
    pub fn remove(
        &self,
        victims: &[&Stored],
        forget: impl Fn(&Digest, &[Repository], &[(Repository, Tag)]),
    ) -> Result<Removed, StoreError> {
        let (partials, victims): (Vec<&Stored>, Vec<&Stored>) =
            victims.iter().partition(|stored| stored.partial);
        let (manifests, blobs): (Vec<&Stored>, Vec<&Stored>) = victims
            .iter()
            .partition(|stored| stored.refers_to.is_some());
        self.remove_layer_links(&blobs.iter().map(|stored| &stored.digest).collect())?;
        let digests = manifests.iter().map(|stored| &stored.digest).collect();
        let links = self.links_to(&digests)?;
        let mut removed = Removed::default();
        for stored in partials {
            removed.bytes += self.remove_fill(&stored.digest, stored.used)?;
        }
        for stored in victims {
            let path = self.root.join(layout::blob(&stored.digest));
            // Kept open until nobody waits for it: to free a large file takes a while.
            let Some(file) = open_quietly(&path)? else {
                continue;
            };
            let gone = self.leases.unless_held(&stored.digest, || {
                let used = file.metadata().and_then(|metadata| metadata.accessed());
                if used.is_ok_and(|used| used > stored.used) {
                    return Ok(false);
                }
                if let Some(links) = links.get(&stored.digest) {
                    self.remove_links(&stored.digest, links)?;
                    forget(&stored.digest, &links.repositories, &links.tags);
                }
                remove_with_folders(&path, 1)?;
                Ok(true)
            });
            if gone.transpose()? == Some(true) {
                self.usage.remove(stored.size);
                removed.count += 1;
                removed.bytes += stored.size;
            }
        }
        Ok(removed)
    }

    /// Removes what says that repositories have these blobs.
    fn remove_layer_links(&self, blobs: &HashSet<&Digest>) -> Result<(), StoreError> {
        for repository in
            self.repositories_with(&layout::repositories(), "_layers", &Page::all())?
        {
            if self.is_kept(&repository) {
                continue;
            }
            for algorithm in Algorithm::ALL {
                for digest in self.digests(&layout::layers(&repository, algorithm), algorithm)? {
                    if blobs.contains(&digest) && !self.leases.held(&digest) {
                        let link = self.root.join(layout::layer_link(&repository, &digest));
                        remove_with_folders(&link, 1)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Which repositories and tags have these manifests.
    fn links_to<'a>(
        &self,
        manifests: &HashSet<&'a Digest>,
    ) -> Result<HashMap<&'a Digest, Links>, StoreError> {
        let mut all: HashMap<&Digest, Links> = HashMap::new();
        for repository in self.repositories(&Page::all())? {
            if self.is_kept(&repository) {
                continue;
            }
            let mut here = HashSet::new();
            for revision in self.revisions(&repository)? {
                if let Some(digest) = manifests.get(&revision) {
                    let links = all.entry(digest).or_default();
                    links.repositories.push(repository.clone());
                    here.insert(*digest);
                }
            }
            if here.is_empty() {
                continue;
            }
            for tag in self.list(&layout::tags(&repository))? {
                let Ok(tag) = tag.parse::<Tag>() else {
                    continue;
                };
                let mut of_tag: HashSet<Digest> = HashSet::new();
                for algorithm in Algorithm::ALL {
                    let index = layout::tag_index(&repository, &tag, algorithm);
                    of_tag.extend(self.digests(&index, algorithm)?);
                }
                of_tag.extend(self.tag(&repository, &tag)?.map(|link| link.digest));
                for digest in of_tag.iter().filter_map(|digest| here.get(digest)) {
                    let links = all.entry(digest).or_default();
                    links.tags.push((repository.clone(), tag.clone()));
                }
            }
        }
        Ok(all)
    }

    fn remove_links(&self, digest: &Digest, links: &Links) -> Result<(), StoreError> {
        for (repository, tag) in &links.tags {
            let now = self.tag(repository, tag)?;
            if now.is_some_and(|link| link.digest == *digest) {
                let current = layout::tag_link(repository, tag);
                remove_with_folders(&self.root.join(current), 1)?;
            }
            // The tag's folder as well, where this was all that it ever was.
            let index = layout::tag_index_link(repository, tag, digest);
            remove_with_folders(&self.root.join(index), 4)?;
        }
        for repository in &links.repositories {
            let link = layout::revision_link(repository, digest);
            remove_with_folders(&self.root.join(link), 1)?;
            remove_file(&self.root.join(layout::referrers(repository, digest)))?;
        }
        Ok(())
    }
}

pub(super) fn remove_file(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(e) if !absent(&e) => Err(StoreError::new("remove", path, e)),
        _ => Ok(()),
    }
}

/// Removes a file, and so many of the folders above it as hold nothing else.
pub(super) fn remove_with_folders(path: &Path, folders: usize) -> Result<(), StoreError> {
    remove_file(path)?;
    for folder in path.ancestors().skip(1).take(folders) {
        // It holds something else.
        if fs::remove_dir(folder).is_err() {
            break;
        }
    }
    Ok(())
}
