//! Repositories that are pushed here. What they have is the truth, and nobody else has it: it is
//! never evicted, and on the disk with all that leads to it before anybody is told.
//!
//! A mark says of a repository that what it has was pushed. Without one it was cached, from an
//! upstream that has the same name: then it is not served under a hosted name, and set aside when
//! the first push to it comes, so that a pull never mixes the two.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use super::catalog::Page;
use super::filesystem::{Filesystem, make_parent, sync_parent};
use super::layout::{self, Repository};
use super::sweep::{remove_file, remove_with_folders};
use super::{Store, StoreError};
use crate::oci::{Algorithm, Digest, Manifest, Patterns, Subject, Tag};

/// Which repositories are pushed here.
#[derive(Debug, Default)]
pub(super) struct Own {
    /// Those with a mark.
    marked: RwLock<HashSet<Repository>>,
    /// What the configuration says.
    said: RwLock<Arc<Said>>,
    /// Held while a mark is written.
    marking: Mutex<()>,
}

#[derive(Debug, Default)]
struct Said {
    hosted: Patterns,
    adopt: Patterns,
}

impl Own {
    fn is_marked(&self, repository: &Repository) -> bool {
        let marked = self.marked.read().unwrap_or_else(PoisonError::into_inner);
        !marked.is_empty() && marked.contains(repository)
    }

