//! Changing a host: all of a plan or none of it, through refusals, daemons that die, and a crash at
//! every step. The host is a folder, and its docker a file that behaves as moby does.
#![cfg(debug_assertions)]
#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use registry_agent::failpoint::{Failpoint, VARIABLE};
use registry_agent::host::apply::{
    Apply, ApplyError, Deadlines, Purpose, Recovered, System, SystemError,
};
use registry_agent::host::facts::{FileFacts, UnitFacts};
use registry_agent::host::journal::{Journal, Originals};
use registry_agent::host::plan::{Check, FileChange, Plan, Proof, UnitAction, Verb};
use registry_agent::host::{rollback, write};
use serde::{Deserialize, Serialize};

#[path = "apply/race.rs"]
mod race;

/// Files by their paths, with mode and content; the daemon's mirrors; its state.
type Everything = (
    BTreeMap<PathBuf, (u32, Option<String>)>,
    Vec<String>,
    String,
);

/// Where the child of a crash test finds its host.
const CHILD: &str = "REGISTRY_AGENT_TEST_HOST";
const DAEMON_JSON: &str = "/etc/docker/daemon.json";
const HOSTS_TOML: &str = "/etc/containerd/certs.d/docker.io/hosts.toml";
const MIRROR: &str = "http://127.0.0.1:5000";
const UNIT: &str = "docker.service";

/// A docker daemon and its unit, kept in a file so that they outlive the process that drives them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Docker {
    active_state: String,
    main_pid: u32,
    mirrors: Vec<String>,
    jobs: Vec<String>,
    /// Jobs are refused until the unit is reset.
    start_limit_hit: bool,
    /// It ends at a reload of any file that has this in it.
    dies_of: Option<String>,
    /// It never comes up again.
    broken: bool,
    /// A reload is asynchronous: so many questions see the daemon as it was.
    slow: u32,
    #[serde(default)]
    coming: Option<(u32, Vec<String>)>,
    /// The whole host is going down.
    #[serde(default)]
    shutting_down: bool,
    /// Somebody else writes this file just before it reloads.
    #[serde(default)]
    edited: Option<String>,
    /// ... or while it is asked what it says of a staged file.
    #[serde(default)]
    edited_at_check: Option<String>,
}

struct Host {
    folder: PathBuf,
}

impl Host {
    fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    fn at(&self, path: &str) -> PathBuf {
        write::under(&self.root(), Path::new(path))
    }

    /// As long as this is there, the check of a file does not end ...
    fn hold(&self) -> PathBuf {
        self.folder.join("hold")
    }

    /// ... and this tells that it has begun.
    fn held(&self) -> PathBuf {
        self.folder.join("held")
    }

    fn docker(&self) -> Docker {
        serde_json::from_slice(&fs::read(self.folder.join("docker")).unwrap()).unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut Docker)) {
        let mut docker = self.docker();
        change(&mut docker);
        self.set(&docker);
    }

    fn set(&self, docker: &Docker) {
        write::put(
            &self.folder.join("docker"),
            &text(&serde_json::to_string(docker).unwrap(), 0o600),
        )
        .unwrap();
    }

    /// What a docker daemon does with its file: the mirrors that it names, if it names any.
    fn configuration(&self) -> Result<Option<Vec<String>>, String> {
        let facts = write::read(&self.at(DAEMON_JSON)).unwrap();
        let FileFacts::Text { content, .. } = facts else {
            return Ok(None);
        };
        let json: serde_json::Value = serde_json::from_str(&content).map_err(|e| e.to_string())?;
        if json.get("unknown").is_some() {
            return Err("the following directives don't match any configuration option".into());
        }
        let Some(mirrors) = json.get("registry-mirrors") else {
            return Ok(None);
        };
        let mirrors: Vec<String> = serde_json::from_value(mirrors.clone()).unwrap();
        let mut once: Vec<String> = Vec::new();
        for mirror in mirrors {
            let mirror = format!("{}/", mirror.trim_end_matches('/'));
            if !once.contains(&mirror) {
                once.push(mirror);
            }
        }
        Ok(Some(once))
    }

    /// Everything below the root, and what the daemon has.
    fn state(&self) -> Everything {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.root()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let metadata = fs::symlink_metadata(&path).unwrap();
                let content = metadata
                    .is_file()
                    .then(|| fs::read_to_string(&path).unwrap());
                if metadata.is_dir() {
                    folders.push(path.clone());
                }
                files.insert(path, (metadata.mode(), content));
            }
        }
        let docker = self.docker();
        let mirrors = docker.coming.map_or(docker.mirrors, |(_, mirrors)| mirrors);
        (files, mirrors, docker.active_state)
    }
}

