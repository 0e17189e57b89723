//! A plan as people read it: a diff for each file, the unit jobs, and what is not done.

use std::fmt::{self, Write as _};

use similar::{ChangeTag, TextDiff};

use super::{Check, FileChange, Plan, PlanError, Verb};
use crate::host::facts::FileFacts;
use crate::host::write;

/// A plan to be printed.
#[derive(Debug, Clone, Copy)]
pub struct Printed<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// Whether for a terminal that shows colours.
    pub coloured: bool,
}

impl fmt::Display for Printed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = self.plan;
        for change in &plan.files {
            let verb = match (&change.before, &change.after) {
                (before, after) if write::same(before, after) => "keep",
                (FileFacts::Absent, _) => "create",
                (_, FileFacts::Absent) => "remove",
                _ => "change",
            };
            writeln!(f, "{verb} {}: {}", change.path.display(), change.why)?;
            if let Some(Check::DockerdValidate { command }) = &change.check {
                writeln!(f, "  checked first by `{}`", command.join(" "))?;
            }
            if !write::same(&change.before, &change.after) {
                f.write_str(&diff(change, self.coloured))?;
            }
        }
        for action in &plan.actions {
            let verb = match action.verb {
                Verb::Reload => "reload",
                Verb::Restart => "restart",
            };
            writeln!(f, "{verb} {}: {}", action.unit, action.why)?;
        }
        for refusal in &plan.refusals {
            writeln!(f, "refused {}: {}", refusal.subject, refusal.why)?;
            for (index, line) in refusal.remedy.lines().enumerate() {
                let lead = if index == 0 { "  to do: " } else { "    " };
                writeln!(f, "{lead}{line}")?;
            }
        }
        for error in &plan.errors {
            writeln!(f, "error: {error}")?;
        }
        for note in &plan.notes {
            writeln!(f, "note: {note}")?;
        }
        if plan.is_empty() {
            let refused = !plan.refusals.is_empty() || !plan.errors.is_empty();
            let nothing = match (refused, plan.forgotten.is_empty()) {
                (true, _) => "nothing is changed",
                (false, true) => "nothing to do",
                (false, false) => "no file is left to change",
            };
            writeln!(f, "{nothing}")?;
        }
        Ok(())
    }
}

/// The unified diff of a file.
fn diff(change: &FileChange, coloured: bool) -> String {
    let (before, after) = (text(&change.before), text(&change.after));
    let path = change.path.display().to_string();
    let old = match change.before {
        FileFacts::Absent => "/dev/null",
        _ => path.as_str(),
    };
    let (bold, red, green, cyan, reset) = if coloured {
        (
            "\u{1b}[1m",
            "\u{1b}[31m",
            "\u{1b}[32m",
            "\u{1b}[36m",
            "\u{1b}[0m",
        )
    } else {
        ("", "", "", "", "")
    };
    let new = match change.after {
        FileFacts::Absent => "/dev/null",
        _ => path.as_str(),
    };
    let mut out = format!("{bold}--- {old}{reset}\n{bold}+++ {new}{reset}\n");
    let lines = TextDiff::from_lines(before, after);
    for hunk in lines.unified_diff().context_radius(3).iter_hunks() {
        let _ = writeln!(out, "{cyan}{}{reset}", hunk.header());
        for line in hunk.iter_changes() {
            let (sign, colour) = match line.tag() {
                ChangeTag::Delete => ('-', red),
                ChangeTag::Insert => ('+', green),
                ChangeTag::Equal => (' ', ""),
            };
            let reset = if colour.is_empty() { "" } else { reset };
            // A carriage return would hide the line on a terminal.
            let shown = line.value().trim_end_matches('\n').replace('\r', "^M");
            let _ = writeln!(out, "{colour}{sign}{shown}{reset}");
            if line.missing_newline() {
                out.push_str("\\ No newline at end of file\n");
            }
        }
    }
    out
}

fn text(facts: &FileFacts) -> &str {
    match facts {
        FileFacts::Text { content, .. } => content,
        FileFacts::Absent | FileFacts::Unreadable(_) => "",
    }
}

/// What would be done with an engine that is only reported on.
pub(super) fn reported(engine: &str, part: Result<Plan, PlanError>) -> Vec<String> {
    let said = |error: PlanError| format!("{engine} is only reported on: {error}");
    let mut plan = match part {
        Ok(plan) => plan,
        Err(error) => return vec![said(error)],
    };
    let errors = std::mem::take(&mut plan.errors);
    let mut notes: Vec<String> = errors.into_iter().map(said).collect();
    if !plan.is_empty() || !plan.refusals.is_empty() {
        let bare = Plan {
            notes: Vec::new(),
            ..plan.clone()
        };
        let printed = Printed {
            plan: &bare,
            coloured: false,
        }
        .to_string();
        let printed: Vec<String> = printed.lines().map(|line| format!("\n  {line}")).collect();
        notes.push(format!(
            "{engine} is only reported on (`host.{engine}.manage: report`); this would be done:{}",
            printed.concat()
        ));
    }
    notes.extend(plan.notes);
    notes
}
