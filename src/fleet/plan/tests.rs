use std::net::IpAddr;
use std::sync::Arc;

use super::super::facts::{
    Group, Hook, InstanceId, Member, Metadata, Own, OwnRecords, Peers, Records, Routing, Seen,
    Signals, Transition,
};
use super::super::memory::Kept;
use super::*;
use crate::config::{
    AliasTarget, AutoscalingSettings, DnsPolicy, DnsProvider, DnsSettings, FleetSettings, Members,
};

const MINUTE: Duration = Duration::from_mins(1);

/// An agent whose looks are answered at once, and whose steps have the effect that they should.
struct Driver {
    settings: FleetSettings,
    facts: Facts,
    memory: Memory,
    group: Group,
    records: Vec<Record>,
    ready: Vec<&'static str>,
    abandoned: u32,
    /// The server takes no writes.
    refused: bool,
}

fn id(id: &str) -> InstanceId {
    InstanceId::new(id)
}

fn member(state: &str) -> Member {
    Member {
        state: state.to_owned().into(),
        healthy: true,
        zone: None,
    }
}

fn driver(state: &str, peers: &[&'static str]) -> Driver {
    let hook = |name: &str, transition| Hook {
        name: name.to_owned(),
        transition,
        heartbeat_timeout: 10 * MINUTE,
    };
    let mut members: BTreeMap<_, _> = peers
        .iter()
        .map(|peer| (id(peer), member("InService")))
        .collect();
    members.insert(id("i-own"), member(state));
    let desired = u32::try_from(members.len()).unwrap();
    let group = Group {
        min: 0,
        desired,
        max: desired + 1,
        launches_first: false,
        registers_targets: false,
        hooks: vec![
            hook("launch", Transition::Launching),
            hook("terminate", Transition::Terminating),
            hook("somebody-elses", Transition::Launching),
        ],
        members,
        complete: true,
    };
    Driver {
        settings: FleetSettings {
            members: Some(Members::Autoscaling(AutoscalingSettings {
                group: "mirrors".to_owned(),
                report_health: true,
                min_healthy: 1,
                hooks: vec!["launch".to_owned(), "terminate".to_owned()],
            })),
            dns: Some(DnsSettings {
                name: "mirror.example.com".to_owned(),
                ttl: Duration::from_secs(30),
                provider: DnsProvider::Route53 {
                    zone: "Z1".to_owned(),
                    policy: DnsPolicy::Multivalue,
                    health_check: None,
                },
            }),
            ..FleetSettings::default()
        },
        facts: Facts {
            now: MINUTE,
            own: Own {
                id: id("i-own"),
                addresses: vec![IpAddr::from([192, 0, 2, 1])],
            },
            metadata: Metadata::default(),
            signals: Signals {
                ready: true,
                fatal: None,
                warm: true,
                running: 0,
            },
            stop: None,
            group: None,
            abandoned: None,
            own_target: None,
            own_records: None,
            records: None,
            peers: None,
        },
        memory: Memory::new(Kept::default(), 7),
        group,
        records: peers.iter().map(|peer| record(peer)).collect(),
        ready: peers.to_vec(),
        abandoned: 0,
        refused: false,
    }
}

fn record(owner: &str) -> Record {
    Record {
        identifier: Some(format!("ra/mirrors/{owner}")),
        addresses: vec![IpAddr::from([192, 0, 2, 9])],
        target: None,
        ttl: Duration::from_secs(30),
        routing: Routing::Multivalue,
        health_check: None,
    }
}

impl Driver {
    /// So long a life, and what was done when.
    fn live(&mut self, long: Duration) -> Vec<(Duration, Action)> {
        let end = self.facts.now + long;
        let mut done = Vec::new();
        while self.facts.now < end {
            let plan = plan(&self.facts, &self.memory, &self.settings);
            for step in &plan.steps {
                match &step.action {
                    Action::WriteOwnRecords { .. } if self.refused => {}
                    Action::WriteOwnRecords { records } => self.records.extend(records.clone()),
                    Action::DeleteRecord { record } => self.records.retain(|one| one != record),
                    Action::CompleteHook { hook, abandon } => {
                        let state = if hook == "launch" && !abandon {
                            "Pending:Proceed"
                        } else {
                            "Terminating:Proceed"
                        };
                        self.group.members.insert(id("i-own"), member(state));
                    }
                    _ => {}
                }
                done.push((self.facts.now, step.action.clone()));
            }
            self.memory = plan.memory;
            let now = self.facts.now;
            for (look, _) in plan.looks.iter().filter(|(_, at)| **at <= now) {
                self.look(*look);
            }
            let looks = plan.looks.values().filter(|at| **at > now);
            let next = looks.copied().chain([plan.next]).min().unwrap();
            self.facts.now = next.max(now + Duration::from_millis(100));
        }
        done
    }

    fn actions(&mut self, long: Duration) -> Vec<Action> {
        self.live(long)
            .into_iter()
            .map(|(_, action)| action)
            .collect()
    }

    fn look(&mut self, look: Look) {
        let at = self.facts.now;
        match look {
            Look::Group => {
                self.facts.group = Some(Seen {
                    at,
                    is: Arc::new(self.group.clone()),
                });
            }
            Look::Abandoned => {
                self.facts.abandoned = Some(Seen {
                    at,
                    is: self.abandoned,
                });
            }
            Look::OwnRecords => {
                let own = self.records.iter();
                let own = own.filter(|one| {
                    let shared = one.identifier.as_deref() == Some("ra/mirrors");
                    shared || one.owner("mirrors") == Some(id("i-own"))
                });
                let is = OwnRecords {
                    records: own.cloned().collect(),
                    in_sync: true,
                };
                self.facts.own_records = Some(Seen { at, is });
            }
            Look::Records => {
                let is = Arc::new(Records {
                    records: self.records.clone(),
                    complete: true,
                });
                self.facts.records = Some(Seen { at, is });
            }
            Look::Peers => {
                let asked = self
                    .group
                    .members
                    .keys()
                    .filter(|peer| **peer != id("i-own"));
                let ready = self.ready.iter().map(|peer| id(peer)).collect();
                let is = Peers {
                    asked: asked.cloned().collect(),
                    ready,
                };
                self.facts.peers = Some(Seen { at, is });
            }
            Look::OwnTarget => unreachable!("there is no load balancer"),
        }
    }

    fn state(&self) -> State {
        plan(&self.facts, &self.memory, &self.settings).state
    }
}

fn completed(actions: &[Action]) -> Vec<(&str, bool)> {
    let completed = actions.iter().filter_map(|action| match action {
        Action::CompleteHook { hook, abandon } => Some((hook.as_str(), *abandon)),
        _ => None,
    });
    completed.collect()
}

fn asks(actions: &[Action]) -> usize {
    actions
        .iter()
        .filter(|action| **action == Action::AskForReplacement)
        .count()
}

/// One whose name leads to a load balancer.
fn balanced(state: &str, peers: &[&'static str]) -> Driver {
    let mut driver = driver(state, peers);
    driver.records.clear();
    let dns = driver.settings.dns.as_mut().unwrap();
    dns.provider = DnsProvider::Route53 {
        zone: "Z1".to_owned(),
        policy: DnsPolicy::Alias(AliasTarget {
            name: "balancer.example.net".to_owned(),
            zone: "Z2".to_owned(),
        }),
        health_check: None,
    };
    driver
}

fn written(actions: &[Action]) -> usize {
    let is_write = |action: &&Action| matches!(action, Action::WriteOwnRecords { .. });
    actions.iter().filter(is_write).count()
}

#[test]
fn the_record_of_a_load_balancer_is_written_once_and_stays_when_one_leaves() {
    let mut driver = balanced("Pending:Wait", &[]);
    let joining = driver.actions(5 * MINUTE);
    assert_eq!(written(&joining), 1);
    assert_eq!(completed(&joining), [("launch", false)]);
    let [record] = &driver.records[..] else {
        panic!("{:?}", driver.records);
    };
    assert_eq!(record.target.as_deref(), Some("balancer.example.net"));
    assert_eq!(record.owner("mirrors"), None, "no instance's");
    let leaving = member("Terminating:Wait");
    driver.group.members.insert(id("i-own"), leaving);
    let leaving = driver.actions(10 * MINUTE);
    assert_eq!(completed(&leaving), [("terminate", false)]);
    assert_eq!(driver.records.len(), 1);
    assert_eq!(written(&leaving), 0);
}

#[test]
fn the_record_of_a_load_balancer_is_put_right_when_it_leads_elsewhere() {
    let mut driver = balanced("InService", &["i-a", "i-b"]);
    assert_eq!(written(&driver.actions(10 * MINUTE)), 1);
    let mut elsewhere = driver.records.remove(0);
    elsewhere.target = Some("old.example.net".to_owned());
    driver.records.push(elsewhere);
    assert!(written(&driver.actions(10 * MINUTE)) > 0);
}

#[test]
fn a_name_that_can_not_be_written_keeps_nobody_out_of_the_load_balancer() {
    let mut driver = balanced("Pending:Wait", &["i-a"]);
    driver.refused = true;
    let actions = driver.actions(60 * MINUTE);
    assert_eq!(completed(&actions), [("launch", false)]);
    // Any wait up to a minute is as likely: half of one on average, with a margin.
    let written = written(&actions);
    assert!((2..=2 * 60 * 3 / 2).contains(&written), "{written}");
}

#[test]
fn the_same_facts_give_the_same_plan() {
    let mut one = driver("Pending:Wait", &["i-a", "i-b"]);
    let mut other = driver("Pending:Wait", &["i-a", "i-b"]);
    assert_eq!(one.live(30 * MINUTE), other.live(30 * MINUTE));
}

#[test]
fn without_a_fleet_nothing_is_done_and_that_is_said() {
    let driver = driver("InService", &[]);
    let plan = plan(&driver.facts, &driver.memory, &FleetSettings::default());
    assert_eq!(plan.state, State::Off);
    assert!(plan.steps.is_empty() && plan.looks.is_empty());
    assert!(
        plan.notes[0].contains("fleet.autoscaling"),
        "{:?}",
        plan.notes
    );
}

#[test]
fn in_states_that_are_not_known_nothing_is_done() {
    for state in ["Quarantined", "ReplacingRootVolume", "Anything:New"] {
        let mut driver = driver(state, &["i-a"]);
        assert_eq!(driver.actions(60 * MINUTE), [], "{state}");
        assert_eq!(driver.state(), State::Unknown);
    }
}

#[test]
fn it_joins_when_it_is_found_and_completes_only_its_own_hook() {
    let mut driver = driver("Pending:Wait", &["i-a"]);
    driver.facts.signals.warm = false;
    let warming = driver.actions(5 * MINUTE);
    assert!(
        warming
            .iter()
            .all(|action| matches!(action, Action::Heartbeat { .. })),
        "{warming:?}"
    );
    driver.facts.signals.warm = true;
    let done = driver.actions(Duration::from_secs(20));
    assert!(
        matches!(done[0], Action::WriteOwnRecords { .. }),
        "{done:?}"
    );
    assert_eq!(completed(&done), [("launch", false)]);
    driver
        .group
        .members
        .insert(id("i-own"), member("InService"));
    assert_eq!(driver.actions(60 * MINUTE), []);
    assert_eq!(driver.state(), State::Serving);
}

#[test]
fn it_says_that_only_others_can_let_go_of_it() {
    let mut driver = driver("Pending:Wait", &["i-a"]);
    let Some(Members::Autoscaling(autoscaling)) = &mut driver.settings.members else {
        unreachable!("the driver has a group")
    };
    autoscaling.hooks = vec!["registry-agent-launch".to_owned()];
    assert_eq!(completed(&driver.actions(10 * MINUTE)), []);
    let notes = plan(&driver.facts, &driver.memory, &driver.settings).notes;
    assert_eq!(
        notes,
        [
            "ready, registered, and seen there, and held by what is not this agent's to complete: \
             `fleet.autoscaling.hooks` has registry-agent-launch, and the group launch, somebody-elses"
        ]
    );
}

#[test]
fn what_can_not_be_cured_is_given_back_unless_many_were() {
    for (abandoned, expected) in [(0, true), (2, true), (3, false), (9, false)] {
        let mut driver = driver("Pending:Wait", &["i-a"]);
        driver.facts.signals.fatal = Some("the cache's device is gone".to_owned());
        driver.abandoned = abandoned;
        let done = driver.actions(60 * MINUTE);
        let wanted: &[(&str, bool)] = if expected { &[("launch", true)] } else { &[] };
        assert_eq!(completed(&done), wanted, "{abandoned} abandoned");
        let beats = done
            .iter()
            .filter(|action| matches!(action, Action::Heartbeat { .. }))
            .count();
        assert!(expected || beats > 10, "it stays, and the hook runs out");
    }
}

#[test]
fn only_where_the_rest_is_well_a_replacement_is_asked_for() {
    type Change = fn(&mut Driver);
    let cases: [(&str, Change, bool); 9] = [
        ("nothing else", |_| {}, true),
        (
            "a peer is unhealthy",
            |one| {
                one.group.members.get_mut(&id("i-a")).unwrap().healthy = false;
            },
            false,
        ),
        (
            "a peer starts",
            |one| {
                one.group.members.insert(id("i-d"), member("Pending:Wait"));
            },
            false,
        ),
        ("one is missing", |one| one.group.desired += 1, false),
        ("no peer answers", |one| one.ready.clear(), false),
        (
            "few would be left",
            |one| {
                let Some(Members::Autoscaling(group)) = &mut one.settings.members else {
                    return;
                };
                group.min_healthy = 3;
            },
            false,
        ),
        (
            "it is not to report",
            |one| {
                let Some(Members::Autoscaling(group)) = &mut one.settings.members else {
                    return;
                };
                group.report_health = false;
            },
            false,
        ),
        (
            "the group was cut short",
            |one| one.group.complete = false,
            false,
        ),
        (
            "the group launches first",
            |one| one.group.launches_first = true,
            true,
        ),
    ];
    for (what, change, expected) in cases {
        let mut driver = driver("InService", &["i-a", "i-b"]);
        driver.live(15 * MINUTE);
        change(&mut driver);
        driver.facts.signals.fatal = Some("the cache's device is gone".to_owned());
        let done = driver.actions(8 * MINUTE);
        assert_eq!(asks(&done) > 0, expected, "{what}: {done:?}");
        // The group has heard: never again.
        driver.group.members.get_mut(&id("i-own")).unwrap().healthy = false;
        assert_eq!(asks(&driver.actions(120 * MINUTE)), 0, "{what}");
    }
}

#[test]
fn a_young_instance_does_not_ask() {
    let mut driver = driver("InService", &["i-a", "i-b"]);
    driver.facts.signals.fatal = Some("the cache's device is gone".to_owned());
    assert_eq!(asks(&driver.actions(9 * MINUTE)), 0);
    assert!(asks(&driver.actions(10 * MINUTE)) > 0);
}

#[test]
fn the_only_one_asks_only_where_another_comes_first() {
    for launches_first in [false, true] {
        let mut driver = driver("InService", &[]);
        driver.group.launches_first = launches_first;
        driver.live(15 * MINUTE);
        driver.facts.signals.fatal = Some("the cache's device is gone".to_owned());
        let done = driver.actions(10 * MINUTE);
        assert_eq!(asks(&done) > 0, launches_first);
        let gone = done
            .iter()
            .any(|action| matches!(action, Action::DeleteRecord { .. }));
        assert!(!gone, "the last record stays: {done:?}");
    }
}

#[test]
fn what_told_it_to_go_can_not_be_taken_back() {
    let mut driver = driver("InService", &["i-a"]);
    driver.live(5 * MINUTE);
    driver.facts.metadata.target_state = Some(LifecycleState::Terminated);
    driver.live(Duration::from_secs(10));
    // The metadata service forgets it, and the agent is started again.
    driver.facts.metadata = Metadata::default();
    driver.memory = Memory::new(driver.memory.kept.clone(), 8);
    let done = driver.actions(10 * MINUTE);
    assert_eq!(driver.state(), State::Drain);
    assert!(
        !done
            .iter()
            .any(|action| matches!(action, Action::WriteOwnRecords { .. })),
        "{done:?}"
    );
    driver
        .group
        .members
        .insert(id("i-own"), member("Terminating:Wait"));
    let done = driver.actions(2 * MINUTE);
    assert_eq!(completed(&done), [("terminate", false)]);
}

#[test]
fn it_goes_on_serving_until_resolvers_have_forgotten_it() {
    let mut driver = driver("InService", &["i-a"]);
    driver.live(5 * MINUTE);
    driver
        .group
        .members
        .insert(id("i-own"), member("Terminating:Wait"));
    driver.facts.metadata.target_state = Some(LifecycleState::Terminated);
    let done = driver.live(3 * MINUTE);
    let when = |is: fn(&Action) -> bool| done.iter().find(|(_, action)| is(action)).unwrap().0;
    let gone = when(|action| matches!(action, Action::DeleteRecord { .. }));
    let refuses = when(|action| *action == Action::RefuseUploads);
    let completed = when(|action| matches!(action, Action::CompleteHook { .. }));
    assert!(refuses >= gone + Duration::from_secs(35), "{done:?}");
    assert!(completed >= refuses, "{done:?}");
}

#[test]
fn what_is_kept_of_another_instance_is_void() {
    let mut driver = driver("InService", &["i-a"]);
    driver.memory.kept.instance = Some(id("i-where-the-image-was-made"));
    driver.memory.kept.replacement_asked = true;
    driver.memory.kept.leaving = Some(crate::fleet::memory::Leaving {
        why: "the group says Terminated".to_owned(),
        deadline: None,
    });
    driver.live(5 * MINUTE);
    assert_eq!(driver.state(), State::Serving);
    assert!(!driver.memory.kept.replacement_asked);
}

#[test]
fn one_that_is_taken_out_for_a_while_comes_back() {
    for (out, metadata) in [("Standby", "Standby"), ("Detached", "Detached")] {
        let mut driver = driver("InService", &["i-a"]);
        driver.live(5 * MINUTE);
        driver.group.members.insert(id("i-own"), member(out));
        driver.facts.metadata.target_state = Some(metadata.to_owned().into());
        driver.live(3 * MINUTE);
        assert_eq!(driver.state(), State::Standby);
        let own = Some(id("i-own"));
        assert!(
            driver
                .records
                .iter()
                .all(|record| record.owner("mirrors") != own)
        );
        driver
            .group
            .members
            .insert(id("i-own"), member("InService"));
        driver.facts.metadata.target_state = Some(LifecycleState::InService);
        driver.live(3 * MINUTE);
        assert_eq!(driver.state(), State::Serving, "{out}");
    }
}

#[test]
fn desired_capacity_is_raised_never_lowered_and_not_above_the_maximum() {
    for (wanted, enforce, expected) in [(1, true, None), (9, true, Some(4)), (9, false, None)] {
        let mut driver = driver("InService", &["i-a", "i-b"]);
        driver.settings.instances = Some(wanted);
        driver.settings.enforce = enforce;
        let done = driver.actions(10 * MINUTE);
        let raised = done.iter().find_map(|action| match action {
            Action::RaiseDesired { to } => Some(*to),
            _ => None,
        });
        assert_eq!(raised, expected, "n {wanted}, enforce {enforce}");
    }
}

#[test]
fn one_that_was_started_by_hand_is_attached_and_one_that_was_taken_out_is_not() {
    for (attach, was_member, expected) in [
        (true, false, true),
        (false, false, false),
        (true, true, false),
    ] {
        let mut driver = driver("InService", &["i-a"]);
        driver.group.members.remove(&id("i-own"));
        driver.settings.attach = attach;
        driver.memory.kept = Kept {
            instance: Some(id("i-own")),
            was_member,
            ..Kept::default()
        };
        let done = driver.actions(5 * MINUTE);
        assert_eq!(
            done.contains(&Action::Attach),
            expected,
            "{attach} {was_member}"
        );
        assert_eq!(driver.state(), State::Outside);
    }
}

#[test]
fn records_of_the_dead_go_and_those_of_others_stay() {
    let mut driver = driver("InService", &[]);
    let foreign = [
        None,
        Some("terraform"),
        Some("ra/other/i-dead"),
        Some("ra/mirrors/"),
        Some("ra/mirrors/a/b"),
    ];
    let foreign = foreign.map(|identifier| Record {
        identifier: identifier.map(str::to_owned),
        ..record("i-dead")
    });
    driver.records.extend(foreign.clone());
    driver.records.push(record("i-dead"));
    let done = driver.live(20 * MINUTE);
    let gone: Vec<_> = done
        .iter()
        .filter_map(|(at, action)| match action {
            Action::DeleteRecord { record } => Some((*at, record.identifier.clone())),
            _ => None,
        })
        .collect();
    assert_eq!(gone.len(), 1, "{gone:?}");
    assert_eq!(gone[0].1.as_deref(), Some("ra/mirrors/i-dead"));
    assert!(
        gone[0].0 >= MINUTE + 2 * MINUTE,
        "two listings are two minutes apart"
    );
    assert!(foreign.iter().all(|record| driver.records.contains(record)));
}

#[test]
fn a_list_is_a_fleet_too() {
    let own = IpAddr::from([192, 0, 2, 1]);
    let list = [own, IpAddr::from([192, 0, 2, 2])];
    let mut driver = driver("InService", &[]);
    driver.settings.members = Some(Members::Static(list.to_vec()));
    driver.facts.own.id = id("192.0.2.1");
    driver.group = Group::of_a_list(&list);
    driver.facts.group = Some(Seen {
        at: Duration::ZERO,
        is: Arc::new(driver.group.clone()),
    });
    let done = driver.actions(Duration::from_secs(1));
    let Action::WriteOwnRecords { records } = &done[0] else {
        panic!("{done:?}")
    };
    assert_eq!(records[0].owner("static"), Some(id("192.0.2.1")));
    driver.facts.signals.fatal = Some("the cache's device is gone".to_owned());
    assert_eq!(asks(&driver.actions(60 * MINUTE)), 0);
    driver.facts.signals.fatal = None;
    driver.facts.stop = Some(driver.facts.now + 10 * MINUTE);
    let done = driver.actions(2 * MINUTE);
    assert!(done.contains(&Action::LetGo), "{done:?}");
}

#[test]
fn facts_can_be_saved() {
    let mut driver = driver("Pending:Wait", &["i-a", "i-b"]);
    driver.live(3 * MINUTE);
    let text = serde_json::to_string(&driver.facts).unwrap();
    assert_eq!(serde_json::from_str::<Facts>(&text).unwrap(), driver.facts);
    for text in ["Pending:Wait", "Warmed:Running", "Terminating:Retained"] {
        let state: LifecycleState = serde_json::from_value(text.into()).unwrap();
        assert_eq!(serde_json::to_value(&state).unwrap(), text);
    }
}
