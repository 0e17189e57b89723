//! A stand-in for S3 that costs next to nothing, so that what is measured is its client.
//!
//! It answers what registry-agent and docker-registry ask, from memory, each connection at S3's own
//! pace, and counts. It looks at no signature and hashes nothing; to complete an upload, or to copy
//! an object, takes it no time at all, which favours docker-registry: that writes an upload elsewhere
//! first, and then has S3 copy it. The tests use a real server (`tests/support/s3.rs`), which would
//! take more of two processors than those who are measured.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use url::form_urlencoded;

use super::support::pause;

/// The bucket that is there.
pub const BUCKET: &str = "images";
/// What a connection sends or takes at a time.
const PIECE: usize = 128 * 1024;
/// The most keys of a list, as in S3.
const PAGE: usize = 1000;
/// Sorts behind every key of a folder.
const LAST: char = char::MAX;
const DATE: &str = "2026-01-01T00:00:00.000Z";

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
    /// Makes ETags and the ids of uploads.
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
    /// What is said of a body that is not sent.
    length: usize,
}

fn plain(status: &'static str, body: impl Into<Bytes>) -> Answer {
    let body = body.into();
    Answer {
        status,
        headers: "Content-Type: application/xml\r\n".to_owned(),
        length: body.len(),
        body: vec![body],
    }
}

fn error(status: &'static str, code: &str) -> Answer {
    plain(status, format!("<Error><Code>{code}</Code></Error>"))
}

