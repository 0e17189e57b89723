//! The end: the engines do without the mirror before it is gone, and systemd is not kept waiting.

use std::time::Duration;

use super::{Decision, Host, Watch, Word};
use crate::host::plan::Wanted;

/// How long a job may take when this stops.
const JOB: Duration = Duration::from_secs(20);

/// How long the end may take. Both together are less than systemd gives the unit
/// (`TimeoutStopSec=`): one that it kills has told nobody what it leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopLimits {
    /// From the order to the end of what was under way.
    pub grace: Duration,
    /// From there until the engines are unwired, whatever that takes.
    pub unwire: Duration,
}

impl Default for StopLimits {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(5),
            unwire: Duration::from_mins(1),
        }
    }
}

impl<H: Host> Watch<'_, H> {
    /// Unwires the engines. Where the time is over before that is proved, the journal has what the
    /// next start is to end.
    pub(super) async fn stop(&mut self) {
        let limit = self.limits.unwire;
        self.host.tell(Word::Stopping(limit));
        self.apply.deadlines.job = self.apply.deadlines.job.min(JOB);
        if tokio::time::timeout(limit, self.unwire()).await.is_err() {
            self.tried = Some(Wanted::Withdrawn);
            let limit = humantime::format_duration(limit);
            self.failed(&format!(
                "it stops, and the engines were not proved to do without the mirror within {limit}; \
                 what was begun ({}) is taken back when registry-agent-host.service starts again, \
                 or by `registry-agent rollback`",
                self.apply.journal.transaction_file().display()
            ));
        }
        self.say();
    }

    async fn unwire(&mut self) {
        // What was cut off by the order to stop, or before.
        self.may_be_unfinished();
        let done = if self.recover().await {
            self.change(Wanted::Withdrawn).await
        } else {
            Err(self.state.blocked.clone().unwrap_or_default())
        };
        self.settled(&Decision::Tell(Wanted::Withdrawn), done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_gives_the_unit_more_time_to_stop_than_it_takes() {
        let unit = include_str!("../../../units/registry-agent-host.service");
        let mut limits = unit
            .lines()
            .filter_map(|line| line.strip_prefix("TimeoutStopSec="));
        let given = Duration::from_secs(limits.next().unwrap().parse().unwrap());
        assert_eq!(limits.next(), None);
        let StopLimits { grace, unwire } = StopLimits::default();
        // To be told, to say so, and for a host that is slow.
        let slack = Duration::from_secs(15);
        assert!(grace + unwire + slack <= given, "{given:?}");
        assert!(JOB < unwire);
    }
}
