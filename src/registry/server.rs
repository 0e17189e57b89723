//! Listening, and one task for each connection.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

use super::Body;
use super::sendfile::{Outbox, SendfileStream};
use crate::metrics::Metrics;

/// How long a client may take to send the head of a request, and to begin the next.
const HEAD_DEADLINE: Duration = Duration::from_mins(1);
/// The most that is read of a head, in bytes.
const HEAD_LIMIT: u32 = 64 * 1024;
/// Connections at once. More wait to be accepted: each costs memory and a file descriptor.
const CONNECTIONS: usize = 4096;
/// The pause after a failed accept: without it, running out of file descriptors burns a processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A socket that is listened on.
pub enum Listener {
    /// The registry's, and an admin listener on loopback.
    Tcp(TcpListener),
    /// An admin listener's.
    Unix(UnixListener),
}

/// Whatever connection a listener gives.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    async fn accept(&self) -> std::io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // A head and the first bytes of a body go out at once, not after a round trip.
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(listener) => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

/// Serves until `stop` is true, then lets running answers end for at most `drain`. Returns whether
/// all of them did.
pub async fn serve<F>(
    listener: Listener,
    answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    metrics: Arc<Metrics>,
    mut stop: watch::Receiver<bool>,
    drain: impl Fn() -> Duration,
) -> bool
where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let place = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            place = Arc::clone(&places).acquire_owned() => place,
        };
        let stream = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (answer, metrics, watcher) = (answer.clone(), Arc::clone(&metrics), graceful.watcher());
        tokio::spawn(async move {
            let _place = place;
            metrics.connections.inc();
            match stream {
                Stream::Tcp(socket) => {
                    let (stream, outbox) = SendfileStream::new(socket);
                    connection(stream, Some(outbox), answer, watcher).await;
                }
                Stream::Unix(socket) => {
                    connection(TokioIo::new(socket), None, answer, watcher).await;
                }
            }
            metrics.connections.dec();
        });
    }
    // Nobody can connect from here on.
    drop(listener);
    tokio::time::timeout(drain(), graceful.shutdown())
        .await
        .is_ok()
}

/// Serves one connection to its end.
async fn connection<F>(
    stream: impl hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
    outbox: Option<Outbox>,
    answer: impl Fn(Request<Incoming>) -> F,
    watcher: Watcher,
) where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let service = service_fn(move |mut request: Request<Incoming>| {
        // Frames of HTTP/2 are interleaved and copied: an outbox is of no use to them.
        if request.version() <= Version::HTTP_11
            && let Some(outbox) = &outbox
        {
            request.extensions_mut().insert(outbox.clone());
        }
        let answer = answer(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(HEAD_LIMIT as usize)
        // A client that has said all it will may still listen.
        .half_close(true)
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(HEAD_DEADLINE)
        .max_header_list_size(HEAD_LIMIT);
    if let Err(error) = watcher
        .watch(builder.serve_connection(stream, service))
        .await
    {
        // Mostly clients that left; what broke on our side is logged where it broke.
        tracing::debug!(error = &*error, "a connection ended early");
    }
}
