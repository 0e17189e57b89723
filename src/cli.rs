//! The command line: one file for each verb.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{AdminAddress, Sources};
use crate::host::live::{LiveError, ThisHost};
use crate::host::plan::Wanted;
use crate::host::watch::Host as _;
use crate::log;
use crate::oci::ImageName;
use crate::warm::{ClientIdentity, Platform, Platforms};

pub mod apply;
mod check;
mod gc;
mod generate;
pub mod host;
mod install;
mod plan;
pub mod rollback;
mod run;
mod status;
mod verify;
mod warm;

/// An image registry on every host: a pull-through mirror that keeps serving when its upstream does
/// not.
#[derive(Debug, Parser)]
#[command(name = "registry-agent", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serve. Without any configuration: a mirror of docker.io on 127.0.0.1:5000
    Run(ConfigArguments),
    /// Check the configuration: every error at once, exit code 2 if there is one
    Check(ConfigArguments),
    /// Show what the running agent does
    Status {
        #[command(flatten)]
        config: ConfigArguments,
        /// As JSON, for machines
        #[arg(long)]
        json: bool,
    },
    /// Have the running agent fetch images ahead of time; exit code 1 if it could not fetch all
    Warm {
        /// Images as `docker pull` takes them: busybox, ghcr.io/owner/app:1.2, app@sha256:...
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<ImageName>,
        /// For which platform (linux/amd64); may be repeated. Default: this host's
        #[arg(long, value_name = "OS/ARCHITECTURE")]
        platform: Vec<Platform>,
        /// For every platform that an image is for
        #[arg(long, conflicts_with = "platform")]
        all_platforms: bool,
        /// What to show an agent that asks its clients for certificates (`tls.client_ca`), in PEM
        #[arg(long, value_name = "FILE", requires = "client_key")]
        client_certificate: Option<PathBuf>,
        /// Its private key
        #[arg(long, value_name = "FILE", requires = "client_certificate")]
        client_key: Option<PathBuf>,
        #[command(flatten)]
        config: ConfigArguments,
    },
    /// Hash everything that is stored again, and read every link; exit code 1 if something is wrong
    Verify {
        #[command(flatten)]
        config: ConfigArguments,
        /// Remove what is wrong: it is fetched again when somebody asks for it
        #[arg(long)]
        repair: bool,
    },
    /// Remove what nobody needs of what was pushed: blobs that no manifest names, uploads that were
    /// given up. Exit code 1 if that can't be done, or not all
    Gc {
        #[command(flatten)]
        config: ConfigArguments,
        /// Remove nothing, and say what would be, with its bytes
        #[arg(long)]
        dry_run: bool,
    },
    /// Show what would be changed on this host, and change nothing; exit code 2 if there is something
    Plan {
        /// Facts that were saved, of this host or another; without, this host is looked at
        #[arg(long, value_name = "FILE")]
        facts: Option<PathBuf>,
        /// Print what is known of this host, as JSON for `--facts`, in place of a plan. It holds the
        /// engines' configuration files, with what is secret in them
        #[arg(long, conflicts_with_all = ["facts", "withdrawn", "json"])]
        print_facts: bool,
        /// What would be done while the mirror does not serve
        #[arg(long)]
        withdrawn: bool,
        /// As JSON, for machines
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigArguments,
    },
    /// Wire this host's container engines to the mirror now, and prove it; exit code 1 if not
    Apply(ConfigArguments),
    /// Take this host's container engines back to what they were before they were first wired
    Rollback(ConfigArguments),
    /// Look after this host's container engines: what registry-agent-host.service runs
    Host(ConfigArguments),
    /// Install, enable and start the units of this binary, as far as that is not done yet
    Install,
    /// Unwire the engines, stop the units and remove them; what is stored stays
    Uninstall,
    /// Print something made from this binary
    Generate {
        #[command(subcommand)]
        what: generate::Generated,
    },
}

#[derive(Debug, Args)]
struct ConfigArguments {
    /// The configuration file; `config.d/*.yaml` beside it is merged in, in name order
    #[arg(long, value_name = "FILE", conflicts_with = "distribution_config")]
    config: Option<PathBuf>,
    /// A registry:2 or registry:3 config.yml, which runs as it is, with its `REGISTRY_*` variables
    #[arg(long, value_name = "FILE")]
    distribution_config: Option<PathBuf>,
}

