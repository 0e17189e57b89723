//! Clients that send too much, or nothing, or read nothing.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

mod support;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use http_body_util::Empty;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use support::agent::{Agent, Setup};
use support::client::Client;
use support::image::{Image, KIB, MIB};
use support::upstream::{On, Upstream};
use support::{PATIENCE, eventually};

/// Answers that a client may have at once.
const STREAMS: usize = 32;
/// More than the buffers of two sockets hold.
const LAYER: usize = 20 * MIB;
/// How long a client may be idle, as the agent is told it and as tests reckon with it.
const IDLE: (&str, Duration) = ("500ms", Duration::from_millis(500));

/// A mirror whose clients may be idle for a short time only, with a large layer in it.
fn mirror() -> (Upstream, Agent, String) {
    let (hub, image) = (Upstream::start(), Image::new(1, &[LAYER]));
    hub.push("library/app", "latest", &image);
    let agent = Setup::mirror(&hub).set("clients.idle", IDLE.0).start();
    let layer = format!("/v2/library/app/blobs/{}", image.layer().digest);
    (hub, agent, layer)
}

fn connect(agent: &Agent) -> TcpStream {
    let Client::Tcp(address) = agent.registry() else {
        panic!("a TCP listener")
    };
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Everything until the agent closes the connection.
#[track_caller]
fn rest(mut socket: TcpStream) -> String {
    let mut bytes = Vec::new();
    match socket.read_to_end(&mut bytes) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            panic!("the connection stays open")
        }
        // However it ends.
        _ => String::from_utf8_lossy(&bytes).into_owned(),
    }
}

#[track_caller]
fn all_have_left(agent: &Agent) {
    eventually(PATIENCE, "no connection is left", || {
        agent.metric("registry_agent_connections") < 0.5
    });
}

#[test]
fn a_head_that_is_too_large_is_431_and_no_more_of_it_is_read() {
    let (_hub, agent, _) = mirror();
    let long = "a".repeat(128 * KIB);
    let many = "X-A: b\r\n".repeat(1000);
    for head in [format!("X-Long: {long}\r\n"), many] {
        let mut socket = connect(&agent);
        // What is too much may be refused before it has been sent.
        let _ = socket.write_all(format!("GET /v2/ HTTP/1.1\r\nHost: a\r\n{head}\r\n").as_bytes());
        let answer = rest(socket);
        assert!(
            answer.starts_with("HTTP/1.1 431 "),
            "{} bytes of head: {answer:?}",
            head.len()
        );
    }
    assert_eq!(agent.get("/v2/").status, 200);
}

#[test]
fn who_sends_no_request_or_half_of_one_is_disconnected() {
    let (_hub, agent, _) = mirror();
    for half in [
        "",
        "PRI * HTTP/2",
        "GET /v2/ HTT",
        "GET /v2/ HTTP/1.1\r\nHost: a\r\n",
    ] {
        let mut socket = connect(&agent);
        socket.write_all(half.as_bytes()).unwrap();
        let answer = rest(socket);
        assert!(!answer.contains("200"), "{half:?}: {answer}");
    }
}

#[test]
fn who_keeps_a_connection_without_another_request_is_disconnected() {
    let (_hub, agent, _) = mirror();
    let mut socket = connect(&agent);
    socket
        .write_all(b"GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    assert!(rest(socket).starts_with("HTTP/1.1 200 "));
}

#[test]
fn who_reads_nothing_of_an_answer_is_disconnected_and_others_are_served() {
    let (_hub, agent, layer) = mirror();
    let stuck: Vec<_> = (0..20)
        .map(|_| agent.request("GET", &layer).begin().unwrap())
        .collect();
    eventually(PATIENCE, "all are connected", || {
        agent.metric("registry_agent_connections") > 19.5
    });
    let whole = agent.get(&layer);
    assert!(whole.complete && whole.body.len() == LAYER);
    all_have_left(&agent);
    drop(stuck);
}

/// So slow that the agent can't write for longer than a client may read nothing.
#[test]
#[expect(
    clippy::disallowed_methods,
    reason = "the pauses of a slow reader are what is tested"
)]
fn who_reads_slowly_and_steadily_gets_all_of_it() {
    let (_hub, agent, layer) = mirror();
    let whole = agent.get(&layer).body;
    // From the store: what is still on its way would be the upstream's pace.
    let mut response = agent.request("GET", &layer).open();
    let (mut slowly, began) = (Vec::new(), Instant::now());
    while began.elapsed() < 6 * IDLE.1 {
        slowly.extend(response.read(64 * KIB));
        std::thread::sleep(IDLE.1 / 10);
    }
    let rest = response.finish();
    assert!(rest.complete && [slowly, rest.body].concat() == whole);
}

