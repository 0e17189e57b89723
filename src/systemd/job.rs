//! Jobs: to start, stop, restart or reload a unit, and to know whether it came to pass.
//!
//! The order matters. The stream of `JobRemoved` is open before the job is asked for, since it can
//! end before the reply that names it is read; and what systemd says of a job is not what the unit
//! is, so that is looked at afterwards.

use std::fmt;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, MissedTickBehavior};

use super::manager::{JobRemovedStream, Manager, ManagerError, Moment, ask, is};

/// To ask for a job, or for its end.
const CALL: Duration = Duration::from_secs(25);
/// What a job is asked for with after its deadline has passed already.
const AFTERWARDS: Duration = Duration::from_secs(5);
/// As systemctl(1): what is queued for the unit and contradicts gives way.
const MODE: &str = "replace";
/// Waits for nobody. The unit that asks is ordered before the one that it reloads or starts again,
/// and while it stops systemd has that one's reload or start wait for its end (`job_is_runnable` in
/// systemd's `job.c`): the two would wait for each other. A restart is worse, for its first half, the
/// stop, does not wait: docker would be down until the deadline. The manual keeps this mode for
/// rescue, since nothing is started or stopped along with the unit. For a reload there is nothing;
/// for a restart it is taken only while our own unit stops.
const UNORDERED_MODE: &str = "ignore-dependencies";

/// What is to be done with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobVerb {
    /// It is to run.
    Start,
    /// It is not to run.
    Stop,
    /// It is to run, with a new process.
    Restart,
    /// It is to read its configuration again.
    Reload,
}

impl fmt::Display for JobVerb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Reload => "reload",
        })
    }
}

/// A job that did not come to pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobError {
    /// The unit.
    pub unit: String,
    /// What was to be done with it.
    pub verb: JobVerb,
    /// What happened.
    pub kind: JobFailure,
    /// What the unit was afterwards; absent where systemd could not be asked.
    pub state: Option<JobState>,
}

/// What a unit was after its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobState {
    /// `active`, `failed`, ...
    pub active_state: String,
    /// `running`, `auto-restart`, ...
    pub sub_state: String,
    /// `exit-code`, `start-limit-hit`, ...
    pub result: String,
    /// How often `Restart=` has started it.
    pub restarts: u32,
}

/// Why a job did not come to pass. The first five and [`JobFailure::Other`] are systemd's own words
/// for it (org.freedesktop.systemd1(5), `JobRemoved`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobFailure {
    /// Somebody has cancelled it, or asked for the opposite.
    Canceled,
    /// systemd's own timeout for the job.
    Timeout,
    /// The unit did not do it, or did not stay so.
    Failed,
    /// What the unit needs did not start.
    Dependency,
    /// There was nothing to do: a condition of the unit does not hold.
    Skipped,
    /// `invalid`, `assert`, `unsupported`, `collected`, `once`.
    Other(String),
    /// It had not ended when we had waited for so long.
    Deadline {
        /// How long.
        waited: Duration,
        /// Whether the job is still there: it could not be cancelled.
        left: bool,
    },
    /// systemd did not take it.
    Refused {
        /// The D-Bus error's name.
        name: String,
        /// Its message.
        message: String,
    },
    /// systemd could not be asked, or not any more: nobody knows.
    Bus(String),
}

impl std::error::Error for JobError {}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { unit, verb, .. } = self;
        write!(f, "can't {verb} {unit}: ")?;
        match &self.kind {
            JobFailure::Canceled => {
                f.write_str("its job was cancelled, by somebody or by a job that contradicts it")?;
            }
            JobFailure::Timeout => f.write_str("its job took longer than systemd allows it")?,
            JobFailure::Failed => f.write_str("it did not, or did not stay so")?,
            JobFailure::Dependency => f.write_str("a unit that it needs did not start")?,
            JobFailure::Skipped => f.write_str("a condition of the unit does not hold")?,
            // What `ReloadUnit` makes of a unit that is inactive.
            JobFailure::Other(result) if result == "invalid" && *verb == JobVerb::Reload => {
                f.write_str("it does not run, so there is nothing to reload")?;
            }
            JobFailure::Other(result) => write!(f, "its job ended as `{result}`")?,
            JobFailure::Deadline { waited, left } => {
                let waited = humantime::format_duration(*waited);
                write!(f, "its job had not ended after {waited} and ")?;
                f.write_str(if *left {
                    "could not be cancelled: it may still come to pass"
                } else {
                    "was cancelled"
                })?;
            }
            JobFailure::Refused { name, message } => {
                write!(f, "systemd refused: {message} ({name})")?;
            }
            JobFailure::Bus(reason) => write!(f, "{reason}")?,
        }
        if let Some(state) = &self.state {
            let JobState {
                active_state,
                sub_state,
                result,
                restarts,
            } = state;
            write!(f, ". It is {active_state} ({sub_state}), Result={result}")?;
            match restarts {
                0 => {}
                1 => f.write_str(", and was restarted once")?,
                restarts => write!(f, ", and was restarted {restarts} times")?,
            }
        }
        write!(
            f,
            ".\nWhy is in `journalctl -u {unit}`; what it is now in `systemctl status {unit}`."
        )?;
        match (&self.state, &self.kind) {
            (Some(state), _) if state.result.ends_with("start-limit-hit") => write!(
                f,
                " It starts again only after `systemctl reset-failed {unit}`."
            ),
            (_, JobFailure::Refused { name, .. }) if is(name, "UnitMasked") => {
                write!(f, " If it is to run: `systemctl unmask {unit}`.")
            }
            (_, JobFailure::Refused { name, .. }) if name.ends_with(".AccessDenied") => {
                f.write_str(" Only root may do this.")
            }
            _ => Ok(()),
        }
    }
}

