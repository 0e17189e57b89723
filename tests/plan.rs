//! `plan`: facts and settings in, what would be changed out.
//!
//! Each folder of `tests/plan` is a host: `settings.yaml` is the agent's configuration, `facts.json`
//! what is there (a file it does not hold is absent), `expected/plan.txt` what is printed, and
//! `expected/files` the files as they would be; or `expected/error.txt`. A case whose name starts
//! with `withdraw` is of a mirror that does not serve. What a case gave instead of what was
//! expected is under the target folder, in `tmp/plan/<case>`.

// A test's own failure is a panic.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use registry_agent::config::{self, HostSettings, Sources};
use registry_agent::host::facts::{Facts, FileFacts};
use registry_agent::host::plan::{
    Plan, PlanErrors, Printed, Proof, Verb, Wanted, further_paths, plan,
};

const LEAST_CASES: usize = 87;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plan")
}

fn cases() -> Vec<PathBuf> {
    let mut cases: Vec<PathBuf> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    cases.sort();
    cases
}

fn name(case: &Path) -> String {
    case.file_name().unwrap().to_string_lossy().into_owned()
}

fn settings(case: &Path) -> HostSettings {
    let sources = Sources::from_process(Some(case.join("settings.yaml")), None);
    match config::load(&sources) {
        Ok(loaded) => loaded.settings.host,
        Err(errors) => panic!("{}: {errors}", name(case)),
    }
}

fn facts(case: &Path, settings: &HostSettings) -> Facts {
    let text = fs::read_to_string(case.join("facts.json")).unwrap();
    match serde_json::from_str(&text) {
        Ok(facts) => with_absent(facts, settings),
        Err(error) => panic!("{}: {error}", name(case)),
    }
}

/// What reading the host does: further files become known by those that are read.
fn with_absent(mut facts: Facts, settings: &HostSettings) -> Facts {
    for _ in 0..3 {
        for path in further_paths(&facts, settings) {
            facts.files.insert(path, FileFacts::Absent);
        }
    }
    assert!(further_paths(&facts, settings).is_empty());
    facts
}

fn make(case: &Path, facts: &Facts, settings: &HostSettings) -> Result<Plan, PlanErrors> {
    let wanted = if name(case).starts_with("withdraw") {
        Wanted::Withdrawn
    } else {
        Wanted::Wired
    };
    let made = plan(facts, settings, wanted);
    assert_eq!(made, plan(facts, settings, wanted), "{}: twice", name(case));
    made
}

/// What a case says, by the name of the file in `expected`.
fn outcome(made: &Result<Plan, PlanErrors>) -> BTreeMap<PathBuf, String> {
    let plan = match made {
        Ok(plan) => plan,
        Err(errors) => return BTreeMap::from([("error.txt".into(), format!("{errors}\n"))]),
    };
    let printed = Printed {
        plan,
        coloured: false,
    };
    let mut outcome = BTreeMap::from([(PathBuf::from("plan.txt"), printed.to_string())]);
    for change in &plan.files {
        let content = match &change.after {
            FileFacts::Text { content, .. } => content,
            // The plan itself says that it goes.
            FileFacts::Absent => continue,
            FileFacts::Unreadable(_) => panic!("{} would not be a file", change.path.display()),
        };
        let path = Path::new("files").join(change.path.strip_prefix("/").unwrap());
        outcome.insert(path, content.clone());
    }
    outcome
}

fn read_all(folder: &Path, below: &Path, found: &mut BTreeMap<PathBuf, String>) {
    for entry in fs::read_dir(folder.join(below)).into_iter().flatten() {
        let below = below.join(entry.unwrap().file_name());
        if folder.join(&below).is_dir() {
            read_all(folder, &below, found);
        } else {
            let text = fs::read_to_string(folder.join(&below)).unwrap();
            found.insert(below, text);
        }
    }
}

fn keep(case: &Path, outcome: &BTreeMap<PathBuf, String>) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("plan")
        .join(name(case));
    let _ = fs::remove_dir_all(&folder);
    for (path, text) in outcome {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut file = fs::OpenOptions::new()
            .create_new(true)
            .write(true)
            .open(path)
            .unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }
}

