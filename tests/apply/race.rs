//! Processes that would change the same host at once.

use std::fs;
use std::process::{Child, Command, Stdio};

use registry_agent::host::lock::Lock;
use registry_agent::host::write;

use super::{
    CHILD, DAEMON_JSON, Host, MIRROR, host, journal, plan, purpose, text, wait_until, wired, with,
};

/// Another process that wires this host, as `registry-agent VERB` does.
struct Racer(Child);

impl Racer {
    fn start(host: &Host, verb: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "child", "--nocapture"])
            .env(CHILD, &host.folder)
            .env("PLAN", verb)
            .stdout(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    fn id(&self) -> u32 {
        self.0.id()
    }

    /// What it has said.
    fn end(self) -> String {
        let output = self.0.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn of_two_that_apply_at_once_the_second_is_told_who_is_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some("{}"));
    write::put(&host.hold(), &text("", 0o600)).unwrap();
    let first = Racer::start(&host, "race");
    wait_until("the first has begun", || host.held().exists());
    let refused = Racer::start(&host, "race").end();
    let holder = format!("process {}, `registry-agent race`", first.id());
    assert!(refused.contains(&holder), "{refused}");
    fs::remove_file(host.hold()).unwrap();
    let said = first.end();
    assert!(said.contains("proved: docker.service"), "{said}");
    assert_eq!(host.docker().jobs, ["Reload"], "it was told once");
    assert!(journal(&host).transaction().unwrap().is_none());
}

#[test]
fn a_crowd_that_applies_leaves_what_one_would() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some("{}"));
    let racers: Vec<Racer> = (0..8).map(|_| Racer::start(&host, "race")).collect();
    let said: Vec<String> = racers.into_iter().map(Racer::end).collect();
    let refused = |said: &&String| said.contains("another registry-agent is changing this host");
    let ended = |said: &&String| said.contains("proved: ") || said.contains("nothing to do");
    let (refused, ended) = (
        said.iter().filter(refused).count(),
        said.iter().filter(ended).count(),
    );
    assert_eq!(refused + ended, 8, "{said:#?}");
    assert!(ended > 0);
    assert_eq!(fs::read_to_string(host.at(DAEMON_JSON)).unwrap(), wired());
    assert_eq!(host.docker().jobs, ["Reload"], "{said:#?}");
    assert!(journal(&host).transaction().unwrap().is_none());
}

#[test]
fn beside_the_loop_an_apply_is_told_that_it_is_the_loop() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some("{}"));
    let before = host.state();
    let the_loop = Lock::take(journal(&host).folder(), "host").unwrap();
    let refused = Racer::start(&host, "race").end();
    let holder = format!("process {}, `registry-agent host`", std::process::id());
    assert!(refused.contains(&holder), "{refused}");
    assert!(refused.contains("systemctl reload"), "{refused}");
    assert_eq!(host.state(), before);
    drop(the_loop);
    let said = Racer::start(&host, "race").end();
    assert!(said.contains("proved: "), "{said}");
}

/// As `registry-agent apply`: the lock, what is left, the plan, and what became of it.
pub fn race(host: &Host) -> String {
    let _lock = match Lock::take(journal(host).folder(), "race") {
        Ok(lock) => lock,
        Err(error) => return error.to_string(),
    };
    with(host, async |apply| {
        apply.recover().await.unwrap();
        if fs::read_to_string(host.at(DAEMON_JSON)).unwrap() == wired() {
            return "nothing to do".to_owned();
        }
        let plan = plan(host, &wired(), &[MIRROR]);
        match apply.apply(&plan, purpose()).await {
            Ok(report) => report.to_string(),
            Err(error) => error.to_string(),
        }
    })
}
