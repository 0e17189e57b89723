//! A real request to this agent's own registry: whether it accepts, speaks TLS, and answers.

use std::error::Error;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;

use crate::tls;

/// The agent's own registry, as a client on this host sees it. Cheap to clone.
#[derive(Clone)]
pub struct OwnPort {
    addresses: Arc<[SocketAddr]>,
    tls: Option<TlsConnector>,
    /// The local port that it was asked from last; 0 before.
    from: Arc<AtomicU16>,
}

pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

impl OwnPort {
    /// The registry that listens on `local`.
    pub fn new(local: SocketAddr, speaks_tls: bool) -> Result<Self, rustls::Error> {
        let loopback: &[IpAddr] = match local.ip() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => &[IpAddr::V4(Ipv4Addr::LOCALHOST)],
            // Whether it takes IPv4 as well is the system's setting (net.ipv6.bindv6only).
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => &[
                IpAddr::V4(Ipv4Addr::LOCALHOST),
                IpAddr::V6(Ipv6Addr::LOCALHOST),
            ],
            _ => &[],
        };
        let addresses = if loopback.is_empty() {
            vec![local]
        } else {
            let with_port = |ip: &IpAddr| SocketAddr::new(*ip, local.port());
            loopback.iter().map(with_port).collect()
        };
        let tls = if speaks_tls {
            Some(TlsConnector::from(Arc::new(tls::trusting_anybody()?)))
        } else {
            None
        };
        Ok(Self {
            addresses: addresses.into(),
            tls,
            from: Arc::default(),
        })
    }

    /// Whether a connection that the registry has accepted is the one that asks: it must not be
    /// refused because this host's other processes have their share of all connections.
    pub fn is_asking(&self, peer: SocketAddr, local: SocketAddr) -> bool {
        let [peer_ip, local_ip] = [peer, local].map(|it| it.ip().to_canonical());
        let from_here = peer_ip == local_ip || (peer_ip.is_loopback() && local_ip.is_loopback());
        from_here && peer.port() == self.from.load(Ordering::Relaxed)
    }

    /// Asks once, on a new connection. Any answer is one: what it says is not the question.
    pub async fn answers(&self) -> Result<(), String> {
        match self.ask().await {
            Ok(()) => Ok(()),
            // Such as: no certificate of an authority in `tls.client_ca` was shown.
            Err(error) if is_alert(&*error) => Ok(()),
            Err(error) => {
                let why = error
                    .source()
                    .map_or(String::new(), |why| format!(": {why}"));
                Err(format!("{}: {error}{why}", self.addresses[0]))
            }
        }
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in &*self.addresses {
            let connected = async {
                let (socket, port) = socket_to(*address)?;
                self.from.store(port, Ordering::Relaxed);
                socket.connect(*address).await
            };
            match connected.await {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    async fn ask(&self) -> Result<(), BoxError> {
        let socket = self.connect().await?;
        match &self.tls {
            None => head(socket).await?,
            Some(tls) => {
                let name = ServerName::try_from("localhost")?;
                head(tls.connect(name, socket).await?).await?
            }
        };
        Ok(())
    }
}

/// A socket, and the local port that it has before it connects.
fn socket_to(address: SocketAddr) -> io::Result<(TcpSocket, u16)> {
    let (socket, any): (_, IpAddr) = match address {
        SocketAddr::V4(_) => (TcpSocket::new_v4()?, Ipv4Addr::UNSPECIFIED.into()),
        SocketAddr::V6(_) => (TcpSocket::new_v6()?, Ipv6Addr::UNSPECIFIED.into()),
    };
    socket.bind((any, 0).into())?;
    let port = socket.local_addr()?.port();
    Ok((socket, port))
}

/// What a registry answers to `HEAD /` on a connection of its own.
pub(crate) async fn head(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<StatusCode, BoxError> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::head("/").header("host", "registry-agent");
    let answer = sender.send_request(request.body(Empty::<Bytes>::new())?);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        answer = answer => Ok(answer?.status()),
        ended = &mut connection => Err(match ended {
            Ok(()) => "the connection was closed without an answer".into(),
            Err(error) => error.into(),
        }),
    }
}

/// Whether the other side has ended the TLS connection by saying why.
pub(crate) fn is_alert(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let within = error.downcast_ref::<std::io::Error>();
        let within = within.and_then(|error| error.get_ref()?.downcast_ref());
        if let Some(rustls::Error::AlertReceived(_)) = error.downcast_ref().or(within) {
            return true;
        }
        next = error.source();
    }
    false
}
