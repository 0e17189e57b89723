//! What a crowd costs, beside Debian's docker-registry where that is installed.
//!
//! Sixteen clients at once for one cold blob of 256 MiB: how much of it the upstream sent, how long
//! the last of them waited beside one client's download straight from the upstream, and the server's
//! peak memory; once over a link of 1 Gbit/s, and once over loopback as fast as it goes, where 16
//! copies on the same processors are most of what is measured. Then 64 slow readers of a warm 1 GiB
//! blob and one fast one: the peak memory, and how long the fast one took.
//!
//! `cargo bench --bench herd`

#![expect(clippy::print_stdout, reason = "a bench prints what it measured")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use registry_agent::oci::{Algorithm, Digest};

use support::{
    GIB, Server, agent, ask, fill, free_port, get, has_docker_registry, median, pause, peak, write,
};

mod support;

const RUNS: usize = 3;
const CLIENTS: usize = 16;
const BLOB: usize = 256 << 20;
/// Bytes a second of 1 Gbit/s.
const GIGABIT: u64 = 125_000_000;
/// What the upstream sends at a time.
const PIECE: usize = 256 * 1024;
const SLOW_READERS: usize = 64;
/// What a slow reader reads at a time, and how long it then waits.
const SIP: usize = 64 * 1024;
const BETWEEN_SIPS: Duration = Duration::from_millis(20);

fn main() {
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
    let compared = has_docker_registry();
    let mut bytes = vec![0; BLOB];
    fastrand::Rng::with_seed(7).fill(&mut bytes);
    let blob = Blob {
        digest: Digest::of(Algorithm::Sha256, &bytes),
        bytes,
    };
    let blob = Arc::new(blob);
    for (link, rate) in [
        ("a link of 1 Gbit/s", Some(GIGABIT)),
        ("loopback unbounded", None),
    ] {
        println!("a cold 256 MiB blob, {CLIENTS} clients at once, {link}:");
        let upstream = Upstream::start(Arc::clone(&blob), rate);
        cold(root.path(), &upstream, compared);
    }
    let store = root.path().join("store");
    let (warm, _) = fill(&store);
    println!("a warm 1 GiB blob, {SLOW_READERS} slow readers and a fast one:");
    let path = format!("/v2/library/bench/blobs/{warm}");
    slow("ours", &path, || {
        agent(root.path(), &store, "http://127.0.0.1:9")
    });
    if compared {
        slow("docker-registry", &path, || {
            docker_registry(root.path(), &store, None)
        });
    }
}

/// Downloads a blob that is not in the store through each of the servers in turn.
fn cold(root: &Path, upstream: &Upstream, compared: bool) {
    let path = format!("/v2/library/bench/blobs/{}", upstream.blob.digest);
    let (mut ours, mut theirs) = (Herd::default(), Herd::default());
    for _ in 0..RUNS {
        let direct = crowd(1, upstream.port, &path);
        println!("  direct, one client: {direct:.3} s");
        if upstream.rate.is_none() {
            let all = crowd(CLIENTS, upstream.port, &path);
            println!("  direct, {CLIENTS} clients at once: {all:.3} s");
        }
        let store = tempfile::tempdir_in(root).expect("a temporary folder");
        let server = agent(root, store.path(), &upstream.url());
        ours.run("ours", &server, upstream, &path, direct);
        drop((server, store));
        if compared {
            let store = tempfile::tempdir_in(root).expect("a temporary folder");
            let server = docker_registry(root, store.path(), Some(&upstream.url()));
            theirs.run("docker-registry", &server, upstream, &path, direct);
        }
    }
    ours.report("ours");
    if compared {
        theirs.report("docker-registry");
    }
}

/// What the runs of one server measured.
#[derive(Default)]
struct Herd {
    sent: Vec<f64>,
    wall: Vec<f64>,
    peak: Vec<f64>,
}

impl Herd {
    #[expect(clippy::cast_precision_loss, reason = "gigabytes are far from 53 bits")]
    fn run(&mut self, what: &str, server: &Server, upstream: &Upstream, path: &str, direct: f64) {
        upstream.quiet();
        upstream.traffic().sent = 0;
        let wall = crowd(CLIENTS, server.port, path);
        upstream.quiet();
        let sent = upstream.traffic().sent as f64 / BLOB as f64;
        let peak = peak(server);
        println!("  {what}: upstream sent {sent:.2} blobs, {wall:.3} s, peak {peak:.1} MiB");
        self.sent.push(sent);
        self.wall.push(wall / direct);
        self.peak.push(peak);
    }

    fn report(self, what: &str) {
        println!(
            "  {what}, median: upstream bytes to blob {:.2}, wall to direct {:.2}, peak {:.1} MiB",
            median(self.sent),
            median(self.wall),
            median(self.peak)
        );
    }
}

