//! The agent's program, which goes into every root disk.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::error::RecipeError;

/// The static agent to put into machines: `FORKD_AGENT`, or beside this program, or where cargo puts it.
///
/// # Errors
/// [`RecipeError::NoAgent`], [`RecipeError::BadAgent`].
pub fn agent_binary() -> Result<PathBuf, RecipeError> {
    if let Some(path) = std::env::var_os("FORKD_AGENT").map(PathBuf::from) {
        return match why_not_static(&path) {
            None => Ok(path),
            Some(why) => Err(RecipeError::BadAgent { path, why }),
        };
    }
    let exe = std::env::current_exe().unwrap_or_default();
    let beside = exe.parent().unwrap_or(Path::new("/"));
    let target = beside.join("../x86_64-unknown-linux-gnu");
    // Cargo also builds an agent for this machine's own tests, which is not static: it is passed over.
    let profile = beside.file_name().map_or_else(|| OsString::from("release"), OsString::from);
    let searched = vec![
        beside.join("forkd-agent"),
        target.join(profile).join("forkd-agent"),
        target.join("release/forkd-agent"),
    ];
    if let Some(path) = searched.iter().find(|path| why_not_static(path).is_none()) {
        return Ok(path.clone());
    }
    match searched.iter().find(|path| path.is_file()) {
        Some(path) => {
            let why = why_not_static(path).unwrap_or("it changed just now");
            Err(RecipeError::BadAgent { path: path.clone(), why })
        }
        None => Err(RecipeError::NoAgent { searched }),
    }
}

/// Why a file cannot be a machine's first process: there is nothing beside it that could load it.
fn why_not_static(path: &Path) -> Option<&'static str> {
    const ELF_X86_64: (&[u8], &[u8]) = (b"\x7fELF\x02\x01", &[0x3e, 0]);
    const PT_INTERP: u32 = 3;
    let mut head = Vec::new();
    if File::open(path).and_then(|file| file.take(4096).read_to_end(&mut head)).is_err() {
        return Some("it cannot be read");
    }
    if head.len() < 64 || !head.starts_with(ELF_X86_64.0) || head.get(18..20) != Some(ELF_X86_64.1) {
        return Some("it is no x86-64 program");
    }
    // Program headers follow the ELF header directly, 56 bytes each; their number is at offset 56.
    let count = usize::from(u16::from_le_bytes([head[56], head[57]]));
    let headers = head[64..].chunks_exact(56).take(count);
    let kind = |header: &[u8]| u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let dynamic = headers.into_iter().any(|header| kind(header) == PT_INTERP);
    dynamic.then_some("it is linked dynamically")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use tempfile::TempDir;

    #[test]
    fn only_a_static_program_can_be_the_agent() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("program");
        assert_eq!(why_not_static(&path), Some("it cannot be read"));
        for text in [&b""[..], b"\x7fELF", b"#!/bin/sh", &[0; 4096]] {
            fs::write(&path, text).unwrap();
            assert_eq!(why_not_static(&path), Some("it is no x86-64 program"));
        }
        // The shell is dynamic on every distribution; an ELF header without program headers needs no loader.
        assert_eq!(why_not_static(Path::new("/bin/sh")), Some("it is linked dynamically"));
        let mut header = vec![0; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[18] = 0x3e;
        fs::write(&path, &header).unwrap();
        assert_eq!(why_not_static(&path), None);
        // A header that claims more than the file has.
        header[56] = 0xff;
        header[57] = 0xff;
        fs::write(&path, &header).unwrap();
        assert_eq!(why_not_static(&path), None);
        header.truncate(20);
        fs::write(&path, &header).unwrap();
        assert_eq!(why_not_static(&path), Some("it is no x86-64 program"));
    }
}
