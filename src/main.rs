//! `registry-agent`: parse, run, exit code. Everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    registry_agent::cli::main()
}
