//! Whether the daemons have what they should have, by asking them.
//!
//! A job that succeeded proves nothing: docker's reload is an asynchronous `kill -HUP`, and a file
//! that it does not like is only logged (moby 47353).

use std::time::Duration;

use tokio::time::Instant;

use super::apply::System;
use super::plan::Proof;

/// Time between two questions.
const POLL: Duration = Duration::from_millis(50);

/// Waits until all proofs hold. Fails with what is not so when the deadline is over.
pub async fn prove(
    proofs: &[Proof],
    system: &impl System,
    deadline: Duration,
) -> Result<(), String> {
    let end = Instant::now() + deadline;
    for proof in proofs {
        while let Err(why) = ask(proof, system).await {
            if Instant::now() >= end {
                let deadline = humantime::format_duration(deadline);
                return Err(format!("{why}, {deadline} after it was told"));
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

async fn ask(proof: &Proof, system: &impl System) -> Result<(), String> {
    match proof {
        Proof::DockerMirrors { unit, mirrors } => {
            let has = system.docker_mirrors(unit).await;
            let has =
                has.map_err(|error| format!("the daemon of {unit} can't be asked: {error}"))?;
            if equal(&has, mirrors) {
                return Ok(());
            }
            Err(format!(
                "the daemon of {unit} has {} and should have {}",
                list(&has),
                list(mirrors)
            ))
        }
        Proof::Active { unit } => {
            let facts = system.unit(unit).await;
            let facts = facts.map_err(|error| format!("{unit} can't be looked at: {error}"))?;
            if facts.active_state == "active" {
                return Ok(());
            }
            Err(format!(
                "{unit} is {} ({}, {})",
                facts.active_state, facts.sub_state, facts.result
            ))
        }
    }
}

/// Whether these are the same mirrors for docker, however they are written.
pub fn equal(a: &[String], b: &[String]) -> bool {
    as_docker_has(a) == as_docker_has(b)
}

/// The list that docker makes of one in its configuration: each with one slash at its end, and each
/// once, where it stands first (moby `registry/config.go`, `ValidateMirror` and `loadMirrors`).
fn as_docker_has(mirrors: &[String]) -> Vec<String> {
    let mut known: Vec<String> = Vec::new();
    for mirror in mirrors {
        let mirror = format!("{}/", mirror.strip_suffix('/').unwrap_or(mirror));
        if !known.contains(&mirror) {
            known.push(mirror);
        }
    }
    known
}

/// Mirrors, as a person reads them.
pub fn list(mirrors: &[String]) -> String {
    match mirrors {
        [] => "no mirror".to_owned(),
        [one] => format!("the mirror {one}"),
        many => format!("the mirrors {}", many.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_one_where_docker_makes_one_of_them() {
        let list = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
        for (one, other, same) in [
            ("http://a", "http://a/", true),
            // What a person wrote twice, docker has once.
            ("http://a http://a", "http://a/", true),
            ("http://a http://b http://a/", "http://a/ http://b/", true),
            ("http://a http://b", "http://b/ http://a/", false),
            ("http://a", "http://a/ http://b/", false),
            // It takes one slash away, and does not look at the case.
            ("http://a//", "http://a/", false),
            ("http://A", "http://a/", false),
        ] {
            assert_eq!(equal(&list(one), &list(other)), same, "{one} and {other}");
        }
    }
}
