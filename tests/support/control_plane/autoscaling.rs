//! The calls of Amazon EC2 Auto Scaling.

use std::time::Duration;

use super::group::{Group, Phase, Refresh};
use super::wire::{ApiError, Params};
use super::world::World;
use super::xml::{leaf, members};

mod describe;

use describe::activity;

/// Operations whose answers have no result element.
pub const WITHOUT_RESULT: [&str; 3] =
    ["SetInstanceHealth", "SetDesiredCapacity", "AttachInstances"];

/// Answers a call with what goes into its result.
pub fn answer(world: &mut World, operation: &str, params: &Params) -> Result<String, ApiError> {
    match operation {
        "DescribeAutoScalingGroups" => describe::describe_groups(world, params),
        "DescribeAutoScalingInstances" => describe::describe_instances(world, params),
        "DescribeLifecycleHooks" => describe::describe_hooks(world, params),
        "DescribeScalingActivities" => describe::describe_activities(world, params),
        "DescribeInstanceRefreshes" => describe::describe_refreshes(world, params),
        "CompleteLifecycleAction" => complete(world, params),
        "RecordLifecycleActionHeartbeat" => heartbeat(world, params),
        "SetInstanceHealth" => set_health(world, params),
        "SetDesiredCapacity" => set_desired(world, params),
        "AttachInstances" => attach(world, params),
        "DetachInstances" => detach(world, params),
        "EnterStandby" => enter_standby(world, params),
        "ExitStandby" => exit_standby(world, params),
        "StartInstanceRefresh" => start_refresh(world, params),
        _ => Err(ApiError::new(
            400,
            "InvalidAction",
            format!("Could not find operation {operation} for version 2011-01-01"),
        )),
    }
}

/// The group of a call, out of the world while the call changes it.
fn with_group<T>(
    world: &mut World,
    params: &Params,
    change: impl FnOnce(&mut Group, &mut World) -> Result<T, ApiError>,
) -> Result<T, ApiError> {
    let name = params.need("AutoScalingGroupName")?;
    let Some(mut group) = world.groups.remove(name) else {
        return Err(ApiError::validation(format!(
            "AutoScalingGroup name not found - AutoScalingGroup '{name}' not found"
        )));
    };
    let result = change(&mut group, world);
    world.groups.insert(name.to_owned(), group);
    result
}

/// The instance and hook of a lifecycle action that goes on.
fn action(group: &Group, params: &Params) -> Result<(String, String), ApiError> {
    let hook = params.need("LifecycleHookName")?;
    let (id, token) = (params.get("InstanceId"), params.get("LifecycleActionToken"));
    let held = group.members.iter().find(|(member, it)| {
        let mut holds = it.holds.iter().filter(|hold| hold.hook == hook);
        holds.any(|hold| id == Some(member) || token == Some(&hold.token))
    });
    let none = || {
        let by = match (id, token) {
            (_, Some(token)) => format!("token {token}"),
            (id, None) => format!("instance ID {}", id.unwrap_or("null")),
        };
        ApiError::validation(format!("No active Lifecycle Action found with {by}"))
    };
    held.map(|(id, _)| (id.clone(), hook.to_owned()))
        .ok_or_else(none)
}

const ACTION: [&str; 4] = [
    "AutoScalingGroupName",
    "LifecycleHookName",
    "InstanceId",
    "LifecycleActionToken",
];

fn complete(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&[ACTION.as_slice(), &["LifecycleActionResult"]].concat())?;
    let continues = match params.need("LifecycleActionResult")? {
        "CONTINUE" => true,
        "ABANDON" => false,
        _ => {
            let what = "Lifecycle Action Result should be either CONTINUE or ABANDON";
            return Err(ApiError::validation(what));
        }
    };
    with_group(world, params, |group, world| {
        let (id, hook) = action(group, params)?;
        let why = "Lifecycle Action Completed with ABANDON Result";
        group.let_go(&id, &hook, continues, why, &mut world.rest);
        Ok(String::new())
    })
}

fn heartbeat(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&ACTION)?;
    with_group(world, params, |group, world| {
        let (id, hook) = action(group, params)?;
        let timeout = group
            .hooks
            .iter()
            .find(|it| it.name == hook)
            .map(|it| it.timeout);
        let holds = group.members.get_mut(&id).map(|it| it.holds.iter_mut());
        for hold in holds.into_iter().flatten().filter(|it| it.hook == hook) {
            hold.until = (world.rest.now + timeout.unwrap_or_default()).min(hold.last);
        }
        Ok(String::new())
    })
}

