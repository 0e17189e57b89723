//! A server that answers what a test says: for services of which a few answers are all that is needed.

use std::io::{BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::client::{find, read_head, write_head};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    pub method: String,
    /// The path, and the query after it.
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Asked {
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }
}

/// What it is answered with: a status, headers and a body.
pub type Answer = (u16, Vec<(String, String)>, String);

/// An answer without headers.
pub fn answer(status: u16, body: impl Into<String>) -> Answer {
    (status, Vec::new(), body.into())
}

/// It ends with this.
pub struct Responder {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    ended: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Responder {
    pub fn start(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (noted, answer) = (Arc::clone(&asked), Arc::new(answer));
        let ended = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&ended);
        let accepting = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if end.load(Ordering::SeqCst) {
                    return;
                }
                let (noted, answer) = (Arc::clone(&noted), Arc::clone(&answer));
                // It ends with the connection, which the agent closes.
                std::thread::spawn(move || serve(&stream, &noted, &*answer));
            }
        });
        Self {
            address,
            asked,
            ended,
            accepting: Some(accepting),
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Every request so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("the requests").clone()
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn serve(stream: &TcpStream, noted: &Mutex<Vec<Asked>>, answer: &dyn Fn(&Asked) -> Answer) {
    let mut reader = BufReader::new(stream);
    while let Ok(Some((start, headers))) = read_head(&mut reader) {
        let length = find(&headers, "content-length").and_then(|length| length.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let mut words = start.split(' ').map(str::to_owned);
        let asked = Asked {
            method: words.next().unwrap_or_default(),
            target: words.next().unwrap_or_default(),
            headers,
            body: String::from_utf8_lossy(&body).into_owned(),
        };
        noted.lock().expect("the requests").push(asked.clone());
        let (status, mut headers, body) = answer(&asked);
        headers.push(("Content-Length".to_owned(), body.len().to_string()));
        let head = write_head(format!("HTTP/1.1 {status} Answer\r\n"), &headers);
        let body = if asked.method == "HEAD" { "" } else { &body };
        let mut writer = *reader.get_ref();
        if writer.write_all((head + body).as_bytes()).is_err() {
            return;
        }
    }
}