fn tagged(status: &'static str, etag: &str) -> Answer {
    let mut answer = plain(status, "");
    answer.headers = format!("ETag: \"{etag}\"\r\n");
    answer
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
        self.state().lay(key, vec![bytes.into()]);
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
            write!(
                stream,
                "HTTP/1.1 {}\r\n{}Content-Length: {}\r\n\r\n",
                answer.status, answer.headers, answer.length
            )?;
            if request.operation() == "GET" {
                self.state().begin();
                let sent = self.send(&mut stream, &request.key, &answer.body, pace.rate);
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
        body: &[Bytes],
        rate: u64,
    ) -> std::io::Result<()> {
        let mut paced = Paced::new(rate);
        for piece in body.iter().flat_map(|piece| piece.chunks(PIECE)) {
            paced.wait(piece.len());
            stream.write_all(piece)?;
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

impl State {
    fn begin(&mut self) {
        self.counts.now += 1;
        self.counts.most = self.counts.most.max(self.counts.now);
    }

    fn next(&mut self) -> String {
        self.number += 1;
        format!("{:032x}", self.number)
    }

    fn lay(&mut self, key: &str, pieces: Vec<Bytes>) -> String {
        let etag = self.next();
        let object = Object {
            pieces,
            etag: etag.clone(),
        };
        self.objects.insert(key.to_owned(), object);
        etag
    }

    fn answer(&mut self, request: &Request) -> Answer {
        let has = |name: &str| request.query.contains_key(name);
        match request.operation() {
            "LIST" if has("uploads") => self.uploads(request),
            "LIST" => self.list(request),
            "GET" if has("uploadId") => self.parts(request),
            "GET" | "HEAD" => self.get(request),
            "PUT" | "COPY" => self.put(request),
            "POST" if has("delete") => self.delete_many(request),
            "POST" if has("uploads") => self.create(request),
            "POST" => self.complete(request),
            _ => {
                match request.query("uploadId") {
                    Some(id) => drop(self.uploads.remove(id)),
                    None => drop(self.objects.remove(&request.key)),
                }
                plain("204 No Content", "")
            }
        }
    }

    fn get(&self, request: &Request) -> Answer {
        let Some(object) = self.objects.get(&request.key) else {
            return error("404 Not Found", "NoSuchKey");
        };
        let (size, etag) = (object.size(), format!("\"{}\"", object.etag));
        if request.header("if-none-match") == Some(&etag) {
            return tagged("304 Not Modified", &object.etag);
        }
        if request.header("if-match").is_some_and(|it| it != etag) {
            return error("412 Precondition Failed", "PreconditionFailed");
        }
        let mut headers = format!(
            "ETag: {etag}\r\nAccept-Ranges: bytes\r\nContent-Type: application/octet-stream\r\n\
             Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
        );
        let (status, from, to) = match request.range(size) {
            None => ("200 OK", 0, size),
            Some(Err(())) => return error("416 Range Not Satisfiable", "InvalidRange"),
            Some(Ok((from, to))) => {
                headers += &format!("Content-Range: bytes {from}-{}/{size}\r\n", to - 1);
                ("206 Partial Content", from, to)
            }
        };
        Answer {
            status,
            headers,
            body: object.part(from, to),
            length: to - from,
        }
    }

    /// An object, or a part of one: what was sent, or a copy.
    fn put(&mut self, request: &Request) -> Answer {
        let there = self.objects.get(&request.key);
        let is = |etag: &str| there.is_some_and(|it| etag == format!("\"{}\"", it.etag));
        if request.header("if-none-match") == Some("*") && there.is_some()
            || request.header("if-match").is_some_and(|etag| !is(etag))
        {
            return error("412 Precondition Failed", "PreconditionFailed");
        }
        let pieces = match request.header("x-amz-copy-source") {
            None => vec![request.body.clone()],
            Some(source) => {
                let source = percent_encoding::percent_decode_str(source).decode_utf8_lossy();
                let source = source.trim_start_matches('/').strip_prefix(BUCKET);
                let source = source.unwrap_or_default().trim_start_matches('/');
                let Some(object) = self.objects.get(source) else {
                    return error("404 Not Found", "NoSuchKey");
                };
                let range = request.header("x-amz-copy-source-range");
                let range = range.and_then(|it| it.strip_prefix("bytes=")?.split_once('-'));
                let number = |text: &str| text.parse::<usize>().expect("a number");
                let (from, to) = range.map_or((0, object.size()), |(from, last)| {
                    (number(from), number(last) + 1)
                });
                object.part(from, to)
            }
        };
        let etag = match (request.query("uploadId"), request.query("partNumber")) {
            (Some(id), Some(part)) => {
                let etag = self.next();
                let Some(upload) = self.uploads.get_mut(id) else {
                    return error("404 Not Found", "NoSuchUpload");
                };
                let object = Object {
                    pieces,
                    etag: etag.clone(),
                };
                let part = part.parse().expect("a part's number");
                upload.parts.insert(part, object);
                etag
            }
            _ => self.lay(&request.key, pieces),
        };
        if request.operation() == "COPY" {
            return plain(
                "200 OK",
                format!(
                    "<CopyPartResult><LastModified>{DATE}</LastModified><ETag>\"{etag}\"</ETag></CopyPartResult>"
                ),
            );
        }
        tagged("200 OK", &etag)
    }

    fn create(&mut self, request: &Request) -> Answer {
        let id = self.next();
        let upload = Upload {
            key: request.key.clone(),
            parts: BTreeMap::new(),
        };
        self.uploads.insert(id.clone(), upload);
        let text = format!(
            "<InitiateMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{}</Key><UploadId>{id}</UploadId></InitiateMultipartUploadResult>",
            request.key
        );
        plain("200 OK", text)
    }

    fn complete(&mut self, request: &Request) -> Answer {
        let id = request.query("uploadId").unwrap_or_default();
        let Some(upload) = self.uploads.remove(id) else {
            return error("404 Not Found", "NoSuchUpload");
        };
        let parts = upload.parts.into_values();
        let etag = self.lay(&request.key, parts.flat_map(|part| part.pieces).collect());
        let text = format!(
            "<CompleteMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{}</Key><ETag>\"{etag}\"</ETag></CompleteMultipartUploadResult>",
            request.key
        );
        plain("200 OK", text)
    }

    fn uploads(&self, request: &Request) -> Answer {
        let prefix = request.query("prefix").unwrap_or_default();
        let mut text = "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>".to_owned();
        for (id, upload) in &self.uploads {
            if upload.key.starts_with(prefix) {
                text += &format!(
                    "<Upload><Key>{}</Key><UploadId>{id}</UploadId><Initiated>{DATE}</Initiated></Upload>",
                    upload.key
                );
            }
        }
        plain("200 OK", text + "</ListMultipartUploadsResult>")
    }

    fn parts(&self, request: &Request) -> Answer {
        let id = request.query("uploadId").unwrap_or_default();
        let Some(upload) = self.uploads.get(id) else {
            return error("404 Not Found", "NoSuchUpload");
        };
        let mut text = "<ListPartsResult><IsTruncated>false</IsTruncated>".to_owned();
        for (number, part) in &upload.parts {
            text += &format!(
                "<Part><PartNumber>{number}</PartNumber><LastModified>{DATE}</LastModified><ETag>\"{}\"</ETag><Size>{}</Size></Part>",
                part.etag,
                part.size()
            );
        }
        plain("200 OK", text + "</ListPartsResult>")
    }

    fn delete_many(&mut self, request: &Request) -> Answer {
        let text = String::from_utf8_lossy(&request.body);
        for rest in text.split("<Key>").skip(1) {
            let key = rest.split("</Key>").next().unwrap_or_default();
            self.objects.remove(key);
        }
        plain("200 OK", "<DeleteResult></DeleteResult>")
    }

    /// `ListObjectsV2`, and `ListObjects`, of which docker-registry makes some of its lists.
    fn list(&self, request: &Request) -> Answer {
        let prefix = request.query("prefix").unwrap_or_default();
        let most = request.query("max-keys").and_then(|most| most.parse().ok());
        let most = most.unwrap_or(PAGE).min(PAGE);
        let token = request.query("continuation-token");
        let token = token.or(request.query("marker")).map(|token| {
            // Of an answer that ended with a folder.
            let folder = token.ends_with('/').then_some(LAST);
            token.chars().chain(folder).collect::<String>()
        });
        let mut after = token.or(request.query("start-after").map(str::to_owned));
        let (mut text, mut count, mut more) = (String::new(), 0, None);
        loop {
            let from = match &after {
                Some(after) if after.as_str() >= prefix => Bound::Excluded(after.as_str()),
                _ => Bound::Included(prefix),
            };
            let next = self
                .objects
                .range::<str, _>((from, Bound::Unbounded))
                .next();
            let Some((key, object)) = next.filter(|(key, _)| key.starts_with(prefix)) else {
                more = None;
                break;
            };
            if count == most {
                break;
            }
            count += 1;
            let delimiter = request.query("delimiter").filter(|it| !it.is_empty());
            let end = delimiter.and_then(|it| Some(key[prefix.len()..].find(it)? + it.len()));
            let (token, skip) = match end {
                Some(end) => {
                    let folder = &key[..prefix.len() + end];
                    text += &format!("<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>");
                    (folder.to_owned(), format!("{folder}{LAST}"))
                }
                None => {
                    text += &format!(
                        "<Contents><Key>{key}</Key><LastModified>{DATE}</LastModified><ETag>\"{}\"</ETag><Size>{}</Size></Contents>",
                        object.etag,
                        object.size()
                    );
                    (key.clone(), key.clone())
                }
            };
            (more, after) = (Some(token), Some(skip));
        }
        let next = more.as_ref().map_or(String::new(), |token| {
            format!(
                "<NextContinuationToken>{token}</NextContinuationToken><NextMarker>{token}</NextMarker>"
            )
        });
        plain(
            "200 OK",
            format!(
                "<ListBucketResult><Name>{BUCKET}</Name><Prefix>{prefix}</Prefix><KeyCount>{count}</KeyCount>\
                 <MaxKeys>{most}</MaxKeys><IsTruncated>{}</IsTruncated>{next}{text}</ListBucketResult>",
                more.is_some()
            ),
        )
    }
}
