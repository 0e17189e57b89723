//! systemd, as the agent speaks with it: jobs that end in every way in which they can, and the
//! facts that are read from it. At the other end of the connection is a manager of our own, since
//! most of these ends can't be made to happen for real.

mod facts;
mod fake;
mod jobs;
