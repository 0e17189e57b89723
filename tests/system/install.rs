//! `registry-agent install`, an upgrade, and `uninstall`, by a binary that somebody copied to a host.

use std::fs;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::harness::command::Finished;
use crate::harness::{Host, Network, poll};

const PATIENCE: Duration = Duration::from_mins(1);
const BINARY: &str = "/usr/local/bin/registry-agent";
const SOCKET: &str = "registry-agent.socket";
const AGENT: &str = "registry-agent.service";
const HOST: &str = "registry-agent-host.service";
const ADMIN: &str = "/run/registry-agent/admin.sock";

/// What its packages would listen on is 127.0.0.1:5000.
const CONFIG: &str = "\
role: mirror
listen: 0.0.0.0:5005
";
const MIRROR: &str = "http://127.0.0.1:5005";

fn this_binary() -> Vec<u8> {
    let binary = env!("CARGO_BIN_EXE_registry-agent");
    fs::read(binary).unwrap_or_else(|error| panic!("reading {binary}: {error}"))
}

/// A host with docker, to which somebody has copied the binary and a configuration.
fn host_with_binary(network: &Network) -> Host {
    let mut host = Host::new(network, "one", 11);
    host.write_executable(BINARY, &this_binary());
    host.write("/etc/registry-agent/config.yaml", CONFIG);
    host.write("/etc/docker/daemon.json", "{\n\t\"debug\":  false\n}\n");
    host.boot();
    host
}

#[track_caller]
fn property(host: &Host, unit: &str, name: &str) -> String {
    let value = host.run(&["systemctl", "show", "--property", name, "--value", unit]);
    value.trim().to_owned()
}

#[track_caller]
fn install(host: &Host) -> String {
    host.run(&[BINARY, "install"])
}

#[track_caller]
fn wait_until_wired(host: &Host) {
    wait_until_wired_to(host, MIRROR);
}

#[track_caller]
fn wait_until_wired_to(host: &Host, mirror: &str) {
    let ask = [
        "docker",
        "info",
        "--format",
        "{{json .RegistryConfig.Mirrors}}",
    ];
    let wired = format!("[\"{mirror}/\"]");
    poll::until("docker has the mirror", PATIENCE, || {
        let mirrors = host.try_run(&ask);
        if mirrors.stdout.trim() == wired {
            Ok(())
        } else {
            Err(mirrors)
        }
    });
}

/// Every file, folder and link that an administrator or a running service would find, with what is
/// in the files: but for users, who stay, and what belongs to docker, systemd and logins.
fn trace(host: &Host) -> String {
    const SCRIPT: &str = "\
find /etc /usr/local /run -xdev \\( -path /run/systemd -o -path /run/docker -o -path /run/user \\
    -o -path /run/containerd -o -path /run/log -o -path /run/udev -o -path /run/utmp \\
    -o -path /run/docker.pid -o -path '/etc/*passwd*' -o -path '/etc/*shadow*' \\
    -o -path '/etc/group*' -o -path '/etc/.pwd.lock' -o -path '/etc/sub[ug]id*' \\) -prune -o \\
    \\( -type f -exec sha256sum {} ';' -o -true \\) -printf '%p %y %M %u:%g %l\\n' | sort
find /run/systemd /var/lib -xdev -name '*registry-agent*' -not -path /var/lib/registry-agent \
    -not -path '/var/lib/registry-agent/*' | sort";
    host.run(&["sh", "-c", SCRIPT])
}

/// Panics with what is there and was not, and what was there and is not.
#[track_caller]
fn assert_same(now: &str, before: &str, why: &str) {
    let missing = |one: &str, other: &str| -> Vec<String> {
        let lines = one
            .lines()
            .filter(|line| !other.lines().any(|it| it == *line));
        lines.map(str::to_owned).collect()
    };
    let (new, gone) = (missing(now, before), missing(before, now));
    assert!(
        new.is_empty() && gone.is_empty(),
        "{why}\nnew: {new:#?}\ngone: {gone:#?}"
    );
}

