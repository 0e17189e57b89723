//! A real S3 server (s3s-fs) in the test process, and in front of it what S3's own front does on a
//! bad day: it counts requests, is slow, limits, refuses, and breaks off, as a test says.
//!
//! The front also does what s3s-fs does not: conditions of a GET, two DELETEs of a key at once, and keys of more than about 170
//! characters, for which s3s-fs makes names of files that no file can have.
#![allow(dead_code, reason = "every test target uses a part of it")]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::net::TcpListener;
use tokio::time::{Instant, Sleep};

/// The only key that is let in.
pub const ACCESS_KEY: &str = "AKIATESTTESTTEST";
/// Its secret, which nothing may ever print.
pub const SECRET_KEY: &str = "hunter2hunter2hunter2";
/// A second key that is let in, as a role's next one.
pub const NEXT_ACCESS_KEY: &str = "AKIATESTTESTNEXT";
/// Its secret.
pub const NEXT_SECRET_KEY: &str = "hunter2hunter2hunter3";
/// The longest key that s3s-fs can keep, about.
const LONG_KEY: usize = 165;
/// The bucket that is there.
pub const BUCKET: &str = "images";

/// A request, as the server saw it.
#[derive(Debug, Clone)]
pub struct Asked {
    /// GET, HEAD, PUT, DELETE or POST; LIST for a GET of the bucket itself.
    pub operation: String,
    /// The key, or what a LIST is of.
    pub key: String,
    /// The query as it was.
    pub query: String,
    /// The `Range` as it was.
    pub range: Option<String>,
    pub headers: HeaderMap,
    /// How many requests of this operation for this key and range came before.
    pub earlier: usize,
}

/// What is done to a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// 503 `SlowDown`.
    SlowDown,
    /// Another answer without a body.
    Status(u16),
    /// No byte of an answer.
    Hang,
    /// The body ends after so many bytes, by a broken connection.
    BreakAfter(u64),
    /// The body stops after so many bytes, and the connection stays.
    HangAfter(u64),
    /// 301 with the bucket's real region.
    Elsewhere,
    /// 400 `ExpiredToken`.
    Expired,
    /// 200 to what is refused because of its condition, as of a store that does not look at it.
    NoConditions,
}

type Plan = dyn Fn(&Asked) -> Option<Fault> + Send + Sync;

/// What a test says about the front.
#[derive(Default)]
pub struct Front {
    asked: Mutex<Vec<Asked>>,
    plan: Mutex<Option<Arc<Plan>>>,
    /// To the first byte of every answer.
    latency: Mutex<Duration>,
    /// Bytes a second of each connection.
    rate: Mutex<Option<u64>>,
    /// Whether a missing key is 403, and LIST as well, as without `s3:ListBucket`.
    no_list: AtomicBool,
    /// And which prefixes are listed all the same, as by a condition on `s3:prefix`.
    listed: Mutex<Option<String>>,
    /// Where the bucket's objects are.
    root: Mutex<PathBuf>,
}

/// What a GET is answered with because of its conditions.
fn condition(asked: &HeaderMap, answer: &HeaderMap) -> Option<u16> {
    let etag = answer.get("etag")?;
    if asked.get("if-match").is_some_and(|wanted| wanted != etag) {
        return Some(412);
    }
    (asked.get("if-none-match") == Some(etag)).then_some(304)
}

fn lay(file: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    crate::support::write_file(file, bytes);
}

impl Front {
    /// Every request so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// How many requests of an operation there were so far.
    pub fn count(&self, operation: &str) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|it| it.operation == operation).count()
    }

    /// How many of each operation there were since this was last asked.
    pub fn take(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for asked in std::mem::take(&mut *self.asked.lock().unwrap()) {
            *counts.entry(asked.operation).or_default() += 1;
        }
        counts
    }

    pub fn plan(&self, plan: impl Fn(&Asked) -> Option<Fault> + Send + Sync + 'static) {
        *self.plan.lock().unwrap() = Some(Arc::new(plan));
    }

    pub fn latency(&self, latency: Duration) {
        *self.latency.lock().unwrap() = latency;
    }

    pub fn rate(&self, rate: u64) {
        *self.rate.lock().unwrap() = Some(rate);
    }

    pub fn no_list(&self) {
        self.no_list.store(true, Ordering::Relaxed);
    }
}

impl Front {
    /// As a policy that allows `s3:ListBucket` with an `s3:prefix` that begins so, which a GET of a
    /// missing key does not have: that is 403.
    pub fn list_only(&self, prefix: &str) {
        self.no_list();
        *self.listed.lock().unwrap() = Some(prefix.to_owned());
    }

