//! `registry-agent gc`.

use std::fmt::{self, Display, Formatter};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use indicatif::{DecimalBytes, HumanCount};

use super::{fail, in_runtime};
use crate::admin::client;
use crate::config::{self, Role, S3Settings, Serving, Sources, Storage};
use crate::hosted::Hosted;
use crate::store::collect::{Collected, Total};
use crate::store::layout::{self, Repository};
use crate::store::s3::{Limits, Writer};
use crate::store::upload::UploadId;
use crate::store::{Store, StoreError};

/// Removes what nobody needs, or says what that is. On a disk the agent does it that serves the
/// storage, which knows what is in use, or this process where none does; in a bucket, what is in use
/// is written there, and this process does it. Exit code 0: done; 1: it can't be, or a manifest can't
/// be read, and its repository was left alone; 2: the configuration.
pub(super) fn gc(sources: &Sources, dry_run: bool) -> ExitCode {
    let settings = match config::load(sources) {
        Ok(loaded) => loaded.settings,
        Err(errors) => return fail(&errors, 2),
    };
    let Some(serving) = &settings.serving else {
        return fail(&"a client stores nothing: there is nothing to remove", 2);
    };
    match (serving.role, &serving.storage) {
        (Role::Reader, _) => {
            let message = "a reader may not change its bucket: run `gc` where the role is writer";
            return fail(&message, 2);
        }
        (Role::Mirror, Storage::S3 { .. }) => {
            let message = "nothing is pushed to a mirror with `storage.s3`, which deletes nothing in \
                           its bucket: a lifecycle rule of the bucket does";
            return fail(&message, 2);
        }
        _ => {}
    }
    let admin = client::address(settings.admin.clone(), sources);
    in_runtime(async {
        let collected = match &serving.storage {
            Storage::S3 { bucket, .. } => in_bucket(bucket, serving, dry_run).await,
            Storage::Filesystem { root } => match alone(root, serving, dry_run).await {
                Ok(Some(collected)) => Ok(collected),
                Ok(None) => beside(root, &admin, dry_run).await,
                Err(error) => Err(error),
            },
        };
        match collected {
            Ok(collected) => report(&collected, dry_run),
            Err(error) => fail(&error, 1),
        }
    })
}

/// Collects in a bucket, whoever else writes there.
async fn in_bucket(
    bucket: &S3Settings,
    serving: &Serving,
    dry_run: bool,
) -> Result<Collected, String> {
    let writer = Writer::open(bucket, Limits::default()).await;
    let writer = writer.map_err(|error| error.to_string())?;
    let hosted = &serving.hosted;
    // What another writer takes pushes for is that one's to collect.
    let is_own = |of: &Repository| {
        hosted.names.matches(of.as_str()) && Hosted::check_push(hosted, of).is_ok()
    };
    let collected = Box::pin(writer.collect(&is_own, dry_run)).await;
    collected.map_err(|error| error.to_string())
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
    if collected.uploads_unknown {
        let message = "this store does not say which uploads are unfinished: have it abort those \
                       that are older than a day";
        let _ = writeln!(io::stderr(), "{message}");
    }
    if collected.more {
        let _ = writeln!(out, "there is more than one run removes: run it again");
    }
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
