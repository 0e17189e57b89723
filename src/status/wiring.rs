//! What the host's part says of its work, in a file that anybody may read: it listens nowhere.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Row;
use crate::host::install;
use crate::host::watch::{LastApply, STATE_FILE, State};

/// What is read of it, in bytes.
const LIMIT: u64 = 64 * 1024;

/// The state of the host's part; nothing where there is none, or it can't be read.
pub fn wiring() -> Option<State> {
    read(Path::new(STATE_FILE))
}

fn read(file: &Path) -> Option<State> {
    let mut text = Vec::new();
    let file = File::open(file).ok()?;
    file.take(LIMIT).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// What people read of it.
pub fn rows(state: &State) -> Vec<Row> {
    let mut rows = vec![("wiring", state.summary.clone())];
    rows.extend(state.engines.iter().map(|engine| ("", engine.clone())));
    if let Some(last) = &state.last_apply {
        rows.push(("changed", changed(last, SystemTime::now())));
    }
    rows.extend(state.drift.iter().map(|drift| ("drift", drift.clone())));
    let blocked = state.blocked.iter();
    rows.extend(blocked.map(|blocked| ("blocked", blocked.clone())));
    let broken = state.configuration.iter();
    rows.extend(broken.map(|broken| ("config", broken.clone())));
    let refusals = state.refusals.iter();
    rows.extend(refusals.map(|refusal| ("refused", refusal.clone())));
    rows.extend(state.notes.iter().map(|note| ("note", note.clone())));
    rows.extend(
        state
            .next_step
            .iter()
            .map(|step| ("next step", step.clone())),
    );
    rows
}

/// What to do where nothing says how the engines are wired, although the units that wire them are
/// installed below this root (`/`).
pub fn absence(root: &Path) -> Option<Row> {
    let mut folders = install::UNITS.iter();
    let installed = folders.any(|folder| root.join(folder).join(install::HOST).exists());
    let step = format!(
        "{unit} does not run, so nobody looks after how the engines are wired: `journalctl \
         --unit={unit}` says why, `systemctl start {unit}` starts it",
        unit = install::HOST
    );
    installed.then_some(("next step", step))
}

/// `5m ago, proved`, or how it failed.
fn changed(last: &LastApply, now: SystemTime) -> String {
    let at = UNIX_EPOCH + Duration::from_secs(last.at);
    let seconds = now.duration_since(at).unwrap_or_default().as_secs();
    let ago = humantime::format_duration(Duration::from_secs(seconds));
    match &last.failure {
        None => format!("{ago} ago, proved"),
        Some(failure) => format!("{ago} ago, failed: {failure}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn what_can_not_be_read_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("state.json");
        assert_eq!(read(&file), None);
        for (text, expected) in [
            ("no JSON", None),
            (
                r#"{"summary": "docker wired", "of_tomorrow": 1}"#,
                Some("docker wired"),
            ),
            (&format!(r#"{{"summary": "{}"}}"#, "x".repeat(70_000)), None),
        ] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            let summary = read(file.path()).map(|state| state.summary);
            assert_eq!(summary.as_deref(), expected, "{text:.40}");
        }
    }

    #[test]
    fn people_read_what_is_wired_and_what_to_do() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        let last = |failure: Option<&str>| LastApply {
            at: 700,
            failure: failure.map(str::to_owned),
        };
        assert_eq!(changed(&last(None), now), "5m ago, proved");
        assert_eq!(
            changed(&last(Some("no bus")), now),
            "5m ago, failed: no bus"
        );
        let state = State {
            summary: "docker not wired".to_owned(),
            drift: Some("changed by somebody else".to_owned()),
            blocked: Some("the journal can't be understood".to_owned()),
            refusals: vec!["docker: a flag. Take it away".to_owned()],
            notes: vec!["docker.service is masked".to_owned()],
            next_step: Some("`registry-agent plan`".to_owned()),
            ..State::default()
        };
        let names: Vec<&str> = rows(&state).into_iter().map(|(name, _)| name).collect();
        let expected = ["wiring", "drift", "blocked", "refused", "note", "next step"];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_part_that_is_installed_and_says_nothing_is_named_with_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(absence(root.path()), None);
        let unit = root
            .path()
            .join("usr/lib/systemd/system")
            .join(install::HOST);
        std::fs::create_dir_all(unit.parent().unwrap()).unwrap();
        File::create_new(unit).unwrap();
        let (name, step) = absence(root.path()).unwrap();
        assert_eq!(name, "next step");
        assert!(
            step.contains("`journalctl --unit=registry-agent-host.service`"),
            "{step}"
        );
    }
}
