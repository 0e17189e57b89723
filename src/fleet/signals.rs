//! What the agent says of itself: whether it serves at its own addresses, and whether the images are
//! there that it is to have before it joins.

use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::watch;

use super::peers::{NotServing, Prober};
use crate::config::Serving;
use crate::oci::ImageName;
use crate::warm::Warmer;

/// Between two looks, before the first success and after it.
const EAGER: Duration = Duration::from_secs(1);
const INTERVAL: Duration = Duration::from_secs(5);
/// So many looks have to fail, one after the other.
const THRESHOLD: u32 = 2;
/// Between two attempts to fetch images, in seconds.
const WARM_AGAIN: std::ops::Range<u64> = 10..30;

/// Before the first look.
pub(super) fn not_asked() -> NotServing {
    NotServing {
        why: "it was not asked at its own address yet".to_owned(),
        answers: true,
    }
}

/// Asks this agent at the addresses that others are given, for ever; what is published is how it
/// fails there.
pub(super) async fn watch_own(
    prober: Prober,
    addresses: Vec<IpAddr>,
    sender: watch::Sender<Option<NotServing>>,
) {
    let mut failures = 0;
    loop {
        let mut failure = None;
        for address in &addresses {
            failure = failure.or(prober.serves(*address).await.err());
        }
        failures = if failure.is_some() { failures + 1 } else { 0 };
        let was_ready = sender.borrow().is_none();
        if failure.is_none() || !was_ready || failures >= THRESHOLD {
            sender.send_if_modified(|known| {
                let turned = known.is_none() != failure.is_none();
                match &failure {
                    Some(NotServing { why, .. }) if turned => {
                        tracing::error!("for the fleet, {why}");
                    }
                    None if turned => tracing::info!("this agent serves at its own address"),
                    _ => {}
                }
                let changed = *known != failure;
                *known = failure;
                changed
            });
        }
        let ready = sender.borrow().is_none();
        tokio::time::sleep(if ready { INTERVAL } else { EAGER }).await;
    }
}

/// Has images fetched, again and again those that could not be. Ends when all are there.
pub(super) async fn warm(serving: Serving, images: Vec<String>, sender: watch::Sender<bool>) {
    let mut failing = false;
    loop {
        let mut failure = None;
        for image in &images {
            if let Err(error) = fetch(&serving, image).await {
                failure = Some(format!("{image}: {error}"));
            }
        }
        match failure {
            None => {
                if !images.is_empty() {
                    tracing::info!(images = images.len(), "the images of fleet.warm are here");
                }
                sender.send_replace(true);
                return;
            }
            Some(error) if !failing => {
                tracing::warn!(%error, "an image of fleet.warm can't be fetched yet: {error}");
                failing = true;
            }
            Some(_) => {}
        }
        tokio::time::sleep(Duration::from_secs(fastrand::u64(WARM_AGAIN))).await;
    }
}

async fn fetch(serving: &Serving, image: &str) -> Result<(), crate::warm::Error> {
    let image: ImageName = image.parse()?;
    Warmer::of_this_host(serving)?.fetch(&image).await
}
