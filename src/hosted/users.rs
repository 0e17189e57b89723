//! Who may push: a file of users and bcrypt hashes, as `htpasswd -B` writes it.
//!
//! bcrypt is slow on purpose. So a few run at once and some wait, off the threads that serve, and
//! what was right is remembered until the file changes: not the password, but a keyed hash of it
//! that means nothing outside this process. Who is not in the file takes as long as who is.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::{self, File, Metadata};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use ring::hmac;
use ring::rand::SystemRandom;
use tokio::sync::Semaphore;

use super::tokens::{Claims, Scope, Tokens};

/// A larger file is a mistake, in bytes.
const FILE_LIMIT: u64 = 1024 * 1024;
/// How often it is looked whether the file has changed.
const INTERVAL: Duration = Duration::from_secs(2);
/// The dearest hash that is computed: each step takes twice as long, and this one takes seconds.
const COST_LIMIT: u32 = 15;
/// Passwords that are checked at once.
const CHECKS: usize = 2;
/// Those that are checked or wait for it; more are told to come later.
const WAITING: usize = 128;
/// What was right of so many is remembered.
const REMEMBERED: usize = 4096;

/// The users' file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// It can't be read.
    #[error("can't read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What came back.
        source: std::io::Error,
    },
    /// A line is none that `htpasswd -B` writes. What it holds is not repeated: it may be a secret.
    #[error("{}: line {line} {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it, as the end of a sentence.
        problem: String,
    },
    /// It is larger than any list of users is.
    #[error("{} has more than {FILE_LIMIT} bytes: is it the file that is meant?", .0.display())]
    TooLarge(PathBuf),
}

/// Users and the hashes of their passwords.
#[derive(PartialEq, Eq)]
pub struct Users {
    hashes: HashMap<String, String>,
    /// What is computed for who is not among them, as dear as theirs.
    nobody: String,
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} users", self.hashes.len())
    }
}

/// Reads a file of users.
pub fn read(path: &Path) -> Result<Users, UsersError> {
    let error = |source| UsersError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = File::open(path).map_err(error)?;
    file.take(FILE_LIMIT + 1)
        .read_to_string(&mut text)
        .map_err(error)?;
    if text.len() as u64 > FILE_LIMIT {
        return Err(UsersError::TooLarge(path.to_owned()));
    }
    parse(&text).map_err(|(line, problem)| UsersError::Line {
        path: path.to_owned(),
        line,
        problem,
    })
}

fn parse(text: &str) -> Result<Users, (usize, String)> {
    let mut hashes = HashMap::new();
    let mut dearest = 5;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim_end();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |problem: &str| Err((number, problem.to_owned()));
        let Some((user, hash)) = line.split_once(':') else {
            return wrong("is not `user:hash`");
        };
        let Some(cost) = cost(hash) else {
            return wrong(
                "holds no bcrypt hash ($2y$...), and others are too easily guessed: make it with \
                 `htpasswd -B`",
            );
        };
        if cost > COST_LIMIT {
            return wrong(&format!(
                "has a hash of cost {cost}, which takes too long to compute: at most {COST_LIMIT}"
            ));
        }
        if user.is_empty() || hashes.insert(user.to_owned(), hash.to_owned()).is_some() {
            return wrong("names a user again, or none");
        }
        dearest = dearest.max(cost);
    }
    Ok(Users {
        hashes,
        nobody: format!("$2b${dearest:02}${}.{}.", "a".repeat(21), "a".repeat(30)),
    })
}

/// The cost of a bcrypt hash: `$2y$05$` and 53 characters.
fn cost(hash: &str) -> Option<u32> {
    let rest = ["$2y$", "$2a$", "$2b$"]
        .iter()
        .find_map(|version| hash.strip_prefix(version))?;
    let (cost, rest) = rest.split_once('$')?;
    let digits = |c: u8| c.is_ascii_alphanumeric() || c == b'.' || c == b'/';
    let whole = cost.len() == 2 && rest.len() == 53 && rest.bytes().all(digits);
    cost.parse()
        .ok()
        .filter(|cost| whole && (4..=31).contains(cost))
}

