//! What was asked of the Hub.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use http::{HeaderMap, Method, header};

use super::Names;

/// Which part of a registry was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The API.
    Registry,
    /// The token server.
    Auth,
    /// The content delivery network.
    Cdn,
    /// Nothing that a registry has.
    None,
}

/// One request, and what became of it.
#[derive(Debug, Clone)]
pub struct Request {
    /// Who asked.
    pub from: IpAddr,
    /// Which of the registry's names it was asked under.
    pub host: String,
    /// Which part of the registry that is.
    pub role: Role,
    /// The method.
    pub method: Method,
    /// Path and query.
    pub path: String,
    /// The client's name for itself.
    pub user_agent: String,
    /// The scheme of its credentials (`Bearer`, `Basic`), never the credentials.
    pub authorization: Option<String>,
    /// The answer's status; 0 while there is none.
    pub status: u16,
    /// Bytes of the answer's body that the connection has taken.
    pub sent: u64,
}

impl Request {
    /// Notes a request as it comes.
    pub fn new<B>(names: &Names, from: IpAddr, host: &str, request: &http::Request<B>) -> Self {
        let text = |name| request.headers().header(name);
        let path = request.uri().path_and_query();
        Self {
            from,
            host: host.to_owned(),
            role: names.role(host, request.uri().path()),
            method: request.method().clone(),
            path: path.map(ToString::to_string).unwrap_or_default(),
            user_agent: text(header::USER_AGENT).unwrap_or_default(),
            authorization: text(header::AUTHORIZATION)
                .map(|value| value.split(' ').next().unwrap_or_default().to_owned()),
            status: 0,
            sent: 0,
        }
    }

    /// Whether it is for a manifest or a blob.
    pub fn is_content(&self) -> bool {
        let is_blob = self.role == Role::Registry && self.path.contains("/blobs/");
        is_blob || self.is_manifest() || self.is_for_cdn()
    }

    /// Whether it is for the CDN, which sends the bytes of all blobs.
    pub fn is_for_cdn(&self) -> bool {
        self.role == Role::Cdn
    }

    /// Whether it is for a manifest.
    pub fn is_manifest(&self) -> bool {
        self.role == Role::Registry && self.path.contains("/manifests/")
    }

    /// Whether dockerd itself asked, and not something that it asked.
    pub fn is_by_docker(&self) -> bool {
        self.user_agent.starts_with("docker/")
    }

    /// Whether the agent asked.
    pub fn is_by_agent(&self) -> bool {
        self.user_agent.starts_with("registry-agent/")
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            from,
            host,
            role: _,
            method,
            path,
            user_agent,
            authorization,
            status,
            sent,
        } = self;
        let authorization = authorization.as_deref().unwrap_or("anonymous");
        write!(
            f,
            "{from} {method} {host}{path} {status} {sent} bytes, {authorization}, {user_agent:?}"
        )
    }
}

/// A header's text.
trait Header {
    fn header(&self, name: header::HeaderName) -> Option<String>;
}

impl Header for HeaderMap {
    fn header(&self, name: header::HeaderName) -> Option<String> {
        let value = self.get(name)?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    }
}

/// All requests since the start.
#[derive(Default)]
pub struct Log {
    entries: Mutex<Vec<Arc<Entry>>>,
}

/// A request that is being answered.
pub struct Entry {
    request: Request,
    status: OnceLock<u16>,
    sent: AtomicU64,
}

impl Entry {
    /// Notes the answer's status.
    pub fn answered(&self, status: u16) {
        self.status.set(status).expect("a request is answered once");
    }

    /// Notes that the connection has taken some more of the body.
    pub fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Log {
    /// Notes a request as it comes.
    pub fn begin(&self, request: Request) -> Arc<Entry> {
        let (status, sent) = (OnceLock::new(), AtomicU64::new(0));
        let entry = Arc::new(Entry {
            request,
            status,
            sent,
        });
        self.entries
            .lock()
            .expect("the Hub's log")
            .push(Arc::clone(&entry));
        entry
    }

    /// What was asked so far.
    pub fn requests(&self) -> Vec<Request> {
        let entries = self.entries.lock().expect("the Hub's log");
        let seen = entries.iter().map(|entry| Request {
            status: entry.status.get().copied().unwrap_or(0),
            sent: entry.sent.load(Ordering::Relaxed),
            ..entry.request.clone()
        });
        seen.collect()
    }
}
