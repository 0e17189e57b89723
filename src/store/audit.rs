//! The audit of a store: every blob is hashed again, every link is read.
//!
//! It takes no lock, so that it can run beside an agent that serves the same root, and it looks
//! only at what has its final name: what is being written is under the agent's own folder or in
//! distribution's `_uploads`. Whatever looks wrong is looked at again where an agent may have
//! changed it meanwhile.
//!
//! A repair only unlinks, and only what is still the file that was found wrong. Readers that have
//! it open go on; the next request finds it missing and fetches it again. Where a running agent
//! replaces the file in the instant between the second look and the unlink, what is lost is one
//! download, never the truth.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};

use super::StoreError;
use super::filesystem::{absent, quietly};
use super::layout::{self, Repository};
use crate::oci::{Algorithm, Digest, Hasher, Tag};

/// Bytes that are read and hashed at once, by each thread.
const READ: usize = 256 * 1024;
/// Events that wait to be told: whoever is told may be slow (a pager), and is waited for.
const EVENTS: usize = 256;
/// A longer link is none: the longest digest has 135 characters.
const LINK_LIMIT: u64 = 256;

/// What is to be hashed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Survey {
    /// How many blobs.
    pub blobs: u64,
    /// Their size in bytes.
    pub bytes: u64,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it, as the end of a sentence that begins with the path.
    pub problem: String,
    /// Whether it has been removed.
    pub repaired: bool,
}

/// What an audit tells while it runs.
#[derive(Debug)]
pub enum Event {
    /// So many more bytes have been hashed.
    Hashed(u64),
    /// Something is wrong.
    Fault(Fault),
}

/// What an audit has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Blobs that were hashed.
    pub blobs: u64,
    /// Links that were read.
    pub links: u64,
    /// Links of layers whose blob is not here. That is normal in a mirror: it was evicted, or never
    /// asked for, and is fetched when somebody wants it.
    pub absent_layers: u64,
    /// Faults that were found.
    pub faults: u64,
    /// Faults that were repaired.
    pub repaired: u64,
}

/// An audit of one root.
#[derive(Debug, Clone)]
pub struct Audit {
    root: PathBuf,
    repair: bool,
}

impl Audit {
    /// An audit of the store at `root`, which removes what is wrong where `repair` says so.
    pub fn new(root: &Path, repair: bool) -> Self {
        Self {
            root: root.to_owned(),
            repair,
        }
    }

    /// Counts what there is to hash, without reading any of it. Blocks.
    pub fn survey(&self) -> Result<Survey, StoreError> {
        let mut survey = Survey::default();
        self.each_blob(&mut |_, path| {
            // What was evicted since it was listed is not there to hash.
            if let Ok(metadata) = fs::metadata(path) {
                survey.blobs += 1;
                survey.bytes += metadata.len();
            }
            Ok(())
        })?;
        Ok(survey)
    }

    /// Hashes every blob on `threads` threads, then reads every link, telling `tell` from this
    /// thread. Blocks. The memory it takes depends neither on how much is stored nor on how large
    /// the blobs are.
    pub fn run(&self, threads: usize, mut tell: impl FnMut(Event)) -> Result<Summary, StoreError> {
        let mut summary = Summary::default();
        let (events, told) = mpsc::sync_channel(EVENTS);
        std::thread::scope(|scope| {
            let (to_hash, queue) = mpsc::sync_channel::<Digest>(threads * 4);
            let queue = Arc::new(Mutex::new(queue));
            for _ in 0..threads {
                let (queue, events) = (Arc::clone(&queue), events.clone());
                scope.spawn(move || self.hash_all(&queue, &events));
            }
            // The last thread that is left lets the listing end, should all have died.
            drop(queue);
            let listing = scope.spawn(move || self.list_into(&to_hash));
            drop(events);
            for event in told {
                match event {
                    Hashing::Event(event) => {
                        summary.count(&event);
                        tell(event);
                    }
                    Hashing::Blob => summary.blobs += 1,
                }
            }
            match listing.join() {
                Ok(listed) => listed,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })?;
        let mut links = Links {
            audit: self,
            summary,
            tell: &mut tell,
        };
        links.run()?;
        Ok(links.summary)
    }

    fn list_into(&self, queue: &SyncSender<Digest>) -> Result<(), StoreError> {
        self.each_blob(&mut |digest, path| {
            queue
                .send(digest)
                .map_err(|e| StoreError::new("hash", path, io::Error::other(e)))
        })
    }

    fn hash_all(&self, queue: &Mutex<Receiver<Digest>>, events: &SyncSender<Hashing>) {
        let mut buffer = vec![0; READ];
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(digest) = next else { return };
            // Nobody hears it only when the audit itself is over.
            let tell = |event| drop(events.send(Hashing::Event(event)));
            match self.hash(&digest, &mut buffer, &tell) {
                Ok(true) => drop(events.send(Hashing::Blob)),
                Ok(false) => {}
                Err(fault) => {
                    drop(events.send(Hashing::Blob));
                    tell(Event::Fault(fault));
                }
            }
        }
    }

