//! Asking a running agent: what `status` prints, and what the host's part decides by.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::request::Builder;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::config::{AdminAddress, Sources};
use crate::store::upload::UploadId;

/// Where the unit's admin socket is, which someone at a shell has no `$RUNTIME_DIRECTORY` for.
pub const UNIT_SOCKET: &str = "/run/registry-agent/admin.sock";
const DEADLINE: Duration = Duration::from_secs(5);
/// A storage with millions of links on a slow disk is read in this time.
const COLLECTED: Duration = Duration::from_hours(6);
/// The most that is read of an answer, in bytes.
const LIMIT: usize = 1024 * 1024;
/// The same of what was collected: ten thousand names.
const COLLECTED_LIMIT: usize = 16 * 1024 * 1024;

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
    let request = Request::get("/status");
    ask(admin, request, DEADLINE, LIMIT).await
}

/// Has the agent at this address remove what nobody needs, or say what that is; `proof` names a file
/// in its storage. An error says what came back.
pub async fn collect(
    admin: &AdminAddress,
    proof: &UploadId,
    dry_run: bool,
) -> Result<Bytes, String> {
    let dry_run = if dry_run { "&dry-run" } else { "" };
    let target = format!("{}?proof={proof}{dry_run}", super::collect::PATH);
    let request = Request::post(&target);
    ask(admin, request, COLLECTED, COLLECTED_LIMIT).await
}

async fn ask(
    admin: &AdminAddress,
    request: Builder,
    deadline: Duration,
    limit: usize,
) -> Result<Bytes, String> {
    let asked = async {
        match admin {
            AdminAddress::Tcp(address) => {
                send(TcpStream::connect(address).await?, request, limit).await
            }
            AdminAddress::Unix(path) => {
                send(UnixStream::connect(path).await?, request, limit).await
            }
        }
    };
    match tokio::time::timeout(deadline, asked).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("it did not answer in {}s", deadline.as_secs())),
    }
}

type Error = Box<dyn std::error::Error + Send + Sync>;

async fn send(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Builder,
    limit: usize,
) -> Result<Bytes, Error> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = request
        .header("host", "registry-agent")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), limit).collect().await?;
    let body = body.to_bytes();
    if status != StatusCode::OK {
        let text = String::from_utf8_lossy(&body);
        return Err(format!("it answered {status}: {}", text.trim()).into());
    }
    Ok(body)
}
