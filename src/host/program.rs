//! Running an engine's own program: no shell, a deadline, and no more of its output than is read.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use super::read::below;

/// Where a host's programs are, whatever our own environment says.
const FOLDERS: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];
/// Of either output. What is beyond is read and dropped: a full pipe would stop the program.
const OUTPUT: u64 = 16 * 1024;

/// What a program has said and how it ended.
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

/// Runs it to its end, or kills it at the deadline.
pub(super) async fn run<A: AsRef<OsStr>>(
    program: &Path,
    arguments: impl IntoIterator<Item = A>,
    deadline: Duration,
) -> io::Result<Ended> {
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", FOLDERS.join(":"))
        .env("LC_ALL", "C.UTF-8")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let ended = async {
        let (status, stdout, stderr) = tokio::join!(child.wait(), text(stdout), text(stderr));
        Ok(Ended {
            status: status?,
            stdout: stdout?,
            stderr: stderr?,
        })
    };
    match tokio::time::timeout(deadline, ended).await {
        Ok(ended) => ended,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!(
                "it had not ended after {}s, and was killed",
                deadline.as_secs()
            ),
        )),
    }
}

async fn text(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<String> {
    let Some(mut pipe) = pipe else {
        return Ok(String::new());
    };
    let mut bytes = Vec::new();
    (&mut pipe).take(OUTPUT).read_to_end(&mut bytes).await?;
    tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// Where the host has the program of this name.
pub(super) fn find(root: &Path, name: &str) -> Option<PathBuf> {
    let mut paths = FOLDERS.iter().map(|folder| Path::new(folder).join(name));
    paths.find(|path| below(root, path).is_file())
}

/// The version that the program at this path says by `--version`; nothing where it says none.
pub(super) async fn version(root: &Path, program: &Path) -> Option<String> {
    const DEADLINE: Duration = Duration::from_secs(5);
    let ended = run(&below(root, program), ["--version"], DEADLINE)
        .await
        .ok()?;
    ended.status.success().then_some(())?;
    version_in(&ended.stdout)
}

/// The first word that looks like one:
/// `Docker version 20.10.24+dfsg1, build 297e128`,
/// `containerd github.com/containerd/containerd/v2 v2.0.0 207ad711`,
/// `buildah version 1.28.2 (image-spec 1.0.2-dev, runtime-spec 1.0.2-dev)`.
fn version_in(text: &str) -> Option<String> {
    text.split_whitespace()
        .map(|word| word.trim_end_matches(',').trim_start_matches('v'))
        .find(|word| word.starts_with(|letter: char| letter.is_ascii_digit()))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_the_engines_say() {
        for (text, version) in [
            (
                "Docker version 20.10.24+dfsg1, build 297e128",
                "20.10.24+dfsg1",
            ),
            ("Docker version 1.13.1, build 7d71120/1.13.1", "1.13.1"),
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1",
                "1.6.20~ds1",
            ),
            (
                "containerd github.com/containerd/containerd/v2 v2.0.0 207ad711",
                "2.0.0",
            ),
            ("podman version 4.3.1", "4.3.1"),
            (
                "buildah version 1.28.2 (image-spec 1.0.2-dev, runtime-spec 1.0.2-dev)",
                "1.28.2",
            ),
        ] {
            assert_eq!(version_in(text).as_deref(), Some(version), "{text}");
        }
        assert_eq!(version_in("unknown flag: --version"), None);
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_killed() {
        let wait = run(Path::new("/bin/sleep"), ["600"], Duration::from_millis(20));
        let error = wait.await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_program_that_says_too_much_is_heard_to_its_end() {
        let ended = run(
            Path::new("/usr/bin/head"),
            ["-c", "1000000", "/dev/zero"],
            Duration::from_mins(1),
        );
        let ended = ended.await.unwrap();
        assert!(ended.status.success());
        assert_eq!(ended.stdout.len() as u64, OUTPUT);
    }
}
