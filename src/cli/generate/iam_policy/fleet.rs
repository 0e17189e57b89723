//! What an instance needs for its place in a fleet, whatever its role.
//!
//! Sources: AWS service authorization reference, "Actions, resources, and condition keys" for Amazon
//! EC2 Auto Scaling, Elastic Load Balancing V2 and Amazon Route 53.

use clap::Args;
use serde_json::{Value, json};

use super::allow;

/// The tag of groups whose instances may speak for each other: no condition limits that to the own
/// instance.
const TAG: (&str, &str) = ("aws:ResourceTag/registry-agent", "mirror");

/// Which parts of a fleet are wanted.
#[derive(Debug, Default, Args)]
#[group(id = "fleet")]
pub(super) struct Wanted {
    /// The autoscaling group (`fleet.autoscaling.group`), which needs the tag `registry-agent` =
    /// `mirror`
    #[arg(long, group = "what")]
    group: Option<String>,
    /// With `fleet.enforce`: the group's desired capacity may be changed
    #[arg(long, requires = "group")]
    enforce: bool,
    /// With `fleet.attach`: instances may be attached to the group
    #[arg(long, requires = "group")]
    attach: bool,
    /// The ARN of the load balancer's target group (`fleet.load_balancer.target_group`)
    #[arg(long, value_name = "ARN", group = "what")]
    target_group: Option<String>,
    /// The target group is attached to the autoscaling group, which registers instances itself
    #[arg(long, requires = "target_group")]
    attached: bool,
    /// The id of the hosted zone (`fleet.dns.route53.zone`)
    #[arg(long, value_name = "ID", group = "what", requires = "dns_name")]
    zone: Option<String>,
    /// The name within it (`fleet.dns.route53.name`)
    #[arg(long, value_name = "NAME", requires = "zone")]
    dns_name: Option<String>,
}

pub(super) fn statements(wanted: &Wanted) -> Vec<Value> {
    let mut statements = Vec::new();
    if let Some(group) = &wanted.group {
        statements.extend(of_a_group(group, wanted.enforce, wanted.attach));
    }
    if let Some(target_group) = &wanted.target_group {
        // It has no resources to be limited to.
        let look = ["elasticloadbalancing:DescribeTargetHealth"];
        statements.push(allow("SeeTargets", &look, "*"));
        if !wanted.attached {
            let change = [
                "elasticloadbalancing:RegisterTargets",
                "elasticloadbalancing:DeregisterTargets",
            ];
            statements.push(allow("ChangeTargets", &change, target_group));
        }
    }
    if let (Some(zone), Some(name)) = (&wanted.zone, &wanted.dns_name) {
        statements.extend(of_a_name(zone, name));
    }
    statements
}

fn of_a_group(group: &str, enforce: bool, attach: bool) -> [Value; 2] {
    let look = [
        "autoscaling:DescribeAutoScalingGroups",
        "autoscaling:DescribeLifecycleHooks",
        "autoscaling:DescribeScalingActivities",
    ];
    let mut actions = vec![
        "autoscaling:CompleteLifecycleAction",
        "autoscaling:RecordLifecycleActionHeartbeat",
        "autoscaling:SetInstanceHealth",
    ];
    if enforce {
        actions.push("autoscaling:SetDesiredCapacity");
    }
    if attach {
        actions.push("autoscaling:AttachInstances");
    }
    let arn = format!("arn:aws:autoscaling:*:*:autoScalingGroup:*:autoScalingGroupName/{group}");
    let mut take_part = allow("TakePart", &actions, &arn);
    let (key, value) = TAG;
    take_part["Condition"] = json!({ "StringEquals": { key: value } });
    // These have no resources to be limited to.
    [allow("SeeGroups", &look, "*"), take_part]
}

