//! TLS from files: what the registry shows its clients, and whom it lets in.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, RootCertStore, ServerConfig};

use crate::config::TlsSettings;

mod own;

pub use own::trusting_anybody;

/// How long before its end a certificate is warned of.
const SOON: Duration = Duration::from_hours(14 * 24);
/// The protocols that are offered, the best first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// A file that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} {problem}", file.display())]
pub struct TlsError {
    /// Its key in the configuration, below `tls`.
    pub key: &'static str,
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it, as the end of a sentence that begins with the file.
    pub problem: String,
}

/// What the files make.
#[derive(Debug, Clone)]
pub struct Identity {
    /// For the handshakes.
    pub config: Arc<ServerConfig>,
    /// What is wrong with the certificate's dates, with the date: clients may refuse it.
    pub warning: Option<String>,
}

/// The one cryptography that this program has.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Reads the files and checks that they fit together. Blocks.
pub fn load(settings: &TlsSettings) -> Result<Identity, Vec<TlsError>> {
    let chain = certificates("certificate", &settings.certificate);
    let key = private_key("key", &settings.key);
    let clients = settings.client_ca.as_deref().map(client_authorities);
    let mut errors = Vec::new();
    let mut keep = |error| errors.push(error);
    let chain = chain.map_err(&mut keep).ok();
    let key = key.map_err(&mut keep).ok();
    let clients = clients.transpose().map_err(keep).ok();
    let (Some(chain), Some(key), Some(clients)) = (chain, key, clients) else {
        return Err(errors);
    };
    let warning = chain
        .first()
        .and_then(|leaf| wrong_time(leaf, SystemTime::now()));
    let config = server(chain, key, clients).map_err(|error| {
        vec![TlsError {
            key: "key",
            file: settings.key.clone(),
            problem: match error {
                rustls::Error::InconsistentKeys(_) => format!(
                    "is not the key of the certificate in {}",
                    settings.certificate.display()
                ),
                error => format!(
                    "can't be used with {}: {error}",
                    settings.certificate.display()
                ),
            },
        }]
    })?;
    let warning = warning.map(|warning| format!("{} {warning}", settings.certificate.display()));
    Ok(Identity {
        config: Arc::new(config),
        warning,
    })
}

fn server(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    clients: Option<RootCertStore>,
) -> Result<ServerConfig, rustls::Error> {
    let builder =
        ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(roots) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider());
            let verifier = verifier.build();
            builder.with_client_cert_verifier(
                verifier.map_err(|error| rustls::Error::General(error.to_string()))?,
            )
        }
    };
    let mut config = builder.with_single_cert(chain, key)?;
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    Ok(config)
}

/// The certificates of a PEM file, the server's or client's own first.
pub fn certificates(
    key: &'static str,
    file: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let error = |problem| TlsError {
        key,
        file: file.to_owned(),
        problem,
    };
    let bytes = fs::read(file).map_err(|e| error(unreadable(&e)))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if found.is_empty() => Err(error("holds no certificate in PEM".to_owned())),
        Ok(found) => match found
            .iter()
            .find_map(|one| ParsedCertificate::try_from(one).err())
        {
            Some(e) => Err(error(format!("holds what is no certificate: {e}"))),
            None => Ok(found),
        },
        Err(e) => Err(error(format!("is not PEM: {e}"))),
    }
}

/// The private key of a PEM file.
pub fn private_key(key: &'static str, file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let error = |problem| TlsError {
        key,
        file: file.to_owned(),
        problem,
    };
    let bytes = fs::read(file).map_err(|e| error(unreadable(&e)))?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|e| match e {
        rustls::pki_types::pem::Error::NoItemsFound => {
            error("holds no private key in PEM without a password".to_owned())
        }
        e => error(format!("is not PEM: {e}")),
    })
}

fn unreadable(error: &io::Error) -> String {
    format!("can't be read: {error}")
}

fn client_authorities(file: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("client_ca", file)? {
        roots.add(certificate).map_err(|e| TlsError {
            key: "client_ca",
            file: file.to_owned(),
            problem: format!("holds what is no certificate authority: {e}"),
        })?;
    }
    Ok(roots)
}

/// What is wrong with a certificate's dates at `now`, or soon will be.
///
/// rustls reads them where it verifies a certificate, and nowhere else; so this one is verified
/// against itself, and only what is said of its time is listened to.
fn wrong_time(certificate: &CertificateDer<'_>, now: SystemTime) -> Option<String> {
    use CertificateError::{ExpiredContext, NotValidYetContext};
    use rustls::Error::InvalidCertificate;

    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).ok()?;
    let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider());
    let verifier = verifier.build().ok()?;
    let name = ServerName::try_from("localhost").ok()?;
    let at = |time: SystemTime| {
        let time = UnixTime::since_unix_epoch(time.duration_since(UNIX_EPOCH).unwrap_or_default());
        verifier
            .verify_server_cert(certificate, &[], &name, &[], time)
            .err()
    };
    let date = |time: UnixTime| {
        humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(time.as_secs()))
    };
    match at(now) {
        Some(InvalidCertificate(ExpiredContext { not_after, .. })) => {
            return Some(format!("expired on {}: renew it", date(not_after)));
        }
        Some(InvalidCertificate(NotValidYetContext { not_before, .. })) => {
            return Some(format!("is not valid before {}", date(not_before)));
        }
        _ => {}
    }
    match at(now + SOON) {
        Some(InvalidCertificate(ExpiredContext { not_after, .. })) => {
            Some(format!("expires on {}: renew it", date(not_after)))
        }
        _ => None,
    }
}

