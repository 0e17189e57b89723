//! Having the running agent fetch images ahead of time, by pulling them from it as any client does:
//! so they are downloaded once and checked, whoever else asks for them meanwhile.

use std::collections::HashSet;

use indicatif::ProgressBar;

mod agent;
mod platform;

pub use agent::ClientIdentity;
pub use platform::{Platform, Platforms};

use crate::config::Serving;
use crate::oci::{Digest, ImageName, Reference};
use agent::Agent;

/// How deep indexes may lie in indexes. The specification allows any depth; nobody makes two.
const DEPTH: u8 = 4;

/// Why something could not be fetched, in words.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Pulls from the running agent, for some platforms.
pub struct Warmer {
    agent: Agent,
    platforms: Platforms,
}

impl Warmer {
    /// Pulls from the agent that runs with these settings, showing it `identity`.
    pub fn new(
        serving: &Serving,
        identity: Option<&ClientIdentity>,
        platforms: Platforms,
    ) -> Result<Self, Error> {
        let agent = Agent::new(serving, identity)?;
        Ok(Self { agent, platforms })
    }

    /// The same for what this host can run.
    pub fn of_this_host(serving: &Serving) -> Result<Self, Error> {
        Self::new(serving, None, Platforms::Only(vec![Platform::host()]))
    }

    /// The blobs of an image, each once. Its manifests are fetched on the way.
    pub async fn blobs(&self, image: &ImageName) -> Result<Vec<Digest>, Error> {
        let (mut blobs, mut seen) = (Vec::new(), HashSet::new());
        let mut manifests = vec![(image.reference.clone(), 0)];
        while let Some((reference, depth)) = manifests.pop() {
            let manifest = self.agent.manifest(image, &reference).await?;
            let mut new = |digest: &&Digest| seen.insert((*digest).clone());
            blobs.extend(manifest.blobs.iter().filter(|digest| new(digest)).cloned());
            if manifest.manifests.is_empty() {
                continue;
            }
            if depth == DEPTH {
                return Err(format!("more than {DEPTH} indexes within each other").into());
            }
            let chosen = self.platforms.choose(&manifest.bytes)?;
            let chosen = chosen.into_iter().map(Reference::Digest);
            manifests.extend(chosen.map(|reference| (reference, depth + 1)));
        }
        Ok(blobs)
    }

    /// Has one blob fetched, and shows how far it is. Returns its size in bytes.
    pub async fn blob(
        &self,
        image: &ImageName,
        digest: &Digest,
        bar: &ProgressBar,
    ) -> Result<u64, Error> {
        self.agent.blob(image, digest, bar).await
    }

    /// Has all of an image fetched, one blob after the other.
    pub async fn fetch(&self, image: &ImageName) -> Result<(), Error> {
        for digest in self.blobs(image).await? {
            self.blob(image, &digest, &ProgressBar::hidden()).await?;
        }
        Ok(())
    }
}
