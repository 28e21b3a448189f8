//! forkd.
