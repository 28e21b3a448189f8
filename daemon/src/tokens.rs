//! Who may use the daemon over TCP: a file with a token a line, with or without a name in front of it.
//!
//! ```text
//! # comment
//! 3b0c5f4e...            the token of the tenant `default`
//! alice 90ff1a2b...      the token of the tenant `alice`
//! ```
//! A tenant sees its own sandboxes and no others. Tokens are kept as digests, compared in constant time, and never
//! shown.

use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use subtle::ConstantTimeEq;

/// Longest file, bytes.
const FILE_MAX: u64 = 1 << 20;
/// Shortest token that is taken.
const TOKEN_MIN: usize = 16;
/// Longest name of a tenant.
const NAME_MAX: usize = 64;
/// Whose a token without a name is.
const DEFAULT: &str = "default";

/// A file that holds no tokens. It never says what is in it.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// It cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line that is none.
    #[error("line {line} of {} is not [NAME] TOKEN with a token of at least {TOKEN_MIN} characters", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
    },
    /// Nobody could get in.
    #[error("{} holds no token", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// The tokens.
#[derive(Default)]
pub struct Tokens {
    known: Vec<KnownToken>,
}

struct KnownToken {
    tenant: String,
    digest: [u8; 32],
}

impl Tokens {
    /// Those in a file.
    ///
    /// # Errors
    /// [`TokensError`] as its variants say.
    pub fn read(path: &Path) -> Result<Tokens, TokensError> {
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(FILE_MAX).read_to_string(&mut text))
            .map_err(|source| TokensError::Read { path: path.to_owned(), source })?;
        let lines = text.lines().map(str::trim).zip(1..);
        let used = lines.filter(|(line, _)| !line.is_empty() && !line.starts_with('#'));
        let known = used.map(|(text, line)| {
            KnownToken::parse(text).ok_or_else(|| TokensError::Line { path: path.to_owned(), line })
        });
        let known: Vec<_> = known.collect::<Result<_, _>>()?;
        match known.is_empty() {
            true => Err(TokensError::Empty { path: path.to_owned() }),
            false => Ok(Tokens { known }),
        }
    }

    /// Whose a token is. Takes as long whether it is anybody's or not.
    pub fn tenant(&self, token: &[u8]) -> Option<&str> {
        let digest: [u8; 32] = Sha256::digest(token).into();
        let mut found = None;
        for known in &self.known {
            if bool::from(known.digest.ct_eq(&digest)) {
                found = Some(known.tenant.as_str());
            }
        }
        found
    }
}

impl KnownToken {
    fn parse(line: &str) -> Option<KnownToken> {
        let (tenant, token) = match line.split_once(char::is_whitespace) {
            Some((name, token)) => (name, token.trim()),
            None => (DEFAULT, line),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let fits = tenant.len() <= NAME_MAX && tenant.chars().all(plain);
        let strong = token.len() >= TOKEN_MIN && token.bytes().all(|byte| byte.is_ascii_graphic());
        (fits && strong).then(|| KnownToken {
            tenant: tenant.to_owned(),
            digest: Sha256::digest(token.as_bytes()).into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn tokens(text: &str) -> Result<Tokens, TokensError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        Tokens::read(file.path())
    }

    #[test]
    fn a_token_is_its_tenant_s() {
        let tokens = tokens("# ours\n\n0123456789abcdef\nalice  fedcba9876543210\n").unwrap();
        assert_eq!(tokens.tenant(b"0123456789abcdef"), Some("default"));
        assert_eq!(tokens.tenant(b"fedcba9876543210"), Some("alice"));
        for wrong in [&b""[..], b"0123456789abcde", b"0123456789abcdefg", b"alice  fedcba9876543210"] {
            assert_eq!(tokens.tenant(wrong), None);
        }
    }

    #[test]
    fn a_bad_file_is_refused_without_being_quoted() {
        for bad in ["", "# nothing\n", "short\n", "a/b 0123456789abcdef\n", "a b c0123456789abcdef\n"] {
            let error = tokens(bad).err().unwrap_or_else(|| panic!("{bad:?} was taken"));
            assert!(!error.to_string().contains("0123456789abcdef"), "{error}");
        }
    }
}
