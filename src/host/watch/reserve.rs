//! Room on the disk that is kept for the end.
//!
//! To take a mirror away, the journal has to be written first, and what is likeliest to fill the disk
//! is the mirror itself. So while the engines have a mirror, files are kept beside the journal that
//! are good for nothing but to be removed then.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

/// How many there are: where files have run out before bytes, each is one. A change writes one file
/// at a time beside those of the journal.
const COUNT: u8 = 4;
/// Of each, in bytes: the journal holds what the engines' files were before and are afterwards.
const SIZE: u32 = 512 * 1024;

fn files(folder: &Path) -> impl Iterator<Item = PathBuf> {
    (0..COUNT).map(move |number| folder.join(format!("reserve-{number}")))
}

/// Has the room be there.
pub(super) fn keep(folder: &Path) -> io::Result<()> {
    for file in files(folder) {
        let length = fs::metadata(&file).map(|it| it.len());
        if length.is_ok_and(|length| length == u64::from(SIZE)) {
            continue;
        }
        if let Err(error) = fill(&file) {
            // Half of one is in the way of others, and no use.
            let _ = fs::remove_file(&file);
            return Err(error);
        }
    }
    Ok(())
}

fn fill(file: &Path) -> io::Result<()> {
    // Bytes that a file system can't compress.
    let bytes: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
        .take(SIZE as usize)
        .collect();
    // What is there of one was not filled.
    let _ = fs::remove_file(file);
    let mut file = File::create_new(file)?;
    file.write_all(&bytes)?;
    file.sync_all()
}

/// Gives the room up where there is no other.
pub(super) fn give_up_if_needed(folder: &Path) {
    if !is_short(folder) {
        return;
    }
    let mut given_up = false;
    for file in files(folder) {
        given_up |= fs::remove_file(file).is_ok();
    }
    if given_up {
        let folder = folder.display();
        tracing::warn!("the disk of {folder} is full: what was kept for this is given up");
    }
}

fn is_short(folder: &Path) -> bool {
    // What can't be asked is not known to be short, and the next write says what is the matter.
    let Ok(disk) = statvfs(folder) else {
        return false;
    };
    let bytes = disk.blocks_available().saturating_mul(disk.fragment_size());
    // A file system without a number of files says 0 of 0.
    let no_files = disk.files() > 0 && disk.files_available() < u64::from(COUNT);
    bytes < u64::from(SIZE) * u64::from(COUNT) || no_files
}
