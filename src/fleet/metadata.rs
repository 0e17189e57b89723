//! What the metadata service says of this instance: once who it is, and for ever what is planned for
//! it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use tokio::sync::watch;

use super::facts::{InstanceId, LifecycleState, Metadata, Own};
use super::imds::{Imds, ImdsError};

/// Between two looks, in milliseconds: a spot notice comes two minutes ahead.
const PAUSE: std::ops::Range<u64> = 2000..5000;

/// Who this instance is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub own: Own,
    pub zone: Option<Arc<str>>,
}

/// Asks who this instance is.
pub(super) async fn identity(imds: &Imds) -> Result<Identity, ImdsError> {
    let id = InstanceId::new(imds.must("instance-id").await?);
    let zone = imds.get("placement/availability-zone").await?;
    let mut addresses: Vec<IpAddr> = Vec::new();
    for path in ["local-ipv4", "ipv6"] {
        let said = imds.get(path).await?;
        addresses.extend(said.and_then(|said| said.parse::<IpAddr>().ok()));
    }
    Ok(Identity {
        own: Own { id, addresses },
        zone: zone.map(Arc::from),
    })
}

/// What was heard last of what is planned for this instance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Heard {
    target_state: Option<LifecycleState>,
    /// When EC2 takes it back.
    spot: Option<SystemTime>,
    rebalance: bool,
}

impl Heard {
    /// The same as of now.
    pub fn now(&self) -> Metadata {
        let left = |at: SystemTime| at.duration_since(SystemTime::now()).unwrap_or_default();
        Metadata {
            target_state: self.target_state.clone(),
            spot: self.spot.map(left),
            rebalance: self.rebalance,
        }
    }
}

/// `{"action": "terminate", "time": "2026-11-21T08:22:00Z"}`
#[derive(Deserialize)]
struct InstanceAction {
    time: String,
}

/// Watches for ever. What can't be asked stays what it was, which is said once.
pub(super) async fn watch(imds: Arc<Imds>, sender: watch::Sender<Heard>) {
    let mut failing = false;
    loop {
        let mut heard = sender.borrow().clone();
        let failure = look(&imds, &mut heard).await.err();
        match &failure {
            Some(error) if !failing => {
                tracing::warn!(%error, "what was known of this instance stays: {error}");
            }
            None if failing => tracing::info!("the instance metadata service answers again"),
            _ => {}
        }
        failing = failure.is_some();
        sender.send_if_modified(|known| {
            let changed = *known != heard;
            *known = heard;
            changed
        });
        tokio::time::sleep(Duration::from_millis(fastrand::u64(PAUSE))).await;
    }
}

/// One question after the other: what was answered counts, whatever the next one comes to.
async fn look(imds: &Imds, heard: &mut Heard) -> Result<(), ImdsError> {
    let state = imds.get("autoscaling/target-lifecycle-state").await?;
    heard.target_state = state.map(LifecycleState::from);
    let action = imds.get("spot/instance-action").await?;
    heard.spot = action.map(|action| taken_back_at(&action));
    let rebalance = imds.get("events/recommendations/rebalance").await?;
    heard.rebalance = rebalance.is_some();
    Ok(())
}

/// A notice whose time can't be read is a notice all the same, and its time is taken to be past.
fn taken_back_at(action: &str) -> SystemTime {
    let action: Option<InstanceAction> = serde_json::from_str(action).ok();
    let time = action.and_then(|action| humantime::parse_rfc3339_weak(&action.time).ok());
    time.unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_is_one_whatever_its_time() {
        let at = taken_back_at(r#"{"action": "terminate", "time": "2026-11-21T08:22:00Z"}"#);
        assert_eq!(
            humantime::format_rfc3339_seconds(at).to_string(),
            "2026-11-21T08:22:00Z"
        );
        for said in ["", "{}", r#"{"action": "stop", "time": "soon"}"#] {
            let heard = Heard {
                spot: Some(taken_back_at(said)),
                ..Heard::default()
            };
            assert_eq!(heard.now().spot, Some(Duration::ZERO), "{said}");
        }
    }
}
