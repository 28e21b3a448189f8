//! `forkd hub serve`: a hub's folder over HTTP.

use std::net::SocketAddr;
use std::process::ExitCode;

use serde::Serialize;

use crate::cli::ServeArgs;
use crate::failure::CommandError;
use crate::output::Output;
use crate::runtime::runtime;
use forkd_engine::hub::serve::{ServeOptions, Server};
use forkd_engine::hub::shape::LinkShape;
use forkd_engine::interrupt::stop_signal;

#[derive(Serialize)]
struct Listening {
    address: SocketAddr,
    url: String,
}

/// Serves until Ctrl-C or SIGTERM.
pub fn run(args: &ServeArgs, output: &Output) -> Result<ExitCode, CommandError> {
    runtime().map_err(CommandError::Runtime)?.block_on(async {
        let server = Server::bind(ServeOptions {
            root: args.dir.clone(),
            listen: args.listen,
            shape: LinkShape { rtt: args.rtt, bandwidth: args.bandwidth },
            access_log: args.access_log.clone(),
        })
        .await?;
        let stop = stop_signal().map_err(CommandError::Signals)?;
        let address = server.address();
        let listening = Listening { address, url: format!("http://{address}") };
        output.report(&listening, |listening| format!("listening on {}", listening.url));
        server.run(stop).await;
        Ok(ExitCode::SUCCESS)
    })
}
