//! Steps: each one call, whose effect is seen by the next look, and nowhere else.

use tokio::sync::watch;

use super::calls::Calls;
use super::facts::InstanceId;
use super::observe::Clients;
use super::plan::{Action, Step};
use crate::hosted::Hosted;

/// What is done to this agent itself.
pub(super) struct Agent {
    pub hosted: Hosted,
    /// Whether the service may stop.
    pub gone: watch::Sender<bool>,
}

/// Takes one step.
pub(super) async fn apply(
    step: &Step,
    own: &InstanceId,
    clients: &Clients,
    agent: &Agent,
    calls: &mut Calls,
) {
    let (action, why) = (&step.action, &step.why);
    let described = action.describe();
    if matches!(action, Action::Heartbeat { .. }) {
        tracing::debug!(%why, "fleet: {described}: {why}");
    } else {
        tracing::info!(%why, "fleet: {described}: {why}");
    }
    // The planner asks for nothing that nobody was made for.
    match action {
        Action::RefuseUploads => agent.hosted.refuse_uploads(),
        Action::LetGo => {
            agent.gone.send_replace(true);
        }
        Action::RegisterTarget | Action::DeregisterTarget => {
            if let Some(load_balancer) = &clients.load_balancer {
                if *action == Action::RegisterTarget {
                    calls
                        .make("RegisterTargets", load_balancer.register(own))
                        .await;
                } else {
                    calls
                        .make("DeregisterTargets", load_balancer.deregister(own))
                        .await;
                }
            }
        }
        Action::WriteOwnRecords { records } => {
            if let Some(dns) = &clients.dns {
                calls
                    .make("write own records", dns.write_own(own, records))
                    .await;
            }
        }
        Action::DeleteRecord { record } => {
            if let Some(dns) = &clients.dns {
                calls.make("delete record", dns.delete(record)).await;
            }
        }
        Action::Heartbeat { .. }
        | Action::CompleteHook { .. }
        | Action::AskForReplacement
        | Action::RaiseDesired { .. }
        | Action::Attach => tell_group(action, own, clients, calls).await,
    }
}

async fn tell_group(action: &Action, own: &InstanceId, clients: &Clients, calls: &mut Calls) {
    let Some(group) = &clients.autoscaling else {
        return;
    };
    match action {
        Action::Heartbeat { hook } => {
            calls
                .make("RecordLifecycleActionHeartbeat", group.heartbeat(own, hook))
                .await;
        }
        Action::CompleteHook { hook, abandon } => {
            let call = group.complete(own, hook, *abandon);
            calls.make("CompleteLifecycleAction", call).await;
        }
        Action::AskForReplacement => {
            calls
                .make("SetInstanceHealth", group.ask_for_replacement(own))
                .await;
        }
        Action::RaiseDesired { to } => {
            calls
                .make("SetDesiredCapacity", group.raise_desired(*to))
                .await;
        }
        Action::Attach => {
            calls.make("AttachInstances", group.attach(own)).await;
        }
        Action::RegisterTarget
        | Action::DeregisterTarget
        | Action::WriteOwnRecords { .. }
        | Action::DeleteRecord { .. }
        | Action::RefuseUploads
        | Action::LetGo => {}
    }
}
