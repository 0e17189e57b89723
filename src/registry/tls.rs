//! The beginning of a TLS connection.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::tls::LiveIdentity;

/// How long a client may take for its part of the handshake.
const DEADLINE: Duration = Duration::from_secs(10);
/// What every TLS connection begins with. Source: RFC 8446, 5.1.
const HANDSHAKE: u8 = 22;
/// What is read of a request that is not answered, in bytes.
const UNREAD_LIMIT: u64 = 64 * 1024;
const PLAIN_HTTP: &[u8] = b"HTTP/1.1 400 Bad Request\r\n\
    Content-Type: text/plain; charset=utf-8\r\n\
    Content-Length: 38\r\n\
    Connection: close\r\n\
    \r\n\
    this port speaks TLS: ask it by https\n";

/// Makes TLS of a connection. A client that speaks HTTP is told so, which its user sees.
pub(super) async fn accept(
    socket: TcpStream,
    identity: &LiveIdentity,
) -> io::Result<TlsStream<TcpStream>> {
    match tokio::time::timeout(DEADLINE, begin(socket, identity)).await {
        Ok(begun) => begun,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

async fn begin(mut socket: TcpStream, identity: &LiveIdentity) -> io::Result<TlsStream<TcpStream>> {
    let mut first = [0];
    let length = socket.peek(&mut first).await?;
    if length == 1 && first[0].is_ascii_uppercase() {
        socket.write_all(PLAIN_HTTP).await?;
        socket.shutdown().await?;
        // To close what was not read would reset the connection, and take the answer back.
        let mut unread = socket.take(UNREAD_LIMIT);
        tokio::io::copy(&mut unread, &mut tokio::io::sink()).await?;
        return Err(io::Error::new(io::ErrorKind::InvalidData, "plain HTTP"));
    }
    if length == 1 && first[0] != HANDSHAKE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not TLS"));
    }
    TlsAcceptor::from(identity.config()).accept(socket).await
}