impl System for Host {
    async fn run(&self, action: &UnitAction, _: Duration) -> Result<(), SystemError> {
        assert_eq!(action.unit, UNIT);
        let mut docker = self.docker();
        docker.jobs.push(format!("{:?}", action.verb));
        let refusal = match action.verb {
            Verb::Reload if docker.active_state != "active" => Some("it is not active"),
            Verb::Reload => {
                if let Some(content) = docker.edited.take() {
                    write::put(&self.at(DAEMON_JSON), &text(&content, 0o644)).unwrap();
                }
                let file = fs::read_to_string(self.at(DAEMON_JSON)).unwrap_or_default();
                if docker.dies_of.as_ref().is_some_and(|of| file.contains(of)) {
                    "failed".clone_into(&mut docker.active_state);
                    docker.start_limit_hit = true;
                } else if let Ok(Some(mirrors)) = self.configuration() {
                    docker.coming = Some((docker.slow, mirrors));
                }
                None
            }
            Verb::Restart if docker.start_limit_hit => Some("start-limit-hit"),
            Verb::Restart => match self.configuration() {
                Ok(mirrors) if !docker.broken => {
                    "active".clone_into(&mut docker.active_state);
                    docker.main_pid += 1;
                    docker.coming = None;
                    docker.mirrors = mirrors.unwrap_or_default();
                    None
                }
                _ => {
                    "failed".clone_into(&mut docker.active_state);
                    Some("the job failed")
                }
            },
        };
        self.set(&docker);
        match refusal {
            None => Ok(()),
            Some(refusal) => Err(SystemError(format!("{:?}: {refusal}", action.verb))),
        }
    }

    async fn reset_failed(&self, _: &str) -> Result<(), SystemError> {
        self.change(|docker| docker.start_limit_hit = false);
        Ok(())
    }

    async fn docker_mirrors(&self, _: &str) -> Result<Vec<String>, SystemError> {
        let mut docker = self.docker();
        if docker.active_state != "active" {
            return Err(SystemError("connection refused".to_owned()));
        }
        docker.coming = match docker.coming.take() {
            Some((0, mirrors)) => {
                docker.mirrors = mirrors;
                None
            }
            Some((left, mirrors)) => Some((left - 1, mirrors)),
            None => None,
        };
        self.set(&docker);
        Ok(docker.mirrors)
    }

    async fn unit(&self, unit: &str) -> Result<UnitFacts, SystemError> {
        let docker = self.docker();
        Ok(UnitFacts {
            name: unit.to_owned(),
            active_state: docker.active_state,
            main_pid: docker.main_pid,
            ..UnitFacts::default()
        })
    }

    async fn is_shutting_down(&self) -> bool {
        self.docker().shutting_down
    }

    async fn check(&self, _: &Check, staged: &Path) -> Result<(), SystemError> {
        let content = fs::read_to_string(staged).unwrap();
        if self.hold().exists() {
            write::put(&self.held(), &text("", 0o600)).unwrap();
            wait_until("it may go on", || !self.hold().exists());
        }
        if let Some(theirs) = self.docker().edited_at_check {
            write::put(&self.at(DAEMON_JSON), &text(&theirs, 0o644)).unwrap();
        }
        if content.contains("refused") {
            return Err(SystemError("dockerd: unable to configure".to_owned()));
        }
        Ok(())
    }
}

fn text(content: &str, mode: u32) -> FileFacts {
    FileFacts::Text {
        content: content.to_owned(),
        mode,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        selinux: None,
        link_to: None,
    }
}

