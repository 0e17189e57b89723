//! The upstream that the other tests rely on: that it speaks Docker Hub's protocol, and goes wrong
//! exactly as it is told.

mod support;

use support::client::{Client, Reply, Request};
use support::image::{Image, KIB};
use support::upstream::{ALWAYS, Fault, On, Role, Upstream};

fn client(url: &str) -> Client {
    let address = url
        .strip_prefix("http://")
        .and_then(|address| address.parse().ok());
    Client::Tcp(address.expect("a URL with a port"))
}

/// A request as a good client makes it, with a token for `name`.
fn authorized(hub: &Upstream, name: &str, method: &str, target: &str) -> Request {
    let token = client(hub.url())
        .get(&format!("/token?scope=repository:{name}:pull"))
        .json();
    let token = token["token"].as_str().expect("a token");
    let request = client(hub.url())
        .request(method, target)
        .header("Accept-Encoding", "identity");
    request.header("Authorization", &format!("Bearer {token}"))
}

/// The layer of an image of 100 KiB, by a good client, from an open registry.
fn blob(hub: &Upstream, image: &Image) -> Request {
    let target = format!("/v2/a/blobs/{}", image.layer().digest);
    client(hub.url())
        .request("GET", &target)
        .header("Accept-Encoding", "identity")
}

fn with_image() -> (Upstream, Image) {
    let (hub, image) = (
        Upstream::options().open().start(),
        Image::new(1, &[100 * KIB]),
    );
    hub.push("a", "latest", &image);
    (hub, image)
}

