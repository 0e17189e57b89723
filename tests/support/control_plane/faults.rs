//! What goes wrong on its way: by operation, and by who calls.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::wire::{ApiError, Service};

/// What is done to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// `Throttling`, as HTTP 400; of the metadata service, 429.
    Throttle,
    /// Another refusal, before anything is done.
    Refuse(ApiError),
    /// An answer of a proxy's kind: a status, and a text that is no XML.
    Status(u16),
    /// No byte of an answer, and nothing is done.
    Hang,
    /// It is done, and the connection is closed without an answer.
    LoseReply,
    /// A read sees what was so long ago.
    Stale(Duration),
}

/// When a fault strikes.
#[derive(Debug, Clone)]
struct Rule {
    operation: String,
    caller: Option<String>,
    /// So often yet; for ever, where there is none.
    left: Option<usize>,
    fault: Fault,
}

/// A call that arrived, whatever became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Called {
    /// Since the clock's zero.
    pub at: Duration,
    /// Its name; of the metadata service, the method and the path.
    pub operation: String,
    /// The instance whose credentials signed it, or the access key.
    pub caller: String,
    /// The code of the refusal, or what was done to it.
    pub refused: Option<String>,
}

/// A bucket of tokens (`rate` a second, `burst` at most), as an account has for each API.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    rate: f64,
    burst: f64,
    tokens: f64,
    at: Duration,
}

/// What a test says about the way, and what came along it.
#[derive(Debug, Default)]
pub struct Faults {
    rules: Vec<Rule>,
    cut_off: BTreeSet<String>,
    limits: BTreeMap<Service, Bucket>,
    pub calls: Vec<Called>,
}

impl Faults {
    /// Does this to the next so many calls (for ever, without a number) of an operation (`*`: any),
    /// of this instance or of all.
    pub fn add(
        &mut self,
        operation: &str,
        caller: Option<&str>,
        times: Option<usize>,
        fault: Fault,
    ) {
        self.rules.push(Rule {
            operation: operation.to_owned(),
            caller: caller.map(str::to_owned),
            left: times,
            fault,
        });
    }

    /// Nothing goes wrong any more.
    pub fn heal(&mut self) {
        self.rules.clear();
        self.cut_off.clear();
        self.limits.clear();
    }

    /// Nothing that this instance says arrives, but for the metadata service, which is on its host.
    pub fn cut_off(&mut self, instance: &str) {
        self.cut_off.insert(instance.to_owned());
    }

    pub fn reconnect(&mut self, instance: &str) {
        self.cut_off.remove(instance);
    }

    /// The account may call this API so often a second, and so many at once.
    pub fn limit(&mut self, service: Service, rate: f64, burst: f64, now: Duration) {
        let bucket = Bucket {
            rate,
            burst,
            tokens: burst,
            at: now,
        };
        self.limits.insert(service, bucket);
    }

    /// What happens to this call.
    pub fn strike(&mut self, operation: &str, caller: &str) -> Option<Fault> {
        if self.cut_off.contains(caller) {
            return Some(Fault::Hang);
        }
        self.find(operation, "*", caller)
    }

    /// What happens to a request to an instance's own metadata service, which no partition cuts
    /// off: by method and path, or `metadata` for all.
    pub fn strike_metadata(&mut self, request: &str, instance: &str) -> Option<Fault> {
        self.find(request, "metadata", instance)
    }

    fn find(&mut self, operation: &str, any: &str, caller: &str) -> Option<Fault> {
        let rule = self.rules.iter_mut().find(|rule| {
            (rule.operation == any || rule.operation == operation)
                && rule.caller.as_deref().is_none_or(|it| it == caller)
                && rule.left != Some(0)
        })?;
        rule.left = rule.left.map(|left| left - 1);
        Some(rule.fault.clone())
    }

    /// Whether the account may make another call now.
    pub fn allows(&mut self, service: Service, now: Duration) -> bool {
        let Some(bucket) = self.limits.get_mut(&service) else {
            return true;
        };
        let passed = now.saturating_sub(bucket.at).as_secs_f64();
        bucket.tokens = bucket.burst.min(bucket.tokens + passed * bucket.rate);
        bucket.at = now;
        let allowed = bucket.tokens >= 1.0;
        if allowed {
            bucket.tokens -= 1.0;
        }
        allowed
    }
}
