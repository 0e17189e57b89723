//! One process at a time changes a host.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The lock's file in the state folder.
const NAME: &str = "lock";
/// How often whoever has the lock is looked for, and the time between.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);
/// What is read of the file, in bytes.
const LIMIT: u64 = 256;

/// The host is this process's to change, until it is dropped or the process ends, however it ends:
/// the kernel lets go of the lock (flock(2)).
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// The lock was not to be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it.
    #[error(
        "another registry-agent is changing this host: {holder}. If it is \
         registry-agent-host.service, it applies by itself: `systemctl reload \
         registry-agent-host` has it look now, `systemctl stop registry-agent-host` has it \
         unwire the engines and let go"
    )]
    Held {
        /// Its process id and what it does.
        holder: String,
    },
    /// The file could not be locked.
    #[error("can't lock {}: {source}", path.display())]
    Io {
        /// The lock's file.
        path: PathBuf,
        /// What came back.
        source: io::Error,
    },
}

impl Lock {
    /// Takes the lock in a state folder that is there, for a verb that whoever else wants it is
    /// told of. It does not wait.
    pub fn take(folder: &Path, verb: &str) -> Result<Self, LockError> {
        let path = folder.join(NAME);
        let failed = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o644)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let holder = holder(&mut file).map_err(failed)?;
                return Err(LockError::Held { holder });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let holder = format!("process {}, `registry-agent {verb}`\n", std::process::id());
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(holder.as_bytes()))
            .map_err(failed)?;
        Ok(Self { _file: file })
    }
}

/// Who has the lock. Whoever takes it names itself a moment later: until then, the file names nobody
/// or one who is gone.
#[expect(
    clippy::disallowed_methods,
    reason = "a fifth of a second at most, in a process that has nothing else to do"
)]
fn holder(file: &mut File) -> io::Result<String> {
    for _ in 0..ATTEMPTS {
        let mut holder = String::new();
        file.rewind()?;
        // It is a line; what else somebody may have put there is not read.
        Read::by_ref(file).take(LIMIT).read_to_string(&mut holder)?;
        let holder = holder.trim();
        let id = holder
            .strip_prefix("process ")
            .and_then(|rest| rest.split(',').next());
        if id.is_some_and(|id| Path::new("/proc").join(id).exists()) {
            return Ok(holder.to_owned());
        }
        std::thread::sleep(PAUSE);
    }
    Ok("it has not said which process it is".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_told_of_a_holder_that_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(NAME);
        drop(Lock::take(folder.path(), "host").unwrap());
        let mut held = OpenOptions::new().write(true).open(&path).unwrap();
        // No process has the id 0.
        held.write_all(b"process 0, gone").unwrap();
        held.lock().unwrap();
        let refused = Lock::take(folder.path(), "apply").unwrap_err().to_string();
        assert!(!refused.contains("process 0"), "{refused}");
        assert!(refused.contains("has not said"), "{refused}");
    }

    #[test]
    fn the_second_is_told_who_is_the_first_until_that_one_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::take(folder.path(), "host").unwrap();
        let refused = Lock::take(folder.path(), "apply").unwrap_err().to_string();
        let pid = format!("process {}, `registry-agent host`", std::process::id());
        assert!(refused.contains(&pid), "{refused}");
        drop(first);
        let second = Lock::take(folder.path(), "apply").unwrap();
        let refused = Lock::take(folder.path(), "host").unwrap_err().to_string();
        assert!(refused.contains("`registry-agent apply`"), "{refused}");
        drop(second);
    }
}
