//! The fleet's name in any DNS server that takes UPDATEs (RFC 2136) signed by TSIG (RFC 8945).
//!
//! An address at the name is an instance's if a TXT record at `_registry-agent.<name>` says so, a
//! *mark*: `"id=ra/<group>/<instance>" "ip=<address>" "ttl=<seconds>"`. Marks are beside the name, so
//! that it can be a CNAME as well. Address and mark are written and deleted by one UPDATE, whose
//! prerequisite is that all marks are as they were read: of two agents that change something at the
//! same time, one reads again, and decides by what the other has done. That is what keeps an address
//! which a new instance has got from a dead one, when the dead one's record is deleted.
//!
//! An address without a mark is somebody else's, and is never touched.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::TXT;
use hickory_proto::rr::{DNSClass, Name, RData, Record as Resource, RecordType, TSigner};
use tokio::time::timeout;

use self::content::{Change, Content, NotOurs};
use self::wire::{Connection, Failure};
use super::{DnsError, check_ours, check_own, identifier, shared_identifier};
use crate::config::{TsigAlgorithm, TsigSettings};
use crate::fleet::facts::{InstanceId, OwnRecords, Record, Records};

mod content;
mod wire;

/// For one call, with all that it asks.
const WHOLE: Duration = Duration::from_secs(15);
/// How often a change is decided anew because others were faster.
const MOST_TRIES: u32 = 8;
/// The longest wait before the second try, in milliseconds; it doubles.
const FIRST_WAIT: u64 = 20;
/// Seconds by which this host's clock and the server's may differ: as RFC 8945, 10, recommends.
const FUDGE: u16 = 300;

/// The name, and the server that has it.
pub(super) struct Rfc2136 {
    server: SocketAddr,
    zone: Name,
    name: Name,
    /// Where the marks are.
    marks: Name,
    cname: Option<Name>,
    group: String,
    signer: TSigner,
}

impl fmt::Debug for Rfc2136 {
    // Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = f.debug_struct("Rfc2136");
        said.field("server", &self.server).field("name", &self.name);
        said.finish_non_exhaustive()
    }
}

impl Rfc2136 {
    pub(super) fn new(
        server: SocketAddr,
        zone: &str,
        name: &str,
        cname: Option<&str>,
        tsig: &TsigSettings,
        group: &str,
    ) -> Result<Self, DnsError> {
        let wrong = |error: &dyn fmt::Display| DnsError::Status {
            what: format!("DNS for {name} in the zone {zone}"),
            code: "not sent".to_owned(),
            message: error.to_string(),
        };
        let parse = |name: &str| Name::from_ascii(format!("{name}.")).map_err(|e| wrong(&e));
        let key = STANDARD.decode(tsig.secret.reveal());
        let key = key.map_err(|_| wrong(&"the TSIG key is not base64"))?;
        let algorithm = match tsig.algorithm {
            TsigAlgorithm::HmacSha256 => hickory_proto::rr::rdata::tsig::TsigAlgorithm::HmacSha256,
            TsigAlgorithm::HmacSha384 => hickory_proto::rr::rdata::tsig::TsigAlgorithm::HmacSha384,
            TsigAlgorithm::HmacSha512 => hickory_proto::rr::rdata::tsig::TsigAlgorithm::HmacSha512,
        };
        let signer = TSigner::new(key, algorithm, parse(&tsig.name)?, FUDGE);
        Ok(Self {
            server,
            zone: parse(zone)?,
            name: parse(name)?,
            marks: parse(&format!("_registry-agent.{name}"))?,
            cname: cname.map(parse).transpose()?,
            group: group.to_owned(),
            signer: signer.map_err(|error| wrong(&error))?,
        })
    }

    pub(super) async fn own_records(&self, own: &InstanceId) -> Result<OwnRecords, DnsError> {
        let what = self.what("a query");
        let content = self.look(&what).await?;
        let identifier = match self.cname {
            Some(_) => shared_identifier(&self.group),
            None => identifier(&self.group, own),
        };
        let mut records = content.records();
        records.retain(|record| record.identifier.as_ref() == Some(&identifier));
        // The primary has it; when its secondaries have it as well is not for it to say.
        let in_sync = true;
        Ok(OwnRecords { records, in_sync })
    }

    pub(super) async fn records(&self) -> Result<Records, DnsError> {
        let content = self.look(&self.what("a query")).await?;
        Ok(Records {
            records: content.records(),
            complete: true,
        })
    }

