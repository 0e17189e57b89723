//! A disk that takes no more costs the cache, and never a client its answer.

mod support;

use std::fs;

use support::agent::{Agent, Setup};
use support::client::Response;
use support::image::{Blob, Image, KIB, MIB};
use support::upstream::{ALWAYS, Fault, On, Upstream};
use support::{PATIENCE, eventually, write_file};

/// The disk, and a blob that does not fit on it.
const DISK: usize = 8 * MIB;
const TOO_MUCH: usize = 12 * MIB;

fn with_blob(length: usize) -> (Upstream, Agent, Blob) {
    let (hub, blob) = (Upstream::start(), Blob::new(1, length));
    hub.push_blob("library/app", &blob);
    let agent = start(&hub);
    (hub, agent, blob)
}

fn start(hub: &Upstream) -> Agent {
    start_on(DISK, hub)
}

fn start_on(disk: usize, hub: &Upstream) -> Agent {
    let setup = Setup::mirror(hub).set("health.interval", "50ms");
    setup.small_disk(disk).start()
}

fn target(blob: &Blob) -> String {
    format!("/v2/library/app/blobs/{}", blob.digest)
}

#[track_caller]
fn assert_ready(agent: &Agent) {
    assert_eq!(agent.admin().get("/readyz").status, 200);
}

const PASSED_THROUGH: &str = "registry_agent_passed_through_total";

fn counted(agent: &Agent, metric: &str, times: f64) -> bool {
    (agent.metric(metric) - times).abs() < 0.5
}

/// The names in the folder of downloads.
fn fills(agent: &Agent) -> usize {
    let folder = agent.folder().join("store/registry-agent/fills/sha256");
    fs::read_dir(folder).map_or(0, Iterator::count)
}

#[test]
fn a_blob_that_does_not_fit_passes_through_to_each_reader_and_is_not_stored() {
    let (hub, agent, blob) = with_blob(TOO_MUCH);
    let gate = hub.hold(On::get(&blob.digest), 4 * MIB);
    let mut readers = [(); 3].map(|()| agent.request("GET", &target(&blob)).open());
    let first = readers.each_mut().map(|reader| reader.read(KIB));
    gate.open();
    std::thread::scope(|scope| {
        let finish = |reader: Response| move || reader.finish();
        let rests = readers.map(|reader| scope.spawn(finish(reader)));
        for (first, rest) in first.into_iter().zip(rests) {
            let rest = rest.join().unwrap();
            assert!(rest.complete && [first, rest.body].concat() == blob.bytes);
        }
    });
    assert!(!agent.stored_blob(&blob.digest).exists());
    assert_eq!(fills(&agent), 0, "what came of it takes no room");
    assert!(counted(&agent, PASSED_THROUGH, 1.0));
    // What had come is not asked for again: one download up to where the disk was full, and from
    // there on one for each.
    let ranges = hub.served("GET", &blob.digest);
    assert_eq!(ranges.len(), 4);
    for exchange in &ranges[1..] {
        let range = exchange.header("range").expect("the rest");
        let start = range.trim_start_matches("bytes=").trim_end_matches('-');
        assert!(start.parse::<usize>().unwrap() > 7 * MIB, "{range}");
    }
    assert_ready(&agent);
    agent.get(&target(&blob)).assert_is(&blob.bytes);
}

#[test]
fn what_was_not_used_for_longest_makes_room_and_the_download_goes_on() {
    let (hub, agent, first) = with_blob(5 * MIB);
    let second = Blob::new(2, 5 * MIB);
    hub.push_blob("library/app", &second);
    agent.get(&target(&first)).assert_is(&first.bytes);
    eventually(PATIENCE, "it is stored", || {
        agent.stored_blob(&first.digest).exists()
    });
    agent.get(&target(&second)).assert_is(&second.bytes);
    eventually(PATIENCE, "it is stored", || {
        agent.stored_blob(&second.digest).exists()
    });
    assert!(!agent.stored_blob(&first.digest).exists());
    assert_eq!(hub.served("GET", &second.digest).len(), 1);
    assert!(counted(&agent, PASSED_THROUGH, 0.0));
    assert!(counted(&agent, "registry_agent_evicted_blobs_total", 1.0));
}

#[test]
fn nothing_is_evicted_for_what_would_not_fit_even_then() {
    let (hub, agent, large) = with_blob(TOO_MUCH);
    let small = Blob::new(2, 2 * MIB);
    hub.push_blob("library/app", &small);
    agent.get(&target(&small)).assert_is(&small.bytes);
    eventually(PATIENCE, "it is stored", || {
        agent.stored_blob(&small.digest).exists()
    });
    agent.get(&target(&large)).assert_is(&large.bytes);
    assert!(agent.stored_blob(&small.digest).exists());
}

