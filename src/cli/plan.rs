//! `registry-agent plan`: what would be changed on this host.

use std::fs::File;
use std::io::{IsTerminal as _, Read as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use super::{fail, print};
use crate::config::{self, Settings, Sources};
use crate::host::live::{self, ThisHost};
use crate::host::observe::Observed;
use crate::host::plan::{Plan, Printed, Wanted};

/// What is read of saved facts, in bytes: a few files of at most a megabyte each.
const LIMIT: u64 = 32 * 1024 * 1024;

/// Prints the plan and changes nothing. Exit code 0: there is nothing to do; 2: there is; 1: it
/// can't be said.
pub(super) fn plan(
    sources: &Sources,
    facts: Option<&Path>,
    wanted: Wanted,
    json: bool,
) -> ExitCode {
    let known = match facts {
        Some(file) => recorded(file, sources),
        None => observed(sources),
    };
    let made = known.and_then(|(facts, settings)| live::planned(&facts, &settings, wanted));
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
        print(&show(&made));
    }
    ExitCode::from(if made.is_empty() { 0 } else { 2 })
}

/// Prints what a plan for this host is made of. Exit code 0, or 1 where it can't be said.
pub(super) fn print_facts(sources: &Sources) -> ExitCode {
    let text = observed(sources).and_then(|(observed, _)| {
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

type Known = (Observed, Arc<Settings>);

/// Facts that were saved, and the configuration beside this command.
fn recorded(file: &Path, sources: &Sources) -> Result<Known, String> {
    let loaded = config::load(&sources.clone().of_the_unit()).map_err(|e| e.to_string())?;
    let name = file.display();
    let mut text = Vec::new();
    let read = File::open(file).and_then(|file| file.take(LIMIT + 1).read_to_end(&mut text));
    read.map_err(|error| format!("can't read the facts in {name}: {error}"))?;
    if text.len() as u64 > LIMIT {
        return Err(format!(
            "can't read the facts in {name}: it is larger than {LIMIT} bytes, which the facts of no \
             host are"
        ));
    }
    let facts = serde_json::from_slice(&text)
        .map_err(|error| format!("{name} does not hold the facts of a host: {error}"))?;
    let observed = Observed {
        facts,
        notes: Vec::new(),
    };
    Ok((observed, Arc::new(loaded.settings)))
}

/// This host's own facts, and its agent's configuration.
fn observed(sources: &Sources) -> Result<Known, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| format!("can't start: {error}"))?;
    runtime.block_on(async {
        let host = ThisHost::connect(sources.clone()).await;
        let host = host.map_err(|error| error.to_string())?;
        let settings = host.settings();
        let facts = live::facts(Some(host.manager()), &settings).await?;
        Ok((facts, settings))
    })
}
