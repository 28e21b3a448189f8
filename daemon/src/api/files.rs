//! /v1/sandboxes/{id}/files: files and directories in and out, as streams. What is sent is never held whole.

use super::caller::Caller;
use super::error::{ApiError, ErrorBody};
use super::sandboxes::found;
use crate::sandboxes::Owner;
use crate::state::Daemon;
use crate::streams::{self, ChannelWriter, IDLE, WAITING};
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use forkd_engine::fork::agent::{AgentClient, ClientError, Signaller};
use forkd_engine::fork::children::{self, ChildrenError, agent_error};
use forkd_engine::fork::copy;
use forkd_engine::interrupt::Interrupt;
use serde::Deserialize;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{self, Sender};
use tokio_stream::{Stream, StreamExt};
use utoipa::IntoParams;

/// Longest path, bytes.
const PATH_MAX: usize = 4096;
/// How long one transfer may take.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(3600);
/// Permissions of a file that is written without a wish.
const MODE: u32 = 0o644;

/// Which file.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct FileQuery {
    /// Its absolute path in the sandbox.
    path: String,
    /// `tar`: a directory with all that is in it, as a tar archive.
    format: Option<String>,
    /// Permissions of a file that is written, octal: 644 without it.
    mode: Option<String>,
}

/// A checked [`FileQuery`].
struct Place {
    path: String,
    tar: bool,
    mode: u32,
}

impl Place {
    fn of(query: Result<Query<FileQuery>, QueryRejection>) -> Result<Place, ApiError> {
        let Query(FileQuery { path, format, mode }) =
            query.map_err(|error| ApiError::invalid(error.body_text()))?;
        if !path.starts_with('/') || path.len() > PATH_MAX || path.contains('\0') {
            return Err(ApiError::invalid("path is an absolute path in the sandbox, of 4096 bytes at most"));
        }
        let tar = match format.as_deref() {
            None => false,
            Some("tar") => true,
            Some(_) => return Err(ApiError::invalid("format is tar, or absent")),
        };
        let wrong = || ApiError::invalid("mode is octal, such as 644");
        let octal = |text: String| {
            let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o7777);
            mode.ok_or_else(wrong)
        };
        Ok(Place { path, tar, mode: mode.map(octal).transpose()?.unwrap_or(MODE) })
    }
}

/// A connection to a sandbox's agent, for one transfer, which is given up when this is dropped.
struct Transfer {
    id: String,
    client: Option<AgentClient>,
    signaller: Signaller,
    permit: Option<OwnedSemaphorePermit>,
}

impl Transfer {
    async fn begin(daemon: &Daemon, owner: &Owner, id: &str) -> Result<Transfer, ApiError> {
        found(daemon, owner, id).await?;
        let permit = daemon.blocking.stream()?;
        let (paths, id) = (daemon.paths.clone(), id.to_owned());
        let connecting = tokio::task::spawn_blocking(move || -> Result<Transfer, ChildrenError> {
            let client = children::connect(&paths, &id)?;
            let signaller = client.signaller().map_err(agent_error(&id))?;
            Ok(Transfer { id, client: Some(client), signaller, permit: Some(permit) })
        });
        Ok(connecting.await.map_err(|error| ApiError::internal(error.to_string()))??)
    }

    /// Has a thread do it.
    fn run(
        &mut self,
        work: impl FnOnce(AgentClient) -> Result<(), ApiError> + Send + 'static,
    ) -> Result<impl Future<Output = Result<(), ApiError>> + Send + 'static, ApiError> {
        let gone = || ApiError::internal("the transfer is under way already");
        let (client, permit) = self.client.take().zip(self.permit.take()).ok_or_else(gone)?;
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(client)
        });
        Ok(async move { task.await.unwrap_or_else(|error| Err(ApiError::internal(error.to_string()))) })
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.signaller.give_up();
    }
}

