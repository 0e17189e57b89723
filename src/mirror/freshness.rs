//! Manifests, and when a cached tag is still true.
//!
//! A tag is served without asking for a short window. Then its upstream is asked by HEAD, which
//! costs no pull, and whoever waits does so for a short deadline: an upstream that is down, slow or
//! limiting never keeps what is cached from being served. A digest needs no asking.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::flight::Flight;
use super::visibility::Wanted;
use super::{Mirror, MirrorError, Place, Source, age, manifest_error};
use crate::oci::{Algorithm, Digest, Manifest, Reference, Tag};

/// A manifest to serve.
#[derive(Debug, Clone)]
pub struct Served {
    /// The manifest.
    pub manifest: Arc<Manifest>,
    /// How long ago the upstream confirmed that the tag is this manifest; `None` for a digest.
    pub age: Option<Duration>,
    /// Why it is served although the upstream did not confirm it.
    pub stale: Option<String>,
}

/// How far the revalidation of a tag is.
#[derive(Clone)]
pub(super) enum Resolution {
    /// The upstream has said that the tag is another manifest now, which is being fetched.
    Changed,
    /// What the tag is, or why that can't be said.
    Known(Result<Arc<Manifest>, MirrorError>),
}

/// What the store has of a tag.
struct CachedTag {
    manifest: Arc<Manifest>,
    /// `None` where its confirmation lies in the future.
    age: Option<Duration>,
}

impl Mirror {
    /// A manifest by tag or digest.
    pub async fn manifest(
        &self,
        source: &Source,
        reference: &Reference,
    ) -> Result<Served, MirrorError> {
        match reference {
            Reference::Digest(digest) => {
                let manifest = match self.0.store.manifest(&source.stored, digest).await? {
                    Some(manifest) => {
                        let anybody =
                            self.admit_anybody(source, Wanted::Manifest(reference.clone()));
                        anybody.await.map_err(manifest_error)?;
                        self.0.metrics.manifest_hits.inc();
                        self.share_manifest(source, digest);
                        manifest
                    }
                    None => self.fetch(source, reference, None).await?,
                };
                Ok(Served {
                    manifest,
                    age: None,
                    stale: None,
                })
            }
            Reference::Tag(tag) => self.tag(source, tag).await,
        }
    }

    /// A manifest that is in memory, and fresh where it is asked for by tag: what nearly all
    /// requests are for, and what can be answered without waiting for anything.
    pub fn manifest_at_once(&self, source: &Source, reference: &Reference) -> Option<Served> {
        if !self.is_open(source) {
            return None;
        }
        let store = &self.0.store;
        let (manifest, age) = match reference {
            Reference::Digest(digest) => (store.recent_manifest(&source.stored, digest)?, None),
            Reference::Tag(tag) => {
                let link = store.recent_tag(&source.stored, tag)?;
                let age = age(link.confirmed)?;
                if age >= source.upstream.stretched(self.live().freshness.window) {
                    return None;
                }
                (
                    store.recent_manifest(&source.stored, &link.digest)?,
                    Some(age),
                )
            }
        };
        self.0.metrics.manifest_hits.inc();
        Some(Served {
            manifest,
            age,
            stale: None,
        })
    }

    async fn tag(&self, source: &Source, tag: &Tag) -> Result<Served, MirrorError> {
        let freshness = self.live().freshness;
        let cached = self.cached_tag(source, tag).await?;
        if let Some(CachedTag {
            manifest,
            age: Some(age),
        }) = &cached
            && *age < source.upstream.stretched(freshness.window)
        {
            let wanted = Wanted::Manifest(Reference::Tag(tag.clone()));
            let anybody = self.admit_anybody(source, wanted);
            anybody.await.map_err(manifest_error)?;
            self.0.metrics.manifest_hits.inc();
            return Ok(Served {
                manifest: Arc::clone(manifest),
                age: Some(*age),
                stale: None,
            });
        }
        let known = cached.as_ref().map(|cached| cached.manifest.digest.clone());
        let suspect = source.upstream.is_suspect();
        // A request whose connection has died silently hangs until its timeout, which must not keep
        // the tag stale for so long: once the upstream is given another chance, it is asked anew.
        let patience = if cached.is_none() || suspect {
            Duration::MAX
        } else {
            freshness.deadline
        };
        let key = (source.stored.clone(), tag.clone());
        let mut flight = self.0.tags.join_within(patience, key, |sender| {
            let (mirror, source, tag) = (self.clone(), source.clone(), tag.clone());
            async move {
                let resolved = mirror.resolve(&source, &tag, known, &sender).await;
                Some(Resolution::Known(resolved))
            }
        });
        // What may not be given out without asking is as good as not here.
        let usable = cached.is_some() && self.may_be_stale(source).await;
        let Some(cached) = cached.filter(|_| usable) else {
            return self.uncached_tag(source, tag, flight, suspect).await;
        };
        // Counted from when the upstream was asked, not from when this request came: however many
        // wait for a dead upstream, it costs one deadline.
        // One that was late a moment ago is not waited for at all: should it answer again, the next
        // request profits from it.
        let deadline = if suspect {
            Duration::ZERO
        } else {
            freshness.deadline
        };
        let left = deadline.saturating_sub(flight.started.elapsed());
        let late = tokio::time::timeout(left, flight.state.wait_for(Option::is_some))
            .await
            .is_err();
        let registry = source.upstream.registry();
        let stale = if late && suspect {
            format!("{registry} did not answer a moment ago, and is not waited for")
        } else if late {
            source.upstream.was_late();
            let deadline = humantime::format_duration(freshness.deadline);
            format!("{registry} did not answer in {deadline}")
        } else {
            match flight.landed().await {
                Some(Resolution::Known(Ok(manifest))) => {
                    self.0.metrics.manifest_hits.inc();
                    return Ok(Served {
                        manifest,
                        age: Some(Duration::ZERO),
                        stale: None,
                    });
                }
                // The upstream is the authority on what is not there, or not for us.
                Some(Resolution::Known(Err(error @ MirrorError::ManifestUnknown(_)))) => {
                    return Err(error);
                }
                Some(Resolution::Known(Err(error))) => error.to_string(),
                _ => "its revalidation was given up".to_owned(),
            }
        };
        self.0.metrics.stale_served.inc();
        self.0.metrics.manifest_hits.inc();
        tracing::debug!(repository = %source.stored, %tag, reason = stale, "served stale");
        Ok(Served {
            manifest: cached.manifest,
            age: Some(cached.age.unwrap_or_default()),
            stale: Some(stale),
        })
    }

