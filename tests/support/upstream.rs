//! An upstream registry on loopback that speaks Docker Hub's protocol, remembers every request, and
//! does wrong what a test tells it to.

mod fault;
mod protocol;
mod tls;
mod wire;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use serde_json::Value;

pub use fault::{Fault, Gate, On};
#[allow(unused_imports, reason = "every test target uses a part of it")]
pub use tls::{Authority, Issued};

use super::image::{Blob, Image, Manifest};
use super::{client, own_address};
use fault::{Plan, Rule};
use protocol::{Answer, Request};
use wire::Listener;

/// For as long as the test runs, or until [`Upstream::heal`].
pub const ALWAYS: usize = usize::MAX;

/// Which of its hosts an upstream was asked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The registry's API.
    Registry,
    /// Where the registry sends clients for blobs, at another address.
    Cdn,
}

/// A request and what became of it.
#[derive(Debug, Clone)]
pub struct Exchange {
    pub role: Role,
    pub method: String,
    pub path: String,
    pub query: Vec<(String, String)>,
    pub headers: Vec<(String, String)>,
    /// The status of the answer; 0 while there is none.
    pub status: u16,
    /// Bytes of the body that were sent.
    pub sent: usize,
    /// Whether the whole answer was sent.
    pub complete: bool,
}

impl Exchange {
    pub fn header(&self, name: &str) -> Option<&str> {
        client::find(&self.headers, name)
    }
}

/// What the registry holds, and what it lets whom see.
struct Content {
    repositories: BTreeMap<String, Repository>,
    /// `user:password` of the one account.
    account: Option<String>,
    /// Whether it asks for no token at all.
    open: bool,
    /// Valid tokens, and the repositories that each is for.
    tokens: HashMap<String, Vec<String>>,
    /// What is told of a token's lifetime, in seconds.
    token_lifetime: u64,
    realm: String,
    cdn: Option<String>,
    /// Manifest GETs that are left; nothing for no limit.
    remaining: Option<u64>,
    /// How it links the next page of referrers, where it has one on each.
    referrers_link: Option<String>,
}

#[derive(Default)]
struct Repository {
    private: bool,
    tags: BTreeMap<String, String>,
    manifests: HashMap<String, Manifest>,
    blobs: HashMap<String, Bytes>,
    /// Descriptors by what they refer to; with none it is a registry from before version 1.1.
    referrers: HashMap<String, Vec<Value>>,
}

struct Shared {
    content: Mutex<Content>,
    rules: Mutex<Vec<Rule>>,
    exchanges: Mutex<Vec<Exchange>>,
}

impl Shared {
    /// Remembers a request; says which it is and what is to go wrong with it.
    fn received(&self, request: &Request) -> (usize, Plan) {
        let mut exchanges = self.exchanges.lock().expect("exchanges");
        exchanges.push(Exchange {
            role: request.role,
            method: request.method.clone(),
            path: request.path.clone(),
            query: request.query.clone(),
            headers: request.headers.clone(),
            status: 0,
            sent: 0,
            complete: false,
        });
        let admitted = self.content.lock().expect("content").admits(request);
        let mut rules = self.rules.lock().expect("rules");
        let plan = Plan::of(&mut rules, &request.method, &request.path, admitted);
        (exchanges.len() - 1, plan)
    }

    fn answer(&self, request: &Request, plan: &Plan) -> Answer {
        self.content.lock().expect("content").answer(request, plan)
    }

    fn record(&self, number: usize, change: impl FnOnce(&mut Exchange)) {
        change(&mut self.exchanges.lock().expect("exchanges")[number]);
    }
}

/// How an upstream is to be.
#[derive(Default)]
#[must_use]
pub struct Options {
    account: Option<String>,
    open: bool,
    cdn: bool,
    foreign_realm: bool,
    authority: Option<Authority>,
}

impl Options {
    /// Has an account, for whom private repositories are visible.
    pub fn account(mut self, user: &str, password: &str) -> Self {
        self.account = Some(format!("{user}:{password}"));
        self
    }

    /// Asks for no token.
    pub fn open(mut self) -> Self {
        self.open = true;
        self
    }

    /// Sends clients to another host for blobs.
    pub fn cdn(mut self) -> Self {
        self.cdn = true;
        self
    }

    /// Sends clients to a host that is not its own for tokens (the CDN's).
    pub fn foreign_realm(mut self) -> Self {
        self.foreign_realm = true;
        self
    }

    /// Speaks TLS, with a certificate of this authority.
    pub fn tls(mut self, authority: &Authority) -> Self {
        self.authority = Some(authority.clone());
        self
    }

    pub fn start(self) -> Upstream {
        let scheme = if self.authority.is_some() {
            "https"
        } else {
            "http"
        };
        let shared = Arc::new(Shared {
            content: Mutex::new(Content {
                repositories: BTreeMap::new(),
                account: self.account,
                open: self.open,
                tokens: HashMap::new(),
                token_lifetime: 300,
                realm: String::new(),
                cdn: None,
                remaining: None,
                referrers_link: None,
            }),
            rules: Mutex::default(),
            exchanges: Mutex::default(),
        });
        let listen = |role| {
            let address = own_address();
            let tls = self
                .authority
                .as_ref()
                .map(|authority| authority.server(address));
            Listener::start(role, wire::any_port(address), tls, Arc::clone(&shared))
        };
        let registry = listen(Role::Registry);
        let cdn = (self.cdn || self.foreign_realm).then(|| listen(Role::Cdn));
        let url = format!("{scheme}://{}", registry.address());
        let elsewhere = cdn
            .as_ref()
            .map(|cdn| format!("{scheme}://{}", cdn.address()));
        {
            let mut content = shared.content.lock().expect("content");
            let realm = elsewhere
                .as_ref()
                .filter(|_| self.foreign_realm)
                .unwrap_or(&url);
            content.realm = format!("{realm}/token");
            content.cdn = elsewhere.filter(|_| self.cdn);
        }
        let tls = self.authority;
        Upstream {
            url,
            shared,
            tls,
            registry: Mutex::new(registry),
            _cdn: cdn,
        }
    }
}