/// Reads a stored blob at full speed while others sip at it.
fn slow(what: &str, path: &str, start: impl Fn() -> Server) {
    let (mut walls, mut peaks) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let server = start();
        let (ready, ended) = (Barrier::new(SLOW_READERS + 1), AtomicBool::new(false));
        let wall = std::thread::scope(|scope| {
            for _ in 0..SLOW_READERS {
                scope.spawn(|| sip(server.port, path, &ready, &ended));
            }
            ready.wait();
            let began = Instant::now();
            let read = get(server.port, path);
            ended.store(true, Ordering::Relaxed);
            assert!(read >= GIB, "{read} bytes of {path}");
            began.elapsed().as_secs_f64()
        });
        let peak = peak(&server);
        println!("  {what}: the fast one {wall:.3} s, peak {peak:.1} MiB");
        walls.push(wall);
        peaks.push(peak);
    }
    println!(
        "  {what}, median: the fast one {:.3} s, peak {:.1} MiB",
        median(walls),
        median(peaks)
    );
}

fn sip(port: u16, path: &str, ready: &Barrier, ended: &AtomicBool) {
    let mut stream = ask(port, path);
    setsockopt(&stream, sockopt::RcvBuf, &SIP).expect("a small buffer");
    let mut buffer = vec![0; SIP];
    stream.read_exact(&mut buffer).expect("a beginning");
    assert!(buffer.starts_with(b"HTTP/1.1 200"), "refused");
    ready.wait();
    while !ended.load(Ordering::Relaxed) {
        stream.read_exact(&mut buffer).expect("more of it");
        pause(BETWEEN_SIPS);
    }
}

/// Seconds until the last of some clients that begin together has the blob.
fn crowd(clients: usize, port: u16, path: &str) -> f64 {
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                let read = get(port, path);
                assert!(read >= BLOB as u64, "{read} bytes of {path}");
            });
        }
    });
    began.elapsed().as_secs_f64()
}

/// A docker-registry over a store, as a proxy where it is given an upstream.
fn docker_registry(root: &Path, store: &Path, upstream: Option<&str>) -> Server {
    let port = free_port();
    let config = root.join("docker-registry.yml");
    let proxy = upstream.map_or(String::new(), |url| {
        format!("proxy: {{ remoteurl: \"{url}\" }}\n")
    });
    let text = format!(
        "version: 0.1\nlog: {{ level: error, accesslog: {{ disabled: true }} }}\n\
         storage: {{ filesystem: {{ rootdirectory: {} }} }}\nhttp: {{ addr: \"127.0.0.1:{port}\" }}\n{proxy}",
        store.display()
    );
    write(&config, &text);
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(config).stderr(Stdio::null());
    Server::start(port, &mut command)
}

struct Blob {
    digest: Digest,
    bytes: Vec<u8>,
}

/// A registry with one blob, which counts what it sends of it.
#[derive(Clone)]
struct Upstream {
    port: u16,
    blob: Arc<Blob>,
    /// Bytes a second, over all connections together.
    rate: Option<u64>,
    state: Arc<(Mutex<Traffic>, Condvar)>,
}

struct Traffic {
    sent: u64,
    /// Answers that are being sent.
    answers: usize,
    /// When the link is free.
    free: Instant,
}

impl Upstream {
    fn start(blob: Arc<Blob>, rate: Option<u64>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let traffic = Traffic {
            sent: 0,
            answers: 0,
            free: Instant::now(),
        };
        let upstream = Self {
            port: listener.local_addr().expect("its address").port(),
            blob,
            rate,
            state: Arc::new((Mutex::new(traffic), Condvar::new())),
        };
        let serving = upstream.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serving = serving.clone();
                // A client that goes away is not this server's error.
                std::thread::spawn(move || drop(serving.converse(stream)));
            }
        });
        upstream
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn traffic(&self) -> std::sync::MutexGuard<'_, Traffic> {
        self.state.0.lock().expect("the traffic")
    }

    /// Waits until nothing is being sent.
    fn quiet(&self) {
        let busy = |traffic: &mut Traffic| traffic.answers > 0;
        drop(self.state.1.wait_while(self.traffic(), busy));
    }

    fn converse(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        while let Some(request) = lines.next().transpose()? {
            let mut close = false;
            for line in lines.by_ref() {
                let line = line?;
                close |= line.eq_ignore_ascii_case("connection: close");
                if line.is_empty() {
                    break;
                }
            }
            let mut words = request.split(' ');
            let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
            let (status, body): (_, &[u8]) = if path == "/v2/" {
                ("200 OK", b"{}")
            } else if path.ends_with(self.blob.digest.as_str()) {
                ("200 OK", &self.blob.bytes)
            } else {
                ("404 Not Found", b"{}")
            };
            write!(
                stream,
                "HTTP/1.1 {status}\r\nContent-Type: application/octet-stream\r\nContent-Length: {}\r\n\r\n",
                body.len()
            )?;
            if method == "GET" {
                self.traffic().answers += 1;
                let sent = self.send(&mut stream, body);
                self.traffic().answers -= 1;
                self.state.1.notify_all();
                sent?;
            }
            if close {
                break;
            }
        }
        Ok(())
    }

    fn send(&self, stream: &mut TcpStream, body: &[u8]) -> std::io::Result<()> {
        for piece in body.chunks(PIECE) {
            if let Some(rate) = self.rate {
                let mut traffic = self.traffic();
                let start = traffic.free.max(Instant::now());
                traffic.free =
                    start + Duration::from_nanos(piece.len() as u64 * 1_000_000_000 / rate);
                drop(traffic);
                pause(start.saturating_duration_since(Instant::now()));
            }
            stream.write_all(piece)?;
            self.traffic().sent += piece.len() as u64;
        }
        Ok(())
    }
}
