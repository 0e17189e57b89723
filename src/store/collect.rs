//! The collection of what is stored and nobody needs: blobs that no manifest names, uploads that
//! were given up, and what was set aside when a repository was first pushed to.
//!
//! It marks, and then sweeps, while pushes go on. What makes that safe is a rule that clients can
//! go by: what was used within [`GRACE`] stays. A client that is told of a blob, by HEAD, by a mount
//! or at its upload's end, has used it, and has that long to push the manifest; whoever is about to
//! use one holds a lease on it, under which nothing goes, and whose use is looked at again once
//! nobody does. So it does not matter what was pushed since something was marked.
//!
//! What is cached is the cache limit's to remove. A repository with a manifest that can't be read
//! loses nothing: nobody knows what that one names.

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::catalog::Page;
use super::filesystem::{Filesystem, absent, open_quietly, sync_parent};
use super::layout::{self, Repository};
use super::sweep::remove_with_folders;
use super::upload::UploadId;
use super::{Store, StoreError};
use crate::failpoint::failpoint;
use crate::oci::{Algorithm, Digest};

/// How long what was used stays, whether or not a manifest names it.
pub const GRACE: Duration = Duration::from_hours(24);
/// How long what was set aside stays, for people to take it back.
pub const ASIDE: Duration = Duration::from_hours(30 * 24);
/// Of so many things it is said what they are; of more, how many.
pub(super) const LISTED: usize = 10_000;

/// So many, of so many bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Total {
    /// How many.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Why something goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Nothing names the blob.
    Blob,
    /// No manifest of its repository names the blob that this is a link to.
    Link,
    /// Nothing came for an upload for a day.
    Upload,
    /// It was cached of a repository before that was pushed to.
    Aside,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blob => "no manifest names it",
            Self::Link => "no manifest of its repository names it",
            Self::Upload => "an upload that was given up",
            Self::Aside => "cached before its repository was pushed to",
        })
    }
}

/// Something that goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// Where it is, below the root.
    pub path: String,
    /// Its bytes.
    pub bytes: u64,
    /// Why.
    pub reason: Reason,
}

/// What was collected, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    /// The root.
    pub root: PathBuf,
    /// Blobs, and manifests that were deleted.
    pub blobs: Total,
    /// Links to blobs; their bytes are the blobs'.
    pub links: Total,
    /// Uploads.
    pub uploads: Total,
    /// What was set aside.
    pub aside: Total,
    /// The first of all these.
    pub listed: Vec<Item>,
    /// Hosted repositories of which nothing goes, with the manifest that can't be read.
    pub unreadable: Vec<String>,
    /// Whether it can't be known which uploads were given up: the store does not list them.
    #[serde(default)]
    pub uploads_unknown: bool,
    /// Whether more goes than one run removes.
    #[serde(default)]
    pub more: bool,
}

impl Collected {
    /// How many things.
    pub fn count(&self) -> u64 {
        let all = [self.blobs, self.links, self.uploads, self.aside];
        all.iter().map(|total| total.count).sum()
    }

    pub(super) fn add(&mut self, path: String, bytes: u64, reason: Reason) {
        let total = match reason {
            Reason::Blob => &mut self.blobs,
            Reason::Link => &mut self.links,
            Reason::Upload => &mut self.uploads,
            Reason::Aside => &mut self.aside,
        };
        total.count += 1;
        total.bytes += bytes;
        if self.listed.len() < LISTED {
            self.listed.push(Item {
                path,
                bytes,
                reason,
            });
        }
    }
}

struct Collection<'a> {
    store: &'a Filesystem,
    now: SystemTime,
    dry_run: bool,
    collected: Collected,
}

impl Filesystem {
    /// Removes what nobody needs, or only says what that is. Not to be called while the bytes that
    /// are stored are counted.
    pub fn collect(&self, now: SystemTime, dry_run: bool) -> Result<Collected, StoreError> {
        let mut collection = Collection {
            store: self,
            now,
            dry_run,
            collected: Collected {
                root: self.root.clone(),
                ..Collected::default()
            },
        };
        let needed = collection.links()?;
        collection.blobs(&needed)?;
        collection.uploads()?;
        collection.aside()?;
        Ok(collection.collected)
    }

