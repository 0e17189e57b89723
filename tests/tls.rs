//! TLS on the registry's port.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

mod support;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::sys::signal::Signal;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use support::agent::{Agent, Setup};
use support::client::{Client, Connection};
use support::image::{Image, KIB, MIB};
use support::upstream::{Authority, Issued, Upstream};
use support::{PATIENCE, eventually, write_file};

const YEAR: i32 = 2999;

/// What the loopback addresses of a test's agents are all named in one certificate.
fn issue(authority: &Authority, setup: &Setup, year: i32) -> Issued {
    authority.issue(&[&setup.address().to_string()], year)
}

/// Gives the agent a certificate of this authority.
fn with_tls(setup: Setup, authority: &Authority) -> Setup {
    let issued = issue(authority, &setup, YEAR);
    let certificate = setup.file("tls.crt", issued.certificate.as_bytes());
    let key = setup.file("tls.key", issued.key.as_bytes());
    setup
        .set("tls.certificate", certificate.display().to_string())
        .set("tls.key", key.display().to_string())
}

fn address(agent: &Agent) -> SocketAddr {
    let Client::Tcp(address) = agent.registry() else {
        panic!("a TCP listener")
    };
    address
}

fn client(agent: &Agent, config: &Arc<ClientConfig>) -> Client {
    Client::Tls(address(agent), Arc::clone(config))
}

/// The first certificate that the agent shows now.
fn shown(agent: &Agent, config: &Arc<ClientConfig>) -> Vec<u8> {
    let name = ServerName::from(address(agent).ip());
    let mut connection = ClientConnection::new(Arc::clone(config), name).unwrap();
    let mut socket = TcpStream::connect(address(agent)).unwrap();
    connection.complete_io(&mut socket).unwrap();
    connection.peer_certificates().unwrap()[0].to_vec()
}

fn blob(image: &Image) -> String {
    format!("/v2/library/app/blobs/{}", image.layer().digest)
}

#[test]
fn images_are_pulled_over_tls() {
    let (hub, authority) = (Upstream::start(), Authority::new());
    let image = Image::new(1, &[20 * MIB]);
    hub.push("library/app", "latest", &image);
    let agent = with_tls(Setup::mirror(&hub), &authority).start();
    let client = client(&agent, &authority.client(None, &[]));
    for target in ["/", "/v2/"] {
        assert_eq!(client.get(target).status, 200, "{target}");
    }
    client
        .get("/v2/library/app/manifests/latest")
        .assert_is(&image.manifest.blob.bytes);
    // While it arrives, and from the store.
    client.get(&blob(&image)).assert_is(&image.layer().bytes);
    agent_has(&agent, &image);
    client.get(&blob(&image)).assert_is(&image.layer().bytes);
    let whole = &image.layer().bytes;
    for (range, right) in [
        ("bytes=1000000-18000000", &whole[1_000_000..=18_000_000]),
        ("bytes=5000001-", &whole[5_000_001..]),
        ("bytes=-7000003", &whole[whole.len() - 7_000_003..]),
        ("bytes=0-0", &whole[..1]),
    ] {
        let request = client.request("GET", &blob(&image));
        let part = request.header("Range", range).send();
        assert!(
            part.status == 206 && part.complete && part.body == right,
            "{range}"
        );
    }
}

fn agent_has(agent: &Agent, image: &Image) {
    let path = agent.stored_blob(&image.layer().digest);
    eventually(PATIENCE, "its layer is stored", || path.exists());
}

#[test]
fn http_2_is_offered_and_spoken() {
    let (hub, authority) = (Upstream::start(), Authority::new());
    let image = Image::new(1, &[MIB]);
    hub.push("library/app", "latest", &image);
    let agent = with_tls(Setup::mirror(&hub), &authority).start();
    let config = authority.client(None, &["h2", "http/1.1"]);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let body = runtime.block_on(async {
        let socket = tokio::net::TcpStream::connect(address(&agent))
            .await
            .unwrap();
        let name = ServerName::from(address(&agent).ip());
        let connector = tokio_rustls::TlsConnector::from(config);
        let stream = connector.connect(name, socket).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let executor = TokioExecutor::new();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(executor, TokioIo::new(stream))
                .await
                .unwrap();
        tokio::spawn(connection);
        let uri = format!("https://{}{}", address(&agent), blob(&image));
        let request = http::Request::get(uri)
            .body(Empty::<bytes::Bytes>::new())
            .unwrap();
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.into_body().collect().await.unwrap().to_bytes()
    });
    assert!(body == image.layer().bytes);
}