#[test]
fn what_passes_through_resumes_where_it_breaks_with_and_without_ranges() {
    for ranges in [true, false] {
        let (hub, agent, blob) = with_blob(TOO_MUCH);
        if !ranges {
            hub.fault(ALWAYS, On::get(&blob.digest), Fault::NoRanges);
        }
        let gate = hub.hold(On::get(&blob.digest), 4 * MIB);
        let mut reader = agent.request("GET", &target(&blob)).open();
        let first = reader.read(KIB);
        // Not the download under way, but the one that goes on after it.
        let at = if ranges { MIB } else { 9 * MIB };
        hub.fault(1, On::get(&blob.digest), Fault::Cut(at));
        gate.open();
        let rest = reader.finish();
        assert!(rest.complete, "ranges: {ranges}, {} bytes", rest.body.len());
        assert!([first, rest.body].concat() == blob.bytes);
        assert_eq!(hub.served("GET", &blob.digest).len(), 3, "ranges: {ranges}");
    }
}

#[test]
fn what_passes_through_and_is_wrong_never_ends_well() {
    for (name, faults) in [
        ("stored part", vec![Fault::WrongByte(0)]),
        ("last byte", vec![Fault::WrongByte(TOO_MUCH - 1)]),
        ("longer", vec![Fault::Longer(1)]),
        ("shorter", vec![Fault::Shorter(1)]),
        (
            "unsaid length",
            vec![Fault::Chunked, Fault::WrongByte(TOO_MUCH - 1)],
        ),
    ] {
        let (hub, agent, blob) = with_blob(TOO_MUCH);
        for fault in faults {
            hub.fault(ALWAYS, On::get(&blob.digest), fault);
        }
        let reply = agent.get(&target(&blob));
        assert!(reply.status != 200 || !reply.complete, "{name}");
        assert!(!agent.stored_blob(&blob.digest).exists(), "{name}");
        hub.heal();
        agent.get(&target(&blob)).assert_is(&blob.bytes);
    }
}

#[test]
fn a_blob_of_unsaid_length_passes_through() {
    let (hub, agent, blob) = with_blob(TOO_MUCH);
    hub.fault(ALWAYS, On::get(&blob.digest), Fault::Chunked);
    agent.get(&target(&blob)).assert_is(&blob.bytes);
}

#[test]
fn any_range_of_what_does_not_fit_is_served() {
    let (_hub, agent, blob) = with_blob(TOO_MUCH);
    for (range, bytes) in [
        ("bytes=0-99", 0..100),
        ("bytes=1000000-9999999", 1_000_000..10_000_000),
        ("bytes=11000000-11999999", 11_000_000..12_000_000),
        ("bytes=-10", TOO_MUCH - 10..TOO_MUCH),
    ] {
        let request = agent.request("GET", &target(&blob)).header("Range", range);
        let reply = request.send();
        assert_eq!(reply.status, 206, "{range}");
        assert!(reply.complete && reply.body == blob.bytes[bytes], "{range}");
    }
}

#[test]
fn a_disk_without_a_byte_left_still_pulls_and_stores_again_when_there_is_room() {
    let hub = Upstream::start();
    // Larger than what sockets hold, so that its reader has it open.
    let images = [16, 3].map(|length| Image::new(length as u64, &[length * MIB]));
    let agent = start_on(24 * MIB, &hub);
    for (name, image) in ["library/a", "library/b"].into_iter().zip(&images) {
        hub.push(name, "latest", image);
    }
    let [cached, cold] = &images;
    agent.pull("library/a", "latest", cached);
    agent.wait_until_stored(cached.blobs());
    // Held open, so that it can't make room.
    let layer = format!("/v2/library/a/blobs/{}", cached.layer().digest);
    let mut reader = agent.request("GET", &layer).open();
    let first = reader.read(KIB);
    let filler = agent.disk().fill();
    for _ in 0..2 {
        agent.pull("library/b", "latest", cold);
    }
    assert!(!agent.stored_blob(&cold.layer().digest).exists());
    assert!(agent.metric(PASSED_THROUGH) >= 1.0);
    assert_ready(&agent);
    hub.switch_off();
    let rest = reader.finish();
    assert!(rest.complete && [first, rest.body].concat() == cached.layer().bytes);
    agent.get(&layer).assert_is(&cached.layer().bytes);
    hub.switch_on();
    fs::remove_file(filler).unwrap();
    agent.pull("library/b", "latest", cold);
    agent.wait_until_stored(cold.blobs());
    hub.switch_off();
    agent.pull("library/b", "latest", cold);
}

#[test]
fn a_disk_that_refuses_for_another_reason_is_passed_by_as_well() {
    let (hub, agent, blob) = with_blob(2 * MIB);
    let folder = agent.folder().join("store/registry-agent/fills");
    write_file(&folder, b"not a folder");
    agent.get(&target(&blob)).assert_is(&blob.bytes);
    let request = agent.request("GET", &target(&blob));
    let reply = request.header("Range", "bytes=-10").send();
    assert_eq!(reply.status, 206);
    assert!(reply.body == blob.bytes[2 * MIB - 10..]);
    hub.fault(ALWAYS, On::get(&blob.digest), Fault::WrongByte(1));
    let reply = agent.get(&target(&blob));
    assert!(reply.status != 200 || !reply.complete);
    hub.heal();
    let unknown = Blob::new(9, 10);
    agent
        .get(&target(&unknown))
        .assert_error(404, "BLOB_UNKNOWN");
    fs::remove_file(folder).unwrap();
    agent.get(&target(&blob)).assert_is(&blob.bytes);
    eventually(PATIENCE, "it is stored", || {
        agent.stored_blob(&blob.digest).exists()
    });
}
