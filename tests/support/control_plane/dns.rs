//! The zones' name server, for A and AAAA: what all servers of Route 53 know at the moment.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::net::UdpSocket;

use super::Core;

/// The most records of an answer, of those that are chosen anew for each.
const MOST: usize = 8;
const NO_SUCH_NAME: u8 = 3;
const REFUSED: u8 = 5;

/// Answers, for ever.
pub async fn serve(socket: std::net::UdpSocket, core: Arc<Core>) {
    let socket = UdpSocket::from_std(socket).expect("a socket");
    let mut query = [0; 512];
    loop {
        let Ok((length, client)) = socket.recv_from(&mut query).await else {
            continue;
        };
        if let Some(reply) = answer(&core, &query[..length]) {
            let _ = socket.send_to(&reply, client).await;
        }
    }
}

/// The name and the type of the one question, and where it ends (RFC 1035, section 4.1).
fn question(query: &[u8]) -> Option<(String, u16, usize)> {
    if query.len() < 12 || query[2] & 0x80 != 0 || query[4..6] != [0, 1] {
        return None;
    }
    let (mut at, mut labels) = (12, Vec::new());
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8(query.get(at..at + length)?.to_vec()).ok()?);
        at += length;
    }
    let kind = u16::from_be_bytes(query.get(at..at + 2)?.try_into().ok()?);
    Some((labels.join(".") + ".", kind, at + 4))
}

fn answer(core: &Arc<Core>, query: &[u8]) -> Option<Vec<u8>> {
    let (name, kind, end) = question(query)?;
    let (status, found) = records(core, &name, kind);
    let mut reply = query.get(..end)?.to_vec();
    // An answer with authority, without recursion; what was asked for of it is repeated.
    (reply[2], reply[3]) = (0x84 | query[2] & 1, status);
    reply[6..8].copy_from_slice(&u16::try_from(found.len()).ok()?.to_be_bytes());
    reply[8..12].fill(0);
    for (address, ttl) in found {
        // The question's name, its type and class.
        reply.extend([0xc0, 12]);
        reply.extend(kind.to_be_bytes());
        reply.extend([0, 1]);
        reply.extend(ttl.to_be_bytes());
        let octets = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        reply.extend(u16::try_from(octets.len()).ok()?.to_be_bytes());
        reply.extend(octets);
    }
    Some(reply)
}

fn records(core: &Arc<Core>, name: &str, kind: u16) -> (u8, Vec<(IpAddr, u32)>) {
    let mut state = core.lock();
    state.settle();
    let now = state.world.rest.now;
    let mut zones = state.world.rest.zones.values();
    let Some(zone) = zones.find(|it| name == it.name || name.ends_with(&format!(".{}", it.name)))
    else {
        return (REFUSED, Vec::new());
    };
    let of = |kind| zone.answers(name, kind, now);
    let mut found = match kind {
        1 => of("A"),
        28 => of("AAAA"),
        _ => Vec::new(),
    };
    fastrand::shuffle(&mut found);
    found.truncate(MOST);
    let exists = zone.knows(name, now);
    (if exists { 0 } else { NO_SUCH_NAME }, found)
}