#[test]
fn with_client_ca_only_clients_with_a_certificate_of_it_are_let_in() {
    let (hub, authority, other) = (Upstream::start(), Authority::new(), Authority::new());
    let image = Image::small(1);
    hub.push("library/app", "latest", &image);
    let setup = with_tls(Setup::mirror(&hub), &authority);
    let clients = Authority::new();
    let file = setup.folder().join("clients.crt");
    clients.write(&file);
    let agent = setup
        .set("tls.client_ca", file.display().to_string())
        .start();
    let known = clients.issue(&["alice"], YEAR);
    for (name, shown, let_in) in [
        ("nobody", None, false),
        ("a stranger", Some(other.issue(&["alice"], YEAR)), false),
        (
            "a client whose time is over",
            Some(clients.issue(&["alice"], 2020)),
            false,
        ),
        ("a client", Some(clients.issue(&["alice"], YEAR)), true),
    ] {
        let client = client(&agent, &authority.client(shown.as_ref(), &[]));
        let answer = client.request("GET", "/v2/").try_open();
        assert_eq!(
            answer.is_ok_and(|answer| answer.status == 200),
            let_in,
            "{name}"
        );
    }
    let config = agent.config_file().display().to_string();
    let certificate = agent.folder().join("alice.crt");
    let key = agent.folder().join("alice.key");
    write_file(&certificate, known.certificate.as_bytes());
    write_file(&key, known.key.as_bytes());
    let (certificate, key) = (certificate.display().to_string(), key.display().to_string());
    let identity = ["--client-certificate", &certificate, "--client-key", &key];
    for (identity, code) in [(&identity[..], 0), (&[], 1)] {
        let warm = [&["warm", "app", "--config", &config], identity].concat();
        let output = agent.command(&warm);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
    }
}

#[test]
fn warm_asks_an_agent_that_speaks_tls_and_no_other() {
    let (hub, authority) = (Upstream::start(), Authority::new());
    let image = Image::small(1);
    hub.push("library/app", "latest", &image);
    let setup = with_tls(Setup::mirror(&hub), &authority);
    let agent = setup.start();
    let config = agent.config_file().display().to_string();
    let warm = || agent.command(&["warm", "app", "--config", &config]);
    let output = warm();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    agent.wait_until_stored(image.blobs());
    // Another certificate of the same authority is another server.
    let other = authority.issue(&["127.0.0.1"], YEAR);
    write_file(
        &agent.folder().join("tls.crt"),
        other.certificate.as_bytes(),
    );
    write_file(&agent.folder().join("tls.key"), other.key.as_bytes());
    let output = warm();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(1) && said.contains("another certificate"),
        "{said}"
    );
}

#[test]
fn sighup_takes_a_renewed_certificate_over_and_keeps_the_old_one_if_it_is_broken() {
    let (hub, authority) = (Upstream::start(), Authority::new());
    let setup = with_tls(Setup::mirror(&hub), &authority);
    let renewed = issue(&authority, &setup, YEAR);
    let agent = setup.start();
    let config = authority.client(None, &[]);
    let open = client(&agent, &config).connect().unwrap();
    let again = |connection: Connection| {
        let (reply, connection) = connection
            .send("GET", "/v2/", &[])
            .and_then(support::client::Sent::response)
            .unwrap()
            .reuse();
        assert_eq!(reply.status, 200);
        connection
    };
    let open = again(open);
    let before = shown(&agent, &config);

    // A certificate without its key.
    write_file(
        &agent.folder().join("tls.crt"),
        renewed.certificate.as_bytes(),
    );
    agent.signal(Signal::SIGHUP);
    eventually(PATIENCE, "the log says what does not fit", || {
        agent.log().contains("is not the key of the certificate")
    });
    assert!(agent.log().contains("tls.key"), "{}", agent.log());
    assert!(shown(&agent, &config) == before, "the old one stays");

    write_file(&agent.folder().join("tls.key"), renewed.key.as_bytes());
    agent.signal(Signal::SIGHUP);
    eventually(PATIENCE, "the new one is shown", || {
        shown(&agent, &config) != before
    });
    assert_eq!(client(&agent, &config).get("/v2/").status, 200);
    // Who is connected stays so.
    again(open);
}

