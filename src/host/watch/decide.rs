//! When the engines are wired and when they are not: pure, with the time as an argument.

use std::time::Duration;

use crate::config::Drift;
use crate::host::plan::Wanted;

/// What the agent says of the mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// It has pulled through it.
    Serves,
    /// It does not serve, or the agent does not answer, and why.
    Fails(String),
}

/// The shortest time between two changes: docker is not reloaded every few seconds for a mirror
/// that comes and goes.
pub const HOLD: Duration = Duration::from_secs(30);
/// The longest wait after changes that failed.
const LONGEST_WAIT: Duration = Duration::from_mins(5);
/// After so many corrections in [`FIGHT_WINDOW`] somebody else means it: a configuration management
/// that puts its own file back for ever would have docker reload for ever.
const FIGHTS: usize = 3;
const FIGHT_WINDOW: Duration = Duration::from_mins(10);

/// What is known of the past. All times are since the same moment.
#[derive(Debug, Clone, Default)]
pub struct Decider {
    /// What the engines were told last, by this process.
    told: Option<Wanted>,
    failing_since: Option<Duration>,
    changed: Option<Duration>,
    failures: u32,
    corrections: Vec<Duration>,
    /// Whether somebody else has changed what was told, and nobody has put that right: it is
    /// remembered while the mirror is away, when there is nothing of ours to compare with.
    theirs: bool,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Leave,
    /// The engines are told, because the mirror came or went.
    Tell(Wanted),
    /// What somebody else has changed is put right.
    Correct(Wanted),
    /// What somebody else has changed stays, and why nothing is done about it.
    LeaveDrift(&'static str),
}

impl Decider {
    /// What is to be done now. `drifted` is whether the host is not any more as it was left.
    ///
    /// What somebody else has changed, and the policy or a lost fight leaves to them, stays theirs
    /// when the mirror goes and comes back: a dead mirror is still withdrawn, which takes out what is
    /// ours and nothing else, but it is not told anew until they have put it back themselves, the
    /// fight is long over, or the configuration is read again.
    pub fn decide(
        &mut self,
        now: Duration,
        probe: &Probe,
        withdraw_after: Duration,
        drifted: bool,
        policy: Drift,
    ) -> Decision {
        let wanted = match probe {
            Probe::Serves => {
                self.failing_since = None;
                Some(Wanted::Wired)
            }
            Probe::Fails(_) => {
                let since = *self.failing_since.get_or_insert(now);
                // At the start it is not known to serve, and what was left is left alone: a mirror
                // that is only slow to come is no reason to have docker reload twice.
                (now.saturating_sub(since) >= withdraw_after).then_some(Wanted::Withdrawn)
            }
        };
        if drifted {
            self.theirs = self.told.is_some();
        } else if self.told == Some(Wanted::Wired) {
            self.theirs = false;
        }
        let held = self
            .changed
            .is_some_and(|at| now.saturating_sub(at) < self.wait());
        let left = self.left_to_them(now, policy);
        if let Some(wanted) = wanted
            && self.told != Some(wanted)
        {
            return match left {
                Some(why) if wanted == Wanted::Wired => Decision::LeaveDrift(why),
                _ if held => Decision::Leave,
                _ => Decision::Tell(wanted),
            };
        }
        let Some(told) = self.told.filter(|_| drifted) else {
            return Decision::Leave;
        };
        if let Some(why) = left {
            return Decision::LeaveDrift(why);
        }
        if held && self.failures > 0 {
            return Decision::Leave;
        }
        Decision::Correct(told)
    }

    /// Why what somebody else has changed is theirs; nothing where it is not, or nobody has.
    fn left_to_them(&mut self, now: Duration, policy: Drift) -> Option<&'static str> {
        self.corrections
            .retain(|at| now.saturating_sub(*at) < FIGHT_WINDOW);
        if !self.theirs {
            None
        } else if policy == Drift::Report {
            Some("host.drift is report")
        } else if self.has_fought() {
            Some(
                "it was put right 3 times in 10 minutes and changed back each time: somebody else \
                 manages it",
            )
        } else {
            None
        }
    }

    /// A decision was carried out, or was not.
    pub fn done(&mut self, now: Duration, decision: &Decision, succeeded: bool) {
        self.changed = Some(now);
        self.failures = if succeeded {
            0
        } else {
            self.failures.saturating_add(1)
        };
        match decision {
            Decision::Tell(wanted) if succeeded => self.told = Some(*wanted),
            // What could be withdrawn is: some have it, some have not.
            Decision::Tell(Wanted::Withdrawn) | Decision::Correct(Wanted::Withdrawn)
                if !succeeded =>
            {
                self.told = None;
            }
            Decision::Correct(_) => self.corrections.push(now),
            _ => {}
        }
    }

