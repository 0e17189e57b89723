//! The Hub's public side: TLS, the three names, rate limits, the redirect to the CDN, the record.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::Names;
use super::gate::{End, Gate};
use super::record::{Entry, Log, Request as Noted, Role};
use super::registry::ADDRESS;
use super::tokens::Tokens;

/// Decides on an answer in the Hub's place.
pub type Fault = Box<dyn Fn(&Noted) -> Option<Response<Bytes>> + Send + Sync>;

/// Answers requests.
pub struct Front {
    pub tokens: Tokens,
    pub log: Log,
    pub gate: Gate,
    names: &'static Names,
    storage: PathBuf,
    registry: Client<HttpConnector, Empty<Bytes>>,
    manifests_served: AtomicU32,
    fault: Mutex<Option<Fault>>,
}

impl Front {
    /// A front, under these names, for a registry with its root at `storage`.
    pub fn new(names: &'static Names, tokens: Tokens, storage: PathBuf) -> Self {
        Self {
            tokens,
            log: Log::default(),
            gate: Gate::default(),
            names,
            storage,
            registry: Client::builder(TokioExecutor::new()).build_http(),
            manifests_served: AtomicU32::new(0),
            fault: Mutex::new(None),
        }
    }

    /// Sets or removes what decides before the front does.
    pub fn disturb(&self, fault: Option<Fault>) {
        *self.fault.lock().expect("the Hub's fault") = fault;
    }

    async fn answer(&self, from: IpAddr, request: Request<Incoming>) -> Response<Counted> {
        let host = host_of(&request);
        let noted = Noted::new(self.names, from, &host, &request);
        let entry = self.log.begin(noted.clone());
        let fault = self
            .fault
            .lock()
            .expect("the Hub's fault")
            .as_ref()
            .and_then(|f| f(&noted));
        let answer = match fault {
            Some(answer) => answer,
            None => match noted.role {
                Role::Registry => self.registry(&noted, request).await,
                Role::Auth => self.tokens.answer(request.uri(), request.headers()),
                Role::Cdn => self.cdn(&request),
                Role::None => plain(
                    StatusCode::NOT_FOUND,
                    "not a name or a path of the registry",
                ),
            },
        };
        entry.answered(answer.status().as_u16());
        answer.map(|rest| {
            let stop = (noted.role == Role::Cdn)
                .then(|| self.gate.stop(rest.len()))
                .flatten();
            let stop = stop.map(|(after, end)| Stop {
                left: after,
                end: Box::pin(end),
            });
            Counted { rest, entry, stop }
        })
    }

    /// The API: the registry's own answer, with the Hub's limits on manifests, and blobs to be
    /// had from the CDN by those who may have them.
    async fn registry(&self, noted: &Noted, request: Request<Incoming>) -> Response<Bytes> {
        let (parts, _) = request.into_parts();
        let is_blob = parts.uri.path().contains("/blobs/sha256:");
        // Whether a client may have a blob can be told by HEAD.
        let method = if is_blob {
            Method::HEAD
        } else {
            parts.method.clone()
        };
        let mut answer = self.ask_registry(method, &parts.uri, &parts.headers).await;
        if is_blob && answer.status() == StatusCode::OK {
            let hex = parts.uri.path().rsplit(':').next().unwrap_or_default();
            let folder = hex.get(..2).unwrap_or_default();
            let path = format!("docker/registry/v2/blobs/sha256/{folder}/{hex}/data");
            let cdn = self.names.cdn;
            let location = format!("https://{cdn}/registry-v2/{path}?verify={hex}");
            return Response::builder()
                .status(StatusCode::TEMPORARY_REDIRECT)
                .header(header::LOCATION, location)
                .body(Bytes::new())
                .expect("a response");
        }
        if let Some(allowed) = self.names.limit
            && noted.is_manifest()
            && answer.status() == StatusCode::OK
        {
            let counts = u32::from(parts.method == Method::GET);
            let served = self.manifests_served.fetch_add(counts, Ordering::Relaxed) + counts;
            let limit = |left: u32| format!("{left};w=21600").parse().expect("a header value");
            let headers = answer.headers_mut();
            headers.insert("ratelimit-limit", limit(allowed));
            headers.insert("ratelimit-remaining", limit(allowed.saturating_sub(served)));
        }
        answer
    }

