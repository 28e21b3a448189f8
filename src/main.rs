//! forkd.
fn main() {}
