//! A mirror, taken away: what could not be proved is not put back.

use super::{Apply, ApplyError, Partly, Purpose, Report, System};
use crate::host::journal::Transaction;
use crate::host::plan::{Plan, Verb};

impl<S: System> Apply<'_, S> {
    /// As [`Apply::apply_each`], but for a daemon that runs and does not prove that it has let go of
    /// its mirror: a docker that hangs, for one. Its file stays without, since what it was names a
    /// mirror that is dead or about to be, and the daemon reads it whenever it does again.
    pub async fn withdraw_each(&self, plan: &Plan, purpose: &Purpose) -> Partly {
        let mut done = Partly {
            report: Report::default(),
            failures: plan.errors.iter().map(ToString::to_string).collect(),
        };
        for part in plan.split() {
            match self.withdraw(&part, purpose.clone()).await {
                Ok(report) => done.report.extend(report),
                Err(failure) => done.failures.push(failure),
            }
        }
        done
    }

    async fn withdraw(&self, part: &Plan, purpose: Purpose) -> Result<Report, String> {
        let begun = self.begin(part, purpose).await;
        let Some(mut transaction) = begun.map_err(|error| error.to_string())? else {
            return Ok(Report::default());
        };
        let (report, failure) = match self.tell(&mut transaction).await {
            Ok(report) => (report, None),
            Err(failure) if self.keeps_running(&transaction).await => (
                Report::default(),
                Some(format!(
                    "{failure}\nThe files are without the mirror all the same, and stay so: who \
                     has not read them does when it is reloaded or started next"
                )),
            ),
            Err(failure) => {
                let undone = self.undo(&transaction).await;
                return Err(ApplyError::Undone { failure, undone }.to_string());
            }
        };
        transaction.proved = true;
        let ended = self.journal.record(&transaction);
        let ended = ended.map_err(ApplyError::from);
        let ended = ended.and_then(|()| self.finish(&transaction));
        match (ended, failure) {
            (Ok(()), None) => Ok(report),
            (Ok(()), Some(failure)) => Err(failure),
            (Err(error), None) => Err(error.to_string()),
            (Err(error), Some(failure)) => Err(format!("{failure}\n{error}")),
        }
    }

    /// Whether the daemons are none the worse for it: none was to be started again, and each runs.
    async fn keeps_running(&self, transaction: &Transaction) -> bool {
        let mut actions = transaction.actions.iter();
        if actions.any(|action| action.verb == Verb::Restart) {
            return false;
        }
        for unit in transaction.units.keys() {
            let now = self.system.unit(unit).await;
            let runs = |state: &str| matches!(state, "active" | "reloading" | "refreshing");
            if !now.is_ok_and(|now| runs(&now.active_state)) {
                return false;
            }
        }
        true
    }
}
