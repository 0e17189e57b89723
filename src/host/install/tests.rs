use std::sync::Mutex;

use super::*;
use crate::config::{self, Sources};

/// A service manager that takes every unit as it is told to.
#[derive(Default)]
struct Manager {
    units: Mutex<BTreeMap<String, UnitFacts>>,
    calls: Mutex<Vec<String>>,
    /// The call that it refuses.
    refuses: Option<&'static str>,
    /// What it says then.
    problem: Option<&'static str>,
    /// The links of `[Install]` are there, whatever is loaded.
    enabled_already: bool,
}

impl Manager {
    fn call(&self, call: &str) -> Result<(), String> {
        if self.refuses == Some(call) {
            return Err(self.problem.unwrap_or("no").to_owned());
        }
        self.calls.lock().unwrap().push(call.to_owned());
        Ok(())
    }

    fn set(&self, names: &[&str], change: impl Fn(&mut UnitFacts)) {
        let mut units = self.units.lock().unwrap();
        for name in names {
            change(units.entry((*name).to_owned()).or_default());
        }
    }

    /// What was called since the last look.
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl Units for Manager {
    async fn unit(&self, name: &str) -> Result<UnitFacts, String> {
        let units = self.units.lock().unwrap();
        Ok(units.get(name).cloned().unwrap_or(UnitFacts {
            load_state: "not-found".to_owned(),
            active_state: "inactive".to_owned(),
            ..UnitFacts::default()
        }))
    }

    async fn daemon_reload(&self) -> Result<(), String> {
        self.call("reload")?;
        self.set(&[AGENT, SOCKET, HOST], |unit| {
            unit.load_state = "loaded".to_owned();
            unit.need_daemon_reload = false;
        });
        Ok(())
    }

    async fn enable(&self, units: &[&str]) -> Result<bool, String> {
        self.set(units, |unit| unit.unit_file_state = "enabled".to_owned());
        self.call(&format!("enable {}", units.join(" ")))?;
        Ok(!self.enabled_already)
    }

    async fn disable(&self, units: &[&str]) -> Result<bool, String> {
        self.call(&format!("disable {}", units.join(" ")))?;
        Ok(true)
    }

    async fn start(&self, unit: &str) -> Result<(), String> {
        self.set(&[unit], |unit| {
            unit.active_state = "active".to_owned();
            unit.main_pid = 1;
        });
        self.call(&format!("start {unit}"))
    }

    async fn stop(&self, unit: &str) -> Result<(), String> {
        self.set(&[unit], |unit| unit.active_state = "inactive".to_owned());
        self.call(&format!("stop {unit}"))
    }

    async fn enqueue_restart(&self, unit: &str) -> Result<(), String> {
        self.call(&format!("restart {unit}"))
    }

    async fn create_users(&self) -> Result<(), String> {
        self.call("users")
    }
}

const BINARY: &str = "/usr/local/bin/registry-agent";
static NOWHERE: BTreeSet<PathBuf> = BTreeSet::new();
/// What the engines of most hosts need.
const ETC_ONLY: Option<&BTreeSet<PathBuf>> = Some(&NOWHERE);

/// A root with the binary, which is what the process 1 runs.
fn host() -> (tempfile::TempDir, Manager) {
    let root = tempfile::tempdir().unwrap();
    let binary = root.path().join(&BINARY[1..]);
    replace(&binary, "the binary").unwrap();
    let exe = root.path().join("proc/1/exe");
    fs::create_dir_all(exe.parent().unwrap()).unwrap();
    fs::hard_link(&binary, exe).unwrap();
    (root, Manager::default())
}

fn settings(text: &str) -> Settings {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    replace(&file, text).unwrap();
    let sources = Sources {
        config: Some(file),
        distribution: None,
        environment: vec![
            ("STATE_DIRECTORY".to_owned(), STATE_DIRECTORY.to_owned()),
            ("RUNTIME_DIRECTORY".to_owned(), RUNTIME_DIRECTORY.to_owned()),
        ],
    };
    config::load(&sources).unwrap().settings
}

/// [`super::install`] with what is told at once.
async fn install(
    root: &Path,
    binary: &Path,
    settings: &Settings,
    folders: Option<&BTreeSet<PathBuf>>,
    units: &Manager,
) -> Result<Done, InstallError> {
    let told = Told {
        settings: Arc::new(settings.clone()),
        folders: folders.cloned(),
    };
    super::install(root, binary, async { Ok(told) }, units).await
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(future)
}

fn files(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root.join("etc")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path.strip_prefix(root).unwrap().display().to_string());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn units_are_written_enabled_and_started_once() {
    let (root, manager) = host();
    let settings = settings("role: mirror\n");
    let install = || install(root.path(), BINARY.as_ref(), &settings, ETC_ONLY, &manager);
    run(install()).unwrap();
    assert_eq!(
        files(root.path()),
        [
            "etc/systemd/system/registry-agent-host.service",
            "etc/systemd/system/registry-agent.service",
            "etc/systemd/system/registry-agent.socket",
            "etc/sysusers.d/registry-agent.conf",
        ]
    );
    assert_eq!(
        manager.calls(),
        [
            "users",
            "reload",
            "enable registry-agent.socket registry-agent.service registry-agent-host.service",
            // The agent's Wants= are links, and known only then.
            "reload",
            "start registry-agent.socket",
            "start registry-agent.service",
            "start registry-agent-host.service",
        ]
    );
    for unit in [AGENT, HOST] {
        let text = fs::read_to_string(root.path().join(UNITS[0]).join(unit)).unwrap();
        assert!(
            text.contains("\nExecStart=/usr/local/bin/registry-agent "),
            "{text}"
        );
        assert!(!text.contains(PACKAGED), "{text}");
    }
    assert!(run(install()).unwrap().is_empty());
    assert_eq!(manager.calls(), [""; 0]);
}

#[test]
fn what_a_package_has_installed_is_not_written_again() {
    let (root, manager) = host();
    let settings = settings("role: mirror\n");
    let binary = root.path().join(&PACKAGED[1..]);
    replace(&binary, "the binary").unwrap();
    for (name, text) in [
        (AGENT, AGENT_UNIT),
        (SOCKET, SOCKET_UNIT),
        (HOST, HOST_UNIT),
    ] {
        replace(&root.path().join(UNITS[1]).join(name), text).unwrap();
    }
    replace(&root.path().join(SYSUSERS[1]).join(SYSUSERS_FILE), USERS).unwrap();
    run(install(
        root.path(),
        PACKAGED.as_ref(),
        &settings,
        ETC_ONLY,
        &manager,
    ))
    .unwrap();
    assert_eq!(files(root.path()), [""; 0]);
    let calls = manager.calls();
    assert!(
        calls[0].starts_with("enable ") && calls[1] == "reload" && calls.len() == 5,
        "{calls:?}"
    );
}

#[test]
fn the_socket_listens_where_the_configuration_says() {
    for (text, listens) in [
        ("role: mirror\n", None),
        ("listen: 127.0.0.1:5000\n", None),
        (
            "listen: \":5000\"\n",
            Some("[::]:5000 /run/registry-agent/admin.sock"),
        ),
        (
            "listen: 10.0.0.1:80\nadmin: 127.0.0.1:5001\n",
            Some("10.0.0.1:80 127.0.0.1:5001"),
        ),
        (
            "admin: \"unix:/srv/100%/admin.sock\"\n",
            Some("127.0.0.1:5000 /srv/100%%/admin.sock"),
        ),
        // systemd would accept for nobody.
        (
            "role: client\nhost: { mirror: \"http://mirror\" }\n",
            Some("/run/registry-agent/admin.sock"),
        ),
    ] {
        let drop_in = drop_in(&settings(text));
        let lines = drop_in.as_ref().map(|text| {
            let lines = text
                .lines()
                .filter_map(|line| line.strip_prefix("ListenStream="));
            lines.collect::<Vec<_>>().join(" ").trim().to_owned()
        });
        assert_eq!(lines.as_deref(), listens, "{text}");
    }
}

#[test]
fn other_addresses_close_and_open_the_socket_and_other_units_only_restart() {
    let (root, manager) = host();
    let install = |text| {
        let settings = settings(text);
        run(install(
            root.path(),
            BINARY.as_ref(),
            &settings,
            ETC_ONLY,
            &manager,
        ))
        .unwrap();
        manager.calls()
    };
    install("role: mirror\n");
    let calls = install("listen: \":5000\"\n");
    assert_eq!(
        calls,
        [
            "reload",
            "stop registry-agent.service",
            "stop registry-agent.socket",
            "start registry-agent.socket",
            "start registry-agent.service",
            "start registry-agent-host.service",
        ]
    );
    let unit = root.path().join(UNITS[0]).join(AGENT);
    replace(&unit, "[Service]\nExecStart=/an/older/one\n").unwrap();
    let calls = install("listen: \":5000\"\n");
    assert_eq!(calls, ["reload", "restart registry-agent.service"]);
}

#[test]
fn the_hosts_part_may_write_where_the_engines_files_are() {
    let (root, manager) = host();
    let settings = settings("role: mirror\n");
    let folders = |list: &[&str]| -> BTreeSet<PathBuf> { list.iter().map(PathBuf::from).collect() };
    let install = |folders: Option<&BTreeSet<PathBuf>>| {
        let done = install(root.path(), BINARY.as_ref(), &settings, folders, &manager);
        run(done).unwrap();
        manager.calls()
    };
    let drop_in = || fs::read_to_string(root.path().join(HOST_DROP_IN)).ok();
    install(ETC_ONLY);
    assert_eq!(drop_in(), None);
    let two = folders(&["/opt/docker", "/srv/of 100%"]);
    // The agent, whose unit is the same, goes on.
    let restarted = ["reload", "restart registry-agent-host.service"];
    assert_eq!(install(Some(&two)), restarted);
    let text = drop_in().unwrap();
    let section = text.split_once("[Service]\n").unwrap().1;
    assert_eq!(
        section,
        "ReadWritePaths=\"-/opt/docker\"\nReadWritePaths=\"-/srv/of 100%%\"\n"
    );
    assert_eq!(install(Some(&two)), [""; 0]);
    // Not known: docker's file is broken, say.
    assert_eq!(install(None), [""; 0]);
    assert_eq!(drop_in().unwrap(), text);
    run(uninstall(root.path(), &manager, async { Ok(()) })).unwrap();
    assert_eq!(files(root.path()), [""; 0]);
    let folder = root.path().join(HOST_DROP_IN);
    assert!(!folder.parent().unwrap().exists());
    // A file that somebody has filled is not read to its end.
    let unit = root.path().join(UNITS[0]).join(AGENT);
    replace(&unit, &"#".repeat(usize::try_from(LIMIT).unwrap() + 1)).unwrap();
    let refused = super::tests::install(root.path(), BINARY.as_ref(), &settings, None, &manager);
    let said = run(refused).unwrap_err().to_string();
    let unit = unit.display().to_string();
    assert!(
        said.contains(&unit) && said.contains("larger than 1048576 bytes"),
        "{said}"
    );
}

#[test]
fn a_socket_that_was_opened_before_the_agent_is_opened_anew_where_it_has_to_be() {
    let (root, manager) = host();
    let install = |text: &str| {
        let settings = settings(text);
        run(install(
            root.path(),
            BINARY.as_ref(),
            &settings,
            ETC_ONLY,
            &manager,
        ))
        .unwrap();
        manager.calls()
    };
    install("role: mirror\n");
    // As at a boot with another configuration than the last one's.
    for state in ["inactive", "activating"] {
        manager.set(&[AGENT, HOST], |unit| unit.active_state = state.to_owned());
        let port = 5000 + state.len();
        let text = format!("listen: 127.0.0.1:{port}\n");
        let calls = install(&text);
        let at = |wanted: &str| calls.iter().position(|call| call == wanted);
        let (closed, opened) = (
            at("stop registry-agent.socket"),
            at("start registry-agent.socket"),
        );
        assert!(closed.is_some() && closed < opened, "{state}: {calls:?}");
        assert!(
            calls.contains(&"start registry-agent.service".to_owned()),
            "{calls:?}"
        );
    }
}

#[test]
fn a_newer_binary_is_started_and_edited_units_are_read_again() {
    let (root, manager) = host();
    let settings = settings("role: mirror\n");
    let install = || {
        run(install(
            root.path(),
            BINARY.as_ref(),
            &settings,
            ETC_ONLY,
            &manager,
        ))
        .unwrap();
        manager.calls()
    };
    install();
    manager.set(&[SOCKET], |unit| unit.need_daemon_reload = true);
    assert_eq!(install(), ["reload"]);
    replace(&root.path().join(&BINARY[1..]), "a newer one").unwrap();
    assert_eq!(install(), ["restart registry-agent.service"]);
}

#[test]
fn a_binary_that_the_units_could_not_start_is_refused_with_what_to_do() {
    let (root, manager) = host();
    let settings = settings("role: mirror\n");
    for binary in [
        "/home/alice/registry-agent",
        "/root/registry-agent",
        "/tmp/registry-agent",
        "/srv/build/target/release/registry-agent",
    ] {
        let refused = run(install(
            root.path(),
            binary.as_ref(),
            &settings,
            ETC_ONLY,
            &manager,
        ));
        let said = refused.unwrap_err().to_string();
        assert!(
            said.contains(binary) && said.contains("/usr/local/bin"),
            "{said}"
        );
    }
    let writable = fs::Permissions::from_mode(0o777);
    fs::set_permissions(root.path().join(&BINARY[1..]), writable).unwrap();
    let refused = run(install(
        root.path(),
        BINARY.as_ref(),
        &settings,
        ETC_ONLY,
        &manager,
    ));
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("others than root")
    );
    assert_eq!(files(root.path()), [""; 0]);
    assert_eq!(manager.calls(), [""; 0]);
}

