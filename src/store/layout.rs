//! The storage layout of CNCF distribution (registry:2, registry:3), and the only place that forms
//! a path.
//!
//! Every path is relative to the storage's root, with `/` between its parts and none in front, so
//! that it is a path on a filesystem and a key in S3 alike.
//! Source: distribution, `registry/storage/paths.go`.
//!
//! ```text
//! docker/registry/v2/
//!   blobs/<alg>/<hh>/<hex>/data                       hh: the first two hex digits
//!   blobs/<alg>/<hh>/<hex>/used                       S3: says that it was used again
//!   blobs/<alg>/<hh>/<hex>/collecting-<random>        S3: says that a gc is removing it
//!   repositories/<repository>/_layers/<alg>/<hex>/link
//!   repositories/<repository>/_layers/collecting-<random>   S3: says that a gc is removing links
//!   repositories/<repository>/_manifests/revisions/<alg>/<hex>/link
//!   repositories/<repository>/_manifests/tags/<tag>/current/link
//!   repositories/<repository>/_manifests/tags/<tag>/index/<alg>/<hex>/link
//!   repositories/<repository>/_uploads/<uuid>/{data,startedat}
//!   repositories/<repository>/_referrers/<alg>/<hex>/<alg>/<hex>   S3: subject, then who refers to it
//! registry-agent/                                     this agent's own, ignored by distribution
//!   fills/<alg>/<hex>                                 blobs that are being downloaded
//!   fills/<alg>/<hex>.synced                          how much of one is on the disk for certain
//!   referrers/<repository>/_of/<alg>/<hex>            what an upstream last said refers to a manifest
//!   public/<repository>/_proved                       says that everybody could see a repository; S3: or not
//!   shared/<repository>/_kept/unproved                says that an account's content was kept there
//!   hosted/<repository>/_own/pushed                   says that what a repository has was pushed here
//!   subjects/<repository>/_of/<alg>/<hex>/<alg>/<hex> says that one manifest is about another
//!   aside/<repository>/_since/<seconds>/              what was cached of a repository, before it was pushed
//!   tmp/                                              files that are being written
//!   lock                                              held while an agent serves this root
//!   probe/<random>                                    S3: whether conditional writes are obeyed
//! ```
//!
//! A `link` holds a bare digest, without a newline. distribution passes over every folder of a
//! repository whose name begins with `_` and which it does not know, as it does over what is in
//! `_referrers`, whose files hold a referrer's descriptor each, and over each name beside `data` and
//! `link` (`blobstore.go`, `linkedblobstore.go`: `Enumerate`).

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::upload::UploadId;
use crate::oci::{Algorithm, Digest, Name, RegistryHost, Tag};

/// The folder of all that distribution keeps.
pub const V2: &str = "docker/registry/v2";

/// Where an agent keeps what is its own.
pub const OWN: &str = "registry-agent";
/// Files that are being written, before they are renamed into place.
pub const TEMPORARY: &str = "registry-agent/tmp";
/// The folder of all repositories, for what is kept of their manifests' referrers.
pub const REFERRERS: &str = "registry-agent/referrers";
/// The folder of all repositories of which something was kept that perhaps only an account could see.
pub const SHARED: &str = "registry-agent/shared";
/// The folder of all repositories of which what they have was pushed here.
pub const HOSTED: &str = "registry-agent/hosted";
/// The folder of all repositories, for the notes of whether everybody could see them.
pub const PUBLIC: &str = "registry-agent/public";
/// Keys that are written, and removed again, to see whether a bucket obeys conditions.
pub const PROBES: &str = "registry-agent/probe";
/// The folder of all repositories of which something was set aside.
pub const ASIDE: &str = "registry-agent/aside";
/// Held locked by the agent that serves the root.
pub const LOCK: &str = "registry-agent/lock";

/// What stands before every key of a bucket: `""`, or a path with a `/` at its end and none in front.
///
/// Source: distribution, `registry/storage/driver/s3-aws/s3.go`, `s3Path`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    /// The prefix that a root folder makes; `""` and `"/"` make none.
    pub fn new(root: &str) -> Self {
        match root.trim_matches('/') {
            "" => Self::default(),
            root => Self(format!("{root}/")),
        }
    }

    /// The key of a path of this layout.
    pub fn key(&self, path: &str) -> String {
        format!("{}{path}", self.0)
    }

    /// The prefix itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A repository as the store knows it: docker.io's under their own names, as a registry:2 proxy
