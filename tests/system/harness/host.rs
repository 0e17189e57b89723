//! Hosts: Debian roots booted by systemd-nspawn, with a real systemd and real daemons.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::mount::{MsFlags, mount};

use super::authority::Authority;
use super::command::{self, Finished};
use super::network::{Attachment, Network};
use super::scratch::{Scratch, host_image, unique_name};
use container::Container;

mod cgroup;
mod container;

pub use cgroup::{hierarchies, remove as remove_cgroup};

/// How long a command on a host may take before it is killed, unless told otherwise.
const COMMAND: Duration = Duration::from_mins(2);

/// What keeps images below /var/lib; `containers` are podman's.
const ENGINES: [&str; 3] = ["docker", "containerd", "containers"];

/// One host. Made powered off, so that files can be in place before its first boot.
pub struct Host {
    label: String,
    machine: String,
    // Before the rest: a container is gone before its root and network are.
    container: Option<Container>,
    root: PathBuf,
    scratch: Scratch,
    attachment: Attachment,
}

impl Host {
    /// Makes a host with the address 198.18.0.`last`, powered off.
    pub fn new(network: &Network, label: &str, last: u8) -> Self {
        let scratch = Scratch::new(label);
        let root = PathBuf::from(scratch.folder("root"));
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            host_image().display(),
            scratch.folder("upper"),
            scratch.folder("work")
        );
        mount(
            Some("overlay"),
            &root,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap_or_else(|error| {
            panic!(
                "mounting an overlay ({options}): {error}. The cache folder must be on a \
                     plain file system such as ext4 or xfs; XDG_CACHE_HOME moves it"
            )
        });
        // An overlay can't be the upper layer of an engine's own.
        for folder in ENGINES {
            scratch.folder(folder);
        }
        let host = Self {
            label: label.to_owned(),
            machine: unique_name(label),
            container: None,
            root,
            scratch,
            attachment: network.join(label, last),
        };
        // Its own for good, as an installed host's: journals of earlier boots stay its own.
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid").expect("a random id");
        host.write("/etc/machine-id", &id.replace('-', ""));
        host.write("/etc/hostname", &format!("{label}\n"));
        host.write(
            "/etc/hosts",
            &format!("127.0.0.1 localhost\n127.0.1.1 {label}\n"),
        );
        host
    }

    /// The host's address.
    pub fn address(&self) -> std::net::IpAddr {
        self.attachment.address()
    }

    /// Powers on, and waits until systemd has started everything that it starts at boot.
    pub fn boot(&mut self) {
        assert!(self.container.is_none(), "{} is up already", self.label);
        let binds = ENGINES.map(|name| format!("{}:/var/lib/{name}", self.scratch.at(name)));
        self.container = Some(Container::boot(
            &self.machine,
            &self.root,
            &self.scratch,
            &self.attachment,
            &binds,
        ));
    }

    /// Shuts down in order, as `systemctl poweroff` does.
    pub fn shut_down(&mut self) {
        self.container
            .take()
            .expect("a host that is up")
            .shut_down();
    }

    /// Ends every process at once, as losing power does.
    pub fn kill(&mut self) {
        self.container.take().expect("a host that is up").kill();
    }

    /// Shuts down in order and boots again.
    pub fn reboot(&mut self) {
        self.shut_down();
        self.boot();
    }

    /// Pulls the network cable.
    pub fn cut(&self) {
        self.attachment.cut();
    }

    /// Plugs the network cable in again.
    pub fn restore(&self) {
        self.attachment.restore();
    }

    /// Runs a command to its end and returns its standard output; panics with all of its output
    /// if it fails. Before the boot it runs in the root, without daemons.
    #[track_caller]
    pub fn run(&self, argv: &[&str]) -> String {
        self.try_run(argv).expect_success()
    }

    /// Runs a command to its end. It is killed (exit code 137) when it takes over two minutes.
    #[track_caller]
    pub fn try_run(&self, argv: &[&str]) -> Finished {
        self.try_run_within(COMMAND, argv)
    }