fn set_health(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&["InstanceId", "HealthStatus", "ShouldRespectGracePeriod"])?;
    let id = params.need("InstanceId")?;
    let healthy = match params.need("HealthStatus")? {
        "Healthy" => true,
        "Unhealthy" => false,
        _ => {
            let what = "Valid instance health states are: [Healthy, Unhealthy]";
            return Err(ApiError::validation(what));
        }
    };
    let respects = params.truth("ShouldRespectGracePeriod")?.unwrap_or(true);
    let now = world.rest.now;
    let mut groups = world.groups.values_mut();
    let found = groups.find_map(|it| Some((it.grace, it.members.get_mut(id)?)));
    let (grace, member) = found.ok_or_else(|| {
        ApiError::validation(format!(
            "Instance Id not found - No managed instance found for instance ID: {id}"
        ))
    })?;
    let graced = member.in_service.is_none_or(|since| now < since + grace) && !grace.is_zero();
    if healthy || !respects || !graced {
        member.healthy = healthy;
    }
    Ok(String::new())
}

fn set_desired(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&["AutoScalingGroupName", "DesiredCapacity", "HonorCooldown"])?;
    let honors = params.truth("HonorCooldown")?.unwrap_or(false);
    let wanted = params.number("DesiredCapacity")?;
    with_group(world, params, |group, _| {
        let wanted = wanted.ok_or_else(|| ApiError::validation("DesiredCapacity is missing"))?;
        for (bound, beyond, word) in [
            (group.max, wanted > u64::from(group.max), "above max"),
            (group.min, wanted < u64::from(group.min), "below min"),
        ] {
            if beyond {
                let what = format!(
                    "New SetDesiredCapacity value {wanted} is {word} value {bound} for the \
                     AutoScalingGroup."
                );
                return Err(ApiError::validation(what));
            }
        }
        let busy = group.activities.iter().find(|it| it.ended.is_none());
        if let Some(busy) = busy.filter(|_| honors) {
            let what = format!(
                "Scaling activity {} is in progress and blocks this action",
                busy.id
            );
            return Err(ApiError::new(400, "ScalingActivityInProgress", what));
        }
        group.desired = u32::try_from(wanted).unwrap();
        Ok(String::new())
    })
}

/// The instances of a call, all of them in this phase.
fn in_phase(group: &Group, params: &Params, phase: Phase) -> Result<Vec<String>, ApiError> {
    let ids = params.list("InstanceIds");
    for id in &ids {
        let member = group.members.get(*id).ok_or_else(|| {
            let name = &group.name;
            ApiError::validation(format!(
                "The instance {id} is not part of Auto Scaling group {name}."
            ))
        })?;
        if member.phase != phase {
            return Err(ApiError::validation(format!(
                "The instance {id} is not in {}.",
                phase.as_str()
            )));
        }
    }
    Ok(ids.into_iter().map(str::to_owned).collect())
}

fn attach(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&["AutoScalingGroupName", "InstanceIds"])?;
    let ids = params.list("InstanceIds");
    let taken = |id: &&str| world.groups.values().any(|it| it.members.contains_key(*id));
    let running = |id: &&str| world.rest.instances.get(*id).is_some_and(|it| it.running);
    if let Some(id) = ids.iter().find(|id| !running(id)) {
        let what = format!("Invalid Instance ID(s): [{id}] are not in a valid state.");
        return Err(ApiError::validation(what));
    }
    if let Some(id) = ids.iter().find(|id| taken(id)) {
        let what = format!("Instance {id} is already part of an Auto Scaling group.");
        return Err(ApiError::validation(what));
    }
    with_group(world, params, |group, world| {
        let wanted = group.desired + u32::try_from(ids.len()).unwrap();
        if wanted > group.max {
            let what = format!(
                "AutoScalingGroup capacity {wanted} would exceed the maximum capacity {}",
                group.max
            );
            return Err(ApiError::validation(what));
        }
        group.desired = wanted;
        for id in ids {
            let what = "Attaching an existing EC2 instance";
            group.begin(
                id,
                Phase::Pending,
                what,
                "instances were attached",
                &mut world.rest,
            );
            if let Some(instance) = world.rest.instances.get_mut(id) {
                instance.detached = false;
            }
        }
        Ok(String::new())
    })
}