/// keeps them, those of any other registry under `<host>/<name>`.
#[derive(Debug, Clone)]
pub struct Repository {
    path: Arc<str>,
    /// Whether what is stored of it now perhaps only an account can see.
    shared: bool,
}

impl PartialEq for Repository {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path
    }
}

impl Eq for Repository {}

impl Hash for Repository {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.path.hash(state);
    }
}

impl Repository {
    /// The repository `name` of `registry`.
    pub fn new(registry: &RegistryHost, name: &Name) -> Self {
        if registry.is_docker_hub() {
            Self::at(name.shared())
        } else {
            Self::at(format!("{registry}/{name}").into())
        }
    }

    /// A repository that is hosted here.
    pub fn hosted(name: &Name) -> Self {
        Self::at(name.shared())
    }

    fn at(path: Arc<str>) -> Self {
        Self {
            path,
            shared: false,
        }
    }

    /// The same repository, asked as an account whose private repositories are shared: whatever is
    /// stored of it is marked as such.
    #[must_use]
    pub fn as_shared(mut self) -> Self {
        self.shared = true;
        self
    }

    /// Whether what is stored of it now perhaps only an account can see.
    pub fn is_of_account(&self) -> bool {
        self.shared
    }

    /// A repository by the path of its folder below [`repositories`].
    pub fn from_path(path: String) -> Self {
        Self::at(path.into())
    }

