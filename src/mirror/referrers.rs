//! What refers to a manifest: signatures, attestations, software bills of materials.
//!
//! The upstream is asked each time, because a list may grow at any time; what it said last is kept
//! for when it can't be.

use std::collections::HashSet;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use serde_json::Value;

use super::{Mirror, MirrorError, Source, manifest_error};
use crate::oci::{Digest, Reference};
use crate::upstream::{UpstreamError, descriptors_of};

/// Small requests to a bucket that one question has under way at the same time.
const AT_ONCE: usize = 16;

/// The descriptors of what refers to a manifest.
#[derive(Debug)]
pub struct Referrers {
    /// As the upstream has them (image-spec 1.1, "Descriptor").
    pub descriptors: Vec<Value>,
    /// Whether they come from the cache because the upstream could not be asked.
    pub stale: bool,
}

impl Mirror {
    /// What refers to a manifest; nothing for a manifest that is not known, as the specification
    /// has it.
    pub async fn referrers(
        &self,
        source: &Source,
        digest: &Digest,
    ) -> Result<Referrers, MirrorError> {
        let store = &self.0.store;
        let flight = self
            .0
            .referrers
            .join((source.stored.clone(), digest.clone()), |_| {
                let (mirror, source, digest) = (self.clone(), source.clone(), digest.clone());
                async move { Some(mirror.fetch_referrers(&source, &digest).await) }
            });
        let asked = flight.landed().await.unwrap_or_else(|| {
            let what = format!("the referrers of {digest}");
            let reason = "its asking was given up".to_owned();
            Err(source.upstream.transport(&what, reason))
        });
        let error = match asked {
            Ok(descriptors) => {
                return Ok(Referrers {
                    descriptors,
                    stale: false,
                });
            }
            Err(error) if error.is_final() => return Err(manifest_error(error)),
            Err(error) => MirrorError::Unavailable(error),
        };
        if !self.may_be_stale(source).await {
            return Err(error);
        }
        match store.referrers(&source.stored, digest).await? {
            Some(descriptors) => {
                self.0.metrics.stale_served.inc();
                Ok(Referrers {
                    descriptors,
                    stale: true,
                })
            }
            None => Err(error),
        }
    }

    /// Asks the upstream, once for everybody who wants to know now, and keeps what it says.
    async fn fetch_referrers(
        &self,
        source: &Source,
        digest: &Digest,
    ) -> Result<Vec<Value>, UpstreamError> {
        let asked = self.ask_for_referrers(source, digest).await;
        let descriptors = self.learn(source, asked).await?;
        let kept = self
            .0
            .store
            .put_referrers(&source.stored, digest, &descriptors);
        if let Err(error) = kept.await {
            tracing::warn!(repository = %source.stored, %digest, %error, "referrers could not be kept: {error}");
        }
        Ok(descriptors)
    }

    async fn ask_for_referrers(
        &self,
        source: &Source,
        digest: &Digest,
    ) -> Result<Vec<Value>, UpstreamError> {
        let upstream = &source.upstream;
        let mut listed = upstream.referrers(&source.name, digest).await?;
        if listed.is_some() && !upstream.is_bucket() {
            return Ok(listed.unwrap_or_default());
        }
        // A registry from before 1.1 has them under a tag: "Referrers Tag Schema". To a bucket old
        // clients and new ones may have pushed.
        let tag = format!("{}-{}", digest.algorithm().as_str(), digest.hex());
        let Ok(tag) = tag.chars().take(128).collect::<String>().parse() else {
            return Ok(listed.unwrap_or_default());
        };
        let tagged = match upstream.manifest(&source.name, &Reference::Tag(tag)).await {
            Ok(index) => descriptors_of(&index.bytes).unwrap_or_default(),
            Err(UpstreamError::NotFound { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        let listed = match &mut listed {
            Some(listed) => std::mem::take(listed),
            None if !upstream.is_bucket() => return Ok(tagged),
            None => Vec::new(),
        };
        self.merge_referrers(source, listed, tagged).await
    }

    /// Adds to what is listed what an old client has listed under the tag, as far as that is there:
    /// nobody takes from a tag what was deleted. In the order of their digests.
    async fn merge_referrers(
        &self,
        source: &Source,
        mut listed: Vec<Value>,
        mut tagged: Vec<Value>,
    ) -> Result<Vec<Value>, UpstreamError> {
        let of = |descriptor: &Value| descriptor["digest"].as_str().map(str::to_owned);
        let known: HashSet<_> = listed.iter().filter_map(of).collect();
        tagged.retain(|it| of(it).is_some_and(|digest| !known.contains(&digest)));
        tagged.sort_by_key(of);
        tagged.dedup_by_key(|it| of(it));
        let looks = tagged.into_iter().map(async |descriptor: Value| {
            let Some(Ok(digest)) = of(&descriptor).map(|digest| digest.parse()) else {
                return Ok(None);
            };
            let reference = Reference::Digest(digest);
            let found = source.upstream.manifest_digest(&source.name, &reference);
            match found.await {
                Ok(_) => Ok(Some(descriptor)),
                Err(UpstreamError::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        });
        let mut looks = stream::iter(looks).buffered(AT_ONCE);
        while let Some(found) = looks.try_next().await? {
            listed.extend(found);
        }
        listed.sort_by_key(of);
        Ok(listed)
    }
}
