//! Names of other hosts, by `/etc/hosts` and DNS.
//!
//! A static binary can't use the C library's own way: that loads the shared libraries which
//! `/etc/nsswitch.conf` names, of whatever version the host has, into a process that was linked with
//! another (ld(1) warns of it). So such a binary asks by itself. What that does not know are the
//! names that only a library of the host knows (mDNS, LDAP, NIS); a binary that is linked
//! dynamically leaves everything to the C library.

use std::fs::File;
use std::future::Future;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::vec;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, ResolveHosts, ResolverConfig};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::system_conf::parse_resolv_conf;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use tower_service::Service;

/// Bytes: block lists of hundreds of thousands of names are smaller.
const FILE_LIMIT: u64 = 32 << 20;

/// A connector that looks names up by [`Resolver::of_this_build`].
pub type Connector = HttpConnector<Resolver>;

/// A new one, for http and https.
pub fn connector() -> Connector {
    let mut connector = HttpConnector::new_with_resolver(Resolver::of_this_build());
    connector.enforce_http(false);
    connector
}

/// Finds the addresses of a name. Clones share what is cached.
#[derive(Clone)]
pub enum Resolver {
    /// As every other program of the host: getaddrinfo(3).
    System(GaiResolver),
    /// By itself.
    Own(Arc<Own>),
}

impl Resolver {
    /// What this binary can use: the C library's own way, unless it is linked statically.
    pub fn of_this_build() -> Self {
        if cfg!(target_feature = "crt-static") {
            Self::own(Path::new("/etc/hosts"), Path::new("/etc/resolv.conf"))
        } else {
            Self::System(GaiResolver::new())
        }
    }

    /// One that reads these two files: hosts(5) and resolv.conf(5).
    pub fn own(hosts: &Path, resolv_conf: &Path) -> Self {
        Self::own_at(hosts, resolv_conf, 53)
    }

    /// Name servers answer at this port, which resolv.conf(5) does not say.
    fn own_at(hosts: &Path, resolv_conf: &Path, port: u16) -> Self {
        Self::Own(Arc::new(Own {
            hosts: hosts.to_owned(),
            resolv_conf: resolv_conf.to_owned(),
            port,
            servers: Mutex::default(),
        }))
    }
}

impl Resolver {
    /// The addresses of a host.
    pub async fn addresses(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        let mut resolver = self.clone();
        let name = Name::from_str(name).map_err(io::Error::other)?;
        let found = resolver.call(name).await?;
        Ok(found.map(|address| address.ip()).collect())
    }
}

impl Service<Name> for Resolver {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        match self {
            Self::System(system) => {
                let found = system.call(name);
                Box::pin(async { Ok(found.await?.collect::<Vec<_>>().into_iter()) })
            }
            Self::Own(own) => {
                let own = own.clone();
                Box::pin(async move {
                    let found = own.addresses(name.as_str()).await?;
                    // The port is the connector's.
                    let found: Vec<_> = found.into_iter().map(|ip| (ip, 0).into()).collect();
                    Ok(found.into_iter())
                })
            }
        }
    }
}

/// The files, and the name servers that they said last.
pub struct Own {
    hosts: PathBuf,
    resolv_conf: PathBuf,
    port: u16,
    servers: Mutex<Option<(Vec<u8>, TokioResolver)>>,
}

impl Own {
    async fn addresses(self: Arc<Self>, name: &str) -> io::Result<Vec<IpAddr>> {
        let owned = name.to_owned();
        let look = move || self.look(&owned);
        // Files are read anew for every connection: a network that comes up later writes them then.
        let looked = tokio::task::spawn_blocking(look).await;
        match looked.map_err(io::Error::other)?? {
            Known::Here(found) => Ok(found),
            Known::Ask(servers) => {
                let found = servers.lookup_ip(name).await.map_err(io::Error::other)?;
                Ok(found.iter().collect())
            }
        }
    }

    fn look(&self, name: &str) -> io::Result<Known> {
        // A host without the file has no such names.
        let hosts = read(&self.hosts).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(Vec::new()),
            _ => Err(error),
        })?;
        let found = in_hosts(&String::from_utf8_lossy(&hosts), name);
        if !found.is_empty() {
            return Ok(Known::Here(found));
        }
        let said = read(&self.resolv_conf)?;
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((before, servers)) = &*servers
            && *before == said
        {
            return Ok(Known::Ask(Box::new(servers.clone())));
        }
        let new = ask_by(&said, self.port)
            .map_err(|error| about(&self.resolv_conf, &io::Error::other(error)))?;
        *servers = Some((said, new.clone()));
        Ok(Known::Ask(Box::new(new)))
    }
}