    fn may_list(&self, asked: &Asked) -> bool {
        let listed = self.listed.lock().unwrap();
        let said = asked
            .query
            .split('&')
            .find_map(|it| it.strip_prefix("prefix="));
        let said = said.map(|it| percent_encoding::percent_decode_str(it).decode_utf8_lossy());
        listed
            .as_ref()
            .zip(said)
            .is_some_and(|(listed, said)| said.starts_with(listed.as_str()))
    }

    /// The access keys by which requests were signed, each once, in the order of the first.
    pub fn signers(&self) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        for asked in self.asked.lock().unwrap().iter() {
            let id = signer(&asked.headers);
            if !found.contains(&id) {
                found.push(id);
            }
        }
        found
    }
}

/// The access key by which a request was signed.
pub fn signer(headers: &HeaderMap) -> String {
    let signed = headers.get("authorization").and_then(|it| it.to_str().ok());
    let (_, rest) = signed
        .unwrap_or_default()
        .split_once("Credential=")
        .unwrap_or_default();
    rest.split('/').next().unwrap_or_default().to_owned()
}

/// A server; it ends with this.
pub struct S3 {
    pub address: SocketAddr,
    pub front: Arc<Front>,
    folder: tempfile::TempDir,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl S3 {
    /// Serves one empty bucket.
    pub async fn start() -> Self {
        Self::start_with(None).await
    }

    /// The same by TLS.
    pub async fn start_with(tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(BUCKET)).unwrap();
        let storage = s3s_fs::FileSystem::new(folder.path()).unwrap();
        let mut service = S3ServiceBuilder::new(storage);
        let mut keys = SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY);
        keys.register(NEXT_ACCESS_KEY.to_owned(), NEXT_SECRET_KEY.into());
        service.set_auth(keys);
        let service = service.build();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let front = Arc::new(Front::default());
        *front.root.lock().unwrap() = folder.path().join(BUCKET);
        let task = tokio::spawn(accept(listener, service, Arc::clone(&front), tls));
        Self {
            address,
            front,
            folder,
            task,
        }
    }

    /// Where a key is kept: what lies there is in the bucket.
    pub fn file(&self, key: &str) -> PathBuf {
        self.folder.path().join(BUCKET).join(key)
    }

    /// Lays a file down, as somebody else put it there.
    pub fn lay(&self, key: &str, bytes: &[u8]) {
        lay(&self.file(key), bytes);
    }

    /// Every key in the bucket, sorted.
    pub fn keys(&self) -> Vec<String> {
        let root = self.folder.path().join(BUCKET);
        let mut folders = vec![root.clone()];
        let mut keys = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let key = path.strip_prefix(&root).unwrap();
                    keys.push(key.to_str().unwrap().to_owned());
                }
            }
        }
        keys.sort();
        keys
    }
}

async fn accept(
    listener: TcpListener,
    service: S3Service,
    front: Arc<Front>,
    tls: Option<Arc<rustls::ServerConfig>>,
) {
    let tls = tls.map(tokio_rustls::TlsAcceptor::from);
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (service, front) = (service.clone(), Arc::clone(&front));
        let tls = tls.clone();
        connections.spawn(async move {
            let stream: Box<dyn Duplex> = match tls {
                None => Box::new(stream),
                Some(tls) => match tls.accept(stream).await {
                    Ok(stream) => Box::new(stream),
                    Err(_) => return,
                },
            };
            let answer = service_fn(move |request| {
                let (service, front) = (service.clone(), Arc::clone(&front));
                async move { Ok::<_, Infallible>(front.answer(&service, request).await) }
            });
            let serving = hyper::server::conn::http1::Builder::new();
            let _ = serving.serve_connection(TokioIo::new(stream), answer).await;
        });
    }
}

trait Duplex: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}

impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Duplex for T {}

type Answer = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

fn plain(status: u16, body: impl Into<Bytes>) -> Answer {
    let body = Full::new(body.into()).map_err(|never: Infallible| match never {});
    let mut answer = Response::new(body.boxed_unsync());
    *answer.status_mut() = StatusCode::from_u16(status).unwrap();
    answer
}

fn error(status: u16, code: &str) -> Answer {
    let text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code><Message>by the \
         test</Message></Error>"
    );
    plain(status, text)
}

