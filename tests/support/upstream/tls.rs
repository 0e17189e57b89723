//! A certificate authority for one test.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::support::write_file;

/// Signs the certificates of a test's servers.
#[derive(Clone)]
pub struct Authority(Arc<CertifiedIssuer<'static, KeyPair>>);

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(Arc::new(
            CertifiedIssuer::self_signed(params, key).expect("an authority"),
        ))
    }

    /// Writes its certificate, in PEM, for clients to trust.
    pub fn write(&self, path: &Path) {
        write_file(path, self.0.pem().as_bytes());
    }

    /// What a server at this address shows.
    pub(super) fn server(&self, address: Ipv4Addr) -> Arc<ServerConfig> {
        let params = CertificateParams::new([address.to_string()]).expect("a name");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        let chain = vec![CertificateDer::from(certificate)];
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a private key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|config| config.with_no_client_auth().with_single_cert(chain, key));
        Arc::new(config.expect("a server configuration"))
    }
}
