//! Changing a host: all of a plan or none of it, through refusals, daemons that die, and a crash at
//! every step.
#![cfg(debug_assertions)]
#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use registry_agent::host::apply::{ApplyError, Recovered};
use registry_agent::host::journal::Originals;
use registry_agent::host::plan::Plan;
use registry_agent::host::write;

use fake::{
    DAEMON_JSON, Docker, HOSTS_TOML, Host, MIRROR, forgetting, host, journal, plan, purpose, text,
    way_back, wired, with,
};

mod crash;
mod fake;
mod race;

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
        with(&host, async |apply| apply.apply(&back, forgetting()).await).unwrap();
        assert_eq!(host.state(), before, "{original:?}");
        assert_eq!(journal(&host).originals().unwrap(), Originals::default());
        assert_eq!(host.docker().main_pid, 100, "docker was restarted");
    }
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
        back.notes[0].contains("only the mirror is taken out of it"),
        "{back:?}"
    );
    let paths: Vec<&Path> = back
        .files
        .iter()
        .map(|change| change.path.as_path())
        .collect();
    assert_eq!(paths, [Path::new(HOSTS_TOML)]);
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
    with(&host, async |apply| apply.apply(&back, forgetting()).await).unwrap();
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
