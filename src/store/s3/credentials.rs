//! Credentials that are asked for before those at hand expire, so that no request waits for it.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{self, ProvideCredentials, SharedCredentialsProvider, future};
use aws_smithy_runtime_api::client::interceptors::context::InterceptorContext;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::retries::classifiers::{ClassifyRetry, RetryAction};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long before they expire new ones are asked for. AWS has those of a role ready at least five
/// minutes before, so that the first answers may still be the old ones.
const AHEAD: Duration = Duration::from_mins(10);
/// Between two attempts to have new ones while the old ones are good.
const PAUSE: Duration = Duration::from_secs(30);
/// How long credentials must still be good to sign a request with.
const MARGIN: Duration = Duration::from_secs(10);
/// How old credentials are at least that are given up because S3 says so: of many requests that it
/// refuses at once, one alone has new ones asked for.
const REFUSABLE: Duration = Duration::from_secs(5);

/// When credentials are asked for.
#[derive(Debug, Clone, Copy)]
struct Times {
    ahead: Duration,
    pause: Duration,
    refusable: Duration,
}

const TIMES: Times = Times {
    ahead: AHEAD,
    pause: PAUSE,
    refusable: REFUSABLE,
};

/// What stands before a chain of providers. A metadata service that is slow, or away, is noticed
/// only when the credentials at hand have expired.
#[derive(Debug, Clone)]
pub(super) struct Ahead(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    chain: SharedCredentialsProvider,
    times: Times,
    kept: RwLock<Option<Credentials>>,
    /// Held while the chain is asked; when it was last asked.
    asking: Mutex<Option<Instant>>,
}

impl Ahead {
    pub(super) fn new(chain: SharedCredentialsProvider) -> Self {
        Self::with(chain, TIMES)
    }

