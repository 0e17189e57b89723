//! Files that hold a password and nothing else.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A password file that is longer is something else: a log, a disk.
const LIMIT: u64 = 64 * 1024;

/// A password from a file, without the final newline, or what is wrong with the file.
pub(super) fn read(file: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    File::open(file)
        .and_then(|file| file.take(LIMIT + 1).read_to_end(&mut bytes))
        .map_err(|error| format!("can't be read: {error}"))?;
    if bytes.len() as u64 > LIMIT {
        return Err(format!("is over {LIMIT} bytes long: not a password"));
    }
    let text = String::from_utf8(bytes).map_err(|_| "is not UTF-8 text")?;
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);
    if password.is_empty() {
        Err("is empty".to_owned())
    } else {
        Ok(password.to_owned())
    }
}
