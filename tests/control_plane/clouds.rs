//! The clouds of others: moto and ministack, as servers of their own.

use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::client::Client;
use crate::support::cloud_tools;
use crate::support::{eventually, own_address};

/// The port of each, on an address of its own.
const PORT: u16 = 5000;
/// Python reads a thousand files first, on a machine that has other things to do.
const STARTS: Duration = Duration::from_mins(3);

/// A cloud that runs, until it is dropped.
pub struct Cloud {
    pub url: String,
    child: Child,
}

impl Cloud {
    /// moto's server, with all its services.
    pub fn moto() -> Self {
        let address = own_address();
        let mut command = Command::new(cloud_tools::python());
        command.args([
            "-m",
            "moto.server",
            "-H",
            &address.to_string(),
            "-p",
            &PORT.to_string(),
        ]);
        Self::start(command, &address.to_string())
    }

    /// ministack with Route 53 alone: it listens on all interfaces unless it is told.
    pub fn ministack() -> Self {
        let address = own_address();
        let mut command = Command::new(cloud_tools::python());
        command.args(["-m", "ministack"]);
        command.env("BIND_HOST", address.to_string());
        command.env("GATEWAY_PORT", PORT.to_string());
        command.env("SERVICES", "route53");
        command
            .env("SFTP_ENABLED", "0")
            .env("IOT_MTLS_ENABLED", "0");
        Self::start(command, &address.to_string())
    }

    /// The id of the network that moto's account has.
    pub fn vpc(&self) -> String {
        let address = self.url.strip_prefix("http://").unwrap().parse().unwrap();
        let request = Client::Tcp(address).request("POST", "/").header(
            "Authorization",
            "AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/ec2/aws4_request, \
             SignedHeaders=host, Signature=none",
        );
        let request = request.header("Content-Type", "application/x-www-form-urlencoded");
        let reply = request
            .body(b"Action=DescribeVpcs&Version=2016-11-15")
            .send();
        let text = String::from_utf8(reply.body).unwrap();
        let document = roxmltree::Document::parse(&text).unwrap();
        let mut nodes = document.descendants();
        let id = nodes.find(|node| node.tag_name().name() == "vpcId");
        id.unwrap().text().unwrap().to_owned()
    }

    fn start(mut command: Command, address: &str) -> Self {
        let scratch = std::env::temp_dir();
        let child = command
            .current_dir(scratch)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut cloud = Self {
            url: format!("http://{address}:{PORT}"),
            child,
        };
        eventually(STARTS, "a cloud that listens", || {
            let ended = cloud.child.try_wait().unwrap();
            assert_eq!(ended, None, "{command:?} has ended");
            TcpStream::connect((address, PORT)).is_ok()
        });
        cloud
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
