//! What a bucket costs, beside Debian's docker-registry over the same one.
//!
//! S3 is a stand-in at S3's own pace ([`server`]). Five sections, each of which can be named to run
//! it alone:
//!
//! - `layer`: a cold 1 GiB blob through a reader, beside docker-registry without redirect, and
//!   beside a client that goes straight to S3, as one that is redirected does.
//! - `small`: a cold 10 KiB blob; how long it takes, and what S3 is asked.
//! - `push`: 1 GiB to S3, and the peak memory.
//! - `crowd`: 32 clients pull 10 images at once through one reader; what S3 sends, and the peak
//!   memory.
//! - `lists`: the catalog and tags of a bucket with 10,000 repositories.
//!
//! `cargo bench --bench s3 [-- SECTION...]`

#![expect(clippy::print_stdout, reason = "a bench prints what it measured")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use bytes::Bytes;
use registry_agent::oci::{Algorithm, Digest, Tag};
use registry_agent::store::layout::{self, Repository};
use tempfile::TempDir;

use server::{BUCKET, Counts, Pace, S3};
use support::{GIB, Server, ask, cpu, free_port, get, has_docker_registry, median, peak, write};

#[path = "support/s3.rs"]
mod server;
mod support;

const RUNS: usize = 5;
/// S3 as it is: <https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html>
/// says 85 to 90 MB/s for each request.
const PACE: Pace = Pace {
    first_byte: Duration::from_millis(30),
    rate: 90_000_000,
};
/// For what docker-registry asks ten thousand times, one request after the other.
const QUICK: Pace = Pace {
    first_byte: Duration::from_millis(5),
    rate: 90_000_000,
};
/// A GiB in MB.
const MEGABYTES: f64 = 1_073.741_824;
const SMALL: usize = 10 * 1024;
const SMALL_BLOBS: u64 = 40;
const CLIENTS: usize = 32;
const IMAGES: u64 = 10;
/// The layers of an image of the crowd's, in bytes; the first is the same in all images.
const LAYERS: [usize; 3] = [24 << 20, 12 << 20, 100 << 10];
/// Where that one is in what is asked for of an image, behind its manifest and config.
const SHARED: usize = 2;
const REPOSITORIES: usize = 10_000;
const TAGS: usize = 1000;

fn main() {
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
    let bench = Bench {
        root,
        s3: S3::start(PACE),
        compared: has_docker_registry(),
    };
    let sections: [(&str, Section); 5] = [
        ("layer", layer),
        ("small", small),
        ("push", push),
        ("crowd", crowd),
        ("lists", lists),
    ];
    let named = |name: &str| std::env::args().any(|argument| argument == name);
    let all = !sections.iter().any(|(name, _)| named(name));
    for (name, run) in sections {
        if all || named(name) {
            bench.s3.set_pace(PACE);
            bench.s3.clear();
            run(&bench);
        }
    }
}

type Section = fn(&Bench);

struct Bench {
    root: TempDir,
    s3: S3,
    compared: bool,
}

/// A server that has nothing but the bucket.
struct Peer {
    name: &'static str,
    server: Server,
    _store: Option<TempDir>,
}

impl Bench {
    /// The agent, in a role, with an empty cache.
    fn agent(&self, role: &str) -> Peer {
        let port = free_port();
        let store = tempfile::tempdir_in(self.root.path()).expect("a temporary folder");
        let config = self.root.path().join("agent.yaml");
        let text = format!(
            "role: {role}\nlisten: 127.0.0.1:{port}\nadmin: unix:{store}/admin.sock\nstorage:\n  \
             s3: {{ bucket: {BUCKET}, region: us-east-1, endpoint: \"http://127.0.0.1:{s3}\", path_style: true }}\n  \
             cache: {{ root: {store}/cache, limit: 100% }}\nlog: {{ level: warn, access: false }}\n",
            store = store.path().display(),
            s3 = self.s3.port
        );
        write(&config, &text);
        let mut command = Command::new(env!("CARGO_BIN_EXE_registry-agent"));
        command
            .arg("run")
            .arg("--config")
            .arg(config)
            .env("AWS_ACCESS_KEY_ID", "bench")
            .env("AWS_SECRET_ACCESS_KEY", "bench")
            .env("AWS_EC2_METADATA_DISABLED", "true");
        Peer {
            name: "ours",
            server: Server::start(port, &mut command),
            _store: Some(store),
        }
    }

