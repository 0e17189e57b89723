//! Credentials that are asked for before those at hand expire, so that no request waits for it.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{self, ProvideCredentials, SharedCredentialsProvider, future};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long before they expire new ones are asked for. AWS has those of a role ready at least five
/// minutes before, so that the first answers may still be the old ones.
const AHEAD: Duration = Duration::from_mins(10);
/// Between two attempts to have new ones while the old ones are good.
const PAUSE: Duration = Duration::from_secs(30);
/// How long credentials must still be good to sign a request with.
const MARGIN: Duration = Duration::from_secs(10);

/// What stands before a chain of providers. A metadata service that is slow, or away, is noticed
/// only when the credentials at hand have expired.
#[derive(Debug, Clone)]
pub(super) struct Ahead(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    chain: SharedCredentialsProvider,
    kept: RwLock<Option<Credentials>>,
    /// Held while the chain is asked; when it was last asked.
    asking: Mutex<Option<Instant>>,
}

impl Ahead {
    pub(super) fn new(chain: SharedCredentialsProvider) -> Self {
        Self(Arc::new(Inner {
            chain,
            kept: RwLock::default(),
            asking: Mutex::default(),
        }))
    }

    fn kept(&self) -> Option<(Credentials, Option<Duration>)> {
        let kept = self.0.kept.read().unwrap_or_else(PoisonError::into_inner);
        let credentials = kept.clone()?;
        let left = match credentials.expiry() {
            None => None,
            Some(expiry) => Some(expiry.duration_since(SystemTime::now()).ok()?),
        };
        left.is_none_or(|left| left > MARGIN)
            .then_some((credentials, left))
    }

    async fn ask(&self) -> provider::Result {
        let credentials = self.0.chain.provide_credentials().await?;
        let mut kept = self.0.kept.write().unwrap_or_else(PoisonError::into_inner);
        *kept = Some(credentials.clone());
        Ok(credentials)
    }

    /// Asks for new ones, unless that is being done, or was a moment ago.
    fn refresh(&self) {
        let this = self.clone();
        tokio::spawn(async move {
            let Ok(mut asked) = this.0.asking.try_lock() else {
                return;
            };
            if asked.is_some_and(|at| at.elapsed() < PAUSE) {
                return;
            }
            *asked = Some(Instant::now());
            if let Err(error) = this.ask().await {
                tracing::warn!(%error, "AWS credentials could not be refreshed yet: {error}");
            }
        });
    }

    /// How long those that are used now are good; `None` if for ever.
    pub(super) async fn good_for(&self) -> Result<Option<Duration>, CredentialsError> {
        let expiry = self.credentials().await?.expiry();
        let left = |expiry: SystemTime| expiry.duration_since(SystemTime::now());
        Ok(expiry.map(|expiry| left(expiry).unwrap_or_default()))
    }

    async fn credentials(&self) -> provider::Result {
        match self.kept() {
            Some((credentials, left)) => {
                if left.is_some_and(|left| left < AHEAD) {
                    self.refresh();
                }
                Ok(credentials)
            }
            None => {
                let mut asked = self.0.asking.lock().await;
                // Whoever held it may have got them.
                if let Some((credentials, _)) = self.kept() {
                    return Ok(credentials);
                }
                *asked = Some(Instant::now());
                self.ask().await
            }
        }
    }
}

impl ProvideCredentials for Ahead {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(self.credentials())
    }

    fn fallback_on_interrupt(&self) -> Option<Credentials> {
        self.kept().map(|(credentials, _)| credentials)
    }
}
