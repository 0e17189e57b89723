//! What a service tells systemd of itself: `sd_notify(3)`. Without systemd it does nothing.

use std::time::Duration;

use sd_notify::NotifyState;

/// How often the status line is brought up to date: it is never older than a second.
const STATUS_INTERVAL: Duration = Duration::from_millis(500);
/// How long an answer may take at most before systemd is not told that there was one.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// The service has started.
pub fn ready() {
    notify(&[NotifyState::Ready]);
}

/// What the service does, in a line.
pub fn status(line: &str) {
    notify(&[NotifyState::Status(line)]);
}

/// The service stops, and why that may take a while.
pub fn stopping(status: &str) {
    notify(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// The same for one that is done by then: where the unit is given less time (a drop-in's
/// `TimeoutStopSec=`), systemd is asked for that much.
pub fn stopping_within(status: &str, within: Duration) {
    let within = u32::try_from(within.as_micros()).unwrap_or(u32::MAX);
    notify(&[
        NotifyState::Stopping,
        NotifyState::Status(status),
        NotifyState::ExtendTimeoutUsec(within),
    ]);
}

/// Keeps the line current that `systemctl status` shows. Never ends.
pub async fn show_status(line: impl Fn() -> String) {
    let mut told = String::new();
    loop {
        let line = line();
        if line != told {
            notify(&[NotifyState::Status(&line)]);
            told = line;
        }
        tokio::time::sleep(STATUS_INTERVAL).await;
    }
}

/// Feeds the watchdog of a unit that has `WatchdogSec=`, each time that `answers` finds the service
/// answering within the time that it is given, so that one which hangs is killed and started again.
/// Ends only without a watchdog.
pub async fn feed_watchdog<F>(answers: impl Fn(Duration) -> F)
where
    F: Future<Output = Result<(), String>>,
{
    let Some(patience) = sd_notify::watchdog_enabled() else {
        return;
    };
    // Half of it is what sd_watchdog_enabled(3) asks for; an answer has to be there in the rest.
    let (interval, deadline) = (patience / 2, (patience / 4).min(ANSWER_DEADLINE));
    loop {
        match answers(deadline).await {
            Ok(()) => notify(&[NotifyState::Watchdog]),
            Err(error) => tracing::error!(
                %error,
                "the registry does not answer, which systemd ends if it lasts: {error}"
            ),
        }
        tokio::time::sleep(interval).await;
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd could not be told: {error}");
    }
}
