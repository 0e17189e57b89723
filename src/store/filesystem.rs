//! The store on a local disk. Every call blocks: [`super::Store`] is the way in.
//!
//! A file appears under its final name only when it is whole and on the disk: it is written under a
//! temporary name, synced, renamed, and its folder synced. A crash at any point leaves what was
//! there before, and at most a temporary file, which the next start removes.

use std::collections::HashSet;
use std::fs::{self, File, FileTimes, FileType, Metadata, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use nix::fcntl::OFlag;
use tempfile::TempPath;

use serde_json::Value;

use super::catalog::Page;
use super::layout::{self, Repository};
use super::lease::{BlobFile, Leases};
use super::own::Own;
use super::sweep::remove_file;
use super::usage::Usage;
use super::{Blob, StoreError, TagLink};
use crate::failpoint::failpoint;
use crate::oci::{Algorithm, Digest, MANIFEST_LIMIT, Manifest, Tag};

/// How exactly a blob's last use is known: a file that is served a thousand times a second is not
/// written to as often.
pub const USE_INTERVAL: Duration = Duration::from_mins(5);

/// A root folder in distribution's layout, locked for this process.
#[derive(Debug)]
pub struct Filesystem {
    pub(super) root: PathBuf,
    /// The blobs that are being read or written.
    pub(super) leases: Leases,
    /// How many bytes are stored.
    pub(super) usage: Usage,
    /// The downloads of which this process has seen every byte.
    pub(super) growing: Mutex<HashSet<Digest>>,
    /// The repositories of which something was kept that perhaps only an account could see.
    shared: RwLock<HashSet<Repository>>,
    /// Held while it is noted who may see a repository.
    noting: Mutex<()>,
    /// The repositories that are pushed here.
    pub(super) own: Own,
    /// Keeps a second agent from working on the same root; the kernel lets go of it when the
    /// process ends, however it ends.
    _lock: File,
}

impl Filesystem {
    /// Opens `root`, making it where it is missing. No content is scanned: it takes the same time for
    /// an empty store and for a huge one.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let temporary = root.join(layout::TEMPORARY);
        fs::create_dir_all(&temporary).map_err(|e| StoreError::new("create", &temporary, e))?;
        let path = root.join(layout::LOCK);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|e| StoreError::new("open", &path, e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::Locked(root.to_owned())),
            Err(TryLockError::Error(e)) => return Err(StoreError::new("lock", &path, e)),
        }
        let store = Self {
            root: root.to_owned(),
            leases: Leases::default(),
            usage: Usage::default(),
            growing: Mutex::default(),
            shared: RwLock::default(),
            noting: Mutex::default(),
            own: Own::default(),
            _lock: lock,
        };
        // What a killed process left half-written has no reader and no name that means anything.
        for entry in store.list(layout::TEMPORARY)? {
            let path = temporary.join(entry);
            fs::remove_file(&path).map_err(|e| StoreError::new("remove", &path, e))?;
        }
        let mut shared = HashSet::new();
        for repository in store.repositories_with(layout::SHARED, "_kept", &Page::all())? {
            let path = root.join(layout::shared(&repository));
            let marked = path.try_exists();
            if marked.map_err(|e| StoreError::new("read", &path, e))? {
                shared.insert(repository);
            }
        }
        *store.shared.write().unwrap_or_else(PoisonError::into_inner) = shared;
        store.read_own()?;
        Ok(store)
    }

    /// The root folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Opens a blob's bytes, if they are here, which counts as their use.
    pub fn blob(&self, digest: &Digest) -> Result<Option<Blob>, StoreError> {
        let path = self.root.join(layout::blob(digest));
        // Before the file is opened: from then on it is not evicted.
        let lease = self.leases.take(digest);
        let Some(file) = open_if_there(&path)? else {
            return Ok(None);
        };
        let metadata = file
            .metadata()
            .map_err(|e| StoreError::new("read", &path, e))?;
        note_use(&file, &metadata);
        Ok(Some(Blob {
            size: metadata.len(),
            file: Arc::new(BlobFile::new(file, lease)),
        }))
    }

    /// Records that a blob or manifest is being used, if it is here.
    pub fn touch(&self, digest: &Digest) {
        let file = open_quietly(&self.root.join(layout::blob(digest)));
        if let Ok(Some(file)) = file
            && let Ok(metadata) = file.metadata()
        {
            note_use(&file, &metadata);
        }
    }

    /// Whether a repository is known to have a blob.
    pub fn has_link(&self, repository: &Repository, digest: &Digest) -> Result<bool, StoreError> {
        let link = self.root.join(layout::layer_link(repository, digest));
        link.try_exists()
            .map_err(|e| StoreError::new("read", &link, e))
    }

    /// Whether a manifest of a repository names a blob. Reads all of its manifests.
    pub fn names_layer(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<bool, StoreError> {
        for algorithm in Algorithm::ALL {
            let folder = layout::revisions(repository, algorithm);
            for hex in self.list(&folder)? {
                let Ok(revision) = format!("{}:{hex}", algorithm.as_str()).parse() else {
                    continue;
                };
                let manifest = self.manifest(repository, &revision)?;
                if manifest.is_some_and(|manifest| manifest.blobs.contains(digest)) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Whether a repository is known to have a manifest.
    pub(super) fn has_manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<bool, StoreError> {
        let link = self.root.join(layout::revision_link(repository, digest));
        link.try_exists()
            .map_err(|e| StoreError::new("read", &link, e))
    }

    /// Records that a repository has a blob, whose bytes must be here already.
    pub fn link_layer(&self, repository: &Repository, digest: &Digest) -> Result<(), StoreError> {
        self.mark(repository)?;
        self.link(&layout::layer_link(repository, digest), digest)
    }

    /// Reads a manifest of a repository and checks that its bytes are the digest's; bytes that rotted
    /// on the disk are as good as absent.
    pub fn manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Option<Manifest>, StoreError> {
        if !self.has_manifest(repository, digest)? {
            return Ok(None);
        }
        let path = self.root.join(layout::blob(digest));
        // To look for something in a manifest is no use of it.
        let Some(file) = open_quietly(&path)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        let limit = u64::try_from(MANIFEST_LIMIT).unwrap_or(u64::MAX) + 1;
        file.take(limit)
            .read_to_end(&mut bytes)
            .map_err(|e| StoreError::new("read", &path, e))?;
        if Digest::of(digest.algorithm(), &bytes) != *digest {
            tracing::warn!(path = %path.display(), "a stored manifest does not match its digest: it is fetched again");
            return Ok(None);
        }
        Ok(Manifest::parse(bytes.into(), digest.clone()).ok())
    }

    /// Which manifest a tag is, and when that was last confirmed.
    pub fn tag(&self, repository: &Repository, tag: &Tag) -> Result<Option<TagLink>, StoreError> {
        let path = self.root.join(layout::tag_link(repository, tag));
        let Some(mut file) = open_if_there(&path)? else {
            return Ok(None);
        };
        let metadata = file
            .metadata()
            .map_err(|e| StoreError::new("read", &path, e))?;
        // What is no link is as good as absent: the tag is asked for again, and the link replaced.
        if !metadata.is_file() {
            return Ok(None);
        }
        let mut text = Vec::new();
        let read = (&mut file).take(256).read_to_end(&mut text);
        read.map_err(|e| StoreError::new("read", &path, e))?;
        let digest = str::from_utf8(&text).ok();
        let Some(digest) = digest.and_then(|text| text.trim().parse().ok()) else {
            return Ok(None);
        };
        let confirmed = metadata.modified();
        Ok(Some(TagLink {
            digest,
            confirmed: confirmed.map_err(|e| StoreError::new("read", &path, e))?,
        }))
    }

    /// Stores a manifest for a repository, in the order in which no reader ever sees a link to
    /// nothing: bytes first, then the revision. The tag, if there is one, is moved last of all.
    pub fn put_manifest(
        &self,
        repository: &Repository,
        manifest: &Manifest,
    ) -> Result<(), StoreError> {
        self.mark(repository)?;
        let digest = &manifest.digest;
        // Written even where it is there: those bytes may be the rotten ones that brought us here.
        let target = self.root.join(layout::blob(digest));
        let before = fs::metadata(&target).map_or(0, |metadata| metadata.len());
        let more = (manifest.bytes.len() as u64).saturating_sub(before);
        let staged = self.stage(&target, &manifest.bytes)?;
        failpoint!(ManifestStaged);
        self.usage.add(digest, more, || place(staged, &target))?;
        sync_parent(&target)?;
        failpoint!(ManifestWritten);
        self.link(&layout::revision_link(repository, digest), digest)?;
        failpoint!(RevisionLinked);
        Ok(())
    }

    /// Moves a tag to a manifest that is stored, as confirmed now; a tag of one that is not (it has
    /// just been evicted) would be a link to nothing, and stays as it is.
    pub fn put_tag(
        &self,
        repository: &Repository,
        tag: &Tag,
        digest: &Digest,
    ) -> Result<(), StoreError> {
        let _lease = self.leases.take(digest);
        let revision = self.root.join(layout::revision_link(repository, digest));
        if !revision.exists() {
            return Ok(());
        }
        self.mark(repository)?;
        self.link(&layout::tag_index_link(repository, tag, digest), digest)?;
        failpoint!(IndexLinked);
        let target = self.root.join(layout::tag_link(repository, tag));
        let staged = self.stage(&target, digest.as_str().as_bytes())?;
        failpoint!(TagStaged);
        place(staged, &target)?;
        sync_parent(&target)?;
        failpoint!(TagMoved);
        Ok(())
    }

    /// Records when the upstream has confirmed a tag.
    pub fn confirm_tag(
        &self,
        repository: &Repository,
        tag: &Tag,
        at: SystemTime,
    ) -> Result<(), StoreError> {
        let path = self.root.join(layout::tag_link(repository, tag));
        OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|link| link.set_modified(at))
            .map_err(|e| StoreError::new("touch", &path, e))
    }

    /// What was last kept of the referrers of a manifest.
    pub fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Option<Vec<Value>>, StoreError> {
        let path = self.root.join(layout::referrers(repository, digest));
        let Some(file) = open_if_there(&path)? else {
            return Ok(None);
        };
        // What can't be read is not kept.
        Ok(serde_json::from_reader(io::BufReader::new(file)).ok())
    }

    /// Keeps the referrers of a manifest; that something has none only where it is stored, since
    /// clients can ask that of whatever they like.
    pub fn put_referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        list: &[Value],
    ) -> Result<(), StoreError> {
        let path = layout::referrers(repository, digest);
        if list.is_empty() && !self.has_manifest(repository, digest)? {
            return remove_file(&self.root.join(path));
        }
        self.mark(repository)?;
        self.write(&path, Value::from(list).to_string().as_bytes())
    }

    /// Whether something was kept of a repository that perhaps only an account could see, and it has
    /// not been proved since that everybody can.
    pub fn is_shared(&self, repository: &Repository) -> bool {
        let shared = self.shared.read().unwrap_or_else(PoisonError::into_inner);
        shared.contains(repository)
    }

    /// Before anything is stored of a repository that perhaps only an account can see.
    fn mark(&self, repository: &Repository) -> Result<(), StoreError> {
        if !repository.is_of_account() || self.is_shared(repository) {
            return Ok(());
        }
        let _order = self.noting.lock().unwrap_or_else(PoisonError::into_inner);
        self.note_shared(repository)
    }

    fn note_shared(&self, repository: &Repository) -> Result<(), StoreError> {
        self.write(&layout::shared(repository), b"")?;
        let mut shared = self.shared.write().unwrap_or_else(PoisonError::into_inner);
        shared.insert(repository.clone());
        Ok(())
    }

    fn unmark(&self, repository: &Repository) -> Result<(), StoreError> {
        if !self.is_shared(repository) {
            return Ok(());
        }
        let path = self.root.join(layout::shared(repository));
        remove_file(&path)?;
        sync_parent(&path)?;
        let mut shared = self.shared.write().unwrap_or_else(PoisonError::into_inner);
        shared.remove(repository);
        Ok(())
    }

    /// Whether everybody could see a repository when that was last noted.
    pub fn is_public(&self, repository: &Repository) -> Result<bool, StoreError> {
        Ok(!self.is_shared(repository) && self.is_proved(repository)?)
    }

    fn is_proved(&self, repository: &Repository) -> Result<bool, StoreError> {
        let path = self.root.join(layout::public(repository));
        path.try_exists()
            .map_err(|e| StoreError::new("read", &path, e))
    }

    /// Notes whether everybody can see a repository. One that not everybody can is marked, so that
    /// this is known also when nobody notes such things any longer.
    pub fn set_public(&self, repository: &Repository, public: bool) -> Result<(), StoreError> {
        let _order = self.noting.lock().unwrap_or_else(PoisonError::into_inner);
        let path = layout::public(repository);
        let proved = self.is_proved(repository)?;
        if public {
            if !proved {
                self.write(&path, b"")?;
            }
            return self.unmark(repository);
        }
        // First of all, since it takes no room.
        if proved {
            let path = self.root.join(path);
            remove_file(&path)?;
            // Not to come back with the power.
            sync_parent(&path)?;
        }
        // Whatever is asked for leaves no mark, only what is here.
        let stored = self.root.join(layout::repository(repository));
        if !self.is_shared(repository) && stored.exists() {
            self.note_shared(repository)?;
        }
        Ok(())
    }

    /// Proves that the store can be written and read back.
    pub fn probe(&self) -> Result<(), StoreError> {
        let folder = self.root.join(layout::TEMPORARY);
        let error = |e| StoreError::new("write in", &folder, e);
        // The crate's own way to open it puts the random name into the error, which would be another
        // problem at each probe, and hides the system's number for it.
        let create = |path: &Path| OpenOptions::new().write(true).create_new(true).open(path);
        let mut builder = tempfile::Builder::new();
        let file = builder.prefix("probe").make_in(&folder, create);
        let mut file = file.map_err(error)?;
        file.as_file_mut()
            .write_all(b"registry-agent")
            .and_then(|()| file.as_file().sync_data())
            .map_err(error)?;
        file.close().map_err(error)
    }

    /// The disk that holds the root: its size and what this user may still write, in bytes.
    pub fn disk(&self) -> Result<Disk, StoreError> {
        let statistics = nix::sys::statvfs::statvfs(&self.root)
            .map_err(|e| StoreError::new("statvfs", &self.root, e.into()))?;
        let block = statistics.fragment_size();
        Ok(Disk {
            size: statistics.blocks() * block,
            used: statistics.blocks().saturating_sub(statistics.blocks_free()) * block,
            available: statistics.blocks_available() * block,
        })
    }

    pub(super) fn list(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        list(&self.root.join(folder))
    }

    pub(super) fn link(&self, path: &str, digest: &Digest) -> Result<(), StoreError> {
        self.write(path, digest.as_str().as_bytes())
    }

    /// Writes a whole file, atomically and durably.
    pub(super) fn write(&self, path: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let target = self.root.join(path);
        let staged = self.stage(&target, bytes)?;
        place(staged, &target)?;
        sync_parent(&target)
    }

    /// Writes a whole file under a temporary name, with everything ready for its own.
    pub(super) fn stage(&self, target: &Path, bytes: &[u8]) -> Result<TempPath, StoreError> {
        let folder = self.root.join(layout::TEMPORARY);
        let error = |e| StoreError::new("write", target, e);
        let mut file = tempfile::Builder::new()
            // As any other file: who may enter the root is decided at the root.
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(&folder)
            .map_err(error)?;
        file.write_all(bytes)
            .and_then(|()| file.as_file().sync_all())
            .map_err(error)?;
        make_parent(target)?;
        Ok(file.into_temp_path())
    }
}

/// Sizes of a disk, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Disk {
    /// All of it.
    pub size: u64,
    /// What is in use, by whomever.
    pub used: u64,
    /// What can still be written.
    pub available: u64,
}

