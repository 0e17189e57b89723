//! Reading this host's files, below any root.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::OFlag;

use super::facts::FileFacts;

/// What an engine reads as its configuration is a few kilobytes.
pub const LIMIT: u64 = 1024 * 1024;
/// As many as Linux follows (`path_resolution(7)`).
const LINKS: usize = 40;

/// What there is at this path. Nothing is opened but a regular file, no more of it is read than
/// [`LIMIT`] bytes, and symbolic links are followed without leaving the root.
pub fn file(root: &Path, path: &Path) -> FileFacts {
    match read(root, path) {
        Ok(facts) => facts,
        Err(error) => FileFacts::Unreadable(error.to_string()),
    }
}

fn read(root: &Path, path: &Path) -> io::Result<FileFacts> {
    let is_link = match fs::symlink_metadata(resolve_folder(root, path)?) {
        Ok(metadata) => metadata.is_symlink(),
        // A folder that is missing, or a file where a folder would be.
        Err(e) if is_absence(&e) => return Ok(FileFacts::Absent),
        Err(e) => return Err(e),
    };
    let target = resolve(root, path)?;
    // Not to hang at a pipe, nor to be lost at a link that has been put there since.
    let options = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(options.bits())
        .open(below(root, &target));
    let file = match file {
        Ok(file) => file,
        Err(e) if is_absence(&e) && is_link => {
            return Ok(FileFacts::Unreadable(format!(
                "it is a symbolic link to {}, which does not exist",
                target.display()
            )));
        }
        Err(e) if is_absence(&e) => return Ok(FileFacts::Absent),
        Err(e) => return Err(e),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        let what = if metadata.is_dir() {
            "a folder"
        } else {
            "a device, pipe or socket"
        };
        return Ok(FileFacts::Unreadable(format!("it is {what}, not a file")));
    }
    let too_large = || FileFacts::Unreadable(format!("it is larger than {LIMIT} bytes"));
    if metadata.len() > LIMIT {
        return Ok(too_large());
    }
    let mut bytes = Vec::new();
    (&file).take(LIMIT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LIMIT {
        return Ok(too_large());
    }
    let Ok(content) = String::from_utf8(bytes) else {
        return Ok(FileFacts::Unreadable("it is not UTF-8".to_owned()));
    };
    Ok(FileFacts::Text {
        content,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        selinux: label(&file)?,
        link_to: is_link.then_some(target),
    })
}

fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// `security.selinux`, without the NUL at its end.
fn label(file: &File) -> io::Result<Option<String>> {
    use rustix::io::Errno;

    let mut label = vec![0; 4096];
    match rustix::fs::fgetxattr(file, "security.selinux", label.as_mut_slice()) {
        Ok(length) => {
            label.truncate(length);
            let label = String::from_utf8_lossy(&label);
            Ok(Some(label.trim_end_matches('\0').to_owned()))
        }
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The folder in which this file really is, also where neither exists yet; nothing where that can't
/// be said.
pub fn real_folder(root: &Path, path: &Path) -> Option<PathBuf> {
    let target = resolve(root, path).ok()?;
    target.parent().map(Path::to_owned)
}

/// The nearest folder of this one's, or itself, that is there.
pub fn existing<'a>(root: &Path, folder: &'a Path) -> Option<&'a Path> {
    folder
        .ancestors()
        .find(|folder| below(root, folder).is_dir())
}

/// The real folder of this file, where it, or the nearest one above it that is there, is on a file
/// system that this process sees read-only. Permissions are not looked at: they are root's anyway.
pub fn read_only_folder(root: &Path, path: &Path) -> Option<PathBuf> {
    use rustix::fs::StatVfsMountFlags;

    let folder = real_folder(root, path)?;
    let there = existing(root, &folder)?;
    let flags = rustix::fs::statvfs(below(root, there)).ok()?.f_flag;
    flags.contains(StatVfsMountFlags::RDONLY).then_some(folder)
}

/// The path below the root, absolute as it is.
pub fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Where the path really is, its last name aside: what that is decides whether it is a link.
fn resolve_folder(root: &Path, path: &Path) -> io::Result<PathBuf> {
    match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) => Ok(below(root, &resolve(root, folder)?.join(name))),
        _ => Ok(below(root, path)),
    }
}

