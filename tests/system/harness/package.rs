//! Packages of the binary under test, built as the released ones are.

use std::path::Path;

use super::command;
use super::host::Host;
use super::scratch::Scratch;

const BINARY: &str = env!("CARGO_BIN_EXE_registry-agent");

/// Where they are built.
pub struct Packages {
    scratch: Scratch,
}

impl Packages {
    /// None yet.
    pub fn new() -> Self {
        Self {
            scratch: Scratch::new("packages"),
        }
    }

    /// Builds the .deb of a version, and puts it into a folder of a host. Returns where it is there.
    #[track_caller]
    pub fn put(&self, version: &str, host: &Host, folder: &str) -> String {
        let output = self.scratch.folder(version);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/build");
        let arguments = [
            script,
            "--fast",
            "--binary",
            BINARY,
            "--version",
            version,
            "--output",
            &output,
            "deb",
        ];
        let printed = command::run(&arguments);
        let built = Path::new(printed.trim());
        let name = built.file_name().expect("a package has a name");
        let there = format!("{folder}/{}", name.display());
        host.copy(built, &there);
        there
    }
}