    pub(super) async fn write_own(
        &self,
        own: &InstanceId,
        records: &[Record],
    ) -> Result<(), DnsError> {
        let what = self.what("an UPDATE");
        check_own(&what, &self.group, own, records)?;
        let decide: &Decide<'_> = match &self.cname {
            Some(cname) => &|content: &Content| {
                let Some(record) = records.first() else {
                    return Ok(None);
                };
                content.lead_to(cname, record)
            },
            None => {
                let identifier = identifier(&self.group, own);
                &move |content: &Content| content.write(&identifier, records)
            }
        };
        self.change(&what, decide).await
    }

    pub(super) async fn delete(&self, record: &Record) -> Result<(), DnsError> {
        let what = self.what("an UPDATE that deletes");
        check_ours(&what, &self.group, record)?;
        self.change(&what, &|content| Ok(content.delete(record)))
            .await
    }

    fn what(&self, request: &str) -> String {
        let name = self.name.to_ascii();
        let name = name.trim_end_matches('.');
        let zone = self.zone.to_ascii();
        let zone = zone.trim_end_matches('.');
        format!("{request} of {name} in the zone {zone} at {}", self.server)
    }

    async fn look(&self, what: &str) -> Result<Content, DnsError> {
        let look = async {
            let mut connection = Connection::open(self.server).await?;
            self.content(&mut connection).await
        };
        let looked = timeout(WHOLE, look).await.unwrap_or(Err(Failure::Late));
        looked.map_err(|failure| self.error(what, failure))
    }

    /// What is there. The marks come first: what changes between the answers then contradicts the
    /// prerequisite of an UPDATE, and is not taken for something that is.
    async fn content(&self, connection: &mut Connection) -> Result<Content, Failure> {
        let mut content = Content::default();
        for mark in self.query(connection, &self.marks, RecordType::TXT).await? {
            content.take(mark);
        }
        for kind in [RecordType::A, RecordType::AAAA] {
            for resource in self.query(connection, &self.name, kind).await? {
                content.take(resource);
            }
        }
        Ok(content)
    }

    /// The records of a name: those of the type, and a CNAME.
    async fn query(
        &self,
        connection: &mut Connection,
        name: &Name,
        kind: RecordType,
    ) -> Result<Vec<Resource>, Failure> {
        let mut message = Message::new(fastrand::u16(..), MessageType::Query, OpCode::Query);
        message.add_query(Query::query(name.clone(), kind));
        let answer = connection.ask(message, &self.signer).await?;
        match answer.metadata.response_code {
            ResponseCode::NoError | ResponseCode::NXDomain if answer.metadata.authoritative => {}
            ResponseCode::NoError | ResponseCode::NXDomain => return Err(Failure::NoAuthority),
            code => return Err(Failure::Code(code)),
        }
        let mut answers = answer.answers;
        // Where a CNAME leads is not the name's.
        answers.retain(|one| one.name == *name);
        Ok(answers)
    }

    /// Reads, decides, and changes, until nobody was faster.
    async fn change(&self, what: &str, decide: &Decide<'_>) -> Result<(), DnsError> {
        let change = async {
            let mut connection = Connection::open(self.server).await?;
            let mut last = ResponseCode::NXRRSet;
            for again in 0..MOST_TRIES {
                if again > 0 {
                    let longest = FIRST_WAIT << again;
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..longest))).await;
                }
                let content = self.content(&mut connection).await?;
                let Some(change) = decide(&content).map_err(Failure::NotOurs)? else {
                    return Ok(());
                };
                let update = self.update(&content, change);
                let answer = connection.ask(update, &self.signer).await?;
                match answer.metadata.response_code {
                    ResponseCode::NoError => return Ok(()),
                    code @ (ResponseCode::NXRRSet
                    | ResponseCode::YXRRSet
                    | ResponseCode::NXDomain
                    | ResponseCode::YXDomain) => last = code,
                    code => return Err(Failure::Code(code)),
                }
            }
            Err(Failure::Contended(last))
        };
        let changed = timeout(WHOLE, change).await.unwrap_or(Err(Failure::Late));
        changed.map_err(|failure| self.error(what, failure))
    }

    /// An UPDATE that is carried out only if the marks are those that were read, and the name is, or
    /// is not, a CNAME, as it was then. Sections are RFC 2136's; 2.4 and 2.5 say what classes mean.
    fn update(&self, content: &Content, change: Change) -> Message {
        let mut message = Message::new(fastrand::u16(..), MessageType::Query, OpCode::Update);
        message.add_query(Query::query(self.zone.clone(), RecordType::SOA));
        let none_of = |name: &Name, kind| {
            let mut none = Resource::update0(name.clone(), 0, kind);
            none.dns_class = DNSClass::NONE;
            none.into_record_of_rdata()
        };
        let is = |name: &Name, data| Resource::from_rdata(name.clone(), 0, data);
        if content.marks.is_empty() {
            message.add_answer(none_of(&self.marks, RecordType::TXT));
        }
        for mark in &content.marks {
            message.add_answer(is(&self.marks, RData::TXT(mark.clone())));
        }
        match (&content.cname, &self.cname) {
            (Some(cname), _) => message.add_answer(is(&self.name, RData::CNAME(cname.clone()))),
            (None, None) => message.add_answer(none_of(&self.name, RecordType::CNAME)),
            // A CNAME is alone at its name, and a server drops one that would not be in silence.
            (None, Some(_)) => message.add_answer(none_of(&self.name, RecordType::ANY)),
        };
        for (of, data) in change.delete {
            let mut gone = is(self.at(of), data);
            gone.dns_class = DNSClass::NONE;
            message.add_authority(gone);
        }
        for (of, data, ttl) in change.add {
            message.add_authority(Resource::from_rdata(self.at(of).clone(), ttl, data));
        }
        message
    }

    fn at(&self, of: At) -> &Name {
        match of {
            At::Name => &self.name,
            At::Marks => &self.marks,
        }
    }

    fn error(&self, what: &str, failure: Failure) -> DnsError {
        let what = what.to_owned();
        let key = self.signer.signer_name().to_ascii();
        let key = key.trim_end_matches('.');
        let status = |what, code: &str, message: &str| DnsError::Status {
            what,
            code: code.to_owned(),
            message: message.to_owned(),
        };
        match failure {
            Failure::Late => DnsError::Timeout { what },
            Failure::Transport(error) => DnsError::Transport {
                what,
                error: error.to_string(),
            },
            Failure::NotOurs(reason) => DnsError::Foreign {
                what,
                reason: reason.to_string(),
            },
            Failure::Contended(ResponseCode::YXDomain) => DnsError::Foreign {
                what,
                reason: "the name holds records of other types, and a CNAME has to be alone \
                         (YXDOMAIN)"
                    .to_owned(),
            },
            Failure::Contended(code) => DnsError::Contended {
                what,
                code: word(code),
            },
            Failure::Key(code) => DnsError::Refused {
                what,
                advice: key_advice(&code, key),
                code,
            },
            Failure::Clock { server, here } => DnsError::Refused {
                what,
                code: "BADTIME".to_owned(),
                advice: format!(
                    "this host's clock is {} s off the server's, and more than {FUDGE} s is too \
                     much: is one of them not synchronised?",
                    server.abs_diff(here)
                ),
            },
            Failure::Code(ResponseCode::Refused) => DnsError::Refused {
                what,
                code: word(ResponseCode::Refused),
                advice: format!(
                    "the server's rules do not let the key {key} do that: it needs queries, and \
                     UPDATEs of A, AAAA (or CNAME) at the name and of TXT at {}",
                    self.marks.to_ascii().trim_end_matches('.')
                ),
            },
            Failure::Code(code) => status(what, &word(code), meaning(code)),
            Failure::NoAuthority => status(
                what,
                "an answer without authority",
                "that server is not one of the zone: it has to be its primary",
            ),
            Failure::Unsigned => status(
                what,
                "an answer that is not signed",
                "whoever answered does not know the key",
            ),
            Failure::Malformed(error) => status(what, "an answer that can't be read", &error),
            Failure::TooLarge => status(
                what,
                "nothing",
                "it would be larger than 64 KiB: the fleet has too many instances for one name",
            ),
        }
    }
}

