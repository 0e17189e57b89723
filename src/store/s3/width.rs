//! How many ranges of a blob are asked for at once.

use tokio::time::Instant;

/// Where it begins: enough that a connection of S3 (about 90 MB/s) is not all there is.
const FIRST: usize = 4;
/// More than this never pays, whatever the network.
const MOST: usize = 32;
/// How much more must arrive for a larger width to be worth it.
const GAIN: f64 = 1.1;

/// The number of ranges of one blob that are under way beside the one that is being read. It grows
/// while that makes the blob arrive faster.
#[derive(Debug)]
pub(super) struct Width {
    ranges: usize,
    /// Bytes a second when the width was last changed.
    best: f64,
    since: Instant,
    bytes: u64,
}

impl Width {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            ranges: FIRST,
            best: 0.0,
            since: now,
            bytes: 0,
        }
    }

    pub(super) fn get(&self) -> usize {
        self.ranges
    }

    /// Takes note of bytes that were read, of ranges of `part` bytes.
    pub(super) fn delivered(&mut self, bytes: u64, part: u64, now: Instant) {
        self.bytes += bytes;
        // All that were under way have come in.
        if self.bytes < part * (self.ranges as u64 + 1) {
            return;
        }
        let seconds = now.duration_since(self.since).as_secs_f64().max(1e-6);
        #[allow(
            clippy::cast_precision_loss,
            reason = "2^53 bytes at once are not to be had"
        )]
        let rate = self.bytes as f64 / seconds;
        if rate > self.best * GAIN {
            self.best = rate;
            self.ranges = (self.ranges * 2).min(MOST);
        } else if rate < self.best / GAIN {
            // It was more than the network, or who reads, can take.
            self.best = rate;
            self.ranges = (self.ranges - self.ranges / 4).max(1);
        }
        self.bytes = 0;
        self.since = now;
    }

    /// S3 asked for fewer requests.
    pub(super) fn slowed(&mut self) {
        self.ranges = (self.ranges / 2).max(1);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PART: u64 = 8 << 20;

    /// The widths it comes to where `rate` says how many bytes a second each width brings.
    fn widths(rounds: usize, rate: impl Fn(usize) -> f64) -> Vec<usize> {
        let mut now = Instant::now();
        let mut width = Width::new(now);
        let mut seen = Vec::new();
        for _ in 0..rounds {
            let bytes = PART * (width.get() as u64 + 1);
            #[allow(clippy::cast_precision_loss)]
            let seconds = bytes as f64 / rate(width.get());
            now += Duration::from_secs_f64(seconds);
            width.delivered(bytes, PART, now);
            seen.push(width.get());
        }
        seen
    }

    #[test]
    fn it_grows_as_long_as_that_brings_more() {
        #[allow(clippy::cast_precision_loss)]
        let per_connection = |width: usize| 90e6 * width as f64;
        assert_eq!(widths(4, per_connection), [8, 16, 32, 32]);
    }

    #[test]
    fn it_stays_where_the_reader_is_the_limit() {
        let seen = widths(20, |_| 50e6);
        assert!(seen.iter().all(|width| *width <= 8), "{seen:?}");
    }

    #[test]
    fn it_halves_when_s3_asks_for_less_and_never_ends_at_none() {
        let mut width = Width::new(Instant::now());
        let seen: Vec<usize> = (0..4)
            .map(|_| {
                width.slowed();
                width.get()
            })
            .collect();
        assert_eq!(seen, [2, 1, 1, 1]);
    }
}
