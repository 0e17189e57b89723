//! The host loop.
