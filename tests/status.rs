//! What is printed for people: in colours on a terminal, and with what to do when nobody answers.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::pty::openpty;

const RED: &str = "\u{1b}[31m";
const GREEN: &str = "\u{1b}[32m";
const RESET: &str = "\u{1b}[0m";

fn case() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plan/config-file")
}

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_registry-agent"));
    command
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    command
}

fn plan() -> Command {
    let mut command = command();
    command.arg("plan");
    command.arg("--facts").arg(case().join("facts.json"));
    command.arg("--config").arg(case().join("settings.yaml"));
    command
}

/// What a command shows on a terminal, with a terminal's line ends taken away.
fn on_a_terminal(mut command: Command) -> String {
    let terminal = openpty(None, None).unwrap();
    let mut child = command.stdout(terminal.slave).spawn().unwrap();
    // It has the other end, and the terminal ends with the last process that has.
    drop(command);
    let mut shown = Vec::new();
    let mut ours = File::from(terminal.master);
    loop {
        let mut some = [0; 4096];
        match ours.read(&mut some) {
            Ok(0) => break,
            Ok(length) => shown.extend_from_slice(&some[..length]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // EIO, at its end.
            Err(_) => break,
        }
    }
    child.wait().unwrap();
    String::from_utf8(shown).unwrap().replace("\r\n", "\n")
}

/// The same in a file.
fn in_a_pipe(mut command: Command) -> String {
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

#[test]
fn a_plan_has_colours_on_a_terminal_and_nowhere_else() {
    let plain = in_a_pipe(plan());
    assert!(
        plain.contains("\n+    \"registry-mirrors\"") && !plain.contains('\u{1b}'),
        "{plain}"
    );
    let shown = on_a_terminal(plan());
    for line in [
        format!("\n{RED}-    \"data-root\": \"/srv/docker\"{RESET}\n"),
        format!("\n{GREEN}+    \"data-root\": \"/srv/docker\",{RESET}\n"),
        "\n\u{1b}[1m--- /srv/docker/daemon.json\u{1b}[0m\n".to_owned(),
        "\n\u{1b}[36m@@ -1,3 +1,4 @@\u{1b}[0m\n".to_owned(),
    ] {
        assert!(shown.contains(&line), "no {line:?} in {shown:?}");
    }
    // Nothing but the colours differs.
    let bare = ["[31m", "[32m", "[36m", "[1m", "[0m"]
        .iter()
        .fold(shown, |text, code| {
            text.replace(&format!("\u{1b}{code}"), "")
        });
    assert_eq!(bare, plain);

    // no-color.org: an empty one says nothing.
    for (value, coloured) in [("1", false), ("", true)] {
        let mut with_variable = plan();
        with_variable.env("NO_COLOR", value);
        let shown = on_a_terminal(with_variable);
        assert_eq!(shown.contains('\u{1b}'), coloured, "NO_COLOR={value:?}");
    }
}

#[test]
fn facts_that_no_host_has_are_not_read_to_their_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("facts.json");
    File::create_new(&file)
        .unwrap()
        .set_len(32 * 1024 * 1024 + 1)
        .unwrap();
    // Endless, where nothing bounded it.
    for facts in [file.as_path(), Path::new("/dev/zero")] {
        let mut command = command();
        command.arg("plan").arg("--facts").arg(facts);
        command.arg("--config").arg(case().join("settings.yaml"));
        let output = command.stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        let name = facts.display().to_string();
        assert!(
            said.contains(&name) && said.contains("larger than 33554432 bytes"),
            "{said}"
        );
    }
}

#[test]
fn an_agent_that_does_not_answer_is_told_of_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.yaml");
    let socket = folder.path().join("admin.sock");
    let text = format!(
        "storage: {{ filesystem: {{ root: /x }} }}\nadmin: unix:{}\n",
        socket.display()
    );
    std::io::Write::write_all(&mut File::create_new(&config).unwrap(), text.as_bytes()).unwrap();
    let mut command = command();
    command.arg("status").arg("--config").arg(&config);
    let output = command.stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for words in [
        socket.to_str().unwrap(),
        "`systemctl status registry-agent`",
        "`journalctl --unit=registry-agent`",
        "--config",
    ] {
        assert!(said.contains(words), "no {words} in {said}");
    }
}