/// A host whose docker runs with this `daemon.json`, or none.
fn host(folder: &Path, daemon_json: Option<&str>) -> Host {
    let host = Host {
        folder: folder.to_owned(),
    };
    fs::create_dir_all(host.at("/etc/docker")).unwrap();
    if let Some(content) = daemon_json {
        write::put(&host.at(DAEMON_JSON), &text(content, 0o640)).unwrap();
    }
    let mirrors = host.configuration().unwrap().unwrap_or_default();
    host.set(&Docker {
        active_state: "active".to_owned(),
        main_pid: 100,
        mirrors,
        slow: 1,
        ..Docker::default()
    });
    host
}

/// The plan for these files, of which docker's is reloaded.
fn plan(host: &Host, daemon_json: &str, mirrors: &[&str]) -> Plan {
    let change = |path: &str, after: FileFacts, check| FileChange {
        path: path.into(),
        before: write::read(&host.at(path)).unwrap(),
        after,
        why: "a test".to_owned(),
        check,
        units: vec![UNIT.to_owned()],
    };
    let command = vec!["dockerd".to_owned()];
    Plan {
        files: vec![
            change(
                DAEMON_JSON,
                text(daemon_json, 0o640),
                Some(Check::DockerdValidate { command }),
            ),
            change(HOSTS_TOML, text("server = \"x\"\n", 0o644), None),
        ],
        actions: vec![UnitAction {
            unit: UNIT.to_owned(),
            verb: Verb::Reload,
            why: "a test".to_owned(),
        }],
        proofs: vec![Proof::DockerMirrors {
            unit: UNIT.to_owned(),
            mirrors: mirrors.iter().map(|&mirror| mirror.to_owned()).collect(),
        }],
        ..Plan::default()
    }
}

fn wired() -> String {
    format!(r#"{{"debug": true, "registry-mirrors": ["{MIRROR}"]}}"#)
}

fn purpose() -> Purpose {
    Purpose {
        mirror: Some(MIRROR.to_owned()),
    }
}

fn journal(host: &Host) -> Journal {
    Journal::open(&host.folder.join("state")).unwrap()
}

fn with<T>(host: &Host, work: impl AsyncFnOnce(&Apply<'_, Host>) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (root, journal) = (host.root(), journal(host));
    let apply = Apply {
        root: &root,
        journal: &journal,
        system: host,
        deadlines: Deadlines {
            job: Duration::from_secs(5),
            proof: Duration::from_millis(300),
        },
    };
    runtime.block_on(work(&apply))
}

/// The way back, as `rollback` plans it.
fn way_back(host: &Host) -> Plan {
    let plan = with(host, async |apply| rollback::plan(apply, false).await);
    plan.unwrap().unwrap()
}

#[test]
fn a_plan_is_written_told_and_proved_and_taken_back_to_the_byte() {
    for original in [
        None,
        Some("{ \"debug\":true }\n"),
        Some("{\"registry-mirrors\": [\"http://own\"]}"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let host = host(folder.path(), original);
        let before = host.state();
        let plan = plan(&host, &wired(), &[MIRROR]);
        let report = with(&host, async |apply| apply.apply(&plan, purpose()).await).unwrap();
        assert_eq!(report.proved, plan.proofs);
        assert_eq!(host.docker().mirrors, [format!("{MIRROR}/")]);
        assert_eq!(fs::read_to_string(host.at(DAEMON_JSON)).unwrap(), wired());
        assert!(journal(&host).transaction().unwrap().is_none());
        assert!(journal(&host).previous_mirrors().unwrap().contains(MIRROR));

        let back = way_back(&host);
        with(&host, async |apply| {
            apply.apply(&back, Purpose::default()).await
        })
        .unwrap();
        assert_eq!(host.state(), before, "{original:?}");
        assert_eq!(journal(&host).originals().unwrap(), Originals::default());
        assert_eq!(host.docker().main_pid, 100, "docker was restarted");
    }
}

#[test]
fn what_is_large_can_be_taken_back_and_what_is_too_large_is_not_begun() {
    // Each line end is two bytes in the journal.
    let large = format!("{{}}{}", "\n".repeat(1_000_000));
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some(&large));
    let wire = plan(&host, &(wired() + &"\t".repeat(1_000_000)), &[MIRROR]);
    with(&host, async |apply| apply.apply(&wire, purpose()).await).unwrap();
    let back = way_back(&host);
    with(&host, async |apply| {
        apply.apply(&back, Purpose::default()).await
    })
    .unwrap();
    assert_eq!(fs::read_to_string(host.at(DAEMON_JSON)).unwrap(), large);

    let mut wire = plan(&host, &wired(), &[MIRROR]);
    wire.files[1].after = text(&"\u{1}".repeat(4 << 20), 0o644);
    let before = host.state();
    let refused = with(&host, async |apply| apply.apply(&wire, purpose()).await);
    let said = refused.unwrap_err().to_string();
    assert!(said.contains("transaction.json would have"), "{said}");
    assert_eq!(host.state(), before);
    assert_eq!(journal(&host).transaction().unwrap(), None);
}

#[test]
fn nothing_to_do_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some("{}"));
    let before = host.state();
    with(&host, async |apply| {
        apply.apply(&Plan::default(), purpose()).await
    })
    .unwrap();
    assert_eq!(host.state(), before);
    assert_eq!(fs::read_dir(journal(&host).folder()).unwrap().count(), 0);
    assert_eq!(host.docker().jobs, [] as [String; 0]);
}

