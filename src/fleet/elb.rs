//! The load balancer's target group.
//!
//! In an autoscaling group a target is an instance, as the group itself registers it; in a static
//! list it is an address. The port is the target group's own.

use std::collections::BTreeMap;

use aws_config::SdkConfig;
use aws_sdk_elasticloadbalancingv2::Client;
use aws_sdk_elasticloadbalancingv2::types::{
    TargetDescription, TargetHealth, TargetHealthReasonEnum, TargetHealthStateEnum,
};

use super::aws::{AwsError, failure};
use super::facts::{InstanceId, TargetState};

/// The target group of the settings.
pub(super) struct LoadBalancer {
    client: Client,
    target_group: String,
}

impl LoadBalancer {
    pub fn new(config: &SdkConfig, target_group: &str) -> Self {
        Self {
            client: Client::new(config),
            target_group: target_group.to_owned(),
        }
    }

    /// This instance as a target; nothing where it is none.
    pub async fn own(&self, own: &InstanceId) -> Result<Option<TargetState>, AwsError> {
        Ok(self.targets(Some(own)).await?.remove(own))
    }

    /// All targets, or one.
    pub async fn targets(
        &self,
        only: Option<&InstanceId>,
    ) -> Result<BTreeMap<InstanceId, TargetState>, AwsError> {
        let asked = self
            .client
            .describe_target_health()
            .target_group_arn(&self.target_group)
            .set_targets(only.map(|id| vec![target(id)]))
            .send();
        let answer = asked
            .await
            .map_err(|e| failure("DescribeTargetHealth", &self.target_group, &e))?;
        let targets = answer.target_health_descriptions().iter();
        let known = targets.filter_map(|one| {
            let id = InstanceId::new(one.target()?.id()?);
            Some((id, state(one.target_health()?)?))
        });
        let mut states = BTreeMap::new();
        for (id, state) in known {
            // One that is registered at several ports serves where it serves at any.
            let before = states.entry(id).or_insert(state);
            if rank(state) > rank(*before) {
                *before = state;
            }
        }
        Ok(states)
    }

    pub async fn register(&self, own: &InstanceId) -> Result<(), AwsError> {
        let asked = self
            .client
            .register_targets()
            .target_group_arn(&self.target_group)
            .targets(target(own))
            .send();
        let answer = asked.await;
        answer
            .map(drop)
            .map_err(|e| failure("RegisterTargets", own, &e))
    }

    pub async fn deregister(&self, own: &InstanceId) -> Result<(), AwsError> {
        let asked = self
            .client
            .deregister_targets()
            .target_group_arn(&self.target_group)
            .targets(target(own))
            .send();
        let answer = asked.await;
        answer
            .map(drop)
            .map_err(|e| failure("DeregisterTargets", own, &e))
    }
}

fn target(id: &InstanceId) -> TargetDescription {
    TargetDescription::builder().id(id.as_str()).build()
}

fn rank(state: TargetState) -> u8 {
    match state {
        TargetState::Draining => 0,
        TargetState::Unhealthy => 1,
        TargetState::Initial => 2,
        TargetState::Healthy => 3,
    }
}

/// A target's state; nothing for what is not registered, which is asked about all the same.
fn state(health: &TargetHealth) -> Option<TargetState> {
    Some(match health.state()? {
        TargetHealthStateEnum::Initial => TargetState::Initial,
        TargetHealthStateEnum::Healthy => TargetState::Healthy,
        TargetHealthStateEnum::Draining | TargetHealthStateEnum::UnhealthyDraining => {
            TargetState::Draining
        }
        TargetHealthStateEnum::Unused
            if health.reason() == Some(&TargetHealthReasonEnum::NotRegistered) =>
        {
            return None;
        }
        _ => TargetState::Unhealthy,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_is_not_registered_is_none_and_what_is_new_gets_no_requests() {
        let of = |said: &str, reason: Option<&str>| {
            let health = TargetHealth::builder()
                .state(said.into())
                .set_reason(reason.map(Into::into))
                .build();
            state(&health)
        };
        for (said, reason, expected) in [
            (
                "initial",
                Some("Elb.RegistrationInProgress"),
                Some(TargetState::Initial),
            ),
            ("healthy", None, Some(TargetState::Healthy)),
            (
                "unhealthy",
                Some("Target.Timeout"),
                Some(TargetState::Unhealthy),
            ),
            (
                "unused",
                Some("Target.NotInUse"),
                Some(TargetState::Unhealthy),
            ),
            ("unused", Some("Target.NotRegistered"), None),
            ("draining", None, Some(TargetState::Draining)),
            ("unhealthy.draining", None, Some(TargetState::Draining)),
            ("of_tomorrow", None, Some(TargetState::Unhealthy)),
        ] {
            assert_eq!(of(said, reason), expected, "{said} {reason:?}");
        }
    }
}