impl Front {
    fn note(&self, request: &Request<Incoming>) -> Asked {
        let path = percent_encoding::percent_decode_str(request.uri().path()).decode_utf8_lossy();
        let key = path.trim_start_matches('/');
        let key = key.strip_prefix(BUCKET).unwrap_or(key);
        let key = key.trim_start_matches('/').to_owned();
        let query = request.uri().query().unwrap_or_default().to_owned();
        let is_list = *request.method() == Method::GET && key.is_empty();
        let operation = if is_list {
            "LIST".to_owned()
        } else {
            request.method().to_string()
        };
        let range = request.headers().get("range");
        let range = range.map(|range| range.to_str().unwrap().to_owned());
        let mut all = self.asked.lock().unwrap();
        let same = |it: &&Asked| it.operation == operation && it.key == key && it.range == range;
        let earlier = all.iter().filter(same).count();
        let asked = Asked {
            operation,
            key,
            query,
            range,
            headers: request.headers().clone(),
            earlier,
        };
        all.push(asked.clone());
        asked
    }

    /// Keeps what s3s-fs could not.
    async fn put(&self, asked: &Asked, request: Request<Incoming>) -> Answer {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let root = self.root.lock().unwrap().clone();
        lay(&root.join(&asked.key), &body);
        let mut answer = plain(200, "");
        answer
            .headers_mut()
            .insert("etag", "\"long\"".parse().unwrap());
        answer
    }

    async fn answer(&self, service: &S3Service, request: Request<Incoming>) -> Answer {
        let asked = self.note(&request);
        let plan = self.plan.lock().unwrap().clone();
        let fault = plan.and_then(|plan| plan(&asked));
        let latency = *self.latency.lock().unwrap();
        tokio::time::sleep(latency).await;
        let no_list = self.no_list.load(Ordering::Relaxed);
        match fault {
            Some(Fault::SlowDown) => return error(503, "SlowDown"),
            Some(Fault::Status(status)) => {
                // Who is still sending when the connection closes may not see the answer.
                let mut body = request.into_body();
                while let Some(Ok(_)) = body.frame().await {}
                return plain(status, "");
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Elsewhere) => {
                let mut answer = error(301, "PermanentRedirect");
                let region = "ap-southeast-2".parse().unwrap();
                answer.headers_mut().insert("x-amz-bucket-region", region);
                return answer;
            }
            Some(Fault::Expired) if asked.operation == "HEAD" => return plain(400, ""),
            Some(Fault::Expired) => return error(400, "ExpiredToken"),
            _ if no_list && asked.operation == "LIST" && !self.may_list(&asked) => {
                return error(403, "AccessDenied");
            }
            _ => {}
        }
        if asked.operation == "PUT" && asked.key.len() > LONG_KEY {
            return self.put(&asked, request).await;
        }
        let answer = service.call(request.map(s3s::Body::from)).await.unwrap();
        if asked.operation == "GET"
            && let Some(status) = condition(&asked.headers, answer.headers())
        {
            return plain(status, "");
        }
        if asked.operation == "DELETE" && answer.status() == 500 {
            // Somebody else was faster.
            let file = self.root.lock().unwrap().join(&asked.key);
            if !file.exists() {
                return plain(204, "");
            }
        }
        if no_list && answer.status() == 404 {
            return error(403, "AccessDenied");
        }
        if fault == Some(Fault::NoConditions) && answer.status() == 412 {
            return plain(200, "");
        }
        let limit = match fault {
            Some(Fault::BreakAfter(bytes)) => Some((bytes, false)),
            Some(Fault::HangAfter(bytes)) => Some((bytes, true)),
            _ => None,
        };
        let rate = *self.rate.lock().unwrap();
        let (head, body) = answer.into_parts();
        let body = Shaped {
            body,
            limit,
            sent: 0,
            rate,
            begun: Instant::now(),
            pause: None,
        };
        Response::from_parts(head, body.boxed_unsync())
    }
}

/// A body that arrives at a rate, and ends where it should not.
struct Shaped {
    body: s3s::Body,
    /// After how many bytes it ends, and whether the connection stays then.
    limit: Option<(u64, bool)>,
    sent: u64,
    rate: Option<u64>,
    begun: Instant,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Body for Shaped {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(context));
            self.pause = None;
        }
        let left = match self.limit {
            Some((limit, hangs)) if self.sent >= limit => {
                if hangs {
                    return Poll::Pending;
                }
                let broken = std::io::Error::other("by the test");
                return Poll::Ready(Some(Err(broken)));
            }
            Some((limit, _)) => usize::try_from(limit - self.sent).unwrap(),
            None => usize::MAX,
        };
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        let Some(frame) = frame else {
            return Poll::Ready(None);
        };
        let frame = frame.map_err(std::io::Error::other)?;
        let Ok(mut data) = frame.into_data() else {
            return Poll::Ready(None);
        };
        data.truncate(left);
        self.sent += data.len() as u64;
        if let Some(rate) = self.rate {
            let due = self.begun + Duration::from_micros(self.sent * 1_000_000 / rate);
            if due > Instant::now() + Duration::from_millis(2) {
                self.pause = Some(Box::pin(tokio::time::sleep_until(due)));
            }
        }
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