    async fn ask_registry(
        &self,
        method: Method,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Response<Bytes> {
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{ADDRESS}{path}"));
        let passed = [header::AUTHORIZATION, header::ACCEPT, header::IF_NONE_MATCH];
        for (name, value) in headers.iter().filter(|(name, _)| passed.contains(name)) {
            request = request.header(name, value);
        }
        let request = request.body(Empty::new()).expect("a request");
        let answer = match self.registry.request(request).await {
            Ok(answer) => answer,
            Err(error) => return plain(StatusCode::BAD_GATEWAY, &format!("registry: {error}")),
        };
        let (mut parts, body) = answer.into_parts();
        for hop_by_hop in [header::CONNECTION, header::TRANSFER_ENCODING] {
            parts.headers.remove(hop_by_hop);
        }
        match body.collect().await {
            Ok(body) => Response::from_parts(parts, body.to_bytes()),
            Err(error) => plain(StatusCode::BAD_GATEWAY, &format!("registry: {error}")),
        }
    }

    /// The CDN: files, for whoever has their address. Like the real one it refuses a request
    /// that carries credentials beside the signature in its address.
    fn cdn(&self, request: &Request<Incoming>) -> Response<Bytes> {
        if request.headers().contains_key(header::AUTHORIZATION) {
            return plain(
                StatusCode::BAD_REQUEST,
                "only one authentication mechanism allowed",
            );
        }
        let path = request
            .uri()
            .path()
            .strip_prefix("/registry-v2/")
            .unwrap_or_default();
        let signed = request
            .uri()
            .query()
            .is_some_and(|query| query.starts_with("verify="));
        if !signed || path.contains("..") {
            return plain(StatusCode::FORBIDDEN, "no signature");
        }
        let Ok(blob) = std::fs::read(self.storage.join(path)) else {
            return plain(StatusCode::NOT_FOUND, "no such file");
        };
        let blob = Bytes::from(blob);
        let answer = Response::builder()
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::ACCEPT_RANGES, "bytes");
        let range = request
            .headers()
            .get(header::RANGE)
            .and_then(|range| range.to_str().ok());
        let answer = match range.map(|range| parse_range(range, blob.len())) {
            None => answer.body(blob),
            Some(Some((first, last))) => answer
                .status(StatusCode::PARTIAL_CONTENT)
                .header(
                    header::CONTENT_RANGE,
                    format!("bytes {first}-{last}/{}", blob.len()),
                )
                .body(blob.slice(first..=last)),
            Some(None) => answer
                .status(StatusCode::RANGE_NOT_SATISFIABLE)
                .header(header::CONTENT_RANGE, format!("bytes */{}", blob.len()))
                .body(Bytes::new()),
        };
        answer.expect("a response")
    }
}

/// First and last byte of a `bytes=FIRST-[LAST]` range, the form that clients resume with.
fn parse_range(range: &str, length: usize) -> Option<(usize, usize)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let first: usize = first.parse().ok()?;
    let end = length.checked_sub(1)?;
    let last = if last.is_empty() {
        end
    } else {
        last.parse::<usize>().ok()?.min(end)
    };
    (first <= last).then_some((first, last))
}

/// The name that was asked under: HTTP/2 has it in the URI, HTTP/1.1 in a header.
fn host_of<B>(request: &Request<B>) -> String {
    let header = request
        .headers()
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let host = request.uri().host().or(header).unwrap_or_default();
    host.trim_end_matches(":443").to_owned()
}

fn plain(status: StatusCode, text: &str) -> Response<Bytes> {
    let body = Bytes::copy_from_slice(text.as_bytes());
    Response::builder()
        .status(status)
        .body(body)
        .expect("a response")
}

/// A body that counts what the connection takes of it, and may stop in the middle.
pub struct Counted {
    rest: Bytes,
    entry: Arc<Entry>,
    stop: Option<Stop>,
}

/// Where a body has to wait.
struct Stop {
    /// Bytes that are still sent before.
    left: usize,
    end: Pin<Box<dyn Future<Output = End> + Send>>,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        const FRAME: usize = 64 << 10;
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        let mut length = self.rest.len().min(FRAME);
        if let Some(stop) = &mut self.stop {
            if stop.left == 0 {
                let end = ready!(stop.end.as_mut().poll(context));
                self.stop = None;
                if end == End::Cut {
                    let cut = io::Error::other("cut by the test");
                    return Poll::Ready(Some(Err(cut)));
                }
            } else {
                length = length.min(stop.left);
                stop.left -= length;
            }
        }
        let frame = self.rest.split_to(length);
        self.entry.sent(length);
        Poll::Ready(Some(Ok(Frame::data(frame))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

/// TLS with HTTP/2 and HTTP/1.1, as the Hub offers it.
pub fn acceptor(
    (chain, key): &(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has the default protocol versions")
        .with_no_client_auth()
        .with_single_cert(chain.clone(), key.clone_key())
        .expect("a certificate and its key");
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

/// Serves until it is aborted, which closes the port and breaks every connection.
pub async fn serve(listener: TcpListener, acceptor: TlsAcceptor, front: Arc<Front>) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, peer) = listener
            .accept()
            .await
            .expect("accepting a connection to the Hub");
        connections.spawn(connection(
            stream,
            peer.ip(),
            acceptor.clone(),
            Arc::clone(&front),
        ));
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(stream: TcpStream, from: IpAddr, acceptor: TlsAcceptor, front: Arc<Front>) {
    let stream = match acceptor.accept(stream).await {
        Ok(stream) => stream,
        Err(error) => return eprintln!("the Hub: TLS with {from}: {error}"),
    };
    let service = service_fn(move |request| {
        let front = Arc::clone(&front);
        async move { Ok::<_, Infallible>(front.answer(from, request).await) }
    });
    let server = auto::Builder::new(TokioExecutor::new());
    // Clients come and go; what matters of it is in the record.
    server
        .serve_connection(TokioIo::new(stream), service)
        .await
        .ok();
}
