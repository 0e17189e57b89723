//! The mirror that this host's engines are told (`host.mirror`), asked as they ask it: by the agent
//! for the host's part, which has no network.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{HOST, USER_AGENT};
use http::{HeaderValue, Request, StatusCode};
use http_body_util::Empty;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::watch;
use url::Url;

use crate::config::HostSettings;
use crate::resolve::{self, Connector};
use crate::tls;

/// How long the mirror may take: docker waits as long for the answer to its own first request.
const DEADLINE: Duration = Duration::from_secs(5);
/// The pause between two probes until the first success.
pub(super) const EAGER: Duration = Duration::from_secs(1);
const PROBE: HeaderValue = HeaderValue::from_static(concat!(
    "registry-agent/",
    env!("CARGO_PKG_VERSION"),
    " probe"
));

/// What is known of the mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorHealth {
    /// Its address, `host.mirror`.
    pub address: Url,
    /// Whether it answered last time.
    pub serves: bool,
    /// When it began, or ceased, to.
    pub since: Instant,
    /// How it last failed, where it did not answer.
    pub failure: Option<String>,
}

/// The value, for those who look at it.
pub type MirrorWatch = watch::Receiver<MirrorHealth>;

/// What asks the mirror.
pub struct MirrorProbe {
    sender: watch::Sender<MirrorHealth>,
    /// Made for this authority; made anew after a failure, since a file may have been renewed.
    client: Option<(Option<PathBuf>, HttpClient)>,
}

type HttpClient = Client<HttpsConnector<Connector>, Empty<Bytes>>;

impl MirrorProbe {
    /// Nothing is known of the mirror yet.
    pub fn new(settings: &HostSettings) -> (Self, MirrorWatch) {
        let (sender, watch) = watch::channel(unknown(&settings.mirror));
        let client = None;
        (Self { sender, client }, watch)
    }

    /// Asks at every `interval`, and faster until the first success. Never ends; both are asked
    /// anew each time.
    pub async fn watch(
        mut self,
        interval: impl Fn() -> Duration,
        settings: impl Fn() -> HostSettings,
    ) {
        let mut succeeded = false;
        loop {
            succeeded |= self.probe(&settings()).await.is_ok();
            let interval = interval();
            let eager = interval.min(EAGER);
            tokio::time::sleep(if succeeded { interval } else { eager }).await;
        }
    }

    /// Asks once, and publishes what came of it.
    pub async fn probe(&mut self, settings: &HostSettings) -> Result<(), String> {
        let asked = tokio::time::timeout(DEADLINE, self.ask(settings)).await;
        let asked = asked.unwrap_or_else(|_| {
            Err(format!(
                "no answer within {}",
                humantime::format_duration(DEADLINE)
            ))
        });
        let asked = asked.map_err(|problem| {
            self.client = None;
            format!(
                "the mirror {} does not serve: {problem}",
                shown(&settings.mirror)
            )
        });
        let failure = asked.as_ref().err().cloned();
        self.sender.send_if_modified(|current| {
            if current.address != settings.mirror {
                *current = unknown(&settings.mirror);
            }
            let serves = failure.is_none();
            if serves != current.serves {
                current.since = Instant::now();
            }
            let changed = serves != current.serves || failure != current.failure;
            match &failure {
                None if changed => tracing::info!(mirror = %settings.mirror, "the mirror serves"),
                Some(failure) if changed => tracing::warn!("{failure}"),
                _ => {}
            }
            current.serves = serves;
            current.failure = failure;
            changed
        });
        asked
    }

    async fn ask(&mut self, settings: &HostSettings) -> Result<(), String> {
        let HostSettings { mirror, ca, .. } = settings;
        let client = match &self.client {
            Some((of, client)) if of == ca => client.clone(),
            _ => {
                let (https, file) = (mirror.scheme() == "https", ca.clone());
                let made = move || http_client(https, file.as_deref());
                let made = tokio::task::spawn_blocking(made).await;
                let client = made.map_err(|error| error.to_string())??;
                self.client = Some((ca.clone(), client.clone()));
                client
            }
        };
        let uri = format!("{}/v2/", shown(mirror));
        let request = Request::get(&uri)
            .header(USER_AGENT, PROBE)
            .header(HOST, mirror.authority())
            .body(Empty::new());
        let request = request.map_err(|error| error.to_string())?;
        let answer = client.request(request).await.map_err(|error| {
            let mut text = error.to_string();
            let mut next = std::error::Error::source(&error);
            while let Some(why) = next {
                text = format!("{text}: {why}");
                next = why.source();
            }
            text
        })?;
        match answer.status() {
            StatusCode::OK => Ok(()),
            status => Err(format!("GET {uri} was answered {status}")),
        }
    }
}

fn unknown(mirror: &Url) -> MirrorHealth {
    MirrorHealth {
        address: mirror.clone(),
        serves: false,
        since: Instant::now(),
        failure: Some("not asked yet".to_owned()),
    }
}

/// Without the slash that a URL has at its end.
fn shown(mirror: &Url) -> &str {
    mirror.as_str().trim_end_matches('/')
}

/// A new connection for every request: whether one can be made is the question. Reads files.
fn http_client(https: bool, ca: Option<&Path>) -> Result<HttpClient, String> {
    let mut roots = RootCertStore::empty();
    if https {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(ca) = ca {
            for certificate in tls::certificates("host.ca", ca).map_err(|e| e.to_string())? {
                roots.add(certificate).map_err(|error| {
                    let ca = ca.display();
                    format!("{ca} (`host.ca`) holds what is no certificate authority: {error}")
                })?;
            }
        }
    }
    let config = ClientConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(Arc::new(roots))
        .with_no_client_auth();
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(config)
        .https_or_http()
        .enable_http1()
        .wrap_connector(resolve::connector());
    Ok(Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(0)
        .build(connector))
}
