//! What serving from the store costs, beside nginx with the same bytes in a file: server CPU for a
//! warm 1 GiB blob, and requests a second for a cached manifest. Needs `nginx` and `wrk`.
//!
//! `cargo bench --bench serve`

#![expect(clippy::print_stdout, reason = "a bench prints what it measured")]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use registry_agent::oci::{Algorithm, Digest, Hasher};
use registry_agent::store::layout::{self, Repository};

const GIB: u64 = 1 << 30;
const TURNS: usize = 8;
/// Clients at once, each of which reads the blob once a turn.
const CLIENTS: u32 = 2;
const DEADLINE: Duration = Duration::from_secs(20);

fn main() {
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
    let store = root.path().join("store");
    let (blob, manifest) = fill(&store);
    let ours = agent(root.path(), &store);
    let theirs = nginx(root.path(), &store, &blob, &manifest);
    let blob_path = format!("/v2/library/bench/blobs/{blob}");

    println!("a warm 1 GiB blob, {CLIENTS} clients, {TURNS} turns in turn:");
    let (mut cpu, mut wall) = (Vec::new(), Vec::new());
    for turn in 0..=TURNS {
        let (our_cpu, our_wall) = download(&ours, &blob_path);
        let (their_cpu, their_wall) = download(&theirs, "/blob");
        if turn == 0 {
            continue; // the first warms the page cache
        }
        println!(
            "  ours {our_cpu:.3} cpu-s/GiB {our_wall:.3} s   nginx {their_cpu:.3} cpu-s/GiB {their_wall:.3} s"
        );
        cpu.push(our_cpu / their_cpu);
        wall.push(our_wall / their_wall);
    }
    println!(
        "  ratio to nginx, median: cpu {:.2}, wall {:.2}",
        median(cpu),
        median(wall)
    );

    for (what, path) in [
        ("by tag", "/v2/library/bench/manifests/latest".to_owned()),
        (
            "by digest",
            format!("/v2/library/bench/manifests/{manifest}"),
        ),
    ] {
        let mut ratios = Vec::new();
        println!("a cached manifest {what}, wrk -t1 -c32:");
        for _ in 0..5 {
            let (us, them) = (requests(&ours, &path), requests(&theirs, "/manifest"));
            println!("  ours {us:.0}/s   nginx {them:.0}/s");
            ratios.push(us / them);
        }
        println!("  ratio to nginx, median: {:.2}", median(ratios));
    }
}

/// A store with one blob and one manifest, as if they had been mirrored.
fn fill(store: &Path) -> (Digest, Digest) {
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
        create(&path)
            .write_all(bytes.as_bytes())
            .expect("a written file");
    }
    (blob, digest)
}

fn create(path: &Path) -> fs::File {
    fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(path)
        .expect("a new file")
}

struct Server {
    process: Child,
    port: u16,
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
    fn start(port: u16, command: &mut Command) -> Self {
        let process = command.stdin(Stdio::null()).spawn().expect("a server");
        let began = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            assert!(began.elapsed() < DEADLINE, "a server did not start");
        }
        Self { process, port }
    }

    /// User and system seconds of the process and its children, so far.
    fn cpu(&self) -> f64 {
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
            let own = self.process.id().to_string();
            if id == own || fields[1] == own {
                ticks += fields[11].parse::<f64>().unwrap_or(0.0)
                    + fields[12].parse::<f64>().unwrap_or(0.0);
            }
        }
        ticks / 100.0
    }
}

fn free_port() -> u16 {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    free.local_addr().expect("its address").port()
}

fn agent(root: &Path, store: &Path) -> Server {
    let port = free_port();
    let config = root.join("agent.yaml");
    let text = format!(
        "listen: 127.0.0.1:{port}\nadmin: unix:{root}/admin.sock\nstorage: {{ filesystem: {{ root: {store} }} }}\n\
         upstreams: [{{ registry: docker.io, url: http://127.0.0.1:9 }}]\nfreshness: {{ window: 1h }}\nlog: {{ access: false }}\n",
        root = root.display(),
        store = store.display()
    );
    create(&config)
        .write_all(text.as_bytes())
        .expect("a configuration");
    let mut command = Command::new(env!("CARGO_BIN_EXE_registry-agent"));
    Server::start(port, command.arg("run").arg("--config").arg(config))
}

fn nginx(root: &Path, store: &Path, blob: &Digest, manifest: &Digest) -> Server {
    let port = free_port();
    let folder = root.join("nginx");
    fs::create_dir_all(&folder).expect("a folder");
    let text = format!(
        "daemon off; user root; worker_processes 2; pid {f}/pid; error_log {f}/error.log;\n\
         events {{}}\n\
         http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000000; open_file_cache max=100;\n\
         client_body_temp_path {f}; proxy_temp_path {f}; fastcgi_temp_path {f}; uwsgi_temp_path {f}; scgi_temp_path {f};\n\
         server {{ listen 127.0.0.1:{port};\n\
         location = /blob {{ alias {blob}; }}\n\
         location = /manifest {{ alias {manifest}; default_type application/json; }} }} }}\n",
        f = folder.display(),
        blob = store.join(layout::blob(blob)).display(),
        manifest = store.join(layout::blob(manifest)).display(),
    );
    let config = folder.join("nginx.conf");
    create(&config)
        .write_all(text.as_bytes())
        .expect("a configuration");
    Server::start(port, Command::new("nginx").arg("-c").arg(config))
}

/// CPU seconds for a GiB, and wall seconds, of [`CLIENTS`] downloads at once.
fn download(server: &Server, path: &str) -> (f64, f64) {
    let (cpu, began) = (server.cpu(), Instant::now());
    let read: u64 = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..CLIENTS)
            .map(|_| scope.spawn(|| get(server.port, path)))
            .collect();
        readers
            .into_iter()
            .map(|reader| reader.join().expect("a reader"))
            .sum()
    });
    assert!(read >= u64::from(CLIENTS) * GIB, "{read} bytes of {path}");
    (
        (server.cpu() - cpu) / f64::from(CLIENTS),
        began.elapsed().as_secs_f64(),
    )
}

fn get(port: u16, path: &str) -> u64 {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("a connection");
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"
    )
    .expect("a request");
    let mut buffer = vec![0; 256 * 1024];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).expect("an answer") {
            0 => return total,
            read => total += read as u64,
        }
    }
}

fn requests(server: &Server, path: &str) -> f64 {
    let url = format!("http://127.0.0.1:{}{path}", server.port);
    let output = Command::new("wrk")
        .args(["-t1", "-c32", "-d3s", &url])
        .output()
        .expect("wrk");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("Non-2xx"), "{text}");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"));
    line.expect("a rate").trim().parse().expect("a number")
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
