//! A seed becomes a fleet, and what happens to it.

use std::time::Duration;

use registry_agent::config::{
    AutoscalingSettings, DnsPolicy, DnsProvider, DnsSettings, FleetSettings, LoadBalancerSettings,
    Members,
};

/// A fleet and its fate.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub seed: u64,
    pub instances: u32,
    pub max: u32,
    pub launches_first: bool,
    pub dns: bool,
    pub load_balancer: bool,
    /// The target group is attached to the group.
    pub attached: bool,
    pub hook_timeout: Duration,
    /// What is read may be some seconds old.
    pub stale: bool,
    /// When a listing of the group lacks one of its instances, for some seconds.
    pub lacking: Vec<(Duration, Duration, usize)>,
    /// Of a hundred calls so many never arrive.
    pub lost: u32,
    pub faults: Vec<(Duration, Fault)>,
    pub end: Duration,
}

/// Something that happens. What it happens to is drawn when it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    CrashAgent,
    KillHost,
    Freeze(Duration),
    Partition(Duration),
    ApiOutage(Duration),
    Throttle(Duration),
    MetadataOutage(Duration),
    Unready(Duration),
    AllUnready(Duration),
    Fatal,
    /// Two at the same moment.
    FatalTwice,
    FatalEverywhere,
    UpstreamOutage(Duration),
    ZoneLoss,
    BadImage(Duration),
    Scale,
    Refresh,
    Spot,
    Standby(Duration),
    Stop,
    Reboot,
}

fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(60 * minutes)
}

impl Scenario {
    pub fn of(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let instances = random.u32(1..=8);
        let dns = random.u32(0..10) < 8;
        let load_balancer = !dns || random.bool();
        let count = random.usize(0..6);
        let calm = minutes(45);
        let mut faults: Vec<(Duration, Fault)> = (0..count)
            .map(|_| {
                let at = minutes(12) + minutes(28).mul_f64(random.f64());
                (at, Fault::of(&mut random))
            })
            .collect();
        faults.sort_by_key(|(at, _)| *at);
        let stale = random.u32(0..3) == 0;
        // Apart from each other: a list that is wrong for minutes is believed.
        let lacking = (0..if stale { 5 } else { 0 }).map(|slot| {
            let at = minutes(5 + 12 * slot) + minutes(8).mul_f64(random.f64());
            (
                at,
                at + Duration::from_secs(random.u64(5..100)),
                random.usize(0..8),
            )
        });
        let lacking = lacking.collect();
        let lossy = random.u32(0..3) == 0;
        Self {
            seed,
            instances,
            max: instances * 2,
            launches_first: random.bool(),
            dns,
            load_balancer,
            attached: load_balancer && random.u32(0..3) == 0,
            hook_timeout: Duration::from_secs(random.u64(300..900)),
            stale,
            lacking,
            lost: if lossy { random.u32(1..20) } else { 0 },
            faults,
            end: calm + minutes(65),
        }
    }

    /// So many instances that all start at once, and nothing happens to.
    pub fn large(instances: u32) -> Self {
        Self {
            seed: u64::from(instances),
            instances,
            max: instances * 2,
            launches_first: true,
            dns: true,
            load_balancer: true,
            attached: false,
            hook_timeout: minutes(60),
            stale: false,
            lacking: Vec::new(),
            lost: 0,
            faults: Vec::new(),
            end: minutes(60 * if instances > 2000 { 7 } else { 3 }),
        }
    }

    pub fn settings(&self) -> FleetSettings {
        FleetSettings {
            instances: Some(self.instances),
            members: Some(Members::Autoscaling(AutoscalingSettings {
                group: "mirrors".to_owned(),
                report_health: true,
                min_healthy: 1,
                hooks: vec!["launch".to_owned(), "terminate".to_owned()],
            })),
            load_balancer: self.load_balancer.then(|| LoadBalancerSettings {
                target_group: "arn:aws:elasticloadbalancing:eu-west-1:1:targetgroup/m/1".to_owned(),
            }),
            dns: self.dns.then(|| DnsSettings {
                name: "mirror.example.com".to_owned(),
                ttl: Duration::from_secs(30),
                provider: DnsProvider::Route53 {
                    zone: "Z1".to_owned(),
                    policy: DnsPolicy::Multivalue,
                    health_check: None,
                },
            }),
            ..FleetSettings::default()
        }
    }
}

impl Fault {
    fn of(random: &mut fastrand::Rng) -> Self {
        let lasts = Duration::from_secs(random.u64(20..900));
        match random.u32(0..21) {
            0 => Self::CrashAgent,
            1 => Self::KillHost,
            2 => Self::Freeze(lasts),
            3 => Self::Partition(lasts),
            4 => Self::ApiOutage(lasts),
            5 => Self::Throttle(lasts),
            6 => Self::MetadataOutage(lasts),
            7 => Self::Unready(lasts),
            8 => Self::AllUnready(lasts),
            9 => Self::Fatal,
            10 => Self::FatalEverywhere,
            11 => Self::UpstreamOutage(lasts * 2),
            12 => Self::ZoneLoss,
            13 => Self::BadImage(lasts * 3),
            14 => Self::Scale,
            15 => Self::Refresh,
            16 => Self::Spot,
            17 => Self::Standby(lasts),
            18 => Self::Stop,
            19 => Self::FatalTwice,
            _ => Self::Reboot,
        }
    }
}
