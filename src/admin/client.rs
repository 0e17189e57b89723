//! Asking a running agent: what `status` prints, and what the host's part decides by.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::config::{AdminAddress, Sources};

/// Where the unit's admin socket is, which someone at a shell has no `$RUNTIME_DIRECTORY` for.
pub const UNIT_SOCKET: &str = "/run/registry-agent/admin.sock";
const DEADLINE: Duration = Duration::from_secs(5);
/// The most that is read of an answer, in bytes.
const LIMIT: usize = 1024 * 1024;

/// Where the agent is that these sources configure: what runs as a unit has its socket where the
/// unit says, unless a configuration was named.
pub fn address(configured: AdminAddress, sources: &Sources) -> AdminAddress {
    let unit = Path::new(UNIT_SOCKET);
    let unnamed = sources.config.is_none() && sources.distribution.is_none();
    match configured {
        AdminAddress::Unix(path) if unnamed && !path.exists() && unit.exists() => {
            AdminAddress::Unix(unit.to_owned())
        }
        configured => configured,
    }
}

/// `/status` of the agent at this address, as it is sent. An error says what came back.
pub async fn status(admin: &AdminAddress) -> Result<Bytes, String> {
    let asked = async {
        match admin {
            AdminAddress::Tcp(address) => get(TcpStream::connect(address).await?).await,
            AdminAddress::Unix(path) => get(UnixStream::connect(path).await?).await,
        }
    };
    match tokio::time::timeout(DEADLINE, asked).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("it did not answer in {}s", DEADLINE.as_secs())),
    }
}

type Error = Box<dyn std::error::Error + Send + Sync>;

async fn get(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Result<Bytes, Error> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get("/status")
        .header("host", "registry-agent")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        return Err(format!("it answered {}", response.status()).into());
    }
    Ok(Limited::new(response.into_body(), LIMIT)
        .collect()
        .await?
        .to_bytes())
}