    /// Runs a command, which is killed (exit code 137) at the deadline.
    #[track_caller]
    pub fn try_run_within(&self, deadline: Duration, argv: &[&str]) -> Finished {
        let root = self.root.display().to_string();
        let enter = match &self.container {
            Some(container) => container.enter(),
            None => vec!["chroot".to_owned(), root],
        };
        let seconds = deadline.as_secs_f64().to_string();
        let environment = [
            "/usr/bin/env",
            "--ignore-environment",
            "HOME=/root",
            "LANG=C.UTF-8",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            // Inside, so that what is killed is the command and not only the way in.
            "timeout",
            "--signal=KILL",
            &seconds,
        ];
        let enter: Vec<&str> = enter.iter().map(String::as_str).collect();
        command::finish(&[&enter, &environment[..], argv].concat(), b"")
    }

    /// Writes a file, readable by all, and the folders above it.
    #[track_caller]
    pub fn write(&self, path: &str, contents: &str) {
        self.write_with_mode(path, contents.as_bytes(), 0o644);
    }

    /// Writes an executable file, and the folders above it.
    #[track_caller]
    pub fn write_executable(&self, path: &str, contents: &[u8]) {
        self.write_with_mode(path, contents, 0o755);
    }

    /// Copies an executable file, or a package, of this machine.
    #[track_caller]
    pub fn copy(&self, from: &Path, to: &str) {
        let bytes = fs::read(from);
        let bytes = bytes.unwrap_or_else(|error| panic!("reading {}: {error}", from.display()));
        self.write_executable(to, &bytes);
    }

    #[track_caller]
    fn write_with_mode(&self, path: &str, contents: &[u8], mode: u32) {
        let path = self.path(path);
        let folder = path.parent().expect("a file is in a folder");
        let written = fs::create_dir_all(folder).and_then(|()| {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(mode)
                .open(&path)?;
            file.write_all(contents)?;
            // The mode above is cut by the umask, and does nothing to a file that is there.
            file.set_permissions(fs::Permissions::from_mode(mode))
        });
        written.unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
    }

    /// A file's text.
    #[track_caller]
    pub fn read(&self, path: &str) -> String {
        let path = self.path(path);
        fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("reading {}: {error}", path.display()))
    }

    /// A path of the host as this machine sees it, its /run and /tmp included while it is up.
    pub fn path(&self, path: &str) -> PathBuf {
        let relative = path.strip_prefix('/').expect("an absolute path");
        match &self.container {
            Some(container) => container.root().join(relative),
            None => self.root.join(relative),
        }
    }

    /// Adds names for `address` to /etc/hosts.
    pub fn add_names(&self, address: std::net::IpAddr, names: &[&str]) {
        let hosts = self.read("/etc/hosts");
        self.write(
            "/etc/hosts",
            &format!("{hosts}{address} {}\n", names.join(" ")),
        );
    }

    /// Adds an authority to the trust store, as `name`. Daemons that run already have read theirs.
    pub fn trust(&self, name: &str, authority: &Authority) {
        self.write(
            &format!("/usr/local/share/ca-certificates/{name}.crt"),
            &authority.pem(),
        );
        self.run(&["update-ca-certificates"]);
    }

    /// What a person would look at first, as far as it can be had.
    fn print_diagnosis(&self) {
        let up = self.container.is_some();
        eprintln!(
            "=== host {} ({}), {}",
            self.label,
            self.address(),
            if up { "up" } else { "off" }
        );
        if let Some(container) = &self.container {
            eprintln!("--- console\n{}", container.console());
            let units = ["registry-agent.service", "docker.service"];
            let status = [
                &["systemctl", "--no-pager", "--lines=0", "status"],
                &units[..],
            ]
            .concat();
            eprintln!("{}", self.try_run_within(Duration::from_secs(10), &status));
        }
        let journal = [
            "journalctl",
            "--no-pager",
            "--quiet",
            "--boot=all",
            "--lines=300",
        ];
        eprintln!("{}", self.try_run_within(Duration::from_secs(10), &journal));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if thread::panicking() {
            self.print_diagnosis();
        }
        if let Some(container) = self.container.take() {
            container.kill();
        }
    }
}

/// The console's last lines, for a host that did not come up.
fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(100)..].join("\n")
}
