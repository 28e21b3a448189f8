//! Which file of the hub's folder a request may have, and the answer's head.
//!
//! Only `registry.json` and packs are served, only from the folder itself: a request names a plain file name or gets
//! 404. Links are not followed, so what lies outside the folder stays outside.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};
use rustix::fs::{Mode, OFlags};

use super::range::{self, Selection};

/// What is served beside registry.json: packs, and the root disks that the predecessor kept beside its packs.
const SERVED_SUFFIXES: [&str; 2] = [".tar.zst", ".rootfs.zst"];

/// An answer without its body.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: StatusCode,
    /// Headers, complete but for Date.
    pub headers: HeaderMap,
    /// The file and the bytes of it to send; `None` for an empty body.
    pub body: Option<FilePart>,
}

/// `len` bytes of a file from `start`.
#[derive(Debug, Clone)]
pub struct FilePart {
    /// The file.
    pub file: Arc<File>,
    /// First byte.
    pub start: u64,
    /// How many, at least one.
    pub len: u64,
}

impl Answer {
    fn empty(status: StatusCode) -> Answer {
        Answer { status, headers: HeaderMap::from_iter([(header::CONTENT_LENGTH, value("0"))]), body: None }
    }

    fn with(mut self, name: HeaderName, text: &str) -> Answer {
        self.headers.insert(name, value(text));
        self
    }
}

/// Every text put into a header here is made of digits, quotes and plain names.
fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""))
}

/// Answers a request for `path` from the files of `root`. Opens the file, so call it where blocking is allowed.
pub fn answer(root: &Path, method: &Method, path: &str, request: &HeaderMap) -> Answer {
    if method != Method::GET && method != Method::HEAD {
        return Answer::empty(StatusCode::METHOD_NOT_ALLOWED).with(header::ALLOW, "GET, HEAD");
    }
    let Some(name) = served_name(path) else { return Answer::empty(StatusCode::NOT_FOUND) };
    // NONBLOCK: opening a fifo that somebody left here must not hang the server.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::open(root.join(name), flags, Mode::empty()).map(File::from) else {
        return Answer::empty(StatusCode::NOT_FOUND);
    };
    let Some(metadata) = file.metadata().ok().filter(std::fs::Metadata::is_file) else {
        return Answer::empty(StatusCode::NOT_FOUND);
    };
    let etag = strong_etag(&metadata);
    let text = |name: HeaderName| request.get(name).and_then(|value| value.to_str().ok());
    if text(header::IF_MATCH).is_some_and(|list| !range::lists(list, &etag)) {
        return Answer::empty(StatusCode::PRECONDITION_FAILED).with(header::ETAG, &etag);
    }
    if text(header::IF_NONE_MATCH).is_some_and(|list| range::lists(list, &etag)) {
        let mut answer = Answer::empty(StatusCode::NOT_MODIFIED).with(header::ETAG, &etag);
        // Here a length would be taken for the file's.
        answer.headers.remove(header::CONTENT_LENGTH);
        return answer;
    }
    // Range is defined for GET only; an If-Range that names another object voids it.
    let current = text(header::IF_RANGE).is_none_or(|named| named == etag);
    let wanted = text(header::RANGE).filter(|_| method == Method::GET && current);
    let size = metadata.len();
    let selection = range::select(wanted, size);
    let (status, start, end) = match selection {
        Selection::Whole => (StatusCode::OK, 0, size),
        Selection::Part { start, end } => (StatusCode::PARTIAL_CONTENT, start, end),
        Selection::Unsatisfiable => {
            return Answer::empty(StatusCode::RANGE_NOT_SATISFIABLE)
                .with(header::CONTENT_RANGE, &format!("bytes */{size}"))
                .with(header::ETAG, &etag);
        }
    };
    let mut answer = Answer::empty(status)
        .with(header::CONTENT_LENGTH, &(end - start).to_string())
        .with(header::ACCEPT_RANGES, "bytes")
        .with(header::ETAG, &etag)
        .with(
            header::CONTENT_TYPE,
            if name == "registry.json" { "application/json" } else { "application/zstd" },
        );
    if name == "registry.json" {
        answer = answer.with(header::CACHE_CONTROL, "no-cache");
    }
    if status == StatusCode::PARTIAL_CONTENT {
        answer = answer.with(header::CONTENT_RANGE, &format!("bytes {start}-{}/{size}", end - 1));
    }
    if method == Method::GET && end > start {
        answer.body = Some(FilePart { file: Arc::new(file), start, len: end - start });
    }
    answer
}

/// The file a URL path names, when it is one that is served. Plain names need no percent-decoding.
fn served_name(path: &str) -> Option<&str> {
    let name = path.strip_prefix('/')?;
    let served = name == "registry.json" || SERVED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix));
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    (served && plain && !name.starts_with('.') && name.len() <= 255).then_some(name)
}

/// Changes whenever the file is replaced or written to; the same for as long as it is not.
fn strong_etag(metadata: &std::fs::Metadata) -> String {
    let modified = metadata.mtime() as u64;
    format!("\"{:x}-{:x}-{modified:x}.{:x}\"", metadata.ino(), metadata.len(), metadata.mtime_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_registry_and_packs_of_the_folder_have_names() {
        assert_eq!(served_name("/registry.json"), Some("registry.json"));
        assert_eq!(served_name("/o-n-v1.forkd-snapshot.tar.zst"), Some("o-n-v1.forkd-snapshot.tar.zst"));
        for path in [
            "",
            "/",
            "registry.json",
            "/../registry.json",
            "/a/b.tar.zst",
            "/%2e%2e/x.tar.zst",
            "/.hidden.tar.zst",
            "/.registry.lock",
            "/etc/passwd",
            "/registry.json/",
            "//registry.json",
            "/x.tar.zst\0",
        ] {
            assert_eq!(served_name(path), None, "{path}");
        }
    }

    #[test]
    fn links_and_directories_are_not_served() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("a.tar.zst")).unwrap();
        std::fs::create_dir(dir.path().join("b.tar.zst")).unwrap();
        for path in ["/a.tar.zst", "/b.tar.zst"] {
            let answer = answer(dir.path(), &Method::GET, path, &HeaderMap::new());
            assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}");
        }
    }

    #[test]
    fn an_empty_file_is_whole_and_has_no_ranges() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("e.tar.zst"), b"").unwrap();
        let whole = answer(dir.path(), &Method::GET, "/e.tar.zst", &HeaderMap::new());
        assert_eq!((whole.status, whole.body.is_none()), (StatusCode::OK, true));
        let range = HeaderMap::from_iter([(header::RANGE, value("bytes=0-0"))]);
        let part = answer(dir.path(), &Method::GET, "/e.tar.zst", &range);
        assert_eq!(part.status, StatusCode::RANGE_NOT_SATISFIABLE);
    }
}
