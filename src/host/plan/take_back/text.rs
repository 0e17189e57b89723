//! Out of files that are lines.

use super::super::hosts_file;
use super::Ours;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// The authorities that are not ours, with what is said between them; `None` where there is none.
pub(super) fn certificate(ours: &Ours<'_>, now: &str) -> Option<String> {
    let theirs = certificates(ours.before());
    let mut made = certificates(ours.made());
    made.retain(|one| !theirs.contains(one));
    let mut left = now.to_owned();
    for one in certificates(now) {
        if made.contains(&one) {
            left = left
                .replacen(&format!("{one}\n"), "", 1)
                .replacen(&one, "", 1);
        }
    }
    (left.trim() == now.trim() || left.contains(BEGIN)).then_some(left)
}

/// Each, from its first line to its last.
fn certificates(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(from) = rest.find(BEGIN) {
        let Some(length) = rest[from..].find(END) else {
            break;
        };
        let end = from + length + END.len();
        found.push(rest[from..end].to_owned());
        rest = &rest[end..];
    }
    found
}

/// `/etc/hosts` without the line that is ours.
pub(super) fn hosts(ours: &Ours<'_>, now: &str) -> String {
    let lines = now.split_inclusive('\n');
    lines
        .filter(|line| !hosts_file::is_ours(line, &ours.names))
        .collect()
}
