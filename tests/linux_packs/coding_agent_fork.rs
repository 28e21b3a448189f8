//! `coding-agent-fork`: five copies of a workspace have every byte of it, and change it without each other's knowledge.

use super::{of, value};
use std::collections::BTreeSet;

/// Of `vendored.bin`, as the recipe's probe has it.
const VENDORED: &str = "97358ae0f0184192b8d6ad370dd9a599ad3975128d71bf03bafe0d5bcc2db843";
/// Ways to mend `median`'s last line, and whether they do.
const WAYS: [(&str, bool); 5] = [
    ("return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2", true),
    ("return ordered[(len(ordered) - 1) // 2]", false),
    ("return sum(ordered) / len(ordered)", false),
    (
        "return sum(sorted(ordered)[(len(ordered) - 1) // 2:len(ordered) // 2 + 1]) / (2 - len(ordered) % 2)",
        true,
    ),
    ("return (ordered[len(ordered) // 2] + ordered[len(ordered) // 2 - 1]) / 2", false),
];

#[test]
fn five_copies_have_the_same_bytes_and_mend_the_bug_in_their_own_ways() {
    let copies = of("coding-agent-fork", WAYS.len());
    let digests: BTreeSet<String> = (0..WAYS.len()).map(|at| value(&copies, at, "digest()")).collect();
    assert_eq!(digests.len(), 1, "{digests:?}");
    for (at, (way, _)) in WAYS.iter().enumerate() {
        let vendored =
            copies.run(&["exec", copies.id(at), "--", "sha256sum", "/tmp/workspace/vendored.bin"]).success();
        assert!(vendored.starts_with(VENDORED), "{vendored}");
        let mend = format!(
            "import pathlib\nfile = pathlib.Path('/tmp/workspace/mathy/sequences.py')\ntext = file.read_text()\n\
             wrong = 'return ordered[len(ordered) // 2]'\nassert text.count(wrong) == 1\n\
             file.write_text(text.replace(wrong, {way:?}))\n"
        );
        copies.json(&["eval", copies.id(at), &mend]);
    }
    for (at, (way, right)) in WAYS.iter().enumerate() {
        let tested = value(&copies, at, "test()");
        assert_eq!(tested == "{'exit': 0, 'passed': 11, 'failed': []}", *right, "{way}: {tested}");
        let diff = copies
            .run(&["exec", copies.id(at), "--", "git", "-C", "/tmp/workspace", "diff", "-U0"])
            .success();
        let added: Vec<_> =
            diff.lines().filter(|line| line.starts_with('+') && !line.starts_with("+++")).collect();
        assert_eq!(added, [format!("+    {way}")], "{diff}");
    }
    // Each is another now, and what none of them touched is what it was.
    let digests: BTreeSet<String> = (0..WAYS.len()).map(|at| value(&copies, at, "digest()")).collect();
    assert_eq!(digests.len(), WAYS.len(), "{digests:?}");
    copies.end();
}
