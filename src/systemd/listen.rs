//! The sockets that systemd holds for a service and passes to it: `sd_listen_fds(3)`. They outlive
//! the process, so that nobody is refused while it is started again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::{env, io};

use listenfd::ListenFd;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::AcceptConn;

/// The sockets that were passed and not taken yet. They are told apart by what they are: one unit
/// gives all of its sockets the same name.
#[derive(Debug, Default)]
pub struct Passed {
    tcp: Vec<(SocketAddr, TcpListener)>,
    unix: Vec<(PathBuf, UnixListener)>,
    /// What was passed and can't be listened on.
    problems: Vec<String>,
}

impl Passed {
    /// Those of this process; none without systemd. To be called before there is another thread:
    /// the variables are taken out of the environment, so that no child takes them for its own.
    pub fn from_environment() -> Self {
        // The crate takes sockets of anybody if no process is named. systemd always names one.
        if env::var_os("LISTEN_PID").is_none() {
            return Self::default();
        }
        let mut fds = ListenFd::from_env();
        let mut passed = Self::default();
        for index in 0..fds.len() {
            if let Err(problem) = passed.add(&mut fds, index) {
                passed.problems.push(format!(
                    "the socket number {index} that systemd passed can't be used: {problem}"
                ));
            }
        }
        passed
    }

    fn add(&mut self, fds: &mut ListenFd, index: usize) -> io::Result<()> {
        if let Ok(Some(listener)) = fds.take_unix_listener(index) {
            must_listen(getsockopt(&listener, AcceptConn))?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            let path = address.as_pathname().map(Path::to_owned);
            let path = path.ok_or_else(|| io::Error::other("it has no path"))?;
            self.unix.push((path, listener));
        } else if let Some(listener) = fds.take_tcp_listener(index)? {
            must_listen(getsockopt(&listener, AcceptConn))?;
            listener.set_nonblocking(true)?;
            self.tcp.push((listener.local_addr()?, listener));
        }
        Ok(())
    }

    /// The socket that listens on `wanted`, where one was passed.
    pub fn take_tcp(&mut self, wanted: SocketAddr) -> Option<TcpListener> {
        let mut listeners = self.tcp.iter();
        let index = listeners.position(|(address, _)| is(*address, wanted))?;
        Some(self.tcp.swap_remove(index).1)
    }

    /// The socket with this path, where one was passed.
    pub fn take_unix(&mut self, wanted: &Path) -> Option<UnixListener> {
        let mut listeners = self.unix.iter();
        let index = listeners.position(|(path, _)| path == wanted)?;
        Some(self.unix.swap_remove(index).1)
    }

    /// What is wrong with the rest, which closes with `self`: whoever connects to such a socket
    /// waits for ever, since systemd goes on listening on it.
    pub fn problems(self) -> impl Iterator<Item = String> {
        const REMEDY: &str = "`registry-agent install` has registry-agent.socket follow the \
                              configuration";
        let tcp = self.tcp.into_iter().map(|(address, _)| {
            format!(
                "systemd listens on {address} for this agent, and the configuration does not \
                 (`listen`): {REMEDY}"
            )
        });
        let unix = self.unix.into_iter().map(|(path, _)| {
            format!(
                "systemd listens on {} for this agent, and the configuration does not (`admin`): \
                 {REMEDY}",
                path.display()
            )
        });
        self.problems.into_iter().chain(tcp).chain(unix)
    }
}

fn must_listen(listens: nix::Result<bool>) -> io::Result<()> {
    if listens? {
        return Ok(());
    }
    Err(io::Error::other("it does not listen"))
}

/// Whether a passed socket is the wanted one. Where a host has no IPv6, systemd gives all IPv4
/// interfaces for all interfaces, as this agent does.
fn is(passed: SocketAddr, wanted: SocketAddr) -> bool {
    let all_v4 = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let all = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    passed.port() == wanted.port()
        && (passed.ip() == wanted.ip() || (wanted.ip() == all && passed.ip() == all_v4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passed_socket_is_taken_for_its_own_address_only() {
        for (passed, wanted, taken) in [
            ("127.0.0.1:5000", "127.0.0.1:5000", true),
            ("127.0.0.1:5000", "127.0.0.1:5001", false),
            ("127.0.0.1:5000", "0.0.0.0:5000", false),
            ("0.0.0.0:5000", "127.0.0.1:5000", false),
            ("[::]:5000", "[::]:5000", true),
            ("0.0.0.0:5000", "[::]:5000", true),
            ("[::]:5000", "0.0.0.0:5000", false),
            ("[::1]:5000", "[::]:5000", false),
        ] {
            let addresses = (passed.parse().unwrap(), wanted.parse().unwrap());
            assert_eq!(is(addresses.0, addresses.1), taken, "{passed} for {wanted}");
        }
    }

    #[test]
    fn what_nobody_takes_is_told_with_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let mut passed = Passed {
            tcp: vec![(address, tcp)],
            unix: vec![(path.clone(), UnixListener::bind(&path).unwrap())],
            problems: Vec::new(),
        };
        assert!(passed.take_unix(Path::new("/elsewhere")).is_none());
        let told: Vec<String> = passed.problems().collect();
        assert!(told[0].contains(&address.to_string()) && told[0].contains("`listen`"));
        assert!(told[1].contains(path.to_str().unwrap()) && told[1].contains("`admin`"));
    }
}
