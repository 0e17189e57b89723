//! Connections: many answers on one, in their order, whole or visibly not.

mod support;

use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};

use support::agent::{Agent, Setup};
use support::client::{Client, Connection, Reply};
use support::image::{Blob, Image, KIB, MIB};
use support::upstream::Upstream;
use support::{PATIENCE, eventually};

/// A request, and the status and body of its answer.
struct Exchange {
    method: &'static str,
    target: String,
    headers: Vec<(String, String)>,
    status: u16,
    body: Vec<u8>,
}

/// A mirror that has an image and three blobs of 0, 100,000 and 16 Mi bytes.
fn with_everything_cached() -> (Upstream, Agent, Image, [Blob; 3]) {
    let (hub, image) = (Upstream::start(), Image::small(1));
    let blobs = [
        Blob::new(1, 0),
        Blob::new(2, 100_000),
        Blob::new(3, 16 * MIB),
    ];
    hub.push("library/app", "latest", &image);
    for blob in &blobs {
        hub.push_blob("library/app", blob);
    }
    let agent = Setup::mirror(&hub).start();
    agent.pull("library/app", "latest", &image);
    for blob in &blobs {
        agent.get(&target(blob)).assert_is(&blob.bytes);
    }
    agent.wait_until_stored(blobs.iter().chain(image.blobs()));
    (hub, agent, image, blobs)
}

fn target(blob: &Blob) -> String {
    format!("/v2/library/app/blobs/{}", blob.digest)
}

/// Every kind of answer, each beside ones of another kind.
fn every_kind(image: &Image, [empty, medium, large]: &[Blob; 3]) -> Vec<Exchange> {
    let exchange = |method, blob: &Blob, header: Option<(&str, &str)>, status, body: &[u8]| {
        let headers = header.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Exchange {
            method,
            target: target(blob),
            headers: headers.into_iter().collect(),
            status,
            body: body.to_vec(),
        }
    };
    let range = |value| Some(("Range", value));
    let manifest = Exchange {
        method: "GET",
        target: "/v2/library/app/manifests/latest".to_owned(),
        headers: Vec::new(),
        status: 200,
        body: image.manifest.blob.bytes.to_vec(),
    };
    vec![
        exchange("GET", medium, None, 200, &medium.bytes),
        exchange("GET", empty, None, 200, b""),
        exchange(
            "GET",
            large,
            range("bytes=5000000-9999999"),
            206,
            &large.bytes[5_000_000..10_000_000],
        ),
        exchange("HEAD", large, None, 200, b""),
        manifest,
        exchange("GET", empty, range("bytes=0-"), 416, b""),
        exchange("GET", large, Some(("If-None-Match", "*")), 304, b""),
        exchange("GET", large, None, 200, &large.bytes),
        exchange(
            "GET",
            medium,
            range("bytes=-1"),
            206,
            &medium.bytes[99_999..],
        ),
        exchange("GET", medium, None, 200, &medium.bytes),
    ]
}

#[track_caller]
fn assert_answers(expected: &Exchange, reply: &Reply) {
    let Exchange {
        method,
        target,
        headers,
        ..
    } = expected;
    let what = format!("{method} {target} {headers:?}");
    assert_eq!(reply.status, expected.status, "{what}");
    // What an error says is for people.
    let right = expected.status >= 400 || reply.body == expected.body;
    assert!(
        reply.complete && right,
        "{what}: {} bytes",
        reply.body.len()
    );
}

#[test]
fn one_connection_carries_one_answer_after_another() {
    let (_hub, agent, image, blobs) = with_everything_cached();
    let mut connection = agent.registry().connect().unwrap();
    for _ in 0..3 {
        for expected in every_kind(&image, &blobs) {
            let sent = connection.send(expected.method, &expected.target, &expected.headers);
            let reply;
            (reply, connection) = sent.unwrap().response().unwrap().reuse();
            assert_answers(&expected, &reply);
        }
    }
}

#[test]
fn requests_that_are_sent_all_at_once_are_answered_in_their_order() {
    let (_hub, agent, image, blobs) = with_everything_cached();
    let mut connection = agent.registry().connect().unwrap();
    let exchanges = every_kind(&image, &blobs);
    for Exchange {
        method,
        target,
        headers,
        ..
    } in &exchanges
    {
        connection.write(method, target, headers).unwrap();
    }
    for expected in &exchanges {
        let reply;
        (reply, connection) = connection
            .expect(expected.method)
            .response()
            .unwrap()
            .reuse();
        assert_answers(expected, &reply);
    }
}

#[test]
fn readers_that_wait_get_the_same_bytes_as_those_that_do_not() {
    let (_hub, agent, _image, [_, _, large]) = with_everything_cached();
    let waiting = [(); 8].map(|()| agent.request("GET", &target(&large)).open());
    for _ in 0..3 {
        agent.get(&target(&large)).assert_is(&large.bytes);
    }
    for response in waiting {
        response.finish().assert_is(&large.bytes);
    }
}

#[test]
fn a_client_that_asks_for_it_finds_the_connection_closed_after_the_answer() {
    let (_hub, agent, _image, [_, medium, _]) = with_everything_cached();
    let request = agent
        .request("GET", &target(&medium))
        .header("Connection", "close");
    let (reply, mut connection) = request.open().reuse();
    reply.assert_is(&medium.bytes);
    assert!(connection.is_closed());
}

