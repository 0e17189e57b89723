//! The audit of a bucket: every blob is read and hashed again, and every link that a pull follows is
//! read. What a tag was before (its index) is not: nobody is served by it.
//!
//! Pushes may go on. What looks wrong is looked at again, and a repair removes only what is still
//! what was found wrong; it has to be pushed again, or fetched by who mirrors it.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::SystemTime;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::collect::{Digests, of_blob, of_link};
use super::{AT_ONCE, Bucket, BucketError, Fetched, LINK_LIMIT, Writer, layout};
use crate::oci::{Algorithm, Digest, Hasher, Tag};
use crate::store::Page;
use crate::store::audit::{Event, Fault, Summary, Survey};
use crate::store::layout::Repository;

/// Blobs that are read at the same time; each comes by parallel ranges.
const BLOBS_AT_ONCE: usize = 4;
/// Repositories whose names are in memory.
const REPOSITORIES: usize = 1000;

/// An audit of a bucket.
pub struct Audit<'a> {
    bucket: &'a Bucket,
    /// By whom what is wrong is removed, where it is.
    repair: Option<&'a Writer>,
}

/// A blob as it was listed.
struct Listed {
    digest: Digest,
    modified: Option<SystemTime>,
}

/// A link as it was listed.
struct Link {
    path: String,
    /// What it has to say, by its place; a tag may say anything.
    to: Option<Digest>,
}

/// What a link says.
enum Says {
    /// It is gone, or can't be read, which was told.
    Nothing,
    /// This.
    Digest(Digest),
    /// What no link may, as the end of a sentence that begins with it.
    Wrong(String),
}

impl<'a> Audit<'a> {
    /// An audit that only says what is wrong.
    pub fn new(bucket: &'a Bucket) -> Self {
        Self {
            bucket,
            repair: None,
        }
    }

    /// An audit that removes what is wrong.
    pub fn repairing(writer: &'a Writer) -> Self {
        Self {
            bucket: writer.bucket(),
            repair: Some(writer),
        }
    }

    /// Counts what there is to hash, by lists alone.
    pub async fn survey(&self) -> Result<Survey, BucketError> {
        let mut survey = Survey::default();
        for algorithm in Algorithm::ALL {
            let folder = layout::blobs(algorithm);
            let pages = self.bucket.each_page(&folder, |page| {
                for key in page {
                    if let Some((_, "data")) = of_blob(algorithm, &key.name) {
                        survey.blobs += 1;
                        survey.bytes += key.size;
                    }
                }
                Ok(())
            });
            pages.await?;
        }
        Ok(survey)
    }

    /// Hashes every blob, then reads every link, and tells `tell`. In memory are a page of names, 36
    /// bytes for each blob, and what the bucket's streams may hold. What can't be listed ends it.
    pub async fn run(&self, mut tell: impl FnMut(Event)) -> Result<Summary, BucketError> {
        let mut summary = Summary::default();
        let mut tell = |summary: &mut Summary, event: Event| {
            summary.count(&event);
            tell(event);
        };
        let mut whole = Digests::default();
        for algorithm in Algorithm::ALL {
            let mut token: Option<String> = None;
            loop {
                let prefix = format!("{}/", layout::blobs(algorithm));
                let page = self.bucket.objects(&prefix, token.as_deref()).await?;
                let blobs = page.files.into_iter().filter_map(|key| {
                    let (digest, name) = of_blob(algorithm, &key.name)?;
                    let modified = key.modified;
                    (name == "data").then_some(Listed { digest, modified })
                });
                let hashed = blobs.map(async |blob: Listed| {
                    let found = self.hash(&blob).await;
                    (blob, found)
                });
                let mut hashed = stream::iter(hashed).buffer_unordered(BLOBS_AT_ONCE);
                while let Some((blob, found)) = hashed.next().await {
                    match found {
                        Ok(None) => {}
                        Ok(Some(bytes)) => {
                            summary.blobs += 1;
                            tell(&mut summary, Event::Hashed(bytes));
                            // Of more it is asked whether they are there.
                            whole.add(&blob.digest);
                        }
                        Err(fault) => {
                            summary.blobs += 1;
                            tell(&mut summary, Event::Fault(fault));
                        }
                    }
                }
                token = page.more;
                if token.is_none() {
                    break;
                }
            }
        }
        let mut page = Page {
            after: String::new(),
            limit: REPOSITORIES,
        };
        loop {
            let having = [layout::MANIFESTS, layout::LAYERS];
            let names = self.bucket.repositories_with(&having, &page).await?;
            let Some(last) = names.last() else {
                return Ok(summary);
            };
            page.after = last.as_str().to_owned();
            for of in &names {
                self.repository(of, &whole, &mut summary, &mut tell).await?;
            }
        }
    }

