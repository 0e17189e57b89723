//! The host loop: wired when the mirror serves, unwired before it ends, and no job before READY.
#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use registry_agent::config::Drift;
use registry_agent::host::apply::{Deadlines, System, SystemError};
use registry_agent::host::facts::{FileFacts, UnitFacts};
use registry_agent::host::journal::{Change, Journal, Transaction};
use registry_agent::host::plan::{
    Check, FileChange, Plan, PlanError, Proof, UnitAction, Verb, Wanted,
};
use registry_agent::host::watch::{Host, Order, Probe, State, StopLimits, Terms, Watch, Word};
use registry_agent::host::write;
use tokio::sync::mpsc;

const FILE: &str = "/etc/docker/daemon.json";
/// What nobody can read.
const BROKEN: &str = "{";
const MIRROR: &str = "http://127.0.0.1:5000";
/// Longer than anything here takes, and shorter than the loop's look at everything once a minute.
const PATIENCE: Duration = Duration::from_secs(20);

/// What happened, in its order: jobs, and words to the service manager.
struct Fake {
    root: PathBuf,
    happened: Mutex<Vec<String>>,
    words: mpsc::UnboundedSender<String>,
    /// An engine beside docker can't be told that the mirror is withdrawn, and another keeps it.
    broken: bool,
    docker: Mutex<Docker>,
}

/// What becomes of the daemon.
#[derive(Clone)]
struct Docker {
    state: &'static str,
    has_job: bool,
    /// How often the unit was looked at.
    looks: u32,
    /// Its jobs never end.
    hangs: bool,
    /// It does not take its new file, and from then on the file can't be put back.
    refuses: bool,
    /// What it says that it has, whatever its file says: it hangs.
    hung: Option<Vec<String>>,
    /// What is done about the changes of others.
    drift: Drift,
    /// What is wrong with the configuration when it is read again.
    misconfigured: Option<String>,
}

impl Fake {
    fn new(folder: &Path) -> (Self, mpsc::UnboundedReceiver<String>) {
        let (words, said) = mpsc::unbounded_channel();
        let root = folder.join("root");
        fs::create_dir_all(root.join("etc/docker")).unwrap();
        let docker = Docker {
            state: "active",
            has_job: false,
            looks: 0,
            hangs: false,
            refuses: false,
            hung: None,
            drift: Drift::Correct,
            misconfigured: None,
        };
        let fake = Self {
            root,
            happened: Mutex::default(),
            words,
            broken: false,
            docker: Mutex::new(docker),
        };
        (fake, said)
    }

