//! The log: lines for people on a terminal, the journal under systemd, JSON anywhere else.

use std::io::{self, IsTerminal};

use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{Format, Full, Json, JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::config::{LogFormat, LogLevel, LogSettings};

/// Whose own debugging is of no use for finding a fault of ours.
const TALKATIVE: &[&str] = &["aws_", "hyper_util"];

/// Changes the level of a log that is running.
pub struct LevelHandle(reload::Handle<Targets, Registry>);

impl LevelHandle {
    /// Logs from `level` on.
    pub fn set(&self, level: LogLevel) {
        // It fails only when the log is gone, and then there is no level to set.
        let _ = self.0.reload(filter(level));
    }
}

/// The log could not be begun.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `log.format: journald` where there is no journal.
    #[error("log.format is journald, but the journal can't be reached: {0}")]
    Journald(io::Error),
    /// Something else logs already.
    #[error("the log can't be begun: {0}")]
    Taken(#[from] tracing_subscriber::util::TryInitError),
}

/// Begins the log of this process.
pub fn init(settings: &LogSettings) -> Result<LevelHandle, LogError> {
    let (level, handle) = reload::Layer::new(filter(settings.level));
    let registry = tracing_subscriber::registry().with(level);
    let fields = || settings.fields.clone();
    let format = match settings.format {
        LogFormat::Auto if io::stderr().is_terminal() => LogFormat::Text,
        // Set by systemd where standard error is the journal: sd-exec(5), $JOURNAL_STREAM.
        LogFormat::Auto if std::env::var_os("JOURNAL_STREAM").is_some() => LogFormat::Journald,
        LogFormat::Auto => LogFormat::Json,
        format => format,
    };
    let layer: Box<dyn Layer<_> + Send + Sync> = match format {
        LogFormat::Journald => {
            let journal = tracing_journald::layer().map_err(LogError::Journald)?;
            Box::new(journal.with_field_prefix(None).with_custom_fields(fields()))
        }
        LogFormat::Text => {
            let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
            let layer = layer
                .with_ansi(io::stderr().is_terminal())
                .with_target(false);
            if settings.fields.is_empty() {
                Box::new(layer)
            } else {
                let format = Format::default().with_target(false).with_ansi(false);
                Box::new(layer.event_format(WithFields {
                    format,
                    fields: fields(),
                }))
            }
        }
        LogFormat::Json | LogFormat::Auto => {
            let format = Format::default().json().flatten_event(true);
            let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
            let layer = layer.fmt_fields(JsonFields::new());
            Box::new(layer.event_format(WithFields {
                format,
                fields: fields(),
            }))
        }
    };
    registry.with(layer).try_init()?;
    Ok(LevelHandle(handle))
}

fn filter(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    };
    // The AWS SDK tells every step of every request.
    let theirs = level.min(LevelFilter::WARN);
    let talkative = TALKATIVE.iter().map(|target| (*target, theirs));
    Targets::new().with_default(level).with_targets(talkative)
}

/// A format that adds the same fields to every line, which `tracing` has no way for: its field
/// names are fixed when the program is built, these come from the configuration.
struct WithFields<F> {
    format: F,
    fields: Vec<(String, String)>,
}

impl<S, N> FormatEvent<S, N> for WithFields<Format<Full>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let mut line = String::new();
        self.format
            .format_event(context, Writer::new(&mut line), event)?;
        writer.write_str(line.trim_end())?;
        for (name, value) in &self.fields {
            write!(writer, " {name}={value}")?;
        }
        writeln!(writer)
    }
}

impl<S> FormatEvent<S, JsonFields> for WithFields<Format<Json>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let mut line = String::new();
        self.format
            .format_event(context, Writer::new(&mut line), event)?;
        let Some(rest) = line.strip_prefix('{') else {
            return writer.write_str(&line);
        };
        writer.write_char('{')?;
        for (name, value) in &self.fields {
            let name = serde_json::Value::from(name.as_str());
            let value = serde_json::Value::from(value.as_str());
            write!(writer, "{name}:{value},")?;
        }
        writer.write_str(rest)
    }
}
