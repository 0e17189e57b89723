//! `registry-agent gc`.

use std::fmt::{self, Display, Formatter};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use indicatif::{DecimalBytes, HumanCount};

use super::{fail, in_runtime};
use crate::admin::client;
use crate::config::{self, Serving, Sources, Storage};
use crate::hosted::Hosted;
use crate::store::collect::{Collected, Total};
use crate::store::layout;
use crate::store::upload::UploadId;
use crate::store::{Store, StoreError};

/// Removes what nobody needs, or says what that is: by the agent that serves the storage, which
/// knows what is in use, or in this process where none does. Exit code 0: done; 1: it can't be, or
/// a manifest can't be read, and its repository was left alone; 2: the configuration.
pub(super) fn gc(sources: &Sources, dry_run: bool) -> ExitCode {
    let settings = match config::load(sources) {
        Ok(loaded) => loaded.settings,
        Err(errors) => return fail(&errors, 2),
    };
    let Some(serving) = &settings.serving else {
        return fail(&"a client stores nothing: there is nothing to remove", 2);
    };
    let Storage::Filesystem { root } = &serving.storage else {
        return fail(
            &"this version collects what was pushed to a disk (`storage.filesystem`), and nothing in a \
              bucket or the cache in front of one",
            2,
        );
    };
    let admin = client::address(settings.admin.clone(), sources);
    in_runtime(async {
        let collected = match alone(root, serving, dry_run).await {
            Ok(Some(collected)) => Ok(collected),
            Ok(None) => beside(root, &admin, dry_run).await,
            Err(error) => Err(error),
        };
        match collected {
            Ok(collected) => report(&collected, dry_run),
            Err(error) => fail(&error, 1),
        }
    })
}

/// Collects in this process, unless an agent serves the root.
async fn alone(root: &Path, serving: &Serving, dry_run: bool) -> Result<Option<Collected>, String> {
    // To open it would make one, and root's at that, which its agent could not open any more.
    if !root.join(layout::LOCK).exists() {
        let root = root.display();
        return Err(format!(
            "{root} was never served by an agent: start one first"
        ));
    }
    let store = match Store::open(root) {
        Ok(store) => store,
        Err(StoreError::Locked(_)) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    Hosted::tell(&store, serving);
    let collected = store.collect(dry_run).await;
    collected.map(Some).map_err(|error| error.to_string())
}

/// Has the agent collect that serves the root.
async fn beside(
    root: &Path,
    admin: &config::AdminAddress,
    dry_run: bool,
) -> Result<Collected, String> {
    let proof = UploadId::random().map_err(|error| error.to_string())?;
    let path = root.join(layout::proof(&proof));
    File::create_new(&path).map_err(|error| {
        let path = path.display();
        format!("only who may write to the storage may remove from it: can't write {path}: {error}")
    })?;
    let answered = client::collect(admin, &proof, dry_run).await;
    // The agent has taken it, if it was asked.
    let _ = fs::remove_file(&path);
    let body = answered.map_err(|error| format!("can't ask the agent at {admin}: {error}"))?;
    serde_json::from_slice(&body)
        .map_err(|error| format!("{admin} answered something else: {error}"))
}

fn report(collected: &Collected, dry_run: bool) -> ExitCode {
    let mut out = io::stdout().lock();
    // A reader that went away (`| head`) is no error.
    for item in &collected.listed {
        let root = collected.root.display();
        let size = DecimalBytes(item.bytes);
        let _ = writeln!(out, "{root}/{}: {size}, {}", item.path, item.reason);
    }
    let more = collected.count() - collected.listed.len() as u64;
    if more > 0 {
        let _ = writeln!(out, "and {} more", HumanCount(more));
    }
    let _ = writeln!(out, "{}", Sentence(collected, dry_run));
    for unreadable in &collected.unreadable {
        let error = format!(
            "{unreadable} can't be read, so nothing of its repository was removed: \
             `registry-agent verify` says why"
        );
        fail(&error, 1);
    }
    if collected.unreadable.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// `1 blob (12 MB), 2 links, 0 uploads (0 B), 0 set aside (0 B): would be removed`
struct Sentence<'a>(&'a Collected, bool);

impl Display for Sentence<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self(collected, dry_run) = self;
        if collected.count() == 0 {
            return f.write_str("there is nothing to remove");
        }
        let count = |total: Total, one: &str, many: &str| {
            let name = if total.count == 1 { one } else { many };
            format!("{} {name}", HumanCount(total.count))
        };
        let size = |total: Total| DecimalBytes(total.bytes);
        write!(
            f,
            "{} ({}), {}, {} ({}), {} set aside ({}): {}",
            count(collected.blobs, "blob", "blobs"),
            size(collected.blobs),
            count(collected.links, "link", "links"),
            count(collected.uploads, "upload", "uploads"),
            size(collected.uploads),
            HumanCount(collected.aside.count),
            size(collected.aside),
            if *dry_run {
                "would be removed"
            } else {
                "removed"
            },
        )
    }
}