/// The same with the times at which everything was last changed.
fn changes(host: &Host) -> String {
    const FORMAT: [&str; 2] = ["-printf", "%p %T@ %C@ %i\n"];
    let folders = ["/etc", "/usr/local", "/usr/lib/systemd"];
    host.run(&[&["find"], &folders[..], &FORMAT].concat())
}

#[test]
fn install_writes_enables_and_starts_once_and_mends_what_is_not_so() {
    const DROP_IN: &str = "/etc/systemd/system/registry-agent.service.d/nice.conf";
    let network = Network::new();
    let host = host_with_binary(&network);
    host.write(DROP_IN, "[Service]\nNice=2\n");
    // What would be changed is said, here and by whoever is sent the facts.
    let plan = host.try_run(&[BINARY, "plan"]);
    assert!(
        plan.code == Some(2) && plan.stdout.contains(MIRROR),
        "{plan}"
    );
    host.write(
        "/tmp/facts.json",
        &host.run(&[BINARY, "plan", "--print-facts"]),
    );
    let elsewhere = host.try_run(&[BINARY, "plan", "--facts", "/tmp/facts.json"]);
    assert_eq!(elsewhere.stdout, plan.stdout, "{elsewhere}");

    let said = install(&host);
    for line in [
        "wrote /etc/systemd/system/registry-agent.service",
        "wrote /etc/systemd/system/registry-agent.socket",
        "wrote /etc/systemd/system/registry-agent-host.service",
        "wrote /etc/systemd/system/registry-agent.socket.d/10-listen.conf",
        "enabled registry-agent.socket, registry-agent.service, registry-agent-host.service",
    ] {
        assert!(said.contains(line), "no `{line}` in\n{said}");
    }
    host.run(&["getent", "passwd", "registry-agent"]);
    for unit in [SOCKET, AGENT, HOST] {
        assert_eq!(property(&host, unit, "ActiveState"), "active", "{unit}");
        assert_eq!(property(&host, unit, "UnitFileState"), "enabled", "{unit}");
        assert_eq!(property(&host, unit, "NeedDaemonReload"), "no", "{unit}");
    }
    let listens = property(&host, SOCKET, "Listen");
    assert!(
        listens.contains("0.0.0.0:5005") && listens.contains(ADMIN) && !listens.contains(":5000"),
        "{listens}"
    );
    host.run(&["curl", "-sS", "--fail", &format!("{MIRROR}/v2/")]);
    wait_until_wired(&host);
    // Whoever asks at a shell means the agent that runs.
    let check = host.run(&[BINARY, "check"]);
    assert!(
        check.contains("storage: /var/lib/registry-agent\n"),
        "{check}"
    );
    let verify = host.try_run(&[BINARY, "verify"]);
    assert!(
        verify.succeeded() && verify.stderr.contains(" in /var/lib/registry-agent\n"),
        "{verify}"
    );

    let (process, before) = (property(&host, AGENT, "MainPID"), changes(&host));
    let again = install(&host);
    assert_eq!(again, "everything is installed already\n");
    assert_same(&changes(&host), &before, "nothing is written");
    assert_eq!(property(&host, AGENT, "MainPID"), process);

    // Somebody has edited a drop-in, and not told systemd.
    host.write(DROP_IN, "[Service]\nNice=1\n");
    assert_eq!(property(&host, AGENT, "NeedDaemonReload"), "yes");
    let said = install(&host);
    assert_eq!(said, "systemd has read its units again\n");
    assert_eq!(property(&host, AGENT, "NeedDaemonReload"), "no");
    assert_eq!(property(&host, AGENT, "Nice"), "1", "it is honoured");

    // Somebody has edited a unit.
    let unit = "/etc/systemd/system/registry-agent.service";
    let right = host.read(unit);
    host.write(unit, &right.replace("WatchdogSec=60", "WatchdogSec=0"));
    let said = install(&host);
    assert!(said.contains(&format!("wrote {unit}")), "{said}");
    assert_eq!(host.read(unit), right);
    poll::until("its process is another", PATIENCE, || {
        let now = property(&host, AGENT, "MainPID");
        if now != process && now != "0" {
            Ok(())
        } else {
            Err(now)
        }
    });

    // Another address is in the configuration.
    host.write(
        "/etc/registry-agent/config.yaml",
        &CONFIG.replace("5005", "5006"),
    );
    install(&host);
    let listens = property(&host, SOCKET, "Listen");
    assert!(
        listens.contains("0.0.0.0:5006") && !listens.contains("5005"),
        "{listens}"
    );
    host.run(&["curl", "-sS", "--fail", "http://127.0.0.1:5006/v2/"]);
}