/// Gives a staged file its name.
pub(super) fn place(staged: TempPath, target: &Path) -> Result<(), StoreError> {
    staged
        .persist(target)
        .map_err(|e| StoreError::new("write", target, e.error))
}

/// The names in a folder; none where the folder is missing.
pub(super) fn list(folder: &Path) -> Result<Vec<String>, StoreError> {
    // Symbolic links are not of this layout: followed, they could lead in a circle.
    list_such(folder, |kind| !kind.is_symlink())
}

/// The names in a folder of what is of such a kind; none where the folder is missing.
pub(super) fn list_such(
    folder: &Path,
    such: impl Fn(&FileType) -> bool,
) -> Result<Vec<String>, StoreError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if absent(&e) => return Ok(Vec::new()),
        Err(e) => return Err(StoreError::new("list", folder, e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| StoreError::new("list", folder, e))?;
        if !entry.file_type().is_ok_and(|kind| such(&kind)) {
            continue;
        }
        // A name that is not UTF-8 is not of this layout either.
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

pub(super) fn make_parent(of: &Path) -> Result<(), StoreError> {
    let folder = of.parent().unwrap_or(of);
    fs::create_dir_all(folder).map_err(|e| StoreError::new("create", folder, e))
}

/// Without this a new name may be lost with the power, although the bytes behind it are safe.
pub(super) fn sync_parent(of: &Path) -> Result<(), StoreError> {
    let folder = of.parent().unwrap_or(of);
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|e| StoreError::new("sync", folder, e))
}

