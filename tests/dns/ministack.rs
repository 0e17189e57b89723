//! A Route 53 of a test's own.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_sdk_route53::Client;
use aws_sdk_route53::types::{
    Change, ChangeAction, ChangeBatch, ResourceRecord, ResourceRecordSet, RrType,
};
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};

use crate::support::cloud_tools;
use crate::support::{PATIENCE, eventually, own_address};
use crate::{NAME, Running};

pub struct Ministack {
    pub zone: String,
    /// Somebody else's, who has the same zone.
    pub client: Client,
    pub aws: SdkConfig,
    _running: Running,
}

impl Ministack {
    /// One with the zone example.com.
    pub async fn start() -> Self {
        let ip = own_address();
        // It takes no port 0. Nobody else has this address.
        let address = TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap();
        let child = Command::new(cloud_tools::python())
            .args(["-m", "ministack"])
            .env("BIND_HOST", ip.to_string())
            .env("GATEWAY_PORT", address.port().to_string())
            .env("SERVICES", "route53")
            // It would listen on all addresses.
            .env("IOT_MTLS_ENABLED", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("ministack is installed by tests/cloud-tools");
        let running = Running(child);
        eventually(3 * PATIENCE, "ministack answers", || {
            TcpStream::connect(address).is_ok()
        });
        let aws = aws(address).await;
        let client = Client::new(&aws);
        let zone = client.create_hosted_zone().name("example.com");
        let zone = zone.caller_reference("one").send().await.unwrap();
        let zone = zone.hosted_zone.unwrap().id;
        Self {
            zone: zone.rsplit('/').next().unwrap().to_owned(),
            client,
            aws,
            _running: running,
        }
    }

    /// Puts records there that are not the agent's.
    pub async fn put(&self, sets: Vec<ResourceRecordSet>) {
        for sets in sets.chunks(500) {
            let changes = sets.iter().map(|set| {
                let change = Change::builder().action(ChangeAction::Upsert);
                change.resource_record_set(set.clone()).build().unwrap()
            });
            let changes = changes.collect();
            let batch = ChangeBatch::builder().set_changes(Some(changes)).build();
            let change = self.client.change_resource_record_sets();
            let change = change.hosted_zone_id(&self.zone);
            change.change_batch(batch.unwrap()).send().await.unwrap();
        }
    }

    /// All that the zone holds but its own SOA and NS, by its own word.
    pub async fn sets(&self) -> Vec<ResourceRecordSet> {
        let list = self.client.list_resource_record_sets();
        let list = list.hosted_zone_id(&self.zone).send().await.unwrap();
        assert!(!list.is_truncated, "more than a test looks at");
        let sets = list.resource_record_sets.into_iter();
        sets.filter(|set| !matches!(set.r#type, RrType::Soa | RrType::Ns))
            .collect()
    }
}

/// A set of one value, with an identifier if it has one.
pub fn set(name: &str, kind: RrType, identifier: Option<&str>, value: &str) -> ResourceRecordSet {
    let value = ResourceRecord::builder().value(value).build().unwrap();
    ResourceRecordSet::builder()
        .name(name)
        .r#type(kind)
        .set_set_identifier(identifier.map(str::to_owned))
        .set_multi_value_answer(identifier.map(|_| true))
        .ttl(30)
        .resource_records(value)
        .build()
        .unwrap()
}

/// One of the fleet's name.
pub fn of_the_name(identifier: &str, value: &str) -> ResourceRecordSet {
    let kind = if value.contains(':') {
        RrType::Aaaa
    } else {
        RrType::A
    };
    set(NAME, kind, Some(identifier), value)
}

/// The SDK's settings for a server of a test's own.
pub async fn aws(address: SocketAddr) -> SdkConfig {
    let http = aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .build_https();
    let keys = Credentials::new("AKIDTEST", "the-secret-key", None, None, "test");
    aws_config::defaults(BehaviorVersion::v2026_01_12())
        .region(Region::from_static("us-east-1"))
        .endpoint_url(format!("http://{address}"))
        .credentials_provider(keys)
        .http_client(http)
        .load()
        .await
}