/// What a running agent shows its clients: the files, as they were when they last were right.
#[derive(Debug)]
pub struct LiveIdentity(RwLock<Current>);

#[derive(Debug)]
struct Current {
    settings: TlsSettings,
    config: Arc<ServerConfig>,
    /// The files when they were last looked at, right or not: each state is told of once.
    seen: Vec<Option<Stamp>>,
}

/// When a file was changed, and which one it is: a new link's target may be older.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    inode: u64,
    size: u64,
}

impl LiveIdentity {
    /// Reads the files for the first time. Blocks.
    pub fn new(settings: &TlsSettings) -> Result<Self, Vec<TlsError>> {
        let seen = stamps(settings);
        let config = load(settings)?.config;
        Ok(Self(RwLock::new(Current {
            settings: settings.clone(),
            config,
            seen,
        })))
    }

    /// For the next handshake.
    pub fn config(&self) -> Arc<ServerConfig> {
        let current = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&current.config)
    }

    /// Reads the files where they, or their names, have changed. What can't be used changes
    /// nothing, and the log says so. Blocks.
    pub fn refresh(&self, settings: Option<&TlsSettings>) {
        let (before, seen) = {
            let current = self.0.read().unwrap_or_else(PoisonError::into_inner);
            (current.settings.clone(), current.seen.clone())
        };
        let settings = settings.unwrap_or(&before);
        let stamps = stamps(settings);
        if *settings == before && stamps == seen {
            return;
        }
        let loaded = load(settings);
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        current.seen = stamps;
        current.settings = settings.clone();
        match loaded {
            Ok(identity) => {
                current.config = identity.config;
                tracing::info!(certificate = %settings.certificate.display(), "a new certificate is in force");
                if let Some(warning) = identity.warning {
                    tracing::warn!("{warning}");
                }
            }
            Err(errors) => {
                for error in errors {
                    tracing::error!(%error, "the new certificate can't be used: the one before stays in force: {error}");
                }
            }
        }
    }
}

fn stamps(settings: &TlsSettings) -> Vec<Option<Stamp>> {
    let files = [&settings.certificate, &settings.key]
        .into_iter()
        .chain(&settings.client_ca);
    let stamp = |metadata: fs::Metadata| Stamp {
        modified: metadata.modified().ok(),
        inode: metadata.ino(),
        size: metadata.len(),
    };
    files
        .map(|file| fs::metadata(file).ok().map(stamp))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};
    use std::io::Write as _;

    /// Puts a new file in its place, as those who renew certificates do.
    fn write(file: &Path, text: &str) {
        let mut new = tempfile::NamedTempFile::new_in(file.parent().unwrap()).unwrap();
        new.write_all(text.as_bytes()).unwrap();
        new.persist(file).unwrap();
    }

    fn issue() -> (rcgen::Certificate, String) {
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2030, 1, 1);
        let key = KeyPair::generate().unwrap();
        (params.self_signed(&key).unwrap(), key.serialize_pem())
    }

    #[test]
    fn dates_are_warned_of_while_there_is_time_and_after() {
        let (certificate, _) = issue();
        let at = |seconds| wrong_time(certificate.der(), UNIX_EPOCH + Duration::from_secs(seconds));
        let says = |seconds, what: &str| at(seconds).is_some_and(|said| said.contains(what));
        let (begin, end, day) = (1_577_836_800, 1_893_456_000, 86_400);
        assert!(says(
            begin - day,
            "is not valid before 2020-01-01T00:00:00Z"
        ));
        assert_eq!(at(begin + day), None);
        assert_eq!(at(end - 15 * day), None);
        assert!(says(end - 13 * day, "expires on 2030-01-01T00:00:00Z"));
        assert!(says(end + day, "expired on 2030-01-01T00:00:00Z"));
    }

    #[test]
    fn changed_files_are_taken_over_when_they_fit_together() {
        let folder = tempfile::tempdir().unwrap();
        let settings = TlsSettings {
            certificate: folder.path().join("tls.crt"),
            key: folder.path().join("tls.key"),
            client_ca: None,
        };
        let (first, key) = issue();
        write(&settings.certificate, &first.pem());
        write(&settings.key, &key);
        let live = LiveIdentity::new(&settings).unwrap();
        let before = live.config();
        live.refresh(None);
        assert!(Arc::ptr_eq(&before, &live.config()), "nothing has changed");
        let (second, key) = issue();
        write(&settings.certificate, &second.pem());
        live.refresh(None);
        assert!(
            Arc::ptr_eq(&before, &live.config()),
            "its key is not there yet"
        );
        write(&settings.key, &key);
        live.refresh(None);
        assert!(!Arc::ptr_eq(&before, &live.config()));
    }
}