    fn with(chain: SharedCredentialsProvider, times: Times) -> Self {
        Self(Arc::new(Inner {
            chain,
            times,
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

    /// Gives up what is at hand, since S3 takes it for expired whatever its date says: the next
    /// attempt waits for new ones.
    fn refused(&self) {
        // Who holds it is asking for new ones already.
        let Ok(asked) = self.0.asking.try_lock() else {
            return;
        };
        if asked.is_some_and(|at| at.elapsed() < self.0.times.refusable) {
            return;
        }
        let mut kept = self.0.kept.write().unwrap_or_else(PoisonError::into_inner);
        if kept.take().is_some() {
            tracing::warn!("S3 takes the AWS credentials for expired: new ones are asked for");
        }
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
            if asked.is_some_and(|at| at.elapsed() < this.0.times.pause) {
                return;
            }
            // Whoever held it may have got new ones.
            let left = this.kept().and_then(|(_, left)| left);
            if left.is_none_or(|left| left >= this.0.times.ahead) {
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
                if left.is_some_and(|left| left < self.0.times.ahead) {
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

/// Has a request that S3 refused because its credentials have expired made again, with new ones.
#[derive(Debug)]
pub(super) struct Renewal(pub(super) Ahead);

impl ClassifyRetry for Renewal {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        if !context.response().is_some_and(is_expired) {
            return RetryAction::NoActionIndicated;
        }
        self.0.refused();
        RetryAction::transient_error()
    }

    fn name(&self) -> &'static str {
        "expired credentials"
    }
}

/// Whether credentials have expired, by S3's own words for it.
pub(super) fn is_expired_code(code: &str) -> bool {
    matches!(code, "ExpiredToken" | "TokenRefreshRequired")
}

fn is_expired(response: &HttpResponse) -> bool {
    if !matches!(response.status().as_u16(), 400 | 401 | 403) {
        return false;
    }
    let body = String::from_utf8_lossy(response.body().bytes().unwrap_or_default());
    let code = body
        .split_once("<Code>")
        .and_then(|(_, rest)| rest.split_once("</Code>"));
    match code {
        Some((code, _)) => is_expired_code(code.trim()),
        // A HEAD is refused without words: 400, and not because of the region, which has a header.
        None => {
            response.status().as_u16() == 400
                && body.is_empty()
                && response.headers().get("x-amz-bucket-region").is_none()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex as Plain;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use aws_credential_types::provider::error::CredentialsError;
    use tokio::sync::Notify;

    use super::*;

    const HOUR: Duration = Duration::from_hours(1);
    /// Nothing is waited for between two attempts.
    const AT_ONCE: Times = Times {
        ahead: AHEAD,
        pause: Duration::ZERO,
        refusable: Duration::ZERO,
    };

    enum Said {
        /// These, good for so long.
        These(&'static str, Duration),
        Error,
        Silence,
    }

    /// Says one after the other what it was told to, and tells when it was asked.
    #[derive(Debug)]
    struct Chain(Arc<Script>);

    struct Script {
        says: Plain<VecDeque<Said>>,
        asked: AtomicUsize,
        was_asked: Notify,
    }

    impl std::fmt::Debug for Script {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Script")
        }
    }

    impl ProvideCredentials for Chain {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            future::ProvideCredentials::new(async {
                let next = self.0.says.lock().unwrap().pop_front();
                self.0.asked.fetch_add(1, Ordering::SeqCst);
                self.0.was_asked.notify_one();
                match next.expect("asked more often than the test expects") {
                    Said::These(id, good) => {
                        let until = SystemTime::now() + good;
                        Ok(Credentials::new(id, "secret", None, Some(until), "test"))
                    }
                    Said::Error => Err(CredentialsError::provider_error("503")),
                    Said::Silence => std::future::pending().await,
                }
            })
        }
    }

    fn ahead(times: Times, says: impl IntoIterator<Item = Said>) -> (Ahead, Arc<Script>) {
        let script = Arc::new(Script {
            says: Plain::new(says.into_iter().collect()),
            asked: AtomicUsize::new(0),
            was_asked: Notify::new(),
        });
        let chain = SharedCredentialsProvider::new(Chain(Arc::clone(&script)));
        (Ahead::with(chain, times), script)
    }

    async fn id(ahead: &Ahead) -> String {
        let given = tokio::time::timeout(HOUR, ahead.provide_credentials());
        let given = given.await.unwrap().unwrap();
        given.access_key_id().to_owned()
    }

    /// Asks until others are given than `old`, which are good all the while.
    async fn next(ahead: &Ahead, old: &str) -> String {
        loop {
            let given = id(ahead).await;
            if given != old {
                return given;
            }
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn credentials_are_replaced_before_they_expire_and_nobody_waits() {
        let soon = AHEAD / 2;
        let says = [Said::These("one", soon), Said::These("two", HOUR)];
        let (ahead, script) = ahead(AT_ONCE, says);
        assert_eq!(id(&ahead).await, "one");
        // It is answered by the old ones, and has the new ones asked for.
        assert_eq!(id(&ahead).await, "one");
        assert_eq!(next(&ahead, "one").await, "two");
        assert_eq!(id(&ahead).await, "two");
        assert_eq!(script.asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_metadata_service_that_fails_or_hangs_leaves_what_is_good() {
        let soon = Duration::from_mins(1);
        let says = [Said::These("one", soon), Said::Error, Said::Silence];
        let (ahead, script) = ahead(AT_ONCE, says);
        assert_eq!(id(&ahead).await, "one");
        script.was_asked.notified().await;
        for asked in 2..=3 {
            assert_eq!(id(&ahead).await, "one");
            script.was_asked.notified().await;
            assert_eq!(script.asked.load(Ordering::SeqCst), asked);
        }
        // While it hangs it is not asked once more.
        for _ in 0..10 {
            assert_eq!(id(&ahead).await, "one");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn between_two_attempts_is_a_pause() {
        let times = Times {
            pause: HOUR,
            ..AT_ONCE
        };
        let (ahead, _) = ahead(times, [Said::These("one", Duration::from_mins(1))]);
        for _ in 0..10 {
            assert_eq!(id(&ahead).await, "one");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_has_expired_is_not_given() {
        let says = [Said::These("one", MARGIN / 2), Said::These("two", HOUR)];
        let (ahead, _) = ahead(AT_ONCE, says);
        assert_eq!(id(&ahead).await, "one");
        assert_eq!(id(&ahead).await, "two");
        let (ahead, _) = self::ahead(AT_ONCE, [Said::These("one", MARGIN / 2), Said::Error]);
        assert_eq!(id(&ahead).await, "one");
        assert!(ahead.provide_credentials().await.is_err());
    }

    #[tokio::test]
    async fn what_s3_refuses_is_given_up_once() {
        let says = [Said::These("one", HOUR), Said::These("two", HOUR)];
        let (ahead, script) = ahead(AT_ONCE, says);
        assert_eq!(id(&ahead).await, "one");
        ahead.refused();
        assert_eq!(id(&ahead).await, "two");
        // Those that came a moment ago are not given up for what was asked with the old ones.
        let says = [Said::These("one", HOUR)];
        let (ahead, _) = self::ahead(TIMES, says);
        assert_eq!(id(&ahead).await, "one");
        ahead.refused();
        assert_eq!(id(&ahead).await, "one");
        assert_eq!(script.asked.load(Ordering::SeqCst), 2);
    }
}
