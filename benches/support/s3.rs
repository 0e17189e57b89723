//! A stand-in for S3 that costs next to nothing, so that what is measured is its client.
//!
//! It answers what registry-agent and docker-registry ask, from memory, each connection at S3's own
//! pace, and counts. It looks at no signature and hashes nothing; to complete an upload, or to copy
//! an object, takes it no time at all, which favours docker-registry: that writes an upload elsewhere
//! first, and then has S3 copy it. The tests use a real server (`tests/support/s3.rs`), which would
//! take more of two processors than those who are measured.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::sendfile::sendfile64;
use url::form_urlencoded;

use super::support::pause;

#[path = "s3/bucket.rs"]
mod bucket;

/// The bucket that is there.
pub const BUCKET: &str = "images";
/// What a connection sends or takes at a time.
const PIECE: usize = 256 * 1024;
/// From so many bytes on, an object is worth a file.
const LARGE: usize = 1024 * 1024;

/// How S3 answers: its own figures are about 30 ms, and 90 MB/s.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// From a request to the first byte of its answer.
    pub first_byte: Duration,
    /// Bytes a second of each connection, either way.
    pub rate: u64,
}

/// What was asked, and sent.
#[derive(Debug, Default)]
pub struct Counts {
    /// By operation: GET, HEAD, LIST, PUT, POST, COPY, DELETE.
    pub requests: BTreeMap<&'static str, usize>,
    /// Bytes of objects that were sent, by key.
    pub sent: BTreeMap<String, u64>,
    /// The most objects that were being sent at once.
    pub most: usize,
    now: usize,
}

impl Counts {
    /// How many requests there were.
    pub fn all(&self) -> usize {
        self.requests.values().sum()
    }
}

#[derive(Debug, Clone)]
struct Object {
    pieces: Vec<Bytes>,
    /// The same in a file in memory, which the kernel sends without copying it.
    file: Option<Arc<File>>,
    etag: String,
}

impl Object {
    fn size(&self) -> usize {
        self.pieces.iter().map(Bytes::len).sum()
    }

    /// The bytes from `from` to `to`, which is behind the last of them.
    fn part(&self, from: usize, to: usize) -> Vec<Bytes> {
        let mut at = 0;
        let parts = self.pieces.iter().map(|piece| {
            let start = at;
            at += piece.len();
            piece.slice(from.clamp(start, at) - start..to.clamp(start, at) - start)
        });
        parts.filter(|part| !part.is_empty()).collect()
    }
}

struct Upload {
    key: String,
    parts: BTreeMap<usize, Object>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Object>,
    uploads: BTreeMap<String, Upload>,
    counts: Counts,
    /// Makes the ids of versions and uploads.
    number: u64,
}

/// A server with one bucket; its threads end with the process.
#[derive(Clone)]
pub struct S3 {
    pub port: u16,
    state: Arc<Mutex<State>>,
    pace: Arc<Mutex<Pace>>,
}

struct Request {
    method: String,
    key: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Bytes,
}

impl Request {
    fn query(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    fn operation(&self) -> &'static str {
        match self.method.as_str() {
            "GET" if self.key.is_empty() => "LIST",
            "GET" => "GET",
            "HEAD" => "HEAD",
            "PUT" if self.headers.contains_key("x-amz-copy-source") => "COPY",
            "PUT" => "PUT",
            "POST" => "POST",
            _ => "DELETE",
        }
    }

    /// The bytes of `size` that a `Range` asks for.
    fn range(&self, size: usize) -> Option<Result<(usize, usize), ()>> {
        let (from, to) = self
            .header("range")?
            .strip_prefix("bytes=")?
            .split_once('-')?;
        let from: usize = from.parse().ok()?;
        let to = to.parse().map_or(size, |last: usize| last + 1).min(size);
        Some(if from < size { Ok((from, to)) } else { Err(()) })
    }
}

struct Answer {
    status: &'static str,
    headers: String,
    body: Vec<Bytes>,
    /// Where the body also is, and where in there it begins.
    file: Option<(Arc<File>, usize)>,
    /// What is said of a body that is not sent.
    length: usize,
}

