//! Docker Hub, as far as clients can tell: a real registry (Debian's docker-registry) that trusts
//! a token server, behind TLS, its blobs redirected to a content delivery network. Under other
//! names it is another registry.
//!
//! Everything that was asked of it is on record. It can be told to answer otherwise, to hold blobs
//! in the middle, and it can be switched off.

use std::future::Future;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::authority::Authority;
use super::host::Host;
use super::image::Image;
use super::network::{Attachment, Network};
use super::scratch::Scratch;
use front::Front;
use registry::Registry;
use tokens::{Access, Tokens};

pub use names::{DOCKER_HUB, GHCR, Names};
pub use record::Request;

mod front;
mod gate;
mod names;
mod push;
mod record;
mod registry;
mod tokens;

/// How long the Hub's own thread may take for one thing that it is told.
const PATIENCE: Duration = Duration::from_mins(1);

/// A Docker Hub, or another registry, in a network of the tests.
pub struct Hub {
    names: &'static Names,
    // In this order on drop: no more requests, then no registry, then no network.
    runtime: Runtime,
    listening: Option<JoinHandle<()>>,
    front: Arc<Front>,
    authority: Authority,
    acceptor: TlsAcceptor,
    attachment: Attachment,
    _registry: Registry,
    _scratch: Scratch,
}

impl Hub {
    /// Starts it, empty, with an authority of its own, at 198.18.0.2.
    pub fn start(network: &Network) -> Self {
        Self::start_as(&DOCKER_HUB, network, 2)
    }

    /// Starts a registry of these names, with an authority of its own, at 198.18.0.`last`.
    pub fn start_as(names: &'static Names, network: &Network, last: u8) -> Self {
        let attachment = network.join("hub", last);
        let authority = Authority::new(&format!("Test authority of {}", names.registry));
        let scratch = Scratch::new("hub");
        let tokens = Tokens::new(names.service);
        let runtime = attachment.runtime();
        let registry = Registry::start(&scratch, &attachment, names, &tokens.certificate_pem());
        let acceptor = front::acceptor(&authority.issue(&names.all()));
        let front = Arc::new(Front::new(names, tokens, registry.storage()));
        let mut hub = Self {
            names,
            runtime,
            listening: None,
            front,
            authority,
            acceptor,
            attachment,
            _registry: registry,
            _scratch: scratch,
        };
        hub.wait_for(registry::answers());
        hub.switch_on();
        hub
    }

    /// Makes a host find the Hub under its names, and trust its authority.
    pub fn introduce_to(&self, host: &Host) {
        host.add_names(self.attachment.address(), &self.names.all());
        host.trust(self.names.registry, &self.authority);
    }

    /// Publishes an image under `repository:tag`, which all may pull.
    pub fn publish(&self, repository: &str, tag: &str, image: &Image) {
        let access = Access {
            repository,
            actions: &["pull", "push"],
        };
        let token = self.front.tokens.sign(&[access]);
        self.wait_for(push::push(
            token,
            repository.to_owned(),
            tag.to_owned(),
            image,
        ));
    }

    /// From now on only users may pull `repository`.
    pub fn make_private(&self, repository: &str) {
        self.front.tokens.make_private(repository);
    }

    /// Adds a user, who may pull every repository.
    pub fn add_user(&self, name: &str, password: &str) {
        self.front.tokens.add_user(name, password);
    }

    /// Accepts connections, as it does from its start.
    pub fn switch_on(&mut self) {
        assert!(self.listening.is_none(), "the Hub is on already");
        let address = (self.attachment.address(), 443);
        let listener = self.wait_for(async move { TcpListener::bind(address).await });
        let listener = listener.unwrap_or_else(|error| panic!("listening on {address:?}: {error}"));
        let serving = front::serve(listener, self.acceptor.clone(), Arc::clone(&self.front));
        self.listening = Some(self.runtime.spawn(serving));
    }

    /// Breaks all connections, and refuses new ones.
    pub fn switch_off(&mut self) {
        let listening = self.listening.take().expect("a Hub that is on");
        listening.abort();
        self.wait_for(async move { listening.await.ok() });
    }

    /// Asks `fault` before answering each request; what it returns is the answer.
    pub fn disturb(
        &self,
        fault: impl Fn(&Request) -> Option<Response<Bytes>> + Send + Sync + 'static,
    ) {
        self.front.disturb(Some(Box::new(fault)));
    }

    /// Answers as Docker Hub does again.
    pub fn calm(&self) {
        self.front.disturb(None);
    }

    /// From now on, sends only the first `bytes` of each blob that is longer, and holds the rest.
    pub fn hold_blobs_after(&self, bytes: usize) {
        self.front.gate.close(bytes);
    }

    /// Waits until a client has been sent the beginning of a blob, and is kept waiting.
    #[track_caller]
    pub fn wait_until_a_blob_is_held(&self) {
        self.front.gate.wait_until_reached(PATIENCE);
    }

    /// Sends what is held, and all blobs that are asked for from now on, to their ends.
    pub fn release_blobs(&self) {
        self.front.gate.open(gate::End::Released);
    }

    /// Breaks off what is held. Blobs that are asked for from now on are sent to their ends.
    pub fn cut_blobs(&self) {
        self.front.gate.open(gate::End::Cut);
    }

    /// Everything that was asked since the start, in the order in which it came.
    pub fn requests(&self) -> Vec<Request> {
        self.front.log.requests()
    }

    /// Requests for content: manifests and blobs by GET, from the registry and from the CDN.
    /// Everything else (tokens, HEAD) moves nothing that counts.
    pub fn downloads(&self) -> Vec<Request> {
        let requests = self.requests().into_iter();
        requests
            .filter(|request| request.method == "GET" && request.is_content())
            .collect()
    }

    /// Bytes of blobs that were sent to anyone.
    pub fn blob_bytes_sent(&self) -> u64 {
        let requests = self.requests().into_iter();
        requests
            .filter(Request::is_for_cdn)
            .map(|request| request.sent)
            .sum()
    }

    /// Panics if a client went around its mirror: all of them fall back to the registry itself in
    /// silence when the mirror fails them, and the pull succeeds.
    #[track_caller]
    pub fn assert_only_agents_asked(&self) {
        let requests = self.requests();
        let registry = self.names.registry;
        assert!(!requests.is_empty(), "nobody asked {registry}");
        for request in requests {
            assert!(
                request.is_by_agent(),
                "a client went around the agent: {request}"
            );
        }
    }

    /// Runs something in the Hub's own network.
    #[track_caller]
    fn wait_for<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        let (sender, receiver) = mpsc::channel();
        self.runtime.spawn(async move { sender.send(future.await) });
        receiver
            .recv_timeout(PATIENCE)
            .expect("the Hub's own thread answers")
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if thread::panicking() {
            let (registry, address) = (self.names.registry, self.attachment.address());
            eprintln!("=== {registry} ({address}) was asked");
            for request in self.requests() {
                eprintln!("{request}");
            }
        }
    }
}
