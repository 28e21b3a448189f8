//! GET /v1/sandboxes/{id}/exec as a WebSocket: a program with input, output and signals, with a terminal or without.
//!
//! ```text
//! client  text    {"argv": [...], "tty": {"rows": 24, "cols": 80}, ...}     the first message: what to run
//!         binary  input
//!         text    {"signal": 15}, {"resize": {"rows": 40, "cols": 120}}, {"eof": true}
//! server  binary  a byte, 1 for standard output and 2 for standard error, and what was written
//!         text    {"exit": {"exit_code", "signal", "timed_out"}} or {"error": {"code", "message", "hint"}}, last
//! ```

use super::attach::{Attached, ExecBody, OutputStream, ProgramEvent, attach};
use super::caller::Caller;
use super::error::{ApiError, ErrorBody};
use crate::state::Daemon;
use crate::streams::{self, IDLE};
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use forkd_abi::protocol::Exit;
use forkd_engine::chain::chain;
use forkd_engine::fork::agent::{ClientError, Signaller};
use futures_util::stream::SplitStream;
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_json::json;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::Sender;
use tokio::time::timeout;

/// Longest message of a client, bytes.
const MESSAGE_MAX: usize = 1 << 20;
/// How long the first message may take.
const FIRST_TIMEOUT: Duration = Duration::from_secs(20);

/// What a client wants of a program under way.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Wish {
    Signal(i32),
    Resize { rows: u16, cols: u16 },
    Eof(bool),
}

/// Runs a program, which is killed (with a terminal: hung up) when the client goes away. The first message is as the body
/// of POST; then binary messages are its input, and text `{"signal"}`, `{"resize": {"rows", "cols"}}` or `{"eof": true}`.
/// What comes are binary messages, whose first byte is 1 for standard output and 2 for standard error, and at the end
/// text with `{"exit"}` or `{"error"}`.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/exec", tag = "inside", params(("id" = String, Path)),
    responses((status = 101), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub async fn exec(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(|error| {
        ApiError::new(StatusCode::BAD_REQUEST, "websocket_needed", error.body_text())
            .hint("POST runs a program without a WebSocket")
    })?;
    // Before the upgrade, where a failure still has a status.
    let attached = attach(&daemon, &owner, &id).await?;
    let upgrade = upgrade.max_message_size(MESSAGE_MAX).max_frame_size(MESSAGE_MAX);
    Ok(upgrade.on_upgrade(move |socket| converse(socket, attached)))
}

async fn converse(mut socket: WebSocket, attached: Attached) {
    let body = match timeout(FIRST_TIMEOUT, socket.recv()).await {
        Ok(Some(Ok(Message::Text(text)))) => {
            serde_json::from_str::<ExecBody>(&text).map_err(|error| ApiError::invalid(error.to_string()))
        }
        _ => Err(ApiError::invalid("the first message says what to run")),
    };
    let wanted = body.and_then(|body| Ok((body.request()?, body.timeout()?)));
    let (request, time) = match wanted {
        Ok(wanted) => wanted,
        Err(error) => {
            let error = json!({ "error": error.body() }).to_string();
            // Who is gone does not hear it.
            let _ = socket.send(Message::Text(error.into())).await;
            return;
        }
    };
    let (input, reader) = streams::reader();
    let mut program = attached.start(request, Some(Box::new(reader)), time);
    let (mut sink, source) = socket.split();
    let listening = listen(source, input, program.signaller());
    let telling = async {
        while let Some(event) = program.events.recv().await {
            let last = matches!(event, ProgramEvent::Ended(_));
            let sent = timeout(IDLE, sink.send(message(event))).await;
            if last || !matches!(sent, Ok(Ok(()))) {
                break;
            }
        }
        let _ = timeout(IDLE, sink.close()).await;
    };
    tokio::select! {
        () = telling => {}
        () = listening => {}
    }
}

fn message(event: ProgramEvent) -> Message {
    let exit = |Exit { code, signal }: Exit, timed_out: bool| {
        let exit = json!({ "exit_code": code, "signal": signal, "timed_out": timed_out });
        json!({ "exit": exit })
    };
    let text = match event {
        ProgramEvent::Output(stream, bytes) => return Message::Binary(framed(stream, &bytes)),
        ProgramEvent::Ended(Ok(ended)) => exit(ended, false),
        ProgramEvent::Ended(Err(ClientError::Timeout { .. })) => exit(Exit::default(), true),
        ProgramEvent::Ended(Err(error)) => {
            json!({ "error": { "code": "exec_failed", "message": chain(&error), "hint": null } })
        }
    };
    Message::Text(text.to_string().into())
}

fn framed(stream: OutputStream, bytes: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(bytes.len() + 1);
    framed.put_u8(match stream {
        OutputStream::Stdout => 1,
        OutputStream::Stderr => 2,
    });
    framed.put_slice(bytes);
    framed.freeze()
}

/// Does what the client wants until it is gone.
async fn listen(mut source: SplitStream<WebSocket>, input: Sender<io::Result<Bytes>>, signaller: Signaller) {
    let mut input = Some(input);
    while let Some(Ok(message)) = source.next().await {
        match message {
            Message::Binary(bytes) if bytes.is_empty() => {}
            Message::Binary(bytes) => {
                if let Some(input) = &input {
                    // A program that has closed its input does not want it.
                    let _ = input.send(Ok(bytes)).await;
                }
            }
            Message::Text(text) => match serde_json::from_str(&text) {
                Ok(Wish::Eof(true)) => input = None,
                Ok(Wish::Eof(false)) => {}
                Ok(wish) => grant(wish, signaller.clone()).await,
                Err(error) => tracing::debug!(%error, "a client's message says nothing"),
            },
            Message::Close(_) => return,
            Message::Ping(_) | Message::Pong(_) => {}
        }
    }
}

async fn grant(wish: Wish, signaller: Signaller) {
    let granted = tokio::task::spawn_blocking(move || match wish {
        Wish::Signal(signal) => signaller.send(signal),
        Wish::Resize { rows, cols } => signaller.resize(rows, cols),
        Wish::Eof(_) => Ok(()),
    });
    match granted.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a program has not heard its client"),
        Err(error) => tracing::warn!(%error, "a program has not heard its client"),
    }
}