#[test]
fn uninstall_unwires_while_the_agent_serves_and_leaves_no_file() {
    let (root, manager) = host();
    let settings = settings("listen: \":5000\"\n");
    run(install(
        root.path(),
        BINARY.as_ref(),
        &settings,
        ETC_ONLY,
        &manager,
    ))
    .unwrap();
    manager.calls();
    let unwire = async { manager.call("unwire") };
    run(uninstall(root.path(), &manager, unwire)).unwrap();
    assert_eq!(
        manager.calls(),
        [
            "stop registry-agent-host.service",
            "unwire",
            "stop registry-agent.service",
            "stop registry-agent.socket",
            "disable registry-agent-host.service registry-agent.service registry-agent.socket",
            "reload",
        ]
    );
    assert_eq!(files(root.path()), [""; 0]);
    assert!(!root.path().join(SOCKET_DROP_IN).parent().unwrap().exists());
}

#[test]
fn an_operators_own_drop_in_survives_uninstall() {
    let (root, manager) = host();
    let settings = settings("listen: \":5000\"\n");
    run(install(
        root.path(),
        BINARY.as_ref(),
        &settings,
        ETC_ONLY,
        &manager,
    ))
    .unwrap();
    let own = root.path().join(SOCKET_DROP_IN).with_file_name("own.conf");
    replace(&own, "[Socket]\nBacklog=1\n").unwrap();
    run(uninstall(root.path(), &manager, async { Ok(()) })).unwrap();
    assert!(own.exists());
}

