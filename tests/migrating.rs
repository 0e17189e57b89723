//! The configurations in docs/migrating.md are ones that this version takes, but for keys that it
//! says it does not have.

use std::fs;

use registry_agent::config::{self, Sources};
use registry_agent::oci::RegistryHost;

/// The YAML blocks that are configuration files, without the indent of the list that one is in.
fn configurations() -> Vec<String> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/migrating.md");
    let page = fs::read_to_string(page).expect("the page");
    let mut found = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if line.trim_start() != "```yaml" {
            continue;
        }
        let indent = line.len() - line.trim_start().len();
        let block = lines.by_ref().take_while(|line| line.trim_start() != "```");
        let block: Vec<&str> = block.map(|line| line.get(indent..).unwrap_or("")).collect();
        assert_eq!(block[0], "# /etc/registry-agent/config.yaml");
        found.push(
            block
                .join("\n")
                .replace("<your mirror FQDN>", "mirror.example.com"),
        );
    }
    found
}

#[test]
fn every_configuration_on_the_page_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let password = folder.path().join("docker.io.password");
    let mut file = tempfile::NamedTempFile::new_in(folder.path()).unwrap();
    std::io::Write::write_all(&mut file, b"hunter2\n").unwrap();
    file.persist(&password).unwrap();
    let users = folder.path().join("htpasswd");
    // "push", by `htpasswd -B`.
    let user = "ci:$2y$05$jG8P1ZHLBKg6PLvWEoyAE.NkO8VyIw9bZ7vkm3tsVb2zBHDh2E.3O\n";
    let mut file = std::fs::File::create_new(&users).unwrap();
    std::io::Write::write_all(&mut file, user.as_bytes()).unwrap();

    let all = configurations();
    assert_eq!(all.len(), 3, "{all:#?}");
    for text in all {
        let there = password.display().to_string();
        let text = text.replace("/etc/registry-agent/docker.io.password", &there);
        let there = users.display().to_string();
        let text = text.replace("/etc/registry-agent/htpasswd", &there);
        let path = folder.path().join("config.yaml");
        let mut file = tempfile::NamedTempFile::new_in(folder.path()).unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        file.persist(&path).unwrap();
        let sources = Sources {
            config: Some(path.clone()),
            distribution: None,
            environment: Vec::new(),
        };
        let loaded = config::load(&sources.of_the_unit());
        let loaded = loaded.unwrap_or_else(|errors| panic!("{errors}\nin\n{text}"));
        // The page says so, of the one that asks for passwords.
        let expected = usize::from(text.contains("auth:"));
        assert_eq!(loaded.warnings.len(), expected, "{:?}", loaded.warnings);
        for warning in &loaded.warnings {
            assert!(warning.contains("`tls` is not set"), "{warning}");
        }
        assert_eq!(
            loaded.settings.host.mirrored,
            [RegistryHost::docker_hub()],
            "{text}"
        );
    }
}