/// Follows every symbolic link as the host would whose root this is; the answer is a path there.
/// What does not exist is no error, and has no links.
fn resolve(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let mut resolved = PathBuf::from("/");
    let mut rest: Vec<_> = names(path);
    let mut links = 0;
    while let Some(name) = rest.pop() {
        if name == ".." {
            resolved.pop();
            continue;
        }
        resolved.push(&name);
        match fs::read_link(below(root, &resolved)) {
            Ok(target) => {
                links += 1;
                if links > LINKS {
                    return Err(io::Error::other("its symbolic links lead in a circle"));
                }
                if target.is_absolute() {
                    resolved = PathBuf::from("/");
                } else {
                    resolved.pop();
                }
                rest.extend(names(&target));
            }
            // EINVAL: there it is, and no link.
            Err(e) if e.kind() == ErrorKind::InvalidInput || is_absence(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(resolved)
}

/// The names on the way, the last one first.
fn names(path: &Path) -> Vec<std::ffi::OsString> {
    let name = |component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsStr::new("..").to_owned()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().rev().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn host() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc/docker")).unwrap();
        root
    }

    fn put(root: &Path, path: &str, content: &[u8], mode: u32) {
        use std::io::Write;
        let path = below(root, Path::new(path));
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path);
        file.as_mut().unwrap().write_all(content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn why(facts: FileFacts) -> String {
        match facts {
            FileFacts::Unreadable(why) => why,
            facts => panic!("it could be read: {facts:?}"),
        }
    }

    #[test]
    fn a_file_is_read_with_its_mode() {
        let host = host();
        put(host.path(), "/etc/docker/daemon.json", b"{}\n", 0o640);
        match file(host.path(), Path::new("/etc/docker/daemon.json")) {
            FileFacts::Text {
                content,
                mode,
                uid,
                link_to,
                ..
            } => {
                assert_eq!((content.as_str(), mode), ("{}\n", 0o640));
                assert_eq!(uid, nix::unistd::getuid().as_raw());
                assert_eq!(link_to, None);
            }
            facts => panic!("{facts:?}"),
        }
    }

    #[test]
    fn a_missing_folder_is_a_missing_file() {
        let host = host();
        put(host.path(), "/etc/plain", b"", 0o644);
        for path in ["/etc/docker/x", "/none/x", "/etc/plain/x"] {
            assert_eq!(file(host.path(), Path::new(path)), FileFacts::Absent);
        }
    }

    #[test]
    fn a_link_leads_to_the_file_to_change_below_the_root() {
        let host = host();
        fs::create_dir_all(host.path().join("srv/real")).unwrap();
        put(host.path(), "/srv/real/daemon.json", b"{}", 0o600);
        // Absolute, through a folder that is a link itself, and upwards.
        symlink("/srv", host.path().join("data")).unwrap();
        let link = host.path().join("etc/docker/daemon.json");
        symlink("../../data/real/../real/daemon.json", link).unwrap();
        match file(host.path(), Path::new("/etc/docker/daemon.json")) {
            FileFacts::Text {
                content, link_to, ..
            } => {
                assert_eq!(content, "{}");
                assert_eq!(link_to, Some(PathBuf::from("/srv/real/daemon.json")));
            }
            facts => panic!("{facts:?}"),
        }
        // The file is none itself where only its folder is one.
        match file(host.path(), Path::new("/data/real/daemon.json")) {
            FileFacts::Text { link_to, .. } => assert_eq!(link_to, None),
            facts => panic!("{facts:?}"),
        }
    }

    #[test]
    fn a_link_never_leads_out_of_the_root() {
        let host = host();
        symlink("/etc/passwd", host.path().join("etc/docker/absolute")).unwrap();
        let up = "../../../../../../../../../etc/passwd";
        symlink(up, host.path().join("etc/docker/relative")).unwrap();
        for path in ["/etc/docker/absolute", "/etc/docker/relative"] {
            let why = why(file(host.path(), Path::new(path)));
            assert_eq!(
                why,
                "it is a symbolic link to /etc/passwd, which does not exist"
            );
        }
    }

    #[test]
    fn what_is_no_text_says_why() {
        let host = host();
        put(host.path(), "/etc/latin1", b"caf\xe9", 0o644);
        let much = vec![b' '; usize::try_from(LIMIT).unwrap() + 1];
        put(host.path(), "/etc/large", &much, 0o644);
        symlink("circle", host.path().join("etc/circle")).unwrap();
        let pipe = host.path().join("etc/pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (path, expected) in [
            ("/etc/latin1", "it is not UTF-8"),
            ("/etc/large", "it is larger than 1048576 bytes"),
            ("/etc/docker", "it is a folder, not a file"),
            ("/etc/pipe", "it is a device, pipe or socket, not a file"),
            ("/etc/circle", "its symbolic links lead in a circle"),
        ] {
            assert_eq!(why(file(host.path(), Path::new(path))), expected, "{path}");
        }
    }
}