    /// Hashes one blob; false where it is gone.
    fn hash(
        &self,
        digest: &Digest,
        buffer: &mut [u8],
        tell: &dyn Fn(Event),
    ) -> Result<bool, Fault> {
        let path = self.root.join(layout::blob(digest));
        let unreadable = |error: io::Error| Fault {
            path: path.clone(),
            problem: format!("can't be read: {error}"),
            repaired: false,
        };
        // To look whether it is right is no use of it: else all would be as recent as each other.
        let mut file = match quietly(&path) {
            Ok(file) => file,
            Err(e) if absent(&e) => return Ok(false),
            Err(e) => return Err(unreadable(e)),
        };
        let mut hasher = Hasher::new(digest.algorithm());
        loop {
            match file.read(buffer) {
                Ok(0) => break,
                Ok(read) => {
                    hasher.update(&buffer[..read]);
                    tell(Event::Hashed(read as u64));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(unreadable(e)),
            }
        }
        let found = hasher.finish();
        if found == *digest || !same(&file, &path) {
            return Ok(true);
        }
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        Err(self.fault(
            path,
            format!("holds {size} bytes that are {found}, not {digest}"),
        ))
    }

    /// A fault that a repair removes.
    fn fault(&self, path: PathBuf, mut problem: String) -> Fault {
        let mut repaired = false;
        if self.repair {
            match fs::remove_file(&path) {
                Ok(()) => repaired = true,
                Err(e) if absent(&e) => repaired = true,
                Err(e) => problem = format!("{problem}; it can't be removed: {e}"),
            }
        }
        Fault {
            path,
            problem,
            repaired,
        }
    }

    fn each_blob(
        &self,
        call: &mut dyn FnMut(Digest, &Path) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        for algorithm in Algorithm::ALL {
            for digits in self.list(&layout::blobs(algorithm))? {
                for hex in self.list(&layout::blobs_beginning(algorithm, &digits))? {
                    // Other names are not of this layout, and nothing ever looks there.
                    let Ok(digest) = format!("{}:{hex}", algorithm.as_str()).parse::<Digest>()
                    else {
                        continue;
                    };
                    if hex.starts_with(&digits) {
                        let path = self.root.join(layout::blob(&digest));
                        call(digest, &path)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The names in a folder; none where the folder is missing.
    fn list(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        super::filesystem::list(&self.root.join(folder))
    }

    fn exists(&self, path: &str) -> bool {
        // What can't be looked at is not known to be missing.
        fs::symlink_metadata(self.root.join(path)).map_or_else(|e| !absent(&e), |_| true)
    }
}

enum Hashing {
    Event(Event),
    Blob,
}

impl Summary {
    pub(super) fn count(&mut self, event: &Event) {
        if let Event::Fault(fault) = event {
            self.faults += 1;
            self.repaired += u64::from(fault.repaired);
        }
    }
}

/// Whether the path still names the file that was read.
fn same(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(read), Ok(named)) => (read.dev(), read.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

/// The part of an audit that reads links. It comes after the blobs, so that a repair leaves no link
/// to a blob that it has removed.
struct Links<'a> {
    audit: &'a Audit,
    summary: Summary,
    tell: &'a mut dyn FnMut(Event),
}

impl Links<'_> {
    fn run(&mut self) -> Result<(), StoreError> {
        let mut folders = vec![String::new()];
        while let Some(folder) = folders.pop() {
            let mut is_repository = false;
            for entry in self
                .audit
                .list(&format!("{}/{folder}", layout::repositories()))?
            {
                if entry.starts_with('_') {
                    is_repository = true;
                } else if folder.is_empty() {
                    folders.push(entry);
                } else {
                    folders.push(format!("{folder}/{entry}"));
                }
            }
            if is_repository {
                self.repository(&Repository::from_path(folder))?;
            }
        }
        Ok(())
    }

    /// Revisions come before the tags that point to them, for the same reason as blobs before links.
    fn repository(&mut self, repository: &Repository) -> Result<(), StoreError> {
        for algorithm in Algorithm::ALL {
            for digest in self.digests(algorithm, &layout::layers(repository, algorithm))? {
                let link = layout::layer_link(repository, &digest);
                if self.says(&link, &digest) && !self.audit.exists(&layout::blob(&digest)) {
                    self.summary.absent_layers += 1;
                }
            }
            for digest in self.digests(algorithm, &layout::revisions(repository, algorithm))? {
                let link = layout::revision_link(repository, &digest);
                if self.says(&link, &digest) {
                    let blob = layout::blob(&digest);
                    self.must_exist(&link, &blob, &digest, "the store does not have");
                }
            }
        }
        for tag in self.audit.list(&layout::tags(repository))? {
            if let Ok(tag) = tag.parse::<Tag>() {
                self.tag(repository, &tag)?;
            }
        }
        Ok(())
    }

    fn tag(&mut self, repository: &Repository, tag: &Tag) -> Result<(), StoreError> {
        let link = layout::tag_link(repository, tag);
        if let Some(digest) = self.read(&link) {
            let revision = layout::revision_link(repository, &digest);
            self.must_exist(&link, &revision, &digest, "its repository does not have");
        }
        // That a tag was a manifest stays true when the manifest is gone: only the form counts.
        for algorithm in Algorithm::ALL {
            let folder = layout::tag_index(repository, tag, algorithm);
            for digest in self.digests(algorithm, &folder)? {
                self.says(&layout::tag_index_link(repository, tag, &digest), &digest);
            }
        }
        Ok(())
    }

    fn digests(&self, algorithm: Algorithm, folder: &str) -> Result<Vec<Digest>, StoreError> {
        let names = self.audit.list(folder)?;
        let digests = names
            .into_iter()
            .map(|hex| format!("{}:{hex}", algorithm.as_str()));
        Ok(digests.filter_map(|digest| digest.parse().ok()).collect())
    }

    /// Whether a link says the digest that its own path does.
    fn says(&mut self, link: &str, digest: &Digest) -> bool {
        match self.read(link) {
            Some(said) if said == *digest => true,
            Some(said) => {
                self.wrong(link, format!("says {said}, and its place is of {digest}"));
                false
            }
            None => false,
        }
    }

    /// The digest that a link holds; nothing where there is no link, or none that can be read,
    /// which is then told.
    fn read(&mut self, link: &str) -> Option<Digest> {
        let path = self.audit.root.join(link);
        let mut bytes = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(LINK_LIMIT).read_to_end(&mut bytes));
        match read {
            Ok(_) => self.summary.links += 1,
            Err(e) if absent(&e) => return None,
            Err(e) => {
                self.summary.links += 1;
                let problem = format!("can't be read: {e}");
                let repaired = false;
                self.told(Fault {
                    path,
                    problem,
                    repaired,
                });
                return None;
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        let digest = text.trim().parse::<Digest>();
        digest
            .map_err(|error| self.wrong(link, format!("is not a link: {error}")))
            .ok()
    }

    fn must_exist(&mut self, link: &str, target: &str, digest: &Digest, lacks: &str) {
        // An agent that evicts takes the link as well: then there is nothing wrong.
        if !self.audit.exists(target) && self.audit.exists(link) {
            self.wrong(link, format!("points to {digest}, which {lacks}"));
        }
    }

    fn wrong(&mut self, link: &str, problem: String) {
        let fault = self.audit.fault(self.audit.root.join(link), problem);
        self.told(fault);
    }

    fn told(&mut self, fault: Fault) {
        let event = Event::Fault(fault);
        self.summary.count(&event);
        (self.tell)(event);
    }
}