    fn said(&self) -> Arc<Said> {
        Arc::clone(&self.said.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Filesystem {
    /// Reads the marks.
    pub(super) fn read_own(&self) -> Result<(), StoreError> {
        let mut own = HashSet::new();
        for repository in self.repositories_with(layout::HOSTED, "_own", &Page::all())? {
            let path = self.root.join(layout::own(&repository));
            let marked = path.try_exists();
            if marked.map_err(|e| StoreError::new("read", &path, e))? {
                own.insert(repository);
            }
        }
        let mut marked = self
            .own
            .marked
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *marked = own;
        Ok(())
    }

    /// Whether what a repository has was pushed.
    pub fn is_own(&self, repository: &Repository) -> bool {
        self.own.is_marked(repository) || {
            let said = self.own.said();
            let name = repository.as_str();
            said.adopt.matches(name) && said.hosted.matches(name)
        }
    }

    /// Whether what a repository has is not to be evicted: also what may have been cached, until a
    /// push has set it aside.
    pub(super) fn is_kept(&self, repository: &Repository) -> bool {
        let said = self.own.said.read().unwrap_or_else(PoisonError::into_inner);
        said.hosted.matches(repository.as_str()) || self.own.is_marked(repository)
    }

    pub(super) fn own_repositories(&self) -> Vec<Repository> {
        let marked = self
            .own
            .marked
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        marked.iter().cloned().collect()
    }

    /// The blobs and manifests that are not to be evicted.
    pub(super) fn pushed(&self) -> Result<HashSet<Digest>, StoreError> {
        let mut kept = self.own_repositories();
        if !self.own.said().hosted.is_empty() {
            for having in ["_layers", "_manifests"] {
                let all = self.repositories_with(&layout::repositories(), having, &Page::all())?;
                kept.extend(all.into_iter().filter(|it| self.is_kept(it)));
            }
        }
        let kept: HashSet<Repository> = kept.into_iter().collect();
        let mut pushed = HashSet::new();
        for repository in &kept {
            pushed.extend(self.revisions(repository)?);
            for algorithm in Algorithm::ALL {
                pushed.extend(self.digests(&layout::layers(repository, algorithm), algorithm)?);
            }
        }
        Ok(pushed)
    }

    /// Whether anything is stored of a repository.
    pub fn has_any(&self, repository: &Repository) -> Result<bool, StoreError> {
        for folder in [
            layout::manifests(repository),
            layout::all_layers(repository),
        ] {
            let path = self.root.join(folder);
            let there = path.try_exists();
            if there.map_err(|e| StoreError::new("read", &path, e))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes a repository one that is pushed here, and says whether something was set aside for it
    /// that was cached.
    /// `forget` is called before anybody is given anything of it again.
    pub fn claim(
        &self,
        repository: &Repository,
        forget: impl FnOnce(),
    ) -> Result<bool, StoreError> {
        let marking = self.own.marking.lock();
        let _order = marking.unwrap_or_else(PoisonError::into_inner);
        if self.own.is_marked(repository) {
            return Ok(false);
        }
        let said = self.own.said();
        let cached = !said.adopt.matches(repository.as_str()) && self.has_any(repository)?;
        if cached {
            self.set_aside(repository)?;
            forget();
        }
        self.write_own(&layout::own(repository), b"")?;
        let mut marked = self
            .own
            .marked
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        marked.insert(repository.clone());
        Ok(cached)
    }

    /// Moves what was cached of a repository out of its place. The blobs stay where they are, and
    /// are evicted as others.
    fn set_aside(&self, repository: &Repository) -> Result<(), StoreError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let seconds = now.map_or(0, |now| now.as_secs());
        let aside = self.root.join(layout::aside(repository, seconds));
        for folder in [
            layout::manifests(repository),
            layout::all_layers(repository),
        ] {
            let from = self.root.join(folder);
            let Some(name) = from.file_name() else {
                continue;
            };
            let to = aside.join(name);
            make_parent(&to)?;
            match fs::rename(&from, &to) {
                Err(e) if !super::filesystem::absent(&e) => {
                    return Err(StoreError::new("set aside", &from, e));
                }
                _ => {}
            }
            if from.parent().is_some_and(Path::exists) {
                sync_parent(&from)?;
            }
        }
        Ok(())
    }

    fn write_own(&self, path: &str, bytes: &[u8]) -> Result<(), StoreError> {
        make_folder_of(&self.root.join(path))?;
        self.write(path, bytes)
    }

    /// Writes a link of an own repository.
    pub(super) fn link_own(&self, path: &str, digest: &Digest) -> Result<(), StoreError> {
        self.write_own(path, digest.as_str().as_bytes())
    }

    /// Says that an own repository has a blob, which is here. `false` where it is not.
    pub fn mount(&self, of: &Repository, digest: &Digest) -> Result<bool, StoreError> {
        let _lease = self.leases.take(digest);
        if !self.root.join(layout::blob(digest)).exists() {
            return Ok(false);
        }
        // So that it stays until its manifest comes.
        self.touch(digest);
        self.link_own(&layout::layer_link(of, digest), digest)?;
        Ok(true)
    }

    /// What of these a repository does not have; what it has stays until its manifest is there, or for
    /// as long as that may take.
    pub fn lacks(
        &self,
        of: &Repository,
        blobs: Vec<Digest>,
        manifests: Vec<Digest>,
    ) -> Result<Vec<Digest>, StoreError> {
        let mut lacking = Vec::new();
        for digest in blobs {
            let _lease = self.leases.take(&digest);
            self.touch(&digest);
            let here = self.root.join(layout::blob(&digest)).exists();
            if !here || !self.has_link(of, &digest)? {
                lacking.push(digest);
            }
        }
        for digest in manifests {
            if !self.has_manifest(of, &digest)? {
                lacking.push(digest);
            }
        }
        Ok(lacking)
    }

    /// An own repository that has a blob.
    pub fn has_somewhere(&self, digest: &Digest) -> Result<bool, StoreError> {
        for repository in self.own_repositories() {
            if self.has_link(&repository, digest)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Stores a manifest of an own repository. Nobody sees a link to nothing, nor a referrer that is
    /// not there.
    pub fn put_own_manifest(&self, of: &Repository, manifest: &Manifest) -> Result<(), StoreError> {
        let digest = &manifest.digest;
        for path in [layout::blob(digest), layout::revision_link(of, digest)] {
            make_folder_of(&self.root.join(path))?;
        }
        self.put_manifest(of, manifest)?;
        if let Some(subject) = Subject::of(manifest) {
            self.write_own(&layout::subject(of, &subject.digest, digest), b"")?;
        }
        Ok(())
    }

    /// Moves a tag of an own repository.
    pub fn put_own_tag(
        &self,
        of: &Repository,
        tag: &Tag,
        digest: &Digest,
    ) -> Result<(), StoreError> {
        for path in [
            layout::tag_index_link(of, tag, digest),
            layout::tag_link(of, tag),
        ] {
            make_folder_of(&self.root.join(path))?;
        }
        self.put_tag(of, tag, digest)
    }

    /// Removes a tag, and says whether there was one.
    pub fn delete_tag(&self, of: &Repository, tag: &Tag) -> Result<bool, StoreError> {
        if self.tag(of, tag)?.is_none() {
            return Ok(false);
        }
        let current = self.root.join(layout::tag_link(of, tag));
        remove_file(&current)?;
        sync_parent(&current)?;
        let folder = current.ancestors().nth(2);
        if let Some(folder) = folder {
            // What it was once; the tag is gone already.
            let removed = fs::remove_dir_all(folder);
            if let Err(error) = removed
                && !super::filesystem::absent(&error)
            {
                return Err(StoreError::new("remove", folder, error));
            }
        }
        Ok(true)
    }

    /// Which tags of a repository are this manifest.
    pub fn tags_of(&self, of: &Repository, digest: &Digest) -> Result<Vec<Tag>, StoreError> {
        let mut found = Vec::new();
        for name in self.list(&layout::tags(of))? {
            let Ok(tag) = name.parse::<Tag>() else {
                continue;
            };
            let link = self.tag(of, &tag)?;
            if link.is_some_and(|link| link.digest == *digest) {
                found.push(tag);
            }
        }
        Ok(found)
    }

    /// Removes a manifest from a repository, whose tags are gone, and says whether it was there.
    pub fn delete_manifest(&self, of: &Repository, digest: &Digest) -> Result<bool, StoreError> {
        if !self.has_manifest(of, digest)? {
            return Ok(false);
        }
        let subject = self.manifest(of, digest)?;
        let link = self.root.join(layout::revision_link(of, digest));
        remove_with_folders(&link, 1)?;
        sync_parent_if_there(&link)?;
        if let Some(subject) = subject.as_ref().and_then(Subject::of) {
            let path = self.root.join(layout::subject(of, &subject.digest, digest));
            remove_with_folders(&path, 2)?;
        }
        Ok(true)
    }

    /// Removes a blob from a repository, and says whether it had it.
    pub fn unlink_layer(&self, of: &Repository, digest: &Digest) -> Result<bool, StoreError> {
        if !self.has_link(of, digest)? {
            return Ok(false);
        }
        let link = self.root.join(layout::layer_link(of, digest));
        remove_with_folders(&link, 1)?;
        sync_parent_if_there(&link)?;
        Ok(true)
    }

    /// The manifests that say they are about another one, in the order of their digests.
    pub fn about(&self, of: &Repository, subject: &Digest) -> Result<Vec<Digest>, StoreError> {
        let mut about = Vec::new();
        for algorithm in Algorithm::ALL {
            let folder = layout::subjects(of, subject, algorithm);
            about.extend(self.digests(&folder, algorithm)?);
        }
        about.sort_unstable();
        Ok(about)
    }
}

/// Makes the folders above a file, and brings their names to the disk.
pub(super) fn make_folder_of(target: &Path) -> Result<(), StoreError> {
    let folders = target.ancestors().skip(1);
    let new: Vec<PathBuf> = folders
        .take_while(|folder| !folder.exists())
        .map(Path::to_owned)
        .collect();
    make_parent(target)?;
    for folder in new {
        sync_parent(&folder)?;
    }
    Ok(())
}

/// Brings it to the disk that a file, or its folder with it, is gone.
fn sync_parent_if_there(of: &Path) -> Result<(), StoreError> {
    let there = of.ancestors().skip(1).find(|folder| folder.exists());
    match there {
        Some(folder) => sync_parent(&folder.join("gone")),
        None => Ok(()),
    }
}

/// For async callers, as all of [`Store`] is.
impl Store {
    /// Takes over which repositories are pushed here, and of which of them all was.
    pub fn host(&self, hosted: Patterns, adopt: Patterns) {
        let said = &self.0.files.own.said;
        *said.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Said { hosted, adopt });
    }

    /// Whether what a repository has was pushed here.
    pub fn is_own(&self, repository: &Repository) -> bool {
        self.0.files.is_own(repository)
    }

    /// Whether a repository is hosted, or was: then no upstream has anything to do with it.
    pub fn is_kept(&self, repository: &Repository) -> bool {
        self.0.files.is_kept(repository)
    }

    /// Whether a repository has the mark of a push.
    pub fn is_marked(&self, repository: &Repository) -> bool {
        self.0.files.own.is_marked(repository)
    }

    /// Whether anything is stored of a repository.
    pub async fn has_any(&self, of: &Repository) -> Result<bool, StoreError> {
        let of = of.clone();
        self.run(move |store| store.has_any(&of)).await
    }

    /// Makes a repository one that is pushed here, and says whether something was set aside for it
    /// that was cached.
    pub async fn claim(&self, of: &Repository) -> Result<bool, StoreError> {
        if self.is_marked(of) {
            return Ok(false);
        }
        let of = of.clone();
        self.run_whole(move |store| {
            store.files.claim(&of, || {
                store
                    .manifests
                    .retain(|(repository, _), _| *repository != of);
                store.tags.retain(|(repository, _), _| *repository != of);
            })
        })
        .await
    }

    /// Says that an own repository has a blob, which is here. `false` where it is not.
    pub async fn mount(&self, of: &Repository, digest: &Digest) -> Result<bool, StoreError> {
        let (of, digest) = (of.clone(), digest.clone());
        self.run(move |store| store.mount(&of, &digest)).await
    }

    /// Whether any own repository has a blob.
    pub async fn has_somewhere(&self, digest: &Digest) -> Result<bool, StoreError> {
        let digest = digest.clone();
        self.run(move |store| store.has_somewhere(&digest)).await
    }

    /// Stores a manifest of an own repository, and moves `tags` to it.
    pub async fn put_own_manifest(
        &self,
        of: &Repository,
        manifest: &Arc<Manifest>,
        tags: &[Tag],
    ) -> Result<(), StoreError> {
        let (key, manifest_of) = ((of.clone(), manifest.digest.clone()), Arc::clone(manifest));
        let moved = tags.to_vec();
        self.run_whole(move |store| {
            let _lease = store.files.leases.take(&key.1);
            store.files.put_own_manifest(&key.0, &manifest_of)?;
            for tag in &moved {
                store.files.put_own_tag(&key.0, tag, &key.1)?;
            }
            store.manifests.insert(key, store.kept(manifest_of));
            Ok(())
        })
        .await?;
        for tag in tags {
            self.confirmed(of, tag, &manifest.digest);
        }
        Ok(())
    }

    /// Removes a tag, and says whether there was one. Once this has returned nobody is given it.
    pub async fn delete_tag(&self, of: &Repository, tag: &Tag) -> Result<bool, StoreError> {
        let key = (of.clone(), tag.clone());
        self.run_whole(move |store| {
            let deleted = store.files.delete_tag(&key.0, &key.1);
            // After the files, or they would be read into memory again; whatever became of them.
            store.tags.remove(&key);
            deleted
        })
        .await
    }

    /// Which tags of a repository are this manifest.
    pub async fn tags_of(&self, of: &Repository, digest: &Digest) -> Result<Vec<Tag>, StoreError> {
        let (of, digest) = (of.clone(), digest.clone());
        self.run(move |store| store.tags_of(&of, &digest)).await
    }

    /// Removes a manifest from a repository, whose tags are gone, and says whether it was there. Once
    /// this has returned nobody is given it.
    pub async fn delete_manifest(
        &self,
        of: &Repository,
        digest: &Digest,
    ) -> Result<bool, StoreError> {
        let key = (of.clone(), digest.clone());
        self.run_whole(move |store| {
            let deleted = store.files.delete_manifest(&key.0, &key.1);
            store.manifests.remove(&key);
            deleted
        })
        .await
    }

    /// Removes a blob from a repository, and says whether it had it.
    pub async fn unlink_layer(&self, of: &Repository, digest: &Digest) -> Result<bool, StoreError> {
        let (of, digest) = (of.clone(), digest.clone());
        self.run(move |store| store.unlink_layer(&of, &digest))
            .await
    }

    /// The manifests that say they are about another one, in the order of their digests.
    pub async fn about(
        &self,
        of: &Repository,
        subject: &Digest,
    ) -> Result<Vec<Digest>, StoreError> {
        let (of, subject) = (of.clone(), subject.clone());
        self.run(move |store| store.about(&of, &subject)).await
    }

    /// Whether a blob or manifest is here that a manifest of a repository may refer to.
    pub async fn lacks(
        &self,
        of: &Repository,
        blobs: Vec<Digest>,
        manifests: Vec<Digest>,
    ) -> Result<Vec<Digest>, StoreError> {
        let of = of.clone();
        self.run(move |store| store.lacks(&of, blobs, manifests))
            .await
    }
}
