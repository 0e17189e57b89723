//! Records and targets of instances that died hard, removed by the others.
//!
//! The group's list is the truth, and only where it is whole, has this instance, and has said twice,
//! two minutes apart, that the owner is gone. One's own view of who answers is no truth: pruners
//! that believed it have deleted the records of everybody on the other side of a partition.

use std::collections::BTreeSet;
use std::time::Duration;

use super::super::facts::{Group, InstanceId, LifecycleState, Record};
use super::super::memory::{Absent, Try};
use super::turn::{RANK_STEP, Turn};
use super::{Action, Look};
use crate::config::Members;
use crate::fleet::rank::rank;

/// How far apart the two listings are at least.
const APART: Duration = Duration::from_mins(2);
/// How often those look who are chosen to.
const LOOK: Duration = Duration::from_mins(1);
/// So many of the fleet look for garbage: each would, all listings would grow by the square.
const COLLECTORS: u32 = 3;
/// For so long the same ones look: long enough for two listings and a turn, and they all go if one
/// of them can't do its work.
const TERM: Duration = Duration::from_mins(15);
/// The most that are removed in one pass.
const MOST: usize = 10;
/// So long after a removal it is looked whether it is gone.
const SETTLES: Duration = Duration::from_secs(2);
/// Record sets on one page of a listing.
const PAGE: u32 = 300;
/// Pages of listings a second, all collectors together.
const PAGES_A_SECOND: f64 = 0.33;

impl Turn<'_> {
    pub(super) fn collect_garbage(&mut self) {
        if !matches!(self.settings.members, Some(Members::Autoscaling(_))) || !self.collects() {
            self.memory.absent.clear();
            return;
        }
        self.every(Look::Group, LOOK);
        let pages = self.size().div_ceil(PAGE) * COLLECTORS;
        let interval = LOOK.max(Duration::from_secs_f64(f64::from(pages) / PAGES_A_SECOND));
        if self.has_own_records() {
            self.every(Look::Records, interval);
        }
        let Some(group) = self.group() else { return };
        let Some(records) = &self.facts.records else {
            return;
        };
        if !self.is_whole(&group.is) || !records.is.complete {
            self.memory.absent.clear();
            return;
        }
        let orphans = self.orphans(&group.is, &records.is.records);
        self.note_absence(group.at, &orphans);
        // What was removed last is not seen to be gone before this.
        let since = self
            .last_attempt(Try::Garbage)
            .map_or(Duration::ZERO, |at| at + SETTLES);
        if orphans.is_empty() || !self.need(Look::Records, since) {
            return;
        }
        let ours = records.is.records.iter();
        let ours: Vec<(InstanceId, &Record)> = ours
            .filter_map(|record| Some((record.owner(self.group_name())?, record)))
            .collect();
        // At most one, or a third: what is wrong about our own view is then not wrong about all.
        let most = (ours.len() / 3).clamp(1, MOST);
        let mut gone = Vec::new();
        for (owner, record) in ours {
            if gone.len() < most && orphans.contains(&owner) && self.may_remove(&owner, &group.is) {
                gone.push((owner, record.clone()));
            }
        }
        if gone.is_empty() || !self.is_due(Try::Garbage) {
            return;
        }
        for (owner, record) in gone {
            let why = format!("{owner} is gone from the group, by two listings");
            self.act(Action::DeleteRecord { record }, why);
        }
        self.need(Look::Records, self.facts.now + SETTLES);
    }

    /// Whether this instance is one of those that look now.
    fn collects(&mut self) -> bool {
        let size = self.size();
        if size <= COLLECTORS {
            return true;
        }
        // Hosts have booted at different times, so terms differ: then a few more look, or fewer.
        let term = self.facts.now.as_secs() / TERM.as_secs();
        let listed = self.group().map(|group| group.at).unwrap_or_default();
        match self.memory.collects {
            Some((of, at, collects)) if (of, at) == (term, listed) => collects,
            _ => {
                let collects = self.rank(&format!("collect {term}")) < COLLECTORS;
                self.memory.collects = Some((term, listed, collects));
                collects
            }
        }
    }

    /// A listing that is cut short, or of before this instance, says nothing about others.
    fn is_whole(&self, group: &Group) -> bool {
        let own = group.members.get(&self.facts.own.id);
        group.complete && own.is_some_and(|own| own.state == LifecycleState::InService)
    }

    /// The owners of records that the group does not have.
    fn orphans(&mut self, group: &Group, records: &[Record]) -> BTreeSet<InstanceId> {
        let owners = records
            .iter()
            .filter_map(|record| record.owner(self.group_name()));
        let orphans: BTreeSet<_> = owners
            .filter(|owner| !group.members.contains_key(owner))
            .collect();
        if orphans.is_empty() {
            self.settled(Try::Garbage);
        }
        orphans
    }

    fn note_absence(&mut self, listed: Duration, orphans: &BTreeSet<InstanceId>) {
        self.memory.absent.retain(|id, _| orphans.contains(id));
        for id in orphans {
            let absent = self.memory.absent.entry(id.clone());
            let absent = absent.or_insert(Absent {
                first: listed,
                last: listed,
                turn: None,
            });
            absent.last = absent.last.max(listed);
        }
    }

    /// Two listings, and this instance's turn, and two looks that are younger than that.
    fn may_remove(&mut self, owner: &InstanceId, group: &Group) -> bool {
        let Some(mut absent) = self.memory.absent.get(owner).copied() else {
            return false;
        };
        if absent.last < absent.first + APART {
            self.need(Look::Group, absent.first + APART);
            return false;
        }
        let serving = group.members.iter().filter(|(_, member)| member.serves());
        let serving: Vec<&InstanceId> = serving.map(|(id, _)| id).collect();
        let turn = match absent.turn {
            Some(turn) => turn,
            None => {
                let before = rank(owner.as_str(), &self.facts.own.id, serving.iter().copied());
                let turn = self.facts.now + RANK_STEP * before.min(COLLECTORS);
                absent.turn = Some(turn);
                self.memory.absent.insert(owner.clone(), absent);
                turn
            }
        };
        let looked = self.need(Look::Group, turn) & self.need(Look::Records, turn);
        let named = self.facts.records.as_ref();
        let mut named = named.into_iter().flat_map(|records| &records.is.records);
        // The last one that serves stays, whoever's it is.
        let another = named.any(|record| {
            let owner = record.owner(self.group_name());
            owner.is_some_and(|owner| serving.contains(&&owner))
        });
        looked && another
    }
}