enum Known {
    Here(Vec<IpAddr>),
    Ask(Box<TokioResolver>),
}

fn ask_by(resolv_conf: &[u8], port: u16) -> Result<TokioResolver, NetError> {
    let (config, mut options) = parse_resolv_conf(resolv_conf)?;
    let (domain, search, mut servers) = config.into_parts();
    for connection in servers
        .iter_mut()
        .flat_map(|server| &mut server.connections)
    {
        connection.port = port;
    }
    let config = ResolverConfig::from_parts(domain, search, servers);
    options.use_hosts_file = ResolveHosts::Never;
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    let provider = TokioRuntimeProvider::default();
    let builder = TokioResolver::builder_with_config(config, provider);
    builder.with_options(options).build()
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(FILE_LIMIT).read_to_end(&mut bytes));
    match read {
        Ok(_) => Ok(bytes),
        Err(error) => Err(about(path, &error)),
    }
}

fn about(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// A name's addresses in a hosts(5) file. `localhost` needs no file.
fn in_hosts(text: &str, name: &str) -> Vec<IpAddr> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line
            .split('#')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let address = words.next().and_then(|address| address.parse().ok());
        if let Some(address) = address
            && words.any(|word| word.eq_ignore_ascii_case(name))
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    if found.is_empty() && name.eq_ignore_ascii_case("localhost") {
        // RFC 6761, 6.3.
        found.push(std::net::Ipv4Addr::LOCALHOST.into());
    }
    found
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::str::FromStr;

    use tokio::net::UdpSocket;

    use super::*;

    /// A file of a test's own.
    fn write(path: &Path, text: &str) {
        let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap()).unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        file.persist(path).unwrap();
    }

    async fn lookup(resolver: &Resolver, name: &str) -> io::Result<Vec<IpAddr>> {
        let found = resolver.clone().call(Name::from_str(name).unwrap()).await?;
        Ok(found.map(|address| address.ip()).collect())
    }

    #[test]
    fn a_hosts_file_is_read_as_the_c_library_reads_it() {
        let text = "\
# 192.0.2.9 app
192.0.2.1\tapp.example.com app # not this
2001:db8::1 app
not-an-address app
192.0.2.1 APP
";
        let of = |name| {
            let found = in_hosts(text, name);
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(of("app"), ["192.0.2.1", "2001:db8::1"]);
        assert_eq!(of("App.Example.com."), ["192.0.2.1"]);
        for unknown in ["not", "192.0.2.1", "example.com", ""] {
            assert!(of(unknown).is_empty(), "{unknown}");
        }
        assert_eq!(of("localhost"), ["127.0.0.1"]);
    }

    #[tokio::test]
    async fn what_the_files_say_now_counts_and_a_missing_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (hosts, conf) = (
            folder.path().join("hosts"),
            folder.path().join("resolv.conf"),
        );
        let resolver = Resolver::own(&hosts, &conf);
        let error = lookup(&resolver, "one.test").await.unwrap_err();
        assert!(error.to_string().contains("resolv.conf"), "{error}");

        write(&hosts, "192.0.2.1 one.test\n");
        let one: IpAddr = "192.0.2.1".parse().unwrap();
        assert_eq!(lookup(&resolver, "one.test").await.unwrap(), [one]);

        write(&conf, "# none\n");
        let error = lookup(&resolver, "two.test").await.unwrap_err();
        assert!(error.to_string().contains("resolv.conf"), "{error}");
    }

    /// Answers every question for an A record with `address`, and has none of any other type.
    async fn name_server(socket: UdpSocket, address: Ipv4Addr) {
        let mut packet = [0; 512];
        loop {
            let (length, client) = socket.recv_from(&mut packet).await.unwrap();
            // RFC 1035, 4.1: a header of 12 bytes, then the question: labels, type, class.
            let labels = packet[12..length]
                .iter()
                .position(|byte| *byte == 0)
                .unwrap();
            let question = &packet[12..12 + labels + 5];
            let is_a = question[labels + 1..labels + 3] == [0, 1];
            let mut answer = packet[..2].to_vec();
            answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
            answer.extend(question);
            if is_a {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                answer.extend(address.octets());
            }
            socket.send_to(&answer, client).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_name_server_is_asked_for_what_no_file_has() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = socket.local_addr().unwrap().port();
        let address = Ipv4Addr::new(192, 0, 2, 7);
        tokio::spawn(name_server(socket, address));
        let folder = tempfile::tempdir().unwrap();
        let conf = folder.path().join("resolv.conf");
        write(&conf, "nameserver 127.0.0.1\n");
        let resolver = Resolver::own_at(&folder.path().join("none"), &conf, port);
        assert_eq!(lookup(&resolver, "any.test").await.unwrap(), [address]);
    }
}
