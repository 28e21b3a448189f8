//! POST /v1/sandboxes/{id}/exec: a program in a sandbox, and its output when it has ended or as it comes.

use super::attach::{Attached, ExecBody, OutputStream, ProgramEvent, RunningProgram, attach};
use super::body::JsonBody;
use super::caller::Caller;
use super::error::{ApiError, ErrorBody};
use crate::state::Daemon;
use crate::streams::Capped;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use forkd_abi::protocol::Exit;
use forkd_engine::chain::chain;
use forkd_engine::fork::agent::ClientError;
use serde::Serialize;
use serde_json::json;
use std::convert::Infallible;
use std::io::{Cursor, Read};
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::Stream;
use utoipa::ToSchema;

/// Most bytes of each stream that an answer in one piece has.
const OUTPUT_MAX: usize = 8 << 20;
/// How long a program that nobody waits for may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How a program ended.
#[derive(Debug, Serialize, ToSchema)]
pub struct Executed {
    /// Its exit code.
    exit_code: Option<i32>,
    /// The signal that killed it.
    signal: Option<i32>,
    /// Its time was over.
    timed_out: bool,
    /// What it wrote; what is not UTF-8 has replacement characters.
    stdout: String,
    /// What it wrote to its standard error, likewise.
    stderr: String,
    /// Whether it wrote more than these 8 MiB of each.
    truncated: bool,
}

/// A program that nobody waits for.
#[derive(Debug, Serialize, ToSchema)]
pub struct Started {
    /// Its process id in the sandbox.
    pid: u32,
}

/// Runs a program. With `Accept: text/event-stream` its output comes as server-sent events: `stdout` and `stderr` with
/// `{"text"}`, or `{"base64"}` for what is no UTF-8, and `exit` or `error` at the end. A program whose client goes away is
/// killed, unless it was started with `detach`.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/exec", tag = "inside", params(("id" = String, Path)),
    request_body = ExecBody,
    responses((status = 200, body = Executed), (status = 202, body = Started), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn exec(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
    headers: HeaderMap,
    JsonBody { value: body, .. }: JsonBody<ExecBody>,
) -> Result<Response, ApiError> {
    let (request, timeout) = (body.request()?, body.timeout()?);
    if request.tty.is_some() {
        return Err(ApiError::invalid("a terminal needs a WebSocket: GET /v1/sandboxes/{id}/exec"));
    }
    let attached = attach(&daemon, &owner, &id).await?;
    if body.detach {
        let pid = attached.detach(request, START_TIMEOUT).await?;
        return Ok((axum::http::StatusCode::ACCEPTED, Json(Started { pid })).into_response());
    }
    let input = |text: String| Box::new(Cursor::new(text.into_bytes())) as Box<dyn Read + Send>;
    let stdin = body.stdin.map(input);
    if wants_events(&headers) {
        let events = events(attached.start(request, stdin, timeout));
        return Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response());
    }
    Ok(Json(buffered(attached, request, stdin, timeout).await?).into_response())
}

fn wants_events(headers: &HeaderMap) -> bool {
    let accepted = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    accepted.is_some_and(|accepted| accepted.contains("text/event-stream"))
}

async fn buffered(
    attached: Attached,
    request: forkd_abi::protocol::ExecRequest,
    stdin: Option<Box<dyn Read + Send>>,
    timeout: Option<Duration>,
) -> Result<Executed, ApiError> {
    let mut program = attached.start(request, stdin, timeout);
    let (mut stdout, mut stderr) = (Capped::new(OUTPUT_MAX), Capped::new(OUTPUT_MAX));
    let ended = loop {
        match program.events.recv().await {
            Some(ProgramEvent::Output(OutputStream::Stdout, bytes)) => stdout.keep(&bytes),
            Some(ProgramEvent::Output(OutputStream::Stderr, bytes)) => stderr.keep(&bytes),
            Some(ProgramEvent::Ended(ended)) => break ended,
            None => break Err(ClientError::Closed),
        }
    };
    let timed_out = timeout.is_some() && matches!(ended, Err(ClientError::Timeout { .. }));
    let Exit { code, signal } = if timed_out { Exit::default() } else { ended? };
    let text = |capped: &Capped| String::from_utf8_lossy(&capped.bytes).into_owned();
    Ok(Executed {
        exit_code: code,
        signal,
        timed_out,
        stdout: text(&stdout),
        stderr: text(&stderr),
        truncated: stdout.cut || stderr.cut,
    })
}

/// A program's output as events.
fn events(program: RunningProgram) -> impl Stream<Item = Result<Event, Infallible>> {
    let state = Some((program, [Pieces::default(), Pieces::default()]));
    futures_util::stream::unfold(state, |state| async move {
        let (mut program, mut pieces) = state?;
        match program.events.recv().await? {
            ProgramEvent::Output(stream, bytes) => {
                let (name, pieces_of) = match stream {
                    OutputStream::Stdout => ("stdout", &mut pieces[0]),
                    OutputStream::Stderr => ("stderr", &mut pieces[1]),
                };
                let event = event(name, &pieces_of.next(&bytes));
                Some((event, Some((program, pieces))))
            }
            ProgramEvent::Ended(Ok(Exit { code, signal })) => {
                let exit = json!({ "exit_code": code, "signal": signal, "timed_out": false });
                Some((event("exit", &exit), None))
            }
            ProgramEvent::Ended(Err(error @ ClientError::Timeout { .. })) => {
                let exit =
                    json!({ "exit_code": null, "signal": null, "timed_out": true, "message": chain(&error) });
                Some((event("exit", &exit), None))
            }
            ProgramEvent::Ended(Err(error)) => {
                let error = json!({ "code": "exec_failed", "message": chain(&error), "hint": null });
                Some((event("error", &error), None))
            }
        }
    })
}

fn event(name: &str, data: &serde_json::Value) -> Result<Event, Infallible> {
    Ok(Event::default().event(name).data(data.to_string()))
}

/// Output in pieces that are text where they can be: a character that is cut in two waits for its rest.
#[derive(Default)]
struct Pieces {
    waiting: Vec<u8>,
}

impl Pieces {
    fn next(&mut self, bytes: &[u8]) -> serde_json::Value {
        self.waiting.extend_from_slice(bytes);
        let all = std::mem::take(&mut self.waiting);
        match std::str::from_utf8(&all) {
            Ok(text) => json!({ "text": text }),
            Err(error) if error.error_len().is_none() => {
                let (text, rest) = all.split_at(error.valid_up_to());
                self.waiting = rest.to_vec();
                json!({ "text": String::from_utf8_lossy(text) })
            }
            Err(_) => json!({ "base64": STANDARD.encode(&all) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_in_two_pieces_is_one() {
        let mut pieces = Pieces::default();
        let (a, b) = "aé".as_bytes().split_at(2);
        assert_eq!(pieces.next(a), json!({ "text": "a" }));
        assert_eq!(pieces.next(b), json!({ "text": "é" }));
        assert_eq!(pieces.next(&[0xff, b'x']), json!({ "base64": "/3g=" }));
        assert_eq!(pieces.next(b"y"), json!({ "text": "y" }));
    }
}
