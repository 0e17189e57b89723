//! The server: a request is read, goes wrong or not, and is answered.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;

use super::faults::{Called, Fault};
use super::wire::{ApiError, Params, Reply, Service, Signed};
use super::world::World;
use super::{Core, autoscaling, checks, elb, imds, route53};

/// How often a clock that goes by itself is looked at.
const TICK: Duration = Duration::from_millis(20);
/// How often targets are checked.
const CHECKS: Duration = Duration::from_secs(1);

pub async fn tick(core: Arc<Core>) {
    let mut ticks = tokio::time::interval(TICK);
    loop {
        ticks.tick().await;
        let mut state = core.lock();
        state.settle();
        core.carry_out(&mut state);
    }
}

/// Health checks, where real requests make them.
pub async fn keep_checking(core: Arc<Core>) {
    let mut intervals = tokio::time::interval(CHECKS);
    loop {
        intervals.tick().await;
        checks::check(&core).await;
    }
}

/// Serves the APIs, or an instance's metadata. Its connections end with it.
pub async fn serve(listener: TcpListener, core: Arc<Core>, instance: Option<String>) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (core, instance) = (Arc::clone(&core), instance.clone());
        connections.spawn(async move {
            let answer = service_fn(move |request| {
                let (core, instance) = (Arc::clone(&core), instance.clone());
                async move {
                    match instance {
                        Some(instance) => metadata(&core, &instance, &request).await,
                        None => call(&core, request).await,
                    }
                }
            });
            let serving = hyper::server::conn::http1::Builder::new();
            // A client that goes away, or one that is left on purpose.
            let _ = serving.serve_connection(TokioIo::new(stream), answer).await;
        });
    }
}

/// The connection ends here, without an answer.
#[derive(Debug)]
struct Cut;

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("cut by the test")
    }
}

impl std::error::Error for Cut {}

type Answered = Result<Response<Full<Bytes>>, Cut>;

fn response(status: u16, kind: &str, body: String) -> Response<Full<Bytes>> {
    let response = Response::builder()
        .status(status)
        .header("content-type", kind);
    response.body(Full::new(body.into())).expect("an answer")
}

async fn metadata(core: &Arc<Core>, instance: &str, request: &Request<Incoming>) -> Answered {
    let path = request.uri().path();
    let operation = format!("{} {path}", request.method());
    let (fault, (status, ttl, body)) = {
        let mut state = core.lock();
        state.settle();
        let fault = state.faults.strike_metadata(&operation, instance);
        let answer = match &fault {
            None | Some(Fault::LoseReply) => imds::answer(
                &mut state,
                instance,
                request.method(),
                path,
                request.headers(),
            ),
            Some(Fault::Throttle) => (429, None, String::new()),
            Some(Fault::Status(status)) => (*status, None, String::new()),
            Some(Fault::Refuse(error)) => (error.status, None, String::new()),
            Some(Fault::Hang) => (0, None, String::new()),
            Some(Fault::Stale(_)) => panic!("metadata is never stale: say what it should be"),
        };
        let called = Called {
            at: state.world.rest.now,
            operation,
            caller: instance.to_owned(),
            refused: (answer.0 != 200).then(|| answer.0.to_string()),
        };
        state.faults.calls.push(called);
        (fault, answer)
    };
    match fault {
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::LoseReply) => Err(Cut),
        _ => {
            let mut response = response(status, "text/plain", body);
            if let Some(ttl) = ttl {
                let name = "x-aws-ec2-metadata-token-ttl-seconds";
                response.headers_mut().insert(name, ttl.into());
            }
            Ok(response)
        }
    }
}

/// A call to an API, read from the wire.
struct Asked {
    signed: Signed,
    operation: String,
    method: String,
    path: String,
    query: String,
    body: String,
}