    /// Hashes a blob: its size in bytes, or nothing where it is gone.
    async fn hash(&self, blob: &Listed) -> Result<Option<u64>, Fault> {
        let digest = &blob.digest;
        let path = layout::blob(digest);
        let unreadable = |error: BucketError| self.fault(&path, format!("can't be read: {error}"));
        let Some(mut stream) = self.bucket.blob(digest, 0).await.map_err(unreadable)? else {
            return Ok(None);
        };
        let (mut hasher, mut size) = (Hasher::new(digest.algorithm()), 0);
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(unreadable)?;
            hasher.update(&piece);
            size += piece.len() as u64;
            // The others are to arrive meanwhile.
            tokio::task::yield_now().await;
        }
        let found = hasher.finish();
        if found == *digest {
            return Ok(Some(size));
        }
        let problem = format!("holds {size} bytes that are {found}, not {digest}");
        let mut fault = self.fault(&path, problem);
        if let Some(writer) = self.repair {
            let is_same = |keys: &super::collect::Keys| {
                keys.data
                    .is_some_and(|(_, modified)| modified == blob.modified)
            };
            let removed = writer.remove_if(digest, fastrand::u64(..), is_same).await;
            fault.removed(removed);
        }
        Err(fault)
    }

    fn fault(&self, path: &str, problem: String) -> Fault {
        let bucket = PathBuf::from(format!("s3://{}", self.bucket.name()));
        Fault {
            path: bucket.join(self.bucket.0.prefix.key(path)),
            problem,
            repaired: false,
        }
    }

    /// Revisions come before the tags that point to them, so that a repair leaves no tag of what it
    /// has removed.
    async fn repository(
        &self,
        of: &Repository,
        whole: &Digests,
        summary: &mut Summary,
        tell: &mut impl FnMut(&mut Summary, Event),
    ) -> Result<(), BucketError> {
        let mut revisions = HashSet::new();
        for folder in [
            layout::all_layers(of),
            layout::all_revisions(of),
            layout::tags(of),
        ] {
            let is_revisions = folder == layout::all_revisions(of);
            let mut token: Option<String> = None;
            loop {
                let page = self
                    .bucket
                    .objects(&format!("{folder}/"), token.as_deref())
                    .await?;
                let links = page.files.into_iter().filter_map(|key| {
                    let path = format!("{folder}/{}", key.name);
                    let to = of_link(&key.name);
                    let is_tag = || {
                        let tag = key.name.strip_suffix("/current/link");
                        tag.is_some_and(|tag| tag.parse::<Tag>().is_ok())
                    };
                    (to.is_some() || is_tag()).then_some(Link { path, to })
                });
                let revisions_before = &revisions;
                let read = links.map(async |link: Link| {
                    let said = self.read(&link).await?;
                    let problem = match &said {
                        Says::Nothing => return Ok(None),
                        Says::Wrong(problem) => Some(problem.clone()),
                        Says::Digest(digest) => {
                            let there = match &link.to {
                                Some(_) => {
                                    whole.has(digest)
                                        || self.bucket.blob_size(digest).await?.is_some()
                                }
                                None => {
                                    revisions_before.contains(digest)
                                        || self.bucket.has_revision(of, digest).await?
                                }
                            };
                            let lacks = if link.to.is_some() {
                                "the bucket"
                            } else {
                                "its repository"
                            };
                            (!there)
                                .then(|| format!("points to {digest}, which {lacks} does not have"))
                        }
                    };
                    let fault = match problem {
                        Some(problem) => self.wrong(&link, &said, problem).await?,
                        None => None,
                    };
                    Ok::<_, BucketError>(Some((said, fault)))
                });
                let mut read = stream::iter(read).buffered(AT_ONCE);
                let mut found = Vec::new();
                while let Some(link) = read.try_next().await? {
                    let Some((said, fault)) = link else { continue };
                    summary.links += 1;
                    match (said, fault) {
                        (_, Some(fault)) => tell(summary, Event::Fault(fault)),
                        (Says::Digest(digest), None) if is_revisions => found.push(digest),
                        _ => {}
                    }
                }
                drop(read);
                revisions.extend(found);
                token = page.more;
                if token.is_none() {
                    break;
                }
            }
        }
        Ok(())
    }

    async fn read(&self, link: &Link) -> Result<Says, BucketError> {
        let bytes = match self.bucket.fetch(&link.path, LINK_LIMIT, None).await {
            Ok(Fetched::Found { bytes, .. }) => bytes,
            Ok(Fetched::Absent | Fetched::Unchanged) => return Ok(Says::Nothing),
            Err(error @ BucketError::Wrong { .. }) => {
                return Ok(Says::Wrong(format!("is not a link: {error}")));
            }
            Err(error) => return Err(error),
        };
        let text = String::from_utf8_lossy(&bytes);
        Ok(match (text.trim().parse::<Digest>(), &link.to) {
            (Err(error), _) => Says::Wrong(format!("is not a link: {error}")),
            (Ok(said), Some(to)) if said != *to => {
                Says::Wrong(format!("says {said}, and its place is of {to}"))
            }
            (Ok(said), _) => Says::Digest(said),
        })
    }

    /// A link that is wrong, if it still says what it did; a repair removes it.
    async fn wrong(
        &self,
        link: &Link,
        said: &Says,
        problem: String,
    ) -> Result<Option<Fault>, BucketError> {
        let same = match (self.read(link).await?, said) {
            (Says::Digest(now), Says::Digest(before)) => now == *before,
            (Says::Wrong(_), Says::Wrong(_)) => true,
            _ => false,
        };
        if !same {
            return Ok(None);
        }
        let mut fault = self.fault(&link.path, problem);
        if let Some(writer) = self.repair {
            fault.removed(writer.remove(&link.path).await.map(|()| true));
        }
        Ok(Some(fault))
    }
}

impl Fault {
    fn removed(&mut self, removed: Result<bool, BucketError>) {
        match removed {
            Ok(true) => self.repaired = true,
            Ok(false) => self.problem.push_str("; it was replaced meanwhile"),
            Err(error) => self.problem = format!("{}; it can't be removed: {error}", self.problem),
        }
    }
}
