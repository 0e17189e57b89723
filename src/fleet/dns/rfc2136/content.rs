//! What a name and its marks hold, and what has to be changed about it. Without any input or output.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::rr::rdata::{A, AAAA, CNAME, TXT};
use hickory_proto::rr::{Name, RData, Record as Resource};

use super::{At, text};
use crate::fleet::facts::{Record, Routing};

/// What is there.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// All TXT records, also those that are no marks: an UPDATE's prerequisite names them all.
    pub marks: Vec<TXT>,
    /// The addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// The TTLs of the sets of A and of AAAA, in seconds: a set has one.
    pub ttls: [Option<u32>; 2],
    /// Where the name leads, if it is a CNAME.
    pub cname: Option<CNAME>,
    /// That CNAME's TTL.
    pub cname_ttl: u32,
}

/// What an UPDATE does: first it deletes, then it adds.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Change {
    pub delete: Vec<(At, RData)>,
    /// With TTLs in seconds.
    pub add: Vec<(At, RData, u32)>,
}

/// Why nothing is changed.
#[derive(Debug, PartialEq)]
pub(super) enum NotOurs {
    /// The address is there, and nothing says whose.
    Address(IpAddr),
    /// The name leads elsewhere.
    Cname(String),
    /// The name holds addresses.
    Addresses,
}

impl fmt::Display for NotOurs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(
                f,
                "the name holds {address} already, and no TXT record says that an agent wrote it: \
                 delete it, and it is written anew"
            ),
            Self::Cname(target) => write!(
                f,
                "the name is a CNAME of {target}, and no TXT record says that an agent wrote it: \
                 delete it"
            ),
            Self::Addresses => f.write_str(
                "the name holds addresses, and a CNAME has to be alone: delete them, and with \
                 those of agents their TXT records",
            ),
        }
    }
}

/// What a TXT record says, if it is one of ours or of another group's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Mark {
    identifier: String,
    of: Marked,
    ttl: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Marked {
    Address(IpAddr),
    /// In lower case, without a dot at its end.
    Cname(String),
}

impl Mark {
    fn read(record: &TXT) -> Option<Self> {
        let identifier = text(record, 0, "id=")?;
        let of = match text(record, 1, "ip=") {
            Some(address) => Marked::Address(address.parse().ok()?),
            None => Marked::Cname(text(record, 1, "cname=")?),
        };
        let ttl = text(record, 2, "ttl=")?.parse().ok()?;
        let mark = Self {
            identifier,
            of,
            ttl,
        };
        // What is not written exactly so could not be deleted by what is read.
        (mark.write() == *record && mark.identifier.starts_with("ra/")).then_some(mark)
    }

    fn write(&self) -> TXT {
        let of = match &self.of {
            Marked::Address(address) => format!("ip={address}"),
            Marked::Cname(target) => format!("cname={target}"),
        };
        let strings = [
            format!("id={}", self.identifier),
            of,
            format!("ttl={}", self.ttl),
        ];
        TXT::new(strings.to_vec())
    }

    fn address(&self) -> Option<IpAddr> {
        match self.of {
            Marked::Address(address) => Some(address),
            Marked::Cname(_) => None,
        }
    }
}

impl Content {
    /// One record of an answer; those of other types are none of it.
    pub(super) fn take(&mut self, resource: Resource) {
        let ttl = resource.ttl;
        match resource.data {
            RData::TXT(mark) => self.marks.push(mark),
            RData::A(A(address)) => {
                self.addresses.insert(address.into());
                self.ttls[0] = Some(ttl);
            }
            RData::AAAA(AAAA(address)) => {
                self.addresses.insert(address.into());
                self.ttls[1] = Some(ttl);
            }
            RData::CNAME(cname) => {
                self.cname = Some(cname);
                self.cname_ttl = ttl;
            }
            _ => {}
        }
    }

    /// The records: for each mark's instance and family one, and one with all other addresses.
    ///
    /// Addresses of a family share one TTL, so each instance's is what its mark says, unless none
    /// says what there is: agents of two configurations would change it for ever, each to its own.
    pub(super) fn records(&self) -> Vec<Record> {
        let marks = self.read_marks();
        if let Some(cname) = &self.cname {
            let target = plain(&cname.0);
            let mark = marks.iter().find(|m| m.of == Marked::Cname(target.clone()));
            return vec![Record {
                identifier: mark.map(|mark| mark.identifier.clone()),
                addresses: Vec::new(),
                target: Some(target),
                ttl: seconds(self.cname_ttl),
                routing: Routing::Plain,
                health_check: None,
            }];
        }
        let mut owners: BTreeMap<_, (Vec<IpAddr>, u32)> = BTreeMap::new();
        let mut unmarked = self.addresses.clone();
        for mark in &marks {
            let Some(address) = mark.address() else {
                continue;
            };
            unmarked.remove(&address);
            // A mark of what is not there is nobody's record: somebody has deleted the address.
            if self.addresses.contains(&address) {
                let owner = (Some(mark.identifier.clone()), address.is_ipv6());
                let (addresses, ttl) = owners.entry(owner).or_default();
                addresses.push(address);
                *ttl = mark.ttl;
            }
        }
        for address in unmarked {
            let owner = owners.entry((None, address.is_ipv6())).or_default();
            owner.0.push(address);
        }
        let records = owners
            .into_iter()
            .map(|((identifier, v6), (addresses, ttl))| {
                let is = self.ttls[usize::from(v6)].unwrap_or_default();
                let said = identifier.is_some() && self.is_said(&marks, v6, is);
                Record {
                    identifier,
                    addresses,
                    target: None,
                    ttl: seconds(if said { ttl } else { is }),
                    routing: Routing::Plain,
                    health_check: None,
                }
            });
        records.collect()
    }

