//! `registry-agent warm`.

use std::collections::HashSet;
use std::io::{self, Write};
use std::process::ExitCode;

use futures_util::{StreamExt, stream};
use indicatif::{DecimalBytes, MultiProgress, ProgressBar, ProgressStyle};

mod agent;
mod platform;

pub(super) use agent::ClientIdentity;
pub(super) use platform::{Platform, Platforms};

use super::fail;
use crate::config::{self, Sources};
use crate::oci::{Digest, ImageName, Reference};
use agent::Agent;

/// Layers that are asked for at once.
const LAYERS: usize = 3;
/// How deep indexes may lie in indexes. The specification allows any depth; nobody makes two.
const DEPTH: u8 = 4;

/// Has the running agent fetch images, by pulling them from it as any client does: so they are
/// downloaded once and checked, whoever else asks for them meanwhile. Exit code 0: all of them are
/// in the cache; 1: some are not; 2: the configuration.
pub(super) fn warm(
    sources: &Sources,
    images: &[ImageName],
    platforms: &Platforms,
    identity: Option<&ClientIdentity>,
) -> ExitCode {
    let settings = match config::load(sources) {
        Ok(loaded) => loaded.settings,
        Err(errors) => return fail(&errors, 2),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    let Some(serving) = &settings.serving else {
        let mirror = &settings.host.mirror;
        let error = format!("a client stores nothing: warm the mirror itself, {mirror}");
        return fail(&error, 2);
    };
    let agent = match Agent::new(serving, identity) {
        Ok(agent) => agent,
        Err(error) => return fail(&error, 1),
    };
    let warm = Warm {
        agent,
        platforms,
        bars: MultiProgress::new(),
    };
    if runtime.block_on(warm.run(images)) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

type Error = Box<dyn std::error::Error + Send + Sync>;

/// A blob of an image.
struct Layer<'a> {
    image: &'a ImageName,
    digest: Digest,
}

struct Warm<'a> {
    agent: Agent,
    platforms: &'a Platforms,
    /// One bar for each layer on the way; on anything but a terminal nothing is drawn.
    bars: MultiProgress,
}

impl Warm<'_> {
    /// Whether everything is warm.
    async fn run(&self, images: &[ImageName]) -> bool {
        // An image's layers are on their way while the next image's manifests are asked for.
        stream::iter(images)
            .then(|image| self.layers(image))
            .flat_map(stream::iter)
            .map(|layer| async {
                match layer {
                    Ok(layer) => self.fetch(&layer).await,
                    Err(()) => false,
                }
            })
            .buffer_unordered(LAYERS)
            .fold(true, |all, warm| async move { all && warm })
            .await
    }

    /// The blobs of an image, each once; an error has been told.
    async fn layers<'i>(&self, image: &'i ImageName) -> Vec<Result<Layer<'i>, ()>> {
        match self.blobs(image).await {
            Ok(blobs) => {
                let layers = blobs.into_iter().map(|digest| Ok(Layer { image, digest }));
                layers.collect()
            }
            Err(error) => {
                self.fail(&format!("{image}: {error}"));
                vec![Err(())]
            }
        }
    }

    async fn blobs(&self, image: &ImageName) -> Result<Vec<Digest>, Error> {
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

    /// Has one blob fetched, and says what became of it.
    async fn fetch(&self, layer: &Layer<'_>) -> bool {
        let Layer { image, digest } = layer;
        let bar = self.bars.add(ProgressBar::no_length());
        let style = ProgressStyle::with_template(
            "{prefix} {bar:24} {decimal_bytes} of {decimal_total_bytes}, {eta} left",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_prefix(format!("{}:{}", image.name, &digest.hex()[..12]));
        let read = self.agent.blob(image, digest, &bar).await;
        bar.finish_and_clear();
        self.bars.remove(&bar);
        match read {
            Ok(bytes) => {
                let line = format!("{image}: {digest}: {}", DecimalBytes(bytes));
                // A reader that went away (`| head`) does not stop the rest.
                self.bars.suspend(|| drop(writeln!(io::stdout(), "{line}")));
                true
            }
            Err(error) => {
                self.fail(&format!("{image}: layer {digest}: {error}"));
                false
            }
        }
    }

    fn fail(&self, error: &str) {
        self.bars.suspend(|| fail(&error, 1));
    }
}
