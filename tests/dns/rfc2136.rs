//! RFC 2136, with knot.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use registry_agent::config::{DnsProvider, DnsSettings, TsigAlgorithm};
use registry_agent::fleet::dns::Dns;
use registry_agent::fleet::facts::{Record, Routing};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use crate::knot::{Knot, SECRET};
use crate::{GROUP, NAME, id, ips, owners};

const MARKS: &str = "_registry-agent.fleet.example.com";

fn record(owner: &str, addresses: &[&str]) -> Record {
    crate::record(owner, addresses, Routing::Plain)
}

async fn agent(settings: &DnsSettings) -> Dns {
    Dns::new(settings, GROUP, None).await.unwrap()
}

/// The records of an instance, which are on all servers as far as this one knows.
async fn own(dns: &Dns, owner: &str) -> Vec<Record> {
    let own = dns.own_records(&id(owner)).await.unwrap();
    assert!(own.in_sync);
    own.records
}

async fn all(dns: &Dns) -> Vec<Record> {
    let all = dns.records().await.unwrap();
    assert!(all.complete);
    all.records
}

/// Settings that go through a proxy.
fn through(mut settings: DnsSettings, proxy: SocketAddr) -> DnsSettings {
    if let DnsProvider::Rfc2136 { server, .. } = &mut settings.provider {
        *server = proxy;
    }
    settings
}

/// What happens to the first UPDATE that comes by.
enum First {
    /// It is carried out, and the connection ends before its answer.
    LoseAnswer,
    /// It is said that it is there, and it goes on when it may.
    Hold(oneshot::Sender<()>, oneshot::Receiver<()>),
}

/// Stands before the server.
async fn proxy(server: SocketAddr, first: First) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut first = Some(first);
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut server = TcpStream::connect(server).await.unwrap();
            while let Some(message) = read(&mut client).await {
                // RFC 1035, 4.1.1: five bits of opcode, and 5 is UPDATE.
                let mut lose = false;
                if (message[2] >> 3) & 15 == 5 {
                    match first.take() {
                        None => {}
                        Some(First::LoseAnswer) => lose = true,
                        Some(First::Hold(there, go)) => {
                            there.send(()).unwrap();
                            go.await.unwrap();
                        }
                    }
                }
                write(&mut server, &message).await;
                let answer = read(&mut server).await.unwrap();
                if lose {
                    break;
                }
                write(&mut client, &answer).await;
            }
        }
    });
    address
}

async fn read(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut message = vec![0; stream.read_u16().await.ok()?.into()];
    stream.read_exact(&mut message).await.ok()?;
    Some(message)
}

async fn write(stream: &mut TcpStream, message: &[u8]) {
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    stream
        .write_all(&[&length[..], message].concat())
        .await
        .unwrap();
}

#[tokio::test]
async fn agents_share_a_name_and_each_takes_away_its_own() {
    let knot = Knot::start("fleet 30 A 192.0.2.9\nfleet 30 TXT \"v=spf1 -all\"\nwww A 192.0.2.8");
    let dns = agent(&knot.settings()).await;
    let one = [
        record("i-1", &["192.0.2.1"]),
        record("i-1", &["2001:db8::1"]),
    ];
    let two = [record("i-2", &["192.0.2.2"])];
    assert!(own(&dns, "i-1").await.is_empty());
    dns.write_own(&id("i-1"), &one).await.unwrap();
    dns.write_own(&id("i-2"), &two).await.unwrap();
    assert_eq!(own(&dns, "i-1").await, one);
    assert_eq!(own(&dns, "i-2").await, two);
    assert_eq!(
        owners(&all(&dns).await),
        [
            ("i-1", ips(&["192.0.2.1"])),
            ("i-1", ips(&["2001:db8::1"])),
            ("i-2", ips(&["192.0.2.2"])),
            ("nobody", ips(&["192.0.2.9"])),
        ]
    );
    for record in &one {
        dns.delete(record).await.unwrap();
    }
    assert!(own(&dns, "i-1").await.is_empty());
    assert_eq!(own(&dns, "i-2").await, two);
    dns.delete(&two[0]).await.unwrap();
    // All that people have put there is there, and nothing of ours.
    assert_eq!(
        knot.lines(NAME),
        [
            "fleet.example.com. 30 A 192.0.2.9",
            "fleet.example.com. 30 TXT \"v=spf1 -all\""
        ]
    );
    assert!(knot.lines(MARKS).is_empty());
    assert_eq!(knot.lines("www.example.com").len(), 1);
}

