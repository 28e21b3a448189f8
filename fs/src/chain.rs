//! An error and its causes as one line.

/// An error with its causes, the innermost last, parted by colons.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the pack")]
    struct Outer(#[source] io::Error);

    #[test]
    fn causes_follow_in_order() {
        let inner = Outer(io::Error::other(Outer(io::Error::other("no such host"))));
        // An io::Error hides the error it wraps, but has its text.
        assert_eq!(chain(&inner), "cannot open the pack: cannot open the pack: no such host");
    }
}