    /// A docker-registry that sends nobody elsewhere.
    fn docker_registry(&self) -> Peer {
        let port = free_port();
        let config = self.root.path().join("docker-registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{ level: error, accesslog: {{ disabled: true }} }}\nstorage:\n  \
             s3: {{ bucket: {BUCKET}, region: us-east-1, regionendpoint: \"http://127.0.0.1:{s3}\", \
             accesskey: bench, secretkey: bench, secure: false, v4auth: true }}\n  \
             redirect: {{ disable: true }}\n  maintenance: {{ uploadpurging: {{ enabled: false }} }}\n\
             http: {{ addr: \"127.0.0.1:{port}\" }}\ncatalog: {{ maxentries: {REPOSITORIES} }}\n",
            s3 = self.s3.port
        );
        write(&config, &text);
        let mut command = Command::new("docker-registry");
        // Its SDK can't take that one, where it is set, and speaks no TLS here.
        command.env_remove("AWS_CA_BUNDLE");
        command.arg("serve").arg(config).stdout(Stdio::null());
        Peer {
            name: "docker-registry",
            server: Server::start(port, &mut command),
            _store: None,
        }
    }

    /// Both, or the one there is.
    fn peers(&self, role: &str) -> Vec<Peer> {
        let mut peers = vec![self.agent(role)];
        if self.compared {
            peers.push(self.docker_registry());
        }
        peers
    }

    /// Lays a blob down, and a link to it of a repository.
    fn lay(&self, of: &Repository, bytes: Bytes) -> Digest {
        let digest = Digest::of(Algorithm::Sha256, &bytes);
        self.s3.lay(&layout::blob(&digest), bytes);
        let link = layout::layer_link(of, &digest);
        self.s3.lay(&link, digest.to_string());
        digest
    }

    /// Lays an image down, and gives the digests of its blobs.
    fn lay_image(&self, of: &Repository, layers: Vec<Bytes>) -> Vec<Digest> {
        let config = Bytes::from(format!(r#"{{"os":"linux","author":"{of:?}"}}"#));
        let blobs: Vec<(Digest, usize)> = [config]
            .into_iter()
            .chain(layers)
            .map(|bytes| (self.lay(of, bytes.clone()), bytes.len()))
            .collect();
        let described: Vec<String> = blobs
            .iter()
            .map(|(digest, size)| {
                format!(
                    r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{digest}","size":{size}}}"#
                )
            })
            .collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[{}]}}"#,
            described[0].replace("layer.v1.tar+gzip", "config.v1+json"),
            described[1..].join(",")
        );
        let digest = Digest::of(Algorithm::Sha256, manifest.as_bytes());
        self.s3.lay(&layout::blob(&digest), manifest);
        self.tag(of, "latest", &digest);
        blobs.into_iter().map(|(digest, _)| digest).collect()
    }

    fn tag(&self, of: &Repository, tag: &str, digest: &Digest) {
        let tag: Tag = tag.parse().expect("a tag");
        for link in [
            layout::revision_link(of, digest),
            layout::tag_index_link(of, &tag, digest),
            layout::tag_link(of, &tag),
        ] {
            self.s3.lay(&link, digest.to_string());
        }
    }
}

fn random(seed: u64, size: usize) -> Bytes {
    let mut bytes = vec![0; size];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes.into()
}

fn repository(name: &str) -> Repository {
    Repository::from_path(name.to_owned())
}

fn timed<T>(run: impl FnOnce() -> T) -> (T, f64) {
    let began = Instant::now();
    let result = run();
    (result, began.elapsed().as_secs_f64())
}

