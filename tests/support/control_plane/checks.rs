//! The load balancer's health checks, by real requests to the targets.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Core;

/// How long a target may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// A target that is to be checked.
struct Due {
    group: String,
    key: (String, u16),
    address: SocketAddr,
    path: String,
}

/// Asks every target of the groups that have a path for it, once, and tells the groups.
pub async fn check(core: &Arc<Core>) {
    let mut asked = tokio::task::JoinSet::new();
    for due in due(core) {
        asked.spawn(async move {
            let passes = timeout(PATIENCE, passes(due.address, &due.path)).await;
            (due, matches!(passes, Ok(Ok(true))))
        });
    }
    let found = asked.join_all().await;
    core.change(|state| {
        let now = state.world.rest.now;
        for (due, passes) in found {
            if let Some(targets) = state.world.rest.targets.get_mut(&due.group) {
                targets.says(&due.key, passes, now);
            }
        }
    });
}

fn due(core: &Core) -> Vec<Due> {
    let state = core.lock();
    let rest = &state.world.rest;
    let mut all = Vec::new();
    for (arn, targets) in &rest.targets {
        let Some(path) = &targets.check_path else {
            continue;
        };
        for key in targets.targets.keys() {
            let instance = rest.instances.get(&key.0).map(|it| it.address);
            let address = instance.or_else(|| key.0.parse::<IpAddr>().ok());
            all.extend(address.map(|address| Due {
                group: arn.clone(),
                key: key.clone(),
                address: (address, key.1).into(),
                path: path.clone(),
            }));
        }
    }
    all
}

/// Whether it answers 200.
async fn passes(address: SocketAddr, path: &str) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut status = [0; 12];
    stream.read_exact(&mut status).await?;
    Ok(status.ends_with(b" 200"))
}
