//! Listening, and one task for each connection.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::Either;
use http::header::HOST;
use http::{Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::TcpUserTimeout;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};

use super::activity::Activity;
use super::peers::Peers;
use super::sendfile::{Outbox, SendfileStream};
use super::{Body, TEXT, tls};
use crate::health::OwnPort;
use crate::metrics::Metrics;
use crate::tls::LiveIdentity;

/// The most that is read of a head, in bytes.
const HEAD_LIMIT: u32 = 64 * 1024;
/// Answers at once on a connection of HTTP/2, of which each holds a piece of its body in memory.
/// docker asks for three layers at a time, containerd likewise.
const STREAMS: u32 = 32;
/// Bytes of an answer that HTTP/2 holds besides the piece it is sending.
const SEND_BUFFER: usize = 16 * 1024;
/// The pause after a failed accept: without it, running out of file descriptors burns a processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a client that has connected, and not asked anything, is waited for at the end. What it
/// sends at once is answered: to close a connection that was just accepted would be to refuse it.
const NEWCOMER: Duration = Duration::from_secs(1);
const NO_HOST: &str = "a request by HTTP/1.1 has exactly one Host header\n";

/// A socket that is listened on.
pub enum Listener {
    /// The registry's, and an admin listener on loopback.
    Tcp(TcpListener),
    /// The registry's, with TLS.
    Tls(TcpListener, Arc<LiveIdentity>),
    /// An admin listener's.
    Unix(UnixListener),
}

/// Whatever connection a listener gives.
enum Stream {
    Tcp(TcpStream),
    Tls(TcpStream, Arc<LiveIdentity>),
    Unix(UnixStream),
}

impl Stream {
    /// Whose it is; `None` for the agent itself, for a process of this host at a Unix socket, and for
    /// a client that has left already.
    fn client(&self, own_port: Option<&OwnPort>) -> Option<IpAddr> {
        match self {
            Self::Tcp(socket) | Self::Tls(socket, _) => {
                let (peer, local) = (socket.peer_addr().ok()?, socket.local_addr().ok()?);
                let own = own_port.is_some_and(|own| own.is_asking(peer, local));
                (!own).then(|| peer.ip())
            }
            Self::Unix(_) => None,
        }
    }
}

impl Listener {
    async fn accept(&self, idle: Duration) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => Ok(Stream::Tcp(prepare(listener.accept().await?.0, idle)?)),
            Self::Tls(listener, identity) => {
                let socket = prepare(listener.accept().await?.0, idle)?;
                Ok(Stream::Tls(socket, Arc::clone(identity)))
            }
            Self::Unix(listener) => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

fn prepare(socket: TcpStream, idle: Duration) -> io::Result<TcpStream> {
    // A head and the first bytes of a body go out at once, not after a round trip.
    socket.set_nodelay(true)?;
    // The kernel ends a connection whose client has read nothing of what waits for it for so long.
    // It alone can tell such a client from one that reads slowly: a socket is writable again only
    // when a third of its buffer is free, which may take a slow client minutes.
    let milliseconds = u32::try_from(idle.as_millis()).unwrap_or(u32::MAX);
    setsockopt(&socket, TcpUserTimeout, &milliseconds)?;
    Ok(socket)
}

/// How many connections there may be at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// Of all clients. More wait to be accepted.
    pub all: usize,
    /// Of one client, by its address: those behind one load balancer are one here. More are closed.
    pub each: usize,
}

/// How long clients are waited for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Before one that sends nothing where it is its turn, or reads nothing, is disconnected.
    pub idle: Duration,
    /// Before running answers are broken off at the end.
    pub drain: Duration,
}

