//! The other clients on a host, as their users see them: Debian's containerd, podman and skopeo.

use super::host::Host;

/// containerd's own client. It knows an image by its full name (`docker.io/library/busybox:1`).
pub struct Containerd<'a> {
    host: &'a Host,
}

impl<'a> Containerd<'a> {
    /// The one on `host`.
    pub fn on(host: &'a Host) -> Self {
        Self { host }
    }

    /// Tells it a mirror of `registry`, which is really at `server`, by a hosts.toml. It is read
    /// at each pull.
    pub fn use_mirror(&self, registry: &str, server: &str, mirror: &str) {
        let hosts = format!(
            "server = \"{server}\"\n\n[host.\"{mirror}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
        );
        self.host
            .write(&format!("{HOSTS}/{registry}/hosts.toml"), &hosts);
    }

    /// `ctr images pull`.
    #[track_caller]
    pub fn pull(&self, image: &str) {
        self.host
            .run(&["ctr", "images", "pull", "--hosts-dir", HOSTS, image]);
    }

    /// `ctr run`: what the image's own command prints.
    #[track_caller]
    pub fn output_of(&self, image: &str) -> String {
        // Its default share needs a control group's controller, which not every machine delegates.
        self.host
            .run(&["ctr", "run", "--rm", "--cpu-shares=0", image, "test"])
    }

    /// `ctr images rm`, until nothing of it is left.
    #[track_caller]
    pub fn remove(&self, image: &str) {
        self.host.run(&["ctr", "images", "rm", "--sync", image]);
        let left = self.host.run(&["ctr", "content", "ls", "--quiet"]);
        assert_eq!(left, "", "containerd has content without an image");
    }
}

const HOSTS: &str = "/etc/containerd/certs.d";

/// Tells podman, skopeo and their kin a mirror (`host:port`, without TLS) of `registry`. It is
/// read at each pull.
pub fn add_registries_conf(host: &Host, registry: &str, mirror: &str) {
    let text = format!(
        "[[registry]]\nprefix = \"{registry}\"\nlocation = \"{registry}\"\n\n\
         [[registry.mirror]]\nlocation = \"{mirror}\"\ninsecure = true\n"
    );
    let path = format!("/etc/containers/registries.conf.d/{registry}.conf");
    host.write(&path, &text);
}

/// podman as root.
pub struct Podman<'a> {
    host: &'a Host,
}

impl<'a> Podman<'a> {
    /// The one on `host`.
    pub fn on(host: &'a Host) -> Self {
        Self { host }
    }

    /// `podman pull`.
    #[track_caller]
    pub fn pull(&self, image: &str) {
        self.host.run(&["podman", "pull", "--quiet", image]);
    }

    /// What the image's own command prints, run in the image's files: `podman run` sets limits
    /// that need a control group's controllers, which not every machine delegates.
    #[track_caller]
    pub fn output_of(&self, image: &str) -> String {
        const SCRIPT: &str = "\
root=$(podman image mount \"$1\")
chroot \"$root\" /bin/sh -c \"$(podman image inspect --format '{{index .Config.Cmd 2}}' \"$1\")\"
podman image unmount \"$1\" >/dev/null";
        self.host.run(&["sh", "-ec", SCRIPT, "sh", image])
    }

    /// `podman rmi`.
    #[track_caller]
    pub fn remove(&self, image: &str) {
        self.host.run(&["podman", "rmi", image]);
    }
}

/// skopeo, which copies images and keeps none.
pub struct Skopeo<'a> {
    host: &'a Host,
}

impl<'a> Skopeo<'a> {
    /// The one on `host`.
    pub fn on(host: &'a Host) -> Self {
        Self { host }
    }

    /// `skopeo copy` of everything that this architecture needs, into an empty folder. It checks
    /// all digests itself.
    #[track_caller]
    pub fn copy(&self, image: &str) {
        self.host.run(&["rm", "-rf", COPY]);
        let (from, to) = (format!("docker://{image}"), format!("dir:{COPY}"));
        let mut command = vec!["skopeo", "copy", "--quiet", &from, &to];
        if image.starts_with("127.0.0.1:") {
            command.push("--src-tls-verify=false");
        }
        self.host.run(&command);
    }
}

const COPY: &str = "/var/tmp/skopeo";