impl Manager {
    /// Does it, and waits until it is done or the deadline is over.
    ///
    /// Only `done` is success, and only if the unit is then what it should be: a start that a
    /// condition has prevented is `done` as well. A job that has not ended by the deadline is
    /// cancelled, since nobody waits for it any more: one that came to pass later would change the
    /// host behind the back of whoever has given up on it. systemd merges jobs, so that may be a
    /// job for which somebody else has asked too.
    ///
    /// Never for our own unit: it would wait for its own end. See [`Manager::enqueue`].
    pub async fn run(&self, unit: &str, verb: JobVerb, deadline: Duration) -> Result<(), JobError> {
        let mut job = None;
        let followed = self.follow(unit, verb, &mut job);
        let kind = match tokio::time::timeout(deadline, followed).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(kind)) => kind,
            Err(_) => JobFailure::Deadline {
                waited: deadline,
                left: !self.cancel(job.as_deref()).await,
            },
        };
        let state = match tokio::time::timeout(AFTERWARDS, self.look(unit)).await {
            Ok(Ok(moment)) => Some(JobState {
                active_state: moment.facts.active_state,
                sub_state: moment.facts.sub_state,
                result: moment.facts.result,
                restarts: moment.restarts,
            }),
            _ => None,
        };
        Err(JobError {
            unit: unit.to_owned(),
            verb,
            kind,
            state,
        })
    }

    /// Asks for it and does not wait: for our own unit, and at boot, where whoever waits for a job
    /// before it is ready itself hangs the boot (cloud-init 5930).
    pub async fn enqueue(&self, unit: &str, verb: JobVerb) -> Result<(), JobError> {
        match self.ask_for(unit, verb).await {
            Ok(_) => Ok(()),
            Err(kind) => Err(JobError {
                unit: unit.to_owned(),
                verb,
                kind,
                state: None,
            }),
        }
    }

    async fn follow(
        &self,
        unit: &str,
        verb: JobVerb,
        enqueued: &mut Option<String>,
    ) -> Result<(), JobFailure> {
        let before = self.look(unit).await?;
        // The signal names the unit itself, whichever of its names it was asked for by.
        let id = before.facts.name.as_str();
        let what = || format!("tell when the job to {verb} {id} ends");
        let systemd = self.systemd(what).await?;
        // Those of this unit only: the queue is bounded, and a boot has hundreds.
        let arguments = [(2, id)];
        let stream = systemd.receive_job_removed_with_args(&arguments);
        let mut removed = ask(what, CALL, stream).await?;
        match ask(what, CALL, systemd.subscribe()).await {
            Err(ManagerError::Refused { name, .. }) if is(&name, "AlreadySubscribed") => {}
            subscribed => subscribed?,
        }
        let job = self.ask_for(id, verb).await?;
        *enqueued = Some(job.clone());
        let result = self.end(&mut removed, &job, id, verb).await?;
        let after = self.look(id).await?;
        judge(verb, result.as_deref(), &before, &after)
    }

    /// The job's path.
    async fn ask_for(&self, unit: &str, verb: JobVerb) -> Result<String, JobFailure> {
        let what = || format!("{verb} {unit}");
        let systemd = self.systemd(what).await?;
        let mode = match verb {
            JobVerb::Reload => UNORDERED_MODE,
            JobVerb::Start | JobVerb::Restart if self.own_unit_stops().await => UNORDERED_MODE,
            _ => MODE,
        };
        let job = match verb {
            JobVerb::Start => ask(what, CALL, systemd.start_unit(unit, mode)).await?,
            JobVerb::Stop => ask(what, CALL, systemd.stop_unit(unit, mode)).await?,
            JobVerb::Restart => ask(what, CALL, systemd.restart_unit(unit, mode)).await?,
            JobVerb::Reload => ask(what, CALL, systemd.reload_unit(unit, mode)).await?,
        };
        Ok(job.to_string())
    }

    /// How the job has ended; nothing where it has, and the signal that says how was lost (systemd
    /// before 236 loses them around a reload of its units, systemd 8803).
    async fn end(
        &self,
        removed: &mut JobRemovedStream,
        job: &str,
        unit: &str,
        verb: JobVerb,
    ) -> Result<Option<String>, JobFailure> {
        let mut may_be_held = matches!(verb, JobVerb::Start | JobVerb::Restart);
        let mut poll = tokio::time::interval_at(Instant::now() + self.poll(), self.poll());
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ours = |signal: &super::manager::JobRemoved| match signal.args() {
            Ok(args) if args.job.as_str() == job => Some(args.result.clone()),
            _ => None,
        };
        let mut hears = true;
        loop {
            tokio::select! {
                biased;
                signal = removed.next(), if hears => match signal {
                    Some(signal) => if let Some(result) = ours(&signal) {
                        return Ok(Some(result));
                    },
                    // The job goes on without the bus; the unit tells how it ended.
                    None if self.reconnects() => hears = false,
                    None => return Err(JobFailure::Bus(
                        "the bus went away while its job was under way; whether it ended is not \
                         known".into(),
                    )),
                },
                _ = poll.tick() => {
                    if self.look(unit).await?.job == job {
                        if may_be_held && self.own_unit_stops().await {
                            may_be_held = false;
                            self.release(unit).await;
                        }
                        continue;
                    }
                    // The signal was sent before this answer: if it was not lost, it is here.
                    while let Some(Some(signal)) = removed.next().now_or_never() {
                        if let Some(result) = ours(&signal) {
                            return Ok(Some(result));
                        }
                    }
                    return Ok(None);
                }
            }
        }
    }

    /// Our own unit was told to stop after the job was asked for, which waits for its end from then
    /// on. A start that waits for nobody is merged into it, and it with that
    /// (`job_merge_into_installed` in systemd's `job.c`).
    async fn release(&self, unit: &str) {
        let what = || format!("start {unit} at once");
        let released = async {
            let systemd = self.systemd(what).await?;
            ask(what, CALL, systemd.start_unit(unit, UNORDERED_MODE)).await
        };
        if let Err(error) = released.await {
            // The deadline says the rest.
            tracing::warn!(
                unit,
                "its job may wait for the end of our own unit: {error}"
            );
        }
    }

    /// Whether the job is gone.
    async fn cancel(&self, job: Option<&str>) -> bool {
        // Without an answer that names it, it may or may not be there.
        let number = job.and_then(|job| job.rsplit('/').next());
        let Some(id) = number.and_then(|number| number.parse().ok()) else {
            return false;
        };
        let what = || format!("cancel job {id}");
        let cancelled = async {
            let systemd = self.systemd(what).await?;
            ask(what, AFTERWARDS, systemd.cancel_job(id)).await
        };
        match cancelled.await {
            Ok(()) => true,
            Err(ManagerError::Refused { name, .. }) => is(&name, "NoSuchJob"),
            Err(_) => false,
        }
    }
}

