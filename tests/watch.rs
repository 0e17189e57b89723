//! The host loop: wired when the mirror serves, unwired before it ends, and no job before READY.
#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use registry_agent::config::Drift;
use registry_agent::host::apply::{Deadlines, System, SystemError};
use registry_agent::host::facts::{FileFacts, UnitFacts};
use registry_agent::host::journal::Journal;
use registry_agent::host::plan::{
    Check, FileChange, Plan, PlanError, Proof, UnitAction, Verb, Wanted,
};
use registry_agent::host::watch::{Host, Order, Probe, State, Terms, Watch, Word};
use registry_agent::host::write;
use tokio::sync::mpsc;

const FILE: &str = "/etc/docker/daemon.json";
const MIRROR: &str = "http://127.0.0.1:5000";

/// What happened, in its order: jobs, and words to the service manager.
struct Fake {
    root: PathBuf,
    happened: Mutex<Vec<String>>,
    words: mpsc::UnboundedSender<String>,
    /// An engine beside docker can't be told that the mirror is withdrawn, and another keeps it.
    broken: bool,
}

impl Fake {
    fn mirrors(&self) -> Vec<String> {
        let content = fs::read_to_string(write::under(&self.root, Path::new(FILE)));
        serde_json::from_str(&content.unwrap_or("[]".to_owned())).unwrap()
    }
}

impl System for Fake {
    async fn run(&self, action: &UnitAction, _: Duration) -> Result<(), SystemError> {
        let mirrors = self.mirrors().join(",");
        let job = format!("{:?} {mirrors}", action.verb);
        self.happened.lock().unwrap().push(job);
        Ok(())
    }

    async fn reset_failed(&self, _: &str) -> Result<(), SystemError> {
        Ok(())
    }

    async fn docker_mirrors(&self, _: &str) -> Result<Vec<String>, SystemError> {
        Ok(self.mirrors())
    }

    async fn unit(&self, _: &str) -> Result<UnitFacts, SystemError> {
        Ok(UnitFacts {
            active_state: "active".to_owned(),
            ..UnitFacts::default()
        })
    }

    async fn check(&self, _: &Check, _: &Path) -> Result<(), SystemError> {
        Ok(())
    }
}

impl Host for Fake {
    type System = Self;

    fn system(&self) -> &Self {
        self
    }

    fn terms(&self) -> Terms {
        Terms {
            mirror: MIRROR.to_owned(),
            withdraw_after: Duration::from_secs(30),
            drift: Drift::Correct,
        }
    }

    fn reload(&self) -> Result<(), String> {
        Ok(())
    }

    async fn plan(&self, wanted: Wanted) -> Result<Plan, String> {
        let mirrors = match wanted {
            Wanted::Wired => vec![MIRROR.to_owned()],
            Wanted::Withdrawn => Vec::new(),
        };
        let before = write::read(&write::under(&self.root, Path::new(FILE))).unwrap();
        let after = FileFacts::Text {
            content: serde_json::to_string(&mirrors).unwrap(),
            mode: 0o644,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            selinux: None,
            link_to: None,
        };
        let unit = "docker.service".to_owned();
        let mut plan = Plan {
            proofs: vec![Proof::DockerMirrors {
                unit: unit.clone(),
                mirrors,
            }],
            ..Plan::default()
        };
        if self.broken && wanted == Wanted::Withdrawn {
            plan.keep_mirror.push("docker-latest.service".to_owned());
            plan.errors.push(PlanError {
                subject: "/etc/other".to_owned(),
                message: "is broken".to_owned(),
            });
        }
        if !write::same(&before, &after) {
            plan.files.push(FileChange {
                path: FILE.into(),
                before,
                after,
                why: "a test".to_owned(),
                check: None,
                units: vec![unit.clone()],
            });
            plan.actions.push(UnitAction {
                unit,
                verb: Verb::Reload,
                why: "a test".to_owned(),
            });
        }
        Ok(plan)
    }

    async fn serves(&self) -> Probe {
        Probe::Serves
    }

    fn tell(&self, word: Word) {
        let word = format!("{word:?}");
        self.happened.lock().unwrap().push(word.clone());
        // The test may have seen enough.
        let _ = self.words.send(word);
    }
}

#[tokio::test]
async fn one_engine_that_can_not_be_told_keeps_no_other_from_being_unwired() {
    let folder = tempfile::tempdir().unwrap();
    let (words, mut said) = mpsc::unbounded_channel();
    let fake = Fake {
        root: folder.path().join("root"),
        happened: Mutex::default(),
        words,
        broken: true,
    };
    fs::create_dir_all(&fake.root).unwrap();
    let journal = Journal::open(&folder.path().join("state")).unwrap();
    let (orders, taken) = mpsc::channel(4);
    let root = fake.root.clone();
    let watch = Watch::new(&fake, &root, &journal, Deadlines::default());
    let test = async {
        while !said.recv().await.unwrap().contains("engines wired to") {}
        orders.send(Order::Stop).await.unwrap();
    };
    let (ended, ()) = tokio::join!(watch.run(taken), test);
    ended.unwrap();
    assert_eq!(fake.mirrors(), [] as [String; 0]);
    let path = write::under(&root, Path::new("/run/registry-agent-host/state.json"));
    let state: State = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    // What is shown is what is true of each.
    assert_eq!(state.mirror, None);
    let kept = "docker-latest keeps the mirror, which only a restart takes away";
    assert!(state.summary.contains(kept), "{}", state.summary);
    let others = format!("other engines not wired: they pull without the mirror; {kept}");
    assert!(state.line.contains(&others), "{}", state.line);
    let failure = state.last_apply.unwrap().failure;
    assert_eq!(failure.as_deref(), Some("/etc/other: is broken"));
}

#[tokio::test]
async fn the_file_is_there_before_ready_jobs_come_after_it_and_the_end_unwires() {
    let folder = tempfile::tempdir().unwrap();
    let (words, mut said) = mpsc::unbounded_channel();
    let fake = Fake {
        root: folder.path().join("root"),
        happened: Mutex::default(),
        words,
        broken: false,
    };
    fs::create_dir_all(&fake.root).unwrap();
    let journal = Journal::open(&folder.path().join("state")).unwrap();
    let (orders, taken) = mpsc::channel(4);
    let root = fake.root.clone();
    let watch = Watch::new(&fake, &root, &journal, Deadlines::default());
    let test = async {
        while said.recv().await.unwrap() != "Ready" {}
        assert_eq!(fake.mirrors(), [MIRROR]);
        while !said.recv().await.unwrap().contains("engines wired to") {}
        orders.send(Order::Stop).await.unwrap();
    };
    let (ended, ()) = tokio::join!(watch.run(taken), test);
    ended.unwrap();
    assert_eq!(fake.mirrors(), [] as [String; 0]);
    let path = write::under(&root, Path::new("/run/registry-agent-host/state.json"));
    let state: State = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!(state.mirror, None);
    assert_eq!(state.last_apply.unwrap().failure, None);
    let happened = fake.happened.lock().unwrap();
    let of = |what: &str| happened.iter().position(|thing| thing == what);
    let (ready, wired) = (
        of("Ready").unwrap(),
        of(&format!("Reload {MIRROR}")).unwrap(),
    );
    let (stopping, unwired) = (of("Stopping").unwrap(), of("Reload ").unwrap());
    assert!(
        ready < wired && wired < stopping && stopping < unwired,
        "{happened:?}"
    );
    assert_eq!(journal.previous_mirrors().unwrap().len(), 1);
    assert!(journal.transaction().unwrap().is_none());
}
