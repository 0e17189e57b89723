//! An HTTP/1.1 client that shows how an answer really ended: on a connection of its own, without
//! retries, redirects or decoding.

use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde_json::Value;

use super::PATIENCE;

/// Where a server is.
#[derive(Debug, Clone)]
pub enum Client {
    Tcp(SocketAddr),
    Tls(SocketAddr, Arc<ClientConfig>),
    Unix(PathBuf),
}

impl Client {
    #[track_caller]
    pub fn get(&self, target: &str) -> Reply {
        self.request("GET", target).send()
    }

    #[track_caller]
    pub fn head(&self, target: &str) -> Reply {
        self.request("HEAD", target).send()
    }

    pub fn request(&self, method: &str, target: &str) -> Request {
        let to = self.clone();
        Request {
            to,
            method: method.into(),
            target: target.into(),
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    /// A connection, for more than one request.
    pub fn connect(&self) -> io::Result<Connection> {
        let stream: Box<dyn Stream> = match self {
            Self::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Box::new(stream)
            }
            Self::Tls(address, config) => {
                let stream = TcpStream::connect_timeout(address, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                let name = ServerName::from(address.ip());
                let connection = ClientConnection::new(Arc::clone(config), name);
                Box::new(StreamOwned::new(
                    connection.map_err(io::Error::other)?,
                    stream,
                ))
            }
            Self::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Box::new(stream)
            }
        };
        Ok(Connection {
            stream: BufReader::new(stream),
        })
    }
}

trait Stream: Read + Write + Send {
    fn give_up_after(&self, silence: Duration) -> io::Result<()>;
}

impl Stream for TcpStream {
    fn give_up_after(&self, silence: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(silence))
    }
}

impl Stream for StreamOwned<ClientConnection, TcpStream> {
    fn give_up_after(&self, silence: Duration) -> io::Result<()> {
        self.sock.set_read_timeout(Some(silence))
    }
}

impl Stream for UnixStream {
    fn give_up_after(&self, silence: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(silence))
    }
}

/// A request that is being put together.
#[must_use]
pub struct Request {
    to: Client,
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Request {
    /// Sends these bytes, and says how many they are.
    pub fn body(self, bytes: &[u8]) -> Self {
        let length = bytes.len().to_string();
        let mut request = self.header("Content-Length", &length);
        request.body = bytes.to_vec();
        request
    }

    /// Sends these bytes in chunks, without saying how many they are.
    pub fn stream(self, bytes: &[u8]) -> Self {
        let mut request = self.header("Transfer-Encoding", "chunked");
        for piece in bytes.chunks(10_000) {
            request
                .body
                .extend(format!("{:x}\r\n", piece.len()).bytes());
            request.body.extend(piece);
            request.body.extend(b"\r\n");
        }
        request.body.extend(b"0\r\n\r\n");
        request
    }

    /// As this user.
    pub fn user(self, user: &str, password: &str) -> Self {
        use base64::Engine as _;
        let credentials = format!("{user}:{password}");
        let encoded = base64::engine::general_purpose::STANDARD.encode(credentials);
        self.header("Authorization", &format!("Basic {encoded}"))
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The whole answer.
    #[track_caller]
    pub fn send(self) -> Reply {
        self.open().finish()
    }

    /// The answer's head; the body is read by the test.
    #[track_caller]
    pub fn open(self) -> Response {
        let what = format!("{} {}", self.method, self.target);
        self.try_open()
            .unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// The answer's head, or why there is none.
    pub fn try_open(self) -> io::Result<Response> {
        self.begin()?.response()
    }

    /// Sends the request and waits for nothing.
    pub fn begin(self) -> io::Result<Sent> {
        let mut connection = self.to.connect()?;
        connection.write(&self.method, &self.target, &self.headers)?;
        connection.write_body(&self.body)?;
        Ok(connection.expect(&self.method))
    }
}

/// An open connection on which nothing is under way.
pub struct Connection {
    stream: BufReader<Box<dyn Stream>>,
}

impl Connection {
    pub fn send(
        mut self,
        method: &str,
        target: &str,
        headers: &[(String, String)],
    ) -> io::Result<Sent> {
        self.write(method, target, headers)?;
        Ok(self.expect(method))
    }

    /// Sends a request whose answer is to be read later, after those to the ones before it.
    pub fn write(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(String, String)],
    ) -> io::Result<()> {
        let said = headers.iter().any(|(name, _)| name == "Host");
        let host = if said { "" } else { "Host: mirror.test\r\n" };
        let start = format!("{method} {target} HTTP/1.1\r\n{host}");
        let head = write_head(start, headers);
        self.stream.get_mut().write_all(head.as_bytes())
    }

    /// Sends of a body what the server takes: it may have answered without reading all of it.
    pub fn write_body(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self.stream.get_mut().write_all(bytes) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            written => written,
        }
    }

    /// What comes next is the answer to a request by this method.
    pub fn expect(self, method: &str) -> Sent {
        Sent {
            has_body: method != "HEAD",
            connection: self,
        }
    }

    /// Whether the server has closed it.
    pub fn is_closed(&mut self) -> bool {
        self.stream.fill_buf().is_ok_and(<[u8]>::is_empty)
    }
}

/// A request that is on its way.
pub struct Sent {
    has_body: bool,
    connection: Connection,
}

impl Sent {
    /// Waits for the answer's head.
    pub fn response(mut self) -> io::Result<Response> {
        let head = read_head(&mut self.connection.stream)?;
        let (start, headers) = head.ok_or(io::ErrorKind::UnexpectedEof)?;
        let status = start
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("no status in {start:?}")))?;
        let length = find(&headers, "content-length").and_then(|length| length.parse().ok());
        let left = if !self.has_body || status == 204 || status == 304 {
            Left::Bytes(0)
        } else if find(&headers, "transfer-encoding") == Some("chunked") {
            Left::Chunks
        } else {
            length.map_or(Left::UntilClose, Left::Bytes)
        };
        Ok(Response {
            status,
            headers,
            left,
            connection: self.connection,
        })
    }
}

