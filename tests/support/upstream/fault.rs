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
    /// Never answers.
    HangHeaders,
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
#[derive(Default)]
pub(super) struct Plan {
    pub status: Option<u16>,
    pub hang_headers: bool,
    pub hang_body: Option<usize>,
    pub cut: Option<usize>,
    pub chunked: bool,
    pub no_ranges: bool,
    pub gate: Option<(usize, Gate)>,
    wrong_byte: Option<usize>,
    longer: usize,
    shorter: usize,
}

impl Plan {
    /// What the rules say of this request; uses each up by one. A request that is not admitted gets
    /// a challenge and no content, so what would happen to its content is left for the next.
    pub fn of(rules: &mut [Rule], method: &str, path: &str, admitted: bool) -> Self {
        let mut plan = Self::default();
        for rule in rules {
            let on = &rule.on;
            let applies = on.method.is_none_or(|only| only == method) && path.contains(&on.part);
            let reached = admitted || matches!(rule.fault, Fault::Status(_) | Fault::HangHeaders);
            if applies && reached && rule.left > 0 {
                rule.left -= 1;
                plan.add(rule.fault.clone());
            }
        }
        plan
    }

    fn add(&mut self, fault: Fault) {
        match fault {
            Fault::Status(status) => self.status = Some(status),
            Fault::HangHeaders => self.hang_headers = true,
            Fault::HangBody(at) => self.hang_body = Some(at),
            Fault::Cut(at) => self.cut = Some(at),
            Fault::WrongByte(at) => self.wrong_byte = Some(at),
            Fault::Longer(by) => self.longer = by,
            Fault::Shorter(by) => self.shorter = by,
            Fault::Chunked => self.chunked = true,
            Fault::NoRanges => self.no_ranges = true,
            Fault::Gate(at, gate) => self.gate = Some((at, gate)),
        }
    }

    /// The content as this answer has it.
    pub fn content(&self, right: &Bytes) -> Bytes {
        let mut bytes = right.to_vec();
        if let Some(at) = self.wrong_byte {
            bytes[at] ^= 0xff;
        }
        bytes.truncate(right.len() - self.shorter);
        bytes.resize(bytes.len() + self.longer, b'+');
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