#[test]
fn plain_http_is_told_that_this_is_tls_and_anything_else_is_closed() {
    let (hub, authority) = (Upstream::start(), Authority::new());
    let agent = with_tls(Setup::mirror(&hub), &authority).start();
    let reply = agent.get("/v2/");
    assert_eq!(reply.status, 400);
    assert!(
        reply.complete && String::from_utf8_lossy(&reply.body).contains("https"),
        "{reply:?}"
    );
    let mut socket = TcpStream::connect(address(&agent)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.write_all(b"\0\0\0\0").unwrap();
    assert!(!matches!(socket.read(&mut [0]), Ok(1)), "it answered");
}

#[test]
fn clients_that_begin_no_handshake_hold_nobody_up_and_are_left() {
    let (hub, authority) = (Upstream::start(), Authority::new());
    let agent = with_tls(Setup::mirror(&hub), &authority).start();
    let silent: Vec<TcpStream> = std::iter::repeat_with(|| TcpStream::connect(address(&agent)))
        .take(50)
        .map(Result::unwrap)
        .collect();
    let config = authority.client(None, &[]);
    assert_eq!(client(&agent, &config).get("/v2/").status, 200);
    for mut socket in silent {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(socket.read(&mut [0]).ok(), Some(0), "it is closed");
    }
}

#[test]
fn sigterm_does_not_wait_for_clients_that_begin_no_handshake() {
    let (hub, authority) = (Upstream::start(), Authority::new());
    let agent = with_tls(Setup::mirror(&hub), &authority).start();
    let _silent = TcpStream::connect(address(&agent)).unwrap();
    eventually(PATIENCE, "it is accepted", || {
        agent.metric("registry_agent_connections") > 0.5
    });
    agent.signal(Signal::SIGTERM);
    let exit = agent.exit();
    assert_eq!(exit.status.code(), Some(0), "{}", exit.log);
    assert!(!exit.log.contains("broken off"), "{}", exit.log);
}

#[test]
fn files_that_can_not_be_used_are_named_before_anything_is_served() {
    let (hub, authority) = (Upstream::start(), Authority::new());
    for (file, content, says) in [
        ("tls.crt", "", "holds no certificate"),
        ("tls.key", "", "holds no private key"),
        ("tls.key", "-----BEGIN PRIVATE KEY-----\n", "is not PEM"),
        (
            "tls.key",
            &authority.issue(&["a"], YEAR).key,
            "is not the key of",
        ),
        ("clients.crt", "nonsense", "holds no certificate"),
    ] {
        let mut setup = with_tls(Setup::mirror(&hub), &authority);
        let path = setup.file(file, content.as_bytes()).display().to_string();
        if file == "clients.crt" {
            setup = setup.set("tls.client_ca", path.clone());
        }
        let exit = setup.run();
        assert_eq!(exit.status.code(), Some(2), "{file}: {}", exit.log);
        assert!(
            exit.log.contains(&path) && exit.log.contains(says),
            "{file}: {}",
            exit.log
        );
    }
}

#[test]
fn an_expired_certificate_is_served_and_warned_of_with_its_date() {
    let (hub, authority) = (Upstream::start(), Authority::new());
    let setup = with_tls(Setup::mirror(&hub), &authority);
    let expired = issue(&authority, &setup, 2020);
    setup.file("tls.crt", expired.certificate.as_bytes());
    setup.file("tls.key", expired.key.as_bytes());
    let agent = setup.start();
    let config = agent.config_file().display().to_string();
    let output = agent.command(&["check", "--config", &config]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    for said in [said, agent.log()] {
        assert!(
            said.contains("expired on 2020-12-31") && said.contains("tls.crt"),
            "{said}"
        );
    }
}

#[test]
fn distributions_keys_are_honoured() {
    let (hub, authority) = (Upstream::start(), Authority::new());
    let agent = with_tls(Setup::mirror(&hub), &authority).start();
    let file = agent.folder().join("config.yml");
    let folder = agent.folder().display();
    let text = format!(
        "version: 0.1\nstorage: filesystem\nhttp:\n  addr: :5000\n  tls:\n    \
         certificate: {folder}/tls.crt\n    key: {folder}/tls.key\n    \
         clientcas: [{folder}/tls.crt]\n    letsencrypt: {{ cachefile: /x }}\n\
         proxy: {{ remoteurl: https://registry-1.docker.io }}\n"
    );
    write_file(&file, text.as_bytes());
    let file = file.display().to_string();
    let output = agent.command(&["check", "--distribution-config", &file]);
    let (out, err) = (output.stdout, output.stderr);
    let (out, err) = (String::from_utf8_lossy(&out), String::from_utf8_lossy(&err));
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert!(
        out.contains(&format!("tls: {folder}/tls.crt, for clients of")),
        "{out}"
    );
    assert!(
        err.contains("http.tls.letsencrypt: no certificate is requested"),
        "{err}"
    );
}

/// A client that reads nothing of its answer; see `tests/abuse.rs` for plain HTTP.
#[test]
fn a_client_that_reads_nothing_is_disconnected() {
    let (hub, authority) = (Upstream::start(), Authority::new());
    let image = Image::new(1, &[20 * MIB]);
    hub.push("library/app", "latest", &image);
    let agent = with_tls(Setup::mirror(&hub), &authority)
        .set("clients.idle", support::agent::SHORT)
        .start();
    let name = ServerName::from(address(&agent).ip());
    let connection = ClientConnection::new(authority.client(None, &[]), name).unwrap();
    let socket = TcpStream::connect(address(&agent)).unwrap();
    let mut stream = StreamOwned::new(connection, socket);
    write!(stream, "GET {} HTTP/1.1\r\nHost: a\r\n\r\n", blob(&image)).unwrap();
    let mut head = vec![0; KIB];
    assert!(stream.read(&mut head).unwrap() > 0);
    eventually(PATIENCE, "it is disconnected", || {
        agent.metric("registry_agent_connections") < 0.5
    });
}