#[tokio::test]
async fn what_is_not_exactly_so_any_more_is_not_deleted() {
    let knot = Knot::start("");
    let dns = agent(&knot.settings()).await;
    let now = record("i-1", &["192.0.2.1"]);
    dns.write_own(&id("i-1"), std::slice::from_ref(&now))
        .await
        .unwrap();
    let ttl = Duration::from_mins(1);
    for other in [
        record("i-1", &["192.0.2.2"]),
        record("i-1", &["192.0.2.1", "192.0.2.2"]),
        record("i-2", &["192.0.2.1"]),
        Record { ttl, ..now.clone() },
    ] {
        dns.delete(&other).await.unwrap();
        assert_eq!(
            own(&dns, "i-1").await,
            std::slice::from_ref(&now),
            "{other:?}"
        );
    }
    for _ in 0..2 {
        dns.delete(&now).await.unwrap();
        assert!(all(&dns).await.is_empty());
    }
    // Nothing is ever deleted that is not the group's.
    for identifier in [None, Some("ra/others/i-1"), Some("terraform")] {
        let record = Record {
            identifier: identifier.map(str::to_owned),
            ..now.clone()
        };
        let error = dns.delete(&record).await.unwrap_err().to_string();
        assert!(error.contains("mirrors") && error.contains(NAME), "{error}");
    }
}

#[tokio::test]
async fn an_address_that_nobody_has_marked_is_not_taken_over() {
    let knot = Knot::start("fleet 30 A 192.0.2.1");
    let dns = agent(&knot.settings()).await;
    let wanted = [record("i-1", &["192.0.2.1"])];
    let error = dns.write_own(&id("i-1"), &wanted).await.unwrap_err();
    let error = error.to_string();
    assert!(error.contains("192.0.2.1 already"), "{error}");
    assert!(
        error.contains("example.com") && error.contains(NAME),
        "{error}"
    );
    assert!(knot.lines(MARKS).is_empty());
    assert_eq!(knot.lines(NAME).len(), 1);
    // A mistake elsewhere does not write another's.
    let error = dns.write_own(&id("i-2"), &wanted).await.unwrap_err();
    assert!(error.to_string().contains("i-2"), "{error}");
}

#[tokio::test]
async fn a_record_is_replaced_in_one_step() {
    let knot = Knot::start("");
    let dns = agent(&knot.settings()).await;
    let before = [
        record("i-1", &["192.0.2.1", "192.0.2.3"]),
        record("i-1", &["2001:db8::1"]),
    ];
    dns.write_own(&id("i-1"), &before).await.unwrap();
    let after = [Record {
        ttl: Duration::from_secs(10),
        ..record("i-1", &["192.0.2.2", "192.0.2.3"])
    }];
    for _ in 0..2 {
        dns.write_own(&id("i-1"), &after).await.unwrap();
        assert_eq!(own(&dns, "i-1").await, after);
        assert_eq!(
            knot.lines(NAME),
            [
                "fleet.example.com. 10 A 192.0.2.2",
                "fleet.example.com. 10 A 192.0.2.3"
            ]
        );
        assert_eq!(knot.lines(MARKS).len(), 2);
    }
}