/// A running upstream; it ends when dropped.
pub struct Upstream {
    url: String,
    shared: Arc<Shared>,
    tls: Option<Authority>,
    registry: Mutex<Listener>,
    _cdn: Option<Listener>,
}

impl Upstream {
    /// Docker Hub as anonymous clients see it, without TLS.
    pub fn start() -> Self {
        Options::default().start()
    }

    pub fn options() -> Options {
        Options::default()
    }

    /// Where its API is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where it sends clients for tokens.
    pub fn realm(&self) -> String {
        self.content().realm.clone()
    }

    /// Sends clients elsewhere for tokens from now on.
    pub fn move_realm(&self, realm: &str) {
        realm.clone_into(&mut self.content().realm);
    }

    /// Refuses connections, and closes those that are open.
    pub fn switch_off(&self) {
        self.registry.lock().expect("listener").stop();
    }

    /// Takes connections again, at the same port.
    pub fn switch_on(&self) {
        let mut registry = self.registry.lock().expect("listener");
        let address = registry.address();
        let tls = self
            .tls
            .as_ref()
            .map(|authority| authority.server(*address.ip()));
        *registry = Listener::start(Role::Registry, address, tls, Arc::clone(&self.shared));
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.shared.content.lock().expect("content")
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Repository)) {
        change(
            self.content()
                .repositories
                .entry(name.to_owned())
                .or_default(),
        );
    }

    /// Holds the image under this tag.
    pub fn push(&self, name: &str, tag: &str, image: &Image) {
        for blob in image.blobs() {
            self.push_blob(name, blob);
        }
        self.push_manifest(name, Some(tag), &image.manifest);
    }

    pub fn push_manifest(&self, name: &str, tag: Option<&str>, manifest: &Manifest) {
        let digest = manifest.digest().to_owned();
        self.change(name, |repository| {
            if let Some(tag) = tag {
                repository.tags.insert(tag.to_owned(), digest.clone());
            }
            repository.manifests.insert(digest, manifest.clone());
        });
    }

    pub fn push_blob(&self, name: &str, blob: &Blob) {
        self.change(name, |repository| {
            repository
                .blobs
                .insert(blob.digest.clone(), blob.bytes.clone());
        });
    }

    /// Has something that refers to the manifest with this digest.
    pub fn refer(&self, name: &str, subject: &str, descriptor: Value) {
        self.change(name, |repository| {
            let referrers = repository.referrers.entry(subject.to_owned());
            referrers.or_default().push(descriptor);
        });
    }

    /// Nothing refers to the manifest with this digest any more.
    pub fn forget_referrers(&self, name: &str, subject: &str) {
        self.change(name, |repository| {
            repository.referrers.remove(subject);
        });
    }

    /// Lists one referrer on a page, and links the next by this, with `{path}` and `{page}` in it.
    pub fn page_referrers(&self, link: &str) {
        self.content().referrers_link = Some(link.to_owned());
    }

    /// From now on the repository is for the account only.
    pub fn make_private(&self, name: &str) {
        self.change(name, |repository| repository.private = true);
    }

    /// Forgets all tokens that it gave out.
    pub fn revoke_tokens(&self) {
        self.content().tokens.clear();
    }

    /// Gives out tokens for so many seconds from now on.
    pub fn token_lifetime(&self, seconds: u64) {
        self.content().token_lifetime = seconds;
    }

    /// Allows this many more manifest GETs.
    pub fn limit(&self, remaining: u64) {
        self.content().remaining = Some(remaining);
    }

    /// Goes wrong in this way, for the next `times` of these requests.
    pub fn fault(&self, times: usize, on: On, fault: Fault) {
        self.shared.rules.lock().expect("rules").push(Rule {
            on,
            left: times,
            fault,
        });
    }

    /// Holds the next of these answers at this byte of its body.
    pub fn hold(&self, on: On, at: usize) -> Gate {
        let gate = Gate::new();
        self.fault(1, on, Fault::Gate(at, gate.clone()));
        gate
    }

    /// Holds the next of these answers, as it would have been then.
    pub fn hold_headers(&self, on: On) -> Gate {
        let gate = Gate::new();
        self.fault(1, on, Fault::GateHeaders(gate.clone()));
        gate
    }

    /// Nothing goes wrong any more.
    pub fn heal(&self) {
        self.shared.rules.lock().expect("rules").clear();
    }

    /// All requests so far.
    pub fn exchanges(&self) -> Vec<Exchange> {
        self.shared.exchanges.lock().expect("exchanges").clone()
    }

    /// The requests so far by this method whose path contains `part`.
    pub fn asked(&self, method: &str, part: &str) -> Vec<Exchange> {
        let exchanges = self.shared.exchanges.lock().expect("exchanges");
        let such = exchanges
            .iter()
            .filter(|exchange| exchange.method == method && exchange.path.contains(part));
        such.cloned().collect()
    }

    /// Those of them that it answered with content.
    pub fn served(&self, method: &str, part: &str) -> Vec<Exchange> {
        let mut served = self.asked(method, part);
        served.retain(|exchange| matches!(exchange.status, 200 | 206));
        served
    }

    /// How often it was asked that.
    pub fn count(&self, method: &str, part: &str) -> usize {
        self.asked(method, part).len()
    }

    /// How many requests there were, of any kind.
    pub fn total(&self) -> usize {
        self.shared.exchanges.lock().expect("exchanges").len()
    }
}
