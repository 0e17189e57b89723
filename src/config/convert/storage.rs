//! `storage`.

use std::path::PathBuf;

use super::super::error::{KeyPath, quoted};
use super::super::fragment::{EncryptionFragment, S3Fragment, StorageFragment};
use super::super::settings::{AccessKeys, Encryption, Role, S3Settings, Storage};
use super::{Conversion, absolute};

impl Conversion<'_> {
    /// Where a role keeps what it has.
    pub(super) fn storage(
        &mut self,
        role: Role,
        said: Option<&mut StorageFragment>,
    ) -> Option<Storage> {
        let mut none = StorageFragment::default();
        let said = said.unwrap_or(&mut none);
        let filesystem = said.filesystem.take();
        let bucket = said.s3.take();
        let cache = said.cache.as_mut().and_then(|cache| cache.root.take());
        let here = KeyPath::of("storage");
        if filesystem.is_some() && bucket.is_some() {
            let message = "holds both `filesystem` and `s3`: keep one (the folder of a disk cache in \
                           front of a bucket is `storage.cache.root`)";
            return self.refuse(&here, message);
        }
        if let Some(bucket) = bucket {
            let bucket = self.bucket(&here.key("s3"), bucket);
            let cache = self.folder(&here.key("cache").key("root"), cache);
            return Some(Storage::S3 {
                bucket: Box::new(bucket?),
                cache: cache?,
            });
        }
        if role == Role::Reader && self.complete {
            let message = "a reader serves what is in a bucket: name it by `storage.s3.bucket`";
            return self.refuse(&KeyPath::of("role"), message);
        }
        if cache.is_some() {
            let message = "there is no cache in front of a folder: it is for `storage.s3` (a folder \
                           itself is `storage.filesystem.root`)";
            self.refuse::<()>(&here.key("cache").key("root"), message);
        }
        let root = filesystem.and_then(|filesystem| filesystem.root);
        let root = self.folder(&here.key("filesystem").key("root"), root)?;
        Some(Storage::Filesystem { root })
    }

    fn folder(&mut self, path: &KeyPath, said: Option<String>) -> Option<PathBuf> {
        match said {
            Some(said) if absolute(&said) => Some(said.into()),
            Some(said) => {
                let message = format!("{} is not a path that begins with /", quoted(&said));
                self.refuse(path, message)
            }
            None => {
                let default = self.state_folder();
                if default.is_none() && self.complete {
                    let message = "nothing says where to keep images: set this key (none of \
                                   STATE_DIRECTORY, XDG_STATE_HOME and HOME is set to a path)";
                    return self.refuse(path, message);
                }
                default
            }
        }
    }

    fn bucket(&mut self, here: &KeyPath, said: S3Fragment) -> Option<S3Settings> {
        let name = match said.bucket {
            Some(name) if is_bucket(&name) => Some(name),
            Some(name) => {
                let message = format!(
                    "{} is not a bucket's name: 3 to 63 lower-case letters, digits, dots and \
                     dashes, without s3:// and without a path (that is `prefix`)",
                    quoted(&name)
                );
                self.refuse(&here.key("bucket"), message)
            }
            None if self.complete => self.refuse(here, "holds no `bucket`: add its name"),
            None => None,
        };
        let prefix = said.prefix.unwrap_or_default();
        if prefix.split('/').any(|part| matches!(part, "." | "..")) {
            let message = format!(
                "{} holds `.` or `..`, which are no folders in a bucket",
                quoted(&prefix)
            );
            self.refuse::<()>(&here.key("prefix"), message);
        }
        let region = said.region.map(|region| {
            let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
            if region.bytes().all(plain) && !region.is_empty() {
                return Some(region);
            }
            let message = format!(
                "{} is not a region: must be its code, such as eu-central-1",
                quoted(&region)
            );
            self.refuse(&here.key("region"), message)
        });
        let endpoint = said
            .endpoint
            .map(|endpoint| self.url(&here.key("endpoint"), &endpoint));
        let storage_class = said.storage_class.map(|class| {
            let plain = |c: u8| c.is_ascii_uppercase() || c == b'_';
            if class.bytes().all(plain) && !class.is_empty() {
                return Some(class);
            }
            let message = format!(
                "{} is not a storage class: must be S3's own word, such as STANDARD_IA or \
                 INTELLIGENT_TIERING",
                quoted(&class)
            );
            self.refuse(&here.key("storage_class"), message)
        });
        let encryption = said
            .encryption
            .map(|said| self.encryption(&here.key("encryption"), said));
        let keys = match (said.access_key, said.secret_key) {
            (Some(id), Some(secret)) => Some(Some(AccessKeys { id, secret })),
            (None, None) => None,
            _ if !self.complete => None,
            (Some(_), None) => {
                Some(self.refuse(&here.key("access_key"), "stands without `secret_key`"))
            }
            (None, Some(_)) => {
                Some(self.refuse(&here.key("secret_key"), "stands without `access_key`"))
            }
        };
        // What was said and is wrong has been refused: the outer `Some` is that it was said.
        Some(S3Settings {
            bucket: name?,
            region: optional(region)?,
            prefix,
            endpoint: optional(endpoint)?,
            path_style: said.path_style.unwrap_or(false),
            redirect: said.redirect.unwrap_or(false),
            storage_class: optional(storage_class)?,
            encryption: optional(encryption)?,
            keys: optional(keys)?,
        })
    }

    fn encryption(&mut self, here: &KeyPath, said: EncryptionFragment) -> Option<Encryption> {
        match (said.sse.as_deref(), said.kms_key) {
            (Some("AES256"), None) => Some(Encryption::Aes256),
            (Some("AES256"), Some(_)) => {
                let message = "is for `sse: aws:kms`: AES256 has no key of yours";
                self.refuse(&here.key("kms_key"), message)
            }
            (Some("aws:kms"), key) => Some(Encryption::Kms { key }),
            (Some(other), _) => {
                let message = format!(
                    "{} is not allowed; must be one of: AES256, aws:kms",
                    quoted(other)
                );
                self.refuse(&here.key("sse"), message)
            }
            (None, _) if self.complete => {
                self.refuse(here, "holds no `sse`: add it, AES256 or aws:kms")
            }
            (None, _) => None,
        }
    }
}

/// What was said, if anything was; nothing at all where it is wrong.
#[allow(clippy::option_option, reason = "said or not, and right or not")]
fn optional<T>(said: Option<Option<T>>) -> Option<Option<T>> {
    match said {
        None => Some(None),
        Some(None) => None,
        Some(right) => Some(right),
    }
}

/// Source: Amazon S3 user guide, "General purpose bucket naming rules". Old ones, and those of other
/// stores, may have capitals and underscores.
fn is_bucket(name: &str) -> bool {
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_');
    (3..=255).contains(&name.len()) && name.bytes().all(plain)
}