#[test]
fn a_manifest_needs_a_token_for_its_repository() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    hub.push("library/a", "latest", &image);
    hub.push("library/b", "latest", &image);
    let target = "/v2/library/a/manifests/latest";

    let refused = client(hub.url()).get(target);
    let challenge = refused.header("www-authenticate").unwrap().to_owned();
    assert_eq!(refused.status, 401);
    assert!(challenge.starts_with(&format!("Bearer realm=\"{}/token\"", hub.url())));
    assert!(challenge.ends_with(r#"scope="repository:library/a:pull""#));

    assert_eq!(
        authorized(&hub, "library/b", "GET", target).send().status,
        401
    );
    let served = authorized(&hub, "library/a", "GET", target).send();
    served.assert_is(&image.manifest.blob.bytes);
    assert_eq!(served.header("docker-content-digest"), Some(image.digest()));
    hub.revoke_tokens();
    assert_eq!(hub.count("GET", "/token"), 2);
}

#[test]
fn a_private_repository_is_for_the_account_only() {
    let hub = Upstream::options().account("user", "secret").start();
    hub.push("private/a", "latest", &Image::small(1));
    hub.make_private("private/a");
    let target = "/v2/private/a/manifests/latest";
    assert_eq!(
        authorized(&hub, "private/a", "GET", target).send().status,
        401
    );
    let token = |basic: &str| {
        let request = client(hub.url()).request("GET", "/token?scope=repository:private/a:pull");
        request.header("Authorization", basic).send()
    };
    // "user:secret" and "user:wrong" by `base64`.
    assert_eq!(token("Basic dXNlcjp3cm9uZw==").status, 401);
    let token = token("Basic dXNlcjpzZWNyZXQ=").json();
    let bearer = format!("Bearer {}", token["token"].as_str().unwrap());
    let request = client(hub.url())
        .request("GET", target)
        .header("Authorization", &bearer);
    assert_eq!(request.send().status, 200);
}

#[test]
fn a_blob_comes_from_another_host_that_refuses_the_registrys_token() {
    let (hub, image) = (Upstream::options().open().cdn().start(), Image::small(1));
    hub.push("a", "latest", &image);
    let redirect = blob(&hub, &image).send();
    assert_eq!(redirect.status, 307);
    let (host, target) = redirect.header("location").unwrap()["http://".len()..]
        .split_once('/')
        .unwrap();
    let cdn = client(&format!("http://{host}"));
    let get = || {
        cdn.request("GET", &format!("/{target}"))
            .header("Accept-Encoding", "identity")
    };
    get().send().assert_is(&image.layer().bytes);
    assert_eq!(get().header("Authorization", "Bearer x").send().status, 400);
    let asked = hub.asked("GET", "/cdn/");
    assert!(asked.iter().all(|exchange| exchange.role == Role::Cdn));
    assert_eq!(asked[1].header("authorization"), Some("Bearer x"));
}

/// Whether this is what a client gets for a blob of these bytes.
type Seen = fn(&Reply, &[u8]) -> bool;

fn short(reply: &Reply) -> bool {
    reply.status == 200 && !reply.complete
}

#[test]
fn each_fault_is_seen_by_the_client() {
    let (hub, image) = with_image();
    let right = &image.layer().bytes;
    let cases: [(&str, Fault, Seen); 7] = [
        ("status", Fault::Status(503), |reply, _| reply.status == 503),
        ("cut", Fault::Cut(7000), |reply, right| {
            short(reply) && reply.body == right[..7000]
        }),
        ("cut at once", Fault::Cut(0), |reply, _| {
            short(reply) && reply.body.is_empty()
        }),
        ("longer", Fault::Longer(3), |reply, right| {
            reply.body.len() == right.len() + 3
        }),
        ("shorter", Fault::Shorter(3), |reply, right| {
            reply.body == right[..right.len() - 3]
        }),
        ("wrong byte", Fault::WrongByte(9), |reply, right| {
            let differ = |at: &usize| reply.body[*at] != right[*at];
            reply.complete && (0..right.len()).filter(differ).eq([9])
        }),
        ("chunked", Fault::Chunked, |reply, right| {
            reply.header("content-length").is_none() && reply.complete && reply.body == right
        }),
    ];
    for (name, fault, seen) in cases {
        hub.fault(1, On::get("/blobs/"), fault);
        assert!(seen(&blob(&hub, &image).send(), right), "{name}");
        blob(&hub, &image).send().assert_is(right);
    }
}

#[test]
fn a_range_is_served_or_ignored() {
    let (hub, image) = with_image();
    let right = &image.layer().bytes;
    let ranged = |range: &str| blob(&hub, &image).header("Range", range).send();
    let tail = ranged("bytes=102000-");
    assert_eq!((tail.status, &tail.body[..]), (206, &right[102_000..]));
    assert_eq!(
        tail.header("content-range"),
        Some("bytes 102000-102399/102400")
    );
    assert_eq!(ranged("bytes=0-9").body, right[..10]);
    assert_eq!(ranged("bytes=102400-").status, 416);
    hub.fault(1, On::any("/blobs/"), Fault::NoRanges);
    ranged("bytes=102000-").assert_is(right);
}

#[test]
fn a_gate_holds_a_body_and_a_hanging_answer_never_comes() {
    let (hub, image) = with_image();
    let right = &image.layer().bytes;
    let gate = hub.hold(On::get("/blobs/"), 5000);
    let mut held = blob(&hub, &image).open();
    gate.reached();
    assert_eq!(held.read_until_silence(), right[..5000]);
    assert_eq!(hub.asked("GET", "/blobs/")[0].sent, 5000);
    gate.open();
    assert_eq!(held.finish().body, right[5000..]);

    hub.fault(1, On::get("/blobs/"), Fault::HangBody(10));
    assert_eq!(blob(&hub, &image).open().read_until_silence(), right[..10]);
    hub.fault(ALWAYS, On::any("/v2/a"), Fault::HangHeaders);
    let asking = std::thread::scope(|scope| {
        let asking = scope.spawn(|| blob(&hub, &image).try_open().is_err());
        support::eventually(support::PATIENCE, "asked", || {
            hub.count("GET", "/blobs/") == 3
        });
        hub.switch_off();
        asking.join().unwrap()
    });
    assert!(asking, "no answer but the end of the connection");
}

#[test]
fn it_goes_off_and_on_at_the_same_port() {
    let (hub, image) = with_image();
    hub.switch_off();
    let refused = blob(&hub, &image).try_open().err().unwrap();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    hub.switch_on();
    blob(&hub, &image).send().assert_is(&image.layer().bytes);
}

#[test]
fn only_manifest_gets_count_against_the_limit() {
    let (hub, image) = with_image();
    hub.limit(1);
    let ask = |method: &str| {
        client(hub.url())
            .request(method, "/v2/a/manifests/latest")
            .send()
    };
    assert_eq!(ask("HEAD").header("ratelimit-remaining"), Some("1;w=21600"));
    assert_eq!(ask("GET").header("ratelimit-remaining"), Some("0;w=21600"));
    assert_eq!((ask("GET").status, ask("HEAD").status), (429, 200));
    let compressed = client(hub.url()).get(&format!("/v2/a/blobs/{}", image.layer().digest));
    assert_eq!(
        compressed.header("content-encoding"),
        Some("gzip"),
        "nobody said identity"
    );
}