/// Out of service, with the desired capacity or without it.
fn take_out(
    world: &mut World,
    params: &Params,
    phase: Phase,
    what: &str,
) -> Result<String, ApiError> {
    params.only(&[
        "AutoScalingGroupName",
        "InstanceIds",
        "ShouldDecrementDesiredCapacity",
    ])?;
    let decrement = params.truth("ShouldDecrementDesiredCapacity")?;
    with_group(world, params, |group, world| {
        let decrement = decrement.ok_or_else(|| {
            ApiError::validation("ShouldDecrementDesiredCapacity must be specified")
        })?;
        let ids = in_phase(group, params, Phase::InService)?;
        if decrement {
            let left = group
                .desired
                .saturating_sub(u32::try_from(ids.len()).unwrap());
            if left < group.min {
                let what = format!(
                    "AutoScalingGroup {} has min-size={}, max-size={}, and desired-size={}. To \
                     place into standby or detach {} instance, please update the AutoScalingGroup \
                     sizes appropriately.",
                    group.name,
                    group.min,
                    group.max,
                    group.desired,
                    ids.len()
                );
                return Err(ApiError::validation(what));
            }
            group.desired = left;
        }
        let mut described = Vec::new();
        for id in ids {
            group.leave_target_groups(&id, &mut world.rest);
            group.begin(&id, phase, what, "at the user's request", &mut world.rest);
            if phase == Phase::Detaching
                && let Some(instance) = world.rest.instances.get_mut(&id)
            {
                instance.detached = true;
            }
            let last = group.last_activity(&id).cloned();
            described.extend(last.map(|it| activity(world, group, &it)));
        }
        Ok(members("Activities", described))
    })
}

fn detach(world: &mut World, params: &Params) -> Result<String, ApiError> {
    take_out(world, params, Phase::Detaching, "Detaching EC2 instance")
}

fn enter_standby(world: &mut World, params: &Params) -> Result<String, ApiError> {
    take_out(
        world,
        params,
        Phase::EnteringStandby,
        "Moving EC2 instance to Standby",
    )
}

fn exit_standby(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&["AutoScalingGroupName", "InstanceIds"])?;
    with_group(world, params, |group, world| {
        let ids = in_phase(group, params, Phase::Standby)?;
        let wanted = group.desired + u32::try_from(ids.len()).unwrap();
        if wanted > group.max {
            let what = format!(
                "AutoScalingGroup capacity {wanted} would exceed the maximum capacity {}",
                group.max
            );
            return Err(ApiError::validation(what));
        }
        group.desired = wanted;
        let mut described = Vec::new();
        for id in ids {
            let what = "Moving EC2 instance out of Standby";
            // No hook holds it on this way.
            let cause = "at the user's request";
            group.begin(&id, Phase::PendingProceed, what, cause, &mut world.rest);
            let last = group.last_activity(&id).cloned();
            described.extend(last.map(|it| activity(world, group, &it)));
        }
        Ok(members("Activities", described))
    })
}

fn start_refresh(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&["AutoScalingGroupName", "Strategy", "Preferences"])?;
    let strategy = params.get("Strategy").unwrap_or("Rolling");
    if strategy != "Rolling" {
        return Err(ApiError::new(501, "NotImplemented", strategy));
    }
    let preference = |name: &str| params.number(&format!("Preferences.{name}"));
    let (least, most) = (
        preference("MinHealthyPercentage")?,
        preference("MaxHealthyPercentage")?,
    );
    let warmup = Duration::from_secs(preference("InstanceWarmup")?.unwrap_or(0));
    with_group(world, params, |group, world| {
        if group.refreshes.last().is_some_and(|it| it.ended.is_none()) {
            let what = "An Instance Refresh is already in progress and blocks the execution of this \
                        Instance Refresh.";
            return Err(ApiError::new(400, "InstanceRefreshInProgress", what));
        }
        let launches_first = match (least, most) {
            (None, None) => group.launches_first(),
            (least, most) => least.is_some_and(|it| it >= 100) && most.is_some_and(|it| it > 100),
        };
        let id = world.rest.uuid();
        group.refreshes.push(Refresh {
            id: id.clone(),
            status: "Pending",
            began: world.rest.now,
            ended: None,
            old: group.members.keys().cloned().collect(),
            queue: group.members.keys().cloned().collect(),
            min_healthy: least.unwrap_or(90).min(100),
            launches_first,
            warmup,
        });
        Ok(leaf("InstanceRefreshId", id))
    })
}
