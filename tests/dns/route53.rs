//! Route 53, with ministack, and with a server that answers as told.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aws_sdk_route53::types::RrType;
use registry_agent::config::{AliasTarget, DnsPolicy, DnsProvider, DnsSettings};
use registry_agent::fleet::dns::{Dns, DnsError};
use registry_agent::fleet::facts::{Record, Routing};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::ministack::{Ministack, aws, of_the_name, set};
use crate::{GROUP, NAME, id, ips, owners};

fn record(owner: &str, addresses: &[&str]) -> Record {
    crate::record(owner, addresses, Routing::Multivalue)
}

fn settings(zone: &str, policy: DnsPolicy) -> DnsSettings {
    DnsSettings {
        name: NAME.to_owned(),
        ttl: Duration::from_secs(30),
        provider: DnsProvider::Route53 {
            zone: zone.to_owned(),
            policy,
            health_check: None,
        },
    }
}

async fn agent(server: &Ministack, policy: DnsPolicy) -> Dns {
    let settings = settings(&server.zone, policy);
    Dns::new(&settings, GROUP, Some(&server.aws)).await.unwrap()
}

async fn own(dns: &Dns, owner: &str) -> Vec<Record> {
    dns.own_records(&id(owner)).await.unwrap().records
}

#[tokio::test]
async fn agents_share_a_name_and_each_takes_away_its_own() {
    let server = Ministack::start().await;
    let others = vec![
        set(NAME, RrType::Txt, None, "\"v=spf1 -all\""),
        set("a.example.com", RrType::A, None, "192.0.2.8"),
        set("z.example.com", RrType::A, None, "192.0.2.9"),
        of_the_name("terraform", "192.0.2.7"),
        of_the_name("ra/others/i-1", "192.0.2.6"),
    ];
    server.put(others).await;
    let before = server.sets().await;
    let one = agent(&server, DnsPolicy::Multivalue).await;
    let two = agent(&server, DnsPolicy::Multivalue).await;
    let ones = [
        record("i-1", &["192.0.2.1"]),
        record("i-1", &["2001:db8::1"]),
    ];
    let twos = [record("i-2", &["192.0.2.2"])];
    assert!(own(&one, "i-1").await.is_empty());
    // An UPSERT, so the second time is like the first.
    for _ in 0..2 {
        one.write_own(&id("i-1"), &ones).await.unwrap();
    }
    two.write_own(&id("i-2"), &twos).await.unwrap();
    // Route 53 answers at once, and its servers later: PENDING, then INSYNC.
    let seen = one.own_records(&id("i-1")).await.unwrap();
    assert_eq!((seen.records.as_slice(), seen.in_sync), (&ones[..], false));
    assert!(one.own_records(&id("i-1")).await.unwrap().in_sync);
    assert_eq!(own(&two, "i-2").await, twos);
    let all = one.records().await.unwrap();
    assert!(all.complete);
    assert_eq!(
        owners(&all.records),
        [
            ("i-1", ips(&["192.0.2.1"])),
            ("i-1", ips(&["192.0.2.6"])),
            ("i-1", ips(&["2001:db8::1"])),
            ("i-2", ips(&["192.0.2.2"])),
            ("terraform", ips(&["192.0.2.7"])),
        ]
    );
    assert_eq!(
        all.records
            .iter()
            .filter(|one| one.owner(GROUP).is_some())
            .count(),
        3
    );
    for record in &ones {
        one.delete(record).await.unwrap();
    }
    let seen = one.own_records(&id("i-1")).await.unwrap();
    assert_eq!((seen.records.len(), seen.in_sync), (0, false));
    assert!(one.own_records(&id("i-1")).await.unwrap().in_sync);
    assert_eq!(own(&two, "i-2").await, twos);
    two.delete(&twos[0]).await.unwrap();
    assert_eq!(server.sets().await, before);
}

