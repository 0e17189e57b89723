//! `registry-agent plan`: what would be changed on this host.

use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;

use super::{fail, print};
use crate::config::{self, Settings, Sources};
use crate::host::live;
use crate::host::observe::Observed;
use crate::host::plan::{Plan, Printed, Wanted};
use crate::systemd::Manager;

/// Prints the plan and changes nothing. Exit code 0: there is nothing to do; 2: there is; 1: it
/// can't be said, or not of every engine.
pub(super) fn plan(
    sources: &Sources,
    facts: Option<&Path>,
    wanted: Wanted,
    json: bool,
) -> ExitCode {
    let settings = match config::load(&sources.clone().of_the_unit()) {
        Ok(loaded) => loaded.settings,
        Err(errors) => return fail(&errors, 1),
    };
    let observed = match facts {
        Some(file) => recorded(file),
        None => observed(&settings),
    };
    let made: Plan = match observed.and_then(|facts| live::planned(&facts, &settings, wanted)) {
        Ok(made) => made,
        Err(error) => return fail(&error, 1),
    };
    if json {
        match serde_json::to_string_pretty(&made) {
            Ok(text) => print(&format!("{text}\n")),
            Err(error) => return fail(&format!("can't write the plan as JSON: {error}"), 1),
        };
    } else {
        print(&show(&made));
    }
    ExitCode::from(match (made.errors.is_empty(), made.is_empty()) {
        (false, _) => 1,
        (true, true) => 0,
        (true, false) => 2,
    })
}

/// Prints what a plan for this host is made of. Exit code 0, or 1 where it can't be said.
pub(super) fn print_facts(sources: &Sources) -> ExitCode {
    let settings = match config::load(&sources.clone().of_the_unit()) {
        Ok(loaded) => loaded.settings,
        Err(errors) => return fail(&errors, 1),
    };
    let text = observed(&settings).and_then(|observed| {
        let text = serde_json::to_string_pretty(&observed.facts);
        text.map_err(|error| format!("can't write the facts as JSON: {error}"))
    });
    match text {
        Ok(text) => print(&format!("{text}\n")),
        Err(error) => fail(&error, 1),
    }
}

/// A plan for people, in colours on a terminal.
pub(super) fn show(plan: &Plan) -> String {
    // no-color.org: any value but an empty one.
    let refused = std::env::var_os("NO_COLOR").is_some_and(|it| !it.is_empty());
    let coloured = !refused && std::io::stdout().is_terminal();
    Printed { plan, coloured }.to_string()
}

fn recorded(file: &Path) -> Result<Observed, String> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("can't read the facts in {}: {error}", file.display()))?;
    match serde_json::from_str(&text) {
        Ok(facts) => Ok(Observed {
            facts,
            notes: Vec::new(),
        }),
        Err(error) => Err(format!(
            "{} does not hold the facts of a host: {error}",
            file.display()
        )),
    }
}

/// This host's own facts.
fn observed(settings: &Settings) -> Result<Observed, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| format!("can't start: {error}"))?;
    runtime.block_on(async {
        let manager = Manager::system().await.map_err(|error| error.to_string())?;
        live::facts(Some(&manager), settings).await
    })
}
