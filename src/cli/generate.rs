//! `registry-agent generate`: what other programs want to know of the agent.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::config;

/// Prints the JSON Schema of the configuration file, for editors. Exit code 0, or 1 if standard
/// output can't be written.
pub fn schema() -> ExitCode {
    // The alternate form of a JSON value is indented.
    match writeln!(io::stdout().lock(), "{:#}", config::schema()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
