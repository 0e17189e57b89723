//! The registries that are mirrored: whom to ask, as whom, and when better not.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::header::ACCEPT_ENCODING;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response};
use hyper::body::Incoming;
use quick_cache::sync::Cache;

mod bucket;
mod challenge;
mod endpoint;
mod error;
mod record;
mod requests;
mod token;

pub use crate::config::Timeouts;
pub use error::UpstreamError;
pub use record::{Budget, LastContact};
pub use requests::{
    BlobBody, Description, FetchedBlob, FetchedManifest, FetchedTags, descriptors_of,
};

use endpoint::{AskedAs, Endpoint};
use error::Question;
use record::Record;

use crate::config::{S3Settings, UpstreamSettings};
use crate::metrics::Metrics;
use crate::oci::{Name, RegistryHost};
use bucket::FromBucket;

/// `Docker-Content-Digest`: the digest of a manifest that was asked for by tag.
pub const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// The longest that a repository which anybody could pull is taken to be one that anybody can,
/// counted from when nobody's token was issued by which that was seen.
pub const PUBLIC_FOR: Duration = Duration::from_mins(1);
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
    /// How long it is then taken to be.
    public_for: Duration,
    /// What was learned of who may see a repository, and is to be kept.
    learned: Mutex<HashMap<Name, bool>>,
    record: Arc<Record>,
    /// What is asked in place of endpoints.
    bucket: Option<FromBucket>,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Upstream {
    /// A client of the upstream; nothing is sent yet. A repository that is public is taken to be so
    /// for `public_for`, and for [`PUBLIC_FOR`] at the most.
    pub fn new(
        settings: UpstreamSettings,
        timeouts: Timeouts,
        public_for: Duration,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let record = Arc::new(Record::new(&settings.registry, Some(Arc::clone(metrics))));
        let public_for = public_for.min(PUBLIC_FOR);
        let endpoints = |credentials, asked_as| {
            let endpoint = |url| {
                let (registry, record) = (settings.registry.clone(), Arc::clone(&record));
                let endpoint =
                    Endpoint::new(registry, url, credentials, timeouts, record, asked_as);
                Arc::new(endpoint)
            };
            settings.urls.iter().cloned().map(endpoint).collect()
        };
        let anonymous = if settings.credentials.is_some() && !settings.share_private {
            endpoints(None, AskedAs::Nobody(proof_serves(public_for)))
        } else {
            Vec::new()
        };
        Self {
            timeouts,
            endpoints: endpoints(settings.credentials.as_ref(), AskedAs::Ourselves),
            anonymous,
            public: Cache::new(PUBLIC_MEMORY),
            public_for,
            learned: Mutex::default(),
            record,
            settings,
            bucket: None,
        }
    }

    /// A bucket, which is asked as a registry is; nothing is sent yet.
    pub fn of_bucket(
        settings: S3Settings,
        timeouts: Timeouts,
        public_for: Duration,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let shown = bucket::shown(&settings);
        let record = Record::new(&shown.registry, Some(Arc::clone(metrics)));
        Self {
            settings: shown,
            timeouts,
            endpoints: Vec::new(),
            anonymous: Vec::new(),
            public: Cache::new(0),
            public_for: public_for.min(PUBLIC_FOR),
            learned: Mutex::default(),
            record: Arc::new(record),
            bucket: Some(FromBucket::new(settings)),
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
        let down = |endpoints: &[Arc<Endpoint>]| endpoints.iter().all(|it| it.is_down());
        self.record.is_suspect()
            || !self.endpoints.is_empty() && down(&self.endpoints)
            || self.is_guarded() && down(&self.anonymous)
    }

    /// Notes that it did not answer in the time that somebody with a cached answer would wait.
    pub fn was_late(&self) {
        self.record.suspect();
    }

    /// `window`, stretched as the pulls that the upstream still allows run out.
    pub fn stretched(&self, window: Duration) -> Duration {
        self.record.stretched(window)
    }

    /// Whether it is asked as somebody who may see more than others, while what only that account
    /// can see is given to nobody.
    pub fn is_guarded(&self) -> bool {
        !self.anonymous.is_empty()
    }

    /// How long a repository that is public is taken to be so.
    pub fn public_for(&self) -> Duration {
        self.public_for
    }

    /// Whether it was seen a moment ago that everybody may see a repository.
    pub fn is_public_now(&self, name: &Name) -> bool {
        let seen = self.public.get(name);
        seen.is_some_and(|seen| seen.elapsed() < proof_serves(self.public_for))
    }

    /// Whether something was learned of who may see a repository.
    pub fn has_learned(&self, name: &Name) -> bool {
        self.lessons().contains_key(name)
    }

    /// What was learned of who may see a repository, and is not noted yet: whether everybody.
    pub fn learned(&self, name: &Name) -> Option<bool> {
        self.lessons().get(name).copied()
    }

    /// That was noted; what was learned since is not.
    pub fn noted(&self, name: &Name, public: bool) {
        let mut lessons = self.lessons();
        if lessons.get(name) == Some(&public) {
            lessons.remove(name);
        }
    }

    fn lessons(&self) -> MutexGuard<'_, HashMap<Name, bool>> {
        self.learned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn saw_public(&self, name: &Name) {
        let known = self.public.get(name).is_some();
        self.public.insert(name.clone(), Instant::now());
        if !known {
            self.lessons().insert(name.clone(), true);
        }
    }

    /// Notes that not everybody may see a repository.
    pub fn saw_private(&self, name: &Name) {
        self.public.remove(name);
        self.lessons().insert(name.clone(), false);
    }

    /// Asks for content, which costs a pull or bandwidth, at the first endpoint that can answer: as
    /// ourselves, once it is certain that everybody may see it.
    async fn get(
        &self,
        method: Method,
        path: &str,
        name: &Name,
        what: &str,
        headers: HeaderMap,
    ) -> Result<Response<Incoming>, UpstreamError> {
        // Source: a registry answers nobody for a private name as it does for one that it does not
        // have.
        if self.is_guarded() && !self.is_public_now(name) {
            let manifests = requests::accept_manifests();
            match self.look(Method::HEAD, path, name, what, manifests).await {
                Err(error) if error.is_of_method() => {
                    self.tags(name, Some(1), None).await?;
                }
                seen => {
                    seen?;
                }
            }
        }
        ask(&self.endpoints, &method, path, name, what, headers).await
    }

    /// Asks what costs nothing, at the first endpoint that can answer: as nobody, where what only we
    /// can see is given to nobody. Then the answer proves that everybody may see the repository.
    async fn look(
        &self,
        method: Method,
        path: &str,
        name: &Name,
        what: &str,
        headers: HeaderMap,
    ) -> Result<Response<Incoming>, UpstreamError> {
        if self.is_guarded() {
            self.prove(method, path, name, what, headers).await
        } else {
            ask(&self.endpoints, &method, path, name, what, headers).await
        }
    }

    /// Asks as nobody: the answer proves that everybody may see the repository.
    async fn prove(
        &self,
        method: Method,
        path: &str,
        name: &Name,
        what: &str,
        headers: HeaderMap,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let nobody = if self.is_guarded() {
            &self.anonymous
        } else {
            &self.endpoints
        };
        let seen = ask(nobody, &method, path, name, what, headers).await;
        match &seen {
            Ok(response) if requests::is_what_was_asked_for(path, response.headers()) => {
                self.saw_public(name);
            }
            Ok(_) => return Err(self.protocol_error(what, "an answer to something else")),
            // Some list no tags for nobody, although what is there can be pulled.
            Err(UpstreamError::Denied { .. }) if !requests::asks_for_tags(path) => {
                self.saw_private(name);
            }
            // What is not there is perhaps so for everybody.
            Err(_) => {}
        }
        seen
    }

    fn question<'a>(&'a self, what: &'a str) -> Question<'a> {
        Question {
            registry: self.registry(),
            what,
        }
    }

    pub(crate) fn too_large(&self, what: &str, limit: usize) -> UpstreamError {
        self.question(what).too_large(limit)
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

/// How long what nobody's token has shown is taken to be true, and how long the token is used: in the
/// end the token's age counts as well.
fn proof_serves(public_for: Duration) -> Duration {
    public_for / 2
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Credentials, Secret};

    #[test]
    fn the_age_of_nobodys_token_counts_in_how_long_its_proof_serves() {
        let second = Duration::from_secs(1);
        for window in [PUBLIC_FOR, 2 * PUBLIC_FOR, 10 * second] {
            let upstream = Upstream::new(
                UpstreamSettings {
                    registry: RegistryHost::docker_hub(),
                    urls: vec!["http://127.0.0.1:1".parse().unwrap()],
                    credentials: Some(Credentials {
                        username: "robot".to_owned(),
                        password: Secret::new("secret"),
                    }),
                    share_private: false,
                },
                Timeouts {
                    connect: second,
                    headers: second,
                    idle: second,
                },
                window,
                &Arc::default(),
            );
            let AskedAs::Nobody(token) = upstream.anonymous[0].asked_as else {
                panic!("somebody is asked for");
            };
            let name: Name = "library/app".parse().unwrap();
            upstream.saw_public(&name);
            assert!(upstream.is_public_now(&name));
            // By a token that was at its end then.
            let left = window.min(PUBLIC_FOR).saturating_sub(token);
            // Not where the clock itself is younger.
            if let Some(then) = Instant::now().checked_sub(left) {
                upstream.public.insert(name.clone(), then);
                assert!(!upstream.is_public_now(&name), "{window:?}");
            }
        }
    }
}