#[test]
fn engines_that_stay_wired_keep_the_agent_that_they_need() {
    let (root, manager) = host();
    let settings = settings("role: mirror\n");
    run(install(
        root.path(),
        BINARY.as_ref(),
        &settings,
        ETC_ONLY,
        &manager,
    ))
    .unwrap();
    let before = files(root.path());
    let unwire = async { Err("docker does not answer".to_owned()) };
    let refused = run(uninstall(root.path(), &manager, unwire));
    let said = refused.unwrap_err().to_string();
    assert!(said.contains("docker does not answer"), "{said}");
    assert_eq!(files(root.path()), before);
    assert_eq!(run(manager.unit(AGENT)).unwrap().active_state, "active");
}

#[test]
fn what_the_agent_is_told_is_asked_when_its_unit_is_loaded() {
    let (root, manager) = host();
    let told = async {
        assert_eq!(manager.calls(), ["users", "reload"]);
        Err("EnvironmentFile= /etc/default/x is not there".to_owned())
    };
    let refused = super::install(root.path(), BINARY.as_ref(), told, &manager);
    let said = run(refused).unwrap_err().to_string();
    assert!(said.contains("/etc/default/x is not there"), "{said}");
    assert_eq!(manager.calls(), [""; 0], "nothing is started");
}

