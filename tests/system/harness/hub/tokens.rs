//! The token server (auth.docker.io): tokens for the registry, which says nothing of users itself.
//!
//! The registry's documentation calls it "token authentication": a JWT, signed with ES256, whose
//! `x5c` header leads to a certificate that the registry was told to trust.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, Uri, header};
use rcgen::{CertifiedKey, KeyPair};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};

/// Who the registry believes.
pub const ISSUER: &str = "auth.docker.io";

const LIFETIME: Duration = Duration::from_mins(5);

/// What a token allows.
pub struct Access<'a> {
    /// The repository's full name (`library/busybox`).
    pub repository: &'a str,
    /// `pull`, `push`.
    pub actions: &'a [&'a str],
}

/// The token server.
pub struct Tokens {
    service: &'static str,
    certificate: CertifiedKey<KeyPair>,
    key: EcdsaKeyPair,
    random: SystemRandom,
    users: Mutex<HashMap<String, String>>,
    private: Mutex<HashSet<String>>,
}

impl Tokens {
    /// One for `service`, with no users, that lets everyone pull everything.
    pub fn new(service: &'static str) -> Self {
        let certificate = rcgen::generate_simple_self_signed([ISSUER.to_owned()]);
        let certificate = certificate.expect("making a token certificate");
        let random = SystemRandom::new();
        let pkcs8 = certificate.signing_key.serialize_der();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &pkcs8, &random);
        let key = key.expect("a P-256 key, rcgen's default");
        Self {
            service,
            certificate,
            key,
            random,
            users: Mutex::default(),
            private: Mutex::default(),
        }
    }

    /// The certificate that the registry has to trust.
    pub fn certificate_pem(&self) -> String {
        self.certificate.cert.pem()
    }

    /// Adds a user.
    pub fn add_user(&self, name: &str, password: &str) {
        let mut users = self.users.lock().expect("the Hub's users");
        users.insert(name.to_owned(), password.to_owned());
    }

    /// Lets only users pull a repository.
    pub fn make_private(&self, repository: &str) {
        self.private
            .lock()
            .expect("the private repositories")
            .insert(repository.to_owned());
    }

    /// Answers a token request. Missing rights still yield a token, with fewer grants; only wrong
    /// credentials are refused.
    pub fn answer(&self, uri: &Uri, headers: &HeaderMap) -> Response<Bytes> {
        let Ok(user) = self.authenticate(headers) else {
            let body = json!({ "details": "incorrect username or password" });
            return answer(StatusCode::UNAUTHORIZED, &body);
        };
        let query: Vec<(String, String)> =
            url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes())
                .into_owned()
                .collect();
        if !query
            .iter()
            .any(|(key, value)| key == "service" && value == self.service)
        {
            return answer(
                StatusCode::BAD_REQUEST,
                &json!({ "details": "unknown service" }),
            );
        }
        let scopes = query.iter().filter(|(key, _)| key == "scope");
        let scopes = scopes.flat_map(|(_, value)| value.split(' '));
        let granted: Vec<Access<'_>> = scopes
            .filter_map(|scope| self.grant(scope, user.is_some()))
            .collect();
        let token = self.sign(&granted);
        let body = json!({
            "token": token,
            "access_token": token,
            "expires_in": LIFETIME.as_secs(),
            "issued_at": humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        });
        answer(StatusCode::OK, &body)
    }

    /// `repository:NAME:ACTIONS` as far as the client may: nobody pushes from outside.
    fn grant<'a>(&self, scope: &'a str, is_user: bool) -> Option<Access<'a>> {
        let (repository, actions) = scope.strip_prefix("repository:")?.rsplit_once(':')?;
        let private = self
            .private
            .lock()
            .expect("the private repositories")
            .contains(repository);
        let allowed = actions.split(',').any(|action| action == "pull") && (is_user || !private);
        allowed.then_some(Access {
            repository,
            actions: &["pull"],
        })
    }

    /// The user's name, or nobody, or an error for wrong credentials.
    fn authenticate(&self, headers: &HeaderMap) -> Result<Option<String>, ()> {
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            return Ok(None);
        };
        let basic = value
            .to_str()
            .ok()
            .and_then(|value| value.strip_prefix("Basic "))
            .ok_or(())?;
        let decoded = STANDARD.decode(basic).map_err(|_| ())?;
        let credentials = String::from_utf8(decoded).map_err(|_| ())?;
        let (name, password) = credentials.split_once(':').ok_or(())?;
        let users = self.users.lock().expect("the Hub's users");
        let known = users.get(name).is_some_and(|known| known == password);
        if known {
            Ok(Some(name.to_owned()))
        } else {
            Err(())
        }
    }

    /// A token that allows `access`.
    pub fn sign(&self, access: &[Access<'_>]) -> String {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("a clock after 1970");
        let access: Vec<Value> = access
            .iter()
            .map(
                |Access {
                     repository,
                     actions,
                 }| {
                    json!({ "type": "repository", "name": repository, "actions": actions })
                },
            )
            .collect();
        let chain = [STANDARD.encode(self.certificate.cert.der())];
        let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": chain });
        let claims = json!({
            "iss": ISSUER,
            "aud": self.service,
            "sub": "",
            "iat": now.as_secs(),
            // The clocks are the same, but "not before now" is a second's rounding away from no.
            "nbf": now.as_secs() - 10,
            "exp": (now + LIFETIME).as_secs(),
            "jti": "test",
            "access": access,
        });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&header), part(&claims));
        let signature = self
            .key
            .sign(&self.random, signed.as_bytes())
            .expect("signing a token");
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

fn answer(status: StatusCode, body: &Value) -> Response<Bytes> {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Bytes::from(body.to_string()))
        .expect("a response")
}