#[test]
fn what_can_be_known_beforehand_is_refused_before_anything_is_written() {
    type Spoil = fn(&Host, &mut Plan);
    let cases: [(Spoil, &str); 3] = [
        (
            |host, _| {
                let edited = text("{\"edited\": 1}", 0o640);
                write::put(&host.at(DAEMON_JSON), &edited).unwrap();
            },
            "/etc/docker/daemon.json has changed since the plan was made",
        ),
        (
            |host, _| {
                let open = fs::Permissions::from_mode(0o666);
                fs::set_permissions(host.at(DAEMON_JSON), open).unwrap();
            },
            "/etc/docker/daemon.json has changed since the plan was made",
        ),
        (
            |_, plan| plan.files[0].after = text("{\"refused\": 1}", 0o640),
            "/etc/docker/daemon.json would be refused, so nothing was written: dockerd: unable",
        ),
    ];
    for (spoil, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        let host = host(folder.path(), Some("{}"));
        let mut plan = plan(&host, &wired(), &[MIRROR]);
        spoil(&host, &mut plan);
        let before = host.state();
        let error = with(&host, async |apply| apply.apply(&plan, purpose()).await);
        let said = error.unwrap_err().to_string();
        assert!(said.contains(expected), "{said}");
        assert_eq!(host.state(), before);
        assert_eq!(fs::read_dir(journal(&host).folder()).unwrap().count(), 0);
    }
}

#[test]
fn what_falls_short_of_proof_is_taken_back_and_said() {
    type Spoil = fn(&mut Docker);
    let cases: [(&str, Spoil, &str, bool); 4] = [
        // Only logged by docker: the reload itself succeeds.
        (
            r#"{"unknown": 1}"#,
            |_| {},
            "has no mirror and should have",
            true,
        ),
        // Another mirror than was asked for.
        (
            r#"{"registry-mirrors": ["http://other"]}"#,
            |_| {},
            "has the mirror http://other/",
            true,
        ),
        // The daemon dies and hits its start limit; with the old file it comes back.
        (
            &wired(),
            |docker| docker.dies_of = Some("127.0.0.1".to_owned()),
            "can't be asked",
            true,
        ),
        // ... or it does not, which has to be said.
        (
            &wired(),
            |docker| {
                docker.dies_of = Some("127.0.0.1".to_owned());
                docker.broken = true;
            },
            "journalctl --unit=docker.service",
            false,
        ),
    ];
    for (content, spoil, expected, comes_back) in cases {
        let folder = tempfile::tempdir().unwrap();
        let host = host(folder.path(), Some("{\"debug\": false}"));
        host.change(spoil);
        let before = host.state();
        let plan = plan(&host, content, &[MIRROR]);
        let error = with(&host, async |apply| apply.apply(&plan, purpose()).await).unwrap_err();
        let said = error.to_string();
        assert!(said.contains(expected), "{said}");
        let ApplyError::Undone { undone, .. } = error else {
            panic!("{said}");
        };
        assert_eq!(undone.problems.is_empty(), comes_back, "{said}");
        let after = host.state();
        assert_eq!(after.0, before.0, "{said}");
        if comes_back {
            assert_eq!(after, before, "{said}");
        } else {
            assert!(said.contains("now: docker.service is failed"), "{said}");
        }
        assert!(journal(&host).transaction().unwrap().is_none());
        assert_eq!(journal(&host).originals().unwrap(), Originals::default());
    }
}