impl ConfigArguments {
    fn sources(self) -> Sources {
        Sources::from_process(self.config, self.distribution_config)
    }
}

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    match Cli::parse().verb {
        Verb::Run(config) => run::run(config.sources()),
        Verb::Check(config) => check::check(&config.sources().of_this_host()),
        Verb::Status { config, json } => status::status(&config.sources(), json),
        Verb::Warm {
            images,
            platform,
            all_platforms,
            client_certificate,
            client_key,
            config,
        } => {
            let identity = client_certificate.zip(client_key);
            let identity = identity.map(|(certificate, key)| ClientIdentity { certificate, key });
            let platforms = match platform.is_empty() {
                _ if all_platforms => Platforms::All,
                true => Platforms::Only(vec![Platform::host()]),
                false => Platforms::Only(platform),
            };
            warm::warm(&config.sources(), &images, platforms, identity.as_ref())
        }
        Verb::Verify { config, repair } => verify::verify(&config.sources().of_this_host(), repair),
        Verb::Gc { config, dry_run } => gc::gc(&config.sources().of_this_host(), dry_run),
        Verb::Plan {
            print_facts: true,
            config,
            ..
        } => plan::print_facts(&config.sources()),
        Verb::Plan {
            facts,
            withdrawn,
            json,
            config,
            print_facts: false,
        } => {
            let wanted = if withdrawn {
                Wanted::Withdrawn
            } else {
                Wanted::Wired
            };
            plan::plan(&config.sources(), facts.as_deref(), wanted, json)
        }
        Verb::Apply(config) => on_this_host(config.sources(), async |host| {
            apply::apply(host, plan::show).await
        }),
        Verb::Rollback(config) => on_this_host_anyway(config.sources(), async |host| {
            let restart = host.settings().host.docker.restart;
            rollback::rollback(host.system(), restart, plan::show).await
        }),
        Verb::Host(config) => in_runtime(host_part(config.sources())),
        Verb::Install => on_this_host(Sources::from_process(None, None), async |host| {
            install::install(host).await
        }),
        Verb::Uninstall => on_this_host_anyway(Sources::from_process(None, None), async |host| {
            install::uninstall(host).await
        }),
        Verb::Generate { what } => generate::generate(&what),
    }
}

/// What the unit runs.
async fn host_part(sources: Sources) -> ExitCode {
    let orders = match host::orders() {
        Ok(orders) => orders,
        Err(error) => return fail(&format!("can't listen for signals: {error}"), 1),
    };
    connected(sources, async |this| {
        if let AdminAddress::Tcp(address) = this.settings().admin {
            let error = format!(
                "the agent is asked at {address} (`admin`), and this part has no network to ask \
                 it: leave `admin` out, or say unix:/run/registry-agent/admin.sock"
            );
            return fail(&error, 2);
        }
        if let Err(error) = log::init(&this.settings().log) {
            return fail(&error, 1);
        }
        host::host(this, orders).await
    })
    .await
}

/// Does something on this host, as it is configured there. Exit code 2: the configuration.
fn on_this_host(sources: Sources, verb: impl AsyncFnOnce(&ThisHost) -> ExitCode) -> ExitCode {
    in_runtime(connected(sources, verb))
}

async fn connected(sources: Sources, verb: impl AsyncFnOnce(&ThisHost) -> ExitCode) -> ExitCode {
    match ThisHost::connect(sources).await {
        Ok(host) => verb(&host).await,
        Err(error @ LiveError::Configuration(_)) => fail(&error, 2),
        Err(error) => fail(&error, 1),
    }
}

/// Does something on this host that a broken configuration must not keep anybody from.
fn on_this_host_anyway(
    sources: Sources,
    verb: impl AsyncFnOnce(&ThisHost) -> ExitCode,
) -> ExitCode {
    in_runtime(async {
        let (host, broken) = match ThisHost::connect_anyway(sources).await {
            Ok(connected) => connected,
            Err(error) => return fail(&error, 1),
        };
        if let Some(why) = broken {
            // What is done, and the exit code for it, is the verb's to say.
            let _ = fail(
                &format!(
                    "the configuration can't be read, so the defaults count (no unit is \
                     restarted):\n{why}"
                ),
                2,
            );
        }
        verb(&host).await
    })
}

fn in_runtime(work: impl Future<Output = ExitCode>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => fail(&format!("can't start: {error}"), 1),
    }
}

/// Prints to standard output; a reader that went away (`| head`) is no error.
fn print(text: &str) -> ExitCode {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    ExitCode::SUCCESS
}

/// Says on standard error what went wrong.
fn fail(error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "registry-agent: {error}");
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    /// clap looks at a verb when it is parsed, and ends the program there.
    #[test]
    fn every_verb_can_be_parsed() {
        super::Cli::command().debug_assert();
    }
}
