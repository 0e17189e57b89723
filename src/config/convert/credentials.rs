//! What upstreams are asked as.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::super::error::KeyPath;
use super::super::fragment::CredentialsFragment;
use super::super::settings::{Credentials, Secret};
use super::Conversion;

/// A password file that is longer is something else: a log, a disk.
const PASSWORD_LIMIT: u64 = 64 * 1024;

impl Conversion<'_> {
    pub(super) fn credentials(
        &mut self,
        upstream: &KeyPath,
        said: CredentialsFragment,
    ) -> Option<Credentials> {
        let here = upstream.key("credentials");
        let username = match said.username {
            name if name.is_empty() => self.refuse(&here.key("username"), "is empty"),
            // RFC 7617, section 2: the colon separates it from the password.
            name if name.contains(':') => self.refuse(
                &here.key("username"),
                "holds a colon, which no user name can",
            ),
            name => Some(name),
        };
        let password = match (said.password, said.password_file) {
            (Some(password), None) if password.reveal().is_empty() => {
                self.refuse(&here.key("password"), "is empty")
            }
            (Some(password), None) => Some(password),
            (None, Some(file)) => self.password_file(&here.key("password_file"), &file),
            (Some(_), Some(_)) => {
                self.refuse(&here, "holds both `password` and `password_file`: keep one")
            }
            (None, None) => self.refuse(
                &here,
                "holds no password: add `password_file` (or `password`)",
            ),
        };
        Some(Credentials {
            username: username?,
            password: password?,
        })
    }

    pub(super) fn password_file(&mut self, path: &KeyPath, said: &str) -> Option<Secret> {
        let file = self.beside(path, said);
        match read_password(&file) {
            Ok(password) => Some(Secret::new(password)),
            Err(message) => self.refuse(path, format!("{} {message}", file.display())),
        }
    }
}

/// A password from a file, without the final newline, or what is wrong with the file.
fn read_password(file: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    File::open(file)
        .and_then(|file| file.take(PASSWORD_LIMIT + 1).read_to_end(&mut bytes))
        .map_err(|error| format!("can't be read: {error}"))?;
    if bytes.len() as u64 > PASSWORD_LIMIT {
        return Err(format!(
            "is over {PASSWORD_LIMIT} bytes long: not a password"
        ));
    }
    let text = String::from_utf8(bytes).map_err(|_| "is not UTF-8 text")?;
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);
    if password.is_empty() {
        Err("is empty".to_owned())
    } else {
        Ok(password.to_owned())
    }
}
