//! `registry-agent run`.

use std::process::ExitCode;

use super::fail;
use crate::config::{self, Sources};
use crate::systemd::listen::Passed;
use crate::{agent, log};

/// Serves until it is told to stop. Exit code 2: the configuration; 1: anything else.
pub(super) fn run(sources: Sources) -> ExitCode {
    let loaded = match config::load(&sources) {
        Ok(loaded) => loaded,
        Err(errors) => return fail(&errors, 2),
    };
    let level = match log::init(&loaded.settings.log) {
        Ok(level) => level,
        Err(error) => return fail(&error, 1),
    };
    // While there is no other thread.
    let passed = Passed::from_environment();
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("can't start: {error}"), 1),
    };
    let result = runtime.block_on(agent::run(loaded, sources, level, passed));
    // A download that nobody waits for any longer goes on after the next start.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "can't start: {error}");
            ExitCode::FAILURE
        }
    }
}
