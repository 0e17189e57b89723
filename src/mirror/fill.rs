//! The downloads under way, and those who follow them.

use std::sync::Arc;
use std::time::Instant;

use super::download;
use super::flight::{Flight, Flights};
use super::passing::Passing;
use super::{Mirror, MirrorError, Source};
use crate::oci::{Digest, Hasher};
use crate::store::layout::Repository;
use crate::store::lease::BlobFile;

/// How far a download is.
#[derive(Clone)]
pub(super) struct Progress {
    /// The file it goes into, once there is one.
    pub(super) file: Option<Arc<BlobFile>>,
    /// Bytes from the start that readers may have.
    pub(super) readable: u64,
    /// The size of the blob in bytes, once it is known.
    pub(super) total: Option<u64>,
    /// How it ended.
    pub(super) end: Option<End>,
}

/// How a download ended.
#[derive(Clone)]
pub(super) enum End {
    /// All of it is there, and right.
    Whole,
    /// It can't be had.
    Failed(MirrorError),
    /// The store did not take more: whoever follows it goes on from its last byte by themselves.
    /// The hasher has taken all bytes up to there.
    Unstored(Hasher),
}

/// The downloads under way.
#[derive(Default)]
pub(super) struct Fills(Flights<Digest, (Repository, Progress)>);

/// A download that somebody follows.
pub(super) struct Fill {
    mirror: Mirror,
    source: Source,
    digest: Digest,
    repository: Repository,
    flight: Flight<(Repository, Progress)>,
}

impl Fills {
    /// Whether a blob has just been downloaded for a repository, and is about to be linked.
    pub(super) fn just_verified(&self, repository: &Repository, digest: &Digest) -> bool {
        self.0.get(digest).is_some_and(|flight| {
            flight
                .state
                .borrow()
                .as_ref()
                .is_some_and(|(of, progress)| {
                    of == repository && matches!(progress.end, Some(End::Whole))
                })
        })
    }

    /// Joins the download of a blob, beginning it from `source` where none is under way.
    pub(super) fn join(&self, mirror: &Mirror, source: &Source, digest: &Digest) -> Fill {
        let mut repository = source.stored.clone();
        let flight = self.0.join(digest.clone(), |sender| {
            let progress = Progress {
                file: None,
                readable: 0,
                total: None,
                end: None,
            };
            sender.send_replace(Some((source.stored.clone(), progress)));
            let (mirror, source, digest) = (mirror.clone(), source.clone(), digest.clone());
            async move { download::run(mirror, source, digest, sender).await }
        });
        if let Some((initiator, _)) = &*flight.state.borrow() {
            repository.clone_from(initiator);
        }
        Fill {
            mirror: mirror.clone(),
            source: source.clone(),
            digest: digest.clone(),
            repository,
            flight,
        }
    }
}

impl Fill {
    /// The repository for which it was begun.
    pub(super) fn repository(&self) -> &Repository {
        &self.repository
    }

    /// When it was begun.
    pub(super) fn begun(&self) -> Instant {
        self.flight.started
    }

    /// Whether what a hasher has taken is the blob.
    pub(super) fn verify(&self, hasher: Hasher) -> Result<(), MirrorError> {
        if hasher.finish() == self.digest {
            Ok(())
        } else {
            Err(self.source.mismatch(&self.digest))
        }
    }

    /// The rest of the blob from `offset` on, for one reader.
    pub(super) fn pass_through(&self, offset: u64, total: Option<u64>) -> Passing {
        Passing::new(&self.mirror, &self.source, &self.digest, offset, total)
    }

    /// Waits until it is as far as `enough` says, or has ended.
    pub(super) async fn wait(
        &mut self,
        enough: impl Fn(&Progress) -> bool,
    ) -> Result<Progress, MirrorError> {
        let reached = self
            .flight
            .state
            .wait_for(|state| {
                state
                    .as_ref()
                    .is_some_and(|(_, progress)| progress.end.is_some() || enough(progress))
            })
            .await
            .ok()
            .and_then(|state| state.as_ref().map(|(_, progress)| progress.clone()));
        reached.ok_or_else(|| self.given_up())
    }

    pub(super) fn given_up(&self) -> MirrorError {
        MirrorError::Abandoned(self.digest.to_string())
    }
}
