//! A plan, done part by part: an engine that can't be told keeps no other one from being told.

use super::{Apply, Purpose, Report, System};
use crate::host::plan::Plan;

/// What became of the parts of a plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a part may have failed"]
pub struct Partly {
    /// What was done and proved.
    pub report: Report,
    /// Why the other parts were not planned, or could not be done; they are as they were. Empty
    /// where all is done.
    pub failures: Vec<String>,
}

impl<S: System> Apply<'_, S> {
    /// Does each part of a plan that has nothing to do with the others by itself: all of it, or none
    /// of it ([`Apply::apply`]). That is for taking a mirror away, where the others are no worse off
    /// for the one that could not be told.
    pub async fn apply_each(&self, plan: &Plan, purpose: &Purpose) -> Partly {
        let mut done = Partly {
            report: Report::default(),
            failures: plan.errors.iter().map(ToString::to_string).collect(),
        };
        for part in plan.split() {
            match self.apply(&part, purpose.clone()).await {
                Ok(report) => done.report.extend(report),
                Err(error) => done.failures.push(error.to_string()),
            }
        }
        done
    }
}

impl Report {
    pub(super) fn extend(&mut self, other: Self) {
        self.files.extend(other.files);
        self.jobs.extend(other.jobs);
        self.proved.extend(other.proved);
        self.notes.extend(other.notes);
    }
}

impl Partly {
    /// The report, or all that failed, one a line.
    pub fn result(self) -> Result<Report, String> {
        if self.failures.is_empty() {
            Ok(self.report)
        } else {
            Err(self.failures.join("\n"))
        }
    }
}
