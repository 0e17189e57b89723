//! The autoscaling group: what it says, and what it is told.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_config::SdkConfig;
use aws_sdk_autoscaling::Client;
use aws_sdk_autoscaling::types::{
    Activity, AutoScalingGroup, Instance, InstanceMaintenancePolicy, LifecycleHook,
};

use super::aws::{AwsError, failure};
use super::facts::{Group, Hook, InstanceId, LifecycleState, Member, Transition};

/// How long an abandoned launch counts.
const LATELY: Duration = Duration::from_hours(1);
/// Pages of activities that are read at most, of a hundred each: newest first.
const PAGES: usize = 10;
const PAGE: i32 = 100;
/// The group's own default of a hook.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_hours(1);

/// The group of the settings.
pub(super) struct Autoscaling {
    client: Client,
    group: String,
}

impl Autoscaling {
    pub fn new(config: &SdkConfig, group: &str) -> Self {
        Self {
            client: Client::new(config),
            group: group.to_owned(),
        }
    }

    /// The group as it is. Its hooks are read while one may hold this instance, and are none else.
    pub async fn group(
        &self,
        own: &InstanceId,
        target_group: Option<&str>,
    ) -> Result<Group, AwsError> {
        const OPERATION: &str = "DescribeAutoScalingGroups";
        let asked = self
            .client
            .describe_auto_scaling_groups()
            .auto_scaling_group_names(&self.group)
            .send();
        let answer = asked
            .await
            .map_err(|e| failure(OPERATION, &self.group, &e))?;
        let mut groups = answer.auto_scaling_groups().iter();
        let found = groups.find(|group| group.auto_scaling_group_name() == Some(&self.group));
        let found = found.ok_or_else(|| AwsError::NoGroup(self.group.clone()))?;
        let lacking = |lacking| AwsError::Lacking {
            operation: OPERATION,
            subject: self.group.clone(),
            lacking,
        };
        let count = |number: Option<i32>| number.and_then(|number| u32::try_from(number).ok());
        let mut group = Group {
            min: count(found.min_size()).ok_or_else(|| lacking("MinSize"))?,
            desired: count(found.desired_capacity()).ok_or_else(|| lacking("DesiredCapacity"))?,
            max: count(found.max_size()).ok_or_else(|| lacking("MaxSize"))?,
            launches_first: found
                .instance_maintenance_policy()
                .and_then(InstanceMaintenancePolicy::min_healthy_percentage)
                .is_some_and(|percentage| percentage >= 100),
            registers_targets: target_group.is_some_and(|arn| is_attached(found, arn)),
            hooks: Vec::new(),
            members: found.instances().iter().filter_map(member).collect(),
            complete: answer.next_token().is_none_or(str::is_empty),
        };
        let state = group.members.get(own).map(|member| &member.state);
        if state.is_some_and(may_be_held) {
            group.hooks = self.hooks().await?;
        }
        Ok(group)
    }

    async fn hooks(&self) -> Result<Vec<Hook>, AwsError> {
        let asked = self
            .client
            .describe_lifecycle_hooks()
            .auto_scaling_group_name(&self.group)
            .send();
        let answer = asked
            .await
            .map_err(|e| failure("DescribeLifecycleHooks", &self.group, &e))?;
        Ok(answer.lifecycle_hooks().iter().filter_map(hook).collect())
    }

    /// How many launches were abandoned in the last hour.
    pub async fn abandoned(&self) -> Result<u32, AwsError> {
        let since = SystemTime::now().checked_sub(LATELY);
        let mut abandoned = 0;
        let mut token = None;
        for _ in 0..PAGES {
            let asked = self
                .client
                .describe_scaling_activities()
                .auto_scaling_group_name(&self.group)
                .max_records(PAGE)
                .set_next_token(token)
                .send();
            let answer = asked
                .await
                .map_err(|e| failure("DescribeScalingActivities", &self.group, &e))?;
            let activities = answer.activities();
            let is_late = |activity: &&Activity| {
                let at = activity
                    .start_time()
                    .and_then(|at| SystemTime::try_from(*at).ok());
                at.is_none_or(|at| since.is_none_or(|since| at >= since))
            };
            let lately: Vec<&Activity> = activities.iter().filter(is_late).collect();
            abandoned += lately
                .iter()
                .filter(|activity| is_abandoned(activity))
                .count();
            token = answer.next_token().map(str::to_owned);
            token = token.filter(|token| !token.is_empty());
            if token.is_none() || lately.len() < activities.len() {
                break;
            }
        }
        Ok(u32::try_from(abandoned).unwrap_or(u32::MAX))
    }

