//! The Docker on a host, as its user sees it.

use super::command::Finished;
use super::host::Host;

/// A host's own dockerd and docker command, both unmodified.
pub struct Docker<'a> {
    host: &'a Host,
}

impl<'a> Docker<'a> {
    /// The one on `host`.
    pub fn on(host: &'a Host) -> Self {
        Self { host }
    }

    /// Tells the daemon its mirrors. Before the boot: it reads them when it starts.
    pub fn use_mirror(&self, url: &str) {
        // One more attempt at a layer, not five: those take a minute to fail.
        let config = serde_json::json!({ "registry-mirrors": [url], "max-download-attempts": 1 });
        self.host
            .write("/etc/docker/daemon.json", &config.to_string());
    }

    /// `docker pull`.
    #[track_caller]
    pub fn pull(&self, image: &str) {
        self.try_pull(image).expect_success();
    }

    /// `docker pull`, for one that may fail.
    #[track_caller]
    pub fn try_pull(&self, image: &str) -> Finished {
        self.host.try_run(&["docker", "pull", image])
    }

    /// `docker run --rm`: what the image's own command prints.
    #[track_caller]
    pub fn output_of(&self, image: &str) -> String {
        self.host.run(&[
            "docker",
            "run",
            "--rm",
            "--network=none",
            "--pull=never",
            image,
        ])
    }

    /// `docker rmi`: its layers too are gone from the host.
    #[track_caller]
    pub fn remove(&self, image: &str) {
        self.host.run(&["docker", "rmi", image]);
    }

    /// `docker logout` from Docker Hub.
    #[track_caller]
    pub fn log_out(&self) {
        self.host.run(&["docker", "logout"]);
    }

    /// `docker login` to Docker Hub.
    #[track_caller]
    pub fn log_in(&self, user: &str, password: &str) {
        self.host.run(&[
            "docker",
            "login",
            "--username",
            user,
            "--password",
            password,
        ]);
    }
}
