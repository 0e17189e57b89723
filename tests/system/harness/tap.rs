//! A wire that is listened to: what clients say to a server, byte by byte.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

use super::network::{Attachment, Network};

/// Passes connections on to a server, and keeps what the clients send.
pub struct Tap {
    // Before the network that it is in.
    _runtime: Runtime,
    attachment: Attachment,
    heard: Heard,
}

type Heard = Arc<Mutex<Vec<u8>>>;

impl Tap {
    /// Listens at 198.18.0.`last`, at the port of `server`, to whom it passes on.
    pub fn new(network: &Network, last: u8, server: SocketAddr) -> Self {
        let attachment = network.join("tap", last);
        let runtime = attachment.runtime();
        let heard = Heard::default();
        let address = SocketAddr::new(attachment.address(), server.port());
        // By the runtime's own thread, which is where the address is.
        let listener = runtime.block_on(runtime.spawn(TcpListener::bind(address)));
        let listener = listener.expect("a thread that listens");
        let listener = listener.unwrap_or_else(|error| panic!("listening on {address}: {error}"));
        runtime.spawn(pass_on(listener, server, Arc::clone(&heard)));
        Self {
            _runtime: runtime,
            attachment,
            heard,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> std::net::IpAddr {
        self.attachment.address()
    }

    /// Everything that clients have said so far.
    pub fn heard(&self) -> String {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&heard).into_owned()
    }
}

async fn pass_on(listener: TcpListener, server: SocketAddr, heard: Heard) {
    while let Ok((client, _)) = listener.accept().await {
        // A server that is down refuses, as it does without a tap.
        let Ok(server) = TcpStream::connect(server).await else {
            continue;
        };
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::spawn(copy(from_client, to_server, Some(Arc::clone(&heard))));
        tokio::spawn(copy(from_server, to_client, None));
    }
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, heard: Option<Heard>) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut bytes).await {
        if let Some(heard) = &heard {
            let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.extend_from_slice(&bytes[..length]);
        }
        if to.write_all(&bytes[..length]).await.is_err() {
            return;
        }
    }
}
