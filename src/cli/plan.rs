//! `registry-agent plan`: what would be changed on this host.

use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;

use super::{fail, print};
use crate::config::{self, HostSettings, Sources};
use crate::host::facts::Facts;
use crate::host::plan::{Plan, Printed, Wanted, plan as make};

/// Prints the plan and changes nothing. Exit code 0: there is nothing to do; 2: there is; 1: it
/// can't be said.
pub(super) fn plan(
    sources: &Sources,
    facts: Option<&Path>,
    wanted: Wanted,
    json: bool,
) -> ExitCode {
    let settings = match config::load(sources) {
        Ok(loaded) => loaded.settings.host,
        Err(errors) => return fail(&errors, 1),
    };
    let facts = match facts {
        Some(file) => recorded(file),
        None => observed(&settings),
    };
    let made = facts
        .and_then(|facts| make(&facts, &settings, wanted).map_err(|errors| errors.to_string()));
    let made: Plan = match made {
        Ok(made) => made,
        Err(error) => return fail(&error, 1),
    };
    if json {
        match serde_json::to_string_pretty(&made) {
            Ok(text) => print(&format!("{text}\n")),
            Err(error) => return fail(&format!("can't write the plan as JSON: {error}"), 1),
        };
    } else {
        // no-color.org: any value but an empty one.
        let plain = std::env::var_os("NO_COLOR").is_some_and(|it| !it.is_empty());
        let coloured = !plain && std::io::stdout().is_terminal();
        print(
            &Printed {
                plan: &made,
                coloured,
            }
            .to_string(),
        );
    }
    ExitCode::from(if made.is_empty() { 0 } else { 2 })
}

fn recorded(file: &Path) -> Result<Facts, String> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("can't read the facts in {}: {error}", file.display()))?;
    serde_json::from_str(&text).map_err(|error| {
        format!(
            "{} does not hold the facts of a host: {error}",
            file.display()
        )
    })
}

/// This host's own facts.
fn observed(_settings: &HostSettings) -> Result<Facts, String> {
    Err("this version plans only from recorded facts: name them with --facts FILE".into())
}
