//! The two places where what is pushed may be kept, for tests that ask the same of both.
#![allow(dead_code, reason = "every test target uses a part of it")]

use serde_json::json;

use crate::cloud::Cloud;
use crate::support::agent::{Agent, Setup};

/// A folder of the agent's own, or a bucket; it ends with this.
pub struct Home {
    pub bucket: Option<Cloud>,
}

/// An answer that is another one from a bucket.
struct Difference {
    what: &'static str,
    disk: &'static str,
    bucket: &'static str,
    /// Why it is none that has to be mended.
    why: &'static str,
}

/// All that is different by intent.
const DIFFERENCES: &[Difference] = &[Difference {
    what: "the code of a pull from a repository that is not there",
    disk: "NAME_UNKNOWN",
    bucket: "MANIFEST_UNKNOWN",
    why: "both are 404, and to tell them apart would be one more LIST for every tag that is missing",
}];

impl Home {
    /// The answer of this home to `what`, which is one of the differences.
    #[track_caller]
    pub fn expected(&self, what: &str) -> &'static str {
        let difference = DIFFERENCES.iter().find(|it| it.what == what);
        let difference = difference.expect("one of the differences");
        assert!(!difference.why.is_empty());
        match self.bucket {
            None => difference.disk,
            Some(_) => difference.bucket,
        }
    }

    pub fn disk() -> Self {
        Self { bucket: None }
    }

    pub fn bucket() -> Self {
        Self {
            bucket: Some(Cloud::start()),
        }
    }

    /// A registry that takes pushes for `mycompany/*`.
    pub fn hosting(&self) -> Setup {
        match &self.bucket {
            None => Setup::hosting(),
            Some(cloud) => {
                let setup = cloud.writer().set("delete", false);
                setup.set("hosted", json!(["mycompany/*"]))
            }
        }
    }

    /// The same, which lets clients delete.
    pub fn deleting(&self) -> Setup {
        self.hosting().set("delete", true)
    }

    /// What is kept below `docker/registry/v2`, if it is there.
    pub fn kept(&self, agent: &Agent, path: &str) -> Option<Vec<u8>> {
        let file = match &self.bucket {
            None => agent.stored(path),
            Some(cloud) => cloud.s3.file(&format!("docker/registry/v2/{path}")),
        };
        std::fs::read(file).ok()
    }
}

/// Makes two tests of each function that takes a [`Home`]: `disk::name` and `bucket::name`.
#[macro_export]
macro_rules! on_each_home {
    ($($name:ident,)*) => {
        mod disk {
            $(#[test] fn $name() { super::$name(&super::home::Home::disk()); })*
        }
        mod bucket {
            $(#[test] fn $name() { super::$name(&super::home::Home::bucket()); })*
        }
    };
}

/// What a bucket is not asked, and why: each is a test of the disk as `disk_alone::name`.
#[macro_export]
macro_rules! on_the_disk_alone {
    ($($name:ident: $why:literal,)*) => {
        mod disk_alone {
            $(#[doc = $why] #[test] fn $name() { super::$name(&super::home::Home::disk()); })*
        }
    };
}
