//! `registry-agent verify`.

use std::fmt::{self, Display, Formatter};
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{DecimalBytes, HumanCount, ProgressBar, ProgressStyle};

use super::{fail, in_runtime};
use crate::config::{self, Role, S3Settings, Serving, Sources, Storage};
use crate::store::StoreError;
use crate::store::audit::{Audit, Event, Summary, Survey};
use crate::store::s3::{self, Bucket, BucketError, Limits, Writer};

/// How often a line tells how far it is, where there is no terminal for a bar.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Hashes the store's blobs again and reads its links, and removes what is wrong where `repair`
/// says so; of a role that has a bucket, first the disk cache in front of it, then the bucket, which
/// only a writer may repair. It runs beside an agent as well. Exit code 0: nothing is wrong, or
/// nothing any more; 1: something is, or the store can't be read; 2: the configuration.
pub(super) fn verify(sources: &Sources, repair: bool) -> ExitCode {
    let settings = match config::load(sources) {
        Ok(loaded) => loaded.settings,
        Err(errors) => return fail(&errors, 2),
    };
    let Some(Serving { storage, role, .. }) = &settings.serving else {
        return fail(&"a client stores nothing: there is nothing to verify", 2);
    };
    let verified = on_disk(storage.root(), repair).map_err(|error| error.to_string());
    let summary = match verified {
        Ok(summary) => summary,
        Err(error) => return fail(&error, 1),
    };
    let _ = writeln!(io::stdout(), "{}", Sentence(summary));
    let on_disk = exit_code(summary);
    let Storage::S3 { bucket, .. } = storage else {
        return on_disk;
    };
    let repairs = repair && *role == Role::Writer;
    in_runtime(async {
        let found = match Box::pin(in_bucket(bucket, repairs)).await {
            Ok(found) => found,
            Err(error) => return fail(&error, 1),
        };
        let _ = writeln!(io::stdout(), "{}", Sentence(found));
        if repair && !repairs && found.faults > 0 {
            let message = "a reader may not change its bucket: run `verify --repair` where the role \
                           is writer";
            return fail(&message, 1);
        }
        if on_disk == ExitCode::SUCCESS {
            exit_code(found)
        } else {
            on_disk
        }
    })
}

fn exit_code(summary: Summary) -> ExitCode {
    if summary.faults == summary.repaired {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn on_disk(root: &Path, repair: bool) -> Result<Summary, StoreError> {
    let audit = Audit::new(root, repair);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let survey = audit.survey()?;
    say(&to_hash(survey, &root.display()));
    let mut progress = Progress::new(survey);
    let summary = audit.run(threads, |event| progress.heard(event))?;
    progress.bar.finish_and_clear();
    Ok(summary)
}

async fn in_bucket(settings: &S3Settings, repair: bool) -> Result<Summary, BucketError> {
    let bucket = Bucket::open(settings, Limits::default()).await?;
    let writer = repair.then(|| Writer::over(bucket.clone(), settings));
    let audit = match &writer {
        Some(writer) => s3::audit::Audit::repairing(writer),
        None => s3::audit::Audit::new(&bucket),
    };
    let survey = audit.survey().await?;
    say(&to_hash(survey, &format!("the bucket {}", bucket.name())));
    let mut progress = Progress::new(survey);
    let summary = audit.run(|event| progress.heard(event)).await?;
    progress.bar.finish_and_clear();
    Ok(summary)
}

fn to_hash(survey: Survey, place: &dyn Display) -> String {
    let (bytes, blobs) = (DecimalBytes(survey.bytes), HumanCount(survey.blobs));
    let name = if survey.blobs == 1 { "blob" } else { "blobs" };
    format!("{blobs} {name} of {bytes} to hash in {place}")
}

/// `12 blobs and 40 links: 2 faults, 1 repaired (3 layers are not here, ...)`
struct Sentence(Summary);

impl Display for Sentence {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Summary {
            blobs,
            links,
            absent_layers,
            faults,
            repaired,
        } = self.0;
        let count = |count: u64, one: &str, many: &str| {
            format!(
                "{} {}",
                HumanCount(count),
                if count == 1 { one } else { many }
            )
        };
        let blobs = count(blobs, "blob", "blobs");
        write!(f, "{blobs} and {}: ", count(links, "link", "links"))?;
        match faults {
            0 => f.write_str("nothing is wrong")?,
            _ => f.write_str(&count(faults, "fault", "faults"))?,
        }
        if repaired > 0 {
            write!(f, ", {} repaired", HumanCount(repaired))?;
        }
        if absent_layers > 0 {
            let absent = count(absent_layers, "layer is", "layers are");
            write!(f, " ({absent} not here, and fetched again when asked for)")?;
        }
        Ok(())
    }
}

/// How far it is: a bar on a terminal, a line now and then elsewhere.
struct Progress {
    bar: ProgressBar,
    survey: Survey,
    hashed: u64,
    told: Instant,
}

impl Progress {
    fn new(survey: Survey) -> Self {
        // On anything but a terminal it draws nothing.
        let bar = ProgressBar::new(survey.bytes);
        let style = ProgressStyle::with_template(
            "{bar:32} {decimal_bytes} of {decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Self {
            bar,
            survey,
            hashed: 0,
            told: Instant::now(),
        }
    }

    fn heard(&mut self, event: Event) {
        match event {
            Event::Hashed(bytes) => {
                self.hashed += bytes;
                self.bar.inc(bytes);
                if self.told.elapsed() >= LINE_INTERVAL && !io::stderr().is_terminal() {
                    self.told = Instant::now();
                    let (hashed, all) = (self.hashed, self.survey.bytes);
                    say(&format!(
                        "{} of {}",
                        DecimalBytes(hashed),
                        DecimalBytes(all)
                    ));
                }
            }
            Event::Fault(fault) => self.bar.suspend(|| {
                let removed = if fault.repaired { ": removed" } else { "" };
                let path = fault.path.display();
                // A reader that went away (`| head`) does not stop a repair.
                let _ = writeln!(io::stdout(), "{path}: {}{removed}", fault.problem);
            }),
        }
    }
}

/// Progress is not the report: it goes to standard error.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
