//! The registries that are mirrored: whom to ask, as whom, and when better not.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::ACCEPT_ENCODING;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response};
use hyper::body::Incoming;
use quick_cache::sync::Cache;

mod challenge;
mod endpoint;
mod error;
mod record;
mod requests;
mod token;

pub use crate::config::Timeouts;
pub use error::UpstreamError;
pub use record::{Budget, LastContact};
pub use requests::{FetchedBlob, FetchedManifest, FetchedTags, descriptors_of};

use endpoint::Endpoint;
use error::Question;
use record::Record;

use crate::config::UpstreamSettings;
use crate::metrics::Metrics;
use crate::oci::{Name, RegistryHost};

/// `Docker-Content-Digest`: the digest of a manifest that was asked for by tag.
pub const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// How long a repository that anybody could pull is taken to be one that anybody can.
const PUBLIC_FOR: Duration = Duration::from_hours(1);
/// Repositories of which that is remembered.
const PUBLIC_MEMORY: usize = 16 * 1024;

/// One registry that is mirrored, and all that is remembered of it.
pub struct Upstream {
    settings: UpstreamSettings,
    timeouts: Timeouts,
    /// Where it is asked, in order: the next where one fails.
    endpoints: Vec<Arc<Endpoint>>,
    /// The same, asked as nobody: who may see what our credentials can.
    anonymous: Vec<Arc<Endpoint>>,
    /// When a repository was last seen to be public.
    public: Cache<Name, Instant>,
    record: Arc<Record>,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Upstream {
    /// A client of the upstream; nothing is sent yet.
    pub fn new(settings: UpstreamSettings, timeouts: Timeouts, metrics: &Arc<Metrics>) -> Self {
        let record = Arc::new(Record::new(&settings.registry, Some(Arc::clone(metrics))));
        let endpoints = |credentials, record: &Arc<Record>| {
            let endpoint = |url| {
                let registry = settings.registry.clone();
                let record = Arc::clone(record);
                Arc::new(Endpoint::new(registry, url, credentials, timeouts, record))
            };
            settings.urls.iter().cloned().map(endpoint).collect()
        };
        let anonymous = if settings.credentials.is_some() && !settings.share_private {
            // Nobody's pulls are counted apart from ours.
            endpoints(None, &Arc::new(Record::new(&settings.registry, None)))
        } else {
            Vec::new()
        };
        Self {
            timeouts,
            endpoints: endpoints(settings.credentials.as_ref(), &record),
            anonymous,
            public: Cache::new(PUBLIC_MEMORY),
            record,
            settings,
        }
    }

    /// The name clients know it by.
    pub fn registry(&self) -> &RegistryHost {
        &self.settings.registry
    }

    /// How it was configured.
    pub fn settings(&self) -> &UpstreamSettings {
        &self.settings
    }

    /// Its deadlines.
    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// What is known from its last answers.
    pub fn last_contact(&self) -> LastContact {
        self.record.last_contact()
    }

    /// Whether it was late, or did not answer at all, a moment ago: then nobody who has a cached
    /// answer waits for it.
    pub fn is_suspect(&self) -> bool {
        self.record.is_suspect() || self.endpoints.iter().all(|endpoint| endpoint.is_down())
    }

    /// Notes that it did not answer in the time that somebody with a cached answer would wait.
    pub fn was_late(&self) {
        self.record.suspect();
    }

    /// `window`, stretched as the pulls that the upstream still allows run out.
    pub fn stretched(&self, window: Duration) -> Duration {
        self.record.stretched(window)
    }

    /// Asks for a path of a repository, at the first endpoint that can answer.
    async fn get(
        &self,
        method: Method,
        path: &str,
        name: &Name,
        what: &str,
        headers: HeaderMap,
    ) -> Result<Response<Incoming>, UpstreamError> {
        self.check_public(path, name, what).await?;
        ask(&self.endpoints, &method, path, name, what, headers).await
    }

    /// Refuses what only our own credentials can see: a mirror gives what it has to anybody. Source:
    /// a registry answers nobody for a private name as it does for one that it does not have.
    async fn check_public(&self, path: &str, name: &Name, what: &str) -> Result<(), UpstreamError> {
        if self.anonymous.is_empty() {
            return Ok(());
        }
        let seen = self.public.get(name);
        if seen.is_some_and(|seen| seen.elapsed() < PUBLIC_FOR) {
            return Ok(());
        }
        // HEAD costs no pull; lists of tags are not known to answer it.
        let method = if path.contains("/tags/list") {
            Method::GET
        } else {
            Method::HEAD
        };
        let headers = requests::accept_manifests();
        ask(&self.anonymous, &method, path, name, what, headers).await?;
        self.public.insert(name.clone(), Instant::now());
        Ok(())
    }

    fn question<'a>(&'a self, what: &'a str) -> Question<'a> {
        Question {
            registry: self.registry(),
            what,
        }
    }

    pub(crate) fn protocol_error(&self, what: &str, reason: &str) -> UpstreamError {
        self.question(what).protocol(reason)
    }

    pub(crate) fn timeout_error(&self, what: &str, deadline: Duration) -> UpstreamError {
        self.question(what).timeout(deadline)
    }

    pub(crate) fn transport_error(&self, what: &str, error: &dyn Error) -> UpstreamError {
        self.question(what).broken(error)
    }

    pub(crate) fn transport(&self, what: &str, reason: String) -> UpstreamError {
        self.question(what).transport(reason)
    }
}

/// Asks one endpoint after the other until one has it. What the last one says counts, unless none
/// of those before could be asked at all and it only does not have it: then nobody knows.
async fn ask(
    endpoints: &[Arc<Endpoint>],
    method: &Method,
    path: &str,
    name: &Name,
    what: &str,
    mut headers: HeaderMap,
) -> Result<Response<Incoming>, UpstreamError> {
    // What is stored must be the bytes that the digest is of.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let mut failure: Option<UpstreamError> = None;
    for endpoint in endpoints {
        let asked = endpoint.get(method, path, name, what, &headers).await;
        match asked {
            Ok(response) => return Ok(response),
            Err(error) if failure.as_ref().is_none_or(UpstreamError::is_final) => {
                failure = Some(error);
            }
            Err(_) => {}
        }
    }
    // There is at least one endpoint: settings can't be without.
    Err(failure.unwrap_or_else(|| UpstreamError::Transport {
        registry: String::new(),
        what: what.to_owned(),
        reason: "it has no URL".to_owned(),
    }))
}
