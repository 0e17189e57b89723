//! This instance's own record and target: there, or away.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use super::super::facts::{Record, Routing, TargetState};
use super::super::memory::Try;
use super::turn::Turn;
use super::{Action, Look};
use crate::config::{DnsPolicy, DnsProvider};

/// So long after a change it is looked whether it is there.
const SETTLES: Duration = Duration::from_secs(2);
/// How often something that is on its way is looked at.
const ON_ITS_WAY: Duration = Duration::from_secs(10);
/// Whose turn it is to write the one record that leads to the load balancer.
const SHARED: &str = "shared record";
/// A peer's answer is as good as new for so long.
const FRESH: Duration = Duration::from_secs(30);

/// What is away for good.
pub(super) struct Left {
    /// Not registered, and not draining any more.
    pub target: bool,
}

impl Turn<'_> {
    /// Sees to it that this instance is found. Whether it was seen to be.
    pub(super) fn advertise(&mut self) -> bool {
        self.memory.record_gone = None;
        self.memory.turns.remove("withdraw");
        // Where many start together, not all of them join at once.
        let join = match self.memory.turns.get("join") {
            Some(join) => *join,
            None => self.facts.now + self.up_to(self.spread()),
        };
        self.memory.turns.insert("join", join);
        if !self.is_past(join) {
            return false;
        }
        let (record, target) = (self.advertise_records(), self.advertise_target());
        record && target
    }

    /// Sees to it that nothing leads here.
    pub(super) fn withdraw(&mut self) -> Left {
        self.withdraw_records();
        Left {
            target: self.withdraw_target(),
        }
    }

    /// Withdraws the own record if another one serves: the last one stays, as a bad answer is better
    /// than none. A load balancer needs no telling: it asks this instance itself, and fails open.
    pub(super) fn step_back(&mut self, why: &str) {
        let now = self.facts.now;
        if !self.has_own_records() || self.memory.record_gone.is_some() {
            return;
        }
        let since = *self.memory.step_back_since.get_or_insert(now);
        let since = since.max(now.saturating_sub(FRESH));
        if !(self.need(Look::Records, since) && self.need(Look::Peers, since)) {
            return;
        }
        if self.another_serves() {
            self.withdraw_records();
        } else {
            self.note(format!(
                "{why}, and its record stays: no other that is in the name is ready"
            ));
        }
    }

    fn another_serves(&self) -> bool {
        let (Some(records), Some(peers)) = (&self.facts.records, &self.facts.peers) else {
            return false;
        };
        let owners = records.is.records.iter();
        let mut owners = owners.filter_map(|record| record.owner(self.group_name()));
        records.is.complete
            && owners.any(|owner| owner != self.facts.own.id && peers.is.ready.contains(&owner))
    }

    /// Whether the name holds records of this instance's own.
    pub(super) fn has_own_records(&self) -> bool {
        let dns = self.settings.dns.as_ref();
        dns.is_some_and(|dns| dns.load_balancer().is_none())
    }

    /// Sees to the one record that leads to the load balancer: all agree on it, anybody writes it,
    /// and nobody takes it away. That it can't be written keeps no instance out of the load
    /// balancer, where they are found.
    fn keep_shared_record(&mut self) {
        let since = self
            .last_attempt(Try::OwnRecord)
            .map_or(Duration::ZERO, |at| at + SETTLES);
        if !self.need(Look::OwnRecords, since) {
            return;
        }
        let Some(seen) = &self.facts.own_records else {
            return;
        };
        let wanted = self.own_records();
        if same(&seen.is.records, &wanted) {
            self.settled(Try::OwnRecord);
            self.memory.turns.remove(SHARED);
            self.every(Look::OwnRecords, self.own_look());
            return;
        }
        if self.is_my_turn(SHARED) {
            let action = Action::WriteOwnRecords { records: wanted };
            let why = "the name does not lead to the load balancer";
            self.attempt(Try::OwnRecord, action, why);
        }
        // Somebody else may have written it by the time that it is this one's turn.
        let last = self.last_attempt(Try::OwnRecord);
        let again = last.map_or(seen.at + ON_ITS_WAY, |at| at + SETTLES);
        self.need(Look::OwnRecords, again);
    }

    fn advertise_records(&mut self) -> bool {
        if self.settings.dns.is_none() {
            return true;
        }
        if !self.has_own_records() {
            self.keep_shared_record();
            return true;
        }
        let since = self
            .last_attempt(Try::OwnRecord)
            .map_or(Duration::ZERO, |at| at + SETTLES);
        if !self.need(Look::OwnRecords, since) {
            return false;
        }
        let Some(seen) = &self.facts.own_records else {
            return false;
        };
        let wanted = self.own_records();
        if same(&seen.is.records, &wanted) {
            self.settled(Try::OwnRecord);
            if seen.is.in_sync {
                self.every(Look::OwnRecords, self.own_look());
            } else {
                self.every(Look::OwnRecords, ON_ITS_WAY);
            }
            return seen.is.in_sync;
        }
        let why = "this instance serves, and the name does not lead here";
        self.attempt(
            Try::OwnRecord,
            Action::WriteOwnRecords { records: wanted },
            why,
        );
        if let Some(at) = self.last_attempt(Try::OwnRecord) {
            self.need(Look::OwnRecords, at + SETTLES);
        }
        false
    }

    fn withdraw_records(&mut self) {
        if !self.has_own_records() {
            return;
        }
        let since = self
            .last_attempt(Try::OwnRecord)
            .map_or(Duration::ZERO, |at| at + SETTLES);
        if !self.need(Look::OwnRecords, since) {
            return;
        }
        let Some(seen) = &self.facts.own_records else {
            return;
        };
        if seen.is.records.is_empty() {
            self.settled(Try::OwnRecord);
            if seen.is.in_sync {
                self.memory.record_gone.get_or_insert(seen.at);
            } else {
                self.every(Look::OwnRecords, ON_ITS_WAY);
            }
            return;
        }
        self.memory.record_gone = None;
        // One of a family each time: a change is all or nothing.
        let record = seen.is.records[0].clone();
        self.attempt(
            Try::OwnRecord,
            Action::DeleteRecord { record },
            "this instance goes",
        );
        if let Some(at) = self.last_attempt(Try::OwnRecord) {
            self.need(Look::OwnRecords, at + SETTLES);
        }
    }

    /// Whether the target group is this instance's to change.
    fn registers_itself(&self) -> bool {
        let by_the_group = self.group().is_some_and(|group| group.is.registers_targets);
        self.settings.load_balancer.is_some() && !by_the_group
    }

    fn advertise_target(&mut self) -> bool {
        if !self.registers_itself() {
            return true;
        }
        let since = self
            .last_attempt(Try::OwnTarget)
            .map_or(Duration::ZERO, |at| at + SETTLES);
        if !self.need(Look::OwnTarget, since) {
            return false;
        }
        match self.facts.own_target.as_ref().and_then(|seen| seen.is) {
            Some(TargetState::Healthy) => {
                self.settled(Try::OwnTarget);
                self.every(Look::OwnTarget, self.own_look());
                true
            }
            // Its checks go on without us.
            Some(TargetState::Initial | TargetState::Unhealthy) => {
                self.settled(Try::OwnTarget);
                self.every(Look::OwnTarget, ON_ITS_WAY.max(self.own_look() / 6));
                false
            }
            None | Some(TargetState::Draining) => {
                let why = "this instance serves, and the load balancer does not lead here";
                self.attempt(Try::OwnTarget, Action::RegisterTarget, why);
                if let Some(at) = self.last_attempt(Try::OwnTarget) {
                    self.need(Look::OwnTarget, at + SETTLES);
                }
                false
            }
        }
    }

    fn withdraw_target(&mut self) -> bool {
        if self.settings.load_balancer.is_none() {
            return true;
        }
        let since = self
            .last_attempt(Try::OwnTarget)
            .map_or(Duration::ZERO, |at| at + SETTLES);
        // What was seen while it served is of before.
        let since = since.max(
            *self
                .memory
                .turns
                .entry("withdraw")
                .or_insert(self.facts.now),
        );
        if !self.need(Look::OwnTarget, since) {
            return false;
        }
        match self.facts.own_target.as_ref().and_then(|seen| seen.is) {
            None => {
                self.settled(Try::OwnTarget);
                true
            }
            Some(TargetState::Draining) => {
                self.settled(Try::OwnTarget);
                self.every(Look::OwnTarget, ON_ITS_WAY);
                false
            }
            Some(_) if !self.registers_itself() => {
                self.every(Look::OwnTarget, ON_ITS_WAY);
                false
            }
            Some(_) => {
                let action = Action::DeregisterTarget;
                self.attempt(Try::OwnTarget, action, "this instance goes");
                if let Some(at) = self.last_attempt(Try::OwnTarget) {
                    self.need(Look::OwnTarget, at + SETTLES);
                }
                false
            }
        }
    }

    /// What the name should hold of this instance: a record for each family. Where it leads to the
    /// load balancer, that one record.
    pub(super) fn own_records(&self) -> Vec<Record> {
        let Some(dns) = &self.settings.dns else {
            return Vec::new();
        };
        let (routing, health_check) = match &dns.provider {
            DnsProvider::Route53 {
                policy: DnsPolicy::Multivalue,
                health_check,
                ..
            } => (Routing::Multivalue, health_check),
            DnsProvider::Route53 {
                policy: DnsPolicy::Weighted | DnsPolicy::Alias(_),
                health_check,
                ..
            } => (Routing::Weighted(1), health_check),
            DnsProvider::Rfc2136 { .. } => (Routing::Plain, &None),
        };
        if let Some(target) = dns.load_balancer() {
            let ttl = match dns.provider {
                // An alias has the TTL of what it leads to.
                DnsProvider::Route53 { .. } => Duration::ZERO,
                DnsProvider::Rfc2136 { .. } => dns.ttl,
            };
            return vec![Record {
                identifier: Some(format!("ra/{}", self.group_name())),
                addresses: Vec::new(),
                target: Some(target.to_owned()),
                ttl,
                routing,
                health_check: None,
            }];
        }
        let identifier = format!("ra/{}/{}", self.group_name(), self.facts.own.id);
        let addresses = &self.facts.own.addresses;
        let of_family = |is_of: fn(&IpAddr) -> bool| {
            let addresses: Vec<IpAddr> = addresses.iter().filter(|ip| is_of(ip)).copied().collect();
            (!addresses.is_empty()).then(|| Record {
                identifier: Some(identifier.clone()),
                addresses,
                target: None,
                ttl: dns.ttl,
                routing,
                health_check: health_check.clone(),
            })
        };
        let families = [of_family(IpAddr::is_ipv4), of_family(IpAddr::is_ipv6)];
        families.into_iter().flatten().collect()
    }
}

/// Whether two lists hold the same records, in whatever order.
fn same(left: &[Record], right: &[Record]) -> bool {
    let set = |records: &[Record]| -> BTreeSet<String> {
        records.iter().map(|record| format!("{record:?}")).collect()
    };
    left.len() == right.len() && set(left) == set(right)
}