/// The least and the median of some figures.
fn spread(figures: &[f64]) -> String {
    let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
    format!("{:.2} (least {least:.2})", median(figures.to_vec()))
}

fn layer(bench: &Bench) {
    println!("a cold 1 GiB layer, S3 with {PACE:?} a connection:");
    let digest = bench.lay(&repository("bench"), random(1, 1 << 30));
    let path = format!("/v2/bench/blobs/{digest}");
    let direct_path = format!("/{BUCKET}/{}", layout::blob(&digest));
    let (mut to_direct, mut to_theirs) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let download = |name: &str, port: u16, path: &str| {
            bench.s3.take();
            let (read, wall) = timed(|| get(port, path));
            assert!(read >= GIB, "{read} bytes of {path}");
            let counts = bench.s3.take();
            println!(
                "  {name}: {wall:.3} s, {:.0} MB/s; S3: {:?}, {} at once",
                MEGABYTES / wall,
                counts.requests,
                counts.most
            );
            wall
        };
        let direct = download("straight to S3", bench.s3.port, &direct_path);
        let walls: Vec<f64> = bench
            .peers("reader")
            .iter()
            .map(|peer| {
                let wall = download(peer.name, peer.server.port, &path);
                println!(
                    "    {:.2} cpu-s, peak {:.1} MiB",
                    cpu(&peer.server),
                    peak(&peer.server)
                );
                wall
            })
            .collect();
        to_direct.push(direct / walls[0]);
        to_theirs.extend(walls.get(1).map(|theirs| theirs / walls[0]));
    }
    println!("  throughput to straight, median: {}", spread(&to_direct));
    if bench.compared {
        println!(
            "  throughput to docker-registry, median: {}",
            spread(&to_theirs)
        );
    }
}

fn small(bench: &Bench) {
    println!(
        "a cold {SMALL} byte blob, {:?} to S3's first byte:",
        PACE.first_byte
    );
    let of = repository("bench");
    let blobs: Vec<Digest> = (0..=SMALL_BLOBS)
        .map(|seed| bench.lay(&of, random(seed, SMALL)))
        .collect();
    let peers = bench.peers("reader");
    let mut walls = vec![Vec::new(); peers.len()];
    let mut asked: Vec<Vec<Counts>> = peers.iter().map(|_| Vec::new()).collect();
    for (number, digest) in blobs.iter().enumerate() {
        for (at, peer) in peers.iter().enumerate() {
            bench.s3.take();
            let path = format!("/v2/bench/blobs/{digest}");
            let (read, wall) = timed(|| get(peer.server.port, &path));
            assert!(read >= SMALL as u64, "{read} bytes of {path}");
            // The first opens the connections.
            if number > 0 {
                walls[at].push(wall);
                asked[at].push(bench.s3.take());
            }
        }
    }
    let trip = PACE.first_byte.as_secs_f64();
    for (at, peer) in peers.iter().enumerate() {
        let wall = median(walls[at].clone());
        let most = asked[at].iter().max_by_key(|counts| counts.all());
        println!(
            "  {}, median: {:.1} ms, {:.2} round trips; S3 at most: {:?}",
            peer.name,
            wall * 1000.0,
            wall / trip,
            most.map(|counts: &Counts| &counts.requests)
        );
    }
    if let [ours, theirs] = walls.as_slice() {
        let ratios: Vec<f64> = ours
            .iter()
            .zip(theirs)
            .map(|(us, them)| us / them)
            .collect();
        println!(
            "  latency to docker-registry, median: {:.2}",
            median(ratios)
        );
    }
}

/// A request with a body; gives the head of the answer.
fn send(port: u16, method: &str, target: &str, body: &[u8]) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("a connection");
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\
         Content-Type: application/octet-stream\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).expect("a request");
    stream.write_all(body).expect("a body");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(
        answer.starts_with("HTTP/1.1 2"),
        "{method} {target}: {answer}"
    );
    answer
}

