//! Names in archives: which ones are allowed.

/// Longest name, in bytes: `PATH_MAX` of Linux.
pub const NAME_MAX: usize = 4096;
/// Longest part of one, in bytes: `NAME_MAX` of Linux.
pub const PART_MAX: usize = 255;
/// Most parts of a name. Each directory on the way is an open descriptor, and there are 1024 of those by default.
pub const DEPTH_MAX: usize = 256;

/// The parts of a name; empty for the top itself.
///
/// # Errors
/// What is wrong with it: it is absolute, leads upwards, has a NUL byte, is too long or too deep.
pub fn parts(name: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    if name.len() > NAME_MAX {
        return Err("it is longer than 4096 bytes");
    }
    if name.starts_with(b"/") {
        return Err("it is absolute");
    }
    if name.contains(&0) {
        return Err("it has a NUL byte");
    }
    let parts: Vec<&[u8]> =
        name.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&&b".."[..]) {
        return Err("it leads upwards");
    }
    if parts.len() > DEPTH_MAX {
        return Err("it has more than 256 parts");
    }
    if parts.iter().any(|part| part.len() > PART_MAX) {
        return Err("a part of it is longer than 255 bytes");
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_below_the_top_are_allowed() {
        assert_eq!(parts(b"a//./b/").unwrap(), [b"a", b"b"]);
        assert_eq!(parts(b"./").unwrap().len(), 0);
        assert_eq!(parts(b"..a/.b.").unwrap(), [&b"..a"[..], b".b."]);
        for bad in
            [&b"/etc"[..], b"..", b"a/../b", b"a/..", b"a\0b", &[b'x'; 256], &b"d/".repeat(257), &[b'/'; 1]]
        {
            assert!(parts(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
        assert!(parts(&b"d/".repeat(2049)).is_err());
    }
}
