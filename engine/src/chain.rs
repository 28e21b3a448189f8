//! An error and its causes as one line of text. A leaf: everything may call it.

use std::error::Error;

/// The error and its causes on one line, outermost first, leaving out a cause whose text the one before already ends
/// with. Without control characters: causes can quote what a server or a guest sent.
pub fn chain(error: &dyn Error) -> String {
    plain(&causes(error))
}

/// As [`chain`], with the line breaks and control characters that the causes have.
pub fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

/// `text` with a space for each control character, so that it cannot command a terminal.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
