//! The way back: from files that somebody else has changed only what is ours is taken, and one that
//! can't be taken back keeps no other.
#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use registry_agent::host::apply::{Apply, Deadlines, Partly, Purpose, System, SystemError};
use registry_agent::host::facts::{FileFacts, UnitFacts};
use registry_agent::host::journal::{Journal, Original, Originals, UnitBefore};
use registry_agent::host::plan::{
    Check, Daemon, FileChange, Plan, Proof, TakenFrom, UnitAction, Verb, take_back,
};
use registry_agent::host::{rollback, write};

const MIRROR: &str = "http://127.0.0.1:5000";
const DAEMON_JSON: &str = "/etc/docker/daemon.json";
const SYSCONFIG: &str = "/etc/sysconfig/docker";
const HOSTS_TOML: &str = "/etc/containerd/certs.d/docker.io/hosts.toml";
const CONTAINERD: &str = "/etc/containerd/config.toml";
const DROP_IN: &str = "/etc/containers/registries.conf.d/50-registry-agent.conf";
const BUILDKIT: &str = "/etc/buildkit/buildkitd.toml";
const CA: &str = "/etc/docker/certs.d/127.0.0.1:5000/ca.crt";
const MARKER: &str = "# Written by registry-agent, which puts changes back: edit its \
                      configuration instead.";

/// A file with this in it; none where there is none.
fn file(content: Option<&str>) -> FileFacts {
    content.map_or(FileFacts::Absent, |content| FileFacts::Text {
        content: content.to_owned(),
        mode: 0o644,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        selinux: None,
        link_to: None,
    })
}

fn content(facts: &FileFacts) -> Option<&str> {
    match facts {
        FileFacts::Absent => None,
        FileFacts::Text { content, .. } => Some(content),
        FileFacts::Unreadable(why) => panic!("{why}"),
    }
}

fn originals(files: &[(&str, Option<&str>, &str)]) -> Originals {
    let verbs = |path: &str| match path {
        DAEMON_JSON => BTreeMap::from([("docker.service".to_owned(), Verb::Reload)]),
        SYSCONFIG => BTreeMap::from([("docker.service".to_owned(), Verb::Restart)]),
        _ => BTreeMap::new(),
    };
    Originals {
        files: files
            .iter()
            .map(|&(path, before, made)| {
                let original = Original {
                    before: file(before),
                    made: file(Some(made)),
                    edited: false,
                    verbs: verbs(path),
                };
                (path.into(), original)
            })
            .collect(),
        mirrors: [MIRROR.to_owned()].into(),
        ..Originals::default()
    }
}

/// The way back of a host whose files are these now, and whose docker has these mirrors.
fn back(originals: &Originals, now: &[(&str, Option<&str>)], live: &[&str]) -> Plan {
    back_with(originals, now, has(live), true)
}

fn has(live: &[&str]) -> Daemon {
    Daemon::Has(live.iter().map(|&one| one.to_owned()).collect())
}

fn back_with(
    originals: &Originals,
    now: &[(&str, Option<&str>)],
    docker: Daemon,
    restart: bool,
) -> Plan {
    let now = now.iter().map(|&(path, now)| (path.into(), file(now)));
    take_back(TakenFrom {
        originals,
        now: &now.collect(),
        daemons: &[("docker.service".to_owned(), docker)].into(),
        restart,
    })
}

/// A file before us, as we made it, as somebody else has changed it, and as it has to be left.
type Case = (
    &'static str,
    Option<&'static str>,
    String,
    String,
    Option<String>,
);

fn hosts_toml(others: &str) -> String {
    format!(
        "{MARKER}\nserver = \"https://registry-1.docker.io\"\n\n[host.\"{MIRROR}\"]\n\
         capabilities = [\"pull\", \"resolve\"]\ndial_timeout = \"1s\"\n{others}"
    )
}

fn drop_in(mirrors: &str, others: &str) -> String {
    format!(
        "{MARKER}\n\n[[registry]]\nprefix = \"docker.io\"\nlocation = \"docker.io\"\n{mirrors}{others}"
    )
}