fn of_a_name(zone: &str, name: &str) -> [Value; 3] {
    let arn = format!("arn:aws:route53:::hostedzone/{zone}");
    let names = "route53:ChangeResourceRecordSetsNormalizedRecordNames";
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    let mut change = allow("ChangeName", &["route53:ChangeResourceRecordSets"], &arn);
    change["Condition"] = json!({
        "ForAllValues:StringEquals": {
            names: [name],
            "route53:ChangeResourceRecordSetsRecordTypes": ["A", "AAAA"],
            "route53:ChangeResourceRecordSetsActions": ["UPSERT", "DELETE"],
        },
        // Without names the condition above holds for anything.
        "Null": { names: "false" },
    });
    [
        allow("SeeName", &["route53:ListResourceRecordSets"], &arn),
        change,
        allow(
            "SeeChange",
            &["route53:GetChange"],
            "arn:aws:route53:::change/*",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_yaml::Value as Yaml;

    use super::super::{PolicyRole, of_a_bucket};
    use super::*;

    const TARGETS: &str =
        "arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/mirrors/0123456789abcdef";

    fn group(enforce: bool, attach: bool) -> Wanted {
        Wanted {
            group: Some("mirrors".to_owned()),
            enforce,
            attach,
            ..Wanted::default()
        }
    }

    fn actions(statement: &Value) -> BTreeSet<&str> {
        let actions = statement["Action"].as_array().unwrap().iter();
        actions.map(|action| action.as_str().unwrap()).collect()
    }

    #[test]
    fn what_changes_a_group_is_for_the_one_with_the_tag() {
        for (enforce, attach, more) in [
            (false, false, vec![]),
            (true, false, vec!["autoscaling:SetDesiredCapacity"]),
            (false, true, vec!["autoscaling:AttachInstances"]),
        ] {
            let statements = statements(&group(enforce, attach));
            let [look, change] = &statements[..] else {
                panic!("{statements:?}");
            };
            assert!(
                actions(look)
                    .iter()
                    .all(|action| action.contains(":Describe"))
            );
            assert_eq!(look["Resource"], "*");
            let mut wanted = BTreeSet::from([
                "autoscaling:CompleteLifecycleAction",
                "autoscaling:RecordLifecycleActionHeartbeat",
                "autoscaling:SetInstanceHealth",
            ]);
            wanted.extend(more);
            assert_eq!(actions(change), wanted);
            assert_eq!(
                change["Resource"],
                "arn:aws:autoscaling:*:*:autoScalingGroup:*:autoScalingGroupName/mirrors"
            );
            assert_eq!(
                change["Condition"],
                json!({ "StringEquals": { "aws:ResourceTag/registry-agent": "mirror" } })
            );
        }
    }

    #[test]
    fn a_target_group_that_the_group_keeps_is_only_looked_at() {
        let of = |attached| {
            statements(&Wanted {
                target_group: Some(TARGETS.to_owned()),
                attached,
                ..Wanted::default()
            })
        };
        let look = BTreeSet::from(["elasticloadbalancing:DescribeTargetHealth"]);
        assert_eq!(actions(&of(true)[0]), look);
        assert_eq!(of(true).len(), 1);
        let both = of(false);
        assert_eq!(actions(&both[0]), look);
        let change = BTreeSet::from([
            "elasticloadbalancing:RegisterTargets",
            "elasticloadbalancing:DeregisterTargets",
        ]);
        assert_eq!(actions(&both[1]), change);
        assert_eq!(both[1]["Resource"], TARGETS);
    }

    #[test]
    fn a_name_is_changed_and_no_other_of_the_zone() {
        let statements = of_a_name("Z1", "Docker-Mirror.example.com.");
        let change = &statements[1];
        assert_eq!(
            actions(change),
            BTreeSet::from(["route53:ChangeResourceRecordSets"])
        );
        assert_eq!(change["Resource"], "arn:aws:route53:::hostedzone/Z1");
        let conditions = &change["Condition"];
        let all = &conditions["ForAllValues:StringEquals"];
        assert_eq!(
            all["route53:ChangeResourceRecordSetsNormalizedRecordNames"],
            json!(["docker-mirror.example.com"])
        );
        assert_eq!(
            all["route53:ChangeResourceRecordSetsRecordTypes"],
            json!(["A", "AAAA"])
        );
        assert_eq!(
            all["route53:ChangeResourceRecordSetsActions"],
            json!(["UPSERT", "DELETE"])
        );
        // ForAllValues holds for a request without any.
        assert_eq!(
            conditions["Null"],
            json!({ "route53:ChangeResourceRecordSetsNormalizedRecordNames": "false" })
        );
    }

    /// The statements of a policy of the template, with its intrinsic functions resolved as far as
    /// is needed here, and every list in order.
    fn of_the_stack(policy: &str) -> BTreeSet<String> {
        let stack: Yaml = serde_yaml::from_str(include_str!("../../../../ami/stack.yaml")).unwrap();
        let properties = &stack["Resources"][policy]["Properties"];
        let statements = &properties["PolicyDocument"]["Statement"];
        let statements = statements.as_sequence().unwrap().iter();
        statements.map(|one| canonical(resolved(one))).collect()
    }

    fn resolved(value: &Yaml) -> Value {
        match value {
            Yaml::Tagged(tagged) => {
                let text = tagged.value.as_str().unwrap();
                let values = [
                    ("${AWS::Partition}", "aws"),
                    ("${AWS::Region}", "*"),
                    ("${AWS::AccountId}", "*"),
                    ("${AWS::StackName}", "mirrors"),
                    ("${RecordName}.${ZoneName}", "mirror.example.com"),
                    ("${Zone}", "Z1"),
                    ("${Bucket.Arn}", "arn:aws:s3:::images"),
                    // Of `!GetAtt`.
                    ("Bucket.Arn", "arn:aws:s3:::images"),
                ];
                let replace = |text: String, (from, to): &(&str, &str)| text.replace(from, to);
                values.iter().fold(text.to_owned(), replace).into()
            }
            Yaml::Mapping(mapping) => {
                let pairs = mapping.iter();
                pairs
                    .map(|(key, value)| (key.as_str().unwrap().to_owned(), resolved(value)))
                    .collect()
            }
            Yaml::Sequence(values) => values.iter().map(resolved).collect(),
            plain => serde_json::to_value(plain).unwrap(),
        }
    }

    fn canonical(mut statement: Value) -> String {
        let statement = statement.as_object_mut().unwrap();
        statement.remove("Sid");
        let actions = match statement.remove("Action").unwrap() {
            Value::Array(actions) => actions,
            one => vec![one],
        };
        let actions: BTreeSet<String> = actions.iter().map(ToString::to_string).collect();
        statement.insert("Action".to_owned(), json!(actions));
        format!("{statement:?}")
    }

    #[test]
    fn the_template_gives_its_instances_exactly_this() {
        let of = |wanted: &Wanted| -> BTreeSet<String> {
            statements(wanted).into_iter().map(canonical).collect()
        };
        assert_eq!(of_the_stack("FleetPolicy"), of(&group(false, false)));
        let name = Wanted {
            zone: Some("Z1".to_owned()),
            dns_name: Some("mirror.example.com".to_owned()),
            ..Wanted::default()
        };
        assert_eq!(of_the_stack("RecordPolicy"), of(&name));
        let targets = Wanted {
            target_group: Some(TARGETS.to_owned()),
            attached: true,
            ..Wanted::default()
        };
        assert_eq!(of_the_stack("TargetPolicy"), of(&targets));
    }

    #[test]
    fn the_template_gives_readers_and_writers_of_its_bucket_exactly_this() {
        let of = |role| -> BTreeSet<String> {
            let statements = of_a_bucket(role, "images", "", None);
            statements.into_iter().map(canonical).collect()
        };
        let mut stack = of_the_stack("ReaderPolicy");
        assert_eq!(stack, of(PolicyRole::Reader));
        // Whoever writes has both.
        stack.extend(of_the_stack("WriterPolicy"));
        assert_eq!(stack, of(PolicyRole::Writer));
    }
}