impl S3 {
    /// Serves an empty bucket.
    pub fn start(pace: Pace) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let server = Self {
            port: listener.local_addr().expect("its address").port(),
            state: Arc::default(),
            pace: Arc::new(Mutex::new(pace)),
        };
        let serving = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serving = serving.clone();
                // A client that goes away is not this server's error.
                std::thread::spawn(move || drop(serving.converse(stream)));
            }
        });
        server
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the state")
    }

    fn pace(&self) -> Pace {
        *self.pace.lock().expect("the pace")
    }

    /// Answers at another pace from now on.
    pub fn set_pace(&self, pace: Pace) {
        *self.pace.lock().expect("the pace") = pace;
    }

    /// Puts an object there, as somebody else did.
    pub fn lay(&self, key: &str, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        let file = (bytes.len() >= LARGE).then(|| in_memory(&bytes));
        let mut state = self.state();
        state.lay(key, vec![bytes]);
        if let Some(object) = state.objects.get_mut(key) {
            object.file = file;
        }
    }

    /// Empties the bucket.
    pub fn clear(&self) {
        let mut state = self.state();
        state.objects.clear();
        state.uploads.clear();
    }

    /// The size of an object in bytes.
    pub fn size(&self, key: &str) -> Option<usize> {
        self.state().objects.get(key).map(Object::size)
    }

    /// What was asked and sent since this was last called.
    pub fn take(&self) -> Counts {
        let mut state = self.state();
        let now = state.counts.now;
        let fresh = Counts {
            now,
            most: now,
            ..Counts::default()
        };
        std::mem::replace(&mut state.counts, fresh)
    }

    fn converse(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(request) = self.read(&mut reader, &mut stream)? {
            let began = Instant::now();
            let answer = {
                let mut state = self.state();
                *state
                    .counts
                    .requests
                    .entry(request.operation())
                    .or_default() += 1;
                state.answer(&request)
            };
            let pace = self.pace();
            pause(pace.first_byte.saturating_sub(began.elapsed()));
            // At once: `write!` would send it in several packets.
            let head = format!(
                "HTTP/1.1 {}\r\n{}Content-Length: {}\r\n\r\n",
                answer.status, answer.headers, answer.length
            );
            stream.write_all(head.as_bytes())?;
            if request.operation() == "GET" {
                self.state().begin();
                let sent = self.send(&mut stream, &request.key, &answer, pace.rate);
                self.state().counts.now -= 1;
                sent?;
            } else if request.method != "HEAD" {
                for piece in &answer.body {
                    stream.write_all(piece)?;
                }
            }
            if request.header("connection") == Some("close") {
                break;
            }
        }
        Ok(())
    }

    fn send(
        &self,
        stream: &mut TcpStream,
        key: &str,
        answer: &Answer,
        rate: u64,
    ) -> std::io::Result<()> {
        let mut paced = Paced::new(rate);
        let mut at = answer.file.as_ref().map_or(0, |(_, from)| *from);
        for piece in answer.body.iter().flat_map(|piece| piece.chunks(PIECE)) {
            paced.wait(piece.len());
            match &answer.file {
                Some((file, _)) => send_file(stream, file, at, piece.len())?,
                None => stream.write_all(piece)?,
            }
            at += piece.len();
            let mut state = self.state();
            match state.counts.sent.get_mut(key) {
                Some(sent) => *sent += piece.len() as u64,
                None => drop(state.counts.sent.insert(key.to_owned(), piece.len() as u64)),
            }
        }
        Ok(())
    }

    /// The next request of a connection with its body, which arrives at the connection's rate.
    fn read(
        &self,
        reader: &mut BufReader<TcpStream>,
        stream: &mut TcpStream,
    ) -> std::io::Result<Option<Request>> {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let mut words = line.split(' ');
        let method = words.next().unwrap_or_default().to_owned();
        let target = words.next().unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let path = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
        let path = path.trim_start_matches('/');
        let key = path.strip_prefix(BUCKET).unwrap_or(path);
        let key = key.trim_start_matches('/').to_owned();
        let query = form_urlencoded::parse(query.as_bytes())
            .into_owned()
            .collect();
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else {
                break;
            };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        if headers.contains_key("expect") {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let length = headers.get("content-length");
        let length = length.map_or(0, |length| length.parse().expect("a length"));
        let mut body = vec![0; length];
        let mut paced = Paced::new(self.pace().rate);
        for piece in body.chunks_mut(PIECE) {
            reader.read_exact(piece)?;
            paced.wait(piece.len());
        }
        Ok(Some(Request {
            method,
            key,
            query,
            headers,
            body: body.into(),
        }))
    }
}

/// A file that is nowhere but in memory.
fn in_memory(bytes: &[u8]) -> Arc<File> {
    let file = memfd_create(c"object", MFdFlags::MFD_CLOEXEC).expect("a file in memory");
    let mut file = File::from(file);
    file.write_all(bytes).expect("a written object");
    Arc::new(file)
}

/// Sends `size` bytes of a file from `at` on.
fn send_file(stream: &TcpStream, file: &File, at: usize, size: usize) -> std::io::Result<()> {
    let mut offset = i64::try_from(at).expect("an offset");
    let mut left = size;
    while left > 0 {
        let sent = sendfile64(stream, file, Some(&mut offset), left)?;
        assert!(sent > 0, "an object is shorter than it was");
        left -= sent;
    }
    Ok(())
}

/// A connection's rate.
struct Paced {
    began: Instant,
    bytes: u64,
    rate: u64,
}

impl Paced {
    fn new(rate: u64) -> Self {
        Self {
            began: Instant::now(),
            bytes: 0,
            rate,
        }
    }

    /// Waits until so many bytes more are through.
    fn wait(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        let due = Duration::from_nanos(self.bytes * 1_000_000_000 / self.rate);
        pause(due.saturating_sub(self.began.elapsed()));
    }
}
