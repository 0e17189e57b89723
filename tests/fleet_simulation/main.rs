//! The real planner of each instance against a model of the autoscaling group, the load balancer and
//! DNS, on a clock that costs nothing: ten thousand fleets, each with faults of its own
//! (`tests/all` runs so many, optimised; a plain `cargo test` runs fewer).
//!
//! A seed is a fleet: its size, its faults and every delay follow from it. One that fails prints
//! itself, and `FLEET_SEED=<seed> cargo test --test fleet_simulation -- --nocapture` tells its story.
//! `FLEET_SEEDS=<count>` runs more of them, or fewer, and `FLEET_LARGEST=<instances>` larger ones.

#![allow(
    clippy::unwrap_used,
    clippy::unchecked_time_subtraction,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    clippy::struct_excessive_bools,
    reason = "a test's helpers may panic as the test may, and its numbers are small"
)]

mod agent;
mod check;
mod group;
mod scenario;
mod world;
mod zone;

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use scenario::Scenario;
use world::World;

/// How many fleets are tried where nothing else is said: seconds of a build that is not optimised.
const SEEDS: u64 = 300;
/// The largest of the large ones, likewise.
const LARGEST: u64 = 1_000;

/// A number that the environment may say.
fn number(variable: &str, otherwise: u64) -> u64 {
    env::var(variable).map_or(otherwise, |text| {
        let number = text.parse();
        number.unwrap_or_else(|_| panic!("{variable} is a number, not {text:?}"))
    })
}

#[test]
fn fleets_keep_every_promise() {
    if let Ok(seed) = env::var("FLEET_SEED") {
        let seed = seed.parse().expect("FLEET_SEED is a number");
        let mut world = World::new(Scenario::of(seed));
        world.tells = true;
        println!("{:#?}", world.scenario);
        world
            .run()
            .unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
        println!("{:?}", world.check);
        return;
    }
    let seeds = number("FLEET_SEEDS", SEEDS);
    let next = AtomicU64::new(0);
    let failures = Mutex::new(Vec::new());
    let totals = Mutex::new(check::Totals::default());
    let workers = thread::available_parallelism().map_or(2, usize::from);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    let mut world = World::new(Scenario::of(seed));
                    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
                    let outcome = outcome.unwrap_or_else(|_| Err("it panicked".to_owned()));
                    if let Err(broken) = outcome {
                        failures.lock().unwrap().push((seed, broken));
                    }
                    totals.lock().unwrap().add(&world.check.totals);
                }
            });
        }
    });
    let totals = totals.into_inner().unwrap();
    println!("{seeds} fleets: {totals:?}");
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    for (seed, broken) in failures.iter().take(10) {
        println!("FLEET_SEED={seed}: {broken}");
    }
    assert!(
        failures.is_empty(),
        "{} of {seeds} seeds failed",
        failures.len()
    );
    // A promise about something that never happened is none.
    totals.assert_everything_happened(seeds);
}

#[test]
fn calls_grow_no_faster_than_the_fleet() {
    let sizes: [u32; 4] = [10, 100, 1_000, 10_000];
    let largest = number("FLEET_LARGEST", LARGEST);
    let mut before = None;
    println!("calls a second, all instances together: while they join, and then");
    for size in sizes.into_iter().filter(|size| u64::from(*size) <= largest) {
        let mut world = World::new(Scenario::large(size));
        world
            .run()
            .unwrap_or_else(|broken| panic!("{size} instances: {broken}"));
        // All have joined by then.
        let joining = usize::try_from(size / 30).unwrap().max(60);
        let rates = world.api.rates(joining);
        println!("{size:>6} instances: {rates}");
        for (api, rate) in &rates.steady {
            assert!(
                *rate <= api.limit() / 2.0,
                "{size} instances: {rate:.2} calls a second of {api:?} is over half of the limit"
            );
        }
        let all: f64 = rates.steady.iter().map(|(_, rate)| rate).sum();
        if let Some((smaller, less)) = before {
            let grown = f64::from(size) / f64::from(smaller);
            assert!(
                all <= less * grown * 1.2,
                "{smaller} to {size}: {less:.3} to {all:.3}"
            );
        }
        before = Some((size, all));
    }
}
