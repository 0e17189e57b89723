//! Commands, with their output where it is needed: in the failure.

use std::fmt;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;

/// A command that has ended.
#[derive(Debug)]
pub struct Finished {
    line: String,
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Whether it exited with 0.
    pub fn succeeded(&self) -> bool {
        self.code == Some(0)
    }

    /// Its standard output, or a panic with all of its output if it failed.
    #[track_caller]
    pub fn expect_success(self) -> String {
        assert!(self.succeeded(), "{self}");
        self.stdout
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => writeln!(f, "`{}` exited with {code}", self.line)?,
            None => writeln!(f, "`{}` was ended by a signal", self.line)?,
        }
        write!(f, "--- stdout\n{}--- stderr\n{}", self.stdout, self.stderr)
    }
}

/// Runs `argv` on this machine to its end, with `input` on its standard input.
#[track_caller]
pub fn finish(argv: &[&str], input: &[u8]) -> Finished {
    let line = argv.join(" ");
    let (program, arguments) = argv.split_first().expect("a command has a program");
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("starting `{line}`: {error}"));
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let output = thread::scope(|scope| {
        // A command may end without reading its input: its exit code says what that means.
        scope.spawn(move || stdin.write_all(input).ok());
        child.wait_with_output()
    })
    .unwrap_or_else(|error| panic!("waiting for `{line}`: {error}"));
    Finished {
        line,
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs `argv` on this machine and returns its standard output; panics if it fails.
#[track_caller]
pub fn run(argv: &[&str]) -> String {
    finish(argv, b"").expect_success()
}