#[tokio::test]
async fn agents_of_two_ttls_do_not_fight_and_a_strangers_is_put_right() {
    let knot = Knot::start("");
    let dns = agent(&knot.settings()).await;
    let short = [record("i-1", &["192.0.2.1"])];
    let long = [Record {
        ttl: Duration::from_mins(1),
        ..record("i-2", &["192.0.2.2"])
    }];
    dns.write_own(&id("i-1"), &short).await.unwrap();
    dns.write_own(&id("i-2"), &long).await.unwrap();
    // Each sees what it wants, so that none of them writes again.
    assert_eq!(own(&dns, "i-1").await, short);
    assert_eq!(own(&dns, "i-2").await, long);
    knot.edit(&[
        &["zone-unset", NAME_AND_DOT, "A"],
        &["zone-set", NAME_AND_DOT, "7200", "A", "192.0.2.1"],
        &["zone-set", NAME_AND_DOT, "7200", "A", "192.0.2.2"],
    ]);
    assert_eq!(own(&dns, "i-1").await[0].ttl, Duration::from_hours(2));
    dns.write_own(&id("i-1"), &short).await.unwrap();
    assert_eq!(own(&dns, "i-1").await, short);
    assert_eq!(own(&dns, "i-2").await, long);
    assert!(knot.lines(NAME).iter().all(|line| line.contains(" 30 A ")));
}

const NAME_AND_DOT: &str = "fleet.example.com.";

#[tokio::test]
async fn what_somebody_has_deleted_by_hand_is_seen_to_be_missing() {
    let knot = Knot::start("");
    let dns = agent(&knot.settings()).await;
    let wanted = [record("i-1", &["192.0.2.1"])];
    dns.write_own(&id("i-1"), &wanted).await.unwrap();
    knot.edit(&[&["zone-unset", NAME_AND_DOT, "A"]]);
    assert!(own(&dns, "i-1").await.is_empty());
    dns.write_own(&id("i-1"), &wanted).await.unwrap();
    assert_eq!(own(&dns, "i-1").await, wanted);
}

/// A new instance has the address of a dead one, whose record is collected at the same time.
async fn reused_address(held: &str) {
    let knot = Knot::start("");
    let dns = agent(&knot.settings()).await;
    let dead = record("i-dead", &["192.0.2.1"]);
    let new = [record("i-new", &["192.0.2.1"])];
    dns.write_own(&id("i-dead"), std::slice::from_ref(&dead))
        .await
        .unwrap();

    let (there, is_there) = oneshot::channel();
    let (go, may_go) = oneshot::channel();
    let slow = proxy(knot.address, First::Hold(there, may_go)).await;
    let slow = agent(&through(knot.settings(), slow)).await;
    // One has decided by what it has read, and its UPDATE is on its way when the other's is done.
    let (first, second) = if held == "delete" {
        let (dead, new) = (dead.clone(), new.clone());
        let first = tokio::spawn(async move { slow.delete(&dead).await });
        is_there.await.unwrap();
        (first, dns.write_own(&id("i-new"), &new).await)
    } else {
        let new = new.clone();
        let first = tokio::spawn(async move { slow.write_own(&id("i-new"), &new).await });
        is_there.await.unwrap();
        (first, dns.delete(&dead).await)
    };
    second.unwrap();
    go.send(()).unwrap();
    first.await.unwrap().unwrap();

    assert_eq!(own(&dns, "i-new").await, new);
    assert!(own(&dns, "i-dead").await.is_empty());
    assert_eq!(knot.lines(NAME), ["fleet.example.com. 30 A 192.0.2.1"]);
    assert_eq!(knot.lines(MARKS).len(), 1);
}

#[tokio::test]
async fn a_late_delete_does_not_undo_a_write() {
    reused_address("delete").await;
}

#[tokio::test]
async fn a_late_write_is_not_undone_by_a_delete() {
    reused_address("write").await;
}

