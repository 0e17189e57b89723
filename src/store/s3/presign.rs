//! URLs by which clients get a blob from S3 itself.

use std::time::{Duration, SystemTime};

use aws_sdk_s3::presigning::PresigningConfig;

use super::{Bucket, BucketError, layout};
use crate::oci::Digest;

/// How long a URL is good. Source: distribution, `registry/storage/driver/s3-aws/s3.go`,
/// `RedirectURL`.
const GOOD: Duration = Duration::from_mins(20);
/// The least that is of use to a client, which may have others to fetch first.
const LEAST: Duration = Duration::from_mins(1);

impl Bucket {
    /// A URL by which whoever has it can GET a blob, whoever's that is, for 20 minutes, or until the
    /// credentials end that it is signed by, which end it as well; `None` where that is too soon. It
    /// is a secret, and in no error.
    pub async fn presigned(&self, digest: &Digest) -> Result<Option<String>, BucketError> {
        let clients = &self.0.clients;
        let failed = |reason: String| BucketError::NoCredentials {
            bucket: self.name().to_owned(),
            reason,
        };
        // Those that it is signed by are these or later ones.
        let left = clients.credentials.good_for().await;
        let left = left.map_err(|error| failed(error.to_string()))?;
        let good = left.map_or(GOOD, |left| left.min(GOOD));
        if good < LEAST {
            return Ok(None);
        }
        let config = PresigningConfig::builder()
            .start_time(SystemTime::now())
            .expires_in(Duration::from_secs(good.as_secs()))
            .build();
        let config = config.map_err(|error| failed(error.to_string()))?;
        let key = self.0.prefix.key(&layout::blob(digest));
        let request = clients.small.get_object().bucket(self.name()).key(key);
        let signed = request.presigned(config).await;
        let signed = signed.map_err(|error| failed(error.to_string()))?;
        Ok(Some(signed.uri().to_owned()))
    }
}
