//! `registry-agent host`: what `registry-agent-host.service` runs.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::apply::{OpenError, open};
use super::fail;
use crate::host::apply::Deadlines;
use crate::host::journal::Journal;
use crate::host::lock::Lock;
use crate::host::watch::{BROKEN, Host, Order, State, Watch, Word};
use crate::systemd::stray;

/// The shortest and the longest time between two attempts to open the state folder.
const RETRY: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// Looks after this host's engines until it is told to stop. Exit code 1: it could not begin.
/// The orders are those of [`orders`].
pub async fn host<H: Host>(host: &H, mut orders: mpsc::Receiver<Order>) -> ExitCode {
    let root = Path::new("/");
    let (journal, _lock) = match open_at_last(host, root, &mut orders).await {
        Ok(Some(open)) => open,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => return fail(&error, 1),
    };
    let watch = Watch::new(host, root, &journal, Deadlines::default());
    // In a box: what a change holds is large.
    Box::pin(watch.run(orders)).await;
    ExitCode::SUCCESS
}

/// Opens the state folder; nothing where this is told to stop before it could be opened. A disk that
/// takes no changes is waited for: to end would have systemd start this again every few seconds.
async fn open_at_last<H: Host>(
    host: &H,
    root: &Path,
    orders: &mut mpsc::Receiver<Order>,
) -> Result<Option<(Journal, Lock)>, OpenError> {
    let [mut wait, longest] = RETRY;
    loop {
        let error = match open(root, "host") {
            Ok(open) => return Ok(Some(open)),
            Err(error @ OpenError::State(_)) => error.to_string(),
            Err(error) => return Err(error),
        };
        tracing::error!("nothing of this host can be changed: {error}");
        // docker does not wait for it.
        host.tell(Word::Ready);
        let state = State::blocked(error);
        host.tell(Word::Status(state.line.clone()));
        if let Err(error) = state.write(root) {
            tracing::warn!("what this does can't be shown: {error}");
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            order = orders.recv() => match order {
                Some(Order::Reload) => match host.reload() {
                    Ok(()) => tracing::info!("reloaded"),
                    Err(errors) => tracing::error!("{BROKEN}: {errors}"),
                },
                Some(Order::Stop) | None => return Ok(None),
            }
        }
        wait = (wait * 2).min(longest);
    }
}

/// Signals, as orders. Before anything else is done, so that none finds this without a handler.
pub fn orders() -> std::io::Result<mpsc::Receiver<Order>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    stray::ignore("registry-agent-host")?;
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            let order = tokio::select! {
                _ = terminate.recv() => Order::Stop,
                _ = interrupt.recv() => Order::Stop,
                _ = hangup.recv() => Order::Reload,
            };
            // It fails when the loop has ended.
            if sender.send(order).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}