#[tokio::test]
async fn many_at_once_all_get_there() {
    let knot = Knot::start("");
    let names: Vec<String> = (1..=12).map(|number| format!("i-{number}")).collect();
    let records: Vec<Record> = (1..=12)
        .map(|number| record(&format!("i-{number}"), &[&format!("192.0.2.{number}")]))
        .collect();
    // As the plan does, what is contended is tried again.
    let settings = knot.settings();
    let write = names.iter().zip(&records).map(|(name, record)| {
        let settings = &settings;
        async move {
            let dns = agent(settings).await;
            for _ in 0..10 {
                if dns
                    .write_own(&id(name), std::slice::from_ref(record))
                    .await
                    .is_ok()
                {
                    return;
                }
            }
            panic!("{name} never got there");
        }
    });
    join_all(write).await;
    let dns = agent(&settings).await;
    assert_eq!(all(&dns).await.len(), 12);
    let delete = records.iter().map(|record| {
        let settings = &settings;
        async move {
            let dns = agent(settings).await;
            while dns.delete(record).await.is_err() {}
        }
    });
    tokio::time::timeout(crate::support::PATIENCE, join_all(delete))
        .await
        .unwrap();
    assert!(knot.lines(NAME).is_empty() && knot.lines(MARKS).is_empty());
}

#[tokio::test]
async fn an_answer_that_is_lost_is_nothing_special() {
    let knot = Knot::start("");
    let wanted = [record("i-1", &["192.0.2.1"])];
    let lossy = proxy(knot.address, First::LoseAnswer).await;
    let dns = agent(&through(knot.settings(), lossy)).await;
    let error = dns.write_own(&id("i-1"), &wanted).await.unwrap_err();
    assert!(error.to_string().contains("no connection"), "{error}");
    let lines = (knot.lines(NAME), knot.lines(MARKS));
    assert_eq!(lines.0.len(), 1);
    dns.write_own(&id("i-1"), &wanted).await.unwrap();
    assert_eq!((knot.lines(NAME), knot.lines(MARKS)), lines);

    let lossy = proxy(knot.address, First::LoseAnswer).await;
    let dns = agent(&through(knot.settings(), lossy)).await;
    dns.delete(&wanted[0]).await.unwrap_err();
    dns.delete(&wanted[0]).await.unwrap();
    assert!(knot.lines(NAME).is_empty() && knot.lines(MARKS).is_empty());
}

#[tokio::test]
async fn keys_of_all_algorithms_sign() {
    let knot = Knot::start("");
    for (key, algorithm) in [
        ("agent", TsigAlgorithm::HmacSha256),
        ("agent384", TsigAlgorithm::HmacSha384),
        ("agent512", TsigAlgorithm::HmacSha512),
    ] {
        let dns = agent(&knot.settings_with(key, algorithm, SECRET)).await;
        let wanted = [record(key, &["192.0.2.1"])];
        dns.write_own(&id(key), &wanted).await.unwrap();
        assert_eq!(own(&dns, key).await, wanted);
        dns.delete(&wanted[0]).await.unwrap();
    }
}

#[tokio::test]
async fn a_refusal_says_what_is_wrong_with_the_key_and_never_the_key() {
    let knot = Knot::start("");
    let other = "b3RoZXJzZWNyZXRvdGhlcnNlY3JldG90aGVyc2VjcmU=";
    let sha256 = TsigAlgorithm::HmacSha256;
    for (key, algorithm, secret, code, words) in [
        ("nobody", sha256, SECRET, "BADKEY", "has no key nobody"),
        (
            "agent",
            TsigAlgorithm::HmacSha512,
            SECRET,
            "BADKEY",
            "of that algorithm",
        ),
        ("agent", sha256, other, "BADSIG", "tsig.secret_file"),
    ] {
        let dns = agent(&knot.settings_with(key, algorithm, secret)).await;
        for error in [
            dns.records().await.unwrap_err(),
            dns.write_own(&id("i-1"), &[record("i-1", &["192.0.2.1"])])
                .await
                .unwrap_err(),
        ] {
            assert!(!error.is_throttled());
            let error = error.to_string();
            assert!(error.contains(code) && error.contains(words), "{error}");
            assert!(
                error.contains(NAME) && error.contains("zone example.com"),
                "{error}"
            );
            assert!(!error.contains(secret), "{error}");
        }
        assert!(!format!("{dns:?}").contains(secret));
    }
    // A key that is known, and may not: no change at all, or not of this name.
    let wanted = [record("i-1", &["192.0.2.1"])];
    let dns = agent(&knot.settings_with("somebody", sha256, SECRET)).await;
    let error = dns.write_own(&id("i-1"), &wanted).await.unwrap_err();
    assert!(error.to_string().contains("somebody"), "{error}");
    let mut settings = knot.settings();
    settings.name = "www.example.com".to_owned();
    let dns = agent(&settings).await;
    let error = dns.write_own(&id("i-1"), &wanted).await.unwrap_err();
    let error = error.to_string();
    assert!(error.contains("no rule that lets it"), "{error}");
    assert!(knot.lines(NAME).is_empty() && knot.lines("www.example.com").is_empty());
}