    /// The configuration was read again: all is open.
    pub fn reconsider(&mut self) {
        self.corrections.clear();
        self.failures = 0;
        self.changed = None;
        self.told = None;
        self.theirs = false;
    }

    /// Whether somebody else has won: what is put right is changed back each time.
    pub fn has_fought(&self) -> bool {
        self.corrections.len() >= FIGHTS
    }

    /// An earlier run has left to others what is there now, by policy or after a fight, which is
    /// over some time after this start.
    pub fn resume(&mut self, now: Duration, fought: bool) {
        self.told = Some(Wanted::Wired);
        self.theirs = true;
        if fought {
            self.corrections = vec![now; FIGHTS];
        }
    }

    /// What the engines were told last.
    pub fn told(&self) -> Option<Wanted> {
        self.told
    }

    fn wait(&self) -> Duration {
        (HOLD * 2_u32.saturating_pow(self.failures)).min(LONGEST_WAIT.max(HOLD))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITHDRAW: Duration = Duration::from_secs(10);

    /// Each second of a probe's life, `+` or `-`, and when the engines were told what.
    fn told(life: &str) -> Vec<(u64, Wanted)> {
        let mut decider = Decider::default();
        let mut told = Vec::new();
        for (second, letter) in (0..).zip(life.chars()) {
            let now = Duration::from_secs(second);
            let probe = match letter {
                '+' => Probe::Serves,
                _ => Probe::Fails("refused".to_owned()),
            };
            let decision = decider.decide(now, &probe, WITHDRAW, false, Drift::Correct);
            if let Decision::Tell(wanted) = decision {
                told.push((second, wanted));
                decider.done(now, &decision, true);
            }
        }
        told
    }

    #[test]
    fn the_engines_are_wired_at_once_and_go_without_after_a_while() {
        use Wanted::{Wired, Withdrawn};
        let cases = [
            (String::new(), vec![]),
            ("---+++".to_owned(), vec![(3, Wired)]),
            // Nine seconds are not ten, and each success begins anew.
            ("+".repeat(40) + &"---------+".repeat(9), vec![(0, Wired)]),
            (
                "+".repeat(40) + &"-".repeat(60),
                vec![(0, Wired), (50, Withdrawn)],
            ),
            // Back at once, but not told before the last change is half a minute old.
            (
                "+".repeat(40) + &"-".repeat(11) + &"+".repeat(60),
                vec![(0, Wired), (50, Withdrawn), (80, Wired)],
            ),
            // A mirror that never comes is not waited for in vain: what an earlier run left goes.
            ("-".repeat(20), vec![(10, Withdrawn)]),
        ];
        for (life, expected) in cases {
            assert_eq!(told(&life), expected, "{life}");
        }
    }

    #[test]
    fn what_fails_is_tried_again_ever_less_often() {
        let mut decider = Decider::default();
        let mut tries = Vec::new();
        for second in 0..1500 {
            let now = Duration::from_secs(second);
            let decision = decider.decide(now, &Probe::Serves, WITHDRAW, false, Drift::Correct);
            if decision == Decision::Tell(Wanted::Wired) {
                tries.push(second);
                decider.done(now, &decision, false);
            }
        }
        assert_eq!(tries, [0, 60, 180, 420, 720, 1020, 1320]);
        decider.reconsider();
        let now = Duration::from_mins(25);
        let decision = decider.decide(now, &Probe::Serves, WITHDRAW, false, Drift::Correct);
        assert_eq!(decision, Decision::Tell(Wanted::Wired));
    }

    #[test]
    fn drift_is_put_right_until_somebody_means_it() {
        let mut decider = Decider::default();
        let wire = Decision::Tell(Wanted::Wired);
        decider.done(Duration::ZERO, &wire, true);
        let mut corrected = Vec::new();
        for second in (5..700).step_by(5) {
            let now = Duration::from_secs(second);
            let report = decider.decide(now, &Probe::Serves, WITHDRAW, true, Drift::Report);
            assert!(matches!(report, Decision::LeaveDrift(_)));
            match decider.decide(now, &Probe::Serves, WITHDRAW, true, Drift::Correct) {
                decision @ Decision::Correct(Wanted::Wired) => {
                    corrected.push(second);
                    decider.done(now, &decision, true);
                }
                Decision::LeaveDrift(why) => assert!(why.contains("somebody else manages it")),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(corrected, [5, 10, 15, 605, 610, 615]);
        let later = Duration::from_secs(800);
        let decision = decider.decide(later, &Probe::Serves, WITHDRAW, false, Drift::Correct);
        assert_eq!(decision, Decision::Leave);
    }

    /// The mirror serves, goes, and comes back: what is decided, where what was told is changed by
    /// somebody else meanwhile.
    fn away_and_back(policy: Drift, fights: u64) -> (Vec<Decision>, Decider) {
        let mut decider = Decider::default();
        decider.done(Duration::ZERO, &Decision::Tell(Wanted::Wired), true);
        for second in 1..=fights {
            let correct = Decision::Correct(Wanted::Wired);
            decider.done(Duration::from_secs(second), &correct, true);
        }
        let mut seen = Vec::new();
        for second in 30..400 {
            let probe = if (100..200).contains(&second) {
                Probe::Fails("refused".to_owned())
            } else {
                Probe::Serves
            };
            // While it is withdrawn, a file without it is as it should be.
            let drifted = decider.told() == Some(Wanted::Wired);
            let now = Duration::from_secs(second);
            let decision = decider.decide(now, &probe, WITHDRAW, drifted, policy);
            if matches!(decision, Decision::Tell(_) | Decision::Correct(_)) {
                decider.done(now, &decision, true);
            }
            if seen.last() != Some(&decision) {
                seen.push(decision);
            }
        }
        (seen, decider)
    }

    #[test]
    fn what_is_left_to_others_is_not_written_over_when_the_mirror_comes_back() {
        for (policy, fights) in [(Drift::Report, 0), (Drift::Correct, 3)] {
            let (seen, mut decider) = away_and_back(policy, fights);
            let [
                Decision::LeaveDrift(why),
                Decision::Tell(Wanted::Withdrawn),
                Decision::Leave,
                Decision::LeaveDrift(still),
            ] = seen.as_slice()
            else {
                panic!("{seen:?}");
            };
            assert_eq!(why, still);
            // Somebody who says so has it written all the same.
            decider.reconsider();
            let now = Duration::from_secs(400);
            let decision = decider.decide(now, &Probe::Serves, WITHDRAW, false, policy);
            assert_eq!(decision, Decision::Tell(Wanted::Wired));
        }
    }

    #[test]
    fn what_is_only_partly_withdrawn_is_nobody_elses_change() {
        let mut decider = Decider::default();
        decider.done(Duration::ZERO, &Decision::Tell(Wanted::Wired), true);
        let fails = Probe::Fails("refused".to_owned());
        let mut at = |second, probe: &Probe| {
            let now = Duration::from_secs(second);
            let drifted = decider.told() == Some(Wanted::Wired) && second > 70;
            let decision = decider.decide(now, probe, WITHDRAW, drifted, Drift::Report);
            if decision != Decision::Leave {
                decider.done(now, &decision, decision == Decision::Tell(Wanted::Wired));
            }
            decision
        };
        assert_eq!(at(50, &fails), Decision::Leave);
        assert_eq!(at(70, &fails), Decision::Tell(Wanted::Withdrawn));
        assert_eq!(at(100, &fails), Decision::Leave);
        // It is tried again, and the mirror's return is no drift.
        assert_eq!(at(130, &fails), Decision::Tell(Wanted::Withdrawn));
        assert_eq!(at(400, &Probe::Serves), Decision::Tell(Wanted::Wired));
    }

    #[test]
    fn a_lost_fight_is_over_some_time() {
        let (_, mut decider) = away_and_back(Drift::Correct, 3);
        let mut at = |second| {
            let now = Duration::from_secs(second);
            decider.decide(now, &Probe::Serves, WITHDRAW, false, Drift::Correct)
        };
        assert!(matches!(at(600), Decision::LeaveDrift(_)));
        assert_eq!(at(603), Decision::Tell(Wanted::Wired));
    }

    #[test]
    fn what_somebody_puts_back_themselves_is_ours_again() {
        let mut decider = Decider::default();
        decider.done(Duration::ZERO, &Decision::Tell(Wanted::Wired), true);
        let mut at = |second, drifted, serves| {
            let probe = if serves {
                Probe::Serves
            } else {
                Probe::Fails("refused".to_owned())
            };
            let now = Duration::from_secs(second);
            let decision = decider.decide(now, &probe, WITHDRAW, drifted, Drift::Report);
            decider.done(now, &decision, true);
            decision
        };
        assert!(matches!(at(60, true, true), Decision::LeaveDrift(_)));
        assert_eq!(at(120, false, true), Decision::Leave);
        assert_eq!(at(180, false, false), Decision::Leave);
        assert_eq!(at(240, false, false), Decision::Tell(Wanted::Withdrawn));
        assert_eq!(at(300, false, true), Decision::Tell(Wanted::Wired));
    }
}