    /// The path below [`repositories`].
    pub fn as_str(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

/// The folder of all repositories.
pub fn repositories() -> String {
    format!("{V2}/repositories")
}

/// The folder of one repository, and of those below it.
pub fn repository(repository: &Repository) -> String {
    format!("{V2}/repositories/{repository}")
}

/// The folder of the blobs of one algorithm whose digests begin with these two digits.
pub fn blobs_beginning(algorithm: Algorithm, digits: &str) -> String {
    format!("{}/{digits}", blobs(algorithm))
}

/// A blob's or manifest's bytes.
pub fn blob(digest: &Digest) -> String {
    let (algorithm, hex) = (digest.algorithm().as_str(), digest.hex());
    format!("{V2}/blobs/{algorithm}/{}/{hex}/data", &hex[..2])
}

/// The folder of all blobs and manifests of one algorithm.
pub fn blobs(algorithm: Algorithm) -> String {
    format!("{V2}/blobs/{}", algorithm.as_str())
}

/// The folder of all blobs of one algorithm that are being downloaded.
pub fn fills(algorithm: Algorithm) -> String {
    format!("{OWN}/fills/{}", algorithm.as_str())
}

/// A blob that is being downloaded.
pub fn fill(digest: &Digest) -> String {
    format!(
        "{OWN}/fills/{}/{}",
        digest.algorithm().as_str(),
        digest.hex()
    )
}

/// How many bytes of a download are on the disk for certain: a number, left by an agent that stopped
/// in order.
pub fn synced(digest: &Digest) -> String {
    format!("{}.synced", fill(digest))
}

/// Says that a repository has a blob: the access check of every blob request.
pub fn layer_link(repository: &Repository, digest: &Digest) -> String {
    format!("{V2}/repositories/{repository}/_layers/{}", link(digest))
}

/// The folder of a repository's links to blobs of one algorithm.
pub fn layers(repository: &Repository, algorithm: Algorithm) -> String {
    format!(
        "{V2}/repositories/{repository}/_layers/{}",
        algorithm.as_str()
    )
}

/// What an upstream last said refers to a manifest: a JSON list of descriptors.
pub fn referrers(repository: &Repository, digest: &Digest) -> String {
    // No component of a repository's name can be `_of`.
    let folder = referrers_of(repository, digest.algorithm());
    format!("{folder}/{}", digest.hex())
}

/// The folder of what is kept of the referrers of a repository's manifests of one algorithm.
pub fn referrers_of(repository: &Repository, algorithm: Algorithm) -> String {
    format!("{REFERRERS}/{repository}/_of/{}", algorithm.as_str())
}

/// The folder of what refers to a manifest of a repository, as a bucket keeps it.
pub fn referrers_to(repository: &Repository, subject: &Digest) -> String {
    let (algorithm, hex) = (subject.algorithm().as_str(), subject.hex());
    format!("{V2}/repositories/{repository}/_referrers/{algorithm}/{hex}")
}

/// The descriptor of one manifest that refers to another, as a bucket keeps it: a key for each, so
/// that two that are pushed at the same time don't take away one another's.
pub fn referrer_to(repository: &Repository, subject: &Digest, referrer: &Digest) -> String {
    let (algorithm, hex) = (referrer.algorithm().as_str(), referrer.hex());
    format!("{}/{algorithm}/{hex}", referrers_to(repository, subject))
}

/// One of [`PROBES`].
pub fn probe(random: u64) -> String {
    format!("{PROBES}/{random:016x}")
}

/// The name of the folder that a repository with manifests has.
pub const MANIFESTS: &str = "_manifests";

/// The name of the folder that a repository with links to blobs has.
pub const LAYERS: &str = "_layers";

/// The folder of a blob of a bucket, with a `/` at its end: of its bytes, and of what says that they
/// were used again, or are being removed.
pub fn blob_folder(digest: &Digest) -> String {
    let (algorithm, hex) = (digest.algorithm().as_str(), digest.hex());
    format!("{V2}/blobs/{algorithm}/{}/{hex}/", &hex[..2])
}

/// Says that a blob of a bucket was used again, which its own time does not.
pub fn used(digest: &Digest) -> String {
    format!("{}{USED}", blob_folder(digest))
}

/// What begins the name of a key that says that a `gc` is removing something from its folder.
pub const COLLECTING: &str = "collecting-";
/// The name of [`used`].
pub const USED: &str = "used";

/// Says that a blob of a bucket is being removed, by the `gc` with this name.
pub fn collecting_blob(digest: &Digest, by: u64) -> String {
    format!("{}{COLLECTING}{by:016x}", blob_folder(digest))
}

/// What the keys begin with that say that links of a repository of a bucket are being removed.
pub fn collecting(repository: &Repository) -> String {
    format!("{}/{COLLECTING}", all_layers(repository))
}

/// The folder of all that is known of a tag.
pub fn tag(repository: &Repository, tag: &Tag) -> String {
    format!("{}/{tag}", tags(repository))
}

/// Says that everybody could see a repository when its upstream was last asked.
pub fn public(repository: &Repository) -> String {
    // No component of a repository's name can be `_proved`.
    format!("{PUBLIC}/{repository}/_proved")
}

/// Says that something was kept of a repository that perhaps only an account could see, and that
/// nobody has been seen to see it since.
pub fn shared(repository: &Repository) -> String {
    // No component of a repository's name can be `_kept`.
    format!("{SHARED}/{repository}/_kept/unproved")
}

/// The folder of a repository's manifests of one algorithm.
pub fn revisions(repository: &Repository, algorithm: Algorithm) -> String {
    let algorithm = algorithm.as_str();
    format!("{V2}/repositories/{repository}/_manifests/revisions/{algorithm}")
}

/// The folder of all of a repository's manifests.
pub fn all_revisions(repository: &Repository) -> String {
    format!("{V2}/repositories/{repository}/_manifests/revisions")
}

/// Says that a repository has a manifest.
pub fn revision_link(repository: &Repository, digest: &Digest) -> String {
    format!(
        "{V2}/repositories/{repository}/_manifests/revisions/{}",
        link(digest)
    )
}

/// The folder of a repository's tags.
pub fn tags(repository: &Repository) -> String {
    format!("{V2}/repositories/{repository}/_manifests/tags")
}

/// Says which manifest a tag is. Its time of modification is when the upstream last confirmed it.
pub fn tag_link(repository: &Repository, tag: &Tag) -> String {
    format!("{}/{tag}/current/link", tags(repository))
}

/// The folder of the manifests of one algorithm that a tag is or was.
pub fn tag_index(repository: &Repository, tag: &Tag, algorithm: Algorithm) -> String {
    format!("{}/{tag}/index/{}", tags(repository), algorithm.as_str())
}

/// Says that a tag was a manifest once.
pub fn tag_index_link(repository: &Repository, tag: &Tag, digest: &Digest) -> String {
    format!("{}/{tag}/index/{}", tags(repository), link(digest))
}

/// The folder of a repository's links to blobs.
pub fn all_layers(repository: &Repository) -> String {
    format!("{V2}/repositories/{repository}/_layers")
}

/// The folder of a repository's manifests and tags.
pub fn manifests(repository: &Repository) -> String {
    format!("{V2}/repositories/{repository}/_manifests")
}

/// The folder of the uploads to a repository.
pub fn uploads(repository: &Repository) -> String {
    format!("{V2}/repositories/{repository}/_uploads")
}

/// The folder of an upload.
pub fn upload(repository: &Repository, id: &UploadId) -> String {
    format!("{}/{id}", uploads(repository))
}

/// What has been uploaded.
pub fn upload_data(repository: &Repository, id: &UploadId) -> String {
    format!("{}/data", upload(repository, id))
}

/// When an upload began, by RFC 3339.
pub fn upload_started(repository: &Repository, id: &UploadId) -> String {
    format!("{}/startedat", upload(repository, id))
}

/// Says that what a repository has was pushed here.
pub fn own(repository: &Repository) -> String {
    // No component of a repository's name can be `_own`.
    format!("{HOSTED}/{repository}/_own/pushed")
}

/// Where what was cached of a repository is, since it is pushed here.
pub fn aside(repository: &Repository, seconds: u64) -> String {
    format!("{}/{seconds}", all_aside(repository))
}

/// The folder of all that was set aside of a repository, each by when: in seconds since 1970.
pub fn all_aside(repository: &Repository) -> String {
    format!("{ASIDE}/{repository}/_since")
}

/// A file that only who may write to the storage can make.
pub fn proof(id: &UploadId) -> String {
    format!("{TEMPORARY}/proof-{id}")
}

/// The folder of the manifests, hashed by one algorithm, that are about another one.
pub fn subjects(repository: &Repository, subject: &Digest, algorithm: Algorithm) -> String {
    let (of, hex) = (subject.algorithm().as_str(), subject.hex());
    let algorithm = algorithm.as_str();
    format!("{OWN}/subjects/{repository}/_of/{of}/{hex}/{algorithm}")
}

/// Says that one manifest is about another.
pub fn subject(repository: &Repository, subject: &Digest, referrer: &Digest) -> String {
    let folder = subjects(repository, subject, referrer.algorithm());
    format!("{folder}/{}", referrer.hex())
}

fn link(digest: &Digest) -> String {
    format!("{}/{}/link", digest.algorithm().as_str(), digest.hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_distribution() {
        let hex = format!("ab{}", "0".repeat(62));
        let digest: Digest = format!("sha256:{hex}").parse().unwrap();
        let repository = Repository::new(
            &RegistryHost::docker_hub(),
            &"library/busybox".parse().unwrap(),
        );
        let tag = "1.36".parse().unwrap();
        let root = "docker/registry/v2/repositories/library/busybox";
        for (path, expected) in [
            (
                blob(&digest),
                format!("docker/registry/v2/blobs/sha256/ab/{hex}/data"),
            ),
            (
                layer_link(&repository, &digest),
                format!("{root}/_layers/sha256/{hex}/link"),
            ),
            (
                revision_link(&repository, &digest),
                format!("{root}/_manifests/revisions/sha256/{hex}/link"),
            ),
            (
                tag_link(&repository, &tag),
                format!("{root}/_manifests/tags/1.36/current/link"),
            ),
            (
                tag_index_link(&repository, &tag, &digest),
                format!("{root}/_manifests/tags/1.36/index/sha256/{hex}/link"),
            ),
        ] {
            assert_eq!(path, expected);
        }
    }

    #[test]
    fn no_key_begins_with_a_slash_whatever_the_root() {
        for (root, key) in [
            ("", "docker/registry/v2/x"),
            ("/", "docker/registry/v2/x"),
            ("/a/b/", "a/b/docker/registry/v2/x"),
            ("a//", "a/docker/registry/v2/x"),
        ] {
            assert_eq!(
                Prefix::new(root).key("docker/registry/v2/x"),
                key,
                "{root:?}"
            );
        }
    }

    #[test]
    fn only_docker_hubs_repositories_stand_without_their_registry() {
        let other = Repository::new(&"ghcr.io".parse().unwrap(), &"owner/app".parse().unwrap());
        assert_eq!(other.as_str(), "ghcr.io/owner/app");
    }
}