    /// What a manifest names, by whatever field: also one of a kind that is unknown here. `None`
    /// where it can't be read.
    fn named_by(
        &self,
        of: &Repository,
        manifest: &Digest,
    ) -> Result<Option<Vec<Digest>>, StoreError> {
        let Some(manifest) = self.manifest(of, manifest)? else {
            return Ok(None);
        };
        Ok(named_in(&manifest.bytes))
    }
}

/// What a manifest names, by whatever field; `None` where it is no JSON.
pub(super) fn named_in(manifest: &[u8]) -> Option<Vec<Digest>> {
    let document = serde_json::from_slice(manifest).ok()?;
    let (mut named, mut pending) = (Vec::new(), vec![&document]);
    while let Some(value) = pending.pop() {
        match value {
            Value::String(text) => named.extend(text.parse::<Digest>()),
            Value::Array(items) => pending.extend(items),
            Value::Object(fields) => pending.extend(fields.values()),
            _ => {}
        }
    }
    Some(named)
}

impl Collection<'_> {
    /// Removes the links of hosted repositories to what their manifests do not name, and says which
    /// blobs are needed.
    fn links(&mut self) -> Result<HashSet<Digest>, StoreError> {
        let mut repositories = HashSet::new();
        for having in ["_manifests", "_layers"] {
            let root = layout::repositories();
            let found = self.store.repositories_with(&root, having, &Page::all())?;
            repositories.extend(found);
        }
        let mut needed = HashSet::new();
        for repository in repositories {
            self.links_of(&repository, &mut needed)?;
        }
        Ok(needed)
    }

    fn links_of(
        &mut self,
        repository: &Repository,
        needed: &mut HashSet<Digest>,
    ) -> Result<(), StoreError> {
        let mut named = HashSet::new();
        let mut collects = self.store.is_own(repository);
        for revision in self.store.revisions(repository)? {
            match self.store.named_by(repository, &revision)? {
                Some(more) => named.extend(more),
                // Its folder is there before it is, and after it was deleted.
                None if collects && self.store.has_manifest(repository, &revision)? => {
                    collects = false;
                    let unreadable = format!("{repository}@{revision}");
                    self.collected.unreadable.push(unreadable);
                }
                None => {}
            }
            needed.insert(revision);
        }
        for algorithm in Algorithm::ALL {
            let folder = layout::layers(repository, algorithm);
            for digest in self.store.digests(&folder, algorithm)? {
                if named.contains(&digest) {
                    continue;
                }
                if !collects || !self.unlink(repository, &digest)? {
                    needed.insert(digest);
                }
            }
        }
        needed.extend(named);
        Ok(())
    }

    /// Whether a repository has lost, or would lose, its link to a blob.
    fn unlink(&mut self, of: &Repository, digest: &Digest) -> Result<bool, StoreError> {
        let path = layout::layer_link(of, digest);
        let link = self.store.root.join(&path);
        let blob = self.store.root.join(layout::blob(digest));
        if self.dry_run {
            if !self.is_unused(&[&link, &blob]) {
                return Ok(false);
            }
        } else {
            // Looked at when nobody can begin to use it.
            let gone = self.store.leases.unless_held(digest, || {
                let unused = self.is_unused(&[&link, &blob]);
                if unused {
                    remove_with_folders(&link, 1)?;
                }
                Ok(unused)
            });
            if gone.transpose()? != Some(true) {
                return Ok(false);
            }
            // Not to come back with the power, when the blob has gone.
            let left = link.ancestors().skip(1).find(|folder| folder.exists());
            if let Some(folder) = left {
                sync_parent(&folder.join("gone"))?;
            }
            failpoint!(CollectUnlinked);
        }
        self.collected.add(path, 0, Reason::Link);
        Ok(true)
    }

    /// Removes the blobs, and the bytes of manifests, that nobody needs.
    fn blobs(&mut self, needed: &HashSet<Digest>) -> Result<(), StoreError> {
        let mut unneeded = Vec::new();
        self.store.each_blob(|digest, size, _| {
            if !needed.contains(&digest) {
                unneeded.push((digest, size));
            }
        })?;
        for (digest, size) in unneeded {
            let path = layout::blob(&digest);
            let blob = self.store.root.join(&path);
            // Kept open until nobody waits for it: to free a large file takes a while.
            let file = open_quietly(&blob)?;
            if file.is_none() {
                continue;
            }
            if self.dry_run {
                if !self.is_unused(&[&blob]) {
                    continue;
                }
            } else {
                let gone = self.store.leases.unless_held(&digest, || {
                    let unused = self.is_unused(&[&blob]);
                    if unused {
                        remove_with_folders(&blob, 1)?;
                    }
                    Ok(unused)
                });
                if gone.transpose()? != Some(true) {
                    continue;
                }
                self.store.usage.remove(size);
                failpoint!(CollectSwept);
            }
            self.collected.add(path, size, Reason::Blob);
        }
        Ok(())
    }

    fn uploads(&mut self) -> Result<(), StoreError> {
        let own = self.store.own_repositories();
        for (repository, id, bytes) in self.store.stale_uploads(own, self.now)? {
            if !self.dry_run {
                self.store.cancel_upload(&repository, &id)?;
            }
            let path = layout::upload(&repository, &id);
            self.collected.add(path, bytes, Reason::Upload);
        }
        Ok(())
    }

    fn aside(&mut self) -> Result<(), StoreError> {
        let all = self
            .store
            .repositories_with(layout::ASIDE, "_since", &Page::all())?;
        for repository in all {
            for since in self.store.list(&layout::all_aside(&repository))? {
                let Ok(seconds) = since.parse::<u64>() else {
                    continue;
                };
                let since = UNIX_EPOCH + Duration::from_secs(seconds);
                let age = self.now.duration_since(since).unwrap_or_default();
                if age <= ASIDE {
                    continue;
                }
                let path = layout::aside(&repository, seconds);
                let folder = self.store.root.join(&path);
                let bytes = bytes_below(&folder)?;
                if !self.dry_run {
                    remove_aside(&folder, &self.store.root.join(layout::ASIDE))?;
                }
                self.collected.add(path, bytes, Reason::Aside);
            }
        }
        Ok(())
    }

    /// Whether nobody has used a file, or written it, for long. What can't be looked at is in use;
    /// what is not there is not.
    fn is_unused(&self, paths: &[&Path]) -> bool {
        paths.iter().all(|path| match fs::metadata(path) {
            Err(error) => absent(&error),
            Ok(metadata) => {
                // Nobody reads a link for its client's sake, but others do (`verify`).
                let is_link = path.file_name().is_some_and(|name| name == "link");
                let times = [
                    Some(metadata.modified()),
                    (!is_link).then(|| metadata.accessed()),
                ];
                times.into_iter().flatten().all(|time| {
                    let age = time.ok().and_then(|it| self.now.duration_since(it).ok());
                    age.is_some_and(|age| age > GRACE)
                })
            }
        })
    }
}

