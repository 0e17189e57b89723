//! One TCP connection to a DNS server (RFC 7766), over which everything is signed (RFC 8945).
//!
//! TCP, as an answer that names a large fleet fits into no datagram, and as nobody can answer in
//! the server's place from elsewhere.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::TSigner;
use hickory_proto::rr::rdata::tsig::{TSIG, TsigError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::content::NotOurs;

/// To accept a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// The bit of the third byte of a message that says that it was cut short (TC).
const CUT_SHORT: u8 = 0x02;

/// Why something was not done, before it is known what was asked.
#[derive(Debug)]
pub(super) enum Failure {
    Late,
    Transport(io::Error),
    /// The server does not accept the key, or its signature.
    Key(String),
    /// Seconds since 1970, on the server and here.
    Clock {
        server: u64,
        here: u64,
    },
    Code(ResponseCode),
    NoAuthority,
    Unsigned,
    Malformed(String),
    TooLarge,
    NotOurs(NotOurs),
    /// The prerequisites failed each time, at last by this code.
    Contended(ResponseCode),
}

/// A connection, for one question after another.
pub(super) struct Connection(TcpStream);

impl Connection {
    pub(super) async fn open(server: SocketAddr) -> Result<Self, Failure> {
        let opened = timeout(CONNECT, TcpStream::connect(server)).await;
        let stream = opened.map_err(|_| Failure::Late)?;
        stream.map(Self).map_err(Failure::Transport)
    }

    /// Sends a message, signed, and reads the answer, whose signature is checked unless it is a
    /// refusal.
    pub(super) async fn ask(
        &mut self,
        mut message: Message,
        signer: &TSigner,
    ) -> Result<Message, Failure> {
        let malformed = |error: &dyn std::fmt::Display| Failure::Malformed(error.to_string());
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
        let verifier = message.finalize(signer, now).map_err(|e| malformed(&e))?;
        let bytes = message.to_vec().map_err(|_| Failure::TooLarge)?;
        if bytes.get(2).is_none_or(|flags| flags & CUT_SHORT != 0) {
            return Err(Failure::TooLarge);
        }
        let answer = self.exchange(&bytes).await?;
        let read = Message::from_vec(&answer).map_err(|error| malformed(&error))?;
        let metadata = &read.metadata;
        if metadata.id != message.metadata.id || metadata.message_type != MessageType::Response {
            return Err(malformed(&"it answers something else"));
        }
        if metadata.truncation {
            return Err(malformed(&"it is cut short, over TCP"));
        }
        let code = metadata.response_code;
        let Some(signature) = read.signature() else {
            // A refusal changes nothing, so that it does not matter whose it is.
            return Err(match code {
                ResponseCode::NoError | ResponseCode::NXDomain => Failure::Unsigned,
                code => Failure::Code(code),
            });
        };
        if let Some(error) = signature.data.error {
            return Err(refused(error, &signature.data, now));
        }
        let Some(mut verifier) = verifier else {
            return Err(Failure::Unsigned);
        };
        match verifier.verify(&answer) {
            Ok(_) => Ok(read),
            Err(error) => Err(malformed(&format!("its signature is wrong: {error}"))),
        }
    }

    async fn exchange(&mut self, message: &[u8]) -> Result<Vec<u8>, Failure> {
        let length = u16::try_from(message.len()).map_err(|_| Failure::TooLarge)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend_from_slice(message);
        let stream = &mut self.0;
        stream
            .write_all(&framed)
            .await
            .map_err(Failure::Transport)?;
        let length = stream.read_u16().await.map_err(Failure::Transport)?;
        let mut answer = vec![0; length.into()];
        let read = stream.read_exact(&mut answer).await;
        read.map_err(Failure::Transport)?;
        Ok(answer)
    }
}

fn refused(error: TsigError, signature: &TSIG, here: u64) -> Failure {
    match error {
        TsigError::BadTime => {
            // 48 bits, and empty from a server that does not say.
            let mut server = [0; 8];
            let said = signature.other.len() == 6;
            if said {
                server[2..].copy_from_slice(&signature.other);
            }
            Failure::Clock {
                server: if said {
                    u64::from_be_bytes(server)
                } else {
                    signature.time
                },
                here,
            }
        }
        TsigError::BadKey => Failure::Key("BADKEY".to_owned()),
        TsigError::BadSig => Failure::Key("BADSIG".to_owned()),
        TsigError::BadTrunc => Failure::Key("BADTRUNC".to_owned()),
        TsigError::Unknown(code) => Failure::Key(format!("TSIG error {code}")),
    }
}
