//! What an upstream can do wrong, and when.

use std::sync::{Arc, Condvar, Mutex};

use bytes::Bytes;

use crate::support::PATIENCE;

/// Something to do wrong. Offsets are of the body that is sent, which for an answer to a Range
/// request is that range; those of [`Fault::WrongByte`], `Longer` and `Shorter` are of the whole.
#[derive(Clone)]
pub enum Fault {
    /// Answers with this status and an error body.
    Status(u16),
    /// Answers anybody with a page to log in by, and 200.
    LoginPage,
    /// Answers 429, and that it may be asked again in so many seconds.
    RetryAfter(u64),
    /// Never answers.
    HangHeaders,
    /// Holds the answer, as it would have been now, back until the gate is opened.
    GateHeaders(Gate),
    /// Sends this much of the body, then nothing.
    HangBody(usize),
    /// Sends this much of the body, then closes the connection.
    Cut(usize),
    /// The byte at this offset is another.
    WrongByte(usize),
    /// The whole is longer by this much.
    Longer(usize),
    /// The whole is shorter by this much.
    Shorter(usize),
    /// No Content-Length.
    Chunked,
    /// No Docker-Content-Digest.
    NoDigest,
    /// Range is ignored.
    NoRanges,
    /// Holds the body back from this byte on until the gate is opened.
    Gate(usize, Gate),
}

/// The requests that a fault is for.
#[derive(Clone)]
pub struct On {
    method: Option<&'static str>,
    part: String,
}

impl On {
    /// GETs whose path contains `part`.
    pub fn get(part: &str) -> Self {
        Self {
            method: Some("GET"),
            part: part.into(),
        }
    }

    /// HEADs whose path contains `part`.
    pub fn head(part: &str) -> Self {
        Self {
            method: Some("HEAD"),
            part: part.into(),
        }
    }

    /// All requests whose path contains `part`.
    pub fn any(part: &str) -> Self {
        Self {
            method: None,
            part: part.into(),
        }
    }
}

/// A fault, for some requests, for some more times.
pub(super) struct Rule {
    pub on: On,
    pub left: usize,
    pub fault: Fault,
}

/// All that is to go wrong with one answer.
pub(super) struct Plan(Vec<Fault>);

impl Plan {
    /// What the rules say of this request; uses each up by one. A request that is not admitted gets
    /// a challenge and no content, so what would happen to its content is left for the next.
    pub fn of(rules: &mut [Rule], method: &str, path: &str, admitted: bool) -> Self {
        let mut faults = Vec::new();
        for rule in rules {
            let on = &rule.on;
            let applies = on.method.is_none_or(|only| only == method) && path.contains(&on.part);
            let reached = admitted
                || matches!(
                    rule.fault,
                    Fault::Status(_) | Fault::LoginPage | Fault::RetryAfter(_) | Fault::HangHeaders
                );
            if applies && reached && rule.left > 0 {
                rule.left -= 1;
                faults.push(rule.fault.clone());
            }
        }
        Self(faults)
    }

    /// Whether one of the faults is such.
    pub fn has(&self, such: impl Fn(&Fault) -> bool) -> bool {
        self.0.iter().any(such)
    }

    /// What one of the faults, the last where there are more, has to say of this.
    pub fn find<T>(&self, say: impl Fn(&Fault) -> Option<T>) -> Option<T> {
        self.0.iter().rev().find_map(say)
    }

    /// The content as this answer has it.
    pub fn content(&self, right: &Bytes) -> Bytes {
        let mut bytes = right.to_vec();
        for fault in &self.0 {
            match fault {
                Fault::WrongByte(at) => bytes[*at] ^= 0xff,
                Fault::Longer(by) => bytes.resize(bytes.len() + by, b'+'),
                Fault::Shorter(by) => bytes.truncate(bytes.len() - by),
                _ => {}
            }
        }
        bytes.into()
    }
}

/// Holds an answer until a test opens it.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<GateState>, Condvar)>);

#[derive(Default)]
struct GateState {
    reached: bool,
    open: bool,
}

impl Gate {
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits until an answer is held here.
    #[track_caller]
    pub fn reached(&self) {
        assert!(
            self.wait(|state| state.reached),
            "no answer reached the gate"
        );
    }

    /// Lets what is held, and all that follows, go on.
    pub fn open(&self) {
        self.change(|state| state.open = true);
    }

    /// Holds the caller until the gate opens.
    pub(super) fn pass(&self) {
        self.change(|state| state.reached = true);
        self.wait(|state| state.open);
    }

    fn change(&self, change: impl FnOnce(&mut GateState)) {
        change(&mut self.0.0.lock().expect("a gate"));
        self.0.1.notify_all();
    }

    fn wait(&self, until: impl Fn(&GateState) -> bool) -> bool {
        let state = self.0.0.lock().expect("a gate");
        let waited = self
            .0
            .1
            .wait_timeout_while(state, PATIENCE, |state| !until(state));
        !waited.expect("a gate").1.timed_out()
    }
}