#[test]
fn a_body_that_comes_with_a_request_is_not_read() {
    let (_hub, agent, _) = mirror();
    for method in ["GET", "HEAD", "POST", "PUT"] {
        let mut socket = connect(&agent);
        let length = 1024 * MIB;
        let head = format!("{method} /v2/ HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
        socket.write_all(head.as_bytes()).unwrap();
        let piece = vec![0; MIB];
        // The agent closes the connection long before the end.
        let sent = (0..1024)
            .take_while(|_| socket.write_all(&piece).is_ok())
            .count();
        assert!(sent < 64, "{method}: it took {sent} MiB");
    }
    assert_eq!(agent.get("/v2/").status, 200);
}

/// By HTTP/2 a client can answer pings, and still ask for nothing, or take nothing of an answer.
#[test]
fn http_2_is_no_way_to_stay() {
    let (_hub, agent, layer) = mirror();
    let Client::Tcp(address) = agent.registry() else {
        panic!("a TCP listener")
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        for takes_nothing in [false, true] {
            let socket = tokio::net::TcpStream::connect(address).await.unwrap();
            let executor = TokioExecutor::new();
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(executor, TokioIo::new(socket))
                    .await
                    .unwrap();
            let ended = tokio::spawn(connection);
            let target = if takes_nothing { &layer } else { "/v2/" };
            let uri = format!("http://{address}{target}");
            let request = http::Request::get(uri).body(Empty::<bytes::Bytes>::new());
            let answer = sender.send_request(request.unwrap()).await.unwrap();
            assert_eq!(answer.status(), 200);
            let ended = tokio::time::timeout(PATIENCE, ended).await;
            assert!(ended.is_ok(), "it stays, taking nothing: {takes_nothing}");
            drop(answer);
        }
    });
}

/// Clients that open their windows wide and take nothing of many answers cost the agent a piece of
/// each, however large the windows are.
#[test]
fn http_2_is_no_way_to_have_much_held_in_memory() {
    let (hub, image) = (Upstream::start(), Image::new(1, &[LAYER]));
    hub.push("library/app", "latest", &image);
    let agent = Setup::mirror(&hub).start();
    let layer = format!("/v2/library/app/blobs/{}", image.layer().digest);
    agent.get(&layer).assert_is(&image.layer().bytes);
    let Client::Tcp(address) = agent.registry() else {
        panic!("a TCP listener")
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let connections = runtime.block_on(async {
        let mut connections = Vec::new();
        for _ in 0..8 {
            let socket = tokio::net::TcpStream::connect(address).await.unwrap();
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .initial_stream_window_size(1 << 30)
                .initial_connection_window_size(1 << 30);
            let (sender, mut connection) = builder.handshake(TokioIo::new(socket)).await.unwrap();
            let requests = (0..STREAMS).map(|_| {
                let request = http::Request::get(format!("http://{address}{layer}"));
                let mut sender = sender.clone();
                async move {
                    let request = request.body(Empty::<bytes::Bytes>::new()).unwrap();
                    sender.send_request(request).await.unwrap()
                }
            });
            // The connection is driven until all answers have begun, and not any more after that.
            let answers = tokio::select! {
                answers = futures_util::future::join_all(requests) => answers,
                _ = &mut connection => panic!("the connection ended"),
            };
            connections.push((answers, connection, sender));
        }
        connections
    });
    // The agent sends until all that is between it and the clients is full.
    let (mut sent, mut since) = (0.0, 0);
    eventually(PATIENCE, "no more is sent", || {
        let before =
            std::mem::replace(&mut sent, agent.metric("registry_agent_served_bytes_total"));
        since = if sent > before { 0 } else { since + 1 };
        since > 50
    });
    let held = agent.peak_memory();
    assert!(held < 96 * MIB, "{} MiB", held / MIB);
    drop(connections);
}

/// What takes the agent long is not the client's fault.
#[test]
fn who_waits_for_the_upstream_is_not_disconnected() {
    let (hub, agent, layer) = mirror();
    let gate = hub.hold(On::get(&layer), 4 * MIB);
    let mut response = agent.request("GET", &layer).open();
    gate.reached();
    // All there is: who leaves some of it is one who reads nothing.
    let read = response.read_until_silence().len();
    // Others' time passes meanwhile.
    rest(connect(&agent));
    rest(connect(&agent));
    gate.open();
    let reply = response.finish();
    assert!(reply.complete && read + reply.body.len() == LAYER);
}
