//! What an earlier change has left, taken back as soon as that can be done.
//!
//! A crash, a full disk or an `/etc` that is read-only for a moment leaves a transaction in the
//! journal, and a journal that nobody understands leaves it unknown what there is. Until that is
//! ended nothing else is changed, but this goes on: it looks, tells, and tries again.

use std::time::Duration;

use tokio::time::Instant;

use super::{Host, Watch};
use crate::host::apply::{ApplyError, Recovered};

/// The longest time between two attempts. Each costs a read of the journal, and where that is
/// understood an attempt to write a file.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
pub(super) const NEXT_STEP: &str = "put right what `blocked` says: it is tried again by itself, and at \
                                    once by `systemctl reload registry-agent-host`";

/// What keeps the host from being changed, and when that is looked at again.
#[derive(Debug)]
pub(super) struct Blocked {
    failures: u32,
    next: Instant,
}

impl Blocked {
    pub(super) fn try_now(&mut self) {
        self.next = Instant::now();
    }
}

impl<H: Host> Watch<'_, H> {
    /// There may be something that is not ended: it is looked at next.
    pub(super) fn may_be_unfinished(&mut self) {
        let failures = self.blocked.as_ref().map_or(0, |blocked| blocked.failures);
        let next = Instant::now();
        self.blocked = Some(Blocked { failures, next });
    }

    /// Whether the host can be changed: ends what is left, when it is time to try.
    pub(super) async fn recover(&mut self) -> bool {
        let Some(blocked) = &self.blocked else {
            return true;
        };
        if Instant::now() < blocked.next {
            return false;
        }
        match self.apply.recover().await {
            Ok(recovered) => {
                self.recovered(recovered.as_ref());
                true
            }
            Err(error) => {
                self.block(&error);
                false
            }
        }
    }

    fn recovered(&mut self, recovered: Option<&Recovered>) {
        match recovered {
            None => {}
            Some(Recovered::Finished) => tracing::info!("a change that was proved is ended"),
            Some(Recovered::Undone(undone)) => {
                tracing::warn!("a change that was not ended: {undone}");
            }
        }
        self.blocked = None;
        if self.state.blocked.take().is_some() {
            tracing::info!("the host can be changed again");
            self.state.next_step = None;
            self.looked = None;
        }
    }

    /// Nothing is changed until this is put right.
    pub(super) fn block(&mut self, error: &ApplyError) {
        let failures = self.blocked.as_ref().map_or(0, |blocked| blocked.failures);
        let wait = Duration::from_secs(2_u64.saturating_pow(failures)).min(LONGEST_WAIT);
        self.blocked = Some(Blocked {
            failures: failures.saturating_add(1),
            next: Instant::now() + wait,
        });
        let why = error.to_string();
        if self.state.blocked.as_ref() != Some(&why) {
            tracing::error!("nothing of this host can be changed: {why}");
            self.state.blocked = Some(why);
        }
        self.state.next_step = Some(NEXT_STEP.to_owned());
    }

    /// A change has failed, and may not be ended.
    pub(super) fn fell_short(&mut self) {
        if !matches!(self.apply.journal.transaction(), Ok(None)) {
            self.may_be_unfinished();
        }
    }
}
