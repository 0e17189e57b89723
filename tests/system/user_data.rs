//! The examples in cloud-init/, what `generate cloud-init` prints, and the stack's own, by the real cloud-init's
//! schema and by `registry-agent check`.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::{Host, Network, command};

const BINARY: &str = env!("CARGO_BIN_EXE_registry-agent");

/// User-data.
struct Case {
    name: String,
    text: String,
}

fn examples() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cloud-init");
    let entries = fs::read_dir(&folder).expect("the examples");
    let cases = entries.map(|entry| {
        let path = entry.expect("an example").path();
        let name = path.file_stem().expect("a name");
        let name = name.to_str().expect("a plain name").to_owned();
        let text = fs::read_to_string(&path).expect("an example");
        Case { name, text }
    });
    let cases: Vec<Case> = cases.collect();
    assert!(cases.len() >= 5, "the examples were not found");
    cases
}

fn generated() -> Vec<Case> {
    let flags: [&[&str]; 3] = [
        &["--role", "mirror", "--fleet-name", "docker-mirror.local"],
        &[
            "--role",
            "mirror",
            "--cache-limit",
            "500GB",
            "--upstream",
            "ghcr.io",
        ],
        &[
            "--role",
            "client",
            "--fleet-name",
            "docker-mirror.local:5000",
        ],
    ];
    let cases = flags.map(|flags| Case {
        name: flags.join(" "),
        text: command::run(&[&[BINARY, "generate", "cloud-init"], flags].concat()),
    });
    cases.into()
}

/// The user-data of the stack's instances, behind a load balancer and without, as `CloudFormation`
/// fills it in.
fn stack() -> Vec<Case> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("ami/stack.yaml");
    let text = fs::read_to_string(file).expect("the stack");
    let blocks = text.split("- !Sub |\n").skip(1).map(|block| {
        let indent = block.len() - block.trim_start().len();
        let inside = |line: &&str| line.len() - line.trim_start().len() >= indent;
        let lines = block.lines().take_while(inside);
        let lines: Vec<&str> = lines.map(|line| &line[indent..]).collect();
        let text = lines.join("\n") + "\n";
        let targets =
            "arn:aws:elasticloadbalancing:eu-central-1:123456789012:targetgroup/mirrors/1";
        text.replace("${AWS::StackName}", "mirrors")
            .replace("${Targets}", targets)
            .replace("${Zone}", "Z0123456789ABCDEFGHIJ")
            .replace(
                "${RecordName}.${ZoneName}",
                "docker-mirror.registry.internal",
            )
    });
    let names = ["behind a load balancer", "with records of their own"];
    let cases = blocks.zip(names).map(|(text, name)| Case {
        name: format!("the stack's, {name}"),
        text,
    });
    let cases: Vec<Case> = cases.collect();
    assert_eq!(cases.len(), 2, "the stack's user-data was not found");
    cases
}

/// The configuration that user-data has cloud-init write.
fn configuration(user_data: &str) -> String {
    let read: Value = serde_yaml::from_str(user_data).expect("user-data is YAML");
    let files = read["write_files"].as_array().expect("write_files");
    let file = files
        .iter()
        .find(|file| file["path"] == "/etc/registry-agent/config.yaml");
    let content = file.and_then(|file| file["content"].as_str());
    content.expect("the configuration").to_owned()
}

#[test]
fn all_user_data_passes_cloud_inits_schema_and_the_agents_check() {
    let network = Network::new();
    let host = Host::new(&network, "one", 11);
    host.copy(Path::new(BINARY), "/usr/bin/registry-agent");
    let schema = |text: &str| {
        host.write("/root/user-data", text);
        host.try_run(&["cloud-init", "schema", "--config-file", "/root/user-data"])
    };
    let wrong = schema("#cloud-config\nwrite_files: { path: /etc/a }\n");
    assert!(!wrong.succeeded(), "the schema refuses nothing: {wrong}");

    for Case { name, text } in [examples(), generated(), stack()].into_iter().flatten() {
        let valid = schema(&text);
        assert!(valid.succeeded(), "{name}: {valid}");
        // On a baked image nothing is run: what is written is there before anything starts.
        assert_eq!(text.contains("runcmd"), name == "stock-image", "{name}");

        host.write("/etc/registry-agent/config.yaml", &configuration(&text));
        let check = host.try_run(&[
            "env",
            "STATE_DIRECTORY=/var/lib/registry-agent",
            "RUNTIME_DIRECTORY=/run/registry-agent",
            "registry-agent",
            "check",
        ]);
        assert!(check.succeeded(), "{name}: {check}");
        assert_eq!(check.stderr, "", "{name}: {check}");
    }
}
