//! Points at which a debug build kills itself when it is told to, so that a test can see what a
//! `kill -9` leaves behind at every stage of storing something.
//!
//! They exist only under `debug_assertions`. A released agent has neither the points nor the
//! variable: an environment that can kill it, at the worst of moments, is nothing for a host to
//! have, and what a request passes through does not look for one.

/// Kills this process, as `kill -9` does, where the environment says that it is to die here.
macro_rules! failpoint {
    ($point:ident) => {
        #[cfg(debug_assertions)]
        $crate::failpoint::Failpoint::$point.reach();
    };
}
pub(crate) use failpoint;

/// The environment variable that names the point to die at. It is no key of the configuration.
#[cfg(debug_assertions)]
pub const VARIABLE: &str = "REGISTRY_AGENT_FAILPOINT";

/// The points, in the order in which what is stored passes them.
#[cfg(debug_assertions)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failpoint {
    /// The file that a blob is downloaded into is open, and as long as it was left.
    FillOpened,
    /// The first bytes of a blob are appended.
    FillBegun,
    /// The last bytes of a blob are appended; nobody has checked them.
    FillUnchecked,
    /// A blob is right, and its readers may have all of it; the disk may not.
    FillVerified,
    /// A blob is on the disk, under the name that downloads have.
    FillSynced,
    /// A blob has its own name; its repository has no link to it.
    FillRenamed,
    /// A blob is linked; its download is still under way for those who follow it.
    FillLinked,
    /// A manifest is on the disk, under a temporary name.
    ManifestStaged,
    /// A manifest has its own name; its repository has no link to it.
    ManifestWritten,
    /// A repository has a manifest; its tag is not moved.
    RevisionLinked,
    /// A tag's index has a manifest; the tag is not moved.
    IndexLinked,
    /// The tag's new link is on the disk, under a temporary name.
    TagStaged,
    /// The tag is moved; nobody has an answer.
    TagMoved,
}

#[cfg(debug_assertions)]
impl Failpoint {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::FillOpened,
        Self::FillBegun,
        Self::FillUnchecked,
        Self::FillVerified,
        Self::FillSynced,
        Self::FillRenamed,
        Self::FillLinked,
        Self::ManifestStaged,
        Self::ManifestWritten,
        Self::RevisionLinked,
        Self::IndexLinked,
        Self::TagStaged,
        Self::TagMoved,
    ];

    /// What [`VARIABLE`] says to die there.
    pub fn name(self) -> &'static str {
        match self {
            Self::FillOpened => "fill-opened",
            Self::FillBegun => "fill-begun",
            Self::FillUnchecked => "fill-unchecked",
            Self::FillVerified => "fill-verified",
            Self::FillSynced => "fill-synced",
            Self::FillRenamed => "fill-renamed",
            Self::FillLinked => "fill-linked",
            Self::ManifestStaged => "manifest-staged",
            Self::ManifestWritten => "manifest-written",
            Self::RevisionLinked => "revision-linked",
            Self::IndexLinked => "index-linked",
            Self::TagStaged => "tag-staged",
            Self::TagMoved => "tag-moved",
        }
    }

    /// The process is at this point, and may end here.
    pub(crate) fn reach(self) {
        use nix::sys::signal::{Signal, kill};
        use nix::unistd::Pid;

        if std::env::var_os(VARIABLE).is_some_and(|named| named == self.name()) {
            // The kernel ends the process before this call returns.
            let _ = kill(Pid::this(), Signal::SIGKILL);
        }
    }
}
