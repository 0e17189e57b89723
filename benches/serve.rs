//! What serving from the store costs, beside nginx with the same bytes in a file: server CPU for a
//! warm 1 GiB blob, and requests a second for a cached manifest. Needs `nginx` and `wrk`.
//!
//! `cargo bench --bench serve`

#![expect(clippy::print_stdout, reason = "a bench prints what it measured")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use registry_agent::oci::Digest;
use registry_agent::store::layout;

use support::{GIB, Server, agent, cpu, fill, free_port, get, median, write};

mod support;

const TURNS: usize = 8;
/// Clients at once, each of which reads the blob once a turn.
const CLIENTS: u32 = 2;

fn main() {
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
    let store = root.path().join("store");
    let (blob, manifest) = fill(&store);
    let ours = agent(root.path(), &store, "http://127.0.0.1:9");
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
    write(&config, &text);
    Server::start(port, Command::new("nginx").arg("-c").arg(config))
}

/// CPU seconds for a GiB, and wall seconds, of [`CLIENTS`] downloads at once.
fn download(server: &Server, path: &str) -> (f64, f64) {
    let (before, began) = (cpu(server), Instant::now());
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
        (cpu(server) - before) / f64::from(CLIENTS),
        began.elapsed().as_secs_f64(),
    )
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
