//! An upstream that breaks in the middle of a blob: nobody ever gets a wrong or truncated one as a
//! whole, nothing of it stays, and the next request recovers.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;

use nix::sys::signal::Signal;
use support::agent::{Agent, SHORT, Setup};
use support::client::{Client, Reply};
use support::image::{Blob, KIB, MIB};
use support::upstream::{ALWAYS, Exchange, Fault, On, Upstream};
use support::{PATIENCE, eventually};

/// A hub that has a blob of this length, and a mirror of it.
fn with_blob(length: usize) -> (Upstream, Agent, Blob) {
    with_blob_and(length, |setup| setup)
}

/// The same where one of the mirror's deadlines is short.
fn with_short(deadline: &str, length: usize) -> (Upstream, Agent, Blob) {
    with_blob_and(length, |setup| setup.set(deadline, SHORT))
}

fn with_blob_and(length: usize, change: impl Fn(Setup) -> Setup) -> (Upstream, Agent, Blob) {
    let (hub, blob) = (Upstream::start(), Blob::new(1, length));
    hub.push_blob("library/app", &blob);
    let agent = change(Setup::mirror(&hub)).start();
    (hub, agent, blob)
}

fn target(blob: &Blob) -> String {
    format!("/v2/library/app/blobs/{}", blob.digest)
}

/// Where each download began, and how much of it was sent.
fn downloads(hub: &Upstream, blob: &Blob) -> Vec<(String, usize)> {
    let range = |get: &Exchange| get.header("range").unwrap_or(WHOLE).to_owned();
    hub.served("GET", &blob.digest)
        .iter()
        .map(|get| (range(get), get.sent))
        .collect()
}

const WHOLE: &str = "the whole";

fn from(offset: usize) -> String {
    format!("bytes={offset}-")
}

/// Whether a client could take this for the blob.
fn passes_for_whole(reply: &Reply) -> bool {
    reply.status == 200 && reply.complete
}

#[test]
fn a_cut_connection_resumes_where_it_stopped() {
    let (hub, agent, blob) = with_blob(4 * MIB);
    hub.fault(1, On::get(&blob.digest), Fault::Cut(1_500_000));
    hub.fault(1, On::get(&blob.digest), Fault::NoRanges);
    agent.get(&target(&blob)).assert_is(&blob.bytes);
    let rest = blob.len() - 1_500_000;
    assert_eq!(
        downloads(&hub, &blob),
        [(WHOLE.to_owned(), 1_500_000), (from(1_500_000), rest)]
    );
}

#[test]
fn a_connection_that_is_cut_again_and_again_still_gets_there() {
    let (hub, agent, blob) = with_blob(2 * MIB);
    hub.fault(3, On::get(&blob.digest), Fault::Cut(600_000));
    agent.get(&target(&blob)).assert_is(&blob.bytes);
    let expected = [
        (WHOLE.to_owned(), 600_000),
        (from(600_000), 600_000),
        (from(1_200_000), 600_000),
        (from(1_800_000), blob.len() - 1_800_000),
    ];
    assert_eq!(downloads(&hub, &blob), expected);
}

#[test]
fn a_cut_where_the_upstream_sends_clients_resumes_there_without_its_token() {
    let (hub, blob) = (Upstream::options().cdn().start(), Blob::new(1, 4 * MIB));
    hub.push_blob("library/app", &blob);
    let agent = Setup::mirror(&hub).start();
    hub.fault(1, On::get("/cdn/"), Fault::Cut(1_500_000));
    agent.get(&target(&blob)).assert_is(&blob.bytes);
    let rest = blob.len() - 1_500_000;
    let expected = [(WHOLE.to_owned(), 1_500_000), (from(1_500_000), rest)];
    assert_eq!(downloads(&hub, &blob), expected);
    let asked = hub.asked("GET", "/cdn/");
    assert!(
        asked
            .iter()
            .all(|asked| asked.header("authorization").is_none())
    );
}

