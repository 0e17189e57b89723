//! Every way in which a job can end.

use std::time::Duration;

use registry_agent::systemd::{JobFailure, JobVerb, ManagerError};

use super::fake::{Ending, Systemd, Unit};

const DOCKER: &str = "docker.service";
/// No test waits for it.
const LONG: Duration = Duration::from_mins(1);
/// A job that does not end is given up after it.
const SHORT: Duration = Duration::from_millis(100);

#[tokio::test]
async fn a_reload_is_followed_in_the_order_that_misses_no_end() {
    for ending in [Ending::Signal("done"), Ending::SignalFirst("done")] {
        let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
        systemd.state().ending = ending;
        manager.run(DOCKER, JobVerb::Reload, LONG).await.unwrap();
        assert_eq!(
            systemd.changes(),
            ["Subscribe", "ReloadUnit docker.service ignore-dependencies"],
            "{ending:?}"
        );
    }
}

/// The unit runs, so only the signal can tell.
#[tokio::test]
async fn an_end_before_the_reply_that_names_the_job_is_heard_of() {
    let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
    systemd.state().ending = Ending::SignalFirst("canceled");
    let outcome = manager.run(DOCKER, JobVerb::Reload, LONG).await;
    assert_eq!(outcome.unwrap_err().kind, JobFailure::Canceled);
}

#[tokio::test]
async fn a_second_job_on_a_connection_that_is_subscribed_works_too() {
    let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
    systemd.state().subscribe = Err("AlreadySubscribed");
    manager.run(DOCKER, JobVerb::Reload, LONG).await.unwrap();
}

#[tokio::test]
async fn a_unit_is_followed_by_its_own_name_whatever_it_was_asked_by() {
    let mut unit = Unit::running(DOCKER);
    unit.alias = Some("alias-docker.service".into());
    let (systemd, manager, _bus) = Systemd::with(vec![unit]).await;
    let job = manager.run("alias-docker.service", JobVerb::Reload, LONG);
    job.await.unwrap();
    assert_eq!(
        systemd.changes()[1],
        "ReloadUnit docker.service ignore-dependencies"
    );
}

/// What systemd says, what it is to us, and what the message says.
#[tokio::test]
async fn only_done_is_success() {
    for (result, kind, says) in [
        ("canceled", JobFailure::Canceled, "was cancelled"),
        ("timeout", JobFailure::Timeout, "longer than systemd allows"),
        ("failed", JobFailure::Failed, "it did not"),
        ("dependency", JobFailure::Dependency, "a unit that it needs"),
        ("skipped", JobFailure::Skipped, "a condition"),
        ("invalid", JobFailure::Other("invalid".into()), "`invalid`"),
    ] {
        let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
        systemd.state().ending = Ending::Signal(result);
        // It runs, and yet what was asked for did not come to pass.
        let error = manager
            .run(DOCKER, JobVerb::Restart, LONG)
            .await
            .unwrap_err();
        assert_eq!(error.kind, kind, "{result}");
        let text = error.to_string();
        assert!(text.starts_with("can't restart docker.service: "), "{text}");
        assert!(text.contains(says), "{text}");
        assert!(text.contains("active (running), Result=success"), "{text}");
        assert!(text.contains("journalctl -u docker.service"), "{text}");
    }
}