#[test]
fn a_binary_that_units_can_not_start_is_refused_and_so_is_anybody_but_root() {
    let network = Network::new();
    let host = host_with_binary(&network);
    let before = trace(&host);
    for (folder, why) in [
        ("/tmp", "temporary folder"),
        ("/var/tmp", "temporary folder"),
        ("/root", "homes"),
        ("/home/alice", "homes"),
        ("/srv/target/release", "where it was built"),
    ] {
        let binary = format!("{folder}/registry-agent");
        host.run(&["mkdir", "--parents", folder]);
        host.run(&["cp", BINARY, &binary]);
        let refused = host.try_run(&[&binary, "install"]);
        assert_eq!(refused.code, Some(1), "{refused}");
        for words in [why, &binary, BINARY] {
            assert!(refused.stderr.contains(words), "no `{words}`: {refused}");
        }
    }
    host.run(&["mkdir", "/opt/shared"]);
    host.run(&["cp", BINARY, "/opt/shared/registry-agent"]);
    host.run(&["chmod", "g+w", "/opt/shared/registry-agent"]);
    let refused = host.try_run(&["/opt/shared/registry-agent", "install"]);
    assert!(
        !refused.succeeded() && refused.stderr.contains("others than root may change it"),
        "{refused}"
    );
    for verb in ["install", "uninstall"] {
        let refused = host.try_run(&["runuser", "-u", "nobody", "--", BINARY, verb]);
        let remedy = format!("sudo registry-agent {verb}");
        assert!(
            refused.code == Some(1) && refused.stderr.contains(&remedy),
            "{refused}"
        );
    }
    assert_same(&trace(&host), &before, "nothing is written");
}

#[test]
fn an_upgrade_refuses_nobody() {
    const HAMMER: &str = "\
while [ ! -e /tmp/enough ]; do
    curl -sS --fail --max-time 30 -o /dev/null http://127.0.0.1:5005/v2/ 2>>/tmp/failures
    echo >>/tmp/asked
done";
    let network = Network::new();
    let host = host_with_binary(&network);
    install(&host);
    wait_until_wired(&host);
    let asked = || {
        let lines = host.try_run(&["wc", "--lines", "/tmp/asked"]).stdout;
        let count = lines.split(' ').next().and_then(|count| count.parse().ok());
        count.unwrap_or(0_u32)
    };
    let go_on = || {
        let before = asked();
        poll::until("the clients go on", PATIENCE, || {
            let now = asked();
            if now > before + 20 { Ok(()) } else { Err(now) }
        });
    };
    let mut newer = this_binary();
    thread::scope(|scope| {
        let clients = [(); 2].map(|()| scope.spawn(|| host.try_run(&["sh", "-c", HAMMER])));
        for _ in 0..2 {
            go_on();
            // As packages and install(1) do it: another file takes the name.
            newer.extend_from_slice(b"newer");
            host.write_executable("/usr/local/bin/.newer", &newer);
            host.run(&["mv", "/usr/local/bin/.newer", BINARY]);
            let process = property(&host, AGENT, "MainPID");
            let said = install(&host);
            assert_eq!(said, "asked for a restart of registry-agent.service\n");
            poll::until("the newer one runs", PATIENCE, || {
                let now = property(&host, AGENT, "MainPID");
                let runs = host.try_run(&["cmp", &format!("/proc/{now}/exe"), BINARY]);
                if now != process && runs.succeeded() {
                    Ok(())
                } else {
                    Err((now, runs))
                }
            });
            poll::until("the host's part is back", PATIENCE, || {
                match property(&host, HOST, "ActiveState").as_str() {
                    "active" => Ok(()),
                    other => Err(other.to_owned()),
                }
            });
        }
        go_on();
        host.write("/tmp/enough", "");
        for client in clients {
            client.join().expect("a client").expect_success();
        }
    });
    assert_eq!(host.read("/tmp/failures"), "");
    assert_eq!(property(&host, AGENT, "NRestarts"), "0");
    // The host's part too.
    let process = property(&host, HOST, "MainPID");
    host.run(&["cmp", &format!("/proc/{process}/exe"), BINARY]);
    wait_until_wired(&host);
    assert_eq!(install(&host), "everything is installed already\n");
}