/// Whether what was to come to pass did. Without a result, the unit alone tells.
fn judge(
    verb: JobVerb,
    result: Option<&str>,
    before: &Moment,
    after: &Moment,
) -> Result<(), JobFailure> {
    match result {
        None | Some("done") => {}
        Some("canceled") => return Err(JobFailure::Canceled),
        Some("timeout") => return Err(JobFailure::Timeout),
        Some("failed") => return Err(JobFailure::Failed),
        Some("dependency") => return Err(JobFailure::Dependency),
        Some("skipped") => return Err(JobFailure::Skipped),
        Some(other) => return Err(JobFailure::Other(other.to_owned())),
    }
    // `refreshing` is systemd 257's word for the first half of reloading.
    let runs = matches!(
        after.facts.active_state.as_str(),
        "active" | "reloading" | "refreshing"
    );
    let reloaded = after
        .reload_result
        .as_deref()
        .is_none_or(|result| result == "success");
    // An invocation is a unit's life from one start to its end (systemd.exec(5),
    // `$INVOCATION_ID`): what has the one it had was not restarted.
    let restarted = after.invocation.is_empty() || after.invocation != before.invocation;
    match verb {
        JobVerb::Start | JobVerb::Restart if !runs && !after.condition => Err(JobFailure::Skipped),
        JobVerb::Start if runs => Ok(()),
        JobVerb::Restart if runs && restarted => Ok(()),
        JobVerb::Reload if runs && reloaded => Ok(()),
        JobVerb::Stop if matches!(after.facts.active_state.as_str(), "inactive" | "failed") => {
            Ok(())
        }
        _ => Err(JobFailure::Failed),
    }
}

impl From<ManagerError> for JobFailure {
    fn from(error: ManagerError) -> Self {
        match error {
            ManagerError::Refused { name, message, .. } => Self::Refused { name, message },
            error => Self::Bus(error.to_string()),
        }
    }
}
