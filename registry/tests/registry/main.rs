//! The crate from outside: against a registry in this process that misbehaves on purpose, and against Debian's docker-registry, nginx
//! and skopeo.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod auth;
mod fake;
mod faults;
mod growing;
mod pauses;
mod quirks;
mod real;
mod resolve;
mod services;
mod upload;