#[test]
fn uninstall_unwires_and_leaves_no_trace() {
    let network = Network::new();
    let host = host_with_binary(&network);
    let uninstall = || -> Finished { host.try_run(&[BINARY, "uninstall"]) };
    let before = trace(&host);
    assert_eq!(uninstall().expect_success(), "nothing was installed\n");
    assert_same(&trace(&host), &before, "nothing was installed");

    install(&host);
    wait_until_wired(&host);
    let docker = property(&host, "docker.service", "MainPID");
    let said = uninstall().expect_success();
    for unit in [SOCKET, AGENT, HOST] {
        let removed = format!("removed /etc/systemd/system/{unit}");
        assert!(said.contains(&removed), "no `{removed}` in\n{said}");
        assert_eq!(property(&host, unit, "LoadState"), "not-found", "{unit}");
    }
    assert_same(&trace(&host), &before, &said);
    let mirrors = "{{json .RegistryConfig.Mirrors}}";
    let mirrors = host.run(&["docker", "info", "--format", mirrors]);
    assert!(["null", "[]"].contains(&mirrors.trim()), "{mirrors}");
    assert_eq!(
        property(&host, "docker.service", "MainPID"),
        docker,
        "docker is not restarted"
    );
    // What was stored is kept, for whoever installs it again.
    host.run(&["test", "-d", "/var/lib/registry-agent"]);

    assert_eq!(uninstall().expect_success(), "nothing was installed\n");
    assert_same(&trace(&host), &before, "nothing was installed");
    let said = install(&host);
    assert!(said.contains("enabled registry-agent.socket"), "{said}");
    wait_until_wired(&host);
    assert_eq!(install(&host), "everything is installed already\n");

    // An agent that crashes takes the host's part down, and pulls it up again.
    let wants = property(&host, AGENT, "Wants");
    assert!(wants.split(' ').any(|unit| unit == HOST), "{wants}");
    let before = property(&host, HOST, "InvocationID");
    host.run(&["systemctl", "kill", "--signal=KILL", AGENT]);
    poll::until("the host's part is back", PATIENCE, || {
        let now = property(&host, HOST, "InvocationID");
        match property(&host, HOST, "ActiveState").as_str() {
            "active" if now != before => Ok(()),
            state => Err((state.to_owned(), now)),
        }
    });
    wait_until_wired(&host);
}

/// What `registry-agent status --json` says once this holds of how the engines are wired.
#[track_caller]
fn wait_until_wiring(host: &Host, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    poll::until(what, PATIENCE, || {
        let said = host.try_run(&[BINARY, "status", "--json"]);
        match serde_json::from_str::<Value>(&said.stdout) {
            Ok(status) if holds(&status["wiring"]) => Ok(status["wiring"].clone()),
            _ => Err(said),
        }
    })
}

