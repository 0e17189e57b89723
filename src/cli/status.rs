//! `registry-agent status`.

use std::path::Path;
use std::process::ExitCode;

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use super::{fail, print};
use crate::admin::client;
use crate::config::{self, AdminAddress, Loaded, Sources};
use crate::status::Status;
use crate::status::wiring::{absence, rows, wiring};

/// Asks the running agent. Exit code 0: ready; 3: running, not ready; 1: not to be reached; 2: the
/// configuration.
pub(super) fn status(sources: &Sources, json: bool) -> ExitCode {
    let unit = Path::new(client::UNIT_SOCKET);
    let unnamed = sources.config.is_none() && sources.distribution.is_none();
    let admin = match config::load(sources) {
        Ok(Loaded { settings, .. }) => client::address(settings.admin, sources),
        // The running agent has read its configuration; whoever asks may not be allowed to (a
        // password file), or it has been broken since.
        Err(_) if unnamed && unit.exists() => AdminAddress::Unix(unit.to_owned()),
        Err(errors) => return fail(&errors, 2),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    let answer = runtime.block_on(client::status(&admin));
    let body = match answer {
        Ok(body) => body,
        Err(error) => {
            let error = format!(
                "can't ask the agent at {admin}: {error}\n{}",
                remedy(&admin)
            );
            // The host's part is another process, and may know what is wrong.
            let known = wiring().filter(|_| !json);
            for (name, value) in known.iter().flat_map(rows) {
                print(&format!("{name:<10} {value}\n"));
            }
            return fail(&error, 1);
        }
    };
    let status: Status = match serde_json::from_slice(&body) {
        Ok(status) => status,
        Err(error) => {
            return fail(&format!("{admin} answered something else: {error}"), 1);
        }
    };
    print(&if json {
        String::from_utf8_lossy(&body).into_owned()
    } else {
        let absence = status.wiring.is_none().then(|| absence(Path::new("/")));
        let absence = absence.flatten();
        let row = absence.map(|(name, value)| format!("{name:<10} {value}\n"));
        status.to_string() + &row.unwrap_or_default()
    });
    if status.ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    }
}

/// What a person can do about an agent that does not answer there.
fn remedy(admin: &AdminAddress) -> &'static str {
    if let AdminAddress::Unix(path) = admin
        && access(path, AccessFlags::W_OK) == Err(Errno::EACCES)
    {
        return "This user may not ask it: `sudo registry-agent status`.";
    }
    "Is it running? `systemctl status registry-agent` says, and `journalctl --unit=registry-agent` \
     why not; if it has a configuration of its own, name it with --config."
}