#[tokio::test]
async fn what_is_not_exactly_so_any_more_is_not_deleted() {
    let server = Ministack::start().await;
    let dns = agent(&server, DnsPolicy::Multivalue).await;
    let now = record("i-1", &["192.0.2.1"]);
    dns.write_own(&id("i-1"), std::slice::from_ref(&now))
        .await
        .unwrap();
    let before = server.sets().await;
    for other in [
        record("i-1", &["192.0.2.2"]),
        record("i-2", &["192.0.2.1"]),
        Record {
            ttl: Duration::from_mins(1),
            ..now.clone()
        },
    ] {
        dns.delete(&other).await.unwrap();
        assert_eq!(server.sets().await, before, "{other:?}");
    }
    for _ in 0..2 {
        dns.delete(&now).await.unwrap();
        assert!(server.sets().await.is_empty());
    }
    for identifier in [
        None,
        Some("ra/others/i-1"),
        Some("terraform"),
        Some("ra/mirrors"),
    ] {
        let record = Record {
            identifier: identifier.map(str::to_owned),
            ..now.clone()
        };
        let error = dns.delete(&record).await.unwrap_err();
        assert!(matches!(error, DnsError::Foreign { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_name_of_several_pages_is_read_to_its_end_and_no_further() {
    let server = Ministack::start().await;
    let mut sets: Vec<_> = (0..320)
        .flat_map(|number| {
            let (high, low) = (number / 256, number % 256);
            let identifier = format!("ra/{GROUP}/i-{number:03}");
            [
                of_the_name(&identifier, &format!("10.0.{high}.{low}")),
                of_the_name(&identifier, &format!("2001:db8::{number:x}")),
            ]
        })
        .collect();
    sets.push(set("flees.example.com", RrType::A, None, "192.0.2.8"));
    sets.push(set("fleeu.example.com", RrType::A, None, "192.0.2.9"));
    server.put(sets).await;
    let dns = agent(&server, DnsPolicy::Multivalue).await;
    let all = dns.records().await.unwrap();
    assert!(all.complete);
    assert_eq!(all.records.len(), 640);
    let of_us = all.records.iter().filter(|one| one.owner(GROUP).is_some());
    assert_eq!(of_us.count(), 640);
    // Of the first, the last, and one whose AAAA is on another page than its A.
    for (owner, v4, v6) in [
        ("i-000", "10.0.0.0", "2001:db8::"),
        ("i-007", "10.0.0.7", "2001:db8::7"),
        ("i-319", "10.0.1.63", "2001:db8::13f"),
    ] {
        let wanted = [record(owner, &[v4]), record(owner, &[v6])];
        assert_eq!(own(&dns, owner).await, wanted);
    }
    assert!(own(&dns, "i-320").await.is_empty());
}

#[tokio::test]
async fn a_record_of_another_family_or_policy_is_replaced() {
    let server = Ministack::start().await;
    let dns = agent(&server, DnsPolicy::Multivalue).await;
    let before = [
        record("i-1", &["192.0.2.1"]),
        record("i-1", &["2001:db8::1"]),
    ];
    dns.write_own(&id("i-1"), &before).await.unwrap();
    let weighted = agent(&server, DnsPolicy::Weighted).await;
    let after = [Record {
        health_check: Some("0123abcd".to_owned()),
        ..crate::record("i-1", &["192.0.2.2"], Routing::Weighted(1))
    }];
    weighted.write_own(&id("i-1"), &after).await.unwrap();
    assert_eq!(own(&weighted, "i-1").await, after);
    let sets = server.sets().await;
    assert_eq!(sets.len(), 1, "{sets:?}");
    assert_eq!(sets[0].weight, Some(1));
    assert_eq!(sets[0].health_check_id.as_deref(), Some("0123abcd"));
    // What another has done meanwhile is no surprise to the next attempt.
    server
        .put(vec![of_the_name("ra/mirrors/i-1", "2001:db8::2")])
        .await;
    assert_eq!(own(&weighted, "i-1").await.len(), 2);
    weighted.write_own(&id("i-1"), &after).await.unwrap();
    assert_eq!(own(&weighted, "i-1").await, after);
    let error = weighted.write_own(&id("i-2"), &after).await.unwrap_err();
    assert!(matches!(error, DnsError::Foreign { .. }), "{error}");
}

#[tokio::test]
async fn a_name_leads_to_the_load_balancer_by_one_record_of_all() {
    let server = Ministack::start().await;
    let alias = |name: &str| {
        DnsPolicy::Alias(AliasTarget {
            name: name.to_owned(),
            zone: "Z32O12XQLNTSW2".to_owned(),
        })
    };
    for (name, types) in [
        ("lb.elb.amazonaws.com", 1),
        ("dualstack.lb.elb.amazonaws.com", 2),
    ] {
        let shared = [Record {
            identifier: Some("ra/mirrors".to_owned()),
            target: Some(name.to_owned()),
            ttl: Duration::ZERO,
            ..crate::record("", &[], Routing::Weighted(1))
        }];
        let dns = agent(&server, alias(name)).await;
        // None, or the one that leads elsewhere.
        assert_ne!(own(&dns, "i-1").await, shared);
        for owner in ["i-1", "i-2"] {
            dns.write_own(&id(owner), &shared).await.unwrap();
            assert_eq!(own(&dns, "i-3").await, shared);
        }
        let sets = server.sets().await;
        assert_eq!(sets.len(), types);
        for set in sets {
            let target = set.alias_target.unwrap();
            assert_eq!(target.dns_name.trim_end_matches('.'), name);
            assert_eq!(target.hosted_zone_id, "Z32O12XQLNTSW2");
        }
        let error = dns.delete(&shared[0]).await.unwrap_err();
        assert!(matches!(error, DnsError::Foreign { .. }), "{error}");
    }
}

/// Answers every request alike; how many there were.
async fn answers(status: &'static str, body: &'static str) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 8192];
            // Its head is in the first packet, and its body does not matter.
            if stream.read(&mut request).await.unwrap_or(0) == 0 {
                continue;
            }
            count.fetch_add(1, Ordering::SeqCst);
            let length = body.len();
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-type: text/xml\r\ncontent-length: {length}\r\n\
                 connection: close\r\n\r\n{body}"
            );
            stream.write_all(answer.as_bytes()).await.unwrap();
            // Read to its end, so that closing it resets nothing.
            stream.shutdown().await.unwrap();
            while stream.read(&mut request).await.unwrap_or(0) > 0 {}
        }
    });
    (address, asked)
}

