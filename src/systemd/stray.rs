//! Signals that nobody means.

use std::io;
use std::task::Poll;

use nix::libc;
use nix::sys::signal::Signal;
use tokio::signal::unix::{self, SignalKind, signal};

/// What ends a process by default, and no fault of the process raises (signal(7)): a stray one would
/// take down what a whole host pulls through, or leave its engines to a mirror that nobody looks
/// after. Real-time signals are the same ([`ignore`]). SIGXFSZ comes of a write beyond
/// `LimitFSIZE=`, which then fails as EFBIG and is reported as that.
const STRAY: [Signal; 12] = [
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGPIPE,
    Signal::SIGALRM,
    Signal::SIGSTKFLT,
    Signal::SIGXCPU,
    Signal::SIGXFSZ,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPWR,
];

/// Has none of them end this process: each is logged, with the unit that a person may have meant to
/// stop. Within a tokio runtime, which carries it on.
pub fn ignore(unit: &'static str) -> io::Result<()> {
    let ordinary = STRAY.map(|one| (one as i32, one.to_string()));
    let first = libc::SIGRTMIN();
    let real_time = (first..=libc::SIGRTMAX()).map(|number| {
        let name = format!("SIGRTMIN+{}", number - first);
        (number, name)
    });
    let taken: io::Result<Vec<_>> = ordinary
        .into_iter()
        .chain(real_time)
        .map(|(number, name)| Ok((signal(SignalKind::from_raw(number))?, name)))
        .collect();
    let mut taken = taken?;
    tokio::spawn(async move {
        while let Some(name) = next(&mut taken).await {
            tracing::warn!("{name} is ignored: `systemctl stop {unit}` ends this");
        }
    });
    Ok(())
}

/// The next of these that comes; none once the runtime ends.
async fn next(taken: &mut [(unix::Signal, String)]) -> Option<String> {
    std::future::poll_fn(|context| {
        for (signal, name) in taken.iter_mut() {
            match signal.poll_recv(context) {
                Poll::Ready(Some(())) => return Poll::Ready(Some(name.clone())),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => {}
            }
        }
        Poll::Pending
    })
    .await
}
