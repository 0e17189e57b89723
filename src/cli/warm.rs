//! `registry-agent warm`.

use std::collections::HashSet;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::ExitCode;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::header::ACCEPT;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use indicatif::{DecimalBytes, MultiProgress, ProgressBar, ProgressStyle};

mod platform;

pub(super) use platform::{Platform, Platforms};

use super::fail;
use crate::config::{self, Settings, Sources};
use crate::oci::{Algorithm, Digest, ErrorBody, ImageName, MANIFEST_LIMIT, Manifest, Reference};
use crate::upstream::CONTENT_DIGEST;

/// Layers that are asked for at once.
const LAYERS: usize = 3;
/// How deep indexes may lie in indexes. The specification allows any depth; nobody makes two.
const DEPTH: u8 = 4;
/// What an error answer is read of, in bytes.
const ERROR_LIMIT: usize = 64 * 1024;
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
                         application/vnd.oci.image.manifest.v1+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json, \
                         application/vnd.docker.distribution.manifest.v2+json";

/// Has the running agent fetch images, by pulling them from it as any client does: so they are
/// downloaded once and checked, whoever else asks for them meanwhile. Exit code 0: all of them are
/// in the cache; 1: some are not; 2: the configuration.
pub(super) fn warm(sources: &Sources, images: &[ImageName], platforms: &Platforms) -> ExitCode {
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
    let warm = Warm {
        agent: Agent::new(&settings),
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
            let new = |digest: &Digest| seen.insert(digest.clone());
            blobs.extend(manifest.blobs.iter().cloned().filter(new));
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

/// The agent, as its clients see it.
struct Agent {
    client: Client<HttpConnector, Empty<Bytes>>,
    address: SocketAddr,
}

impl Agent {
    fn new(settings: &Settings) -> Self {
        let mut address = settings.listen;
        if address.ip().is_unspecified() {
            // All interfaces of either family have this one.
            address.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        Self {
            client: Client::builder(TokioExecutor::new()).build(HttpConnector::new()),
            address,
        }
    }

    /// A manifest, or an index.
    async fn manifest(&self, image: &ImageName, reference: &Reference) -> Result<Manifest, Error> {
        let answer = self.get(image, &format!("manifests/{reference}")).await?;
        let digest = match reference {
            Reference::Digest(digest) => Some(digest.clone()),
            Reference::Tag(_) => answer
                .headers()
                .get(CONTENT_DIGEST)
                .and_then(|digest| digest.to_str().ok()?.parse().ok()),
        };
        let bytes = Limited::new(answer.into_body(), MANIFEST_LIMIT).collect();
        let bytes = bytes.await?.to_bytes();
        let digest = digest.unwrap_or_else(|| Digest::of(Algorithm::Sha256, &bytes));
        Ok(Manifest::parse(bytes, digest)?)
    }

    /// Reads a blob and keeps nothing of it: the agent does. Returns its size in bytes.
    async fn blob(
        &self,
        image: &ImageName,
        digest: &Digest,
        bar: &ProgressBar,
    ) -> Result<u64, Error> {
        let mut body = self
            .get(image, &format!("blobs/{digest}"))
            .await?
            .into_body();
        if let Some(size) = hyper::body::Body::size_hint(&body).exact() {
            bar.set_length(size);
        }
        let mut read = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                format!("the agent broke off after {}: {error}", DecimalBytes(read))
            })?;
            let length = frame.data_ref().map_or(0, Bytes::len) as u64;
            read += length;
            bar.inc(length);
        }
        Ok(read)
    }

    async fn get(&self, image: &ImageName, what: &str) -> Result<Response<Incoming>, Error> {
        let (name, registry) = (&image.name, &image.registry);
        let uri = format!("http://{}/v2/{name}/{what}?ns={registry}", self.address);
        let request = Request::get(uri)
            .header(ACCEPT, MANIFESTS)
            .body(Empty::new())?;
        let answer = self.client.request(request).await.map_err(|error| {
            let why =
                std::error::Error::source(&error).map_or(String::new(), |why| format!(": {why}"));
            let address = self.address;
            format!("can't ask the agent at {address}: {error}{why}; is it running?")
        })?;
        if answer.status() == StatusCode::OK {
            return Ok(answer);
        }
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ERROR_LIMIT).collect();
        let body = body.await.map(http_body_util::Collected::to_bytes);
        let told = body.ok().and_then(|body| ErrorBody::message(&body));
        Err(told
            .unwrap_or_else(|| format!("the agent answered {status}"))
            .into())
    }
}
