//! The start: docker's file is there before docker is, and docker proves afterwards that it has it.

use std::time::Duration;

use tokio::time::Instant;

use super::{Decision, Host, INTERVAL, Probe, Watch};
use crate::host::apply::System as _;
use crate::host::journal::Transaction;
use crate::host::plan::Wanted;

/// How long the start waits for the agent: docker waits for the start.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a docker that is to start may take before its file is taken for good unproved.
const BOOT: Duration = Duration::from_secs(90);

impl<H: Host> Watch<'_, H> {
    /// Takes back the files of a change that was not ended; or else, if the mirror serves: docker's
    /// file, for it to start with.
    pub(super) async fn begin_at_boot(&mut self) -> Option<Transaction> {
        match self.apply.recover_files() {
            Ok(false) => {}
            Ok(true) => {
                self.may_be_unfinished();
                return None;
            }
            Err(error) => {
                self.block(&error);
                return None;
            }
        }
        if self.resume_left() {
            return None;
        }
        let end = Instant::now() + PATIENCE;
        while self.host.serves().await != Probe::Serves {
            if Instant::now() >= end {
                return None;
            }
            tokio::time::sleep(INTERVAL / 5).await;
        }
        let plan = match self.host.plan(Wanted::Wired).await {
            Ok(plan) => plan,
            Err(why) => {
                self.failed(&why);
                return None;
            }
        };
        match self.apply.begin(&plan, self.purpose(Wanted::Wired)).await {
            Ok(transaction) => transaction,
            Err(error) => {
                self.fell_short();
                self.failed(&error.to_string());
                None
            }
        }
    }

    /// Waits for the daemons that start after READY.
    pub(super) async fn wait_for_daemons(&self, transaction: &Transaction) {
        let end = Instant::now() + BOOT;
        while Instant::now() < end && self.is_any_waiting(transaction).await {
            tokio::time::sleep(INTERVAL / 5).await;
        }
    }

    /// Has the daemons prove it.
    pub(super) async fn complete_at_boot(&mut self, transaction: Transaction) {
        let completed = self.apply.complete(transaction).await;
        let completed = completed.map_err(|error| {
            self.fell_short();
            error.to_string()
        });
        self.settled(&Decision::Tell(Wanted::Wired), completed.map(|_| ()));
        self.look_at_daemons(Wanted::Wired).await;
    }

    async fn is_any_waiting(&self, transaction: &Transaction) -> bool {
        for (unit, before) in &transaction.units {
            // One that did not run has until then to come up; one that runs can be told now. One that
            // is inactive and has no job was stopped, or is not to start at all: it is not waited for.
            if before.active_state != "active"
                && let Ok(now) = self.apply.system.unit(unit).await
                && match now.active_state.as_str() {
                    "inactive" => now.has_job,
                    state => state == "activating",
                }
            {
                return true;
            }
        }
        false
    }
}
