//! Signals: SIGTERM and SIGINT stop the agent, SIGHUP has it read its configuration again, and what
//! nobody means does nothing.

use std::io;
use std::sync::{Arc, PoisonError};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Shared;
use crate::config::{self, Serving, Sources};
use crate::hosted::Hosted;
use crate::log::LevelHandle;
use crate::systemd::stray;

/// The signals that the agent acts on.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        stray::ignore("registry-agent")?;
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for SIGTERM or SIGINT.
    pub(super) async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Reloads at every SIGHUP until it is time to stop.
    pub(super) async fn reload_until_stopped(
        &mut self,
        shared: &Shared,
        sources: &Sources,
        level: &LevelHandle,
    ) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => reload(shared, sources, level),
            }
        }
    }
}

/// Reads the configuration again. A broken one changes nothing.
fn reload(shared: &Shared, sources: &Sources, level: &LevelHandle) {
    let loaded = match config::load(sources) {
        Ok(loaded) => loaded,
        Err(errors) => {
            tracing::error!(%errors, "the configuration is broken: the one before stays in force: {errors}");
            return;
        }
    };
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let (before, mut after) = (shared.settings(), loaded.settings);
    let fixed = [
        ("role", before.role() != after.role()),
        ("admin", before.admin != after.admin),
        ("log.format", before.log.format != after.log.format),
        ("log.fields", before.log.fields != after.log.fields),
        ("fleet", before.fleet != after.fleet),
    ];
    tell_fixed(&fixed);
    // What is shown must be what is in force.
    after.admin.clone_from(&before.admin);
    after.log.format = before.log.format;
    after.log.fields.clone_from(&before.log.fields);
    after.fleet.clone_from(&before.fleet);
    match (&before.serving, &mut after.serving) {
        (Some(before), Some(after)) => reload_serving(shared, before, after),
        // The role has changed.
        (before, after) => after.clone_from(before),
    }
    level.set(after.log.level);
    *shared
        .settings
        .write()
        .unwrap_or_else(PoisonError::into_inner) = Arc::new(after);
    tracing::info!("reloaded");
}

fn reload_serving(shared: &Shared, before: &Serving, after: &mut Serving) {
    tell_fixed(&[
        ("listen", before.listen != after.listen),
        ("tls", before.tls.is_some() != after.tls.is_some()),
        ("storage", before.storage != after.storage),
    ]);
    after.listen = before.listen;
    after.storage.clone_from(&before.storage);
    if before.tls.is_some() != after.tls.is_some() {
        after.tls.clone_from(&before.tls);
    }
    if let Some(identity) = &shared.identity {
        identity.refresh(after.tls.as_ref());
    }
    if let Some(mirror) = &shared.mirror {
        mirror.reload(after);
        Hosted::tell(mirror.store(), after);
    }
}

fn tell_fixed(keys: &[(&str, bool)]) {
    for (key, changed) in keys {
        if *changed {
            tracing::warn!(
                key,
                "this key has changed, which takes effect at the next start"
            );
        }
    }
}
