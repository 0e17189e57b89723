//! The name that clients resolve: what it holds, and changes of it.
//!
//! Every call does one thing once. What fails is seen to be missing by the next look, and tried
//! again by the plan, whose waits take the whole fleet into account; so nothing here repeats a
//! request that was throttled.
//!
//! - [`route53`]: records with set identifiers of our own, `ra/<group>/<instance>`.
//! - [`rfc2136`]: addresses, and TXT records beside them that say whose they are.

use super::facts::{InstanceId, OwnRecords, Record, Records};
use crate::config::{DnsProvider, DnsSettings};

mod rfc2136;
mod route53;

/// One of the providers.
#[derive(Debug)]
pub struct Dns(Provider);

#[derive(Debug)]
enum Provider {
    Route53(Box<route53::Route53>),
    Rfc2136(Box<rfc2136::Rfc2136>),
}

impl Dns {
    /// The provider of the settings. `group` is part of the identifiers of records. Route 53 needs
    /// what AWS's SDK needs; RFC 2136 does not.
    #[allow(clippy::unused_async, reason = "a provider may have to ask")]
    pub async fn new(
        settings: &DnsSettings,
        group: &str,
        aws: Option<&aws_config::SdkConfig>,
    ) -> Result<Self, DnsError> {
        let provider = match &settings.provider {
            DnsProvider::Route53 { zone, policy, .. } => {
                let aws = aws.ok_or_else(|| DnsError::NoCredentials {
                    what: format!("Route 53 and {}", settings.name),
                    reason: "nothing was looked for".to_owned(),
                })?;
                let route53 = route53::Route53::new(aws, zone, &settings.name, group, policy);
                Provider::Route53(Box::new(route53))
            }
            DnsProvider::Rfc2136 {
                server,
                zone,
                tsig,
                cname,
            } => {
                let (name, cname) = (&settings.name, cname.as_deref());
                let rfc2136 = rfc2136::Rfc2136::new(*server, zone, name, cname, tsig, group)?;
                Provider::Rfc2136(Box::new(rfc2136))
            }
        };
        Ok(Self(provider))
    }

    /// The records of this instance; where the name leads to the load balancer, the fleet's one.
    pub async fn own_records(&self, own: &InstanceId) -> Result<OwnRecords, DnsError> {
        match &self.0 {
            Provider::Route53(route53) => route53.own_records(own).await,
            Provider::Rfc2136(rfc2136) => rfc2136.own_records(own).await,
        }
    }

    /// All records of the name.
    pub async fn records(&self) -> Result<Records, DnsError> {
        match &self.0 {
            Provider::Route53(route53) => route53.records().await,
            Provider::Rfc2136(rfc2136) => rfc2136.records().await,
        }
    }

    /// Sees to it that these are this instance's only records of the name; where it leads to the
    /// load balancer, that it does. All or nothing.
    pub async fn write_own(&self, own: &InstanceId, records: &[Record]) -> Result<(), DnsError> {
        match &self.0 {
            Provider::Route53(route53) => route53.write_own(own, records).await,
            Provider::Rfc2136(rfc2136) => rfc2136.write_own(own, records).await,
        }
    }

    /// Deletes one record of an instance of the group, if it is still exactly so; if it is not,
    /// nothing is deleted, and that is no error.
    pub async fn delete(&self, record: &Record) -> Result<(), DnsError> {
        match &self.0 {
            Provider::Route53(route53) => route53.delete(record).await,
            Provider::Rfc2136(rfc2136) => rfc2136.delete(record).await,
        }
    }
}

/// A zone could not be read or changed. `what` is the request, with the name and the zone.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DnsError {
    /// No link of AWS's credential chain has any.
    #[error(
        "no AWS credentials for {what}: give this host an instance role (IMDSv2), or set \
         AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a web identity ({reason})"
    )]
    NoCredentials {
        /// The request.
        what: String,
        /// What the chain said.
        reason: String,
    },
    /// Fewer requests are asked for, of the whole account.
    #[error("{what} is throttled ({code}); it is tried again later")]
    Throttled {
        /// The request.
        what: String,
        /// Route 53's own word for it.
        code: String,
    },
    /// A right is missing, or the key or the credentials are not accepted.
    #[error("{what} is refused ({code}): {advice}")]
    Refused {
        /// The request.
        what: String,
        /// The server's own word for it.
        code: String,
        /// What would cure it.
        advice: String,
    },
    /// Others changed the zone each time that it was tried.
    #[error(
        "{what}: others change the same records all the time ({code}); it is tried again later"
    )]
    Contended {
        /// The request.
        what: String,
        /// The server's own word for it.
        code: String,
    },
    /// What is there is somebody else's, or the request would change what is.
    #[error("{what} is not done: {reason}")]
    Foreign {
        /// The request.
        what: String,
        /// What is whose.
        reason: String,
    },
    /// No answer in time.
    #[error("{what} was not answered in time")]
    Timeout {
        /// The request.
        what: String,
    },
    /// The connection failed.
    #[error("{what}: no connection: {error}")]
    Transport {
        /// The request.
        what: String,
        /// How.
        error: String,
    },
    /// Any other answer.
    #[error("{what} was answered with {code}: {message}")]
    Status {
        /// The request.
        what: String,
        /// The server's own word for it.
        code: String,
        /// What it, or the standard, says of it.
        message: String,
    },
}

impl DnsError {
    /// Whether fewer requests are asked for.
    pub fn is_throttled(&self) -> bool {
        matches!(self, Self::Throttled { .. })
    }
}

/// The identifier of an instance's records.
fn identifier(group: &str, own: &InstanceId) -> String {
    format!("{}/{own}", shared_identifier(group))
}

/// The identifier of the one record that leads to the load balancer, which is nobody's own.
fn shared_identifier(group: &str) -> String {
    format!("ra/{group}")
}

/// That `records` are `own`'s, so that a mistake elsewhere can't change what is not.
fn check_own(
    what: &str,
    group: &str,
    own: &InstanceId,
    records: &[Record],
) -> Result<(), DnsError> {
    let of_own = |record: &Record| match record.target {
        Some(_) => record.identifier.as_deref() == Some(&shared_identifier(group)),
        None => record.owner(group).as_ref() == Some(own) && !record.addresses.is_empty(),
    };
    if records.iter().all(of_own) {
        return Ok(());
    }
    Err(DnsError::Foreign {
        what: what.to_owned(),
        reason: format!("not all that was to be written is {own}'s"),
    })
}

/// That a record is one of an instance of the group.
fn check_ours(what: &str, group: &str, record: &Record) -> Result<(), DnsError> {
    if record.owner(group).is_some() {
        return Ok(());
    }
    let of = record.identifier.as_deref().unwrap_or("nobody");
    Err(DnsError::Foreign {
        what: what.to_owned(),
        reason: format!("the record is marked as {of}'s, not as one of the group {group}"),
    })
}
