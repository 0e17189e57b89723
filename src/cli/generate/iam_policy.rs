//! The least IAM policy for a bucket, and for an instance of a fleet.

use clap::{ArgGroup, Args, ValueEnum};
use serde_json::{Value, json};

use crate::store::layout::{self, Prefix};

mod fleet;

/// Which policy is wanted.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("what").required(true).multiple(true)))]
pub(in crate::cli) struct Wanted {
    /// For which role
    #[arg(long, value_enum)]
    role: PolicyRole,
    /// The bucket's name
    #[arg(long, group = "what")]
    bucket: Option<String>,
    /// What stands before `docker/registry/v2` in every key (`storage.s3.prefix`)
    #[arg(long, default_value = "", requires = "bucket")]
    prefix: String,
    /// The ARN of the KMS key that the bucket, or `storage.s3.encryption`, encrypts with
    #[arg(long, value_name = "ARN", requires = "bucket")]
    kms_key: Option<String>,
    #[command(flatten)]
    fleet: fleet::Wanted,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum PolicyRole {
    /// Reads only
    Reader,
    /// Reads, writes and deletes
    Writer,
    /// Reads and writes what mirrors share, and deletes nothing of it
    Mirror,
}

/// The policy as JSON, indented.
pub(super) fn print(wanted: &Wanted) -> String {
    let mut statements = Vec::new();
    if let Some(bucket) = &wanted.bucket {
        let kms_key = wanted.kms_key.as_deref();
        statements = of_a_bucket(wanted.role, bucket, &wanted.prefix, kms_key);
    }
    statements.extend(fleet::statements(&wanted.fleet));
    let policy = policy(&statements);
    format!("{policy:#}\n")
}

fn policy(statements: &[Value]) -> Value {
    json!({ "Version": "2012-10-17", "Statement": statements })
}

fn allow(sid: &str, actions: &[&str], resource: &str) -> Value {
    json!({ "Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resource })
}

/// What a role needs of a bucket. Source: AWS service authorization reference, "Actions, resources,
/// and condition keys for Amazon S3".
fn of_a_bucket(role: PolicyRole, bucket: &str, prefix: &str, kms_key: Option<&str>) -> Vec<Value> {
    let prefix = Prefix::new(prefix);
    let whole = format!("arn:aws:s3:::{bucket}");
    let within = |folder: &str| format!("{whole}/{}/*", prefix.key(folder));
    let content = within(layout::V2);
    let mut list = allow("List", &["s3:ListBucket"], &whole);
    if !prefix.as_str().is_empty() {
        // The rest of the bucket is somebody else's.
        let mut folders = vec![layout::V2];
        // A note that is not there is a 403 to who may not list it.
        folders.extend((role == PolicyRole::Mirror).then_some(layout::PUBLIC));
        let keys = folders
            .into_iter()
            .map(|folder| prefix.key(&format!("{folder}/*")));
        let keys: Vec<_> = keys.collect();
        list["Condition"] = json!({ "StringLike": { "s3:prefix": keys } });
    }
    let mut statements = vec![allow("Read", &["s3:GetObject"], &content), list];
    if role == PolicyRole::Mirror {
        let noted = ["s3:GetObject", "s3:PutObject"];
        statements.push(allow("NoteWhatIsPublic", &noted, &within(layout::PUBLIC)));
    }
    if role != PolicyRole::Reader {
        let mut actions = vec!["s3:PutObject", "s3:AbortMultipartUpload"];
        if role == PolicyRole::Writer {
            actions.push("s3:DeleteObject");
        }
        statements.push(allow("Write", &actions, &content));
        let tried = ["s3:PutObject", "s3:DeleteObject"];
        statements.push(allow("TryConditions", &tried, &within(layout::PROBES)));
        let unfinished = ["s3:ListBucketMultipartUploads"];
        statements.push(allow("FindUnfinishedUploads", &unfinished, &whole));
    }
    if let Some(key) = kms_key {
        let mut actions = vec!["kms:Decrypt"];
        if role != PolicyRole::Reader {
            actions.push("kms:GenerateDataKey");
        }
        statements.push(allow("Keys", &actions, key));
    }
    statements
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn policy(role: PolicyRole, bucket: &str, prefix: &str, kms_key: Option<&str>) -> Value {
        super::policy(&of_a_bucket(role, bucket, prefix, kms_key))
    }

    /// Every action that a policy allows, beside what it allows it on.
    fn allowed(policy: &Value) -> BTreeSet<(String, String)> {
        let statements = policy["Statement"].as_array().unwrap().iter();
        statements
            .flat_map(|statement| {
                assert_eq!(statement["Effect"], "Allow");
                let resource = statement["Resource"].as_str().unwrap();
                let actions = statement["Action"].as_array().unwrap().iter();
                actions
                    .map(move |action| (action.as_str().unwrap().to_owned(), resource.to_owned()))
            })
            .collect()
    }

    fn pairs(pairs: &[(&str, &str)]) -> BTreeSet<(String, String)> {
        let owned = |(one, other): &(&str, &str)| ((*one).to_owned(), (*other).to_owned());
        pairs.iter().map(owned).collect()
    }

    const BUCKET: &str = "arn:aws:s3:::images";
    const CONTENT: &str = "arn:aws:s3:::images/docker/registry/v2/*";
    const NOTES: &str = "arn:aws:s3:::images/registry-agent/public/*";
    const PROBES: &str = "arn:aws:s3:::images/registry-agent/probe/*";

    #[test]
    fn a_reader_may_read_and_list_and_nothing_else() {
        let policy = policy(PolicyRole::Reader, "images", "", None);
        let wanted = pairs(&[("s3:GetObject", CONTENT), ("s3:ListBucket", BUCKET)]);
        assert_eq!(allowed(&policy), wanted);
        assert!(policy["Statement"][1]["Condition"].is_null());
    }

    #[test]
    fn only_a_writer_may_delete_what_is_stored() {
        let of = |role| allowed(&policy(role, "images", "/", None));
        let (writer, mirror) = (of(PolicyRole::Writer), of(PolicyRole::Mirror));
        let mut wanted = pairs(&[
            ("s3:GetObject", CONTENT),
            ("s3:ListBucket", BUCKET),
            ("s3:PutObject", CONTENT),
            ("s3:AbortMultipartUpload", CONTENT),
            ("s3:PutObject", PROBES),
            ("s3:DeleteObject", PROBES),
            ("s3:ListBucketMultipartUploads", BUCKET),
        ]);
        let mut of_mirror = wanted.clone();
        of_mirror.extend(pairs(&[("s3:GetObject", NOTES), ("s3:PutObject", NOTES)]));
        assert_eq!(mirror, of_mirror);
        wanted.extend(pairs(&[("s3:DeleteObject", CONTENT)]));
        assert_eq!(writer, wanted);
    }

    #[test]
    fn a_prefix_bounds_what_is_read_and_listed_and_keys_are_allowed_by_name() {
        let key = "arn:aws:kms:eu-central-1:123456789012:key/abc";
        let policy = policy(PolicyRole::Reader, "images", "/team/", Some(key));
        let content = "arn:aws:s3:::images/team/docker/registry/v2/*";
        let wanted = pairs(&[
            ("s3:GetObject", content),
            ("s3:ListBucket", BUCKET),
            ("kms:Decrypt", key),
        ]);
        assert_eq!(allowed(&policy), wanted);
        assert_eq!(
            policy["Statement"][1]["Condition"],
            json!({ "StringLike": { "s3:prefix": ["team/docker/registry/v2/*"] } })
        );
    }

    #[test]
    fn a_mirror_below_a_prefix_may_list_its_notes_as_well() {
        let policy = super::of_a_bucket(PolicyRole::Mirror, "images", "team", None);
        let listed = &policy[1]["Condition"]["StringLike"]["s3:prefix"];
        let notes = format!("team/{}/*", layout::PUBLIC);
        assert_eq!(*listed, json!(["team/docker/registry/v2/*", notes]));
    }
}
