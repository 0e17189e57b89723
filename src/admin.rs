//! The admin listener: `/healthz`, `/readyz`, `/metrics`, `/status`. Read only but for
//! [`collect`], and never on the registry's port: what it tells is for the people of this host.

pub mod client;
mod collect;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use http::header::ALLOW;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use tokio::net::{TcpListener, UnixListener};

use crate::agent::Shared;
use crate::config::AdminAddress;
use crate::registry::server::Listener;
use crate::registry::{Body, TEXT};
use crate::status::Status;
use crate::systemd::listen::Passed;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Listens on the admin address, or takes the socket that does so already. With the path to remove
/// at the end: that of a socket which was passed stays, for the next process.
pub async fn listen(
    address: &AdminAddress,
    passed: &mut Passed,
) -> io::Result<(Listener, Option<PathBuf>)> {
    match address {
        AdminAddress::Tcp(address) => {
            let listener = match passed.take_tcp(*address) {
                Some(passed) => TcpListener::from_std(passed)?,
                None => TcpListener::bind(address).await?,
            };
            Ok((Listener::Tcp(listener), None))
        }
        AdminAddress::Unix(path) => match passed.take_unix(path) {
            Some(passed) => Ok((Listener::Unix(UnixListener::from_std(passed)?), None)),
            None => Ok((Listener::Unix(listen_unix(path)?), Some(path.clone()))),
        },
    }
}

fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    // A process that was killed leaves its socket's name, on which nobody listens. Whether somebody
    // does is only known by trying.
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(io::Error::from(io::ErrorKind::AddrInUse)),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    // It only tells, and has no secret to tell: any user of the host may look.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Answers one request; never fails.
pub async fn answer<B>(request: Request<B>, shared: Arc<Shared>) -> Response<Body> {
    if request.uri().path() == collect::PATH && request.method() == Method::POST {
        return collect::answer(request.uri().query(), &shared).await;
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let status = StatusCode::METHOD_NOT_ALLOWED;
        let mut response = Body::answer(status, TEXT, "GET and HEAD only\n");
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let mut response = match request.uri().path() {
        // Alive is who answers.
        "/healthz" => Body::answer(StatusCode::OK, TEXT, "alive\n"),
        "/readyz" => {
            let health = shared.health.borrow().clone();
            if health.ready {
                Body::answer(StatusCode::OK, TEXT, "ready\n")
            } else {
                let problems = health.problems.join("\n");
                let text = format!("not ready\n{problems}\n");
                Body::answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
            }
        }
        "/metrics" => Body::answer(StatusCode::OK, OPENMETRICS, shared.metrics.encode()),
        "/status" => {
            let status = Status::now(&shared).await;
            let body = serde_json::to_string_pretty(&status).unwrap_or_default();
            Body::answer(StatusCode::OK, "application/json", body + "\n")
        }
        _ => Body::answer(
            StatusCode::NOT_FOUND,
            TEXT,
            "the pages here are /healthz, /readyz, /metrics and /status\n",
        ),
    };
    if request.method() == Method::HEAD {
        *response.body_mut() = Body::empty();
    }
    response
}