#[test]
fn a_docker_that_does_not_run_gets_its_file_and_no_job() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some("{}"));
    host.change(|docker| docker.active_state = "inactive".to_owned());
    let plan = plan(&host, &wired(), &[MIRROR]);
    let report = with(&host, async |apply| apply.apply(&plan, purpose()).await).unwrap();
    assert_eq!(host.docker().jobs, [] as [String; 0]);
    assert_eq!(report.proved, []);
    assert!(
        report
            .to_string()
            .contains("reads its configuration when it starts")
    );
    assert_eq!(fs::read_to_string(host.at(DAEMON_JSON)).unwrap(), wired());
}

#[test]
fn a_docker_that_is_still_starting_is_not_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some("{}"));
    host.change(|docker| docker.active_state = "inactive".to_owned());
    let plan = plan(&host, &wired(), &[MIRROR]);
    with(&host, async |apply| {
        let begun = apply.begin(&plan, purpose()).await.unwrap().unwrap();
        host.change(|docker| docker.active_state = "activating".to_owned());
        apply.complete(begun).await.unwrap();
    });
    assert_eq!(host.docker().jobs, [] as [String; 0]);
    assert_eq!(fs::read_to_string(host.at(DAEMON_JSON)).unwrap(), wired());
}

#[test]
fn what_somebody_else_writes_while_a_daemon_is_asked_is_not_written_over() {
    let theirs = r#"{"debug": true}"#;
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some("{}"));
    host.change(|docker| docker.edited_at_check = Some(theirs.to_owned()));
    let ours = plan(&host, &wired(), &[MIRROR]);
    let error = with(&host, async |apply| apply.apply(&ours, purpose()).await).unwrap_err();
    assert!(error.to_string().contains("has changed since"), "{error}");
    assert_eq!(fs::read_to_string(host.at(DAEMON_JSON)).unwrap(), theirs);
    assert!(journal(&host).transaction().unwrap().is_none());
}

#[test]
fn what_somebody_else_writes_before_the_proof_is_left_and_keeps_nothing_out() {
    let theirs = r#"{"registry-mirrors": ["http://theirs"], "debug": true}"#;
    for before in [None, Some("{}")] {
        let folder = tempfile::tempdir().unwrap();
        let host = host(folder.path(), before);
        host.change(|docker| docker.edited = Some(theirs.to_owned()));
        let ours = plan(&host, &wired(), &[MIRROR]);
        let error = with(&host, async |apply| apply.apply(&ours, purpose()).await).unwrap_err();
        assert!(error.to_string().contains("is left as it is"), "{error}");
        assert_eq!(fs::read_to_string(host.at(DAEMON_JSON)).unwrap(), theirs);
        let again = plan(&host, &wired(), &[MIRROR]);
        with(&host, async |apply| apply.apply(&again, purpose()).await).unwrap();
        assert_eq!(host.docker().mirrors, [format!("{MIRROR}/")]);
    }
}

#[test]
fn a_docker_that_fails_at_boot_for_our_file_gets_its_own_back_and_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some("{}"));
    host.change(|docker| docker.active_state = "inactive".to_owned());
    let before = host.state().0;
    let plan = plan(&host, r#"{"unknown": 1}"#, &[MIRROR]);
    let said = with(&host, async |apply| {
        let begun = apply.begin(&plan, purpose()).await.unwrap().unwrap();
        host.change(|docker| {
            "failed".clone_into(&mut docker.active_state);
            docker.start_limit_hit = true;
        });
        apply.complete(begun).await.unwrap_err().to_string()
    });
    assert!(said.contains("All of it was taken back"), "{said}");
    assert_eq!(host.state().0, before);
    assert_eq!(host.docker().active_state, "active");
}

