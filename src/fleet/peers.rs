//! Whether an agent serves, asked as its clients ask: this one and its peers, which have the same
//! configuration, and so the same port.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use http::StatusCode;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::facts::{Group, InstanceId, LifecycleState, Peers, Records};
use crate::health::{head, is_alert};
use crate::tls;

/// How long one may take.
const DEADLINE: Duration = Duration::from_secs(3);
/// So many are asked: of those in service, and of those that the name has.
const MOST: usize = 20;

/// How an agent does not serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NotServing {
    /// In a sentence.
    pub why: String,
    /// It says so itself.
    pub answers: bool,
}

/// Asks agents. Cheap to clone.
#[derive(Clone)]
pub(super) struct Prober {
    port: u16,
    tls: Option<TlsConnector>,
}

impl Prober {
    pub fn new(port: u16, speaks_tls: bool) -> Result<Self, rustls::Error> {
        let tls = if speaks_tls {
            // Who answers is not the question, and nothing is sent that is anybody's secret.
            Some(TlsConnector::from(Arc::new(tls::trusting_anybody()?)))
        } else {
            None
        };
        Ok(Self { port, tls })
    }

    /// Whether the agent at this address is ready, by its own word: `/` on the registry's port.
    pub async fn serves(&self, address: IpAddr) -> Result<(), NotServing> {
        let address = SocketAddr::new(address, self.port);
        let asked = tokio::time::timeout(DEADLINE, self.ask(address)).await;
        let late = || NotServing {
            why: format!("no answer within {}", humantime::format_duration(DEADLINE)),
            answers: false,
        };
        let asked = asked.unwrap_or_else(|_| Err(late()));
        asked.map_err(|NotServing { why, answers }| NotServing {
            why: format!("{address} does not serve: {why}"),
            answers,
        })
    }

    async fn ask(&self, address: SocketAddr) -> Result<(), NotServing> {
        let asked = async {
            let socket = TcpStream::connect(address).await?;
            match &self.tls {
                None => head(socket).await,
                Some(tls) => {
                    let name = ServerName::from(address.ip());
                    head(tls.connect(name, socket).await?).await
                }
            }
        };
        match asked.await {
            Ok(StatusCode::OK) => Ok(()),
            Ok(status) => Err(NotServing {
                why: format!("it answers {status}"),
                answers: true,
            }),
            // Such as: no certificate of an authority in `tls.client_ca` was shown. It is there.
            Err(error) if is_alert(&*error) => Ok(()),
            Err(error) => Err(NotServing {
                why: super::aws::chain(&*error),
                answers: false,
            }),
        }
    }

    /// Asks those of `asked` whose address is known; the others do not answer.
    pub async fn ready(
        &self,
        asked: BTreeSet<InstanceId>,
        addresses: &BTreeMap<InstanceId, Vec<IpAddr>>,
    ) -> Peers {
        let known = asked
            .iter()
            .filter_map(|id| Some((id.clone(), *addresses.get(id)?.first()?)));
        let known: Vec<(InstanceId, IpAddr)> = known.collect();
        let answers = stream::iter(known).map(|(id, address)| {
            let prober = self.clone();
            async move { prober.serves(address).await.is_ok().then_some(id) }
        });
        let ready = answers
            .buffer_unordered(MOST)
            .filter_map(std::future::ready);
        let ready: BTreeSet<InstanceId> = ready.collect().await;
        Peers { asked, ready }
    }
}

/// Who is asked: those in service, or some of them, chosen anew each time, and the owners of
/// records, but for this instance.
pub(super) fn chosen(
    own: &InstanceId,
    group: Option<&Group>,
    records: Option<(&Records, &str)>,
    random: &mut fastrand::Rng,
) -> BTreeSet<InstanceId> {
    let members = group.into_iter().flat_map(|group| &group.members);
    let in_service = members.filter(|(_, member)| member.state == LifecycleState::InService);
    let in_service = in_service.map(|(id, _)| id.clone());
    let owners = records.into_iter().flat_map(|(records, group)| {
        records
            .records
            .iter()
            .filter_map(|record| record.owner(group))
    });
    let mut some = |ids: BTreeSet<InstanceId>| {
        let ids: Vec<InstanceId> = ids.into_iter().filter(|id| id != own).collect();
        random.choose_multiple(ids, MOST)
    };
    let in_service = some(in_service.collect());
    let owners = some(owners.collect());
    in_service.into_iter().chain(owners).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::facts::Record;

    fn ids(range: std::ops::Range<u8>) -> Vec<IpAddr> {
        range.map(|n| IpAddr::from([10, 0, 0, n])).collect()
    }

    #[test]
    fn a_few_of_many_are_asked_and_never_this_one() {
        let addresses = ids(1..250);
        let group = Group::of_a_list(&addresses);
        let own = InstanceId::new("10.0.0.7");
        let mut random = fastrand::Rng::with_seed(1);
        let mut seen = BTreeSet::new();
        for _ in 0..200 {
            let asked = chosen(&own, Some(&group), None, &mut random);
            assert_eq!(asked.len(), MOST);
            seen.extend(asked);
        }
        assert_eq!(seen.len(), 248, "the same ones are asked each time");
        assert!(!seen.contains(&own));
    }

    #[test]
    fn those_in_the_name_are_asked_as_well() {
        let own = InstanceId::new("i-1");
        let record = |identifier: &str| -> Record {
            let record = serde_json::json!({
                "identifier": identifier, "addresses": ["10.0.0.1"],
                "ttl": {"secs": 30, "nanos": 0}, "routing": "multivalue",
            });
            serde_json::from_value(record).unwrap()
        };
        let records = Records {
            records: ["ra/mirrors/i-1", "ra/mirrors/i-2", "ra/other/i-3", "else"]
                .map(record)
                .into(),
            complete: true,
        };
        let mut random = fastrand::Rng::with_seed(1);
        let asked = chosen(&own, None, Some((&records, "mirrors")), &mut random);
        assert_eq!(asked, BTreeSet::from([InstanceId::new("i-2")]));
    }
}