#[test]
fn a_file_outside_of_etc_is_wired_after_install_and_refused_where_the_service_may_not_write() {
    const FILE: &str = "/opt/docker/daemon.json";
    const BEFORE: &str = "{\n  \"debug\": false\n}\n";
    const DROP_IN: &str = "/etc/systemd/system/registry-agent-host.service.d/10-write.conf";
    const DOCKER: &str = "\
[Service]
ExecStart=
ExecStart=/usr/sbin/dockerd -H fd:// --config-file=/opt/docker/daemon.json
";
    let network = Network::new();
    let mut host = Host::new(&network, "one", 11);
    host.write_executable(BINARY, &this_binary());
    host.write("/etc/registry-agent/config.yaml", CONFIG);
    host.write("/etc/systemd/system/docker.service.d/own.conf", DOCKER);
    host.write(FILE, BEFORE);
    // Of a time when SELinux was on: most kernels without it let the service set no such label, and
    // it need not. This machine's may, so it is made to refuse.
    host.write(
        &DROP_IN.replace("10-write", "no-labels"),
        "[Service]\nSystemCallFilter=~fsetxattr\n",
    );
    let label = b"system_u:object_r:container_config_t:s0";
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(host.path(FILE), "security.selinux", label, flags).expect("a label");
    host.boot();
    let facts = host.run(&[BINARY, "plan", "--print-facts"]);
    assert!(facts.contains("container_config_t"), "{facts}");

    let said = install(&host);
    assert!(said.contains(&format!("wrote {DROP_IN}")), "{said}");
    wait_until_wired(&host);
    assert!(host.read(FILE).contains(MIRROR));
    assert_eq!(install(&host), "everything is installed already\n");

    // By hand, as whoever has packaged units does not run `install`.
    host.run(&["rm", DROP_IN]);
    host.run(&["systemctl", "stop", HOST]);
    let unwired = host.read(FILE);
    host.run(&["systemctl", "daemon-reload"]);
    host.run(&["systemctl", "start", HOST]);
    let wiring = wait_until_wiring(&host, "it is refused", |wiring| {
        wiring["refusals"][0].is_string()
    });
    let refusal = wiring["refusals"][0].to_string();
    for words in [
        FILE,
        "ReadWritePaths=/opt/docker`",
        "systemctl edit registry-agent-host.service",
        "registry-agent install",
    ] {
        assert!(refusal.contains(words), "no `{words}` in {refusal}");
    }
    assert!(wiring["last_apply"]["failure"].is_null(), "{wiring:#}");
    assert_eq!(host.read(FILE), unwired, "it is not touched");
    let shown = host.run(&[BINARY, "status"]);
    assert!(shown.contains("\nrefused    docker: /opt/"), "{shown}");

    // As it says.
    host.write(
        &DROP_IN.replace("10-write", "override"),
        "[Service]\nReadWritePaths=/opt/docker\n",
    );
    host.run(&["systemctl", "daemon-reload"]);
    host.run(&["systemctl", "restart", HOST]);
    wait_until_wired(&host);
    host.run(&["rm", &DROP_IN.replace("10-write", "override")]);
    let said = install(&host);
    assert!(said.contains(&format!("wrote {DROP_IN}")), "{said}");
    poll::until("the host's part is back", PATIENCE, || {
        match property(&host, HOST, "ReadWritePaths") {
            paths if paths.contains("/opt/docker") => Ok(()),
            paths => Err(paths),
        }
    });
    wait_until_wired(&host);
    host.run(&[BINARY, "uninstall"]);
    assert_eq!(host.read(FILE), BEFORE);
    assert!(!host.path(DROP_IN).exists());
}

#[test]
fn the_hosts_part_goes_by_the_configuration_that_a_drop_in_gives_the_agent() {
    const EDITED: &str = "\
[Service]
ExecStart=
ExecStart=/usr/local/bin/registry-agent run --config ${CONF}
Environment=CONF=/etc/other.yaml REGISTRY_AGENT_HOST__DRIFT=report
EnvironmentFile=/etc/default/registry-agent
";
    const ELSEWHERE: &str = "http://127.0.0.1:5008";
    let network = Network::new();
    let host = host_with_binary(&network);
    host.write(
        "/etc/systemd/system/registry-agent.service.d/override.conf",
        EDITED,
    );
    host.write("/etc/other.yaml", "role: mirror\nlisten: 127.0.0.1:5007\n");
    host.write(
        "/etc/default/registry-agent",
        "REGISTRY_AGENT_LISTEN='127.0.0.1:5008'\n",
    );
    // `install` keeps its ExecStart= in the unit, below the drop-in's.
    install(&host);
    let listens = property(&host, SOCKET, "Listen");
    assert!(listens.contains("127.0.0.1:5008"), "{listens}");
    wait_until_wired_to(&host, ELSEWHERE);
    let wiring = wait_until_wiring(&host, "docker is wired", |wiring| {
        wiring["summary"] == "docker wired"
    });
    assert_eq!(wiring["mirror"], ELSEWHERE);
    assert_eq!(
        wiring["engines"][0],
        format!("docker.service has the mirror {ELSEWHERE}/")
    );
    assert!(wiring["last_apply"]["at"].is_u64(), "{wiring:#}");
    let plan = host.try_run(&[BINARY, "plan"]);
    assert!(
        plan.code == Some(0) && plan.stdout.ends_with("nothing to do\n"),
        "{plan}"
    );
    assert_eq!(install(&host), "everything is installed already\n");
    // The agent's own line is made anew each second.
    poll::until("the agent says so", PATIENCE, || {
        let shown = host.run(&["systemctl", "status", "--no-pager", AGENT]);
        if shown.contains("; docker wired\"") {
            Ok(())
        } else {
            Err(shown)
        }
    });

    // Its drift is the drop-in's, too.
    host.write("/etc/docker/daemon.json", "{}\n");
    let drifted = wait_until_wiring(&host, "drift is left", |wiring| {
        let drift = wiring["drift"].as_str().unwrap_or_default();
        drift.contains("changed by somebody else, and left")
    });
    assert!(drifted["next_step"].is_string(), "{drifted:#}");
}

