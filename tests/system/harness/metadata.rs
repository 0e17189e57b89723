//! EC2's instance metadata, version 2: whoever has no token gets nothing.
//! <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html>

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// The Ethernet address that QEMU gives a machine's first card.
const MAC: &str = "52:54:00:12:34:56";
const TOKEN: &str = "dG9rZW4tb2YtdGhlLXRlc3Rz";
/// Bytes of a request's head.
const HEAD_LIMIT: u64 = 16 << 10;

/// A server on this machine's loopback, for as long as the process runs.
pub struct Metadata {
    address: SocketAddr,
    refused: Arc<Mutex<Vec<String>>>,
}

impl Metadata {
    /// Serves what an instance with this user-data is told.
    pub fn start(user_data: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let address = listener.local_addr().expect("its address");
        let refused = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::new(told(user_data));
        let seen = Arc::clone(&refused);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (told, seen) = (Arc::clone(&told), Arc::clone(&seen));
                // A client that goes away halfway is none of our business.
                thread::spawn(move || answer(stream, &told, &seen).ok());
            }
        });
        Self { address, refused }
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The requests that came without a token.
    pub fn refused(&self) -> Vec<String> {
        self.refused.lock().expect("no thread panicked").clone()
    }
}

/// Every path below a version, and what is there.
fn told(user_data: &str) -> BTreeMap<String, String> {
    let card = format!("meta-data/network/interfaces/macs/{MAC}");
    let document = r#"{
  "accountId": "123456789012", "architecture": "x86_64", "availabilityZone": "eu-west-1a",
  "imageId": "ami-0123456789abcdef0", "instanceId": "i-0123456789abcdef0",
  "instanceType": "t3.small", "pendingTime": "2026-01-01T00:00:00Z",
  "privateIp": "169.254.10.10", "region": "eu-west-1", "version": "2017-09-30"
}"#;
    let pairs = [
        ("user-data", user_data),
        ("dynamic/instance-identity/document", document),
        ("meta-data/ami-id", "ami-0123456789abcdef0"),
        (
            "meta-data/hostname",
            "ip-169-254-10-10.eu-west-1.compute.internal",
        ),
        ("meta-data/instance-id", "i-0123456789abcdef0"),
        ("meta-data/instance-type", "t3.small"),
        (
            "meta-data/local-hostname",
            "ip-169-254-10-10.eu-west-1.compute.internal",
        ),
        ("meta-data/local-ipv4", "169.254.10.10"),
        ("meta-data/mac", MAC),
        ("meta-data/placement/availability-zone", "eu-west-1a"),
        ("meta-data/placement/region", "eu-west-1"),
        ("meta-data/autoscaling/target-lifecycle-state", "InService"),
        ("meta-data/tags/instance/registry-agent", "mirror"),
    ];
    let card = [
        ("device-number", "0"),
        ("interface-id", "eni-0123456789abcdef0"),
        ("local-ipv4s", "169.254.10.10"),
        ("mac", MAC),
        ("subnet-ipv4-cidr-block", "169.254.0.0/16"),
        ("vpc-ipv4-cidr-block", "169.254.0.0/16"),
    ]
    .map(|(name, value)| (format!("{card}/{name}"), value.to_owned()));
    let pairs = pairs.map(|(path, value)| (path.to_owned(), value.to_owned()));
    pairs.into_iter().chain(card).collect()
}

/// What a folder lists: files, and folders with a slash.
fn listing(told: &BTreeMap<String, String>, folder: &str) -> Option<String> {
    let inside = told.keys().filter_map(|path| path.strip_prefix(folder));
    let names = inside.map(|rest| match rest.split_once('/') {
        Some((name, _)) => format!("{name}/"),
        None => rest.to_owned(),
    });
    let names: std::collections::BTreeSet<String> = names.collect();
    let names: Vec<String> = names.into_iter().collect();
    (!names.is_empty()).then(|| names.join("\n"))
}

fn answer(
    mut stream: TcpStream,
    told: &BTreeMap<String, String>,
    refused: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut head = BufReader::new(stream.try_clone()?.take(HEAD_LIMIT)).lines();
    let request = head.next().transpose()?.unwrap_or_default();
    let mut fields = Vec::new();
    for line in head {
        let line = line?;
        if line.is_empty() {
            break;
        }
        fields.push(line.to_lowercase());
    }
    let has = |name: &str| fields.iter().any(|field| field.starts_with(name));
    let mut words = request.split(' ');
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    // The first part is the version.
    let path = path
        .trim_start_matches('/')
        .split_once('/')
        .map_or("", |(_, rest)| rest);
    let token = format!("x-aws-ec2-metadata-token: {}", TOKEN.to_lowercase());
    let found = match (method, path) {
        ("PUT", "api/token") if has("x-aws-ec2-metadata-token-ttl-seconds:") => {
            Ok(TOKEN.to_owned())
        }
        ("GET", _) if !has(&token) => {
            refused
                .lock()
                .expect("no thread panicked")
                .push(request.clone());
            Err("401 Unauthorized")
        }
        ("GET", path) => {
            let file = told.get(path.trim_end_matches('/')).cloned();
            let folder = || {
                let folder = path.trim_end_matches('/');
                let folder = if folder.is_empty() {
                    String::new()
                } else {
                    format!("{folder}/")
                };
                listing(told, &folder)
            };
            file.or_else(folder).ok_or("404 Not Found")
        }
        _ => Err("400 Bad Request"),
    };
    let (status, body) = match found {
        Ok(body) => ("200 OK", body),
        Err(status) => (status, String::new()),
    };
    let ttl = if method == "PUT" {
        "X-aws-ec2-metadata-token-ttl-seconds: 21600\r\n"
    } else {
        ""
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n{ttl}\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
}
