//! Processes that are killed in the midst of a change.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;

use nix::sys::signal::Signal;
use registry_agent::failpoint::{Failpoint, VARIABLE};
use registry_agent::host::apply::Recovered;

use super::fake::{
    DAEMON_JSON, Host, MIRROR, forgetting, host, journal, plan, purpose, way_back, wired, with,
};
use super::race::race;

/// Where the child of a test finds its host.
pub const CHILD: &str = "REGISTRY_AGENT_TEST_HOST";

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
        println!("{}", race(&host));
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
        forgetting()
    } else {
        purpose()
    };
    let _ = with(&host, async |apply| apply.apply(&plan, purpose).await);
}

/// Whether the child was killed there.
fn killed(host: &Host, plan: &str, point: &str) -> bool {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::child", "--quiet"])
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
