//! As much of EC2 as one instance sees, at one address: its metadata service (`IMDSv2`), its
//! autoscaling group and its target group, by their wire protocols. It does what the test says, and
//! nothing by itself.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use crate::support::own_address;

pub const GROUP: &str = "mirrors";
pub const OWN: &str = "i-0123456789abcdef0";
pub const TARGET_GROUP: &str =
    "arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/mirrors/0123456789abcdef";

/// What the metadata service does with a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Imds {
    Answers,
    /// 503.
    Fails,
    /// Nothing, until the client leaves.
    Hangs,
}

/// A call: `Action` and the other fields of its form.
pub type Call = BTreeMap<String, String>;

pub struct State {
    pub imds: Imds,
    /// Tokens that are valid; forgotten by the test to have 401 answered.
    pub tokens: Vec<String>,
    pub metadata: BTreeMap<&'static str, String>,
    /// The lifecycle state and health of this instance in the group.
    pub lifecycle: &'static str,
    pub health: &'static str,
    /// `None`: not registered.
    pub target: Option<&'static str>,
    /// What each answer is refused with, by action: a code and a message.
    pub refused: BTreeMap<&'static str, (&'static str, &'static str)>,
    pub calls: Vec<Call>,
    tokens_given: u32,
}

#[derive(Clone)]
pub struct Cloud {
    state: Arc<Mutex<State>>,
    pub address: SocketAddr,
}

impl Cloud {
    /// An instance that a launching hook holds.
    pub fn start(local_ipv4: &str) -> Self {
        let listener = TcpListener::bind((own_address(), 0)).expect("an address");
        let address = listener.local_addr().expect("its port");
        let metadata = [
            ("instance-id", OWN),
            ("placement/availability-zone", "eu-west-1a"),
            ("local-ipv4", local_ipv4),
            ("autoscaling/target-lifecycle-state", "InService"),
        ];
        let metadata = metadata.map(|(path, value)| (path, value.to_owned()));
        let state = State {
            imds: Imds::Answers,
            tokens: Vec::new(),
            metadata: metadata.into(),
            lifecycle: "Pending:Wait",
            health: "Healthy",
            target: None,
            refused: BTreeMap::new(),
            calls: Vec::new(),
            tokens_given: 0,
        };
        let cloud = Self {
            state: Arc::new(Mutex::new(state)),
            address,
        };
        let serving = cloud.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let cloud = serving.clone();
                thread::spawn(move || cloud.serve(&stream));
            }
        });
        cloud
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the cloud's state")
    }

    /// The calls of this action so far.
    pub fn calls(&self, action: &str) -> Vec<Call> {
        let state = self.state();
        let calls = state.calls.iter().filter(|call| call["Action"] == action);
        calls.cloned().collect()
    }

    /// The actions so far that change something, in their order.
    pub fn changes(&self) -> Vec<String> {
        let state = self.state();
        let actions = state.calls.iter().map(|call| call["Action"].clone());
        actions
            .filter(|action| !action.starts_with("Describe"))
            .collect()
    }

    fn serve(&self, stream: &TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream);
        loop {
            let mut lines = Vec::new();
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).ok()? == 0 {
                    return None;
                }
                let line = line.trim_end().to_owned();
                if line.is_empty() {
                    break;
                }
                lines.push(line);
            }
            let header = |name: &str| {
                let found = lines.iter().filter_map(|line| line.split_once(": "));
                let mut found = found.filter(|(key, _)| key.eq_ignore_ascii_case(name));
                found.next().map(|(_, value)| value.to_owned())
            };
            let length = header("content-length").and_then(|it| it.parse().ok());
            let mut body = vec![0; length.unwrap_or(0)];
            reader.read_exact(&mut body).ok()?;
            let mut first = lines.first()?.split(' ');
            let (method, path) = (first.next()?, first.next()?);
            let (status, text) = match path.strip_prefix("/latest/") {
                Some(path) => self.metadata(method, path, header("x-aws-ec2-metadata-token")),
                None => self.call(&String::from_utf8(body).ok()?),
            };
            let mut stream = stream;
            write!(
                stream,
                "HTTP/1.1 {status} x\r\nContent-Type: text/xml\r\nContent-Length: {}\r\n\r\n{text}",
                text.len()
            )
            .ok()?;
        }
    }

    /// Never ends where nothing is to be answered.
    fn metadata(&self, method: &str, path: &str, token: Option<String>) -> (u16, String) {
        let mut state = self.state();
        match state.imds {
            Imds::Answers => {}
            Imds::Fails => return (503, String::new()),
            Imds::Hangs => {
                drop(state);
                // The thread, and the client's connection with it.
                loop {
                    thread::park();
                }
            }
        }
        if (method, path) == ("PUT", "api/token") {
            state.tokens_given += 1;
            let token = format!("token-{}", state.tokens_given);
            state.tokens.push(token.clone());
            return (200, token);
        }
        if !token.is_some_and(|token| state.tokens.contains(&token)) {
            return (401, String::new());
        }
        let found = path.strip_prefix("meta-data/");
        let found = found.and_then(|path| state.metadata.get(path));
        found.map_or((404, String::new()), |text| (200, text.clone()))
    }

    fn call(&self, form: &str) -> (u16, String) {
        let call: Call = url::form_urlencoded::parse(form.as_bytes())
            .into_owned()
            .collect();
        let mut state = self.state();
        let action = call["Action"].clone();
        state.calls.push(call.clone());
        if let Some((code, message)) = state.refused.get(action.as_str()) {
            let error = format!(
                "<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code>\
                 <Message>{message}</Message></Error><RequestId>r</RequestId></ErrorResponse>"
            );
            return (400, error);
        }
        let result = match action.as_str() {
            "DescribeAutoScalingGroups" => state.group(),
            "DescribeLifecycleHooks" => hooks(),
            "DescribeTargetHealth" => state.target_health(),
            "RegisterTargets" => {
                state.target = Some("initial");
                String::new()
            }
            "DeregisterTargets" => {
                state.target = Some("draining");
                String::new()
            }
            "CompleteLifecycleAction" => {
                state.lifecycle = match state.lifecycle {
                    "Pending:Wait" => "InService",
                    _ => "Terminating:Proceed",
                };
                String::new()
            }
            "DescribeScalingActivities" => "<Activities/>".to_owned(),
            _ => String::new(),
        };
        let answer = format!(
            "<{action}Response><{action}Result>{result}</{action}Result></{action}Response>"
        );
        (200, answer)
    }
}

