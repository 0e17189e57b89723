//! Points at which a debug build kills itself when it is told to, so that a test can see what a
//! `kill -9` leaves behind at every stage of storing something, or of changing the host.
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

/// The environment variable that names the point to die at, and, for another than the first time
/// that it is reached, which: `apply-file-written:2`. It is no key of the configuration.
#[cfg(debug_assertions)]
pub const VARIABLE: &str = "REGISTRY_AGENT_FAILPOINT";

/// The points, in the order in which what is stored, or what is changed on the host, passes them.
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
    /// A blob is in the shared bucket; nothing there links to it.
    SharedSent,
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
    /// The first bytes of an upload are appended.
    UploadBegun,
    /// An upload is right, and on the disk under the name that uploads have.
    UploadSynced,
    /// An upload has a blob's name; its repository has no link to it.
    UploadRenamed,
    /// An upload is linked; nobody has an answer.
    UploadLinked,
    /// A repository has lost its link to a blob that nobody needs; the blob is here.
    CollectUnlinked,
    /// A blob that nobody needs is gone.
    CollectSwept,
    /// A change of the host is found right; nothing is written.
    ApplyChecked,
    /// The journal has what was there before.
    ApplyJournaled,
    /// The folders are made.
    ApplyFoldersMade,
    /// All new files are on the disk, under temporary names.
    ApplyStaged,
    /// A file has its name.
    ApplyFileWritten,
    /// The journal says that daemons are told.
    ApplyActing,
    /// docker has the mirrors that its file does not name any more; the file still names them.
    ApplyBridged,
    /// A job has ended well.
    ApplyJobDone,
    /// The daemons have what they should have; nobody knows.
    ApplyProved,
    /// The journal says that it is proved.
    ApplyRecorded,
    /// What was before is kept for a rollback; the journal is still open.
    ApplyKept,
    /// A file is what it was.
    UndoFileWritten,
    /// The files are what they were.
    UndoFilesWritten,
    /// A daemon was told.
    UndoJobDone,
    /// All is what it was; the journal is still open.
    UndoProved,
}

#[cfg(debug_assertions)]
impl Failpoint {
    /// Those of a change of the host, and of taking it back.
    pub const HOST: [Self; 15] = [
        Self::ApplyChecked,
        Self::ApplyJournaled,
        Self::ApplyFoldersMade,
        Self::ApplyStaged,
        Self::ApplyFileWritten,
        Self::ApplyActing,
        Self::ApplyBridged,
        Self::ApplyJobDone,
        Self::ApplyProved,
        Self::ApplyRecorded,
        Self::ApplyKept,
        Self::UndoFileWritten,
        Self::UndoFilesWritten,
        Self::UndoJobDone,
        Self::UndoProved,
    ];

    /// Those of taking a blob from a client.
    pub const UPLOAD: [Self; 4] = [
        Self::UploadBegun,
        Self::UploadSynced,
        Self::UploadRenamed,
        Self::UploadLinked,
    ];

    /// Those of storing something.
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
            Self::SharedSent => "shared-sent",
            Self::ManifestStaged => "manifest-staged",
            Self::ManifestWritten => "manifest-written",
            Self::RevisionLinked => "revision-linked",
            Self::IndexLinked => "index-linked",
            Self::TagStaged => "tag-staged",
            Self::TagMoved => "tag-moved",
            Self::UploadBegun => "upload-begun",
            Self::UploadSynced => "upload-synced",
            Self::UploadRenamed => "upload-renamed",
            Self::UploadLinked => "upload-linked",
            Self::CollectUnlinked => "collect-unlinked",
            Self::CollectSwept => "collect-swept",
            Self::ApplyChecked => "apply-checked",
            Self::ApplyJournaled => "apply-journaled",
            Self::ApplyFoldersMade => "apply-folders-made",
            Self::ApplyStaged => "apply-staged",
            Self::ApplyFileWritten => "apply-file-written",
            Self::ApplyActing => "apply-acting",
            Self::ApplyBridged => "apply-bridged",
            Self::ApplyJobDone => "apply-job-done",
            Self::ApplyProved => "apply-proved",
            Self::ApplyRecorded => "apply-recorded",
            Self::ApplyKept => "apply-kept",
            Self::UndoFileWritten => "undo-file-written",
            Self::UndoFilesWritten => "undo-files-written",
            Self::UndoJobDone => "undo-job-done",
            Self::UndoProved => "undo-proved",
        }
    }

    /// The process is at this point, and may end here.
    pub(crate) fn reach(self) {
        use std::sync::atomic::{AtomicU32, Ordering};

        use nix::sys::signal::{Signal, kill};
        use nix::unistd::Pid;

        static PASSED: AtomicU32 = AtomicU32::new(0);

        let Ok(named) = std::env::var(VARIABLE) else {
            return;
        };
        let (name, time) = named.split_once(':').unwrap_or((&named, "1"));
        if name != self.name() {
            return;
        }
        let passed = PASSED.fetch_add(1, Ordering::Relaxed) + 1;
        if time.parse() == Ok(passed) {
            // The kernel ends the process before this call returns.
            let _ = kill(Pid::this(), Signal::SIGKILL);
        }
    }
}
