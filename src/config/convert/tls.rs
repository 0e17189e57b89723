//! `tls`.

use std::path::PathBuf;

use super::super::error::KeyPath;
use super::super::fragment::TlsFragment;
use super::super::settings::TlsSettings;
use super::Conversion;
use crate::tls;

impl Conversion<'_> {
    /// Nothing where nothing was said, or where it is wrong, which has been said then.
    pub(super) fn tls(&mut self, said: Option<TlsFragment>) -> Option<TlsSettings> {
        let TlsFragment {
            certificate,
            key,
            client_ca,
        } = said?;
        if certificate.is_none() && key.is_none() && client_ca.is_none() {
            return None;
        }
        if !self.complete && (certificate.is_none() || key.is_none()) {
            return None;
        }
        let here = KeyPath::of("tls");
        for (name, said) in [("certificate", &certificate), ("key", &key)] {
            if said.is_none() {
                let message = format!("holds no {name}: add `{name}`, a file in PEM");
                self.refuse::<()>(&here, message);
            }
        }
        let file = |name: &str, said: Option<String>| -> Option<PathBuf> {
            Some(self.beside(&here.key(name), &said?))
        };
        let client_ca = file("client_ca", client_ca);
        let (certificate, key) = (file("certificate", certificate), file("key", key));
        let settings = TlsSettings {
            certificate: certificate?,
            key: key?,
            client_ca,
        };
        match tls::load(&settings) {
            Ok(identity) => {
                if let Some(warning) = identity.warning {
                    let warning = self.merged.remark(&here.key("certificate"), warning);
                    self.warnings.push(warning);
                }
            }
            Err(errors) => {
                for error in errors {
                    self.refuse::<()>(&here.key(error.key), error.to_string());
                }
            }
        }
        Some(settings)
    }
}
