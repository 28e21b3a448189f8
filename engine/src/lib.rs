//! What forkd does, without a terminal: the command line, a daemon and the tests are its callers.
//!
//! Rooms: [`hub`] finds, downloads and serves packs; [`build`] makes machines into snapshots and packs; [`fork`] starts
//! copies of them; [`network`] is a copy's wire; [`local`] is what forkd keeps on this machine; [`inspect`] looks into
//! packs and children; [`picture`] draws.
//! [`target`] is what a user may name. Nothing here parses a command line, prints or ends the process: options come in
//! as values, long work tells a [`progress::Progress`] how far it is, and failures are the enums beside the code.
#![forbid(unsafe_code)]

pub mod build;
pub mod chain;
pub mod cleanup;
pub mod doctor;
pub mod fork;
pub mod hub;
pub mod inspect;
pub mod interrupt;
pub mod local;
pub mod network;
pub mod picture;
pub mod progress;
pub mod reference;
pub mod target;
