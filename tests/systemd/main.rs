//! systemd, as the agent speaks with it: jobs that end in every way in which they can, and the
//! facts that are read from it. At the other end of the connection is a manager of our own, since
//! most of these ends can't be made to happen for real.

// Helpers that are no tests themselves fail the test that calls them.
#![allow(clippy::unwrap_used)]
// A property takes `self`, whether or not it is always the same.
#![allow(clippy::unused_self)]

mod facts;
mod fake;
mod jobs;
