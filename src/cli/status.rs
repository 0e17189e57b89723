//! `registry-agent status`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::{fail, print};
use crate::config::{self, AdminAddress, Loaded, Sources};
use crate::status::Status;

/// Where the unit's admin socket is, which someone at a shell has no `$RUNTIME_DIRECTORY` for.
const UNIT_SOCKET: &str = "/run/registry-agent/admin.sock";
const DEADLINE: Duration = Duration::from_secs(5);
const LIMIT: usize = 1024 * 1024;

/// Asks the running agent. Exit code 0: ready; 3: running, not ready; 1: not to be reached; 2: the
/// configuration.
pub(super) fn status(sources: &Sources, json: bool) -> ExitCode {
    let unit = Path::new(UNIT_SOCKET);
    let unnamed = sources.config.is_none() && sources.distribution.is_none();
    let admin = match config::load(sources) {
        // What runs as a unit has its socket where the unit says.
        Ok(Loaded { settings, .. }) => match settings.admin {
            AdminAddress::Unix(path) if unnamed && !path.exists() && unit.exists() => {
                AdminAddress::Unix(unit.to_owned())
            }
            admin => admin,
        },
        // The running agent has read its configuration; whoever asks may not be allowed to (a
        // password file), or it has been broken since.
        Err(_) if unnamed && unit.exists() => AdminAddress::Unix(unit.to_owned()),
        Err(errors) => return fail(&errors, 2),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    let answer = runtime.block_on(async {
        match tokio::time::timeout(DEADLINE, ask(&admin)).await {
            Ok(answer) => answer,
            Err(_) => Err("it did not answer in 5s".into()),
        }
    });
    let body = match answer {
        Ok(body) => body,
        Err(error) => {
            let error = format!(
                "can't ask the agent at {admin}: {error}\nIs it running? `systemctl status \
                 registry-agent`; if it has a configuration of its own, name it with --config."
            );
            return fail(&error, 1);
        }
    };
    let status: Status = match serde_json::from_slice(&body) {
        Ok(status) => status,
        Err(error) => {
            return fail(&format!("{admin} answered something else: {error}"), 1);
        }
    };
    print(&if json {
        String::from_utf8_lossy(&body).into_owned()
    } else {
        status.to_string()
    });
    if status.ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    }
}

type Error = Box<dyn std::error::Error + Send + Sync>;

async fn ask(admin: &AdminAddress) -> Result<Bytes, Error> {
    match admin {
        AdminAddress::Tcp(address) => get(TcpStream::connect(address).await?).await,
        AdminAddress::Unix(path) => get(UnixStream::connect(path).await?).await,
    }
}

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
