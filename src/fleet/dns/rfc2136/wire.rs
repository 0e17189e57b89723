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

#[cfg(test)]
mod tests {
    use hickory_proto::op::{OpCode, Query};
    use hickory_proto::rr::rdata::tsig::TsigAlgorithm;
    use hickory_proto::rr::{Name, RecordType, TSigResponseContext};
    use tokio::net::TcpListener;

    use super::*;

    fn signer(secret: &[u8]) -> TSigner {
        let name = Name::from_ascii("agent.").unwrap();
        TSigner::new(secret.to_vec(), TsigAlgorithm::HmacSha256, name, 300).unwrap()
    }

    /// What becomes of a question that is answered so: by which answer, signed by whom, at what
    /// time, and with what error.
    async fn asked(
        change: impl Fn(&mut Message) + Send + 'static,
        signed: Option<(&'static [u8], u64, Option<TsigError>)>,
    ) -> Result<Message, Failure> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut question = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut question).await.unwrap();
            let question = Message::from_vec(&question).unwrap();
            let mut answer = Message::response(question.metadata.id, OpCode::Query);
            change(&mut answer);
            if let Some((secret, time, error)) = signed {
                let mac = question.signature().unwrap().data.mac.clone();
                let id = question.metadata.id;
                let context = TSigResponseContext::new(id, time, signer(secret), mac, error);
                let bytes = answer.to_vec().unwrap();
                answer.set_signature(context.sign(&bytes).unwrap());
            }
            let answer = answer.to_vec().unwrap();
            let length = u16::try_from(answer.len()).unwrap();
            stream.write_u16(length).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        });
        let mut message = Message::query();
        let name = Name::from_ascii("fleet.example.com.").unwrap();
        message.add_query(Query::query(name, RecordType::A));
        let mut connection = Connection::open(address).await.unwrap();
        connection.ask(message, &signer(b"secret")).await
    }

    fn now() -> u64 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs()
    }

    #[tokio::test]
    async fn only_a_signed_answer_to_the_question_counts() {
        let good = Some((&b"secret"[..], now(), None));
        asked(|_| {}, good).await.unwrap();
        let unsigned = asked(|_| {}, None).await;
        assert!(matches!(unsigned, Err(Failure::Unsigned)), "{unsigned:?}");
        for (change, signed) in [
            // Somebody else's key of the same name.
            (None, Some((&b"another"[..], now(), None))),
            // Signed an hour ago.
            (None, Some((&b"secret"[..], now() - 3600, None))),
            (Some(true), good),
            (Some(false), good),
        ] {
            let answer = asked(
                move |answer| match change {
                    Some(true) => answer.metadata.id ^= 1,
                    Some(false) => answer.metadata.truncation = true,
                    None => {}
                },
                signed,
            )
            .await;
            assert!(matches!(answer, Err(Failure::Malformed(_))), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn a_refusal_needs_no_signature_and_a_clock_that_is_off_is_told() {
        let code = ResponseCode::Refused;
        let refused = asked(move |answer| answer.metadata.response_code = code, None).await;
        assert!(
            matches!(refused, Err(Failure::Code(ResponseCode::Refused))),
            "{refused:?}"
        );
        let an_hour_on = now() + 3600;
        let signed = Some((&b"secret"[..], an_hour_on, Some(TsigError::BadTime)));
        let late = asked(|_| {}, signed).await;
        let Err(Failure::Clock { server, here }) = late else {
            panic!("{late:?}");
        };
        assert_eq!(server, an_hour_on);
        assert!(here.abs_diff(now()) < 60);
    }
}
