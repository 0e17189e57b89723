//! The upstream's sockets: accepts, reads requests, and writes answers, byte for byte as the plan
//! for each says.
//!
//! By hand and not by an HTTP server, because a test must know exactly which bytes went out before
//! a connection was cut, and that nothing else did.

use std::io::{self, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use bytes::Bytes;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::fault::{Fault, Plan};
use super::protocol::{Answer, Request};
use super::{Role, Shared};
use crate::support::client::{read_head, write_head};

/// A listening socket and the connections that came from it.
pub(super) struct Listener {
    address: SocketAddrV4,
    stopping: Arc<AtomicBool>,
    connections: Arc<Mutex<Vec<TcpStream>>>,
    accepting: Option<JoinHandle<()>>,
}

impl Listener {
    /// Listens there; port 0 chooses one.
    pub fn start(
        role: Role,
        address: SocketAddrV4,
        tls: Option<Arc<ServerConfig>>,
        shared: Arc<Shared>,
    ) -> Self {
        let listener = TcpListener::bind(address).expect("a loopback address");
        let Ok(SocketAddr::V4(address)) = listener.local_addr() else {
            panic!("no IPv4 address")
        };
        let stopping = Arc::new(AtomicBool::new(false));
        let connections = Arc::new(Mutex::new(Vec::<TcpStream>::new()));
        let (stop, open) = (Arc::clone(&stopping), Arc::clone(&connections));
        let accepting = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let Ok(handle) = stream.try_clone() else {
                    continue;
                };
                open.lock().expect("connections").push(handle);
                let (shared, tls) = (Arc::clone(&shared), tls.clone());
                // How a connection ends is for the client to see.
                std::thread::spawn(move || serve(role, stream, tls, &shared));
            }
        });
        Self {
            address,
            stopping,
            connections,
            accepting: Some(accepting),
        }
    }

    pub fn address(&self) -> SocketAddrV4 {
        self.address
    }

    /// Closes the listening socket and all connections: from now on they are refused.
    pub fn stop(&mut self) {
        let Some(accepting) = self.accepting.take() else {
            return;
        };
        self.stopping.store(true, Ordering::SeqCst);
        // Wakes `accept`, which has no other way out.
        let _ = TcpStream::connect(self.address);
        accepting.join().expect("the accepting thread");
        for stream in self.connections.lock().expect("connections").drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Chooses a port on an address of one's own.
pub(super) fn any_port(address: Ipv4Addr) -> SocketAddrV4 {
    SocketAddrV4::new(address, 0)
}

fn serve(
    role: Role,
    tcp: TcpStream,
    tls: Option<Arc<ServerConfig>>,
    shared: &Shared,
) -> io::Result<()> {
    let socket = tcp.try_clone()?;
    match tls {
        None => converse(role, tcp, &socket, shared),
        Some(config) => {
            let session = ServerConnection::new(config).map_err(io::Error::other)?;
            converse(role, StreamOwned::new(session, tcp), &socket, shared)
        }
    }
}

/// Answers one request after another.
fn converse(
    role: Role,
    stream: impl Read + Write,
    socket: &TcpStream,
    shared: &Shared,
) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    while let Some((start, headers)) = read_head(&mut stream)? {
        let mut words = start.split(' ').map(str::to_owned);
        let (Some(method), Some(target)) = (words.next(), words.next()) else {
            break;
        };
        let request = Request::new(role, method, &target, headers);
        let (number, plan) = shared.received(&request);
        if plan.has(|fault| matches!(fault, Fault::HangHeaders)) {
            return hang(socket);
        }
        let answer = shared.answer(&request, &plan);
        let held = plan.find(|fault| match fault {
            Fault::GateHeaders(gate) => Some(gate.clone()),
            _ => None,
        });
        if let Some(gate) = held {
            gate.pass();
        }
        let whole = request.method == "GET";
        let mut sink = Sink {
            stream: stream.get_mut(),
            socket,
            shared,
            number,
        };
        if !sink.send(&answer, whole, &plan)? {
            return socket.shutdown(Shutdown::Both);
        }
    }
    Ok(())
}

/// Waits until the client, or the test, closes the connection.
fn hang(mut socket: &TcpStream) -> io::Result<()> {
    while socket.read(&mut [0; 1024])? > 0 {}
    Ok(())
}

/// One answer on its way out.
struct Sink<'a, S> {
    stream: &'a mut S,
    socket: &'a TcpStream,
    shared: &'a Shared,
    number: usize,
}

impl<S: Write> Sink<'_, S> {
    /// Writes the answer; `false` if the connection is to be closed after it.
    fn send(&mut self, answer: &Answer, with_body: bool, plan: &Plan) -> io::Result<bool> {
        self.shared
            .record(self.number, |exchange| exchange.status = answer.status);
        let chunked = with_body && plan.has(|fault| matches!(fault, Fault::Chunked));
        let length = if chunked {
            "Transfer-Encoding: chunked".to_owned()
        } else {
            format!("Content-Length: {}", answer.body.len())
        };
        let start = format!("HTTP/1.1 {} -\r\n{length}\r\n", answer.status);
        self.stream
            .write_all(write_head(start, &answer.headers).as_bytes())?;
        self.stream.flush()?;
        if !with_body {
            return Ok(true);
        }
        let body = &answer.body;
        // Where it ends before its time, and whether the connection then ends too.
        let stop = plan.find(|fault| match fault {
            Fault::Cut(at) => Some((*at, true)),
            Fault::HangBody(at) => Some((*at, false)),
            _ => None,
        });
        let stop = stop.filter(|(at, _)| *at < body.len());
        let end = stop.map_or(body.len(), |(at, _)| at);
        let gate = plan.find(|fault| match fault {
            Fault::Gate(at, gate) if *at <= end => Some((*at, gate.clone())),
            _ => None,
        });
        let first = gate.as_ref().map_or(end, |(at, _)| *at);
        self.body(&body.slice(..first), chunked)?;
        if let Some((_, gate)) = gate {
            gate.pass();
        }
        self.body(&body.slice(first..end), chunked)?;
        if let Some((_, cut)) = stop {
            if !cut {
                hang(self.socket)?;
            }
            return Ok(false);
        }
        if chunked {
            self.stream.write_all(b"0\r\n\r\n")?;
            self.stream.flush()?;
        }
        self.shared
            .record(self.number, |exchange| exchange.complete = true);
        Ok(true)
    }

    fn body(&mut self, bytes: &Bytes, chunked: bool) -> io::Result<()> {
        for piece in bytes.chunks(64 * 1024) {
            if chunked {
                self.stream
                    .write_all(format!("{:x}\r\n", piece.len()).as_bytes())?;
            }
            self.stream.write_all(piece)?;
            if chunked {
                self.stream.write_all(b"\r\n")?;
            }
            self.stream.flush()?;
            self.shared
                .record(self.number, |exchange| exchange.sent += piece.len());
        }
        Ok(())
    }
}
