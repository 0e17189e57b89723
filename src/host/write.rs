//! Changing the files of engines, and the journal.
//!
//! A file changes whole or not at all, whoever reads it and whenever the power goes: its new content
//! is written under a temporary name in the same folder, which nobody but root can open, gets its
//! owner, label and permissions, is brought to the disk, and only then takes the file's name;
//! the folder is brought to the disk after it. The temporary name follows from the file's own, so
//! that whatever a crash leaves is found and removed by the next start.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use super::facts::FileFacts;
use super::read;

/// The extended attribute of a file's label.
const SELINUX: &str = "security.selinux";
/// More than what is ever written: plans are made of files of [`read::LIMIT`] at most.
const LIMIT: u64 = 4 * read::LIMIT;
/// What root makes for everybody to read.
const FOLDER_MODE: u32 = 0o755;

/// Something could not be done with a file.
#[derive(Debug, thiserror::Error)]
#[error("can't {doing} {}: {source}{}", path.display(), hint(source))]
pub struct WriteError {
    /// What was being done: `write`, `rename`.
    pub doing: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// What came back.
    pub source: io::Error,
}

impl WriteError {
    fn new(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self {
            doing,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the file system takes no changes.
    pub fn is_read_only(&self) -> bool {
        self.source.kind() == io::ErrorKind::ReadOnlyFilesystem
    }
}

/// What a person can do about it, where the words of the kernel don't say.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            ". Is the system's image read only, or /etc not mounted for writing yet \
             (`findmnt --target /etc`)? Put the file into the image, or mount it for writing"
        }
        io::ErrorKind::PermissionDenied => {
            ". Root is needed, and the file must not be immutable (`lsattr`)"
        }
        io::ErrorKind::ResourceBusy => {
            ". Is it mounted by itself (`findmnt`), as into a container? Then change the file that \
             is mounted there, or unmount it"
        }
        io::ErrorKind::StorageFull => ". The disk is full (`df`)",
        _ => "",
    }
}

/// `path` of the host whose files are below `root`: the host itself where that is `/`.
pub fn under(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// What is at `path`, with the link followed that may be there.
pub fn read(path: &Path) -> Result<FileFacts, WriteError> {
    read_at_most(path, LIMIT)
}

/// The same, for a file of at most so many bytes.
pub fn read_at_most(path: &Path, limit: u64) -> Result<FileFacts, WriteError> {
    let file = OpenOptions::new()
        .read(true)
        // A fifo would never open.
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(path);
    let mut file = match file {
        Ok(file) => file,
        Err(e) if is_absence(&e) => return Ok(FileFacts::Absent),
        Err(e) => return Err(WriteError::new("open", path)(e)),
    };
    let metadata = file.metadata().map_err(WriteError::new("read", path))?;
    if !metadata.is_file() {
        return Ok(FileFacts::Unreadable("it is no file".to_owned()));
    }
    let mut bytes = Vec::new();
    let read = Read::by_ref(&mut file)
        .take(limit + 1)
        .read_to_end(&mut bytes);
    read.map_err(WriteError::new("read", path))?;
    if bytes.len() as u64 > limit {
        return Ok(FileFacts::Unreadable(format!(
            "it is larger than {limit} bytes"
        )));
    }
    let Ok(content) = String::from_utf8(bytes) else {
        return Ok(FileFacts::Unreadable("it is not UTF-8".to_owned()));
    };
    Ok(FileFacts::Text {
        content,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        selinux: label(&file),
        link_to: None,
    })
}

fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn label(file: &File) -> Option<String> {
    let mut buffer = [0; 1024];
    let length = rustix::fs::fgetxattr(file, SELINUX, &mut buffer[..]).ok()?;
    let label = std::str::from_utf8(buffer.get(..length)?).ok()?;
    Some(label.trim_end_matches('\0').to_owned())
}

/// Whether two facts tell of the same file: a label that one of them does not know, and the name
/// that led there, are no difference.
pub fn same(a: &FileFacts, b: &FileFacts) -> bool {
    let (mut a, mut b) = (a.clone(), b.clone());
    if let (
        FileFacts::Text {
            selinux, link_to, ..
        },
        FileFacts::Text {
            selinux: other_label,
            link_to: other_link,
            ..
        },
    ) = (&mut a, &mut b)
    {
        (*link_to, *other_link) = (None, None);
        if selinux.is_none() || other_label.is_none() {
            (*selinux, *other_label) = (None, None);
        }
    }
    a == b
}

/// The folders above `path` that are missing, the outermost first.
pub fn missing_folders(root: &Path, path: &Path) -> Vec<PathBuf> {
    let missing = path
        .ancestors()
        .skip(1)
        .take_while(|folder| !under(root, folder).exists());
    let mut missing: Vec<PathBuf> = missing.map(Path::to_owned).collect();
    missing.reverse();
    missing
}

/// Fails where nothing could be written at `path`: before anything else is changed.
pub fn check_writable(path: &Path) -> Result<(), WriteError> {
    let folder = path.ancestors().skip(1).find(|folder| folder.exists());
    let folder = folder.unwrap_or(Path::new("/"));
    access(folder, AccessFlags::W_OK | AccessFlags::X_OK)
        .map_err(|errno: Errno| WriteError::new("write in", folder)(errno.into()))
}

/// Makes one folder, if it is missing, and brings its name to the disk.
pub fn make_folder(path: &Path) -> Result<(), WriteError> {
    match DirBuilder::new().mode(FOLDER_MODE).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(e) => return Err(WriteError::new("make the folder", path)(e)),
    }
    // Whatever umask this was started with.
    fs::set_permissions(path, Permissions::from_mode(FOLDER_MODE))
        .map_err(WriteError::new("set the permissions of", path))?;
    sync_folder_of(path)
}

