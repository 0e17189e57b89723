//! The calls that change nothing.

use super::super::group::{Activity, Group, Member, Refresh};
use super::super::wire::{ApiError, Params};
use super::super::world::World;
use super::super::xml::{date, leaf, leaf_of, members, node};
use super::with_group;

/// A page of a list, and the token for the next: how many came before.
fn page<'a, T>(
    all: &'a [T],
    params: &Params,
    usual: u64,
    most: u64,
) -> Result<(&'a [T], Option<usize>), ApiError> {
    let size = params.number("MaxRecords")?.unwrap_or(usual);
    if !(1..=most).contains(&size) {
        let what = format!(
            "1 validation error detected: Value '{size}' at 'maxRecords' failed to satisfy \
             constraint: Member must have value less than or equal to {most}"
        );
        return Err(ApiError::validation(what));
    }
    let from = match params.get("NextToken") {
        None => 0,
        Some(token) => token
            .parse()
            .ok()
            .filter(|from| *from <= all.len())
            .ok_or_else(|| {
                ApiError::new(400, "InvalidNextToken", format!("Invalid token: '{token}'"))
            })?,
    };
    let to = all.len().min(from + usize::try_from(size).unwrap());
    Ok((&all[from..to], (to < all.len()).then_some(to)))
}

pub(super) fn describe_groups(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&[
        "AutoScalingGroupNames",
        "MaxRecords",
        "NextToken",
        "IncludeInstances",
    ])?;
    let names = params.list("AutoScalingGroupNames");
    let instances = params.truth("IncludeInstances")?.unwrap_or(true);
    let wanted = |group: &&Group| names.is_empty() || names.contains(&group.name.as_str());
    let all: Vec<&Group> = world.groups.values().filter(wanted).collect();
    let (page, next) = page(&all, params, 50, 100)?;
    let described = page.iter().map(|group| describe(world, group, instances));
    Ok(members("AutoScalingGroups", described) + &leaf_of("NextToken", next))
}

fn describe(world: &World, group: &Group, instances: bool) -> String {
    let described = group.members.iter().filter(|_| instances);
    let described = described.map(|(id, member)| instance(id, member));
    let tag = |(key, value): (&String, &String)| {
        leaf("ResourceId", &group.name)
            + &leaf("ResourceType", "auto-scaling-group")
            + &leaf("Key", key)
            + &leaf("Value", value)
            + &leaf("PropagateAtLaunch", true)
    };
    let policy = group.maintenance.map(|(least, most)| {
        let policy = leaf("MinHealthyPercentage", least) + &leaf("MaxHealthyPercentage", most);
        node("InstanceMaintenancePolicy", policy)
    });
    let suspended = ["Launch", "Terminate"]
        .into_iter()
        .filter(|_| group.suspended);
    [
        leaf("AutoScalingGroupName", &group.name),
        leaf("AutoScalingGroupARN", group.arn()),
        leaf("MinSize", group.min),
        leaf("MaxSize", group.max),
        leaf("DesiredCapacity", group.desired),
        leaf("DefaultCooldown", 300),
        members("AvailabilityZones", group.zones.iter().cloned()),
        node("LoadBalancerNames", ""),
        members("TargetGroupARNs", group.target_groups.iter().cloned()),
        leaf("HealthCheckType", "EC2"),
        leaf("HealthCheckGracePeriod", group.grace.as_secs()),
        members("Instances", described),
        leaf("CreatedTime", date(world.rest.origin, group.created)),
        members(
            "SuspendedProcesses",
            suspended.map(|it| leaf("ProcessName", it)),
        ),
        leaf("VPCZoneIdentifier", ""),
        node("EnabledMetrics", ""),
        members("Tags", group.tags.iter().map(tag)),
        node("TerminationPolicies", node("member", "Default")),
        leaf("NewInstancesProtectedFromScaleIn", false),
        policy.unwrap_or_default(),
    ]
    .concat()
}

fn health(member: &Member) -> &'static str {
    if member.healthy {
        "Healthy"
    } else {
        "Unhealthy"
    }
}

fn instance(id: &str, member: &Member) -> String {
    [
        leaf("InstanceId", id),
        leaf("InstanceType", "m7i.large"),
        leaf("AvailabilityZone", &member.zone),
        leaf("LifecycleState", member.phase.as_str()),
        leaf("HealthStatus", health(member)),
        leaf("ProtectedFromScaleIn", member.protected),
    ]
    .concat()
}

