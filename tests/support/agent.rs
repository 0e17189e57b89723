//! The agent as its users have it: the binary, a configuration file, signals and exit codes.

use std::io::Read as _;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::{Client, Reply, Request};
use super::disk::Disk;
use super::image::{Blob, Image, Manifest};
use super::upstream::Upstream;
use super::{PATIENCE, eventually, own_address, write_file};

const BINARY: &str = env!("CARGO_BIN_EXE_registry-agent");

/// How an agent is to run: its folder, configuration and environment.
#[must_use]
pub struct Setup {
    /// Goes before the folder that it is in.
    disk: Option<Disk>,
    folder: TempDir,
    address: Ipv4Addr,
    config: Value,
    environment: Vec<(String, String)>,
    /// Sockets that are passed to it as systemd does: the registry's, the admin listener's.
    passed: Vec<OwnedFd>,
    /// How many descriptors it may have open, softly and hard.
    descriptors: Option<(u32, u32)>,
}

impl Setup {
    /// A mirror of nothing yet. Tags stay fresh for the length of a test unless it says otherwise.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let address = own_address();
        let config = json!({
            "role": "mirror",
            "listen": format!("{address}:5000"),
            "admin": format!("{address}:5001"),
            // However full the disk is that the tests run on.
            "storage": {
                "filesystem": {"root": folder.path().join("store")},
                "cache": {"limit": "100%"},
            },
            "upstreams": [],
            "freshness": {"window": "1h", "deadline": "5s"},
            "timeouts": {},
            "log": {"level": "debug", "format": "json"},
        });
        Self {
            disk: None,
            folder,
            address,
            config,
            environment: Vec::new(),
            passed: Vec::new(),
            descriptors: None,
        }
    }

    /// Passes it a socket at each start, as systemd does; two at most.
    pub fn pass(mut self, socket: impl Into<OwnedFd>) -> Self {
        self.passed.push(socket.into());
        assert!(
            self.passed.len() <= 2,
            "there is no way to pass a third one"
        );
        self
    }

    /// An agent that nobody configured, which is then on 127.0.0.1.
    pub fn unconfigured() -> Self {
        Self {
            address: Ipv4Addr::LOCALHOST,
            config: Value::Null,
            ..Self::new()
        }
    }

    /// A mirror of this upstream, which stands for Docker Hub.
    pub fn mirror(hub: &Upstream) -> Self {
        Self::new().upstream("docker.io", hub)
    }

    /// A registry that takes pushes for `mycompany/*`, beside a mirror of what nobody asks for.
    pub fn hosting() -> Self {
        let nowhere = format!("http://{}:1", own_address());
        let mut setup = Self::new().set("hosted", json!(["mycompany/*"]));
        setup.config["upstreams"] = json!([{"registry": "docker.io", "url": nowhere}]);
        setup
    }

    /// Mirrors one registry more.
    pub fn upstream(mut self, registry: &str, upstream: &Upstream) -> Self {
        let upstreams = self.config["upstreams"].as_array_mut().expect("a list");
        upstreams.push(json!({"registry": registry, "url": upstream.url()}));
        self
    }

    /// Asks the first upstream as this account.
    pub fn credentials(mut self, user: &str, password: &str) -> Self {
        let file = self.file("password", password.as_bytes());
        self.config["upstreams"][0]["credentials"] =
            json!({"username": user, "password_file": file});
        self
    }

    /// Gives everybody what only that account can see.
    pub fn share_private(mut self) -> Self {
        self.config["upstreams"][0]["share_private"] = true.into();
        self
    }

    /// Asks the first upstream at these places, in turn.
    pub fn at(mut self, urls: &[&str]) -> Self {
        self.config["upstreams"][0]["url"] = json!(urls);
        self
    }

    /// Sets a key of the configuration (`freshness.window`).
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        set(&mut self.config, key, value.into());
        self
    }

    /// Keeps its storage on a disk of so many bytes.
    pub fn small_disk(mut self, bytes: usize) -> Self {
        self.disk = Some(Disk::mount(&self.folder.path().join("store"), bytes));
        self
    }

    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// May have so many descriptors open, `soft` of them without asking for more.
    pub fn descriptors(mut self, soft: u32, hard: u32) -> Self {
        self.descriptors = Some((soft, hard));
        self
    }

    /// A file in the agent's folder.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        write_file(&path, content);
        path
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where it is to listen.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Starts the agent and waits until it is ready.
    #[track_caller]
    pub fn start(self) -> Agent {
        let mut agent = self.spawn();
        agent.wait_until_ready();
        agent
    }

    /// Starts the agent and waits for nothing.
    pub fn spawn(self) -> Agent {
        if !self.config.is_null() {
            // JSON is YAML.
            self.file("config.yaml", self.config.to_string().as_bytes());
        }
        let process = Process::start(&self);
        Agent {
            setup: self,
            process,
        }
    }

    /// Starts the agent, which is to give up by itself.
    #[track_caller]
    pub fn run(self) -> Exit {
        self.spawn().exit()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let command = match self.descriptors {
            None => Command::new(BINARY),
            // A shell that becomes the agent: limits are inherited.
            Some((soft, hard)) => {
                let mut shell = Command::new("/bin/sh");
                let script = format!(r#"ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$0" "$@""#);
                shell.args(["-c", &script, BINARY]);
                shell
            }
        };
        self.command_of(command, arguments)
    }

    /// `run`, with the sockets from the third file descriptor on: `sd_listen_fds(3)`.
    fn run_command(&self) -> Command {
        if self.passed.is_empty() {
            let mut command = self.command(&["run"]);
            command.stdout(Stdio::null());
            return command;
        }
        let script = format!(
            "LISTEN_PID=$$ LISTEN_FDS={} exec {BINARY} \"$@\" 3<&0 4<&1 </dev/null >/dev/null",
            self.passed.len()
        );
        let shell = Command::new("/bin/sh");
        let mut command = self.command_of(shell, &["-c", &script, "sh", "run"]);
        let mut passed = self.passed.iter();
        let mut next = || {
            let fd = passed
                .next()
                .map(|fd| fd.try_clone().expect("a descriptor"));
            fd.map_or_else(Stdio::null, Stdio::from)
        };
        command.stdin(next()).stdout(next());
        command
    }

    fn command_of(&self, mut command: Command, arguments: &[&str]) -> Command {
        // Nothing of the environment the tests run in may change what they see.
        command
            .env_clear()
            .env("HOME", self.folder.path())
            .current_dir(self.folder.path());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.args(arguments).stdin(Stdio::null());
        command
    }
}