impl Users {
    /// Whether this is a user's password. Takes long. Blocks.
    fn verify(&self, user: &str, password: &[u8]) -> bool {
        let hash = self.hashes.get(user);
        let known = hash.is_some();
        let verified = bcrypt::verify(password, hash.unwrap_or(&self.nobody));
        verified.unwrap_or(false) && known
    }
}

/// Says who may come in, by a file that may change.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

struct Inner {
    key: hmac::Key,
    tokens: Tokens,
    state: Mutex<State>,
    checks: Semaphore,
    waiting: Semaphore,
}

struct State {
    /// The file, and what it was like when it was read.
    file: Option<(PathBuf, Option<Stamp>)>,
    users: Arc<Users>,
    /// Of whom the password was right.
    remembered: HashSet<[u8; 32]>,
}

/// What tells a file from the one before.
type Stamp = (u64, u64, u64, i64, i64);

fn stamp(metadata: &Metadata) -> Stamp {
    let (device, inode) = (metadata.dev(), metadata.ino());
    let (size, seconds) = (metadata.len(), metadata.mtime());
    (device, inode, size, seconds, metadata.mtime_nsec())
}

/// What a request says of who it is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A user, with the right password.
    User,
    /// It does not say, or says what is wrong.
    Stranger,
    /// So many passwords wait to be checked that this one can't be.
    Busy,
}