#[tokio::test]
async fn a_name_leads_to_the_load_balancer_by_one_record_of_all() {
    let knot = Knot::start("");
    let with = |target: &str| {
        let mut settings = knot.settings();
        if let DnsProvider::Rfc2136 { cname, .. } = &mut settings.provider {
            *cname = Some(target.to_owned());
        }
        settings
    };
    let shared = |target: &str| Record {
        identifier: Some(format!("ra/{GROUP}")),
        target: Some(target.to_owned()),
        ..record("", &[])
    };
    let dns = agent(&with("balancer.example.net")).await;
    assert!(own(&dns, "i-1").await.is_empty());
    for owner in ["i-1", "i-2", "i-1"] {
        let wanted = [shared("balancer.example.net")];
        dns.write_own(&id(owner), &wanted).await.unwrap();
        assert_eq!(own(&dns, "i-3").await, wanted);
        assert_eq!(
            knot.lines(NAME),
            ["fleet.example.com. 30 CNAME balancer.example.net."]
        );
        assert_eq!(knot.lines(MARKS).len(), 1);
    }
    // It is nobody's to delete, and gives way to no addresses.
    let error = dns
        .delete(&shared("balancer.example.net"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("ra/mirrors"), "{error}");
    let by_address = agent(&knot.settings()).await;
    let address = [record("i-1", &["192.0.2.1"])];
    let error = by_address
        .write_own(&id("i-1"), &address)
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("a CNAME of balancer.example.net"),
        "{error}"
    );
    // Another load balancer takes its place.
    let dns = agent(&with("new.example.net")).await;
    let wanted = [shared("new.example.net")];
    dns.write_own(&id("i-1"), &wanted).await.unwrap();
    assert_eq!(own(&dns, "i-1").await, wanted);
    assert_eq!(
        knot.lines(NAME),
        ["fleet.example.com. 30 CNAME new.example.net."]
    );
    assert_eq!(knot.lines(MARKS).len(), 1);

    for (line, words) in [
        (
            "fleet 30 CNAME www.example.com.",
            "a CNAME of www.example.com",
        ),
        ("fleet 30 A 192.0.2.9", "holds addresses"),
        ("fleet 30 MX 10 www", "records of other types"),
    ] {
        let knot = Knot::start(line);
        let before = knot.lines(NAME);
        let dns = agent(&through(with("balancer.example.net"), knot.address)).await;
        let wanted = [shared("balancer.example.net")];
        let error = dns.write_own(&id("i-1"), &wanted).await.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(knot.lines(NAME), before);
        assert!(knot.lines(MARKS).is_empty());
    }
}

#[tokio::test]
async fn a_server_that_is_away_or_has_another_zone_is_named() {
    let knot = Knot::start("");
    let mut settings = knot.settings();
    if let DnsProvider::Rfc2136 { zone, .. } = &mut settings.provider {
        *zone = "example.org".to_owned();
    }
    settings.name = "fleet.example.org".to_owned();
    let dns = agent(&settings).await;
    let error = dns.records().await.unwrap_err().to_string();
    assert!(
        error.contains("example.org") && error.contains("REFUSED"),
        "{error}"
    );

    let settings = knot.settings();
    let address = knot.address.to_string();
    drop(knot);
    let error = agent(&settings).await.records().await.unwrap_err();
    assert!(error.to_string().contains(&address), "{error}");
}
