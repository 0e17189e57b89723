//! What a manifest is, for those who ask no more than that.
//!
//! Many clients ask for a tag by HEAD, and then for the manifest that it is by its digest; others
//! only watch whether a tag moves. What is not stored is not fetched for them, since that costs a
//! pull: the upstream's own HEAD is passed on. Where the manifest is fetched right after that, it is
//! kept under the tag as well.

use std::time::{Duration, Instant, SystemTime};

use super::{Mirror, MirrorError, Place, Served, Source, manifest_error};
use crate::oci::{Digest, MANIFEST_LIMIT, Reference, Tag};
use crate::store::{StoreError, TagLink};
use crate::upstream::Description;

/// How long after a tag was asked for by HEAD a request for its manifest belongs to that.
const TOGETHER: Duration = Duration::from_secs(10);

/// What a manifest is.
#[derive(Debug)]
pub enum Described {
    /// It is here.
    Served(Served),
    /// It is not, and the upstream describes it so.
    Upstream(Description),
}

impl Mirror {
    /// What a manifest is, by tag or digest. Nothing is fetched for it, unless the upstream does not
    /// say it by HEAD.
    pub async fn describe(
        &self,
        source: &Source,
        reference: &Reference,
    ) -> Result<Described, MirrorError> {
        let described = if self.has(source, reference).await? {
            None
        } else {
            match self.ask_for_description(source, reference).await {
                // What the fleet has of it is told as it is served.
                Err(MirrorError::Unavailable(_)) if self.0.shared.is_some() => None,
                asked => asked?,
            }
        };
        let here = match (&described, reference) {
            (Some(described), Reference::Tag(_)) => {
                let stored = self.0.store.manifest(&source.stored, &described.digest);
                stored.await?.is_some()
            }
            _ => false,
        };
        match described {
            Some(described) if !here => {
                if let Reference::Tag(tag) = reference {
                    self.remember(source, tag, &described.digest);
                }
                Ok(Described::Upstream(described))
            }
            _ => self
                .manifest(source, reference)
                .await
                .map(Described::Served),
        }
    }

    /// What a manifest is, as a bucket has it now: who pushes leaves out what is said to be there.
    /// Where the bucket can't be asked, it is what is cached.
    pub async fn describe_now(
        &self,
        source: &Source,
        reference: &Reference,
    ) -> Result<Described, MirrorError> {
        if matches!(reference, Reference::Digest(_)) {
            let upstream = &source.upstream;
            let asked = upstream.manifest_digest(&source.name, reference).await;
            if let Err(error) = asked
                && error.is_final()
            {
                return Err(manifest_error(error));
            }
        }
        self.describe(source, reference).await
    }

    async fn has(&self, source: &Source, reference: &Reference) -> Result<bool, MirrorError> {
        let store = &self.0.store;
        let digest = match reference {
            Reference::Digest(digest) => digest.clone(),
            Reference::Tag(tag) => match store.tag(&source.stored, tag).await? {
                Some(link) => link.digest,
                None => return Ok(false),
            },
        };
        Ok(store.manifest(&source.stored, &digest).await?.is_some())
    }

    async fn ask_for_description(
        &self,
        source: &Source,
        reference: &Reference,
    ) -> Result<Option<Description>, MirrorError> {
        let key = (source.stored.clone(), reference.clone());
        let flight = self.0.descriptions.join(key, |_| {
            let (mirror, source, reference) = (self.clone(), source.clone(), reference.clone());
            async move {
                let asked = source.upstream.describe(&source.name, &reference).await;
                Some(mirror.learn(&source, asked).await)
            }
        });
        match flight.landed().await {
            Some(Ok(Some(described))) => {
                if described.size > MANIFEST_LIMIT as u64 {
                    let what = format!("the manifest {reference} of {}", source.name);
                    return Err(MirrorError::TooLarge(
                        source.upstream.too_large(&what, MANIFEST_LIMIT),
                    ));
                }
                match reference {
                    // What it is then, is found by fetching it.
                    Reference::Digest(wanted) if *wanted != described.digest => {
                        Err(source.mismatch(wanted))
                    }
                    _ => Ok(Some(described)),
                }
            }
            Some(Ok(None)) => Ok(None),
            Some(Err(error)) if error.is_of_method() => Ok(None),
            Some(Err(error)) => Err(manifest_error(error)),
            None => Err(MirrorError::Abandoned(format!(
                "{}:{reference}",
                source.stored
            ))),
        }
    }

    fn remember(&self, source: &Source, tag: &Tag, digest: &Digest) {
        let key = (source.stored.clone(), digest.clone());
        let described = (tag.clone(), Instant::now(), SystemTime::now());
        self.0.described.insert(key, described);
    }

    /// Keeps a manifest that was fetched by its digest under the tag by which it was described a
    /// moment ago, as of then.
    pub(super) async fn keep_described(
        &self,
        source: &Source,
        digest: &Digest,
    ) -> Result<(), StoreError> {
        let key = (source.stored.clone(), digest.clone());
        let Some((_, (tag, asked, confirmed))) = self.0.described.remove(&key) else {
            return Ok(());
        };
        if asked.elapsed() >= TOGETHER {
            return Ok(());
        }
        let link = || TagLink {
            digest: digest.clone(),
            confirmed,
        };
        let put = || self.0.store.put_new_tag(&source.stored, &tag, link());
        let places = [
            Reference::Tag(tag.clone()),
            Reference::Digest(digest.clone()),
        ]
        .map(|reference| Place::Manifest(source.stored.clone(), reference));
        let kept = self.keep(&places, asked, || self.with_room(0, put));
        kept.await?;
        self.share_tag(source, &tag, digest);
        Ok(())
    }
}