macro_rules! refusal {
    ($code:literal, $message:literal) => {
        concat!(
            "<?xml version=\"1.0\"?><ErrorResponse ",
            "xmlns=\"https://route53.amazonaws.com/doc/2013-04-01/\"><Error><Type>Sender</Type>",
            "<Code>",
            $code,
            "</Code><Message>",
            $message,
            "</Message></Error><RequestId>1</RequestId></ErrorResponse>"
        )
    };
}

#[tokio::test]
async fn a_refusal_is_told_by_its_code_and_nothing_is_repeated() {
    let cases = [
        (
            "400 Bad Request",
            refusal!("Throttling", "Rate exceeded"),
            true,
            "Throttling",
        ),
        (
            "400 Bad Request",
            refusal!("PriorRequestNotComplete", "The request was rejected"),
            true,
            "PriorRequestNotComplete",
        ),
        (
            "403 Forbidden",
            refusal!("AccessDenied", "User is not authorized"),
            false,
            "generate iam-policy",
        ),
        (
            "403 Forbidden",
            refusal!("SignatureDoesNotMatch", "Signature expired"),
            false,
            "this host's clock",
        ),
        (
            "404 Not Found",
            refusal!("NoSuchHostedZone", "No hosted zone found with ID: Z1"),
            false,
            "No hosted zone found",
        ),
        (
            "400 Bad Request",
            refusal!(
                "InvalidChangeBatch",
                "[RRSet of type A with DNS name fleet.example.com., \
                SetIdentifier ra/mirrors/i-1 cannot be created because a non multivalue answer \
                RRSet exists with the same name and type.]"
            ),
            false,
            "a non multivalue answer",
        ),
        ("503 Service Unavailable", "", false, "HTTP 503"),
    ];
    for (status, body, throttled, words) in cases {
        let (address, asked) = answers(status, body).await;
        let settings = settings("Z1", DnsPolicy::Multivalue);
        let dns = Dns::new(&settings, GROUP, Some(&aws(address).await))
            .await
            .unwrap();
        let wanted = record("i-1", &["192.0.2.1"]);
        for (calls, error) in [
            (1, dns.own_records(&id("i-1")).await.unwrap_err()),
            (2, dns.records().await.unwrap_err()),
            (3, dns.delete(&wanted).await.unwrap_err()),
        ] {
            assert_eq!(error.is_throttled(), throttled, "{error}");
            let text = error.to_string();
            assert!(text.contains(words), "{text}");
            assert!(text.contains(NAME) && text.contains("zone Z1"), "{text}");
            assert!(
                !text.contains("the-secret-key") && !text.contains("AKIDTEST"),
                "{text}"
            );
            assert!(calls <= asked.load(Ordering::SeqCst));
        }
        assert_eq!(
            asked.load(Ordering::SeqCst),
            3,
            "one request each: {status}"
        );
    }
}

#[tokio::test]
async fn without_aws_it_says_what_is_missing() {
    let settings = settings("Z1", DnsPolicy::Multivalue);
    let error = Dns::new(&settings, GROUP, None)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("AWS_PROFILE") && error.contains(NAME),
        "{error}"
    );
}