#[test]
fn a_file_that_shrinks_while_it_is_sent_ends_the_answer_short() {
    let (_hub, agent, _image, [_, medium, large]) = with_everything_cached();
    let mut response = agent.request("GET", &target(&large)).open();
    assert!(response.read(KIB) == large.bytes[..KIB]);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(agent.stored_blob(&large.digest));
    file.unwrap().set_len(MIB as u64).unwrap();
    let reply = response.finish();
    assert!(
        !reply.complete,
        "{} bytes that are in no file",
        reply.body.len()
    );
    assert!(reply.body == large.bytes[KIB..KIB + reply.body.len()]);
    agent.get(&target(&medium)).assert_is(&medium.bytes);
}

/// hyper's client, since this one is not written by hand.
#[test]
fn a_client_of_http_2_gets_the_same_answers() {
    let (_hub, agent, image, blobs) = with_everything_cached();
    let Client::Tcp(address) = agent.registry() else {
        panic!("a TCP listener")
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let asking = async {
        let stream = TokioIo::new(tokio::net::TcpStream::connect(address).await.unwrap());
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream)
            .await
            .unwrap();
        tokio::spawn(connection);
        for expected in every_kind(&image, &blobs) {
            let uri = format!("http://mirror.test{}", expected.target);
            let mut request = http::Request::builder().method(expected.method).uri(uri);
            for (name, value) in &expected.headers {
                request = request.header(name, value);
            }
            let request = request
                .body(http_body_util::Empty::<bytes::Bytes>::new())
                .unwrap();
            let response = sender.send_request(request).await.unwrap();
            let status = response.status().as_u16();
            let body = http_body_util::BodyExt::collect(response.into_body()).await;
            let body = body.unwrap().to_bytes().to_vec();
            let reply = Reply {
                status,
                headers: Vec::new(),
                body,
                complete: true,
            };
            assert_answers(&expected, &reply);
        }
    };
    runtime
        .block_on(async { tokio::time::timeout(PATIENCE, asking).await })
        .unwrap();
}

/// So many connections that say nothing.
fn idle(agent: &Agent, count: usize) -> Vec<Connection> {
    let connect = || agent.registry().connect().expect("a place in the queue");
    std::iter::repeat_with(connect).take(count).collect()
}

#[test]
fn idle_connections_leave_descriptors_for_admins_and_downloads() {
    let (hub, image) = (Upstream::start(), Image::new(1, &[MIB, MIB]));
    hub.push("library/app", "latest", &image);
    let agent = Setup::mirror(&hub).descriptors(96, 96).start();
    let (hello, mut client) = agent.request("GET", "/v2/").open().reuse();
    assert_eq!(hello.status, 200);
    // More than it may have descriptors.
    let _idle = idle(&agent, 110);
    eventually(PATIENCE, "they fill their places", || {
        agent.metric("registry_agent_connections") > 11.5
    });
    assert_eq!(agent.admin().get("/healthz").status, 200);
    let manifest = "/v2/library/app/manifests/latest".to_owned();
    let blobs = image.blobs().map(target);
    for target in std::iter::once(manifest).chain(blobs) {
        let response = client.send("GET", &target, &[]).unwrap().response();
        let (reply, connection) = response.unwrap().reuse();
        assert!(reply.status == 200 && reply.complete, "{target}");
        client = connection;
    }
    agent.wait_until_stored(image.blobs());
    let log = agent.log();
    assert!(log.contains("few clients can connect at once"), "{log}");
    assert!(!log.contains("could not be accepted"), "{log}");
}

#[test]
fn a_client_with_half_of_all_connections_gets_no_more_and_others_get_in() {
    let hub = Upstream::start();
    let agent = Setup::mirror(&hub).descriptors(96, 96).start();
    let _idle = idle(&agent, 110);
    eventually(PATIENCE, "all have a place or none", || {
        let sum = |names: [&str; 2]| names.map(|name| agent.metric(name)).iter().sum::<f64>();
        sum([
            "registry_agent_connections",
            "registry_agent_refused_connections_total",
        ]) > 109.5
    });
    let Client::Tcp(address) = agent.registry() else {
        panic!("a TCP listener")
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let asking = async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((support::own_address(), 0).into()).unwrap();
        let stream = TokioIo::new(socket.connect(address).await.unwrap());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::get("/").header("host", "mirror.test");
        let request = request.body(http_body_util::Empty::<bytes::Bytes>::new());
        sender
            .send_request(request.unwrap())
            .await
            .unwrap()
            .status()
    };
    let status = runtime.block_on(async { tokio::time::timeout(PATIENCE, asking).await });
    assert_eq!(status.unwrap(), 200);
}

#[test]
fn the_soft_limit_of_descriptors_is_raised_to_the_hard_one() {
    let hub = Upstream::start();
    let agent = Setup::mirror(&hub).descriptors(64, 1024).start();
    let _idle = idle(&agent, 110);
    eventually(PATIENCE, "all are accepted", || {
        agent.metric("registry_agent_connections") > 109.5
    });
}
