//! The instance metadata service, version 2: one for each instance.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, Method};
use serde_json::json;

use super::State;
use super::world::Instance;

/// The longest life of a token.
const LONGEST_TOKEN: u64 = 21_600;
/// How long the role's credentials are good.
const CREDENTIALS: Duration = Duration::from_hours(6);
/// The role that instances have.
pub const ROLE: &str = "mirrors";

/// A session's token.
#[derive(Debug)]
pub struct Token {
    text: String,
    instance: String,
    until: Duration,
}

/// An answer: status, the TTL of a token, and a text.
pub type Answer = (u16, Option<u64>, String);

/// The access key of an instance's role, by which its calls are known.
pub fn access_key(instance: &str) -> String {
    let hex = instance.trim_start_matches("i-").to_uppercase();
    format!("ASIA{}", &hex[hex.len().saturating_sub(16)..])
}

/// The session token that goes with it.
pub fn session_token(instance: &str) -> String {
    format!("session-token-of-{instance}")
}

/// Answers a request to an instance's metadata service.
pub fn answer(
    state: &mut State,
    instance: &str,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
) -> Answer {
    let now = state.world.rest.now;
    let text = |name: &str| headers.get(name).and_then(|it| it.to_str().ok());
    if method == Method::PUT && path == "/latest/api/token" {
        // It came through a proxy: somebody else's hands.
        if text("x-forwarded-for").is_some() {
            return (403, None, String::new());
        }
        let ttl = text("x-aws-ec2-metadata-token-ttl-seconds").and_then(|it| it.parse().ok());
        let Some(ttl) = ttl.filter(|ttl| (1..=LONGEST_TOKEN).contains(ttl)) else {
            return (400, None, String::new());
        };
        let token = format!("token-{}", state.world.rest.uuid());
        state.tokens.retain(|token| token.until > now);
        state.tokens.push(Token {
            text: token.clone(),
            instance: instance.to_owned(),
            until: now + Duration::from_secs(ttl),
        });
        return (200, Some(ttl), token);
    }
    if method != Method::GET {
        return (405, None, String::new());
    }
    let given = text("x-aws-ec2-metadata-token");
    let known = state
        .tokens
        .iter()
        .any(|token| given == Some(&token.text) && token.instance == instance && token.until > now);
    if !known {
        return (401, None, String::new());
    }
    match document(state, instance, path.trim_end_matches('/')) {
        Some(text) => (200, None, text),
        None => (404, None, String::new()),
    }
}

fn date(origin: SystemTime, at: Duration) -> String {
    humantime::format_rfc3339_seconds(origin + at).to_string()
}

fn document(state: &State, id: &str, path: &str) -> Option<String> {
    let (world, origin) = (&state.world, state.world.rest.origin);
    let instance = world.rest.instances.get(id)?;
    if path == "/latest/dynamic/instance-identity/document" {
        return Some(identity(origin, instance, &state.region));
    }
    let date = |at| date(origin, at);
    let item = path.strip_prefix("/latest/meta-data/")?;
    Some(match item {
        "instance-id" => id.to_owned(),
        "ami-id" => "ami-0123456789abcdef0".to_owned(),
        "instance-type" => "m7i.large".to_owned(),
        "instance-life-cycle" => {
            let spot = instance.spot.is_some();
            if spot { "spot" } else { "on-demand" }.to_owned()
        }
        "local-ipv4" => Some(instance.address)
            .filter(std::net::IpAddr::is_ipv4)?
            .to_string(),
        "ipv6" => Some(instance.address)
            .filter(std::net::IpAddr::is_ipv6)?
            .to_string(),
        "placement/availability-zone" => instance.zone.clone(),
        "placement/region" => state.region.clone(),
        "autoscaling/target-lifecycle-state" => world.target_state(id)?.to_owned(),
        "spot/instance-action" => {
            json!({"action": "terminate", "time": date(instance.spot?)}).to_string()
        }
        "events/recommendations/rebalance" => {
            json!({"noticeTime": date(instance.rebalance?)}).to_string()
        }
        "tags/instance" => {
            let names: Vec<&str> = instance.tags.keys().map(String::as_str).collect();
            names.join("\n")
        }
        "iam/security-credentials" => ROLE.to_owned(),
        "iam/info" => json!({
            "Code": "Success",
            "InstanceProfileArn": format!("arn:aws:iam::123456789012:instance-profile/{ROLE}"),
        })
        .to_string(),
        _ => {
            if let Some(tag) = item.strip_prefix("tags/instance/") {
                return instance.tags.get(tag).cloned();
            }
            (item.strip_prefix("iam/security-credentials/")? == ROLE).then_some(())?;
            json!({
                "Code": "Success",
                "Type": "AWS-HMAC",
                "LastUpdated": date(world.rest.now),
                "AccessKeyId": access_key(id),
                "SecretAccessKey": format!("secret-of-{id}"),
                "Token": session_token(id),
                "Expiration": date(world.rest.now + CREDENTIALS),
            })
            .to_string()
        }
    })
}

fn identity(origin: SystemTime, instance: &Instance, region: &str) -> String {
    json!({
        "accountId": "123456789012",
        "architecture": "x86_64",
        "availabilityZone": instance.zone,
        "imageId": "ami-0123456789abcdef0",
        "instanceId": instance.id,
        "instanceType": "m7i.large",
        "pendingTime": date(origin, instance.launched),
        "privateIp": instance.address.to_string(),
        "region": region,
        "version": "2017-09-30",
    })
    .to_string()
}