#[test]
fn what_somebody_else_has_edited_is_left_to_them() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some("{}"));
    let plan = plan(&host, &wired(), &[MIRROR]);
    with(&host, async |apply| apply.apply(&plan, purpose()).await).unwrap();
    let edited = wired().replace("true", "false");
    write::put(&host.at(DAEMON_JSON), &text(&edited, 0o640)).unwrap();
    let back = way_back(&host);
    assert!(
        back.notes[0].contains("only what is registry-agent's is taken out"),
        "{back:?}"
    );
    with(&host, async |apply| {
        apply.apply(&back, Purpose::default()).await
    })
    .unwrap();
    let left = fs::read_to_string(host.at(DAEMON_JSON)).unwrap();
    assert_eq!(left, r#"{"debug": false, "registry-mirrors": []}"#);
    assert_eq!(host.docker().mirrors, [] as [String; 0]);
    assert!(!host.at(HOSTS_TOML).exists());
    assert_eq!(journal(&host).originals().unwrap(), Originals::default());
}

#[test]
fn a_docker_that_had_not_read_its_own_file_has_it_when_all_is_taken_back() {
    let folder = tempfile::tempdir().unwrap();
    let own = r#"{"registry-mirrors": ["http://own", "http://own/"]}"#;
    let host = host(folder.path(), Some(own));
    host.change(|docker| {
        docker.mirrors = vec!["http://memory/".to_owned()];
        // Else it would have its old ones for the first question.
        docker.slow = 0;
    });
    let before = host.state().0;
    let refused = plan(&host, r#"{"unknown": 1}"#, &[MIRROR]);
    let error = with(&host, async |apply| apply.apply(&refused, purpose()).await);
    let said = error.unwrap_err().to_string();
    assert!(said.contains("All of it was taken back"), "{said}");

    // ... and when it was wired, and is no more.
    let wire = plan(&host, &wired(), &[MIRROR]);
    with(&host, async |apply| apply.apply(&wire, purpose()).await).unwrap();
    let back = way_back(&host);
    with(&host, async |apply| {
        apply.apply(&back, Purpose::default()).await
    })
    .unwrap();
    let (files, mirrors, _) = host.state();
    assert_eq!(files, before);
    assert_eq!(mirrors, ["http://own/"]);
}

#[test]
fn a_host_that_goes_down_has_its_files_changed_and_no_job() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some("{}"));
    host.change(|docker| docker.shutting_down = true);
    let plan = plan(&host, &wired(), &[MIRROR]);
    let report = with(&host, async |apply| apply.apply(&plan, purpose()).await).unwrap();
    assert!(report.to_string().contains("at the next boot"), "{report}");
    assert_eq!(fs::read_to_string(host.at(DAEMON_JSON)).unwrap(), wired());
    let back = way_back(&host);
    with(&host, async |apply| {
        apply.apply(&back, Purpose::default()).await
    })
    .unwrap();
    assert_eq!(fs::read_to_string(host.at(DAEMON_JSON)).unwrap(), "{}");
    // What a crash has left is put back for the next boot as well.
    with(&host, async |apply| {
        apply.begin(&plan, purpose()).await.unwrap();
        apply.recover().await.unwrap();
    });
    assert_eq!(fs::read_to_string(host.at(DAEMON_JSON)).unwrap(), "{}");
    assert_eq!(host.docker().jobs, [] as [String; 0]);
    assert!(journal(&host).transaction().unwrap().is_none());
}

#[test]
fn what_can_not_be_put_back_yet_keeps_everything_else_out_until_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some("{}"));
    let before = host.state();
    let plan = plan(&host, r#"{"unknown": 1}"#, &[MIRROR]);
    // A folder where the file is written before it has its name.
    let in_the_way = host.at("/etc/docker/.daemon.json.registry-agent-new");
    with(&host, async |apply| {
        let begun = apply.begin(&plan, purpose()).await.unwrap().unwrap();
        fs::create_dir(&in_the_way).unwrap();
        let said = apply.complete(begun).await.unwrap_err().to_string();
        assert!(said.contains("registry-agent-new"), "{said}");
        let jobs = host.docker().jobs.len();
        for _ in 0..3 {
            let said = apply.recover().await.unwrap_err().to_string();
            let file = journal(&host).transaction_file();
            assert!(said.contains(file.to_str().unwrap()), "{said}");
            assert!(said.contains("registry-agent-new"), "{said}");
        }
        let said = apply.apply(&plan, purpose()).await.unwrap_err();
        assert!(matches!(said, ApplyError::Unfinished(_)), "{said}");
        assert_eq!(
            host.docker().jobs.len(),
            jobs,
            "daemons are told of nothing new"
        );
        fs::remove_dir(&in_the_way).unwrap();
        let recovered = apply.recover().await.unwrap();
        assert!(matches!(recovered, Some(Recovered::Undone(_))));
    });
    assert_eq!(host.state(), before);
    assert!(journal(&host).transaction().unwrap().is_none());
}

