//! How many instances there are: the unhealthy replaced, what is desired reached, all of them rolled.

use super::super::world::Rest;
use super::{Group, Phase};

impl Group {
    /// Those in service and healthy.
    pub fn serving(&self) -> usize {
        let members = self.members.values();
        members
            .filter(|it| it.healthy && it.phase == Phase::InService)
            .count()
    }

    /// Those that count for what is desired.
    fn capacity(&self) -> usize {
        let members = self.members.values();
        members
            .filter(|it| it.healthy && (it.phase == Phase::InService || it.phase.is_pending()))
            .count()
    }

    /// Terminates what is unhealthy: at once, or when there is enough without it.
    pub(super) fn replace(&mut self, rest: &mut Rest) -> bool {
        if self.launches_first() && self.serving() < self.desired as usize {
            return false;
        }
        let bad = self.members.iter().find(|(_, member)| {
            !member.healthy && (member.phase == Phase::InService || member.phase.is_pending())
        });
        let Some(id) = bad.map(|(id, _)| id.clone()) else {
            return false;
        };
        self.terminate(
            &id,
            "an instance was taken out of service in response to a health check",
            rest,
        );
        true
    }

    /// Brings the number of instances to what is desired, one at a time.
    pub(super) fn resize(&mut self, rest: &mut Rest) -> bool {
        let refresh = self.refreshes.last().filter(|it| it.ended.is_none());
        let extra = refresh.is_some_and(|it| it.launches_first && !it.queue.is_empty());
        let wanted = self.desired as usize + usize::from(extra);
        let capacity = self.capacity();
        if capacity < wanted {
            let cause = "an instance was started in response to a difference between desired and actual capacity";
            self.launch(cause, rest);
            return true;
        }
        if capacity <= wanted {
            return false;
        }
        let candidates = self.members.iter().filter(|(_, member)| {
            member.healthy && !member.protected && member.phase == Phase::InService
        });
        let oldest = candidates.min_by_key(|(_, member)| member.in_service);
        let Some(id) = oldest.map(|(id, _)| id.clone()) else {
            return false;
        };
        self.terminate(&id, "an instance was taken out of service in response to a difference between desired and actual capacity", rest);
        true
    }

    /// Replaces the next instances of a refresh, when those before are there for long enough.
    pub(super) fn refresh(&mut self, rest: &mut Rest) -> bool {
        let (now, members) = (rest.now, &self.members);
        let Some(refresh) = self.refreshes.last_mut().filter(|it| it.ended.is_none()) else {
            return false;
        };
        let before = refresh.queue.len();
        let replaceable = |id: &String| {
            members
                .get(id)
                .is_some_and(|it| it.phase == Phase::InService || it.phase.is_pending())
        };
        refresh.queue.retain(replaceable);
        let unfinished = members.iter().any(|(id, member)| {
            let since = member.in_service.filter(|_| !refresh.old.contains(id));
            member.phase.is_pending()
                || member.phase.is_terminating()
                || since.is_some_and(|since| now < since + refresh.warmup)
        });
        if unfinished {
            return refresh.queue.len() != before;
        }
        let desired = self.desired as usize;
        let serving = members
            .values()
            .filter(|it| it.healthy && it.phase == Phase::InService);
        let serving = serving.count();
        if refresh.queue.is_empty() {
            if serving >= desired {
                (refresh.status, refresh.ended) = ("Successful", Some(now));
                return true;
            }
            return false;
        }
        refresh.status = "InProgress";
        let spare = if refresh.launches_first {
            serving.saturating_sub(desired)
        } else if serving >= desired {
            let percent = usize::try_from(100 - refresh.min_healthy).unwrap();
            (desired * percent / 100).max(1)
        } else {
            0
        };
        let batch: Vec<String> = refresh
            .queue
            .drain(..spare.min(refresh.queue.len()))
            .collect();
        for id in &batch {
            self.terminate(
                id,
                "an instance was taken out of service in response to an instance refresh",
                rest,
            );
        }
        !batch.is_empty()
    }
}