async fn call(core: &Arc<Core>, request: Request<Incoming>) -> Answered {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
    let signed = match Signed::read(&head.headers, &core.options.region) {
        Ok(signed) => signed,
        Err(error) => {
            let reply = error.into_reply(Service::Autoscaling, "unsigned");
            return Ok(response(reply.status, "text/xml", reply.body));
        }
    };
    let body = String::from_utf8_lossy(&body).into_owned();
    let operation = operation(&signed, head.method.as_str(), head.uri.path(), &body);
    let asked = Asked {
        signed,
        operation,
        method: head.method.to_string(),
        path: head.uri.path().to_owned(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        body,
    };
    match decide(core, &asked) {
        Outcome::Reply(reply) => Ok(response(reply.status, "text/xml", reply.body)),
        Outcome::Lost => Err(Cut),
        Outcome::Hang => std::future::pending().await,
    }
}

/// What a call is called.
fn operation(signed: &Signed, method: &str, path: &str, body: &str) -> String {
    match signed.service {
        Service::Route53 if path.ends_with("/rrset") || path.ends_with("/rrset/") => {
            let change = method == "POST";
            if change {
                "ChangeResourceRecordSets"
            } else {
                "ListResourceRecordSets"
            }
            .to_owned()
        }
        Service::Route53 if path.contains("/change/") => "GetChange".to_owned(),
        Service::Route53 => format!("{method} {path}"),
        Service::Autoscaling | Service::LoadBalancing => {
            let params = Params::parse(body.as_bytes());
            params.get("Action").unwrap_or_default().to_owned()
        }
    }
}

enum Outcome {
    Reply(Reply),
    Lost,
    Hang,
}

/// What happens to a call: faults on its way first, then what the account says.
fn decide(core: &Arc<Core>, asked: &Asked) -> Outcome {
    let mut state = core.lock();
    state.settle();
    let (at, service) = (state.world.rest.now, asked.signed.service);
    let caller = state.caller(&asked.signed);
    let who = caller
        .clone()
        .unwrap_or_else(|_| asked.signed.access_key.clone());
    let fault = state.faults.strike(&asked.operation, &who);
    let result = match (&fault, caller) {
        (Some(Fault::Hang), _) => Err(ApiError::new(0, "hang", "")),
        (Some(Fault::Status(status)), _) => Err(ApiError::new(*status, "status", "")),
        (_, Err(error)) => Err(error),
        (Some(Fault::Refuse(error)), _) => Err(error.clone()),
        (Some(Fault::Throttle), _) => Err(ApiError::throttled()),
        _ if !state.faults.allows(service, at) => Err(ApiError::throttled()),
        (Some(Fault::Stale(age)), _) => {
            let mut past = state.ago(*age);
            let reads = ["Describe", "List", "Get"];
            assert!(
                reads.iter().any(|read| asked.operation.starts_with(read)),
                "{} is no read, and is never stale",
                asked.operation
            );
            perform(&mut past, asked)
        }
        (None | Some(Fault::LoseReply), _) => {
            let result = perform(&mut state.world, asked);
            state.remember();
            state.settle();
            core.carry_out(&mut state);
            result
        }
    };
    let lost = (fault == Some(Fault::LoseReply)).then(|| "reply lost".to_owned());
    state.faults.calls.push(Called {
        at,
        operation: asked.operation.clone(),
        caller: who,
        refused: result
            .as_ref()
            .err()
            .map(|error| error.code.clone())
            .or(lost),
    });
    let request = state.world.rest.uuid();
    match (fault, result) {
        (Some(Fault::LoseReply), _) => Outcome::Lost,
        (Some(Fault::Hang), _) => Outcome::Hang,
        (Some(Fault::Status(status)), _) => Outcome::Reply(Reply {
            status,
            body: "<html>by the test</html>".to_owned(),
        }),
        (_, Ok(result)) => Outcome::Reply(reply(asked, result.as_deref(), &request)),
        (_, Err(error)) => Outcome::Reply(error.into_reply(service, &request)),
    }
}

fn reply(asked: &Asked, result: Option<&str>, request: &str) -> Reply {
    match asked.signed.service {
        Service::Route53 => Reply::rest(&asked.operation, result.unwrap_or_default()),
        service => Reply::query(service, &asked.operation, result, request),
    }
}

fn perform(world: &mut World, asked: &Asked) -> Result<Option<String>, ApiError> {
    let Asked { operation, .. } = asked;
    let params = Params::parse(asked.body.as_bytes());
    if asked.signed.service != Service::Route53
        && params.get("Version") != Some(asked.signed.service.version())
    {
        let what = format!("not the version of {:?}", asked.signed.service);
        return Err(ApiError::new(400, "InvalidParameterValue", what));
    }
    match asked.signed.service {
        Service::Autoscaling => {
            let silent = autoscaling::WITHOUT_RESULT.contains(&operation.as_str());
            let result = autoscaling::answer(world, operation, &params)?;
            Ok((!silent).then_some(result))
        }
        Service::LoadBalancing => elb::answer(world, operation, &params).map(Some),
        Service::Route53 => {
            let Asked {
                method,
                path,
                query,
                body,
                ..
            } = asked;
            route53::answer(world, method, path, query, body)
                .1
                .map(Some)
        }
    }
}