/// Where an upload goes on, as a path that a query may follow.
fn location(answer: &str) -> String {
    let named = |line: &&str| line.to_ascii_lowercase().starts_with("location:");
    let line = answer.lines().find(named).expect("a location");
    let place = line["location:".len()..].trim();
    let path = place.find("/v2/").expect("a path");
    place[path..].to_owned()
}

fn push(bench: &Bench) {
    println!("a push of 1 GiB, S3 with {PACE:?} a connection:");
    let bytes = random(1, 1 << 30);
    let digest = Digest::of(Algorithm::Sha256, &bytes);
    let mut ratios = Vec::new();
    for _ in 0..RUNS {
        let walls: Vec<f64> = bench
            .peers("writer")
            .iter()
            .map(|peer| {
                bench.s3.clear();
                bench.s3.take();
                let port = peer.server.port;
                let ((), wall) = timed(|| {
                    let begun = send(port, "POST", "/v2/bench/blobs/uploads/", b"");
                    let (sent, received) = timed(|| send(port, "PATCH", &location(&begun), &bytes));
                    let target = location(&sent);
                    let and = if target.contains('?') { '&' } else { '?' };
                    send(port, "PUT", &format!("{target}{and}digest={digest}"), b"");
                    println!("  {}: PATCH took {received:.3} s", peer.name);
                });
                let stored = bench.s3.size(&layout::blob(&digest));
                assert_eq!(stored, Some(bytes.len()), "what is in the bucket");
                println!(
                    "  {}: {wall:.3} s, {:.0} MB/s, {:.2} cpu-s, peak {:.1} MiB; S3: {:?}",
                    peer.name,
                    MEGABYTES / wall,
                    cpu(&peer.server),
                    peak(&peer.server),
                    bench.s3.take().requests
                );
                wall
            })
            .collect();
        ratios.extend(walls.get(1).map(|theirs| theirs / walls[0]));
    }
    if bench.compared {
        println!(
            "  throughput to docker-registry, median: {}",
            spread(&ratios)
        );
    }
}

fn crowd(bench: &Bench) {
    println!("{CLIENTS} clients pull {IMAGES} images at once:");
    let mut images = Vec::new();
    for number in 0..IMAGES {
        let name = format!("bench/image-{number}");
        let layers = LAYERS.iter().enumerate().map(|(at, size)| {
            let seed = if at == 0 { 0 } else { number * 10 + at as u64 };
            random(seed, *size)
        });
        let blobs = bench.lay_image(&repository(&name), layers.collect());
        let mut paths = vec![format!("/v2/{name}/manifests/latest")];
        paths.extend(blobs.iter().map(|it| format!("/v2/{name}/blobs/{it}")));
        images.push(paths);
    }
    let size = |key: &String| bench.s3.size(key).unwrap_or_default() as u64;
    for _ in 0..RUNS.min(3) {
        for peer in bench.peers("reader") {
            bench.s3.take();
            let port = peer.server.port;
            let (read, wall) = timed(|| pull_at_once(port, &images));
            let own = LAYERS[1..].iter().sum::<usize>() as u64;
            let least = CLIENTS as u64 * (IMAGES * own + LAYERS[0] as u64);
            assert!(read >= least, "{read} bytes of {least}");
            let counts = bench.s3.take();
            let blobs: Vec<_> = counts
                .sent
                .iter()
                .filter(|(key, _)| key.ends_with("/data"))
                .collect();
            let sent: u64 = blobs.iter().map(|(_, sent)| **sent).sum();
            let wanted: u64 = blobs.iter().map(|(key, _)| size(key)).sum();
            let twice = blobs.iter().filter(|(key, sent)| **sent > size(key));
            println!(
                "  {}: {wall:.2} s, peak {:.1} MiB; S3 sent {:.2} times {} blobs of {} MiB, {} of them \
                 more than once: {:?}, {} at once",
                peer.name,
                peak(&peer.server),
                ratio(sent, wanted),
                blobs.len(),
                wanted >> 20,
                twice.count(),
                counts.requests,
                counts.most
            );
        }
    }
}

