//! `registry-agent plan`: what would be changed on this host, and what its agent does in its fleet.

use std::fs::File;
use std::io::{IsTerminal as _, Read as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use serde_json::json;

use super::{fail, print};
use crate::admin::client;
use crate::config::{self, Settings, Sources};
use crate::host::live::{self, ThisHost};
use crate::host::observe::Observed;
use crate::host::plan::{Plan, Printed, Wanted};
use crate::status::Status;
use crate::status::fleet::FleetStatus;

/// What is read of saved facts, in bytes: a few files of at most a megabyte each.
const LIMIT: u64 = 32 * 1024 * 1024;

/// Prints the plan and changes nothing. Exit code 0: there is nothing to do; 2: there is; 1: it
/// can't be said, or not of every engine.
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
    // Facts that were saved are of no running agent.
    let fleet = match &known {
        Ok((_, settings)) if facts.is_none() && !settings.fleet.is_off() => {
            Some(fleet(settings, sources))
        }
        _ => None,
    };
    let made = known.and_then(|(facts, settings)| live::planned(&facts, &settings, wanted));
    let made: Plan = match made {
        Ok(made) => made,
        Err(error) => return fail(&error, 1),
    };
    if json {
        let both = serde_json::to_value(&made).map(|mut made| {
            if let (Some(made), Some(fleet)) = (made.as_object_mut(), &fleet) {
                let fleet = fleet
                    .as_ref()
                    .map_or_else(|why| json!({ "error": why }), |it| json!(it));
                made.insert("fleet".to_owned(), fleet);
            }
            made
        });
        match both.and_then(|both| serde_json::to_string_pretty(&both)) {
            Ok(text) => print(&format!("{text}\n")),
            Err(error) => return fail(&format!("can't write the plan as JSON: {error}"), 1),
        };
    } else {
        print(&show(&made));
        match &fleet {
            Some(Ok(fleet)) => drop(print(&fleet.plan())),
            Some(Err(why)) => drop(print(&format!("{:<10} not known: {why}\n", "fleet"))),
            None => {}
        }
    }
    ExitCode::from(match (made.errors.is_empty(), made.is_empty()) {
        (false, _) => 1,
        (true, true) => 0,
        (true, false) => 2,
    })
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

/// What the running agent knows of its fleet, and does there. It acts by itself, so nothing of it is
/// part of the exit code.
fn fleet(settings: &Settings, sources: &Sources) -> Result<FleetStatus, String> {
    let admin = client::address(settings.admin.clone(), sources);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| format!("can't start: {error}"))?;
    let body = runtime.block_on(client::status(&admin));
    let body = body.map_err(|error| format!("can't ask the agent at {admin}: {error}"))?;
    let status: Status = serde_json::from_slice(&body)
        .map_err(|error| format!("{admin} answered something else: {error}"))?;
    status
        .fleet
        .ok_or_else(|| "the running agent takes part in none".to_owned())
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
