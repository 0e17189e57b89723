//! The clouds that `tests/cloud-tools` has installed: moto and ministack.

use std::path::PathBuf;
use std::process::Command;

/// The python that has them: `-m moto.server`, `-m ministack`.
pub fn python() -> PathBuf {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cloud-tools");
    let said = Command::new(script).arg("--path").output().expect("bash");
    let folder = String::from_utf8(said.stdout).expect("a path");
    let python = PathBuf::from(folder.trim()).join("bin/python");
    assert!(
        python.exists(),
        "{} is not there: tests/cloud-tools installs moto and ministack",
        python.display()
    );
    python
}