/// Removes a folder that was made, unless somebody keeps something in it. Says whether it is gone.
pub fn remove_folder(path: &Path) -> Result<bool, WriteError> {
    match fs::remove_dir(path) {
        Ok(()) => sync_folder_of(path).map(|()| true),
        Err(e) if is_absence(&e) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(false),
        Err(e) => Err(WriteError::new("remove the folder", path)(e)),
    }
}

/// A file's new content, on the disk under a temporary name. It is removed if it is not published.
#[derive(Debug)]
#[must_use = "it is removed if it is not published"]
pub struct Staged {
    temporary: PathBuf,
    path: PathBuf,
    published: bool,
}

impl Staged {
    /// Brings what `path` is to be to the disk, beside it.
    pub fn new(path: &Path, facts: &FileFacts) -> Result<Self, WriteError> {
        let FileFacts::Text {
            content,
            mode,
            uid,
            gid,
            selinux,
            link_to: _,
        } = facts
        else {
            let why = io::Error::other(format!("it is to hold a text, not {facts:?}"));
            return Err(WriteError::new("write", path)(why));
        };
        let temporary = temporary(path);
        remove_leftover(path)?;
        let failed = |doing| WriteError::new(doing, &temporary);
        let mut file = create(&temporary).map_err(failed("write"))?;
        let staged = Self {
            temporary: temporary.clone(),
            path: path.to_owned(),
            published: false,
        };
        file.write_all(content.as_bytes())
            .map_err(failed("write"))?;
        let metadata = file.metadata().map_err(failed("read"))?;
        if (metadata.uid(), metadata.gid()) != (*uid, *gid) {
            fchown(&file, Some(*uid), Some(*gid)).map_err(failed("set the owner of"))?;
        }
        if let Some(wanted) = selinux
            && label(&file).as_ref() != Some(wanted)
        {
            let flags = rustix::fs::XattrFlags::empty();
            match rustix::fs::fsetxattr(&file, SELINUX, wanted.as_bytes(), flags) {
                Err(errno) if !may_lack_label(errno, Path::new("/")) => {
                    return Err(failed("set the SELinux label of")(errno.into()));
                }
                Ok(()) | Err(_) => {}
            }
        }
        // After the owner: changing that takes set-user-ID bits away.
        file.set_permissions(Permissions::from_mode(*mode))
            .map_err(failed("set the permissions of"))?;
        file.sync_all().map_err(failed("sync"))?;
        Ok(staged)
    }

    /// Gives it its name.
    pub fn publish(mut self) -> Result<(), WriteError> {
        fs::rename(&self.temporary, &self.path).map_err(WriteError::new("replace", &self.path))?;
        self.published = true;
        sync_folder_of(&self.path)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.published {
            // The next start removes it as well.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// A new file that nobody else may open before it is whole, and has its own owner and label.
fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600).open(path)
}

/// Whether a file may go without the label that it should have, after this refusal. Without `SELinux`
/// the kernel lets only `CAP_SYS_ADMIN` set one, nobody looks at it, and a host that turns `SELinux` on
/// again labels every file anew; with it, also while it only warns, a wrong label is an error.
fn may_lack_label(refusal: rustix::io::Errno, root: &Path) -> bool {
    use rustix::io::Errno;

    let refused = matches!(refusal, Errno::PERM | Errno::ACCESS | Errno::NOTSUP);
    // selinux(8): it is mounted there where SELinux is enabled.
    refused && !under(root, Path::new("/sys/fs/selinux/enforce")).exists()
}

/// Makes `path` what the facts say, durably.
pub fn put(path: &Path, facts: &FileFacts) -> Result<(), WriteError> {
    match facts {
        FileFacts::Absent => remove(path),
        facts => Staged::new(path, facts)?.publish(),
    }
}

/// Removes a file, if it is there, and brings that to the disk.
pub fn remove(path: &Path) -> Result<(), WriteError> {
    match fs::remove_file(path) {
        Ok(()) => sync_folder_of(path),
        Err(e) if is_absence(&e) => Ok(()),
        Err(e) => Err(WriteError::new("remove", path)(e)),
    }
}

/// Removes what a crash has left of a file that was being written.
pub fn remove_leftover(path: &Path) -> Result<(), WriteError> {
    remove(&temporary(path))
}

/// Where a file is written before it has its name. No engine reads it: docker and containerd name
/// their files, podman reads `*.conf`, buildkitd `*.toml`.
fn temporary(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".registry-agent-new");
    path.with_file_name(name)
}