fn bytes_below(folder: &Path) -> Result<u64, StoreError> {
    let (mut bytes, mut pending) = (0, vec![folder.to_owned()]);
    while let Some(folder) = pending.pop() {
        for name in super::filesystem::list(&folder)? {
            let path = folder.join(name);
            match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_dir() => pending.push(path),
                Ok(metadata) => bytes += metadata.len(),
                Err(e) if absent(&e) => {}
                Err(e) => return Err(StoreError::new("read", &path, e)),
            }
        }
    }
    Ok(bytes)
}

/// Removes a folder, and those above it up to `root` that hold nothing else.
fn remove_aside(folder: &Path, root: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(folder) {
        Err(e) if !absent(&e) => return Err(StoreError::new("remove", folder, e)),
        _ => {}
    }
    let above = folder.ancestors().skip(1);
    for folder in above.take_while(|folder| *folder != root) {
        if fs::remove_dir(folder).is_err() {
            break;
        }
    }
    Ok(())
}

/// For async callers, as all of [`Store`] is.
impl Store {
    /// Whether there is such a proof that somebody may write here; it is good for once.
    pub async fn take_proof(&self, id: UploadId) -> Result<bool, StoreError> {
        self.run(move |store| {
            let path = store.root.join(layout::proof(&id));
            match fs::remove_file(&path) {
                Ok(()) => Ok(true),
                Err(e) if absent(&e) => Ok(false),
                Err(e) => Err(StoreError::new("remove", &path, e)),
            }
        })
        .await
    }

    /// Removes what nobody needs, or only says what that is. Not to be called while [`Self::count`],
    /// [`Self::inventory`] or [`Self::remove`] is under way.
    pub async fn collect(&self, dry_run: bool) -> Result<Collected, StoreError> {
        self.run(move |store| store.collect(SystemTime::now(), dry_run))
            .await
    }
}
