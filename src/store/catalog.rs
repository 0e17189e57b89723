//! Lists in order, a page at a time, which costs what is in the page and not what is in the store.

use std::fs;
use std::path::Path;

use super::StoreError;
use super::filesystem::{Filesystem, list_such};
use super::layout::{self, Repository};
use crate::oci::Tag;

/// Which part of a list: so many, after one.
#[derive(Debug, Clone)]
pub struct Page {
    /// The one before the first; empty for the beginning.
    pub after: String,
    /// The most there are to be.
    pub limit: usize,
}

impl Page {
    /// All there is.
    pub(in crate::store) fn all() -> Self {
        Self {
            after: String::new(),
            limit: usize::MAX,
        }
    }
}

impl Filesystem {
    /// The repositories that have manifests, in the order of their names.
    pub fn repositories(&self, page: &Page) -> Result<Vec<Repository>, StoreError> {
        self.repositories_with(&layout::repositories(), "_manifests", page)
    }

    /// The repositories below `root` that have a folder of this name, in the order of their own.
    pub(super) fn repositories_with(
        &self,
        root: &str,
        having: &str,
        page: &Page,
    ) -> Result<Vec<Repository>, StoreError> {
        let root = self.root.join(root);
        let folders = |path: &str| folders(&root.join(path));
        let mut found = Vec::new();
        walk(&folders, "", having, page, &mut found)?;
        Ok(found)
    }

    /// The tags of a repository, in their order. A folder without `current/link` is not a tag.
    pub fn tags(&self, repository: &Repository, page: &Page) -> Result<Vec<Tag>, StoreError> {
        let names = folders(&self.root.join(layout::tags(repository)))?;
        let mut tags: Vec<Tag> = names.iter().filter_map(|name| name.parse().ok()).collect();
        tags.retain(|tag| tag.as_str() > page.after.as_str());
        tags.sort_unstable();
        let mut found = Vec::new();
        for tag in tags {
            if found.len() == page.limit {
                break;
            }
            if self.tag(repository, &tag)?.is_some() {
                found.push(tag);
            }
        }
        Ok(found)
    }
}

/// The folders in a folder.
fn folders(path: &Path) -> Result<Vec<String>, StoreError> {
    list_such(path, fs::FileType::is_dir)
}

/// Finds the repositories below `prefix` (empty, or with a `/` at its end) in the order of their
/// names, which is not that of the folders: `a-b` is between `a` and `a/b`. So a folder stands in
/// its place once as itself, and once, with a `/` at its end, for all that is below it.
fn walk(
    folders: &impl Fn(&str) -> Result<Vec<String>, StoreError>,
    prefix: &str,
    having: &str,
    page: &Page,
    found: &mut Vec<Repository>,
) -> Result<(), StoreError> {
    // What begins with `_` is of the repository `prefix`, and no part of a name.
    let names = folders(prefix)?
        .into_iter()
        .filter(|name| !name.starts_with('_'));
    let mut places: Vec<String> = names
        .flat_map(|name| [format!("{prefix}{name}/"), format!("{prefix}{name}")])
        .filter(|place| {
            *place > page.after || (place.ends_with('/') && page.after.starts_with(place))
        })
        .collect();
    places.sort_unstable();
    for place in places {
        if found.len() == page.limit {
            break;
        }
        if place.ends_with('/') {
            walk(folders, &place, having, page, found)?;
        } else if folders(&place)?.iter().any(|name| name == having) {
            found.push(Repository::from_path(place));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeSet;

    use super::*;

    /// The folders in a folder of a store with these repositories.
    fn folders_in(repositories: &BTreeSet<String>, folder: &str) -> Vec<String> {
        let paths = repositories.iter().map(|name| format!("{name}/_manifests"));
        let names: BTreeSet<String> = paths
            .filter_map(|path| {
                let prefix = if folder.is_empty() || folder.ends_with('/') {
                    folder.to_owned()
                } else {
                    format!("{folder}/")
                };
                Some(path.strip_prefix(&prefix)?.split('/').next()?.to_owned())
            })
            .collect();
        // Folders are in no order.
        names.into_iter().rev().collect()
    }

    #[test]
    fn pages_are_in_the_order_of_names_and_cost_no_more_than_what_is_in_them() {
        let tricky = [
            "a", "a-b", "a-b/c", "a.b", "a/b", "a/b/c", "a/b-c", "a0", "a_b", "b/a",
        ];
        let many = (0..500).map(|number| format!("many/repository-{number}"));
        let repositories: BTreeSet<String> =
            tricky.map(str::to_owned).into_iter().chain(many).collect();
        let in_order: Vec<&str> = repositories.iter().map(String::as_str).collect();
        for limit in [1, 3, 100, usize::MAX] {
            let mut all: Vec<String> = Vec::new();
            loop {
                let after = all.last().cloned().unwrap_or_default();
                let (listed, page) = (Cell::new(0), Page { after, limit });
                let folders = |folder: &str| {
                    listed.set(listed.get() + 1);
                    Ok(folders_in(&repositories, folder))
                };
                let mut found = Vec::new();
                walk(&folders, "", "_manifests", &page, &mut found).unwrap();
                // Each for itself and for what is below it, and the way there.
                assert!(
                    listed.get() <= 2 * found.len() + 10,
                    "{page:?}: {} folders",
                    listed.get()
                );
                if found.is_empty() {
                    break;
                }
                all.extend(found.iter().map(ToString::to_string));
            }
            assert_eq!(all, in_order, "by {limit}");
        }
    }
}