#[test]
fn a_cut_connection_to_an_upstream_without_ranges_starts_again() {
    let (hub, agent, blob) = with_blob(4 * MIB);
    hub.fault(ALWAYS, On::get(&blob.digest), Fault::NoRanges);
    hub.fault(1, On::get(&blob.digest), Fault::Cut(1_500_000));
    agent.get(&target(&blob)).assert_is(&blob.bytes);
    let sent: Vec<usize> = downloads(&hub, &blob)
        .into_iter()
        .map(|(_, sent)| sent)
        .collect();
    assert_eq!(sent, [1_500_000, blob.len()]);
}

#[test]
fn a_cut_chunked_body_is_not_taken_for_the_whole() {
    let (hub, agent, blob) = with_blob(4 * MIB);
    hub.fault(1, On::get(&blob.digest), Fault::Chunked);
    hub.fault(1, On::get(&blob.digest), Fault::Cut(1_500_000));
    agent.get(&target(&blob)).assert_is(&blob.bytes);
}

#[test]
fn a_body_that_hangs_is_given_up_and_resumed() {
    let (hub, agent, blob) = with_short("timeouts.idle", 4 * MIB);
    hub.fault(1, On::get(&blob.digest), Fault::HangBody(1_500_000));
    agent.get(&target(&blob)).assert_is(&blob.bytes);
    let rest = blob.len() - 1_500_000;
    assert_eq!(
        downloads(&hub, &blob),
        [(WHOLE.to_owned(), 1_500_000), (from(1_500_000), rest)]
    );
}

#[test]
fn what_does_not_verify_is_never_served_whole_nor_kept() {
    for length in [100 * KIB, 4 * MIB] {
        let (hub, agent, blob) = with_blob(length);
        for (name, fault) in [
            ("first byte", Fault::WrongByte(0)),
            ("last byte", Fault::WrongByte(length - 1)),
            ("longer", Fault::Longer(1)),
            ("shorter", Fault::Shorter(1)),
        ] {
            let failures = agent.metric("registry_agent_fill_failures_total");
            hub.fault(ALWAYS, On::get(&blob.digest), fault);
            let readers = [(); 4].map(|()| agent.request("GET", &target(&blob)).begin().unwrap());
            for reader in readers {
                let reply = reader.response().unwrap().finish();
                assert!(!passes_for_whole(&reply), "{length} {name}");
                // What is held back as a whole can still be refused in words.
                assert!(
                    length > MIB || reply.status == 503,
                    "{length} {name}: {}",
                    reply.status
                );
            }
            let tail = agent
                .request("GET", &target(&blob))
                .header("Range", "bytes=-9")
                .send();
            assert!(
                !(tail.status == 206 && tail.complete),
                "{length} {name}: the end of it"
            );
            assert!(
                !agent.stored_blob(&blob.digest).exists(),
                "{length} {name} was kept"
            );
            assert!(
                agent.metric("registry_agent_fill_failures_total") > failures,
                "{name}"
            );
            hub.heal();
        }
        agent.get(&target(&blob)).assert_is(&blob.bytes);
    }
}

#[test]
fn wrong_bytes_before_a_cut_do_not_outlive_it() {
    let (hub, agent, blob) = with_blob(4 * MIB);
    hub.fault(1, On::get(&blob.digest), Fault::WrongByte(1000));
    hub.fault(1, On::get(&blob.digest), Fault::Cut(1_500_000));
    assert!(!passes_for_whole(&agent.get(&target(&blob))));
    assert!(!agent.stored_blob(&blob.digest).exists());
    agent.get(&target(&blob)).assert_is(&blob.bytes);
}

#[test]
fn a_download_that_can_not_be_finished_ends_short_and_the_next_one_recovers() {
    let faults = [
        Fault::Status(503),
        Fault::Status(404),
        Fault::HangHeaders,
        Fault::Cut(0),
    ];
    // Side by side, since each waits for the agent's last attempt.
    std::thread::scope(|scope| {
        for then in faults {
            scope.spawn(|| ends_short(then));
        }
    });
}

