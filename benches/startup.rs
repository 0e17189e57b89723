//! From exec to the first answer, with an empty store and with 100,000 blobs in it, beside Debian's
//! docker-registry with an empty store where that is installed. Prints milliseconds and ratios.
//!
//! `cargo bench --bench startup`

#![expect(clippy::print_stdout, reason = "a bench prints what it measured")]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const RUNS: usize = 15;
const BLOBS: u32 = 100_000;
const DEADLINE: Duration = Duration::from_secs(10);

fn main() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let (empty, full) = (root.path().join("empty"), root.path().join("full"));
    fill(&full);
    let agent = |storage: &Path| {
        let storage = storage.to_owned();
        move |port: u16| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_registry-agent"));
            command
                .args(["run", "--config", "/dev/null"])
                .env("REGISTRY_AGENT_LISTEN", format!("127.0.0.1:{port}"))
                .env("REGISTRY_AGENT_STORAGE__FILESYSTEM__ROOT", &storage)
                .env(
                    "REGISTRY_AGENT_ADMIN",
                    format!("unix:{}", storage.join("a.sock").display()),
                );
            command
        }
    };
    let ours_empty = report("registry-agent, empty store", agent(&empty));
    let ours_full = report("registry-agent, 100,000 blobs", agent(&full));
    println!(
        "{:<40} {:>8.2}",
        "ratio: 100,000 blobs to empty",
        ours_full / ours_empty
    );
    if Command::new("docker-registry")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        println!("docker-registry is not installed: nothing to compare with");
        return;
    }
    let config = root.path().join("peer.yml");
    let theirs = report("docker-registry, empty store", |port| {
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
            root.path().join("peer").display()
        );
        write(&config, text.as_bytes());
        let mut command = Command::new("docker-registry");
        command.args(["serve".as_ref(), config.as_os_str()]);
        command
    });
    println!(
        "{:<40} {:>8.2}",
        "ratio: ours, 100,000 blobs, to theirs",
        ours_full / theirs
    );
}

/// Blobs of a few bytes in distribution's layout: what counts for a start is how many there are.
fn fill(root: &Path) {
    for number in 0..BLOBS {
        let hex = format!("{:08x}{number:056x}", number.wrapping_mul(2_654_435_761));
        let folder = root.join(format!(
            "docker/registry/v2/blobs/sha256/{}/{hex}",
            &hex[..2]
        ));
        fs::create_dir_all(&folder).expect("a folder");
        write(&folder.join("data"), b"blob");
    }
}

fn write(path: &Path, bytes: &[u8]) {
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(path);
    file.and_then(|mut file| file.write_all(bytes))
        .expect("a written file");
}

/// Prints the median over [`RUNS`] starts, in milliseconds, with the extremes, and returns it.
fn report(what: &str, command: impl Fn(u16) -> Command) -> f64 {
    let mut times: Vec<f64> = (0..RUNS).map(|_| start(&command)).collect();
    times.sort_by(f64::total_cmp);
    let median = times[RUNS / 2];
    println!(
        "{what:<40} {median:>8.2} ms ({:.2} to {:.2})",
        times[0],
        times[RUNS - 1]
    );
    median
}

fn start(command: impl Fn(u16) -> Command) -> f64 {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let port = free.local_addr().expect("its address").port();
    drop(free);
    let began = Instant::now();
    let mut command = command(port);
    let child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a process");
    let mut process = Process(child);
    while !answers(port) {
        assert!(began.elapsed() < DEADLINE, "no answer in {DEADLINE:?}");
        assert!(
            process.0.try_wait().expect("a child").is_none(),
            "it ended at its start"
        );
    }
    began.elapsed().as_secs_f64() * 1000.0
}

fn answers(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
        return false;
    };
    let mut answer = [0; 12];
    stream
        .write_all(b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .is_ok()
        && stream.read_exact(&mut answer).is_ok()
        && answer == *b"HTTP/1.1 200"
}

/// Ends with its value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already, which is all that is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