/// What a person sees, and what each state tells them to do.
#[test]
fn status_says_what_to_do_when_a_part_does_not_run_or_can_not_be_asked() {
    let network = Network::new();
    let host = host_with_binary(&network);
    install(&host);
    wait_until_wired(&host);
    let wired = |wiring: &Value| wiring["summary"] == "docker wired";
    wait_until_wiring(&host, "the host's part says so", wired);
    let nobody = ["runuser", "-u", "nobody", "--", BINARY, "status"];
    let status = || host.try_run(&[BINARY, "status"]);

    // Anybody may look.
    let shown = host.try_run(&nobody);
    assert_eq!(shown.code, Some(0), "{shown}");
    assert!(
        shown.stdout.contains("\nwiring     docker wired"),
        "{shown}"
    );
    host.run(&["chmod", "600", ADMIN]);
    let refused = host.try_run(&nobody);
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(
        refused.stderr.contains("`sudo registry-agent status`"),
        "{refused}"
    );
    host.run(&["chmod", "666", ADMIN]);

    // A broken file is named, with its place, until it is put right.
    host.write("/etc/docker/daemon.json", "{ // mine\n}\n");
    poll::until("the broken file is told of", PATIENCE, || {
        let shown = status();
        let named = shown.stdout.contains("/etc/docker/daemon.json:1:3");
        if named && shown.stdout.contains("Correct it") {
            Ok(())
        } else {
            Err(shown)
        }
    });
    host.write("/etc/docker/daemon.json", "{}\n");
    wait_until_wired(&host);

    // A journal that nobody understands keeps the host's part from running.
    let journal = "/var/lib/registry-agent-host/original.json";
    let kept = host.read(journal);
    host.write(journal, "half of it");
    host.try_run(&["systemctl", "restart", HOST]);
    poll::until("the host's part is told of", PATIENCE, || {
        let shown = status();
        let steps = ["next step", "journalctl --unit=registry-agent-host"];
        if steps.iter().all(|step| shown.stdout.contains(step)) {
            Ok(())
        } else {
            Err(shown)
        }
    });
    let log = host.run(&["journalctl", "--no-pager", "--unit", HOST]);
    assert!(log.contains(journal), "{log}");
    host.write(journal, &kept);
    host.run(&["systemctl", "reset-failed", HOST]);
    host.run(&["systemctl", "restart", HOST]);
    wait_until_wired(&host);

    host.run(&["systemctl", "stop", HOST]);
    let shown = status();
    assert_eq!(shown.code, Some(0), "{shown}");
    assert!(
        shown
            .stdout
            .contains("`systemctl start registry-agent-host.service`"),
        "{shown}"
    );
    host.run(&["systemctl", "stop", AGENT]);
    let refused = status();
    assert_eq!(refused.code, Some(1), "{refused}");
    for step in ["`systemctl status registry-agent`", "--unit=registry-agent"] {
        assert!(refused.stderr.contains(step), "no {step}: {refused}");
    }
}