pub(super) fn describe_instances(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&["InstanceIds", "MaxRecords", "NextToken"])?;
    let wanted = params.list("InstanceIds");
    let all: Vec<(&Group, &String, &Member)> = world
        .groups
        .values()
        .flat_map(|group| group.members.iter().map(move |(id, it)| (group, id, it)))
        // One that is not there is simply missing in the answer.
        .filter(|(_, id, _)| wanted.is_empty() || wanted.contains(&id.as_str()))
        .collect();
    let (page, next) = page(&all, params, 50, 50)?;
    let described = page.iter().map(|(group, id, member)| {
        // This answer says it in capitals.
        let health = leaf("HealthStatus", health(member).to_uppercase());
        leaf("InstanceId", id)
            + &leaf("InstanceType", "m7i.large")
            + &leaf("AutoScalingGroupName", &group.name)
            + &leaf("AvailabilityZone", &member.zone)
            + &leaf("LifecycleState", member.phase.as_str())
            + &health
            + &leaf("ProtectedFromScaleIn", member.protected)
    });
    Ok(members("AutoScalingInstances", described) + &leaf_of("NextToken", next))
}

pub(super) fn describe_hooks(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&["AutoScalingGroupName", "LifecycleHookNames"])?;
    let names = params.list("LifecycleHookNames");
    with_group(world, params, |group, _| {
        let hooks = group.hooks.iter();
        let hooks = hooks.filter(|it| names.is_empty() || names.contains(&it.name.as_str()));
        let described = hooks.map(|hook| {
            leaf("LifecycleHookName", &hook.name)
                + &leaf("AutoScalingGroupName", &group.name)
                + &leaf("LifecycleTransition", hook.transition.as_str())
                + &leaf("HeartbeatTimeout", hook.timeout.as_secs())
                + &leaf("GlobalTimeout", hook.global_timeout().as_secs())
                + &leaf(
                    "DefaultResult",
                    if hook.continues {
                        "CONTINUE"
                    } else {
                        "ABANDON"
                    },
                )
        });
        Ok(members("LifecycleHooks", described))
    })
}

pub(super) fn activity(world: &World, group: &Group, activity: &Activity) -> String {
    let date = |at| date(world.rest.origin, at);
    [
        leaf("ActivityId", &activity.id),
        leaf("AutoScalingGroupName", &group.name),
        leaf("Description", &activity.description),
        leaf("Cause", &activity.cause),
        leaf("StartTime", date(activity.began)),
        leaf_of("EndTime", activity.ended.map(date)),
        leaf("StatusCode", activity.status),
        leaf_of("StatusMessage", activity.message.as_ref()),
        leaf("Progress", if activity.ended.is_some() { 100 } else { 50 }),
        leaf("Details", "{}"),
        leaf("AutoScalingGroupARN", group.arn()),
    ]
    .concat()
}

pub(super) fn describe_activities(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&[
        "AutoScalingGroupName",
        "ActivityIds",
        "MaxRecords",
        "NextToken",
    ])?;
    let wanted = params.list("ActivityIds");
    with_group(world, params, |group, world| {
        let all = group.activities.iter().rev();
        let all = all.filter(|it| wanted.is_empty() || wanted.contains(&it.id.as_str()));
        let all: Vec<&Activity> = all.collect();
        let (page, next) = page(&all, params, 100, 100)?;
        let described = page.iter().map(|it| activity(world, group, it));
        Ok(members("Activities", described) + &leaf_of("NextToken", next))
    })
}

pub(super) fn describe_refreshes(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&[
        "AutoScalingGroupName",
        "InstanceRefreshIds",
        "MaxRecords",
        "NextToken",
    ])?;
    let wanted = params.list("InstanceRefreshIds");
    with_group(world, params, |group, world| {
        let all = group.refreshes.iter().rev();
        let all = all.filter(|it| wanted.is_empty() || wanted.contains(&it.id.as_str()));
        let all: Vec<&Refresh> = all.collect();
        let (page, next) = page(&all, params, 50, 100)?;
        let date = |at| date(world.rest.origin, at);
        let described = page.iter().map(|refresh| {
            leaf("InstanceRefreshId", &refresh.id)
                + &leaf("AutoScalingGroupName", &group.name)
                + &leaf("Status", refresh.status)
                + &leaf("StartTime", date(refresh.began))
                + &leaf_of("EndTime", refresh.ended.map(date))
                + &leaf("InstancesToUpdate", refresh.queue.len())
        });
        Ok(members("InstanceRefreshes", described) + &leaf_of("NextToken", next))
    })
}
