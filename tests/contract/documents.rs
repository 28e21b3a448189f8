//! What commands that need no guest print on stdout, with `--json` and without, and the files that they write.

use crate::golden::{Golden, with_placeholders};
use crate::program::transcript;
use crate::scenario::Stage;

/// Keys whose values differ from host to host or from run to run.
fn volatile(name: &str) -> &'static [&'static str] {
    match name {
        "doctor" => &["verdict", "found", "mend?"],
        "completions" => &["script"],
        "cleanup" | "cleanup-empty" => &["cgroups"],
        "mount" => &["pid"],
        // How much is read at once is the kernel's choice.
        "mount-stats.json" => &["bytes_fetched", "requests"],
        "inspect-old" => &["size_bytes", "ratio"],
        name if name.starts_with("repack") => {
            &["size_bytes", "sha256", "index_offset", "index_size", "index_sha256", "ratio"]
        }
        name if name.starts_with("snapshots") || name == "images" => &["disk_bytes"],
        name if name.starts_with("cache-ls") => &["oldest_use"],
        _ => &[],
    }
}

#[test]
fn json_documents_are_what_they_were() {
    let stage = Stage::play(true);
    let mut golden = Golden::open("json");
    for said in &stage.said {
        let name = said.name;
        let fails = name == "cache-verify-damaged";
        if name != "doctor" && name != "hub-serve" {
            assert_eq!(
                said.run.code,
                Some(i32::from(fails)),
                "{name}: {}{}",
                said.run.stdout,
                said.run.stderr
            );
        }
        // What is logged besides is in the text's golden file.
        assert!(said.run.stderr.is_empty() || fails, "{name}: {}", said.run.stderr);
        let document = with_placeholders(&stage.names.apply(&said.run.stdout), volatile(name));
        golden.check(&format!("{name}.json"), &document);
    }
    for (name, content) in &stage.files {
        let content = with_placeholders(&stage.names.apply(content), volatile(name));
        golden.check(&format!("file-{name}"), &content);
    }
    golden.finish();
}

#[test]
fn text_is_what_it_was() {
    let stage = Stage::play(false);
    let mut golden = Golden::open("text");
    // Of the doctor nearly everything is the host's.
    for said in stage.said.iter().filter(|said| said.name != "doctor") {
        let args: Vec<_> = said.args.iter().map(String::as_str).collect();
        golden.check(&format!("{}.txt", said.name), &stage.names.apply(&transcript(&args, &said.run)));
    }
    golden.finish();
}
