//! A `config.yml` of registry:2 or registry:3 and its `REGISTRY_*` variables, as they are.
use std::path::{Path, PathBuf};

use super::error::Remark;
use super::merge::Merged;
use super::source::{self, Sources};

pub(super) fn read(
    file: &Path,
    sources: &Sources,
    read: &mut Vec<PathBuf>,
    warnings: &mut Vec<Remark>,
    errors: &mut Vec<Remark>,
) -> Merged {
    let _ = (source::file(file, read, errors), sources, warnings);
    Merged::default()
}