fn set(config: &mut Value, key: &str, value: Value) {
    *key.split('.').fold(config, |at, part| &mut at[part]) = value;
}

/// A process and what it has written to its standard error.
struct Process {
    child: Child,
    log: Arc<Mutex<Vec<u8>>>,
    reading: Option<JoinHandle<()>>,
}

impl Process {
    fn start(setup: &Setup) -> Self {
        let config = setup.folder.path().join("config.yaml");
        let mut command = setup.run_command();
        if !setup.config.is_null() {
            command.arg("--config").arg(config);
        }
        let child = command.stderr(Stdio::piped()).spawn();
        let mut child = child.expect("the agent's binary");
        let mut stderr = child.stderr.take().expect("a pipe");
        let log = Arc::new(Mutex::new(Vec::new()));
        let written = Arc::clone(&log);
        let reading = std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = stderr.read(&mut piece) {
                written
                    .lock()
                    .expect("the log")
                    .extend_from_slice(&piece[..length]);
            }
        });
        Self {
            child,
            log,
            reading: Some(reading),
        }
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&self.log.lock().expect("the log")).into_owned()
    }
}

/// How an agent ended.
#[derive(Debug)]
pub struct Exit {
    pub status: ExitStatus,
    pub log: String,
}

/// A running agent; it is killed when dropped, and what it said is shown if the test failed.
pub struct Agent {
    setup: Setup,
    process: Process,
}

