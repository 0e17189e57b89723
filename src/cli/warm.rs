//! `registry-agent warm`.

use std::io::{self, Write};
use std::process::ExitCode;

use futures_util::{StreamExt, stream};
use indicatif::{DecimalBytes, MultiProgress, ProgressBar, ProgressStyle};

use super::fail;
use crate::config::{self, Sources};
use crate::oci::{Digest, ImageName};
use crate::warm::{ClientIdentity, Platforms, Warmer};

/// Layers that are asked for at once.
const LAYERS: usize = 3;

/// Has the running agent fetch images, by pulling them from it as any client does: so they are
/// downloaded once and checked, whoever else asks for them meanwhile. Exit code 0: all of them are
/// in the cache; 1: some are not; 2: the configuration.
pub(super) fn warm(
    sources: &Sources,
    images: &[ImageName],
    platforms: Platforms,
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
    let warmer = match Warmer::new(serving, identity, platforms) {
        Ok(warmer) => warmer,
        Err(error) => return fail(&error, 1),
    };
    let warm = Warm {
        warmer,
        bars: MultiProgress::new(),
    };
    if runtime.block_on(warm.run(images)) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// A blob of an image.
struct Layer<'a> {
    image: &'a ImageName,
    digest: Digest,
}

struct Warm {
    warmer: Warmer,
    /// One bar for each layer on the way; on anything but a terminal nothing is drawn.
    bars: MultiProgress,
}

impl Warm {
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
        match self.warmer.blobs(image).await {
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
        let read = self.warmer.blob(image, digest, &bar).await;
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
