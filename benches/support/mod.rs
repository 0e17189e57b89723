//! What the benches beside other servers share.
#![allow(dead_code, reason = "every bench uses a part of it")]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use registry_agent::oci::{Algorithm, Digest, Hasher};
use registry_agent::store::layout::{self, Repository};

pub const GIB: u64 = 1 << 30;
const DEADLINE: Duration = Duration::from_secs(20);

/// A store with one blob and one manifest, as if they had been mirrored.
pub fn fill(store: &Path) -> (Digest, Digest) {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    let mut block = vec![0u8; 1 << 20];
    let temporary = store.join("blob");
    fs::create_dir_all(store).expect("a folder");
    let mut file = create(&temporary);
    for number in 0..GIB >> 20 {
        for (at, byte) in block.iter_mut().enumerate() {
            *byte = (at as u64).wrapping_mul(number + 7).to_le_bytes()[0];
        }
        hasher.update(&block);
        file.write_all(&block).expect("a written blob");
    }
    let blob = hasher.finish();
    let path = store.join(layout::blob(&blob));
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    fs::rename(&temporary, &path).expect("a blob");
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{blob}","size":{GIB}}},"layers":[{}]}}"#,
        vec![format!(r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{blob}","size":{GIB}}}"#); 8].join(",")
    );
    let digest = Digest::of(Algorithm::Sha256, manifest.as_bytes());
    let repository = Repository::from_path("library/bench".to_owned());
    let tag = "latest".parse().expect("a tag");
    for (path, bytes) in [
        (layout::layer_link(&repository, &blob), blob.as_str()),
        (layout::blob(&digest), manifest.as_str()),
        (layout::revision_link(&repository, &digest), digest.as_str()),
        (layout::tag_link(&repository, &tag), digest.as_str()),
    ] {
        let path = store.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        write(&path, bytes);
    }
    (blob, digest)
}

pub fn write(path: &Path, text: &str) {
    let written = create(path).write_all(text.as_bytes());
    written.expect("a written file");
}

fn create(path: &Path) -> fs::File {
    fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(path)
        .expect("a new file")
}

pub struct Server {
    pub process: Child,
    pub port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        // nginx ends its workers at SIGTERM, not at SIGKILL.
        let _ = Command::new("kill")
            .arg(self.process.id().to_string())
            .status();
        let _ = self.process.wait();
    }
}

impl Server {
    pub fn start(port: u16, command: &mut Command) -> Self {
        let process = command.stdin(Stdio::null()).spawn().expect("a server");
        let began = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            assert!(began.elapsed() < DEADLINE, "a server did not start");
        }
        Self { process, port }
    }
}

pub fn free_port() -> u16 {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    free.local_addr().expect("its address").port()
}

/// The agent over a store, with one upstream, which need not answer where all is in the store.
pub fn agent(root: &Path, store: &Path, upstream: &str) -> Server {
    let port = free_port();
    let config = root.join("agent.yaml");
    let text = format!(
        "listen: 127.0.0.1:{port}\nadmin: unix:{root}/admin.sock\nstorage: {{ filesystem: {{ root: {store} }} }}\n\
         upstreams: [{{ registry: docker.io, url: {upstream} }}]\nfreshness: {{ window: 1h }}\nlog: {{ level: warn, access: false }}\n",
        root = root.display(),
        store = store.display()
    );
    write(&config, &text);
    let mut command = Command::new(env!("CARGO_BIN_EXE_registry-agent"));
    Server::start(port, command.arg("run").arg("--config").arg(config))
}

/// Reads an answer to its end, and returns how many bytes it had with its head.
pub fn get(port: u16, path: &str) -> u64 {
    let mut stream = ask(port, path);
    let mut buffer = vec![0; 256 * 1024];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).expect("an answer") {
            0 => return total,
            read => {
                let refused = total == 0 && !buffer.starts_with(b"HTTP/1.1 200");
                assert!(
                    !refused,
                    "{path}: {}",
                    String::from_utf8_lossy(&buffer[..read])
                );
                total += read as u64;
            }
        }
    }
}

/// Sends a request, after the answer to which the server closes the connection.
pub fn ask(port: u16, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("a connection");
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: bench\r\nAccept: application/vnd.oci.image.manifest.v1+json\r\n\
         Connection: close\r\n\r\n"
    )
    .expect("a request");
    stream
}

pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Whether there is a docker-registry to compare with, which is said if not.
pub fn has_docker_registry() -> bool {
    let version = Command::new("docker-registry")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if version.is_err() {
        println!("docker-registry is not installed: nothing to compare with");
    }
    version.is_ok()
}

/// The most memory that a server has held, in MiB: `VmHWM`, pages of its binary among it.
pub fn peak(server: &Server) -> f64 {
    let path = format!("/proc/{}/status", server.process.id());
    let status = fs::read_to_string(path).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.expect("a peak").parse::<f64>().expect("a number") / 1024.0
}

/// User and system seconds of a server's process and its children, so far.
pub fn cpu(server: &Server) -> f64 {
    let mut ticks = 0.0;
    for entry in fs::read_dir("/proc").expect("/proc") {
        let path = entry.expect("an entry").path().join("stat");
        let Ok(stat) = fs::read_to_string(path) else {
            continue;
        };
        let Some((head, rest)) = stat.rsplit_once(") ") else {
            continue;
        };
        let fields: Vec<&str> = rest.split(' ').collect();
        let id = head.split(' ').next().unwrap_or_default();
        let own = server.process.id().to_string();
        if id == own || fields[1] == own {
            ticks +=
                fields[11].parse::<f64>().unwrap_or(0.0) + fields[12].parse::<f64>().unwrap_or(0.0);
        }
    }
    ticks / 100.0
}

/// Waits as a slow peer does.
#[expect(
    clippy::disallowed_methods,
    reason = "a slow peer is what is measured against, in a thread of its own"
)]
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}