/// Serves, so many `connections` at once, until `stop` is true, then lets running answers end.
/// Returns whether all of them did. Those of `own_port` are nobody's share.
pub async fn serve<F>(
    listener: Listener,
    connections: Places,
    answer: impl Fn(Request<Incoming>, Option<&Outbox>) -> F + Clone + Send + 'static,
    metrics: Arc<Metrics>,
    mut stop: watch::Receiver<bool>,
    limits: impl Fn() -> Limits,
    own_port: Option<OwnPort>,
) -> bool
where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(connections.all));
    let peers = Peers::new(connections.each);
    // Each connection has a sender until its first request.
    let (newcomer, mut newcomers) = mpsc::channel::<Infallible>(1);
    loop {
        let place = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            place = Arc::clone(&places).acquire_owned() => place,
        };
        let stream = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            accepted = listener.accept(limits().idle) => accepted,
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let client = stream.client(own_port.as_ref());
        let share = client.map(|client| peers.admit(client));
        if matches!(share, Some(None)) {
            // Not kept waiting: in the queue it would be in the way of others.
            metrics.refused_connections.inc();
            tracing::debug!("a client has its share of all connections, and gets no more");
            continue;
        }
        let (answer, metrics, watcher) = (answer.clone(), Arc::clone(&metrics), graceful.watcher());
        let (idle, mut stop) = (limits().idle, stop.clone());
        let newcomer = newcomer.clone();
        tokio::spawn(async move {
            let _held = (place, share);
            metrics.connections.inc();
            let activity = Activity::new(metrics.running.clone());
            match stream {
                Stream::Tcp(socket) => {
                    let (stream, outbox) = SendfileStream::new(socket);
                    connection(
                        stream,
                        Some(outbox),
                        answer,
                        watcher,
                        (activity, idle),
                        newcomer,
                    )
                    .await;
                }
                Stream::Tls(socket, identity) => {
                    let begun = tokio::select! {
                        () = async {
                            let _ = stop.wait_for(|stop| *stop).await;
                            tokio::time::sleep(NEWCOMER).await;
                        } => None,
                        begun = tls::accept(socket, &identity) => Some(begun),
                    };
                    match begun {
                        Some(Ok(stream)) => {
                            let stream = TokioIo::new(stream);
                            connection(stream, None, answer, watcher, (activity, idle), newcomer)
                                .await;
                        }
                        Some(Err(error)) => tracing::debug!(%error, "no TLS connection was made"),
                        None => {}
                    }
                }
                Stream::Unix(socket) => {
                    let stream = TokioIo::new(socket);
                    connection(stream, None, answer, watcher, (activity, idle), newcomer).await;
                }
            }
            metrics.connections.dec();
        });
    }
    // Nobody can connect from here on, or waits for the next process, where systemd holds the port.
    drop(listener);
    drop(newcomer);
    let drain = limits().drain;
    // It says that all of them have asked, or nothing.
    let _ = tokio::time::timeout(NEWCOMER.min(drain), newcomers.recv()).await;
    tokio::time::timeout(limits().drain, graceful.shutdown())
        .await
        .is_ok()
}

/// Whether a request names the host that it is for as it must, with exactly one `Host`, so that no
/// two servers on its way can take it for different ones. Source: RFC 9112, 3.2.
fn names_its_host<B>(request: &Request<B>) -> bool {
    if request.version() != Version::HTTP_11 {
        return true;
    }
    let mut named = request.headers().get_all(HOST).iter();
    named.next().is_some() && named.next().is_none()
}

/// Serves one connection to its end.
async fn connection<F>(
    stream: impl hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
    outbox: Option<Outbox>,
    answer: impl Fn(Request<Incoming>, Option<&Outbox>) -> F,
    watcher: Watcher,
    (activity, idle): (Activity, Duration),
    newcomer: mpsc::Sender<Infallible>,
) where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let requests = activity.clone();
    let newcomer = Mutex::new(Some(newcomer));
    let service = service_fn(move |request: Request<Incoming>| {
        let turn = requests.turn();
        newcomer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // A part of a file may take a slow client long, and there the kernel knows better.
        let counts_frames = request.version() > Version::HTTP_11;
        // Frames of HTTP/2 are interleaved and copied: an outbox is of no use to them.
        let outbox = outbox.as_ref().filter(|_| !counts_frames);
        let answer = if names_its_host(&request) {
            Either::Left(answer(request, outbox))
        } else {
            let refusal = Body::answer(StatusCode::BAD_REQUEST, TEXT, NO_HOST);
            Either::Right(std::future::ready(refusal))
        };
        answer.map(move |response| {
            Ok::<_, Infallible>(response.map(|body| body.taking(turn, counts_frames)))
        })
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        // A head is waited for as anything else is: below.
        .header_read_timeout(None)
        .max_buf_size(HEAD_LIMIT as usize)
        // A client that has said all it will may still listen.
        .half_close(true)
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(idle)
        .max_concurrent_streams(STREAMS)
        // A stream takes another piece when less than this is left of the one before.
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(HEAD_LIMIT);
    let served = watcher.watch(builder.serve_connection(stream, service));
    tokio::select! {
        served = served => if let Err(error) = served {
            // Mostly clients that left; what broke on our side is logged where it broke.
            tracing::debug!(error = &*error, "a connection ended early");
        },
        () = activity.passed(idle) => tracing::debug!("a client let its time pass"),
    }
}
