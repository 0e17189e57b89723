//! A booted root: systemd-nspawn, and the way in.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cgroup::Cgroup;
use super::tail;
use crate::harness::network::Attachment;
use crate::harness::poll;
use crate::harness::scratch::Scratch;

const BOOT: Duration = Duration::from_secs(90);
const SHUT_DOWN: Duration = Duration::from_secs(90);

/// A container whose systemd has started everything that it starts at boot.
pub struct Container {
    nspawn: Child,
    leader: Pid,
    console: PathBuf,
    _cgroup: Cgroup,
}

impl Container {
    /// Boots `root` at its place in a network, with `binds` (`outside:inside`) mounted.
    pub fn boot(
        machine: &str,
        root: &Path,
        scratch: &Scratch,
        attachment: &Attachment,
        binds: &[String],
    ) -> Self {
        let console = scratch.path().join("console.log");
        let notify_path = scratch.path().join("notify");
        match fs::remove_file(&notify_path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                panic!("removing {}: {error}", notify_path.display())
            }
            _ => {}
        }
        let notify = UnixDatagram::bind(&notify_path)
            .unwrap_or_else(|error| panic!("binding {}: {error}", notify_path.display()));
        let cgroup = Cgroup::new(machine);
        let enter = cgroup.enter();
        let mut nspawn = Command::new(&enter[0]);
        nspawn
            .args(&enter[1..])
            // When the test is killed; the host itself is left to the next run's sweep.
            .args(["setpriv", "--pdeathsig", "KILL"])
            .args(["systemd-nspawn", "--quiet", "--boot"])
            .args([
                "--register=no",
                "--keep-unit",
                "--notify-ready=yes",
                "--settings=no",
            ])
            // What dockerd, and the sandboxes of systemd's units, need.
            .args(["--capability=all", "--system-call-filter=@known"])
            // The root stays as the test wrote it.
            .args(["--resolv-conf=off", "--timezone=off", "--link-journal=no"])
            .arg("--console=pipe")
            .arg(format!("--machine={machine}"))
            .arg(format!("--directory={}", root.display()))
            .arg(format!(
                "--network-namespace-path={}",
                attachment.namespace_path().display()
            ))
            .args(binds.iter().map(|bind| format!("--bind={bind}")))
            .env("NOTIFY_SOCKET", &notify_path)
            // dockerd turns on forwarding in the host's own network.
            .env("SYSTEMD_NSPAWN_API_VFS_WRITABLE", "network")
            // Where the machine has the old control groups too: those would be read-only on the
            // host, and no container could start.
            .env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1")
            .stdin(Stdio::null())
            .stdout(append(&console))
            .stderr(append(&console));
        let mut nspawn = nspawn
            .spawn()
            .unwrap_or_else(|error| panic!("starting systemd-nspawn (is it installed?): {error}"));
        match wait_until_ready(&notify, &mut nspawn) {
            Ok(leader) => Self {
                nspawn,
                leader,
                console,
                _cgroup: cgroup,
            },
            Err(problem) => {
                // The host too: it would outlive nspawn.
                attachment.kill_everything();
                nspawn.kill().ok();
                nspawn.wait().ok();
                panic!(
                    "booting {machine}: {problem}\n--- console\n{}",
                    tail(&console)
                );
            }
        }
    }

    /// What a command is prefixed with to run on the host.
    pub fn enter(&self) -> Vec<String> {
        let leader = self.leader.to_string();
        ["nsenter", "--target", &leader, "--all", "--"]
            .map(ToOwned::to_owned)
            .to_vec()
    }

    /// The host's own view of its files.
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.leader))
    }

    /// The last lines of the console.
    pub fn console(&self) -> String {
        tail(&self.console)
    }

    /// Asks systemd to power off, and waits until it has.
    pub fn shut_down(mut self) {
        let nspawn = i32::try_from(self.nspawn.id()).expect("a process id");
        // nspawn passes it on as the signal by which systemd powers off.
        kill(Pid::from_raw(nspawn), Signal::SIGTERM).expect("signalling systemd-nspawn");
        poll::until("shutting a host down", SHUT_DOWN, || {
            self.nspawn
                .try_wait()
                .expect("waiting for systemd-nspawn")
                .ok_or("still running")
        });
    }

    /// Kills every process of it.
    pub fn kill(mut self) {
        // The kernel kills what is in its namespace with the first process. Killing nspawn would
        // only orphan that.
        if let Err(error) = kill(self.leader, Signal::SIGKILL) {
            eprintln!("killing a host's first process, {}: {error}", self.leader);
        }
        let ended = poll::within(Duration::from_secs(30), || {
            self.nspawn
                .try_wait()
                .map_err(|error| error.to_string())?
                .ok_or("running".to_owned())
        });
        if let Err(state) = ended {
            eprintln!("systemd-nspawn is still {state} after its host was killed");
        }
    }
}

/// Waits for nspawn to name the leader, and for the leader's systemd to say that it is ready.
fn wait_until_ready(notify: &UnixDatagram, nspawn: &mut Child) -> Result<Pid, String> {
    let end = Instant::now() + BOOT;
    let mut leader = None;
    let mut message = [0; 4096];
    notify
        .set_read_timeout(Some(Duration::from_millis(200)))
        .expect("a read timeout");
    while Instant::now() < end {
        let length = match notify.recv(&mut message) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                match nspawn.try_wait().expect("waiting for systemd-nspawn") {
                    Some(status) => return Err(format!("systemd-nspawn ended, {status}")),
                    None => continue,
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(format!("reading the readiness socket: {error}")),
        };
        let mut ready = false;
        for line in String::from_utf8_lossy(&message[..length]).lines() {
            if let Some(pid) = line.strip_prefix("X_NSPAWN_LEADER_PID=") {
                leader = pid.parse().ok().map(Pid::from_raw);
            }
            ready |= line == "READY=1";
        }
        if let (true, Some(leader)) = (ready, leader) {
            return Ok(leader);
        }
    }
    Err(format!("not ready within {BOOT:?}"))
}

fn append(path: &Path) -> File {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .open(path)
        .unwrap_or_else(|error| panic!("opening {}: {error}", path.display()))
}
