//! The two places where what is pushed may be kept, for tests that ask the same of both.
#![allow(dead_code, reason = "every test target uses a part of it")]

use serde_json::json;

use crate::cloud::Cloud;
use crate::support::agent::{Agent, Setup};

/// A folder of the agent's own, or a bucket; it ends with this.
pub struct Home {
    pub bucket: Option<Cloud>,
}

impl Home {
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