/// What has to be changed about what is there, if anything.
type Decide<'a> = dyn Fn(&Content) -> Result<Option<Change>, NotOurs> + Sync + 'a;

/// One of the two names.
#[derive(Debug, Clone, Copy, PartialEq)]
enum At {
    Name,
    Marks,
}

fn key_advice(code: &str, key: &str) -> String {
    match code {
        // knot says the same of a key that it knows and no rule of the zone names.
        "BADKEY" => format!(
            "the server has no key {key} of that algorithm, or no rule that lets it change the \
             zone: check both in its configuration"
        ),
        "BADSIG" => {
            format!("the server's secret of the key {key} is another: check tsig.secret_file")
        }
        _ => format!("the server does not accept the signature of the key {key}"),
    }
}

/// A code as DNS tools say it.
fn word(code: ResponseCode) -> String {
    match code {
        ResponseCode::FormErr => "FORMERR",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::NotImp => "NOTIMP",
        ResponseCode::Refused => "REFUSED",
        ResponseCode::YXDomain => "YXDOMAIN",
        ResponseCode::YXRRSet => "YXRRSET",
        ResponseCode::NXRRSet => "NXRRSET",
        ResponseCode::NotAuth => "NOTAUTH",
        ResponseCode::NotZone => "NOTZONE",
        other => return format!("code {}", u16::from(other)),
    }
    .to_owned()
}

fn meaning(code: ResponseCode) -> &'static str {
    match code {
        ResponseCode::ServFail => "the server could not do it, which its own log explains",
        ResponseCode::NotImp => "the server takes no UPDATEs",
        ResponseCode::NotAuth => "the server is not the zone's primary",
        ResponseCode::NotZone => "the name is not in the zone",
        ResponseCode::FormErr => "the server does not understand it",
        _ => "not what such a request is answered with",
    }
}

/// One of the strings of a mark.
fn text(mark: &TXT, index: usize, key: &str) -> Option<String> {
    let text = std::str::from_utf8(mark.txt_data.get(index)?).ok()?;
    text.strip_prefix(key).map(str::to_owned)
}
