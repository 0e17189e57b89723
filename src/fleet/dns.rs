//! The name that clients resolve.

use super::facts::{InstanceId, OwnRecords, Record, Records};
use crate::config::DnsSettings;

/// The provider of the settings.
pub struct Dns;

/// A zone could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[error("no provider of DNS is built in")]
pub struct DnsError;

impl DnsError {
    /// Whether fewer requests are asked for.
    pub fn is_throttled(&self) -> bool {
        false
    }
}

#[allow(missing_docs, clippy::unused_async)]
impl Dns {
    pub async fn new(
        _: &DnsSettings,
        _: &str,
        _: Option<&aws_config::SdkConfig>,
    ) -> Result<Self, DnsError> {
        Err(DnsError)
    }

    pub async fn own_records(&self, _: &InstanceId) -> Result<OwnRecords, DnsError> {
        Err(DnsError)
    }

    pub async fn records(&self) -> Result<Records, DnsError> {
        Err(DnsError)
    }

    pub async fn write_own(&self, _: &InstanceId, _: &[Record]) -> Result<(), DnsError> {
        Err(DnsError)
    }

    pub async fn delete(&self, _: &Record) -> Result<(), DnsError> {
        Err(DnsError)
    }
}
