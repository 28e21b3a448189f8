//! The host's side of the agent's protocol: blocking, one request per connection, a limit on everything.
//!
//! The guest is not trusted. Frames are bounded by [`forkd_abi::protocol`], a `get` by its caller, and every request has a
//! deadline that counts the whole request, so that a guest that answers a byte a second gains nothing by it.

mod connection;
mod copy;
mod error;
mod exec;
mod files;
mod timed;

pub use self::connection::AgentClient;
pub(in crate::fork) use self::connection::{HANDSHAKE_MAX, accepts};
pub use self::copy::{Incoming, Outgoing};
pub use self::error::ClientError;
pub use self::exec::Signaller;
pub use self::files::FileInfo;
