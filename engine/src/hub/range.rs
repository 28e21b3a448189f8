//! The request headers that decide which bytes of a file are sent: Range, If-Match, If-None-Match, If-Range
//! (RFC 9110 sections 13 and 14). Pure; used by `static_files`.

/// The bytes of a file that answer a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// All of them: 200.
    Whole,
    /// `start..end`, never empty: 206.
    Part {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// None of the bytes asked for exist, or several ranges were asked for, which is not served: 416.
    Unsatisfiable,
}

/// Reads a Range header for a file of `size` bytes. A header that is no byte range is ignored, as the RFC demands.
pub fn select(header: Option<&str>, size: u64) -> Selection {
    let Some(ranges) = header.and_then(|header| header.trim().strip_prefix("bytes=")) else {
        return Selection::Whole;
    };
    if ranges.contains(',') {
        return Selection::Unsatisfiable;
    }
    let Some((first, last)) = ranges.trim().split_once('-') else { return Selection::Whole };
    match (number(first), number(last)) {
        (Number::Missing, Number::Value(0)) => Selection::Unsatisfiable,
        (Number::Missing, Number::Value(suffix)) => part(size.saturating_sub(suffix), size),
        (Number::Value(start), Number::Missing) => part(start, size),
        (Number::Value(start), Number::Value(last)) if start <= last => {
            part(start, size.min(last.saturating_add(1)))
        }
        _ => Selection::Whole,
    }
}

fn part(start: u64, end: u64) -> Selection {
    if start < end { Selection::Part { start, end } } else { Selection::Unsatisfiable }
}

enum Number {
    Missing,
    Value(u64),
    Malformed,
}

fn number(text: &str) -> Number {
    if text.is_empty() {
        Number::Missing
    } else if !text.bytes().all(|b| b.is_ascii_digit()) {
        Number::Malformed
    } else {
        // All digits, so the only failure is a number beyond every file: as good as the largest.
        Number::Value(text.parse().unwrap_or(u64::MAX))
    }
}

/// Whether an If-Match or If-None-Match list names `etag` by strong comparison, or is `*`.
pub fn lists(header: &str, etag: &str) -> bool {
    header.split(',').map(str::trim).any(|entry| entry == "*" || entry == etag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_form_of_range() {
        let part = |start, end| Selection::Part { start, end };
        let table = [
            (None, Selection::Whole),
            (Some("bytes=0-9"), part(0, 10)),
            (Some("bytes=90-"), part(90, 100)),
            (Some("bytes=-10"), part(90, 100)),
            (Some("bytes=-1000"), part(0, 100)),
            (Some("bytes=99-1000"), part(99, 100)),
            (Some("bytes=0-18446744073709551615"), part(0, 100)),
            (Some("bytes=0-99999999999999999999999"), part(0, 100)),
            (Some("bytes=100-"), Selection::Unsatisfiable),
            (Some("bytes=100-200"), Selection::Unsatisfiable),
            (Some("bytes=-0"), Selection::Unsatisfiable),
            (Some("bytes=0-1,5-6"), Selection::Unsatisfiable),
            (Some("bytes=9-0"), Selection::Whole),
            (Some("bytes=a-b"), Selection::Whole),
            (Some("bytes=-"), Selection::Whole),
            (Some("bytes=5"), Selection::Whole),
            (Some("items=0-9"), Selection::Whole),
        ];
        for (header, expected) in table {
            assert_eq!(select(header, 100), expected, "{header:?}");
        }
        assert_eq!(select(Some("bytes=0-"), 0), Selection::Unsatisfiable);
    }

    #[test]
    fn etag_lists() {
        assert!(lists("\"a\", \"b\"", "\"b\""));
        assert!(lists("*", "\"b\""));
        assert!(!lists("W/\"b\"", "\"b\""), "weak tags never match strongly");
        assert!(!lists("", "\"b\""));
    }

    proptest! {
        #[test]
        fn no_header_selects_outside_the_file(header in "(bytes=)?[0-9,-]{0,30}", size in 0u64..1000) {
            if let Selection::Part { start, end } = select(Some(&header), size) {
                prop_assert!(start < end && end <= size);
            }
        }
    }
}