impl Gate {
    /// A gate that lets nobody in, until it is told of a file.
    pub fn new() -> Result<Self, String> {
        let no_random = |_| "the system has no random numbers".to_owned();
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new());
        Ok(Self(Arc::new(Inner {
            key: key.map_err(no_random)?,
            tokens: Tokens::new().map_err(no_random)?,
            state: Mutex::new(State {
                file: None,
                users: Arc::new(Users {
                    hashes: HashMap::new(),
                    nobody: String::new(),
                }),
                remembered: HashSet::new(),
            }),
            checks: Semaphore::new(CHECKS),
            waiting: Semaphore::new(WAITING),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the file, if it is another one or has changed. One that can't be used changes nothing.
    /// Blocks.
    pub fn refresh(&self, file: Option<&Path>) -> Result<(), UsersError> {
        let now = file.map(|file| {
            let metadata = fs::metadata(file).ok();
            (file.to_owned(), metadata.as_ref().map(stamp))
        });
        if self.state().file == now {
            return Ok(());
        }
        let users = file.map(read).transpose();
        let mut state = self.state();
        // Also where it is broken, which is said once.
        state.file = now;
        if let Some(users) = users? {
            tracing::info!(users = users.hashes.len(), "the users were read");
            state.users = Arc::new(users);
            state.remembered.clear();
        }
        Ok(())
    }

    /// Looks after the file for ever; which one it is, is asked anew each time.
    pub async fn watch(self, file: impl Fn() -> Option<PathBuf>) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let Some(file) = file() else { continue };
            let gate = self.clone();
            let refreshed = tokio::task::spawn_blocking(move || gate.refresh(Some(&file))).await;
            if let Ok(Err(error)) = refreshed {
                tracing::error!(%error, "the users stay what they were: {error}");
            }
        }
    }

    /// Whether a request is from a user, where that is known without computing anything.
    pub fn recall(&self, headers: &HeaderMap) -> bool {
        let Some(credentials) = credentials(headers) else {
            return false;
        };
        let tag = self.tag(&credentials);
        self.state().remembered.contains(&tag)
    }

    /// A keyed hash, by which credentials are known again.
    fn tag(&self, credentials: &[u8]) -> [u8; 32] {
        let mut tag = [0; 32];
        tag.copy_from_slice(hmac::sign(&self.0.key, credentials).as_ref());
        tag
    }

    /// What a request's token says, if it has one that counts.
    pub fn claims(&self, headers: &HeaderMap) -> Option<Claims> {
        let said = headers.get(AUTHORIZATION)?.to_str().ok()?;
        let (scheme, token) = said.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (tokens, users) = (&self.0.tokens, Arc::clone(&self.state().users));
        let hash_of = |user: &str| users.hashes.get(user).map(String::as_str);
        tokens.check(token.trim(), hash_of, tokens.now())
    }

    /// A token for a user whose password was right, or for nobody; `None` where the user is gone
    /// meanwhile.
    pub fn token(&self, user: Option<&str>, scopes: Vec<Scope>) -> Option<String> {
        let (tokens, users) = (&self.0.tokens, Arc::clone(&self.state().users));
        let user = match user {
            Some(user) => Some((user, users.hashes.get(user)?.as_str())),
            None => None,
        };
        tokens.issue(user, scopes, tokens.now()).ok()
    }

    /// Who a request is from, by the password that it shows.
    pub async fn ask(&self, headers: &HeaderMap) -> Verdict {
        match credentials(headers) {
            Some(credentials) => self.ask_of(credentials).await,
            None => Verdict::Stranger,
        }
    }

    /// Whose these are: `user:password`.
    pub async fn ask_of(&self, credentials: Vec<u8>) -> Verdict {
        let tag = self.tag(&credentials);
        if self.state().remembered.contains(&tag) {
            return Verdict::User;
        }
        let Ok(_waiting) = self.0.waiting.try_acquire() else {
            return Verdict::Busy;
        };
        let Ok(_check) = self.0.checks.acquire().await else {
            return Verdict::Busy;
        };
        // Many requests of one client come at once, and the first has found it out.
        let users = {
            let state = self.state();
            if state.remembered.contains(&tag) {
                return Verdict::User;
            }
            Arc::clone(&state.users)
        };
        let checked = Arc::clone(&users);
        let right = tokio::task::spawn_blocking(move || {
            let at = credentials.iter().position(|c| *c == b':')?;
            let user = str::from_utf8(&credentials[..at]).ok()?;
            checked.verify(user, &credentials[at + 1..]).then_some(())
        });
        if !matches!(right.await, Ok(Some(()))) {
            return Verdict::Stranger;
        }
        let mut state = self.state();
        // What was right by a file that has changed meanwhile is asked again.
        if !Arc::ptr_eq(&state.users, &users) {
            return Verdict::Busy;
        }
        if state.remembered.len() >= REMEMBERED {
            state.remembered.clear();
        }
        state.remembered.insert(tag);
        Verdict::User
    }
}

/// `user:password` of a request. Source: RFC 7617.
pub fn credentials(headers: &HeaderMap) -> Option<Vec<u8>> {
    let said = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes)?;
    let (scheme, encoded) = said.split_at_checked(6)?;
    if !scheme.eq_ignore_ascii_case(b"basic ") {
        return None;
    }
    let decoded = STANDARD.decode(encoded.trim_ascii()).ok()?;
    decoded.contains(&b':').then_some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `secret`, at the lowest cost.
    fn hash() -> String {
        bcrypt::hash("secret", 4).unwrap()
    }

    #[test]
    fn a_file_of_htpasswd_is_read_and_others_are_refused_by_their_line() {
        let users = parse(&format!("# people\n\nalice:{}\n", hash())).unwrap();
        assert!(users.verify("alice", b"secret"));
        assert!(!users.verify("alice", b"other"));
        assert!(!users.verify("bob", b"secret"));
        let hash = hash();
        for (text, line) in [
            ("alice".to_owned(), 1),
            ("alice:secret".to_owned(), 1),
            ("alice:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=".to_owned(), 1),
            ("alice:$apr1$aa$bb".to_owned(), 1),
            (format!("alice:{hash}\nalice:{hash}"), 2),
            (format!(":{hash}"), 1),
            (format!("alice:$2y$20${}", "a".repeat(53)), 1),
        ] {
            let (at, problem) = parse(&text).unwrap_err();
            assert_eq!(at, line, "{problem}");
            assert!(!problem.contains("secret"), "{problem}");
        }
    }

    #[test]
    fn who_is_not_in_the_file_costs_as_much_as_who_is() {
        let users = parse(&format!("alice:{}", hash())).unwrap();
        assert!(bcrypt::verify("x", &users.nobody).is_ok(), "it is computed");
        assert_eq!(cost(&users.nobody), Some(5));
    }
}