pub(super) fn open_if_there(path: &Path) -> Result<Option<File>, StoreError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if absent(&e) => Ok(None),
        Err(e) => Err(StoreError::new("open", path, e)),
    }
}

/// Opens a file, if it is there, without the kernel taking that for its use.
pub(super) fn open_quietly(path: &Path) -> Result<Option<File>, StoreError> {
    match quietly(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if absent(&e) => Ok(None),
        Err(e) => Err(StoreError::new("open", path, e)),
    }
}

/// Opens a file without the kernel taking that for its use, where it may be asked to.
pub(super) fn quietly(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NOATIME.bits())
        .open(path);
    match opened {
        // Only a file's owner may ask for that.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => File::open(path),
        opened => opened,
    }
}

/// Sets the time of a file's last use to now, where that is not so already. Set by hand, because
/// disks are mounted without it for speed.
fn note_use(file: &File, metadata: &Metadata) {
    let now = SystemTime::now();
    let recent = metadata
        .accessed()
        .is_ok_and(|used| now.duration_since(used).is_ok_and(|ago| ago < USE_INTERVAL));
    if !recent && let Err(error) = file.set_times(FileTimes::new().set_accessed(now)) {
        // A read-only disk evicts nothing either.
        tracing::debug!(%error, "a blob's use could not be recorded");
    }
}

/// A path that leads through a file is as absent as one that leads nowhere.
pub(super) fn absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}