fn sync_folder_of(path: &Path) -> Result<(), WriteError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let folder_file = File::open(folder).map_err(WriteError::new("open", folder))?;
    folder_file
        .sync_all()
        .map_err(WriteError::new("sync", folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(content: &str, mode: u32, selinux: Option<&str>) -> FileFacts {
        FileFacts::Text {
            content: content.to_owned(),
            mode,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            selinux: selinux.map(str::to_owned),
            link_to: None,
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_file_has_its_content_and_permissions_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.json");
        for (content, mode) in [("{}\n", 0o640), ("{\"a\":1}", 0o4755), ("", 0o600)] {
            put(&path, &text(content, mode, None)).unwrap();
            assert!(same(&read(&path).unwrap(), &text(content, mode, None)));
            assert_eq!(names(folder.path()), ["daemon.json"]);
        }
        put(&path, &FileFacts::Absent).unwrap();
        assert_eq!(read(&path).unwrap(), FileFacts::Absent);
        put(&path, &FileFacts::Absent).unwrap();
    }

    #[test]
    fn what_is_staged_and_not_published_changes_nothing_and_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.json");
        put(&path, &text("old", 0o644, None)).unwrap();
        let staged = Staged::new(&path, &text("new", 0o644, None)).unwrap();
        assert_eq!(names(folder.path()).len(), 2);
        assert!(same(&read(&path).unwrap(), &text("old", 0o644, None)));
        drop(staged);
        assert_eq!(names(folder.path()), ["daemon.json"]);
    }

    #[test]
    fn what_is_staged_is_nobody_elses_to_open_until_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.json");
        let staged = create(&temporary(&path)).unwrap();
        assert_eq!(staged.metadata().unwrap().mode() & 0o7777, 0o600);
    }

    #[test]
    fn a_file_has_its_owner() {
        if !nix::unistd::getuid().is_root() {
            return; // Nobody else gives files away.
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.json");
        let mut theirs = text("{}", 0o640, None);
        if let FileFacts::Text { uid, gid, .. } = &mut theirs {
            (*uid, *gid) = (65_534, 7);
        }
        put(&path, &theirs).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (65_534, 7));
    }

    #[test]
    fn what_a_crash_left_is_in_nobodys_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.json");
        // What a killed process leaves: its file, and no destructor.
        std::mem::forget(Staged::new(&path, &text("half", 0o600, None)).unwrap());
        put(&path, &text("whole", 0o644, None)).unwrap();
        assert!(same(&read(&path).unwrap(), &text("whole", 0o644, None)));
        assert_eq!(names(folder.path()), ["daemon.json"]);
    }

    #[test]
    fn a_label_is_set_and_read_back() {
        if !nix::unistd::getuid().is_root() {
            return; // security.* is root's where no SELinux decides.
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.json");
        let label = "system_u:object_r:container_config_t:s0";
        put(&path, &text("{}", 0o644, Some(label))).unwrap();
        let FileFacts::Text { selinux, .. } = read(&path).unwrap() else {
            panic!("no text");
        };
        assert_eq!(selinux.as_deref(), Some(label));
    }

    #[test]
    fn a_label_may_be_missing_only_where_no_selinux_is() {
        use rustix::io::Errno;

        let root = tempfile::tempdir().unwrap();
        assert!(may_lack_label(Errno::PERM, root.path()));
        assert!(may_lack_label(Errno::NOTSUP, root.path()));
        assert!(!may_lack_label(Errno::NOSPC, root.path()));
        // The mount point alone is a kernel's that could and does not.
        let selinux = root.path().join("sys/fs/selinux");
        fs::create_dir_all(&selinux).unwrap();
        assert!(may_lack_label(Errno::PERM, root.path()));
        for mode in ["0", "1"] {
            put(&selinux.join("enforce"), &text(mode, 0o644, None)).unwrap();
            assert!(!may_lack_label(Errno::PERM, root.path()), "{mode}");
        }
    }

    #[test]
    fn folders_are_found_made_and_removed_unless_somebody_uses_them() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        let path = Path::new("/etc/docker/certs.d/hosts.toml");
        let missing = missing_folders(root.path(), path);
        let expected = ["/etc/docker", "/etc/docker/certs.d"].map(PathBuf::from);
        assert_eq!(missing, expected);
        for folder in &missing {
            make_folder(&under(root.path(), folder)).unwrap();
        }
        assert_eq!(missing_folders(root.path(), path), [] as [PathBuf; 0]);
        let outer = under(root.path(), &missing[0]);
        assert!(!remove_folder(&outer).unwrap(), "certs.d is in it");
        assert!(remove_folder(&under(root.path(), &missing[1])).unwrap());
        assert!(remove_folder(&outer).unwrap());
        assert!(!outer.exists());
    }

    #[test]
    fn what_is_no_text_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let said = read(folder.path()).unwrap();
        assert_eq!(said, FileFacts::Unreadable("it is no file".to_owned()));
    }
}