impl Agent {
    #[track_caller]
    pub fn wait_until_ready(&mut self) {
        let admin = self.admin();
        let process = &mut self.process;
        eventually(PATIENCE, "the agent is ready", || {
            if let Some(status) = process.child.try_wait().expect("the agent's status") {
                panic!("the agent ended with {status}, see its log");
            }
            let answer = admin.request("GET", "/readyz").try_open();
            answer.is_ok_and(|answer| answer.status == 200)
        });
    }

    /// The registry.
    pub fn registry(&self) -> Client {
        Client::Tcp((self.setup.address, 5000).into())
    }

    /// The admin listener.
    pub fn admin(&self) -> Client {
        Client::Tcp((self.setup.address, 5001).into())
    }

    #[track_caller]
    pub fn get(&self, target: &str) -> Reply {
        self.registry().get(target)
    }

    #[track_caller]
    pub fn head(&self, target: &str) -> Reply {
        self.registry().head(target)
    }

    pub fn request(&self, method: &str, target: &str) -> Request {
        self.registry().request(method, target)
    }

    /// Pulls an image as a container client does: its manifest by tag, then all it lists.
    #[track_caller]
    pub fn pull(&self, name: &str, tag: &str, image: &Image) {
        self.get(&format!("/v2/{name}/manifests/{tag}"))
            .assert_is(&image.manifest.blob.bytes);
        for blob in image.blobs() {
            self.get(&format!("/v2/{name}/blobs/{}", blob.digest))
                .assert_is(&blob.bytes);
        }
    }

    /// Pushes a blob as docker does: an upload that is begun, and ended with all of it.
    #[track_caller]
    pub fn push_blob(&self, name: &str, blob: &Blob) {
        let begun = self
            .request("POST", &format!("/v2/{name}/blobs/uploads/"))
            .body(b"")
            .send();
        assert_eq!(begun.status, 202, "{begun:?}");
        let location = begun.header("location").expect("a Location").to_owned();
        let put = self.request("PUT", &format!("{location}?digest={}", blob.digest));
        let put = put.body(&blob.bytes).send();
        assert_eq!(put.status, 201, "{put:?}");
    }

    /// Pushes a manifest by tag or digest.
    #[track_caller]
    pub fn push_manifest(&self, name: &str, reference: &str, manifest: &Manifest) -> Reply {
        let put = self.request("PUT", &format!("/v2/{name}/manifests/{reference}"));
        put.header("Content-Type", &manifest.media_type)
            .body(&manifest.blob.bytes)
            .send()
    }

    /// Pushes an image, its blobs first.
    #[track_caller]
    pub fn push(&self, name: &str, tag: &str, image: &Image) {
        for blob in image.blobs() {
            self.push_blob(name, blob);
        }
        let put = self.push_manifest(name, tag, &image.manifest);
        assert_eq!(put.status, 201, "{put:?}");
    }

    /// The sum of a metric over its labels.
    #[track_caller]
    pub fn metric(&self, name: &str) -> f64 {
        let text = String::from_utf8(self.admin().get("/metrics").body).expect("text");
        let lines = text.lines().filter_map(|line| line.strip_prefix(name));
        let values = lines
            .filter(|rest| rest.starts_with([' ', '{']))
            .map(|rest| {
                let value = rest
                    .rsplit(' ')
                    .next()
                    .and_then(|value| value.parse::<f64>().ok());
                value.unwrap_or_else(|| panic!("no value in {name}{rest}"))
            });
        values.sum()
    }

    /// The most memory that it has held, in bytes.
    #[track_caller]
    pub fn peak_memory(&self) -> usize {
        let file = format!("/proc/{}/status", self.process.child.id());
        let status = std::fs::read_to_string(file).expect("a running agent");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
        let kib: usize = kib.expect("VmHWM").parse().expect("a number");
        kib * 1024
    }

