//! `registry-agent generate`: what other programs want to know of the agent.

mod cloud_init;
mod iam_policy;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Command, CommandFactory, Subcommand};
use clap_complete::Shell;

use crate::config;

/// What can be printed.
#[derive(Debug, Subcommand)]
pub(super) enum Generated {
    /// The JSON Schema of the configuration file, for editors
    Schema,
    /// The least IAM policy for a bucket (`storage.s3`) that a role can do its work with
    IamPolicy(iam_policy::Wanted),
    /// User-data for an instance of an image that has registry-agent in it
    CloudInit(Box<cloud_init::Wanted>),
    /// The manual page, in roff: `registry-agent generate man | man -l -`
    Man,
    /// What a shell needs to complete this command
    Completions {
        /// For which shell
        #[arg(long)]
        shell: Shell,
    },
}

/// Prints it. Exit code 0; 2 if what is wanted can't be configured so; 1 if standard output can't
/// be written.
pub(super) fn generate(what: &Generated) -> ExitCode {
    let text = match what {
        // The alternate form of a JSON value is indented.
        Generated::Schema => format!("{:#}\n", config::schema()).into_bytes(),
        Generated::IamPolicy(wanted) => iam_policy::print(wanted).into_bytes(),
        Generated::CloudInit(wanted) => match cloud_init::user_data(wanted) {
            Ok(text) => text.into_bytes(),
            Err(error) => return super::fail(&error, 2),
        },
        Generated::Man => match man(&super::Cli::command()) {
            Ok(text) => text,
            Err(error) => return super::fail(&error, 1),
        },
        Generated::Completions { shell } => completions(&mut super::Cli::command(), *shell),
    };
    let mut out = io::stdout().lock();
    match out.write_all(&text).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// One page for all verbs: what somebody looks for is found in one place.
fn man(command: &Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    let manual = clap_mangen::Man::new(command.clone()).manual("System Administration");
    manual.render_title(&mut page)?;
    manual.render_name_section(&mut page)?;
    manual.render_synopsis_section(&mut page)?;
    manual.render_description_section(&mut page)?;
    writeln!(page, ".SH COMMANDS")?;
    verbs(&mut page, command, "registry-agent")?;
    page.write_all(REST.as_bytes())?;
    Ok(page)
}

/// Each verb with its own arguments, those that consist of others after them.
fn verbs(page: &mut Vec<u8>, command: &Command, above: &str) -> io::Result<()> {
    for verb in command.get_subcommands() {
        let name = format!("{above} {}", verb.get_name());
        writeln!(page, ".SS \"{}\"", roff(&name))?;
        let about = verb.get_long_about().or(verb.get_about());
        writeln!(
            page,
            "{}",
            roff(&about.map(ToString::to_string).unwrap_or_default())
        )?;
        for argument in verb
            .get_arguments()
            .filter(|argument| !argument.is_hide_set())
        {
            let value = argument.get_value_names().and_then(|names| names.first());
            let value = value.filter(|_| argument.get_action().takes_values());
            let shown = match (argument.get_long(), value) {
                (Some(long), Some(value)) => format!("--{long} {value}"),
                (Some(long), None) => format!("--{long}"),
                (None, value) => value.map(ToString::to_string).unwrap_or_default(),
            };
            let help = argument
                .get_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            let choices: Vec<_> = argument.get_possible_values();
            let choices: Vec<_> = choices
                .iter()
                .map(clap::builder::PossibleValue::get_name)
                .collect();
            let choices = match choices.as_slice() {
                [] | ["true", "false"] => String::new(),
                choices => format!(" ({})", choices.join(", ")),
            };
            writeln!(
                page,
                ".TP\n\\fB{}\\fR\n{}{}",
                roff(&shown),
                roff(&help),
                roff(&choices)
            )?;
        }
        verbs(page, verb, &name)?;
    }
    Ok(())
}

/// A text as roff prints it: `groff_char(7)`, `roff(7)`.
fn roff(text: &str) -> String {
    let escaped = text.replace('\\', "\\e").replace('-', "\\-");
    let lines = escaped.lines().map(|line| {
        if line.starts_with(['.', '\'']) {
            format!("\\&{line}")
        } else {
            line.to_owned()
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}

const REST: &str = "\
.SH FILES
.TP
/etc/registry\\-agent/config.yaml
The configuration; may be absent. /etc/registry\\-agent/config.d/*.yaml is merged over it, in name
order, and then REGISTRY_AGENT_* of the environment. `registry\\-agent generate schema` describes
every key.
.TP
/var/lib/registry\\-agent
What is stored, in the layout of the CNCF distribution registry.
.TP
/var/lib/registry\\-agent\\-host
What the engines' files were before they were changed.
.TP
/run/registry\\-agent/admin.sock
Health, metrics and status.
.SH SEE ALSO
systemctl(1), docker(1), dockerd(8), containers\\-registries.conf(5)
";

fn completions(command: &mut Command, shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, command, "registry-agent", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual_has_every_verb_and_every_argument() {
        let command = super::super::Cli::command();
        let page = String::from_utf8(man(&command).unwrap()).unwrap();
        assert!(page.contains(".TH registry-agent 1"), "{page}");
        for verb in command.get_subcommands() {
            let heading = format!(".SS \"registry\\-agent {}\"", roff(verb.get_name()));
            assert!(page.contains(&heading), "no {heading} in\n{page}");
            for long in verb.get_arguments().filter_map(clap::Arg::get_long) {
                let shown = roff(&format!("--{long}"));
                assert!(page.contains(&shown), "no {shown} of {}", verb.get_name());
            }
        }
        assert!(page.contains("\\fB\\-\\-shell SHELL\\fR"), "{page}");
    }

    #[test]
    fn what_roff_would_take_for_its_own_is_a_text() {
        assert_eq!(roff(".a\\b\n'c-d"), "\\&.a\\eb\n\\&'c\\-d");
    }

    #[test]
    fn every_shell_is_told_every_verb() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = completions(&mut super::super::Cli::command(), shell);
            let script = String::from_utf8(script).unwrap();
            for verb in ["uninstall", "verify", "completions"] {
                assert!(script.contains(verb), "no {verb} for {shell}");
            }
        }
    }
}