/// Pulls all images for each of the clients, all of them at the same time; gives the bytes that were
/// read.
fn pull_at_once(port: u16, images: &[Vec<String>]) -> u64 {
    let together = Barrier::new(CLIENTS * images.len());
    let pull = |client: usize, image: usize| {
        // A client asks once for the layer that its images share.
        let shared = client % images.len() == image;
        together.wait();
        let paths = images[image].iter().enumerate();
        let paths = paths.filter(|(at, _)| shared || *at != SHARED);
        paths.map(|(_, path)| get(port, path)).sum::<u64>()
    };
    std::thread::scope(|scope| {
        let pull = &pull;
        let pairs = (0..CLIENTS).flat_map(|client| (0..images.len()).map(move |it| (client, it)));
        let pulls: Vec<_> = pairs
            .map(|(client, image)| scope.spawn(move || pull(client, image)))
            .collect();
        pulls
            .into_iter()
            .map(|pull| pull.join().expect("a pull"))
            .sum()
    })
}

#[expect(clippy::cast_precision_loss, reason = "gigabytes are far from 53 bits")]
fn ratio(one: u64, other: u64) -> f64 {
    one as f64 / other as f64
}

/// A list, by following its links to the end where `all` of it is wanted: how many entries it has.
fn read_list(port: u16, path: &str, all: bool) -> usize {
    let (mut next, mut count) = (Some(path.to_owned()), 0);
    while let Some(path) = next.take() {
        let mut answer = String::new();
        let mut stream = ask(port, &path);
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
        let list = &body[body.find('[').expect("a list")..];
        count += list.matches(',').count() + 1;
        let link = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("link").then_some(value)
        });
        let link = link.and_then(|link| link.split(['<', '>']).nth(1));
        next = link.filter(|_| all).map(|link| {
            let path = link.find("/v2/").expect("a path");
            link[path..].to_owned()
        });
    }
    count
}

fn lists(bench: &Bench) {
    println!(
        "a bucket of {REPOSITORIES} repositories, {:?} to S3's first byte:",
        QUICK.first_byte
    );
    bench.s3.set_pace(QUICK);
    let digest = Digest::of(Algorithm::Sha256, b"a manifest");
    for number in 0..REPOSITORIES {
        let name = format!("team-{:02}/app-{:02}", number / 100, number % 100);
        let of = repository(&name);
        let link = layout::layer_link(&of, &digest);
        bench.s3.lay(&link, digest.to_string());
        bench.tag(&of, "latest", &digest);
    }
    for number in 0..TAGS {
        let tag = format!("1.0.{number}");
        bench.tag(&repository("team-00/app-00"), &tag, &digest);
    }
    let peers = bench.peers("reader");
    for (what, path, wanted, all) in [
        ("the first 100", "/v2/_catalog?n=100", 100, false),
        (
            "100 from the middle",
            "/v2/_catalog?n=100&last=team-49/app-99",
            100,
            false,
        ),
        ("all", "", REPOSITORIES, true),
        (
            "the one tag of a repository",
            "/v2/team-50/app-50/tags/list",
            1,
            true,
        ),
        (
            "the 1001 tags of one",
            "/v2/team-00/app-00/tags/list",
            TAGS + 1,
            true,
        ),
        ("10 of them", "/v2/team-00/app-00/tags/list?n=10", 10, false),
    ] {
        for (at, peer) in peers.iter().enumerate() {
            // docker-registry walks all again for each page: so it gets all in one.
            let all_path = [
                "/v2/_catalog?n=1000".to_owned(),
                format!("/v2/_catalog?n={REPOSITORIES}"),
            ];
            let path = if path.is_empty() { &all_path[at] } else { path };
            bench.s3.take();
            let (count, wall) = timed(|| read_list(peer.server.port, path, all));
            let counts = bench.s3.take();
            println!(
                "  {what}, {}: {:.0} ms; S3: {} calls, {:?}",
                peer.name,
                wall * 1000.0,
                counts.all(),
                counts.requests
            );
            assert!(count >= wanted, "{count} entries of {path}");
        }
    }
}
