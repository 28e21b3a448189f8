//! The command line's contract as golden files: help, JSON documents, text and errors, byte for byte. Those of commands
//! that need a Linux guest are compared by `linux.rs`.

#[path = "contract/documents.rs"]
mod documents;
#[path = "contract/errors.rs"]
mod errors;
#[path = "support/golden.rs"]
mod golden;
#[path = "contract/help.rs"]
mod help;
#[path = "contract/program.rs"]
mod program;
#[path = "contract/scenario.rs"]
mod scenario;
mod support;