#[test]
fn what_systemd_refuses_says_what_was_asked_for() {
    let (root, mut manager) = host();
    manager.refuses = Some("start registry-agent.service");
    let settings = settings("role: mirror\n");
    let refused = run(install(
        root.path(),
        BINARY.as_ref(),
        &settings,
        ETC_ONLY,
        &manager,
    ));
    let said = refused.unwrap_err().to_string();
    assert!(said.contains("start registry-agent.service: no"), "{said}");
}

#[test]
fn what_is_enabled_already_is_not_said_to_be_enabled() {
    let (root, mut manager) = host();
    manager.enabled_already = true;
    let settings = settings("role: mirror\n");
    let done = run(install(
        root.path(),
        BINARY.as_ref(),
        &settings,
        ETC_ONLY,
        &manager,
    ));
    let done = done.unwrap().join("\n");
    assert!(!done.contains("enabled"), "{done}");
    let calls = manager.calls();
    let reloads = calls.iter().filter(|call| *call == "reload");
    assert_eq!(reloads.count(), 1, "{calls:?}");
}

#[test]
fn a_unit_that_somebody_has_masked_is_refused_and_stays_masked() {
    for loaded in [true, false] {
        let (root, manager) = host();
        let mask = root.path().join(UNITS[0]).join(HOST);
        if loaded {
            manager.set(&[HOST], |unit| unit.load_state = "masked".to_owned());
        } else {
            fs::create_dir_all(mask.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink("/dev/null", &mask).unwrap();
        }
        let before = files(root.path());
        let settings = settings("role: mirror\n");
        let refused = run(install(
            root.path(),
            BINARY.as_ref(),
            &settings,
            ETC_ONLY,
            &manager,
        ));
        let said = refused.unwrap_err().to_string();
        let remedy = "`systemctl unmask registry-agent-host.service`";
        assert!(said.contains(remedy), "{said}");
        assert_eq!(files(root.path()), before);
        assert_eq!(manager.calls(), [""; 0]);
        assert_eq!(mask.is_symlink(), !loaded);
    }
}

#[test]
fn systemd_never_gives_up_a_service_however_often_it_is_started() {
    for unit in [AGENT_UNIT, HOST_UNIT] {
        let (head, rest) = unit.split_once("\n[Service]\n").unwrap();
        // systemd.unit(5): the limit is of [Unit], and 0 is none.
        assert!(head.contains("\nStartLimitIntervalSec=0\n"), "{head}");
        assert!(!rest.contains("StartLimit"), "{rest}");
    }
}

#[test]
fn an_address_that_somebody_has_is_named_when_its_socket_does_not_start() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let (root, mut manager) = host();
    manager.refuses = Some("start registry-agent.socket");
    manager.problem = Some("can't start registry-agent.socket: it did not");
    let refused = run(install(
        root.path(),
        BINARY.as_ref(),
        &settings(&format!("listen: {address}\n")),
        ETC_ONLY,
        &manager,
    ));
    let said = refused.unwrap_err().to_string();
    assert_eq!(said.matches("can't start").count(), 1, "{said}");
    let listen = format!("{address} (`listen`) can't be opened");
    assert!(said.contains(&listen) && said.contains("in use"), "{said}");
}