/// A file's contents, or a directory as a tar archive.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/files", tag = "inside", params(("id" = String, Path), FileQuery),
    responses((status = 200, content_type = "application/octet-stream"), (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn read(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
    query: Result<Query<FileQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let place = Place::of(query)?;
    let kind = if place.tar { "application/x-tar" } else { "application/octet-stream" };
    let mut transfer = Transfer::begin(&daemon, &owner, &id).await?;
    let (items, mut arriving) = mpsc::channel::<Result<Bytes, ApiError>>(WAITING);
    let mut writer = ChannelWriter::new(items.clone(), Ok);
    let id = transfer.id.clone();
    let reading = transfer.run(move |client| {
        let client_error = |error: ClientError| ApiError::from(agent_error(&id)(error));
        match place.tar {
            true => copy::out_as_archive(client, &place.path, false, &mut writer, &Interrupt::default())
                .map(drop)
                .map_err(ApiError::from),
            false => client
                .get(&place.path, &mut writer, u64::MAX, TRANSFER_TIMEOUT)
                .map(drop)
                .map_err(client_error),
        }
    })?;
    tokio::spawn(async move {
        if let Err(error) = reading.await {
            // Who is gone does not hear it.
            let _ = items.send(Err(error)).await;
        }
    });
    // A failure before the first byte still has a status of its own.
    let first = arriving.recv().await.transpose()?;
    let body = Body::from_stream(rest(first, arriving, transfer));
    Ok(([(header::CONTENT_TYPE, kind)], body).into_response())
}

fn rest(
    first: Option<Bytes>,
    arriving: mpsc::Receiver<Result<Bytes, ApiError>>,
    transfer: Transfer,
) -> impl Stream<Item = io::Result<Bytes>> {
    let begin = tokio_stream::iter(first.map(Ok));
    let more = futures_util::stream::unfold((arriving, transfer), |(mut arriving, transfer)| async move {
        let item = arriving.recv().await?;
        Some((item.map_err(|error| io::Error::other(error.message().to_owned())), (arriving, transfer)))
    });
    begin.chain(more)
}

/// Writes a file, all of it or none; or makes files of a tar archive, in a directory that is there.
#[utoipa::path(put, path = "/v1/sandboxes/{id}/files", tag = "inside", params(("id" = String, Path), FileQuery),
    request_body(content_type = "application/octet-stream"),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 408, body = ErrorBody), (status = 409, body = ErrorBody), (status = 413, body = ErrorBody),
        (status = 422, body = ErrorBody)))]
pub async fn write(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
    query: Result<Query<FileQuery>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let Place { path, tar, mode } = Place::of(query)?;
    let limit = daemon.options.limits.file_bytes;
    if announced(&headers).is_some_and(|length| length > limit) {
        return Err(too_large(limit));
    }
    let mut transfer = Transfer::begin(&daemon, &owner, &id).await?;
    let (chunks, mut reader) = streams::reader();
    let id = transfer.id.clone();
    let writing = transfer.run(move |client| {
        let client_error = |error: ClientError| ApiError::from(agent_error(&id)(error));
        match tar {
            true => copy::into_from_archive(client, &mut reader, &path, false, &Interrupt::default())
                .map(drop)
                .map_err(ApiError::from),
            false => client.put(&path, mode, &mut reader, TRANSFER_TIMEOUT).map(drop).map_err(client_error),
        }
    })?;
    let (sent, written) = tokio::join!(send(body, chunks, limit), writing);
    // Why the client's bytes ended says more than that they did.
    sent?;
    written?;
    Ok(StatusCode::NO_CONTENT)
}

fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn too_large(limit: u64) -> ApiError {
    let message = format!("a file has {limit} bytes at most");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
        .hint("start the daemon with a higher --max-file-size")
}

/// Passes a body on. What is wrong with it is said to the reader, too, which keeps nothing then.
async fn send(body: Body, chunks: Sender<io::Result<Bytes>>, limit: u64) -> Result<(), ApiError> {
    let mut arriving = body.into_data_stream();
    let mut total = 0_u64;
    loop {
        let fault = match tokio::time::timeout(IDLE, arriving.next()).await {
            Ok(None) => return Ok(()),
            Ok(Some(Ok(bytes))) => {
                total += bytes.len() as u64;
                if total <= limit {
                    if chunks.send(Ok(bytes)).await.is_err() {
                        // The reader has failed, and says why.
                        return Ok(());
                    }
                    continue;
                }
                too_large(limit)
            }
            Ok(Some(Err(error))) => ApiError::invalid(format!("the body cannot be read: {error}")),
            Err(_) => ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", "the body takes too long"),
        };
        let _ = chunks.send(Err(io::ErrorKind::ConnectionAborted.into())).await;
        return Err(fault);
    }
}
