//! What decides when a use and a collection meet.

use std::fs::{File, FileTimes};

use super::*;

/// A store of two own repositories of which the first has a blob that was not used for long.
struct Fixture {
    store: Filesystem,
    _folder: tempfile::TempDir,
    first: Repository,
    second: Repository,
    blob: Digest,
}

fn fixture() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let store = Filesystem::open(folder.path()).unwrap();
    let repository = |name: &str| Repository::from_path(name.to_owned());
    let (first, second) = (
        repository("mycompany/first"),
        repository("mycompany/second"),
    );
    for own in [&first, &second] {
        store.claim(own, || {}).unwrap();
    }
    let blob = Digest::of(Algorithm::Sha256, b"blob");
    store.write(&layout::blob(&blob), b"blob").unwrap();
    store
        .link_own(&layout::layer_link(&first, &blob), &blob)
        .unwrap();
    for path in [layout::blob(&blob), layout::layer_link(&first, &blob)] {
        let then = SystemTime::now() - GRACE - Duration::from_mins(1);
        let times = FileTimes::new().set_accessed(then).set_modified(then);
        let file = File::options().write(true).open(store.root.join(path));
        file.unwrap().set_times(times).unwrap();
    }
    Fixture {
        store,
        _folder: folder,
        first,
        second,
        blob,
    }
}

impl Fixture {
    fn collection(&self) -> Collection<'_> {
        Collection {
            store: &self.store,
            now: SystemTime::now(),
            dry_run: false,
            collected: Collected::default(),
        }
    }

    /// Whether the first repository's link goes now, whatever was known of its manifests.
    fn loses_link(&self) -> bool {
        self.collection().unlink(&self.first, &self.blob).unwrap()
    }

    /// Whether the blob goes now, of which nobody was known to need it.
    fn loses_blob(&self) -> bool {
        self.collection().blobs(&HashSet::new()).unwrap();
        !self.store.root.join(layout::blob(&self.blob)).exists()
    }
}

#[test]
fn what_was_not_used_goes() {
    let it = fixture();
    assert!(it.loses_link() && it.loses_blob());
}

#[test]
fn what_is_open_stays_whatever_its_times_are() {
    let it = fixture();
    let lease = it.store.leases.take(&it.blob);
    assert!(!it.loses_link() && !it.loses_blob());
    drop(lease);
    assert!(it.loses_link() && it.loses_blob());
}

#[test]
fn what_is_used_after_it_was_marked_stays() {
    type Use = fn(&Fixture);
    let uses: [(&str, Use); 3] = [
        ("HEAD", |it| drop(it.store.blob(&it.blob).unwrap())),
        ("a manifest that names it", |it| {
            let lacks = it.store.lacks(&it.first, vec![it.blob.clone()], Vec::new());
            assert_eq!(lacks.unwrap(), []);
        }),
        ("a mount", |it| {
            assert!(it.store.mount(&it.second, &it.blob).unwrap());
        }),
    ];
    for (name, used) in uses {
        let it = fixture();
        used(&it);
        assert!(!it.loses_link(), "{name}");
        assert!(!it.loses_blob(), "{name}");
    }
}
