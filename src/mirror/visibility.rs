//! Who may be given what is stored.
//!
//! Where an upstream is asked as an account whose private repositories are not to be shared, what is
//! stored of a repository is given out only while everybody can see it at the upstream as well. That
//! is proved by the requests which are made as nobody, holds for a short time, and is noted in the
//! store: while the upstream can't be asked, it is the note that counts.
//!
//! Where private repositories are shared, what is stored of one is marked. Once they are shared no
//! longer, whether the upstream is still asked as an account or not, a repository with a mark is
//! given out only after it was proved public, which takes the mark away.

use std::sync::Arc;
use std::time::Duration;

use super::{Mirror, MirrorError, Source};
use crate::oci::{Digest, Reference, RegistryHost};
use crate::store::Page;
use crate::store::layout::Repository;
use crate::upstream::{Upstream, UpstreamError};

/// What is to be given out.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Wanted {
    Manifest(Reference),
    Blob(Digest),
}

impl Mirror {
    /// Sees to it that what is stored of a repository may be given to anybody.
    pub(super) async fn admit_anybody(
        &self,
        source: &Source,
        wanted: Wanted,
    ) -> Result<(), UpstreamError> {
        let upstream = &source.upstream;
        if self.is_open(source) {
            return Ok(());
        }
        // Each for itself: what can't be had of one digest says nothing of the others.
        let key = (source.stored.clone(), wanted.clone());
        let mut flight = self.0.visible.join(key, |_| {
            let (mirror, source) = (self.clone(), source.clone());
            async move { Some(mirror.look(&source, &wanted).await) }
        });
        // Who may have it even if the upstream can't be asked does not wait for that for long.
        if self.was_public(&source.stored).await {
            let deadline = if upstream.is_suspect() {
                Duration::ZERO
            } else {
                self.live().freshness.deadline
            };
            let left = deadline.saturating_sub(flight.started.elapsed());
            let landing = flight.state.wait_for(Option::is_some);
            if tokio::time::timeout(left, landing).await.is_err() {
                if !deadline.is_zero() {
                    upstream.was_late();
                }
                return Ok(());
            }
        }
        match flight.landed().await {
            Some(Err(error)) if !error.is_final() && self.was_public(&source.stored).await => {
                Ok(())
            }
            Some(seen) => seen,
            None => Err(upstream.transport(source.name.as_str(), "its asking was given up".into())),
        }
    }

    /// Whether what is stored of a repository may be given out without asking.
    pub(super) fn is_open(&self, source: &Source) -> bool {
        let Source {
            upstream,
            name,
            stored,
        } = source;
        let unmarked = upstream.settings().share_private || !self.0.store.is_shared(stored);
        upstream.is_public_now(name) || !upstream.is_guarded() && unmarked
    }

    /// Whether what is stored of a repository may be given out although its upstream can't be asked.
    pub(super) async fn may_be_stale(&self, source: &Source) -> bool {
        self.may_be_known(&source.upstream, &source.stored).await
    }

    async fn may_be_known(&self, upstream: &Upstream, repository: &Repository) -> bool {
        if upstream.is_guarded() {
            self.was_public(repository).await
        } else {
            upstream.settings().share_private || !self.0.store.is_shared(repository)
        }
    }

    async fn was_public(&self, repository: &Repository) -> bool {
        match self.0.store.is_public(repository).await {
            Ok(true) => return true,
            Ok(false) if self.0.store.is_shared(repository) => return false,
            Ok(false) => {}
            Err(error) => {
                tracing::error!(%repository, %error, "whether it is public can't be read: {error}");
                return false;
            }
        }
        // Nothing is noted here, but perhaps by another mirror.
        match &self.0.shared {
            Some(shared) => shared.is_public(repository).await,
            None => false,
        }
    }

    /// Asks as nobody for something of a repository.
    async fn look(&self, source: &Source, wanted: &Wanted) -> Result<(), UpstreamError> {
        let Source { upstream, name, .. } = source;
        let seen = match wanted {
            Wanted::Manifest(reference) => upstream.shows_manifest(name, reference).await,
            Wanted::Blob(digest) => upstream.shows_blob(name, digest).await,
        };
        let seen = match seen {
            // Gone, or not for us to know: a repository that can be seen has a list of tags.
            Err(error)
                if matches!(error, UpstreamError::NotFound { .. }) || error.is_of_method() =>
            {
                let seen = upstream.shows_tags(name).await;
                // Some list no tags for nobody, although what is there can be pulled.
                let private = match &seen {
                    Err(UpstreamError::NotFound { .. }) => true,
                    Err(UpstreamError::Denied { .. }) => error.is_of_method(),
                    _ => false,
                };
                if private {
                    upstream.saw_private(name);
                }
                seen
            }
            seen => seen,
        };
        self.learn(source, seen).await
    }

    /// Keeps what an answer says of who may see a repository. What could not be noted is noted with
    /// the next answer.
    pub(super) async fn learn<T>(
        &self,
        source: &Source,
        answer: Result<T, UpstreamError>,
    ) -> Result<T, UpstreamError> {
        let Source {
            upstream,
            name,
            stored,
        } = source;
        if upstream.has_learned(name) {
            // One after the other, or an older lesson could be the last that is noted.
            let _order = self.0.noting.lock().await;
            if let Some(public) = upstream.learned(name) {
                if let Some(shared) = &self.0.shared {
                    shared.learned(stored, public);
                }
                let noted = self.with_room(0, || self.0.store.set_public(stored, public));
                match noted.await {
                    Ok(()) => upstream.noted(name, public),
                    Err(error) => {
                        tracing::error!(repository = %stored, public, %error, "who may see it could not be noted: {error}");
                    }
                }
            }
        }
        answer
    }

    /// The bucket that is served, by a reader or a writer.
    pub(super) fn bucket(&self) -> Option<Arc<Upstream>> {
        let upstreams = self.upstreams();
        upstreams.into_iter().find(|upstream| upstream.is_bucket())
    }

    /// Whether the catalog may name a repository.
    pub(super) async fn may_be_listed(&self, repository: &Repository) -> bool {
        if self.0.store.is_kept(repository) {
            return self.0.store.is_own(repository);
        }
        let live = self.live();
        if self.bucket().is_some() {
            return true;
        }
        // Docker Hub's stand without their registry, and none of them begins with a host.
        let registry = match repository.as_str().split_once('/') {
            Some((host, _)) if host.parse::<RegistryHost>().is_ok() => host,
            _ => RegistryHost::DOCKER_HUB,
        };
        match live.upstream(registry) {
            Some(upstream) => self.may_be_known(&upstream, repository).await,
            None => false,
        }
    }

    /// A page of the repositories that are stored and that anybody may know of, in the order of
    /// their names. Those of a bucket are what the bucket says: what happens to be cached in front of
    /// it would look like all there is, to somebody who removes what is in no catalog.
    pub async fn repositories(&self, mut page: Page) -> Result<Vec<Repository>, MirrorError> {
        if let Some(bucket) = self.bucket()
            && let Some(listed) = bucket.repositories(&page).await
        {
            return listed.map_err(MirrorError::Unavailable);
        }
        let wanted = page.limit;
        let mut listed = Vec::new();
        loop {
            let found = self.0.store.repositories(page.clone()).await?;
            let all = found.len() < page.limit;
            for repository in found {
                if listed.len() == wanted {
                    return Ok(listed);
                }
                repository.as_str().clone_into(&mut page.after);
                if self.may_be_listed(&repository).await {
                    listed.push(repository);
                }
            }
            if all || listed.len() == wanted {
                return Ok(listed);
            }
        }
    }
}
