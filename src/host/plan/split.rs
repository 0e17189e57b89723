//! A plan in parts that have nothing to do with each other.

use std::path::Path;

use super::{FileChange, Plan};

impl Plan {
    /// The parts of this plan that can be done, and fail, each by itself: files are together where a
    /// unit reads them both. The last one has no file, and forgets those that need no change. What
    /// is only said (notes, refusals, errors) is in none of them.
    #[must_use]
    pub fn split(&self) -> Vec<Self> {
        let mut parts: Vec<Self> = Vec::new();
        for change in &self.files {
            let units: Vec<&str> = change.units.iter().map(String::as_str).collect();
            let part = part_of(&mut parts, &units);
            if self.forgotten.contains(&change.path) {
                part.forgotten.insert(change.path.clone());
            }
            part.files.push(change.clone());
        }
        for action in &self.actions {
            let part = part_of(&mut parts, &[&action.unit]);
            part.actions.push(action.clone());
        }
        for proof in &self.proofs {
            part_of(&mut parts, &[proof.unit()])
                .proofs
                .push(proof.clone());
        }
        let changed = |path: &Path| self.files.iter().any(|change| change.path == path);
        let unchanged = self
            .forgotten
            .iter()
            .filter(|path| !changed(path.as_path()));
        parts.push(Self {
            forgotten: unchanged.cloned().collect(),
            ..Self::default()
        });
        parts
    }

    fn has_to_do_with(&self, units: &[&str]) -> bool {
        let mut read = self.files.iter().flat_map(|FileChange { units, .. }| units);
        let mut told = self.readers();
        read.any(|unit| units.contains(&unit.as_str())) || told.any(|unit| units.contains(&unit))
    }
}

/// The part that these units are of; it joins those that they are of so far.
fn part_of<'a>(parts: &'a mut Vec<Plan>, units: &[&str]) -> &'a mut Plan {
    let (of, mut others): (Vec<Plan>, Vec<Plan>) = std::mem::take(parts)
        .into_iter()
        .partition(|part| part.has_to_do_with(units));
    let mut one = Plan::default();
    for part in of {
        one.files.extend(part.files);
        one.actions.extend(part.actions);
        one.proofs.extend(part.proofs);
        one.forgotten.extend(part.forgotten);
    }
    others.push(one);
    *parts = others;
    let last = parts.len() - 1;
    &mut parts[last]
}

#[cfg(test)]
mod tests {
    use super::super::{Proof, UnitAction, Verb};
    use super::*;
    use crate::host::facts::FileFacts;

    #[test]
    fn what_no_unit_reads_together_is_apart() {
        let file = |path: &str, units: &[&str]| FileChange {
            path: path.into(),
            before: FileFacts::Absent,
            after: FileFacts::Absent,
            why: String::new(),
            check: None,
            units: units.iter().map(|&unit| unit.to_owned()).collect(),
        };
        let plan = Plan {
            files: vec![
                file("/a", &["a"]),
                file("/nobody", &[]),
                file("/b", &["b"]),
                file("/ab", &["a", "b"]),
                file("/c", &["c"]),
            ],
            actions: vec![UnitAction {
                unit: "c".to_owned(),
                verb: Verb::Reload,
                why: String::new(),
            }],
            proofs: vec![Proof::Active {
                unit: "b".to_owned(),
            }],
            forgotten: ["/a".into(), "/unchanged".into()].into(),
            ..Plan::default()
        };
        let mut parts: Vec<String> = plan
            .split()
            .iter()
            .map(|part| {
                let files = part.files.iter().map(|one| one.path.display().to_string());
                let units = part.readers().map(str::to_owned);
                let forgotten = part.forgotten.iter().map(|it| format!("-{}", it.display()));
                files
                    .chain(units)
                    .chain(forgotten)
                    .collect::<Vec<_>>()
                    .join(" ")
            })
            .collect();
        parts.sort();
        assert_eq!(parts, ["-/unchanged", "/a /b /ab b -/a", "/c c", "/nobody"]);
    }
}