    pub async fn heartbeat(&self, own: &InstanceId, hook: &str) -> Result<(), AwsError> {
        let asked = self
            .client
            .record_lifecycle_action_heartbeat()
            .auto_scaling_group_name(&self.group)
            .lifecycle_hook_name(hook)
            .instance_id(own.as_str())
            .send();
        let answer = asked.await;
        let answer = answer.map_err(|e| failure("RecordLifecycleActionHeartbeat", hook, &e));
        unless_over(answer.map(drop))
    }

    pub async fn complete(
        &self,
        own: &InstanceId,
        hook: &str,
        abandon: bool,
    ) -> Result<(), AwsError> {
        let asked = self
            .client
            .complete_lifecycle_action()
            .auto_scaling_group_name(&self.group)
            .lifecycle_hook_name(hook)
            .instance_id(own.as_str())
            .lifecycle_action_result(if abandon { "ABANDON" } else { "CONTINUE" })
            .send();
        let answer = asked.await;
        let answer = answer.map_err(|e| failure("CompleteLifecycleAction", hook, &e));
        unless_over(answer.map(drop))
    }

    pub async fn ask_for_replacement(&self, own: &InstanceId) -> Result<(), AwsError> {
        let asked = self
            .client
            .set_instance_health()
            .instance_id(own.as_str())
            .health_status("Unhealthy")
            .should_respect_grace_period(true)
            .send();
        let answer = asked.await;
        answer
            .map(drop)
            .map_err(|e| failure("SetInstanceHealth", own, &e))
    }

    pub async fn raise_desired(&self, to: u32) -> Result<(), AwsError> {
        let asked = self
            .client
            .set_desired_capacity()
            .auto_scaling_group_name(&self.group)
            .desired_capacity(i32::try_from(to).unwrap_or(i32::MAX))
            .send();
        let answer = asked.await;
        answer
            .map(drop)
            .map_err(|e| failure("SetDesiredCapacity", &self.group, &e))
    }

    pub async fn attach(&self, own: &InstanceId) -> Result<(), AwsError> {
        let asked = self
            .client
            .attach_instances()
            .auto_scaling_group_name(&self.group)
            .instance_ids(own.as_str())
            .send();
        let answer = asked.await;
        answer
            .map(drop)
            .map_err(|e| failure("AttachInstances", own, &e))
    }
}

/// Completed by a call whose reply was lost, or timed out: what it is now is seen by the next look.
fn unless_over(answer: Result<(), AwsError>) -> Result<(), AwsError> {
    match answer {
        Err(error) if error.says("ValidationError", "No active Lifecycle Action") => {
            tracing::info!("the hook holds this instance no more: {error}");
            Ok(())
        }
        answer => answer,
    }
}

/// Whether a hook holds an instance in this state, or will.
fn may_be_held(state: &LifecycleState) -> bool {
    state.is_pending() || state.is_terminating() || *state == LifecycleState::WarmedPendingWait
}

fn is_attached(group: &AutoScalingGroup, arn: &str) -> bool {
    let mut arns = group.target_group_arns().iter();
    let mut sources = group.traffic_sources().iter();
    arns.any(|attached| attached == arn) || sources.any(|source| source.identifier() == Some(arn))
}

fn member(instance: &Instance) -> Option<(InstanceId, Member)> {
    let state = instance.lifecycle_state()?.as_str().to_owned();
    let member = Member {
        state: LifecycleState::from(state),
        healthy: instance.health_status() == Some("Healthy"),
        zone: instance.availability_zone().map(Arc::from),
    };
    Some((InstanceId::new(instance.instance_id()?), member))
}

fn hook(hook: &LifecycleHook) -> Option<Hook> {
    let transition = match hook.lifecycle_transition()? {
        "autoscaling:EC2_INSTANCE_LAUNCHING" => Transition::Launching,
        "autoscaling:EC2_INSTANCE_TERMINATING" => Transition::Terminating,
        _ => return None,
    };
    let timeout = hook
        .heartbeat_timeout()
        .and_then(|it| u64::try_from(it).ok());
    Some(Hook {
        name: hook.lifecycle_hook_name()?.to_owned(),
        transition,
        heartbeat_timeout: timeout.map_or(HEARTBEAT_TIMEOUT, Duration::from_secs),
    })
}

/// A launch whose hook was answered `ABANDON`, or ran out: the group cancels it, and says why in a
/// sentence alone.
fn is_abandoned(activity: &Activity) -> bool {
    let launch = activity
        .description()
        .is_some_and(|text| text.starts_with("Launching"));
    let said = activity.status_message().unwrap_or_default().to_lowercase();
    launch && said.contains("abandon")
}