    /// A tag of which nothing that is here may be given out: what its upstream says, or, where that
    /// can't be asked, what another mirror of the fleet was told.
    async fn uncached_tag(
        &self,
        source: &Source,
        tag: &Tag,
        mut flight: Flight<Resolution>,
        suspect: bool,
    ) -> Result<Served, MirrorError> {
        if self.0.shared.is_some() {
            let deadline = self.live().freshness.deadline;
            let left = if suspect { Duration::ZERO } else { deadline };
            let left = left.saturating_sub(flight.started.elapsed());
            let answered = flight.state.wait_for(Option::is_some);
            if tokio::time::timeout(left, answered).await.is_err() {
                let deadline = humantime::format_duration(deadline);
                let reason = format!(
                    "{} did not answer in {deadline}",
                    source.upstream.registry()
                );
                if let Some(served) = self.tag_of_fleet(source, tag, &reason).await {
                    source.upstream.was_late();
                    return Ok(served);
                }
            }
        }
        match flight.landed().await {
            Some(Resolution::Known(Ok(manifest))) => Ok(Served {
                manifest,
                age: Some(Duration::ZERO),
                stale: None,
            }),
            Some(Resolution::Known(Err(error @ MirrorError::Unavailable(_)))) => {
                let reason = error.to_string();
                let served = self.tag_of_fleet(source, tag, &reason).await;
                served.ok_or(error)
            }
            Some(Resolution::Known(Err(error))) => Err(error),
            _ => Err(MirrorError::Abandoned(format!("{}:{tag}", source.stored))),
        }
    }

    async fn cached_tag(
        &self,
        source: &Source,
        tag: &Tag,
    ) -> Result<Option<CachedTag>, MirrorError> {
        let Some(link) = self.0.store.tag(&source.stored, tag).await? else {
            return Ok(None);
        };
        let manifest = self.0.store.manifest(&source.stored, &link.digest).await?;
        Ok(manifest.map(|manifest| CachedTag {
            manifest,
            age: age(link.confirmed),
        }))
    }

    /// Asks the upstream what a tag is, and brings the store up to date.
    async fn resolve(
        &self,
        source: &Source,
        tag: &Tag,
        known: Option<Digest>,
        state: &watch::Sender<Option<Resolution>>,
    ) -> Result<Arc<Manifest>, MirrorError> {
        let reference = Reference::Tag(tag.clone());
        // Also where nothing is cached: the manifest may be here under another tag, and HEAD is
        // free where GET counts against a limit.
        let asked = Instant::now();
        let answer = source
            .upstream
            .manifest_digest(&source.name, &reference)
            .await;
        let digest = match self.learn(source, answer).await {
            Ok(digest) => digest,
            // A registry that knows no HEAD says it by GET.
            Err(error) if error.is_of_method() => None,
            Err(error) => return Err(manifest_error(error)),
        };
        // A later request has been answered meanwhile: what this one was told is older.
        if let Some(CachedTag {
            manifest,
            age: Some(age),
        }) = self.cached_tag(source, tag).await?
            && age < asked.elapsed()
        {
            return Ok(manifest);
        }
        let store = &self.0.store;
        if let Some(digest) = &digest
            && let Some(manifest) = store.manifest(&source.stored, digest).await?
        {
            let places = Self::places(source, &reference, digest);
            let moving = || async {
                if Some(digest) == known.as_ref() {
                    return store.confirm_tag(&source.stored, tag, digest).await;
                }
                self.with_room(0, || store.put_tag(&source.stored, tag, digest))
                    .await
            };
            let moved = self.keep(&places, asked, moving).await;
            if let Err(error) = moved {
                tracing::warn!(repository = %source.stored, %tag, %error, "a tag could not be kept: {error}");
            } else {
                self.share_tag(source, tag, digest);
            }
            return Ok(manifest);
        }
        state.send_replace(Some(Resolution::Changed));
        self.fetch(source, &reference, digest).await
    }

