//! A certificate authority of the test's own.

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// An authority that hosts can be told to trust.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// Makes one, with a fresh key.
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("making a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("signing the authority");
        Self { issuer }
    }

    /// The authority's certificate, for a trust store.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A server certificate for `names`, its chain, and its key.
    pub fn issue(&self, names: &[&str]) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let (leaf, key) = self.sign(names);
        (vec![leaf.der().clone()], key.into())
    }

    /// The same in PEM, for an agent's files: the certificate and its key.
    pub fn issue_pem(&self, names: &[&str]) -> (String, String) {
        let (leaf, key) = self.sign(names);
        (leaf.pem(), key.serialize_pem())
    }

    fn sign(&self, names: &[&str]) -> (Certificate, KeyPair) {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).expect("names for a certificate");
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().expect("making a key");
        let leaf = params
            .signed_by(&key, &self.issuer)
            .expect("signing a certificate");
        (leaf, key)
    }
}
