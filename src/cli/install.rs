//! `registry-agent install` and `uninstall`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::rollback::take_back;
use super::{fail, print};
use crate::config::Sources;
use crate::host::install::{self, Done, Told};
use crate::host::journal::Journal;
use crate::host::live::{self, ThisHost};
use crate::host::plan::Plan;
use crate::host::watch::Host as _;

/// Installs the units of this binary. Exit code 0: they are as they should be and run; 1: not.
pub(super) async fn install(host: &ThisHost) -> ExitCode {
    if let Err(error) = root_only("install") {
        return fail(&error, 1);
    }
    let binary = match own_path() {
        Ok(binary) => binary,
        Err(error) => return fail(&error, 1),
    };
    let installed = install::install(Path::new("/"), &binary, told(), host.manager());
    // In a box: what it holds is large.
    match Box::pin(installed).await {
        Ok(done) => said(&done, "everything is installed already\n"),
        Err(error) => fail(&error, 1),
    }
}

/// What the units are to be, by the agent's own as it is loaded now.
async fn told() -> Result<Told, String> {
    let host = ThisHost::connect(Sources::from_process(None, None)).await;
    let host = host.map_err(|error| error.to_string())?;
    let settings = host.settings();
    let folders = match live::folders_to_write(host.manager(), &settings).await {
        Ok(folders) => Some(folders),
        Err(why) => {
            let said = format!(
                "the engines can't be wired yet, and where the service has to write for that is \
                 not known: {why}\nRun `registry-agent install` again when that is put right."
            );
            // A message, and no failure: the units do without.
            let _ = fail(&said, 0);
            None
        }
    };
    Ok(Told { settings, folders })
}

/// Unwires the engines, and removes the units. Exit code 0: they are gone; 1: not.
pub(super) async fn uninstall(host: &ThisHost) -> ExitCode {
    if let Err(error) = root_only("uninstall") {
        return fail(&error, 1);
    }
    let restart = host.settings().host.docker.restart;
    let mut left = Vec::new();
    let unwire = async {
        let journal = Journal::default_folder(Path::new("/"));
        // Without one, no engine was ever wired; to open it would make it.
        if !journal.exists() {
            return Ok(());
        }
        let back = take_back(host.system(), restart, "uninstall", notes).await?;
        print(&back.said);
        // These may go another time; what only a person can put right keeps nothing here.
        if !back.failures.is_empty() {
            return Err(back.failures.join("\n"));
        }
        left = back.left;
        if !left.is_empty() {
            return Ok(());
        }
        // What it kept is where it belongs again.
        fs::remove_dir_all(&journal)
            .map_err(|error| format!("can't remove {}: {error}", journal.display()))
    };
    let uninstalled = install::uninstall(Path::new("/"), host.manager(), unwire);
    // In a box: what unwiring holds is large.
    match Box::pin(uninstalled).await {
        Ok(done) if left.is_empty() => said(&done, "nothing was installed\n"),
        Ok(done) => {
            said(&done, "nothing was installed\n");
            let left = left.join("\n");
            fail(&format!("what was not safe to take back stays:\n{left}"), 1)
        }
        Err(error) => fail(&error, 1),
    }
}

/// Of a way back that is part of something else, only what is worth knowing.
fn notes(plan: &Plan) -> String {
    let notes = plan.notes.iter().map(|note| format!("note: {note}\n"));
    notes.collect()
}

fn said(done: &Done, nothing: &str) -> ExitCode {
    if done.is_empty() {
        return print(nothing);
    }
    print(&(done.join("\n") + "\n"))
}

fn root_only(verb: &str) -> Result<(), String> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(format!(
        "only root can change this host's units: `sudo registry-agent {verb}`"
    ))
}

/// Where this binary is. After it was replaced, that is where the new one is.
fn own_path() -> Result<PathBuf, String> {
    let path =
        std::env::current_exe().map_err(|error| format!("can't find this binary: {error}"))?;
    let text = path.to_string_lossy();
    Ok(text
        .strip_suffix(" (deleted)")
        .map_or(path.clone(), PathBuf::from))
}