impl State {
    fn group(&self) -> String {
        let Self {
            lifecycle, health, ..
        } = self;
        let member = |id: &str, state: &str, health: &str| {
            format!(
                "<member><InstanceId>{id}</InstanceId><AvailabilityZone>eu-west-1a</AvailabilityZone>\
                 <LifecycleState>{state}</LifecycleState><HealthStatus>{health}</HealthStatus>\
                 <ProtectedFromScaleIn>false</ProtectedFromScaleIn></member>"
            )
        };
        let members = member(OWN, lifecycle, health) + &member("i-2", "InService", "Healthy");
        format!(
            "<AutoScalingGroups><member><AutoScalingGroupName>{GROUP}</AutoScalingGroupName>\
             <MinSize>2</MinSize><MaxSize>4</MaxSize><DesiredCapacity>2</DesiredCapacity>\
             <DefaultCooldown>300</DefaultCooldown><HealthCheckType>EC2</HealthCheckType>\
             <CreatedTime>2026-01-01T00:00:00Z</CreatedTime>\
             <AvailabilityZones><member>eu-west-1a</member></AvailabilityZones>\
             <Instances>{members}</Instances></member></AutoScalingGroups>"
        )
    }

    fn target_health(&self) -> String {
        let health = match self.target {
            Some(state) => format!("<State>{state}</State>"),
            None => "<State>unused</State><Reason>Target.NotRegistered</Reason>".to_owned(),
        };
        format!(
            "<TargetHealthDescriptions><member><Target><Id>{OWN}</Id><Port>5000</Port></Target>\
             <TargetHealth>{health}</TargetHealth></member></TargetHealthDescriptions>"
        )
    }
}

fn hooks() -> String {
    let hook = |name: &str, transition: &str| {
        format!(
            "<member><LifecycleHookName>{name}</LifecycleHookName>\
             <AutoScalingGroupName>{GROUP}</AutoScalingGroupName>\
             <LifecycleTransition>autoscaling:EC2_INSTANCE_{transition}</LifecycleTransition>\
             <HeartbeatTimeout>30</HeartbeatTimeout><DefaultResult>ABANDON</DefaultResult></member>"
        )
    };
    format!(
        "<LifecycleHooks>{}{}{}</LifecycleHooks>",
        hook("registry-agent-launch", "LAUNCHING"),
        hook("registry-agent-terminate", "TERMINATING"),
        hook("somebodys", "LAUNCHING"),
    )
}
