//! Blocking host side of the protocol.
