//! Container images made from a busybox.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;

use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};

use super::command;
use super::scratch::{Scratch, host_image};

/// Bytes that do not compress, and do not come from one read or one packet.
const NOISE: usize = 6 << 20;
/// Bytes of each layer that is there to be one more.
const MORE: usize = 300 << 10;

/// An image, ready to be pushed.
pub struct Image {
    /// Configurations and layers.
    pub blobs: Vec<Content>,
    /// The manifests that the last one refers to, and last the one that the tag names.
    pub manifests: Vec<Content>,
    /// What its command prints: a line of its own, and the checksum of its largest layer.
    pub output: String,
}

/// Bytes that are addressed by what they are.
pub struct Content {
    /// `sha256:...`
    pub digest: String,
    /// What a manifest, or a request for it, calls it.
    pub media_type: &'static str,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Content {
    fn new(media_type: &'static str, bytes: Vec<u8>) -> Self {
        Self {
            digest: sha256(&bytes),
            media_type,
            bytes,
        }
    }

    fn descriptor(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.bytes.len() })
    }
}

/// The media types of one generation of manifests.
struct Vocabulary {
    manifest: &'static str,
    config: &'static str,
    layer: &'static str,
}

const DOCKER: Vocabulary = Vocabulary {
    manifest: "application/vnd.docker.distribution.manifest.v2+json",
    config: "application/vnd.docker.container.image.v1+json",
    layer: "application/vnd.docker.image.rootfs.diff.tar.gzip",
};

const OCI: Vocabulary = Vocabulary {
    manifest: "application/vnd.oci.image.manifest.v1+json",
    config: "application/vnd.oci.image.config.v1+json",
    layer: "application/vnd.oci.image.layer.v1.tar+gzip",
};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

impl Image {
    /// An image of three layers for this machine, as Docker's own manifest (schema 2). Two
    /// images share the first layer.
    pub fn new(line: &str) -> Self {
        let mut image = Self::empty();
        image.add_platform(&DOCKER, this_architecture(), line, 0);
        image
    }

    /// The same in an OCI index, beside an image for another architecture.
    pub fn multi_arch(line: &str) -> Self {
        Self::index_of(line, 0)
    }

    fn index_of(line: &str, more_layers: usize) -> Self {
        let mut image = Self::empty();
        let (ours, other) = (this_architecture(), other_architecture());
        image.add_platform(&OCI, other, "another architecture's", more_layers);
        image.add_platform(&OCI, ours, line, more_layers);
        let manifests = image.manifests.iter().zip([other, ours]);
        let manifests: Vec<Value> = manifests
            .map(|(manifest, architecture)| {
                let mut descriptor = manifest.descriptor();
                descriptor["platform"] = json!({ "os": "linux", "architecture": architecture });
                descriptor
            })
            .collect();
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
        image
            .manifests
            .push(Content::new(INDEX, index.to_string().into_bytes()));
        image
    }

    /// The same with many more layers: more than any client downloads at once.
    pub fn many_layers(line: &str) -> Self {
        Self::index_of(line, 8)
    }

    fn empty() -> Self {
        Self {
            blobs: Vec::new(),
            manifests: Vec::new(),
            output: String::new(),
        }
    }