#[test]
fn every_host_gets_the_plan_that_is_expected() {
    let (cases, mut wrong) = (cases(), Vec::new());
    assert!(cases.len() >= LEAST_CASES, "{} cases", cases.len());
    for case in &cases {
        let settings = settings(case);
        let outcome = outcome(&make(case, &facts(case, &settings), &settings));
        let mut expected = BTreeMap::new();
        read_all(&case.join("expected"), Path::new(""), &mut expected);
        if outcome != expected {
            keep(case, &outcome);
            wrong.push(format!("{}: {outcome:#?}", name(case)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What the host is after the plan was applied, as far as a plan looks at it.
fn applied(mut facts: Facts, plan: &Plan) -> Facts {
    for change in &plan.files {
        let leads_here = |file: &FileFacts| matches!(file, FileFacts::Text { link_to: Some(to), .. } if *to == change.path);
        let link = facts.files.iter().find(|(_, file)| leads_here(file));
        let path = link.map_or(change.path.clone(), |(path, _)| path.clone());
        facts.files.insert(path, change.after.clone());
    }
    for docker in &mut facts.engines.docker {
        let mirrors = plan.proofs.iter().find_map(|proof| match proof {
            Proof::DockerMirrors { unit, mirrors } if *unit == docker.unit.name => Some(mirrors),
            _ => None,
        });
        let (Some(info), Some(mirrors)) = (&mut docker.info, mirrors) else {
            continue;
        };
        info.mirrors = mirrors
            .iter()
            .map(|one| format!("{}/", one.trim_end_matches('/')))
            .collect();
        let restarted = plan
            .actions
            .iter()
            .any(|action| action.unit == docker.unit.name && action.verb == Verb::Restart);
        let Some(words) = docker.command_line.as_mut().filter(|_| restarted) else {
            continue;
        };
        words.retain(|word| !word.starts_with("--registry-mirror="));
        let by_flag = docker
            .unit
            .environment_files
            .iter()
            .any(|file| plan.files.iter().any(|change| change.path == file.path));
        if by_flag {
            words.extend(mirrors.iter().map(|one| format!("--registry-mirror={one}")));
        }
    }
    facts
}

#[test]
fn a_second_plan_is_empty() {
    for case in cases() {
        let settings = settings(&case);
        let before = facts(&case, &settings);
        let Ok(first) = make(&case, &before, &settings) else {
            continue;
        };
        let after = with_absent(applied(before, &first), &settings);
        let second = make(&case, &after, &settings).unwrap();
        assert!(
            second.is_empty(),
            "{}: {}",
            name(&case),
            Printed {
                plan: &second,
                coloured: false
            }
        );
        assert_eq!(second.refusals, first.refusals, "{}", name(&case));
    }
}

#[test]
fn a_file_keeps_its_mode_owner_and_label() {
    for case in cases() {
        let settings = settings(&case);
        let Ok(plan) = make(&case, &facts(&case, &settings), &settings) else {
            continue;
        };
        for change in plan.files {
            let rights = |facts: &FileFacts| match facts {
                FileFacts::Text {
                    mode,
                    uid,
                    gid,
                    selinux,
                    link_to,
                    ..
                } => {
                    assert_eq!(*link_to, None, "the file itself is changed");
                    (*mode, *uid, *gid, selinux.clone())
                }
                _ => (0o644, 0, 0, None),
            };
            assert_eq!(
                rights(&change.before),
                rights(&change.after),
                "{}",
                name(&case)
            );
        }
    }
}

fn run(case: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let case = folder().join(case);
    let output = Command::new(env!("CARGO_BIN_EXE_registry-agent"))
        .arg("plan")
        .arg("--facts")
        .arg(case.join("facts.json"))
        .arg("--config")
        .arg(case.join("settings.yaml"))
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn the_exit_code_says_whether_there_is_something_to_do() {
    let (code, out, _) = run("sysconfig-restart-forbidden", &[]);
    assert_eq!(code, Some(0), "a refusal changes nothing: {out}");
    let (code, _, err) = run("tls-docker-24", &[]);
    assert_eq!(code, Some(1), "facts without every file are no facts");
    assert!(err.contains("the facts say nothing of this file"), "{err}");
    let (code, out, _) = run("wired-by-hand", &[]);
    assert_eq!((code, out.as_str()), (Some(0), "nothing to do\n"));
    let (code, out, _) = run("layout-tabs", &[]);
    assert_eq!(code, Some(2));
    assert_eq!(
        out,
        fs::read_to_string(folder().join("layout-tabs/expected/plan.txt")).unwrap()
    );
    let (code, _, err) = run("broken-comment", &[]);
    assert_eq!(code, Some(1));
    assert!(
        err.contains("/etc/docker/daemon.json:2:3: a comment"),
        "{err}"
    );
}

#[test]
fn a_plan_is_told_to_machines_as_json() {
    let (code, out, _) = run("layout-tabs", &["--json"]);
    let plan: Plan = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (code, plan.files.len(), plan.actions[0].verb),
        (Some(2), 1, Verb::Reload)
    );
}