    /// What makes these the only records of an instance.
    pub(super) fn write(
        &self,
        identifier: &str,
        records: &[Record],
    ) -> Result<Option<Change>, NotOurs> {
        if let Some(cname) = &self.cname {
            return Err(NotOurs::Cname(plain(&cname.0)));
        }
        let marks = self.read_marks();
        let wanted = records.iter().flat_map(|record| {
            let ttl = whole_seconds(record.ttl);
            record.addresses.iter().map(move |address| Mark {
                identifier: identifier.to_owned(),
                of: Marked::Address(*address),
                ttl,
            })
        });
        let wanted: BTreeSet<Mark> = wanted.collect();
        let mut change = self.without(&marks, |mark| {
            mark.identifier == identifier && !wanted.contains(mark)
        });
        for mark in wanted {
            let Some(address) = mark.address() else {
                continue;
            };
            let is_there = self.addresses.contains(&address);
            if is_there && !marks.iter().any(|mark| mark.address() == Some(address)) {
                return Err(NotOurs::Address(address));
            }
            let is_new = !marks.contains(&mark);
            let v6 = address.is_ipv6();
            let other_ttl = self.ttls[usize::from(v6)].filter(|ttl| *ttl != mark.ttl);
            let wrong_ttl = other_ttl.is_some_and(|ttl| is_new || !self.is_said(&marks, v6, ttl));
            // It is not to go and come: `without` may have found that nobody else has it.
            change.delete.retain(|(_, data)| *data != data_of(address));
            if is_there && wrong_ttl {
                // What is there already is not added again by most servers, whatever its TTL.
                change.delete.push((At::Name, data_of(address)));
            }
            if !is_there || wrong_ttl {
                change.add.push((At::Name, data_of(address), mark.ttl));
            }
            if is_new {
                let data = RData::TXT(mark.write());
                change.add.push((At::Marks, data, mark.ttl));
            }
        }
        Ok(change.unless_empty())
    }

    /// What deletes a record that is exactly so.
    pub(super) fn delete(&self, record: &Record) -> Option<Change> {
        if !self.records().contains(record) {
            return None;
        }
        let change = self.without(&self.read_marks(), |mark| {
            let address = mark.address();
            record.identifier.as_ref() == Some(&mark.identifier)
                && address.is_some_and(|address| record.addresses.contains(&address))
        });
        change.unless_empty()
    }

    /// What has the name lead to a load balancer.
    pub(super) fn lead_to(&self, to: &Name, record: &Record) -> Result<Option<Change>, NotOurs> {
        let identifier = record.identifier.clone().unwrap_or_default();
        let marks = self.read_marks();
        let mark = Mark {
            identifier,
            of: Marked::Cname(plain(to)),
            ttl: whole_seconds(record.ttl),
        };
        if !self.addresses.is_empty() {
            return Err(NotOurs::Addresses);
        }
        let mut change = Change::default();
        if let Some(cname) = &self.cname {
            let target = plain(&cname.0);
            let written = Marked::Cname(target.clone());
            let ours = |one: &Mark| one.identifier == mark.identifier && one.of == written;
            if !marks.iter().any(ours) {
                return Err(NotOurs::Cname(target));
            }
            if marks.contains(&mark) && self.cname_ttl == mark.ttl {
                return Ok(None);
            }
            change.delete.push((At::Name, RData::CNAME(cname.clone())));
        }
        let old = marks.iter().filter(|old| old.identifier == mark.identifier);
        let old = old.filter(|old| **old != mark);
        let old = old.map(|old| (At::Marks, RData::TXT(old.write())));
        change.delete.extend(old);
        let cname = RData::CNAME(CNAME(to.clone()));
        change.add.push((At::Name, cname, mark.ttl));
        if !marks.contains(&mark) {
            let data = RData::TXT(mark.write());
            change.add.push((At::Marks, data, mark.ttl));
        }
        Ok(Some(change))
    }

    /// What takes marks away, and the addresses that no other mark names.
    fn without(&self, marks: &BTreeSet<Mark>, gone: impl Fn(&Mark) -> bool) -> Change {
        let (gone, stay): (Vec<_>, Vec<_>) = marks.iter().partition(|mark| gone(mark));
        let mut change = Change::default();
        for mark in gone {
            change.delete.push((At::Marks, RData::TXT(mark.write())));
            if let Some(address) = mark.address()
                && self.addresses.contains(&address)
                && !stay.iter().any(|mark| mark.address() == Some(address))
            {
                change.delete.push((At::Name, data_of(address)));
            }
        }
        change
    }

    fn read_marks(&self) -> BTreeSet<Mark> {
        self.marks.iter().filter_map(Mark::read).collect()
    }

    /// Whether a TTL is what somebody who has an address of the family there wants.
    fn is_said(&self, marks: &BTreeSet<Mark>, v6: bool, ttl: u32) -> bool {
        marks.iter().any(|mark| {
            let address = mark.address();
            let has = address.is_some_and(|ip| ip.is_ipv6() == v6 && self.addresses.contains(&ip));
            has && mark.ttl == ttl
        })
    }
}

impl Change {
    fn unless_empty(self) -> Option<Self> {
        (self != Self::default()).then_some(self)
    }
}

fn data_of(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

/// A name in lower case, without the dot at its end.
fn plain(name: &Name) -> String {
    let name = name.to_ascii().to_ascii_lowercase();
    name.trim_end_matches('.').to_owned()
}

fn seconds(ttl: u32) -> Duration {
    Duration::from_secs(ttl.into())
}

fn whole_seconds(ttl: Duration) -> u32 {
    u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX)
}