/// A job that is `done` and a unit that is not what it should be.
#[tokio::test]
async fn done_is_believed_only_if_the_unit_agrees() {
    let running = || Unit::running(DOCKER);
    let unmet = |mut unit: Unit| {
        unit.condition = false;
        unit
    };
    let not_reloaded = |mut unit: Unit| {
        unit.reload_result = "exit-code".into();
        unit
    };
    let crashed = running().state("activating", "auto-restart", "exit-code");
    let gone = running().state("inactive", "dead", "success");
    for (verb, after, expected) in [
        (JobVerb::Start, running(), Ok(())),
        (
            JobVerb::Start,
            unmet(gone.clone()),
            Err(JobFailure::Skipped),
        ),
        (JobVerb::Start, gone.clone(), Err(JobFailure::Failed)),
        (JobVerb::Start, crashed.clone(), Err(JobFailure::Failed)),
        (JobVerb::Restart, running().restarted(), Ok(())),
        // The process that was there still is.
        (JobVerb::Restart, running(), Err(JobFailure::Failed)),
        (
            JobVerb::Restart,
            crashed.clone().restarted(),
            Err(JobFailure::Failed),
        ),
        (JobVerb::Reload, running(), Ok(())),
        (
            JobVerb::Reload,
            not_reloaded(running()),
            Err(JobFailure::Failed),
        ),
        (JobVerb::Reload, crashed, Err(JobFailure::Failed)),
        (JobVerb::Stop, gone, Ok(())),
        (
            JobVerb::Stop,
            running().state("failed", "failed", "exit-code"),
            Ok(()),
        ),
        (JobVerb::Stop, running(), Err(JobFailure::Failed)),
    ] {
        // What a lost signal leaves to go by is the same.
        for ending in [Ending::Signal("done"), Ending::Lost] {
            let (systemd, manager, _bus) = Systemd::with(vec![running()]).await;
            systemd.state().ending = ending;
            systemd.state().after = Some(after.clone());
            let outcome = manager.run(DOCKER, verb, LONG).await;
            let outcome = outcome.map_err(|error| error.kind);
            assert_eq!(outcome, expected, "{verb} {ending:?} {after:?}");
        }
    }
}