/// A start line and the header lines below it.
pub(super) type Head = (String, Vec<(String, String)>);

/// A start line and headers as they are sent.
pub(super) fn write_head(start: String, headers: &[(String, String)]) -> String {
    let lines = headers
        .iter()
        .map(|(name, value)| [name, ": ", value, "\r\n"].concat());
    start + &lines.collect::<String>() + "\r\n"
}

/// Reads a start line and headers; nothing at the end of the stream.
pub(super) fn read_head(stream: &mut impl io::BufRead) -> io::Result<Option<Head>> {
    let mut start = String::new();
    if stream.read_line(&mut start)? == 0 {
        return Ok(None);
    }
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.push((name.to_lowercase(), value.trim().to_owned())),
            None => return Ok(Some((start.trim_end().to_owned(), headers))),
        }
    }
}

/// The value of a header; names are lower case.
pub(super) fn find<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers
        .iter()
        .find(|(header, _)| header == name)
        .map(|(_, value)| value.as_str())
}

/// What of a body has not been read.
#[derive(Clone, Copy, PartialEq)]
enum Left {
    Bytes(u64),
    Chunks,
    UntilClose,
}

/// An answer whose body is still on its way.
pub struct Response {
    pub status: u16,
    headers: Vec<(String, String)>,
    left: Left,
    connection: Connection,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    /// The next `length` bytes of a body with a Content-Length.
    #[track_caller]
    pub fn read(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.connection
            .stream
            .read_exact(&mut bytes)
            .expect("the next bytes of the body");
        if let Left::Bytes(left) = &mut self.left {
            *left -= length as u64;
        }
        bytes
    }

    /// All that comes until the server has sent nothing for a while: how far it lets a reader go.
    #[track_caller]
    pub fn read_until_silence(&mut self) -> Vec<u8> {
        let patience = |stream: &mut BufReader<Box<dyn Stream>>, time| {
            stream
                .get_mut()
                .give_up_after(time)
                .expect("a deadline on the socket");
        };
        patience(&mut self.connection.stream, Duration::from_millis(150));
        let mut bytes = Vec::new();
        // An error is the silence; what came before it has been read.
        let _ = self.connection.stream.read_to_end(&mut bytes);
        patience(&mut self.connection.stream, PATIENCE);
        if let Left::Bytes(left) = &mut self.left {
            *left -= bytes.len() as u64;
        }
        bytes
    }

    /// The rest of the body, however it ends.
    #[track_caller]
    pub fn finish(self) -> Reply {
        self.reuse().0
    }

    /// The rest of the body, and the connection for the next request.
    #[track_caller]
    pub fn reuse(mut self) -> (Reply, Connection) {
        let mut body = Vec::new();
        let complete = match self.read_rest(&mut body) {
            Ok(complete) => complete,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                panic!(
                    "the body stopped after {} bytes and never ended",
                    body.len()
                )
            }
            Err(_) => false,
        };
        (
            Reply {
                status: self.status,
                headers: self.headers,
                body,
                complete,
            },
            self.connection,
        )
    }

    fn read_rest(&mut self, body: &mut Vec<u8>) -> io::Result<bool> {
        let stream = &mut self.connection.stream;
        match self.left {
            Left::Bytes(left) => Ok(stream.take(left).read_to_end(body)? as u64 == left),
            Left::UntilClose => stream.read_to_end(body).map(|_| true),
            Left::Chunks => loop {
                let mut line = String::new();
                stream.read_line(&mut line)?;
                let Ok(length) = u64::from_str_radix(line.trim_end(), 16) else {
                    return Ok(false);
                };
                if stream.take(length).read_to_end(body)? as u64 != length {
                    return Ok(false);
                }
                line.clear();
                stream.read_line(&mut line)?;
                if length == 0 {
                    return Ok(line == "\r\n");
                }
            },
        }
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Whether the body was as long as the head had promised.
    pub complete: bool,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {:?}", String::from_utf8_lossy(&self.body)))
    }

    /// The code in the spec's error body; empty where the body is something else.
    pub fn error_code(&self) -> String {
        let body: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        body["errors"][0]["code"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// A 200 with exactly these bytes.
    #[track_caller]
    pub fn assert_is(&self, bytes: &[u8]) {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        assert!(
            self.complete,
            "the body ended after {} of {} bytes",
            self.body.len(),
            bytes.len()
        );
        assert!(
            self.body == bytes,
            "{} other bytes than the {}",
            self.body.len(),
            bytes.len()
        );
    }

    /// An error of the spec's form.
    #[track_caller]
    pub fn assert_error(&self, status: u16, code: &str) {
        let body = String::from_utf8_lossy(&self.body);
        assert_eq!(
            (self.status, self.error_code().as_str()),
            (status, code),
            "{body}"
        );
        let media_type = self.header("content-type").unwrap_or_default();
        assert!(
            media_type.starts_with("application/json"),
            "an error body of type {media_type}"
        );
    }
}
