//! Files in and out of the machine: `put` and `get`, streamed and bounded.
//!
//! A put writes beside its target and renames, so the target is the old file or the whole new one, never a part.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use forkd_abi::protocol::{FrameKind, MAX_FILE_LEN, Response};

use super::stream::Stream;

/// A file being received. Dropped unfinished, it leaves nothing.
pub struct FileUpload {
    file: File,
    mode: u32,
    target: PathBuf,
    partial: PathBuf,
    len: u64,
    renamed: bool,
}

impl FileUpload {
    /// Opens the file beside the target; `unique` tells apart puts that run at the same time.
    pub fn open(path: &str, mode: u32, unique: u64) -> Result<Self, String> {
        let target = absolute(path)?;
        let parent = target.parent().filter(|_| target.file_name().is_some() && !target.is_dir());
        let parent = parent.ok_or_else(|| format!("{path:?} is a directory"))?;
        if mode > 0o7777 {
            return Err(format!("{mode:#o} are no permission bits"));
        }
        let partial = parent.join(format!(".forkd-put-{}-{unique}", std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial);
        let file = file.map_err(|error| format!("cannot write {path:?}: {error}"))?;
        Ok(Self { file, mode, target, partial, len: 0, renamed: false })
    }

    /// One stdin frame; the empty one ends the file. `Ok(true)` when the file is in place.
    pub fn on_input(&mut self, payload: &[u8]) -> Result<bool, String> {
        self.len += payload.len() as u64;
        if self.len > MAX_FILE_LEN {
            return Err(format!("{}: longer than {MAX_FILE_LEN} bytes", self.target.display()));
        }
        let done = if payload.is_empty() { self.finish() } else { self.file.write_all(payload) };
        done.map_err(|error| format!("cannot write {}: {error}", self.target.display()))?;
        Ok(payload.is_empty())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.file.set_permissions(Permissions::from_mode(self.mode))?;
        fs::rename(&self.partial, &self.target)?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for FileUpload {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// A file being sent.
pub struct FileDownload {
    file: File,
    path: PathBuf,
    sent: u64,
}

impl FileDownload {
    /// Opens a regular file and announces it on the stream.
    pub fn open(path: &str, stream: &mut Stream) -> Result<Self, String> {
        let path = absolute(path)?;
        let failed = |error: io::Error| format!("cannot read {}: {error}", path.display());
        // Non-blocking, or opening a FIFO would wait for a writer.
        let file =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(format!("{} is not a regular file", path.display()));
        }
        if metadata.len() > MAX_FILE_LEN {
            return Err(format!("{} is longer than {MAX_FILE_LEN} bytes", path.display()));
        }
        stream.reply(&Response::File { len: metadata.len(), mode: metadata.permissions().mode() & 0o7777 });
        Ok(Self { file, path, sent: 0 })
    }

    /// Sends the next piece; the last one ends the connection's task.
    pub fn pump(&mut self, stream: &mut Stream, scratch: &mut [u8]) {
        match self.file.read(scratch) {
            Ok(0) => stream.finish(&Response::Ok),
            Ok(n) => {
                self.sent += n as u64;
                if self.sent > MAX_FILE_LEN {
                    return stream
                        .fail(format!("{} is longer than {MAX_FILE_LEN} bytes", self.path.display()));
                }
                stream.send(FrameKind::Stdout, &scratch[..n]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => stream.fail(format!("cannot read {}: {error}", self.path.display())),
        }
    }
}

/// `path`, which has to be absolute.
pub fn absolute(path: &str) -> Result<PathBuf, String> {
    let absolute = Path::new(path);
    if absolute.is_absolute() {
        Ok(absolute.to_owned())
    } else {
        Err(format!("{path:?} is not an absolute path"))
    }
}