    fn docker(&self) -> MutexGuard<'_, Docker> {
        self.docker.lock().unwrap()
    }

    fn file(&self) -> PathBuf {
        write::under(&self.root, Path::new(FILE))
    }

    /// Where the file is written before it has its name: a folder there is in the way, as a disk that
    /// takes no changes is.
    fn in_the_way(&self) -> PathBuf {
        self.root.join("etc/docker/.daemon.json.registry-agent-new")
    }

    fn mirrors(&self) -> Vec<String> {
        let content = fs::read_to_string(self.file());
        serde_json::from_str(&content.unwrap_or("[]".to_owned())).unwrap()
    }

    fn state(&self) -> State {
        let path = write::under(&self.root, Path::new("/run/registry-agent-host/state.json"));
        let state = fs::read(path).unwrap_or_default();
        serde_json::from_slice(&state).unwrap_or_default()
    }

    fn happened(&self) -> Vec<String> {
        self.happened.lock().unwrap().clone()
    }

    /// Waits until the loop's state is so.
    async fn until(&self, what: &str, holds: impl Fn(&State) -> bool) -> State {
        let end = Instant::now() + PATIENCE;
        loop {
            let state = self.state();
            if holds(&state) {
                return state;
            }
            assert!(Instant::now() < end, "not {what}: {state:#?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl System for Fake {
    async fn run(&self, action: &UnitAction, _: Duration) -> Result<(), SystemError> {
        let mirrors = self.mirrors().join(",");
        let job = format!("{:?} {mirrors}", action.verb);
        self.happened.lock().unwrap().push(job);
        let Docker { hangs, refuses, .. } = *self.docker();
        if refuses {
            let _ = fs::create_dir(self.in_the_way());
        }
        if hangs {
            // Whatever deadline it was given.
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn reset_failed(&self, _: &str) -> Result<(), SystemError> {
        Ok(())
    }

    async fn docker_mirrors(&self, _: &str) -> Result<Vec<String>, SystemError> {
        if self.docker().refuses {
            return Ok(vec!["http://other".to_owned()]);
        }
        let hung = self.docker().hung.clone();
        Ok(hung.unwrap_or_else(|| self.mirrors()))
    }

    async fn unit(&self, _: &str) -> Result<UnitFacts, SystemError> {
        let mut docker = self.docker();
        docker.looks += 1;
        Ok(UnitFacts {
            active_state: docker.state.to_owned(),
            has_job: docker.has_job,
            unit_file_state: "enabled".to_owned(),
            ..UnitFacts::default()
        })
    }

    async fn is_shutting_down(&self) -> bool {
        false
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
            drift: self.docker().drift,
        }
    }

    fn reload(&self) -> Result<(), String> {
        self.docker().misconfigured.clone().map_or(Ok(()), Err)
    }

    async fn look(&self, wanted: Wanted) -> Result<(Plan, Vec<PathBuf>), String> {
        let mirrors = match wanted {
            Wanted::Wired => vec![MIRROR.to_owned()],
            Wanted::Withdrawn => Vec::new(),
        };
        let before = write::read(&write::under(&self.root, Path::new(FILE))).unwrap();
        if matches!(&before, FileFacts::Text { content, .. } if content == BROKEN) {
            return Err(format!("{FILE} is no JSON"));
        }
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
        Ok((plan, vec![FILE.into()]))
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

/// What a loop is run with besides its host.
struct Loop {
    folder: tempfile::TempDir,
    journal: Journal,
    deadlines: Deadlines,
    limits: StopLimits,
}

impl Loop {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("state")).unwrap();
        Self {
            folder,
            journal,
            deadlines: Deadlines {
                job: Duration::from_secs(5),
                proof: Duration::from_millis(100),
            },
            limits: StopLimits::default(),
        }
    }

    /// Runs the loop beside the test, which tells it when to end.
    async fn run(&self, fake: &Fake, test: impl AsyncFnOnce(mpsc::Sender<Order>)) {
        let (orders, taken) = mpsc::channel(4);
        let watch = Watch::new(fake, &fake.root, &self.journal, self.deadlines)
            .stopping_within(self.limits);
        tokio::join!(watch.run(taken), test(orders));
    }

    /// A change that was cut off: the file is ours, and was not there.
    fn leave_unfinished(&self, fake: &Fake) {
        let ours = text("[\"http://cut.off\"]");
        write::put(&fake.file(), &ours).unwrap();
        let transaction = Transaction {
            told: false,
            proved: false,
            files: vec![Change {
                path: FILE.into(),
                before: FileFacts::Absent,
                after: ours,
                units: Vec::new(),
            }],
            folders: Vec::new(),
            actions: Vec::new(),
            proofs: Vec::new(),
            units: BTreeMap::new(),
            mirror: None,
            forgotten: BTreeSet::new(),
        };
        self.journal.record(&transaction).unwrap();
    }
}

fn text(content: &str) -> FileFacts {
    FileFacts::Text {
        content: content.to_owned(),
        mode: 0o644,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        selinux: None,
        link_to: None,
    }
}

fn is_wired(state: &State) -> bool {
    state.mirror.as_deref() == Some(MIRROR)
}

#[tokio::test]
async fn one_engine_that_can_not_be_told_keeps_no_other_from_being_unwired() {
    let it = Loop::new();
    let (mut fake, mut said) = Fake::new(it.folder.path());
    fake.broken = true;
    it.run(&fake, async |orders| {
        while !said.recv().await.unwrap().contains("engines wired to") {}
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
    assert_eq!(fake.mirrors(), [] as [String; 0]);
    let state = fake.state();
    // What is shown is what is true of each.
    assert_eq!(state.mirror, None);
    let kept = "docker-latest keeps the mirror, which only a restart takes away";
    assert!(state.summary.contains(kept), "{}", state.summary);
    let others = format!("not all engines are proved to do without the mirror; {kept}");
    assert!(state.line.contains(&others), "{}", state.line);
    let failure = state.last_apply.unwrap().failure;
    assert_eq!(failure.as_deref(), Some("/etc/other: is broken"));
}

#[tokio::test]
async fn the_file_is_there_before_ready_jobs_come_after_it_and_the_end_unwires() {
    let it = Loop::new();
    let (fake, mut said) = Fake::new(it.folder.path());
    it.run(&fake, async |orders| {
        while said.recv().await.unwrap() != "Ready" {}
        assert_eq!(fake.mirrors(), [MIRROR]);
        while !said.recv().await.unwrap().contains("engines wired to") {}
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
    assert_eq!(fake.mirrors(), [] as [String; 0]);
    let state = fake.state();
    assert_eq!(state.mirror, None);
    assert_eq!(state.last_apply.unwrap().failure, None);
    let happened = fake.happened();
    let of = |what: &str| happened.iter().position(|thing| thing == what);
    let (ready, wired) = (
        of("Ready").unwrap(),
        of(&format!("Reload {MIRROR}")).unwrap(),
    );
    let (stopping, unwired) = (of("Stopping(60s)").unwrap(), of("Reload ").unwrap());
    assert!(
        ready < wired && wired < stopping && stopping < unwired,
        "{happened:?}"
    );
    assert_eq!(it.journal.previous_mirrors().unwrap().len(), 1);
    assert!(it.journal.transaction().unwrap().is_none());
}

#[tokio::test]
async fn what_an_earlier_run_left_is_taken_back_as_soon_as_it_can_be() {
    let it = Loop::new();
    let (fake, mut said) = Fake::new(it.folder.path());
    it.leave_unfinished(&fake);
    fs::create_dir(fake.in_the_way()).unwrap();
    it.run(&fake, async |orders| {
        while said.recv().await.unwrap() != "Ready" {}
        let state = fake.until("blocked", |state| state.blocked.is_some()).await;
        let why = state.blocked.clone().unwrap();
        let transaction = it.journal.transaction_file();
        assert!(why.contains(transaction.to_str().unwrap()), "{why}");
        assert!(why.contains(".daemon.json.registry-agent-new"), "{why}");
        assert!(state.line.contains("nothing can be changed"), "{state:#?}");
        assert!(
            state.summary.contains("nothing can be changed"),
            "{state:#?}"
        );
        assert!(state.next_step.unwrap().contains("tried again"));
        assert_eq!(fake.mirrors(), ["http://cut.off"]);

        // By itself, with nobody to tell it.
        fs::remove_dir(fake.in_the_way()).unwrap();
        let state = fake.until("wired", is_wired).await;
        assert_eq!((state.blocked, state.next_step), (None, None));
        assert!(it.journal.transaction().unwrap().is_none());
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
    assert_eq!(fake.mirrors(), [] as [String; 0]);
}

#[tokio::test]
async fn what_could_not_be_taken_back_does_not_keep_the_stop_from_unwiring() {
    let it = Loop::new();
    let (fake, _said) = Fake::new(it.folder.path());
    write::put(&fake.file(), &text("[\"http://own\"]")).unwrap();
    fake.docker().refuses = true;
    it.run(&fake, async |orders| {
        fake.until("blocked", |state| state.blocked.is_some()).await;
        assert_eq!(fake.mirrors(), [MIRROR], "it could not be put back");
        assert!(it.journal.transaction().unwrap().is_some());
        fake.docker().refuses = false;
        fs::remove_dir(fake.in_the_way()).unwrap();
        // However long it would have waited.
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
    assert_eq!(fake.mirrors(), [] as [String; 0]);
    assert!(it.journal.transaction().unwrap().is_none());
    let state = fake.state();
    assert_eq!(state.last_apply.unwrap().failure, None);
    assert_eq!(state.blocked, None);
}

#[tokio::test]
async fn a_journal_that_nobody_understands_is_named_and_the_loop_goes_on() {
    let it = Loop::new();
    let (fake, mut said) = Fake::new(it.folder.path());
    let transaction = it.journal.transaction_file();
    write::put(&transaction, &text("{\"version\": 1, \"jour")).unwrap();
    it.run(&fake, async |orders| {
        while said.recv().await.unwrap() != "Ready" {}
        let state = fake.until("blocked", |state| state.blocked.is_some()).await;
        let why = state.blocked.unwrap();
        assert!(why.contains(transaction.to_str().unwrap()), "{why}");
        assert!(why.contains("move it away"), "{why}");
        assert_eq!(fake.mirrors(), [] as [String; 0]);
        assert!(!fake.happened().iter().any(|it| it.starts_with("Reload")));

        fs::rename(&transaction, it.folder.path().join("kept")).unwrap();
        orders.send(Order::Reload).await.unwrap();
        let state = fake.until("wired", is_wired).await;
        assert_eq!(state.blocked, None);
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
    assert_eq!(fake.mirrors(), [] as [String; 0]);
}

#[tokio::test]
async fn a_stop_takes_as_long_as_it_may_and_the_next_start_ends_what_is_left() {
    let mut it = Loop::new();
    it.limits = StopLimits {
        grace: Duration::from_millis(50),
        unwire: Duration::from_millis(200),
    };
    let (fake, _said) = Fake::new(it.folder.path());
    fake.docker().hangs = true;
    let stopped = it.run(&fake, async |orders| {
        // In the midst of wiring.
        while !fake.happened().iter().any(|it| it.starts_with("Reload")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        orders.send(Order::Stop).await.unwrap();
    });
    // Jobs alone would take longer.
    let stopped = tokio::time::timeout(Duration::from_secs(3), stopped);
    stopped.await.expect("it stops in its time");
    let failure = fake.state().last_apply.unwrap().failure.unwrap();
    assert!(failure.contains("within 200ms"), "{failure}");
    let transaction = it.journal.transaction_file();
    assert!(failure.contains(transaction.to_str().unwrap()), "{failure}");
    assert!(it.journal.transaction().unwrap().is_some());

    fake.docker().hangs = false;
    it.limits = StopLimits::default();
    it.run(&fake, async |orders| {
        fake.until("wired", is_wired).await;
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
    assert_eq!(fake.mirrors(), [] as [String; 0]);
    assert!(it.journal.transaction().unwrap().is_none());
}

#[tokio::test]
async fn a_docker_that_was_stopped_is_not_waited_for_and_one_that_is_to_start_is() {
    for has_job in [false, true] {
        let it = Loop::new();
        let (fake, mut said) = Fake::new(it.folder.path());
        {
            let mut docker = fake.docker();
            (docker.state, docker.has_job) = ("inactive", has_job);
        }
        it.run(&fake, async |orders| {
            while said.recv().await.unwrap() != "Ready" {}
            if has_job {
                let looks = fake.docker().looks;
                while fake.docker().looks < looks + 3 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                assert_eq!(fake.state().last_apply, None);
                fake.docker().state = "active";
            }
            let state = fake.until("wired", is_wired).await;
            assert_eq!(state.last_apply.unwrap().failure, None);
            orders.send(Order::Stop).await.unwrap();
        })
        .await;
    }
}

#[tokio::test]
async fn a_file_that_was_right_before_us_is_looked_after_like_one_of_ours() {
    let it = Loop::new();
    let (fake, _said) = Fake::new(it.folder.path());
    write::put(&fake.file(), &text(&format!("[\"{MIRROR}\"]"))).unwrap();
    it.run(&fake, async |orders| {
        fake.until("wired", is_wired).await;
        assert!(it.journal.originals().unwrap().files.is_empty());
        // Once it is seen, and not again a minute later.
        let changed = Instant::now();
        write::put(&fake.file(), &text("[\"http://theirs\"]")).unwrap();
        while fake.mirrors() != [MIRROR] {
            assert!(changed.elapsed() < PATIENCE, "{:#?}", fake.state());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn what_is_left_to_others_stays_theirs_across_a_restart_until_they_put_it_back() {
    let it = Loop::new();
    let (fake, _said) = Fake::new(it.folder.path());
    fake.docker().drift = Drift::Report;
    let theirs = ["http://theirs".to_owned()];
    it.run(&fake, async |orders| {
        fake.until("wired", is_wired).await;
        write::put(&fake.file(), &text("[\"http://theirs\"]")).unwrap();
        fake.until("left", |state| {
            let drift = state.drift.as_deref();
            drift.is_some_and(|drift| drift.contains("host.drift is report"))
        })
        .await;
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
    // What the end has taken out of it is known too.
    for _ in 0..2 {
        let left = fake.mirrors();
        it.run(&fake, async |orders| {
            let state = fake
                .until("left again", |state| {
                    let drift = state.drift.as_deref();
                    drift.is_some_and(|drift| drift.contains("host.drift is report"))
                })
                .await;
            assert!(!state.line.contains("wired to"), "{}", state.line);
            assert_eq!(fake.mirrors(), left);
            orders.send(Order::Stop).await.unwrap();
        })
        .await;
        assert_ne!(fake.mirrors(), [MIRROR]);
    }
    // Another policy, another start.
    fake.docker().drift = Drift::Correct;
    write::put(&fake.file(), &text(&format!("{theirs:?}"))).unwrap();
    it.run(&fake, async |orders| {
        fake.until("wired", is_wired).await;
        assert_eq!(fake.mirrors(), [MIRROR]);
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_docker_that_hangs_keeps_a_file_without_the_mirror() {
    let it = Loop::new();
    let (fake, _said) = Fake::new(it.folder.path());
    it.run(&fake, async |orders| {
        fake.until("wired", is_wired).await;
        fake.docker().hung = Some(vec![MIRROR.to_owned()]);
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
    assert_eq!(fake.mirrors(), [] as [String; 0]);
    assert!(it.journal.transaction().unwrap().is_none());
    let state = fake.state();
    let failure = state.last_apply.unwrap().failure.unwrap();
    assert!(failure.contains("stay so"), "{failure}");
    assert!(!state.line.contains("pull without"), "{}", state.line);
    let said = "not all engines are proved to do without the mirror";
    assert!(state.line.starts_with(said), "{}", state.line);
    assert!(state.summary.contains(said), "{}", state.summary);
}

#[tokio::test]
async fn a_file_that_somebody_breaks_is_said_at_once_and_forgotten_when_it_is_right() {
    let it = Loop::new();
    let (fake, _said) = Fake::new(it.folder.path());
    it.run(&fake, async |orders| {
        fake.until("wired", is_wired).await;
        write::put(&fake.file(), &text(BROKEN)).unwrap();
        let state = fake.until("said", |state| state.drift.is_some()).await;
        let drift = state.drift.unwrap();
        let said = format!("changed by somebody else, and not to be read: {FILE} is no JSON");
        assert_eq!(drift, said);
        assert!(state.line.contains(&drift), "{}", state.line);
        write::put(&fake.file(), &text(&format!("[\"{MIRROR}\"]"))).unwrap();
        fake.until("right again", |state| state.drift.is_none())
            .await;
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_broken_configuration_is_said_and_changes_nothing() {
    let it = Loop::new();
    let (fake, _said) = Fake::new(it.folder.path());
    fake.docker().drift = Drift::Report;
    it.run(&fake, async |orders| {
        fake.until("wired", is_wired).await;
        write::put(&fake.file(), &text("[\"http://theirs\"]")).unwrap();
        fake.until("left", |state| state.drift.is_some()).await;
        fake.docker().misconfigured = Some("config.yaml: line 3".to_owned());
        orders.send(Order::Reload).await.unwrap();
        let state = fake
            .until("said", |state| state.configuration.is_some())
            .await;
        assert!(state.line.contains("config.yaml: line 3"), "{}", state.line);
        // The next turn would write.
        fake.docker().looks = 0;
        write::put(&fake.file(), &text("[\"http://others\"]")).unwrap();
        while fake.docker().looks == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(fake.mirrors(), ["http://others"]);

        fake.docker().misconfigured = None;
        orders.send(Order::Reload).await.unwrap();
        let state = fake
            .until("wired", |state| state.drift.is_none() && is_wired(state))
            .await;
        assert_eq!(state.configuration, None);
        assert_eq!(fake.mirrors(), [MIRROR]);
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
}

/// Needs root, for a disk of its own.
#[tokio::test]
async fn a_full_disk_does_not_keep_the_mirror_from_being_taken_away() {
    let it = Loop::new();
    let disk = support::disk::Disk::mount(it.journal.folder(), 8 * 1024 * 1024);
    let (fake, _said) = Fake::new(it.folder.path());
    it.run(&fake, async |orders| {
        fake.until("wired", is_wired).await;
        disk.fill();
        let more = write::put(&it.journal.folder().join("more"), &text("more"));
        assert!(more.is_err(), "it is full");
        orders.send(Order::Stop).await.unwrap();
    })
    .await;
    assert_eq!(fake.mirrors(), [] as [String; 0]);
    let failure = fake.state().last_apply.unwrap().failure;
    assert_eq!(failure, None);
}