fn ends_short(then: Fault) {
    let (hub, agent, blob) = with_short("timeouts.headers", 4 * MIB);
    let gate = hub.hold(On::get(&blob.digest), 2 * MIB);
    hub.fault(1, On::get(&blob.digest), Fault::Cut(2 * MIB));
    let mut reader = agent.request("GET", &target(&blob)).open();
    assert!(reader.read(KIB) == blob.bytes[..KIB]);
    gate.reached();
    hub.fault(ALWAYS, On::get(&blob.digest), then);
    gate.open();
    let reply = reader.finish();
    assert!(
        !reply.complete,
        "{} bytes of {}",
        reply.body.len(),
        blob.len()
    );
    assert!(
        reply.body == blob.bytes[KIB..KIB + reply.body.len()],
        "what came was right"
    );
    assert!(!agent.stored_blob(&blob.digest).exists());
    hub.heal();
    // An upstream that was waited for in vain is left alone for as long.
    eventually(PATIENCE, "the upstream is asked again", || {
        agent.head(&target(&blob)).status == 200
    });
    agent.get(&target(&blob)).assert_is(&blob.bytes);
}

#[test]
fn an_agent_that_was_killed_in_mid_download_serves_nothing_partial() {
    let (hub, mut agent, blob) = with_blob(4 * MIB);
    let gate = hub.hold(On::get(&blob.digest), 2 * MIB);
    let mut reader = agent.request("GET", &target(&blob)).open();
    assert!(reader.read(KIB) == blob.bytes[..KIB]);
    gate.reached();
    agent.kill();
    gate.open();
    assert!(!reader.finish().complete);
    hub.switch_off();
    agent.start_again();
    agent.wait_until_ready();
    assert!(!agent.stored_blob(&blob.digest).exists());
    agent.get(&target(&blob)).assert_error(503, "UNAVAILABLE");
    assert_eq!(agent.head(&target(&blob)).status, 503);
    hub.switch_on();
    agent.get(&target(&blob)).assert_is(&blob.bytes);
    let resumed = downloads(&hub, &blob).pop();
    assert!(
        resumed.is_some_and(|(range, _)| range != WHOLE),
        "what had come is not sent again"
    );
    agent.wait_until_stored([&blob]);
}

#[test]
fn what_an_agent_that_stops_has_of_a_download_is_given_on_by_the_next() {
    let (hub, mut agent, blob) = with_blob(4 * MIB);
    agent.rewrite("drain", "0s");
    agent.signal(Signal::SIGHUP);
    let gate = hub.hold(On::get(&blob.digest), 3 * MIB);
    let mut reader = agent.request("GET", &target(&blob)).open();
    assert!(reader.read(MIB) == blob.bytes[..MIB]);
    gate.reached();
    agent.signal(Signal::SIGTERM);
    assert!(agent.wait().status.success());
    gate.open();
    assert!(!reader.finish().complete);
    agent.start_again();
    agent.wait_until_ready();
    // The rest does not come before the beginning was read.
    let gate = hub.hold(On::get(&blob.digest), KIB);
    let mut reader = agent.request("GET", &target(&blob)).open();
    let first = reader.read(MIB);
    assert!(first == blob.bytes[..MIB]);
    gate.open();
    let rest = reader.finish();
    assert!(rest.complete && [first, rest.body].concat() == blob.bytes);
    let resumed = downloads(&hub, &blob).pop();
    assert!(resumed.is_some_and(|(range, _)| range != WHOLE));
    agent.wait_until_stored([&blob]);
    let left = std::fs::read_dir(agent.folder().join("store/registry-agent/fills/sha256")).unwrap();
    assert_eq!(left.count(), 0);
}

#[test]
fn a_wrong_blob_without_a_length_is_no_answer_to_a_client_that_could_not_tell() {
    let (hub, agent, blob) = with_blob(3 * MIB);
    hub.fault(ALWAYS, On::get(&blob.digest), Fault::Chunked);
    hub.fault(ALWAYS, On::get(&blob.digest), Fault::WrongByte(2 * MIB));
    let Client::Tcp(address) = agent.registry() else {
        unreachable!("the registry is not on a Unix socket")
    };
    // Before HTTP/1.1 the end of the connection is the end of the body.
    let ask = || {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {} HTTP/1.0\r\n\r\n", target(&blob)).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    };
    assert!(ask().starts_with(b"HTTP/1.0 503 "));
    hub.heal();
    hub.fault(ALWAYS, On::get(&blob.digest), Fault::Chunked);
    let answer = ask();
    assert!(answer.starts_with(b"HTTP/1.0 200 ") && answer.ends_with(&blob.bytes));
}