#[expect(
    clippy::disallowed_methods,
    reason = "what is waited for is another process's"
)]
fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a crash test's child does: it is this test binary again.
#[test]
fn child() {
    let Some(folder) = std::env::var_os(CHILD) else {
        return;
    };
    let host = Host {
        folder: folder.into(),
    };
    let run = std::env::var("PLAN").unwrap();
    if run == "race" {
        println!("{}", race::race(&host));
        return;
    }
    if run == "recover" {
        with(&host, async |apply| apply.recover().await.map(|_| ())).unwrap();
        return;
    }
    let plan = match run.as_str() {
        "wire" => plan(&host, &wired(), &[MIRROR]),
        "fail" => plan(
            &host,
            r#"{"registry-mirrors": ["http://other"]}"#,
            &[MIRROR],
        ),
        _ => way_back(&host),
    };
    let purpose = if run == "back" {
        Purpose::default()
    } else {
        purpose()
    };
    let _ = with(&host, async |apply| apply.apply(&plan, purpose).await);
}

/// Whether the child was killed there.
fn killed(host: &Host, plan: &str, point: &str) -> bool {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--quiet"])
        .env(CHILD, &host.folder)
        .env("PLAN", plan)
        .env(VARIABLE, point)
        .output()
        .unwrap()
        .status;
    assert!(
        status.success() || status.signal() == Some(Signal::SIGKILL as i32),
        "{status}"
    );
    !status.success()
}

#[test]
fn a_crash_at_every_step_ends_exactly_before_or_exactly_after() {
    let mut reached = Vec::new();
    for original in [None, Some("{ \"debug\":true }\n")] {
        for run in ["wire", "fail", "back"] {
            for (point, time) in Failpoint::HOST.iter().flat_map(|p| [(p, 1), (p, 2)]) {
                let point = format!("{}:{time}", point.name());
                let when = format!("{original:?} {run} {point}");
                let folder = tempfile::tempdir().unwrap();
                let host = host(folder.path(), original);
                let unwired = host.state();
                let wire = plan(&host, &wired(), &[MIRROR]);
                if run == "back" {
                    with(&host, async |apply| apply.apply(&wire, purpose()).await).unwrap();
                }
                let before = host.state();
                if !killed(&host, run, &point) {
                    continue;
                }
                reached.push(point.clone());
                let committed =
                    point.starts_with("apply-recorded") || point.starts_with("apply-kept");
                // The next start may be killed as well.
                let again = killed(&host, "recover", "undo-job-done:1");
                let recovered = with(&host, async |apply| apply.recover().await).unwrap();
                match recovered {
                    Some(Recovered::Undone(undone)) => {
                        assert!(undone.problems.is_empty(), "{when}: {undone}");
                        assert!(!committed, "{when}");
                    }
                    Some(Recovered::Finished) => assert!(committed, "{when}"),
                    None => assert!(!again, "{when}: it was killed before it had recovered"),
                }
                let after = host.state();
                match (run, committed) {
                    ("wire", true) => {
                        assert_eq!(fs::read_to_string(host.at(DAEMON_JSON)).unwrap(), wired());
                        assert_eq!(after.1, [format!("{MIRROR}/")], "{when}");
                        assert_eq!(journal(&host).originals().unwrap().files.len(), 2);
                    }
                    ("back", true) => assert_eq!(after, unwired, "{when}"),
                    _ => assert_eq!(after, before, "{when}"),
                }
                assert_eq!(host.docker().main_pid, 100, "{when}: docker was restarted");
                assert!(journal(&host).transaction().unwrap().is_none(), "{when}");
            }
        }
    }
    for point in Failpoint::HOST {
        let point = format!("{}:1", point.name());
        assert!(reached.contains(&point), "no crash at {point}");
    }
}