#[tokio::test]
async fn a_job_that_does_not_end_is_cancelled_at_the_deadline() {
    for (cancel, left) in [
        (Ok(()), false),
        (Err("NoSuchJob"), false),
        (Err("AccessDenied"), true),
    ] {
        let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
        systemd.state().ending = Ending::Never;
        systemd.state().cancel = cancel;
        let error = manager
            .run(DOCKER, JobVerb::Restart, SHORT)
            .await
            .unwrap_err();
        let waited = SHORT;
        assert_eq!(error.kind, JobFailure::Deadline { waited, left });
        assert_eq!(systemd.changes().last().unwrap(), "CancelJob 7");
        let says = if left {
            "may still come to pass"
        } else {
            "after 100ms and was cancelled"
        };
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[tokio::test]
async fn what_systemd_refuses_is_said_in_its_words() {
    for (refused, name, hint) in [
        (
            "NoSuchUnit",
            "org.freedesktop.systemd1.NoSuchUnit",
            "systemctl status",
        ),
        (
            "UnitMasked",
            "org.freedesktop.systemd1.UnitMasked",
            "systemctl unmask",
        ),
        (
            "AccessDenied",
            "org.freedesktop.DBus.Error.AccessDenied",
            "Only root",
        ),
    ] {
        let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
        systemd.state().ending = Ending::Refused(refused);
        let run = manager.run(DOCKER, JobVerb::Start, LONG).await.unwrap_err();
        let enqueued = manager.enqueue(DOCKER, JobVerb::Start).await.unwrap_err();
        for error in [run, enqueued] {
            let message = format!("no: {refused}");
            let name = name.to_owned();
            assert_eq!(error.kind, JobFailure::Refused { name, message });
            assert!(error.to_string().contains(hint), "{error}");
        }
    }
}

#[tokio::test]
async fn a_bus_that_goes_away_is_no_success_and_no_wait() {
    let (systemd, manager, bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
    systemd.state().ending = Ending::Never;
    let gone = async {
        systemd.asked().await;
        bus.close().await.unwrap();
    };
    let (outcome, ()) = tokio::join!(manager.run(DOCKER, JobVerb::Restart, LONG), gone);
    let error = outcome.unwrap_err();
    assert!(matches!(error.kind, JobFailure::Bus(_)), "{error:?}");
    assert_eq!(error.state, None);
    assert!(
        error
            .to_string()
            .contains("systemctl status docker.service"),
        "{error}"
    );
}

#[tokio::test]
async fn a_unit_in_start_limit_hit_says_how_it_starts_again() {
    let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
    let mut after = Unit::running(DOCKER).state("failed", "failed", "start-limit-hit");
    after.restarts = 3;
    systemd.state().ending = Ending::Signal("failed");
    systemd.state().after = Some(after);
    let error = manager.run(DOCKER, JobVerb::Start, LONG).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("Result=start-limit-hit, and was restarted 3 times"),
        "{text}"
    );
    assert!(
        text.contains("systemctl reset-failed docker.service"),
        "{text}"
    );
}

#[tokio::test]
async fn what_does_not_run_can_not_be_reloaded() {
    let gone = Unit::running(DOCKER).state("inactive", "dead", "success");
    let (systemd, manager, _bus) = Systemd::with(vec![gone]).await;
    systemd.state().ending = Ending::Signal("invalid");
    let error = manager
        .run(DOCKER, JobVerb::Reload, LONG)
        .await
        .unwrap_err();
    assert_eq!(error.kind, JobFailure::Other("invalid".into()));
    let text = error.to_string();
    assert!(
        text.contains("it does not run, so there is nothing to reload"),
        "{text}"
    );
}

#[tokio::test]
async fn an_enqueued_job_is_not_waited_for() {
    let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
    systemd.state().ending = Ending::Never;
    manager.enqueue(DOCKER, JobVerb::Restart).await.unwrap();
    assert_eq!(systemd.changes(), ["RestartUnit docker.service replace"]);
}

#[tokio::test]
async fn a_unit_that_is_not_there_has_no_failure_to_forget() {
    let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
    manager.reset_failed(DOCKER).await.unwrap();
    manager.reset_failed("none.service").await.unwrap();
    assert_eq!(
        systemd.changes(),
        [
            "ResetFailedUnit docker.service",
            "ResetFailedUnit none.service"
        ]
    );
}

#[tokio::test]
async fn no_change_means_that_it_was_enabled_already() {
    let (systemd, manager, _bus) = Systemd::with(vec![]).await;
    assert!(!manager.enable(&["a.service", "a.socket"]).await.unwrap());
    assert!(!manager.disable(&["a.service"]).await.unwrap());
    systemd.state().changes = 2;
    assert!(manager.enable(&["a.service"]).await.unwrap());
    assert!(manager.disable(&["a.service"]).await.unwrap());
    // For good, and not over what somebody else has put there.
    assert_eq!(
        systemd.changes()[0],
        r#"EnableUnitFiles ["a.service", "a.socket"] false false"#
    );
}

#[tokio::test]
async fn changed_unit_files_are_read_when_they_have_to_be() {
    let mut unit = Unit::running(DOCKER);
    unit.need_daemon_reload = true;
    let (_systemd, manager, _bus) = Systemd::with(vec![unit]).await;
    assert!(manager.needs_reload(DOCKER).await.unwrap());
    manager.daemon_reload().await.unwrap();
    assert!(!manager.needs_reload(DOCKER).await.unwrap());
}

#[tokio::test]
async fn a_bus_that_is_gone_is_said_to_be() {
    let (_systemd, manager, bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
    bus.close().await.unwrap();
    let error = manager.unit(DOCKER).await.unwrap_err();
    assert!(matches!(error, ManagerError::Bus { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.starts_with("can't ask systemd to look at docker.service: "),
        "{text}"
    );
}

/// This process's own unit, which is being stopped.
fn stopping() -> Unit {
    Unit::running("registry-agent-host.service").state("deactivating", "stop-sigterm", "success")
}

/// systemd holds back the start of what is ordered after a unit that stops: for a restart that waits
/// for nobody else, docker would be down until the deadline.
#[tokio::test]
async fn what_our_own_stop_asks_for_does_not_wait_for_its_end() {
    for (verb, asked) in [
        (
            JobVerb::Start,
            "StartUnit docker.service ignore-dependencies",
        ),
        (
            JobVerb::Restart,
            "RestartUnit docker.service ignore-dependencies",
        ),
        (JobVerb::Stop, "StopUnit docker.service replace"),
    ] {
        let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
        systemd.state().own = Some(stopping());
        let _ = manager.run(DOCKER, verb, LONG).await;
        assert_eq!(systemd.changes()[1], asked);
    }
}

#[tokio::test]
async fn while_our_own_unit_runs_or_there_is_none_a_restart_is_one_like_any_other() {
    let session = Unit::running("session-1.scope");
    for own in [
        None,
        Some(Unit::running("registry-agent-host.service")),
        Some(session),
    ] {
        let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
        systemd.state().own = own;
        systemd.state().after = Some(Unit::running(DOCKER).restarted());
        manager.run(DOCKER, JobVerb::Restart, LONG).await.unwrap();
        assert_eq!(systemd.changes()[1], "RestartUnit docker.service replace");
    }
}

#[tokio::test]
async fn a_restart_that_our_own_stop_overtakes_is_released_once() {
    let (systemd, manager, _bus) = Systemd::with(vec![Unit::running(DOCKER)]).await;
    systemd.state().ending = Ending::Never;
    let overtaken = async {
        systemd.asked().await;
        systemd.state().own = Some(stopping());
    };
    let (outcome, ()) = tokio::join!(manager.run(DOCKER, JobVerb::Restart, SHORT), overtaken);
    outcome.unwrap_err();
    assert_eq!(
        systemd.changes(),
        [
            "Subscribe",
            "RestartUnit docker.service replace",
            "StartUnit docker.service ignore-dependencies",
            "CancelJob 7"
        ]
    );
}

#[tokio::test]
async fn a_host_that_goes_down_is_told_from_one_that_does_not() {
    let (systemd, manager, _bus) = Systemd::with(vec![]).await;
    for (state, down) in [
        ("starting", false),
        ("running", false),
        ("degraded", false),
        ("maintenance", false),
        ("stopping", true),
    ] {
        state.clone_into(&mut systemd.state().whole);
        assert_eq!(manager.is_shutting_down().await.unwrap(), down, "{state}");
    }
}

/// One that is inactive was stopped, or has not been started yet: the job tells.
#[tokio::test]
async fn a_unit_that_is_about_to_start_is_told_from_one_that_was_stopped() {
    let gone = Unit::running(DOCKER).state("inactive", "dead", "success");
    let (systemd, manager, _bus) = Systemd::with(vec![gone]).await;
    assert!(!manager.unit(DOCKER).await.unwrap().has_job);
    systemd.state().ending = Ending::Never;
    manager.enqueue(DOCKER, JobVerb::Start).await.unwrap();
    assert!(manager.unit(DOCKER).await.unwrap().has_job);
}

/// `systemctl restart dbus` ends every connection, and nothing says so before one is used.
#[tokio::test]
async fn a_bus_that_is_restarted_is_spoken_with_again() {
    let (systemd, manager, bus) = Systemd::with_bus(vec![Unit::running(DOCKER)]).await;
    for _ in 0..2 {
        manager.run(DOCKER, JobVerb::Reload, LONG).await.unwrap();
        assert_eq!(bus.restart().await, 1);
        let unit = manager.unit(DOCKER).await.unwrap();
        assert_eq!(unit.active_state, "active");
        assert_eq!(bus.restart().await, 1);
    }
    let reloads = systemd.changes();
    let reloads = reloads.iter().filter(|it| it.starts_with("ReloadUnit"));
    assert_eq!(reloads.count(), 2, "each was asked for once");
}

#[tokio::test]
async fn a_job_that_outlives_the_bus_is_followed_to_its_end() {
    let (systemd, manager, bus) = Systemd::with_bus(vec![Unit::running(DOCKER)]).await;
    systemd.state().ending = Ending::Never;
    let meanwhile = async {
        systemd.asked().await;
        bus.restart().await;
        let mut state = systemd.state();
        let unit = Unit::running(DOCKER).restarted();
        state.units[0] = unit;
    };
    let (done, ()) = tokio::join!(manager.run(DOCKER, JobVerb::Restart, LONG), meanwhile);
    done.unwrap();
    let asked = systemd.changes();
    let restarts = asked.iter().filter(|it| it.starts_with("RestartUnit"));
    assert_eq!(restarts.count(), 1, "{asked:?}");
}