fn cases() -> Vec<Case> {
    let ours = "\n[[registry.mirror]]\nlocation = \"127.0.0.1:5000\"\ninsecure = true\n";
    let theirs = "\n[[registry.mirror]]\nlocation = \"theirs:5000\"\n";
    let other = "\n[[registry]]\nprefix = \"quay.io\"\nlocation = \"quay.example\"\n";
    let certificate =
        |name: &str| format!("-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n");
    let their_host = "\n[host.\"http://theirs\"]\ncapabilities = [\"pull\"]\n";
    let text = str::to_owned;
    vec![
        (
            DAEMON_JSON,
            None,
            format!(r#"{{"registry-mirrors": ["{MIRROR}"]}}"#),
            format!(r#"{{"registry-mirrors": ["{MIRROR}", "http://theirs"], "debug": true}}"#),
            Some(text(
                r#"{"registry-mirrors": ["http://theirs"], "debug": true}"#,
            )),
        ),
        // docker keeps what it has where the key is gone: the list stays, empty.
        (
            DAEMON_JSON,
            Some("{}"),
            format!(r#"{{"registry-mirrors": ["{MIRROR}"], "insecure-registries": ["l:5000"]}}"#),
            format!(
                r#"{{"registry-mirrors": ["{MIRROR}/"], "insecure-registries": ["l:5000","t"]}}"#
            ),
            Some(text(
                r#"{"registry-mirrors": [], "insecure-registries": ["t"]}"#,
            )),
        ),
        // What they had before we came is theirs.
        (
            DAEMON_JSON,
            Some(r#"{"registry-mirrors": ["http://a", "http://127.0.0.1:5000"]}"#),
            format!(r#"{{"registry-mirrors": ["{MIRROR}", "http://a"]}}"#),
            format!(r#"{{"registry-mirrors": ["{MIRROR}", "http://a"], "debug": true}}"#),
            Some(format!(
                r#"{{"registry-mirrors": ["{MIRROR}", "http://a"], "debug": true}}"#
            )),
        ),
        (
            SYSCONFIG,
            Some("OPTIONS='--registry-mirror=http://old'\n"),
            format!("OPTIONS='--registry-mirror={MIRROR} --registry-mirror=http://old'\n"),
            format!("OPTIONS='--debug --registry-mirror={MIRROR} --registry-mirror=http://old'\n"),
            Some(text("OPTIONS='--debug --registry-mirror=http://old'\n")),
        ),
        (
            HOSTS_TOML,
            None,
            hosts_toml(""),
            hosts_toml(their_host),
            Some(format!(
                "server = \"https://registry-1.docker.io\"\n{their_host}"
            )),
        ),
        (
            HOSTS_TOML,
            None,
            hosts_toml(""),
            hosts_toml("# a remark\n"),
            None,
        ),
        // They have written it anew.
        (
            HOSTS_TOML,
            None,
            hosts_toml(""),
            format!("[host.\"{MIRROR}\"]\n{their_host}"),
            Some(text(their_host)),
        ),
        (
            CONTAINERD,
            Some("version = 2\n"),
            text(
                "version = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n\
                 config_path = \"/etc/containerd/certs.d\"\n",
            ),
            text(
                "version = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n\
                 config_path = \"/etc/containerd/certs.d\"\n\n[debug]\nlevel = \"debug\"\n",
            ),
            Some(text("version = 2\n\n[debug]\nlevel = \"debug\"\n")),
        ),
        (
            DROP_IN,
            None,
            drop_in(ours, ""),
            drop_in(&format!("{theirs}{ours}"), other),
            Some(format!(
                "[[registry]]\nprefix = \"docker.io\"\nlocation = \"docker.io\"\n{theirs}{other}"
            )),
        ),
        (
            DROP_IN,
            None,
            drop_in(ours, ""),
            drop_in(ours, other),
            Some(text(other.trim_start())),
        ),
        (
            DROP_IN,
            None,
            drop_in(ours, ""),
            drop_in(ours, "# a remark\n"),
            None,
        ),
        (
            BUILDKIT,
            Some("debug = false\n"),
            text(
                "debug = false\n\n[registry.\"docker.io\"]\nmirrors = [\"127.0.0.1:5000\"]\n\n\
                 [registry.\"127.0.0.1:5000\"]\nhttp = true\n",
            ),
            text(
                "debug = true\n\n[registry.\"docker.io\"]\nmirrors = [\"127.0.0.1:5000\"]\n\n\
                 [registry.\"127.0.0.1:5000\"]\nhttp = true\n\n[registry.\"quay.io\"]\n\
                 mirrors = [\"theirs\"]\n",
            ),
            Some(text(
                "debug = true\n\n[registry.\"quay.io\"]\nmirrors = [\"theirs\"]\n",
            )),
        ),
        (
            CA,
            None,
            certificate("ours"),
            certificate("theirs") + &certificate("ours"),
            Some(certificate("theirs")),
        ),
        (
            CA,
            None,
            certificate("ours"),
            certificate("theirs"),
            Some(certificate("theirs")),
        ),
        (
            "/etc/hosts",
            Some("127.0.0.1 localhost\n"),
            text("127.0.0.1 localhost\n127.0.0.1 here.example # registry-agent\n"),
            text("10.0.0.1 more\n127.0.0.1 here.example # registry-agent\n127.0.0.1 localhost\n"),
            Some(text("10.0.0.1 more\n127.0.0.1 localhost\n")),
        ),
    ]
}

#[test]
fn what_others_wrote_stays_and_what_is_ours_goes() {
    for (path, before, made, now, left) in cases() {
        let mut originals = originals(&[(path, before, &made)]);
        // Nobody has touched it: it is what it was.
        let plan = back(&originals, &[(path, Some(&made))], &[MIRROR]);
        assert_eq!(content(&plan.files[0].after), before, "{path}");

        let plan = back(&originals, &[(path, Some(&now))], &[MIRROR]);
        assert_eq!(plan.refusals, [], "{path}");
        let after = plan.files.first().map_or(Some(now.as_str()), |change| {
            assert_eq!(content(&change.before), Some(now.as_str()));
            content(&change.after)
        });
        assert_eq!(after, left.as_deref(), "{path}: {now}");
        assert!(plan.notes[0].contains("somebody else"), "{plan:?}");
        assert!(plan.forgotten.contains(Path::new(path)), "{plan:?}");

        // Once more, there is nothing.
        originals.files.get_mut(Path::new(path)).unwrap().edited = true;
        let again = back(&originals, &[(path, left.as_deref())], &[]);
        assert_eq!(again.files, [], "{path}");
    }
}

#[test]
fn docker_is_to_have_what_the_restored_file_says() {
    let wired = format!(r#"{{"registry-mirrors": ["{MIRROR}"]}}"#);
    for (before, remembered, expected) in [
        // Its memory was another when it was first wired: somebody had not reloaded it.
        (
            Some(r#"{"registry-mirrors": ["http://file", "http://file/"]}"#),
            Some(&["http://memory/"][..]),
            &["http://file", "http://file/"][..],
        ),
        (
            Some(r#"{"registry-mirrors": []}"#),
            Some(&["http://m/"]),
            &[],
        ),
        // A key that is not there leaves it what it has, which is to be what it had.
        (Some("{}"), Some(&["http://memory/"]), &["http://memory/"]),
        (
            None,
            Some(&["http://127.0.0.1:5000/", "http://m/"]),
            &["http://m/"],
        ),
        (None, None, &[]),
    ] {
        let mut originals = originals(&[(DAEMON_JSON, before, &wired)]);
        let unit = UnitBefore {
            mirrors: remembered.map(|list| list.iter().map(|&one| one.to_owned()).collect()),
            ..UnitBefore::default()
        };
        originals.units.insert("docker.service".to_owned(), unit);
        let plan = back(&originals, &[(DAEMON_JSON, Some(&wired))], &[]);
        let mirrors = expected.iter().map(|&one| one.to_owned()).collect();
        let unit = "docker.service".to_owned();
        assert_eq!(
            plan.proofs,
            [Proof::DockerMirrors { unit, mirrors }],
            "{before:?}"
        );
    }
}

#[test]
fn a_mirror_that_only_docker_remembers_is_taken_from_it() {
    let wired = format!(r#"{{"registry-mirrors": ["{MIRROR}"]}}"#);
    let originals = originals(&[(DAEMON_JSON, None, &wired)]);
    let now = &[(DAEMON_JSON, Some(r#"{"debug": true}"#))];
    assert_eq!(back(&originals, now, &["http://theirs/"]).files, []);
    let plan = back(&originals, now, &["http://127.0.0.1:5000/"]);
    assert_eq!(
        content(&plan.files[0].after),
        Some(r#"{"debug": true,"registry-mirrors": []}"#)
    );
}

#[test]
fn what_is_not_safe_is_said_and_not_forgotten() {
    let wired = format!(r#"{{"registry-mirrors": ["{MIRROR}"]}}"#);
    let toml = hosts_toml("");
    let originals = originals(&[(DAEMON_JSON, None, &wired), (HOSTS_TOML, None, &toml)]);
    let broken = format!("{wired} // ours");
    let now = [
        (DAEMON_JSON, Some(broken.as_str())),
        (HOSTS_TOML, Some(&toml)),
    ];
    let plan = back(&originals, &now, &[]);
    assert_eq!(plan.refusals[0].subject, DAEMON_JSON);
    assert!(plan.refusals[0].why.contains("line 1"), "{plan:?}");
    assert!(plan.refusals[0].remedy.contains(MIRROR), "{plan:?}");
    assert!(!plan.forgotten.contains(Path::new(DAEMON_JSON)));
    // The other one goes all the same.
    assert_eq!(plan.files[0].path, Path::new(HOSTS_TOML));
    // Without the mirror in it, it is no business of ours.
    let now = [
        (DAEMON_JSON, Some("{ // theirs")),
        (HOSTS_TOML, Some(&toml)),
    ];
    let plan = back(&originals, &now, &[]);
    assert_eq!((plan.refusals.len(), plan.forgotten.len()), (0, 2));
}

#[test]
fn a_file_is_not_done_with_while_its_docker_has_the_mirror() {
    let wired = format!(r#"{{"registry-mirrors": ["{MIRROR}"]}}"#);
    for (before, now) in [
        // Somebody has taken it away, or has put back what was there, and told nobody.
        (None, None),
        (Some("{}"), Some("{}")),
        (Some("{}"), None),
        (None, Some(r#"{"registry-mirrors": []}"#)),
    ] {
        let originals = originals(&[(DAEMON_JSON, before, &wired)]);
        let files = &[(DAEMON_JSON, now)];
        let plan = back(&originals, files, &["http://127.0.0.1:5000/"]);
        assert_eq!(plan.files.len(), 1, "{before:?} {now:?}: {plan:?}");
        assert_eq!(content(&plan.files[0].after), now, "{before:?} {now:?}");
        let unit = "docker.service".to_owned();
        let mirrors = Vec::new();
        assert_eq!(plan.proofs, [Proof::DockerMirrors { unit, mirrors }]);
        assert_eq!(plan.actions[0].verb, Verb::Reload);
        let parts = plan.split();
        let with_it = parts.iter().find(|part| !part.forgotten.is_empty());
        assert_eq!(
            with_it.unwrap().proofs,
            plan.proofs,
            "not before it is proved"
        );

        // One that does not say is not taken for one that has none.
        let plan = back_with(&originals, files, Daemon::Silent, true);
        assert!(plan.forgotten.is_empty(), "{plan:?}");
        assert!(plan.refusals[0].why.contains("docker.service"), "{plan:?}");
        for docker in [has(&[]), has(&["http://theirs/"]), Daemon::Idle] {
            let plan = back_with(&originals, files, docker, true);
            assert_eq!((plan.files.len(), plan.forgotten.len()), (0, 1), "{plan:?}");
        }
    }
    // A broken one can't be read again, so what docker has can't be taken from it.
    let originals = originals(&[(DAEMON_JSON, None, &wired)]);
    for docker in [has(&["http://127.0.0.1:5000/"]), Daemon::Silent] {
        let plan = back_with(&originals, &[(DAEMON_JSON, Some("{"))], docker, true);
        assert_eq!(plan.refusals[0].subject, DAEMON_JSON, "{plan:?}");
        assert!(plan.forgotten.is_empty(), "{plan:?}");
    }
}

#[test]
fn flags_are_known_until_docker_runs_without_them() {
    let (before, made) = (
        "OPTIONS='--registry-mirror=http://old'\n",
        format!("OPTIONS='--registry-mirror={MIRROR} --registry-mirror=http://old'\n"),
    );
    let originals = originals(&[(SYSCONFIG, Some(before), &made)]);
    let (ours, theirs) = ("http://127.0.0.1:5000/", "http://old/");
    for (now, restart, docker, left) in [
        (made.as_str(), false, has(&[ours, theirs]), true),
        (made.as_str(), false, Daemon::Silent, true),
        // The file is right by then, and docker was not restarted ...
        (before, false, has(&[ours, theirs]), true),
        // ... until it is.
        (before, false, has(&[theirs]), false),
        (before, false, Daemon::Idle, false),
        (made.as_str(), false, Daemon::Idle, false),
        (made.as_str(), true, has(&[ours, theirs]), false),
    ] {
        let case = format!("{now} {restart} {docker:?}");
        let plan = back_with(&originals, &[(SYSCONFIG, Some(now))], docker, restart);
        // For the next start it is right in any case.
        let changes = usize::from(now != before);
        assert_eq!(plan.files.len(), changes, "{case}: {plan:?}");
        assert_eq!(plan.refusals.len(), usize::from(left), "{case}: {plan:?}");
        assert_eq!(plan.forgotten.is_empty(), left, "{case}: {plan:?}");
        assert_eq!(plan.actions.len(), usize::from(restart), "{case}: {plan:?}");
    }
    // It was told the flags are gone, and is to be restarted for what it still has.
    let plan = back(&originals, &[(SYSCONFIG, Some(before))], &[ours, theirs]);
    assert_eq!(plan.actions[0].verb, Verb::Restart, "{plan:?}");
}

/// A host with a docker that reads its file at a reload, and a CRI-O.
struct Host {
    root: PathBuf,
    mirrors: Mutex<Vec<String>>,
    /// The unit whose jobs fail.
    deaf: Mutex<&'static str>,
}

impl System for Host {
    async fn is_shutting_down(&self) -> bool {
        false
    }

    async fn run(&self, action: &UnitAction, _: Duration) -> Result<(), SystemError> {
        if *self.deaf.lock().unwrap() == action.unit {
            return Err(SystemError("the job failed".to_owned()));
        }
        if action.unit != "docker.service" {
            return Ok(());
        }
        let text = fs::read(write::under(&self.root, Path::new(DAEMON_JSON)));
        let json: serde_json::Value = text.map_or_else(
            |_| serde_json::json!({}),
            |text| serde_json::from_slice(&text).unwrap(),
        );
        if let Some(mirrors) = json.get("registry-mirrors") {
            *self.mirrors.lock().unwrap() = serde_json::from_value(mirrors.clone()).unwrap();
        }
        Ok(())
    }

    async fn reset_failed(&self, _: &str) -> Result<(), SystemError> {
        Ok(())
    }

    async fn docker_mirrors(&self, _: &str) -> Result<Vec<String>, SystemError> {
        Ok(self.mirrors.lock().unwrap().clone())
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

impl Host {
    fn change(&self, path: &str, after: &str, units: &[&str]) -> FileChange {
        FileChange {
            path: path.into(),
            before: self.read(path),
            after: file(Some(after)),
            why: "a test".to_owned(),
            check: None,
            units: units.iter().map(|&unit| unit.to_owned()).collect(),
        }
    }

    fn read(&self, path: &str) -> FileFacts {
        write::read(&write::under(&self.root, Path::new(path))).unwrap()
    }
}

/// docker, containerd and CRI-O, wired.
async fn wired(apply: &Apply<'_, Host>) {
    let json = format!(r#"{{"registry-mirrors": ["{MIRROR}"]}}"#);
    let plan = Plan {
        files: vec![
            apply.system.change(DAEMON_JSON, &json, &["docker.service"]),
            apply.system.change(HOSTS_TOML, &hosts_toml(""), &[]),
            apply
                .system
                .change(DROP_IN, &drop_in("", ""), &["crio.service"]),
        ],
        actions: ["crio.service", "docker.service"]
            .map(|unit| UnitAction {
                unit: unit.to_owned(),
                verb: Verb::Reload,
                why: "a test".to_owned(),
            })
            .into(),
        proofs: vec![Proof::DockerMirrors {
            unit: "docker.service".to_owned(),
            mirrors: vec![MIRROR.to_owned()],
        }],
        ..Plan::default()
    };
    let mirror = Some(MIRROR.to_owned());
    apply.apply(&plan, Purpose { mirror }).await.unwrap();
}

async fn taken_back(apply: &Apply<'_, Host>) -> (Plan, Partly) {
    let plan = rollback::plan(apply, false).await.unwrap().unwrap();
    let done = apply.apply_each(&plan, &Purpose::default()).await;
    (plan, done)
}

#[tokio::test]
async fn one_that_can_not_be_told_keeps_no_other_from_being_taken_back() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host {
        root: folder.path().join("root"),
        mirrors: Mutex::default(),
        deaf: Mutex::default(),
    };
    fs::create_dir_all(&host.root).unwrap();
    let journal = Journal::open(&folder.path().join("state")).unwrap();
    let apply = Apply {
        root: &host.root.clone(),
        journal: &journal,
        system: &host,
        deadlines: Deadlines {
            job: Duration::from_secs(5),
            proof: Duration::from_millis(100),
        },
    };
    wired(&apply).await;
    // In the order of their names each comes before another once.
    for (deaf, left) in [("crio.service", DROP_IN), ("docker.service", DAEMON_JSON)] {
        *host.deaf.lock().unwrap() = deaf;
        let made = host.read(left);
        let (_, done) = taken_back(&apply).await;
        assert_eq!(done.failures.len(), 1, "{done:?}");
        assert!(done.failures[0].contains(deaf), "{done:?}");
        assert!(done.result().is_err());
        assert_eq!(host.read(left), made);
        let known = journal.originals().unwrap();
        let paths: Vec<&PathBuf> = known.files.keys().collect();
        assert_eq!(paths, [Path::new(left)]);
        for gone in [DROP_IN, DAEMON_JSON, HOSTS_TOML] {
            assert!(gone == left || host.read(gone) == FileFacts::Absent);
        }
        assert!(!write::under(&host.root, Path::new("/etc/containerd")).exists());
        *host.deaf.lock().unwrap() = "";
        wired(&apply).await;
    }

    // When all can, all is; and what was made for it is gone.
    let (_, done) = taken_back(&apply).await;
    assert_eq!(done.failures, [] as [String; 0]);
    assert_eq!(host.read(DAEMON_JSON), FileFacts::Absent);
    assert_eq!(*host.mirrors.lock().unwrap(), [] as [String; 0]);
    assert_eq!(journal.originals().unwrap(), Originals::default());
    assert!(!write::under(&host.root, Path::new("/etc")).exists());
    assert_eq!(rollback::plan(&apply, false).await.unwrap(), None);
}

#[tokio::test]
async fn what_a_person_has_to_put_right_stays_in_the_journal() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host {
        root: folder.path().join("root"),
        mirrors: Mutex::default(),
        deaf: Mutex::default(),
    };
    fs::create_dir_all(&host.root).unwrap();
    let journal = Journal::open(&folder.path().join("state")).unwrap();
    let apply = Apply {
        root: &host.root.clone(),
        journal: &journal,
        system: &host,
        deadlines: Deadlines::default(),
    };
    wired(&apply).await;
    let at = write::under(&host.root, Path::new(DAEMON_JSON));
    let broken = format!("{{ broken, {MIRROR}");
    write::put(&at, &file(Some(&broken))).unwrap();
    let (plan, done) = taken_back(&apply).await;
    assert_eq!(plan.refusals.len(), 1, "{plan:?}");
    assert_eq!(done.failures, [] as [String; 0]);
    assert_eq!(content(&host.read(DAEMON_JSON)), Some(broken.as_str()));
    let known = journal.originals().unwrap();
    assert!(known.files.contains_key(Path::new(DAEMON_JSON)));
    assert_eq!((known.files.len(), known.mirrors.len()), (1, 1));

    // They have put it right.
    let right = format!(r#"{{"registry-mirrors": ["{MIRROR}", "http://theirs"]}}"#);
    write::put(&at, &file(Some(&right))).unwrap();
    let (_, done) = taken_back(&apply).await;
    assert_eq!(done.failures, [] as [String; 0]);
    assert_eq!(*host.mirrors.lock().unwrap(), ["http://theirs"]);
    assert_eq!(journal.originals().unwrap(), Originals::default());
}

#[tokio::test]
async fn a_mirror_whose_file_is_gone_is_taken_from_docker() {
    for before in [None, Some("{\"debug\": true}")] {
        let folder = tempfile::tempdir().unwrap();
        let host = Host {
            root: folder.path().join("root"),
            mirrors: Mutex::default(),
            deaf: Mutex::default(),
        };
        let at = write::under(&host.root, Path::new(DAEMON_JSON));
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        write::put(&at, &file(before)).unwrap();
        let journal = Journal::open(&folder.path().join("state")).unwrap();
        let apply = Apply {
            root: &host.root.clone(),
            journal: &journal,
            system: &host,
            deadlines: Deadlines::default(),
        };
        wired(&apply).await;
        assert_eq!(*host.mirrors.lock().unwrap(), [MIRROR]);
        // Also with its folder: it comes and goes with the file.
        fs::remove_dir_all(at.parent().unwrap()).unwrap();
        let (_, done) = taken_back(&apply).await;
        assert_eq!(done.failures, [] as [String; 0]);
        assert_eq!(*host.mirrors.lock().unwrap(), [] as [String; 0]);
        assert!(!at.parent().unwrap().exists());
        assert_eq!(journal.originals().unwrap(), Originals::default());
    }
}
