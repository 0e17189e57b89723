//! The admin listener: `/healthz`, `/readyz`, `/metrics`, `/status`. Read only, and never on the
//! registry's port: what it tells is for the people of this host.

pub mod client;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use tokio::net::{TcpListener, UnixListener};

use crate::agent::Shared;
use crate::config::AdminAddress;
use crate::registry::Body;
use crate::registry::server::Listener;
use crate::status::Status;
use crate::systemd::listen::Passed;

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
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(
            StatusCode::METHOD_NOT_ALLOWED,
            "GET and HEAD only\n".to_owned(),
        );
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let mut response = match request.uri().path() {
        // Alive is who answers.
        "/healthz" => text(StatusCode::OK, "alive\n".to_owned()),
        "/readyz" => {
            let health = shared.health.borrow().clone();
            if health.ready {
                text(StatusCode::OK, "ready\n".to_owned())
            } else {
                let problems = health.problems.join("\n");
                text(
                    StatusCode::SERVICE_UNAVAILABLE,
                    format!("not ready\n{problems}\n"),
                )
            }
        }
        "/metrics" => {
            let mut response = text(StatusCode::OK, shared.metrics.encode());
            response.headers_mut().insert(
                CONTENT_TYPE,
                HeaderValue::from_static(
                    "application/openmetrics-text; version=1.0.0; charset=utf-8",
                ),
            );
            response
        }
        "/status" => {
            let status = Status::now(&shared).await;
            let body = serde_json::to_string_pretty(&status).unwrap_or_default();
            let mut response = text(StatusCode::OK, body + "\n");
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(CONTENT_TYPE, json);
            response
        }
        _ => text(
            StatusCode::NOT_FOUND,
            "the pages here are /healthz, /readyz, /metrics and /status\n".to_owned(),
        ),
    };
    if request.method() == Method::HEAD {
        *response.body_mut() = Body::empty();
    }
    response
}

fn text(status: StatusCode, body: String) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    headers.insert(CONTENT_LENGTH, body.len().into());
    *response.body_mut() = Body::full(Bytes::from(body));
    response
}