    /// `/status` of the admin listener.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.admin().get("/status").json()
    }

    /// Runs another verb of the binary with the same configuration.
    pub fn command(&self, arguments: &[&str]) -> Output {
        self.setup
            .command(arguments)
            .output()
            .expect("the agent's binary")
    }

    pub fn config_file(&self) -> PathBuf {
        self.setup.folder.path().join("config.yaml")
    }

    pub fn folder(&self) -> &Path {
        self.setup.folder.path()
    }

    /// The small disk that it was given.
    pub fn disk(&self) -> &Disk {
        self.setup.disk.as_ref().expect("a small disk")
    }

    /// A path below `docker/registry/v2` in its storage.
    pub fn stored(&self, path: &str) -> PathBuf {
        self.setup
            .folder
            .path()
            .join("store/docker/registry/v2")
            .join(path)
    }

    /// Where the blob with this digest is stored.
    pub fn stored_blob(&self, digest: &str) -> PathBuf {
        let (algorithm, hex) = digest.split_once(':').expect("a digest");
        self.stored(&format!("blobs/{algorithm}/{}/{hex}/data", &hex[..2]))
    }

    /// Waits until the blobs are stored, which is a moment after a client has them.
    #[track_caller]
    pub fn wait_until_stored<'a>(&self, blobs: impl IntoIterator<Item = &'a Blob>) {
        for blob in blobs {
            let stored = self.stored_blob(&blob.digest);
            eventually(PATIENCE, "the blob is stored", || stored.exists());
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// What it has written to its standard error.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// What it was configured with last.
    pub fn config(&self) -> &Value {
        &self.setup.config
    }

    /// Writes another value of a key to its configuration file.
    pub fn rewrite(&mut self, key: &str, value: impl Into<Value>) {
        set(&mut self.setup.config, key, value.into());
        write_file(
            &self.config_file(),
            self.setup.config.to_string().as_bytes(),
        );
    }

    pub fn signal(&self, signal: Signal) {
        let process = Pid::from_raw(self.process.child.id().cast_signed());
        kill(process, signal).expect("a running agent");
    }

    /// The same for one that has only a number: a real-time signal.
    pub fn signal_number(&self, number: i32) {
        let command = format!("kill -{number} {}", self.process.child.id());
        let sent = Command::new("sh").args(["-c", &command]).status();
        assert!(sent.expect("a shell").success(), "{command}");
    }

    /// Waits until it has ended.
    #[track_caller]
    pub fn exit(mut self) -> Exit {
        self.wait()
    }

    /// Kills it, as a crash or `kill -9` does.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.wait();
    }

    /// Starts it again with what it left behind, without waiting until it is ready.
    pub fn start_again(&mut self) {
        self.process = Process::start(&self.setup);
    }

    /// What its environment says from its next start on.
    pub fn set_environment(&mut self, variables: &[(&str, &str)]) {
        let own = |&(name, value): &(&str, &str)| (name.into(), value.into());
        self.setup.environment = variables.iter().map(own).collect();
    }

    /// Waits until it has ended, to be started again.
    #[track_caller]
    pub fn wait(&mut self) -> Exit {
        let mut status = None;
        eventually(PATIENCE, "the agent has ended", || {
            status = self.process.child.try_wait().expect("the agent's status");
            status.is_some()
        });
        if let Some(reading) = self.process.reading.take() {
            reading.join().expect("its log");
        }
        Exit {
            status: status.expect("it has ended"),
            log: self.log(),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.child.kill();
        let _ = self.process.child.wait();
        if std::thread::panicking() {
            eprintln!("--- what the agent said:\n{}---", self.log());
        }
    }
}

/// A deadline for an agent under test: one that a test which passes waits out.
pub const SHORT: &str = "500ms";
