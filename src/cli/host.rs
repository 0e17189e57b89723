//! `registry-agent host`: what `registry-agent-host.service` runs.

use std::path::Path;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::apply::open;
use super::fail;
use crate::host::apply::Deadlines;
use crate::host::watch::{Host, Order, Watch};

/// Looks after this host's engines until it is told to stop. Exit code 1: it could not begin.
pub async fn host<H: Host>(host: &H) -> ExitCode {
    let orders = match orders() {
        Ok(orders) => orders,
        Err(error) => return fail(&format!("can't listen for signals: {error}"), 1),
    };
    let root = Path::new("/");
    let (journal, _lock) = match open(root, "host") {
        Ok(open) => open,
        Err(error) => return fail(&error, 1),
    };
    let watch = Watch::new(host, root, &journal, Deadlines::default());
    match watch.run(orders).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

/// Signals, as orders. Others that would end a process and that nobody means by it are taken and
/// ignored: this holds the engines' wiring.
fn orders() -> std::io::Result<mpsc::Receiver<Order>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut users = signal(SignalKind::user_defined1())?;
    let mut others = signal(SignalKind::user_defined2())?;
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            let order = tokio::select! {
                _ = terminate.recv() => Order::Stop,
                _ = interrupt.recv() => Order::Stop,
                _ = hangup.recv() => Order::Reload,
                _ = users.recv() => continue,
                _ = others.recv() => continue,
            };
            // It fails when the loop has ended.
            if sender.send(order).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}
