//! `hosted`, what is about hosted names, and `auth`.

use std::net::SocketAddr;

use super::super::error::{KeyPath, quoted};
use super::super::fragment::{AuthFragment, Fragment, UsersFragment};
use super::super::settings::{
    AuthSettings, HostSettings, HostedSettings, Role, TlsSettings, UpstreamSettings,
};
use super::Conversion;
use crate::hosted::users;
use crate::oci::{Pattern, Patterns};

impl Conversion<'_> {
    pub(super) fn hosted(
        &mut self,
        role: Role,
        fragment: &mut Fragment,
        upstreams: &[UpstreamSettings],
    ) -> HostedSettings {
        let hosted = fragment.hosted.take();
        if role == Role::Reader && hosted.is_some() {
            let message = "a reader takes no pushes: remove the key, or make this a writer (`role: \
                           writer`)";
            self.refuse::<()>(&KeyPath::of("hosted"), message);
        }
        let names = self.patterns("hosted", hosted, |conversion, here, pattern| {
            conversion.check_name(here, pattern);
            if role == Role::Mirror {
                conversion.check_hosted(here, pattern, upstreams);
            }
        });
        // A writer has nothing but what is pushed.
        let all = || -> Patterns { "*".parse::<Pattern>().into_iter().collect() };
        let of_writer = || {
            if role == Role::Writer {
                all()
            } else {
                Patterns::default()
            }
        };
        let names = names.unwrap_or_else(of_writer);
        let adopt = self.patterns("adopt", fragment.adopt.take(), Self::check_name);
        let shard = self.patterns("shard", fragment.shard.take(), Self::check_name);
        let said = fragment.immutable_tags.take();
        let immutable_tags = self.patterns("immutable_tags", said, Self::check_tag);
        let said = [
            ("adopt", adopt.is_some()),
            ("shard", shard.is_some()),
            ("immutable_tags", immutable_tags.is_some()),
            ("delete", fragment.delete == Some(true)),
            ("sparse", fragment.sparse.is_some()),
        ];
        for (key, said) in said {
            if said && names.is_empty() && self.complete {
                let message = "is about hosted names, and `hosted` names none";
                self.refuse::<()>(&KeyPath::of(key), message);
            }
        }
        HostedSettings {
            names,
            adopt: adopt.unwrap_or_else(of_writer),
            immutable_tags: immutable_tags.unwrap_or_default(),
            shard,
            delete: fragment.delete.unwrap_or(false),
            sparse: fragment.sparse.unwrap_or_default(),
        }
    }

    /// A name is either pushed here or mirrored.
    fn check_hosted(&mut self, here: &KeyPath, pattern: &Pattern, upstreams: &[UpstreamSettings]) {
        let first = pattern.as_str().split('/').next().unwrap_or_default();
        if first.starts_with('*') {
            let message = format!(
                "{} could be any name, and nothing of an upstream's would be mirrored: begin it \
                 with what all of them have, such as \"mycompany/*\"",
                quoted(pattern.as_str())
            );
            self.refuse::<()>(here, message);
            return;
        }
        // Below such a folder another registry's repositories are stored.
        let has_path = pattern.as_str().contains('/') || first.contains('*');
        let as_host = upstreams.iter().any(|it| it.registry.as_str() == first);
        if has_path && (first.contains('.') || first == "localhost" || as_host) {
            let message = format!(
                "{} begins like another registry's names, {first}: host names of your own",
                quoted(pattern.as_str())
            );
            self.refuse::<()>(here, message);
        }
    }

    fn check_name(&mut self, here: &KeyPath, pattern: &Pattern) {
        if pattern.has_tag() {
            let message = format!(
                "{} holds a tag: must be names alone, such as \"mycompany/*\"",
                quoted(pattern.as_str())
            );
            self.refuse::<()>(here, message);
        }
    }

    fn check_tag(&mut self, here: &KeyPath, pattern: &Pattern) {
        if !pattern.has_tag() {
            let message = format!(
                "{} names no tags: must be a name, a colon and a tag, such as \"mycompany/*:v*\"",
                quoted(pattern.as_str())
            );
            self.refuse::<()>(here, message);
        }
    }

    fn patterns(
        &mut self,
        key: &str,
        said: Option<Vec<String>>,
        check: impl Fn(&mut Self, &KeyPath, &Pattern),
    ) -> Option<Patterns> {
        let said = said?;
        let mut patterns = Vec::new();
        for (index, text) in said.iter().enumerate() {
            let here = KeyPath::of(key).item(index);
            match text.parse::<Pattern>() {
                Ok(pattern) => {
                    check(self, &here, &pattern);
                    patterns.push(pattern);
                }
                Err(error) => {
                    let message = format!("{error}; `*` stands for any characters");
                    self.refuse::<()>(&here, message);
                }
            }
        }
        Some(patterns.into_iter().collect())
    }

    pub(super) fn auth(
        &mut self,
        said: Option<AuthFragment>,
        hosted: &HostedSettings,
        listen: Option<SocketAddr>,
        tls: Option<&TlsSettings>,
    ) -> Option<AuthSettings> {
        let path = KeyPath::of("auth");
        match said {
            Some(AuthFragment::Nobody(_)) => None,
            Some(AuthFragment::Users(said)) => {
                let settings = self.users(said)?;
                if hosted.names.is_empty() && self.complete {
                    let message = "is about hosted names, and `hosted` names none: images of \
                                   upstreams are given to everybody who can reach the mirror";
                    return self.refuse(&path, message);
                }
                let far = listen.is_some_and(|listen| !listen.ip().is_loopback());
                if far && tls.is_none() {
                    let message = "passwords can be read on their way: `tls` is not set, and \
                                   `listen` is not loopback";
                    self.warnings.push(self.merged.remark(&path, message));
                }
                Some(settings)
            }
            None => {
                let certificates = tls.is_some_and(|tls| tls.client_ca.is_some());
                let here = listen.is_none_or(|listen| listen.ip().is_loopback());
                if !hosted.names.is_empty() && !here && !certificates && self.complete {
                    let message = "everybody who can reach `listen` could push: say who may by \
                                   `auth: { htpasswd: ... }` or `tls.client_ca`, or that all of \
                                   them may by `auth: none`, or listen on 127.0.0.1";
                    self.refuse::<()>(&KeyPath::of("hosted"), message);
                }
                None
            }
        }
    }

    /// docker would offer the user's password of Docker Hub to a mirror that asks for one.
    pub(super) fn check_mirror_name(
        &mut self,
        auth: Option<&AuthSettings>,
        host: Option<&HostSettings>,
    ) {
        let name = auth.and_then(|auth| auth.name.as_deref());
        if let Some(name) = name
            && host.is_some_and(|host| host.mirror.host_str() == Some(name))
        {
            let message = format!(
                "{} is `auth.name`, under which passwords are asked for: docker would send those of \
                 Docker Hub there. Name the mirror by its address, or by another name",
                quoted(name)
            );
            self.refuse::<()>(&KeyPath::of("host.mirror"), message);
        }
    }

    fn users(&mut self, said: UsersFragment) -> Option<AuthSettings> {
        let here = KeyPath::of("auth");
        let Some(file) = said.htpasswd else {
            if !self.complete {
                return None;
            }
            let message = "holds no htpasswd: add `htpasswd`, a file that `htpasswd -B` writes, or \
                           say `auth: none`";
            return self.refuse(&here, message);
        };
        let htpasswd = self.beside(&here.key("htpasswd"), &file);
        let read = users::read(&htpasswd);
        if let Err(error) = &read {
            self.refuse::<()>(&here.key("htpasswd"), error.to_string());
        }
        let name = said.name.map(|name| name.to_ascii_lowercase());
        if let Some(name) = &name
            && (name.is_empty() || name.contains(['/', ':', ' ']))
        {
            let message = format!(
                "{} is not a host name: must be one without a port, such as registry.example.com",
                quoted(name)
            );
            return self.refuse(&here.key("name"), message);
        }
        read.ok()?;
        Some(AuthSettings {
            htpasswd,
            pull: said.pull.unwrap_or_default(),
            name,
        })
    }
}