    /// What an answer to a request for a manifest is about.
    fn places(source: &Source, reference: &Reference, digest: &Digest) -> [Place; 2] {
        [reference.clone(), Reference::Digest(digest.clone())]
            .map(|reference| Place::Manifest(source.stored.clone(), reference))
    }

    /// Fetches a manifest, once for everybody who wants it now, and keeps it: from the fleet's bucket
    /// or from the upstream, which has perhaps `said` just now what a tag is.
    async fn fetch(
        &self,
        source: &Source,
        reference: &Reference,
        said: Option<Digest>,
    ) -> Result<Arc<Manifest>, MirrorError> {
        let flight = self
            .0
            .manifests
            .join((source.stored.clone(), reference.clone()), |_| {
                let (mirror, source, reference) = (self.clone(), source.clone(), reference.clone());
                async move { Some(mirror.download_manifest(&source, &reference, said).await) }
            });
        flight.landed().await.unwrap_or_else(|| {
            Err(MirrorError::Abandoned(format!(
                "{}:{reference}",
                source.stored
            )))
        })
    }

    async fn download_manifest(
        &self,
        source: &Source,
        reference: &Reference,
        said: Option<Digest>,
    ) -> Result<Arc<Manifest>, MirrorError> {
        let asked = Instant::now();
        if self.0.shared.is_some()
            && let Some(manifest) = self.shared_manifest(source, reference, said).await?
        {
            self.keep_manifest(source, reference, &manifest, asked)
                .await;
            return Ok(manifest);
        }
        self.0.metrics.manifest_misses.inc();
        let asked = Instant::now();
        let fetched = source.upstream.manifest(&source.name, reference).await;
        let fetched = self.learn(source, fetched).await.map_err(manifest_error)?;
        self.0
            .metrics
            .fetched_bytes
            .inc_by(fetched.bytes.len() as u64);
        let wanted = match reference {
            Reference::Digest(digest) => Some(digest.clone()),
            Reference::Tag(_) => fetched.digest,
        };
        let algorithm = wanted.as_ref().map_or(Algorithm::Sha256, Digest::algorithm);
        let digest = Digest::of(algorithm, &fetched.bytes);
        if let Some(wanted) = wanted
            && wanted != digest
        {
            return Err(source.mismatch(&wanted));
        }
        let manifest = Manifest::parse(fetched.bytes, digest).map_err(|e| {
            let what = format!("the manifest {reference} of {}", source.name);
            MirrorError::Unavailable(source.upstream.protocol_error(&what, &e.to_string()))
        })?;
        let manifest = Arc::new(manifest);
        self.keep_manifest(source, reference, &manifest, asked)
            .await;
        Ok(manifest)
    }

    /// What the fleet's bucket has of a manifest that may be given to anybody, where it is known
    /// which one it is.
    async fn shared_manifest(
        &self,
        source: &Source,
        reference: &Reference,
        said: Option<Digest>,
    ) -> Result<Option<Arc<Manifest>>, MirrorError> {
        let found = match (reference, said) {
            // The upstream's answer is also about who may see it.
            (Reference::Tag(_), Some(digest)) => {
                self.manifest_of_fleet(source, &digest, true).await
            }
            (Reference::Digest(digest), _) => {
                let wanted = Wanted::Manifest(reference.clone());
                match self.admit_anybody(source, wanted).await {
                    Ok(()) => self.manifest_of_fleet(source, digest, false).await,
                    Err(error) if error.is_final() => return Err(manifest_error(error)),
                    Err(_) => None,
                }
            }
            (Reference::Tag(_), None) => None,
        };
        Ok(found)
    }

    async fn keep_manifest(
        &self,
        source: &Source,
        reference: &Reference,
        manifest: &Arc<Manifest>,
        asked: Instant,
    ) {
        let store = &self.0.store;
        let tag = match reference {
            Reference::Tag(tag) => Some(tag),
            Reference::Digest(_) => None,
        };
        let size = manifest.bytes.len() as u64;
        let put = || store.put_manifest(&source.stored, manifest, tag);
        let places = Self::places(source, reference, &manifest.digest);
        let kept = self.keep(&places, asked, || self.with_room(size, put));
        if let Err(error) = kept.await {
            tracing::error!(repository = %source.stored, %reference, %error, "a manifest could not be kept: {error}");
        } else {
            match tag {
                Some(tag) => self.share_tag(source, tag, &manifest.digest),
                None => self.share_manifest(source, &manifest.digest),
            }
            if tag.is_none()
                && let Err(error) = self.keep_described(source, &manifest.digest).await
            {
                tracing::warn!(repository = %source.stored, %reference, %error, "a tag could not be kept: {error}");
            }
            self.link_shared(source, manifest).await;
        }
    }
}