    /// Adds one platform's layers, configuration and manifest.
    fn add_platform(
        &mut self,
        vocabulary: &Vocabulary,
        architecture: &str,
        line: &str,
        more_layers: usize,
    ) {
        let mut noise = vec![0; NOISE];
        SystemRandom::new().fill(&mut noise).expect("random bytes");
        let folder = Scratch::new("image");
        let mut roots = vec![
            folder.folder("busybox"),
            folder.folder("noise"),
            folder.folder("line"),
        ];
        for number in 0..more_layers {
            let name = format!("more-{number}");
            let root = folder.folder(&name);
            write(
                &Path::new(&root).join(&name),
                &noise[number * MORE..][..MORE],
            );
            roots.push(root);
        }
        add_busybox(Path::new(&roots[0]));
        write(&Path::new(&roots[1]).join("noise"), &noise);
        write(
            &Path::new(&roots[2]).join("line"),
            format!("{line}\n").as_bytes(),
        );

        let archives = roots.iter().map(|root| archive(&folder, root));
        let (tars, gzips): (Vec<_>, Vec<_>) = archives.unzip();
        let diff_ids: Vec<String> = tars.iter().map(|tar| sha256(tar)).collect();
        let layer = |gzip| Content::new(vocabulary.layer, gzip);
        let layers: Vec<Content> = gzips.into_iter().map(layer).collect();
        let command = "cat /line && sha256sum /noise";
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": { "Cmd": ["/bin/sh", "-c", command], "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = Content::new(vocabulary.config, config.to_string().into_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": vocabulary.manifest,
            "config": config.descriptor(),
            "layers": layers.iter().map(Content::descriptor).collect::<Vec<Value>>(),
        });
        let checksum = sha256(&noise).replace("sha256:", "");
        self.output = format!("{line}\n{checksum}  /noise\n");
        self.blobs.extend(layers);
        self.blobs.push(config);
        let manifest = Content::new(vocabulary.manifest, manifest.to_string().into_bytes());
        self.manifests.push(manifest);
    }

    /// What its tag names: an index, or the manifest itself.
    pub fn tagged(&self) -> &Content {
        self.manifests.last().expect("an image has a manifest")
    }

    /// The manifest for this machine's architecture.
    pub fn manifest(&self) -> &Content {
        let mut manifests = self.manifests.iter();
        let manifest = manifests.rfind(|content| content.media_type != INDEX);
        manifest.expect("an image has a manifest")
    }

    /// Layers and configuration for this machine's architecture: what a pull downloads.
    pub fn downloads(&self) -> Vec<&Content> {
        let manifest: Value =
            serde_json::from_slice(&self.manifest().bytes).expect("a manifest is JSON");
        let layers = manifest["layers"]
            .as_array()
            .expect("a manifest has layers");
        let blobs = layers.iter().chain([&manifest["config"]]);
        let found = blobs.map(|descriptor| {
            let mut blobs = self.blobs.iter();
            let blob = blobs.find(|blob| descriptor["digest"] == *blob.digest);
            blob.expect("a manifest's blobs are the image's")
        });
        found.collect()
    }

    /// Everything that a pull on this machine's architecture needs.
    pub fn contents(&self) -> Vec<&Content> {
        let manifest = Some(self.manifest()).filter(|it| it.digest != self.tagged().digest);
        [self.tagged()]
            .into_iter()
            .chain(manifest)
            .chain(self.downloads())
            .collect()
    }

    /// The bytes that a pull downloads.
    pub fn size(&self) -> u64 {
        self.downloads()
            .iter()
            .map(|blob| blob.bytes.len() as u64)
            .sum()
    }
}

fn add_busybox(root: &Path) {
    let bin = root.join("bin");
    fs::create_dir(&bin).expect("making a folder in an empty root");
    let busybox = host_image().join("bin/busybox");
    fs::copy(&busybox, bin.join("busybox"))
        .unwrap_or_else(|error| panic!("copying {}: {error}", busybox.display()));
    for applet in ["sh", "cat", "sha256sum", "sleep"] {
        symlink("busybox", bin.join(applet)).expect("linking an applet to busybox");
    }
}

/// The folder's contents as a tar and as a compressed tar, the same bytes for the same contents.
fn archive(folder: &Scratch, root: &str) -> (Vec<u8>, Vec<u8>) {
    let tar = folder.at("layer.tar");
    command::run(&[
        "tar",
        "--create",
        "--file",
        &tar,
        "--directory",
        root,
        "--sort=name",
        "--mtime=@0",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        ".",
    ]);
    command::run(&["gzip", "--keep", "--no-name", "--fast", "--force", &tar]);
    (read(&tar), read(&format!("{tar}.gz")))
}

fn sha256(bytes: &[u8]) -> String {
    let hash = digest(&SHA256, bytes);
    let text = String::from("sha256:");
    hash.as_ref()
        .iter()
        .fold(text, |text, byte| text + &format!("{byte:02x}"))
}

fn read(path: &str) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("reading {path}: {error}"))
}

fn write(path: &Path, contents: &[u8]) {
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    file.and_then(|mut file| file.write_all(contents))
        .unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
}

fn this_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => panic!("no name for the architecture {other} in image manifests here"),
    }
}

fn other_architecture() -> &'static str {
    if this_architecture() == "amd64" {
        "arm64"
    } else {
        "amd64"
    }
}
