//! Keys, the agent's program and the image's frame; the test that builds a whole disk is `tests/root_disk.rs`.

use super::*;
use tempfile::TempDir;

const RECIPE: &str = "name = \"x\"\n[base]\nsuite = \"bookworm\"\npackages = [\"a\", \"b\"]\n\
    [[files]]\nfrom = \"file\"\nto = \"/file\"\n";

fn recipe(dir: &TempDir, text: &str, contents: &str) -> Recipe {
    fs::write(dir.path().join("recipe.toml"), text).unwrap();
    fs::write(dir.path().join("file"), contents).unwrap();
    Recipe::load(dir.path()).unwrap()
}

#[test]
fn every_input_is_in_the_key_and_their_place_is_not() {
    let dir = TempDir::new().unwrap();
    let agent = dir.path().join("agent");
    fs::write(&agent, "one").unwrap();
    let sources = AptSources { lines: "deb a b main\n".to_owned(), stanzas: String::new() };
    let key =
        |recipe: &Recipe, sources: &AptSources| disk_key(recipe, &agent, &base_key(recipe, sources)).unwrap();
    let first = key(&recipe(&dir, RECIPE, "1"), &sources);
    let elsewhere = TempDir::new().unwrap();
    assert_eq!(first, key(&recipe(&elsewhere, RECIPE, "1"), &sources));
    assert_eq!(first, key(&recipe(&dir, &RECIPE.replace("\"a\", \"b\"", "\"b\", \"a\""), "1"), &sources));
    let other_sources = AptSources { lines: String::new(), stanzas: "deb a b main\n".to_owned() };
    let mut others = vec![
        key(&recipe(&dir, RECIPE, "2"), &sources),
        key(&recipe(&dir, &RECIPE.replace("\"b\"", "\"c\""), "1"), &sources),
        key(&recipe(&dir, &RECIPE.replace("\"x\"", "\"y\""), "1"), &sources),
        key(&recipe(&dir, &RECIPE.replace("/file", "/file2"), "1"), &sources),
        key(&recipe(&dir, &format!("{RECIPE}executable = true\n"), "1"), &sources),
        key(&recipe(&dir, &RECIPE.replace("bookworm", "trixie"), "1"), &sources),
        key(&recipe(&dir, RECIPE, "1"), &other_sources),
    ];
    fs::write(&agent, "two").unwrap();
    others.push(key(&recipe(&dir, RECIPE, "1"), &sources));
    others.push(first);
    let count = others.len();
    others.sort_unstable();
    others.dedup();
    assert_eq!(others.len(), count);
}

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

#[test]
fn images_are_checked_and_padded() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("image");
    for len in [0, 1024, 1 << 20] {
        fs::write(&path, vec![0; len]).unwrap();
        assert!(pad(&path).is_err(), "{len}");
    }
    let mut image = vec![0; (2 << 20) + 1];
    image[1024..1028].copy_from_slice(&SUPERBLOCK.1);
    fs::write(&path, &image).unwrap();
    pad(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 4 << 20);
    pad(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 4 << 20);
}
