//! What machines print while they are built: kept with a good snapshot, and in the error of one that failed.

use super::golden::{Golden, with_placeholders};
use super::harness::{Bed, Hub};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// A kernel of a few instructions that prints `message` and resets the machine.
fn kernel_that_prints(message: &[u8]) -> Vec<u8> {
    const LOADED_AT: u64 = 0x10_0000;
    const HEADERS: u64 = 64 + 56;
    let code_bytes = 29_u64;
    let mut code = vec![0x48, 0xbe]; // mov rsi, MESSAGE
    code.extend((LOADED_AT + HEADERS + code_bytes).to_le_bytes());
    code.push(0xb9); // mov ecx, LENGTH
    code.extend((message.len() as u32).to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    code.extend([0xac, 0xee, 0xe2, 0xfc]); // lodsb; out dx, al; loop
    code.extend([0xb0, 0xfe, 0xe6, 0x64]); // mov al, 0xfe; out 0x64, al
    code.extend([0xeb, 0xfe]); // jmp to itself
    assert_eq!(code.len() as u64, code_bytes);
    let length = HEADERS + code_bytes + message.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    // ET_EXEC, x86-64, version 1.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend([LOADED_AT + HEADERS, 64, 0].map(u64::to_le_bytes).concat());
    // No flags, sizes of both headers, one program header, no sections.
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // PT_LOAD, readable and executable: the whole file.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    elf.extend([0, LOADED_AT, LOADED_AT, length, length, 0x1000].map(u64::to_le_bytes).concat());
    elf.extend(code);
    elf.extend(message);
    elf
}

fn snapshot(bed: &Bed, kernel: &Path, more: &[&str]) -> Output {
    let mut command = bed.command(&Hub::at("http://127.0.0.1:9/".to_owned()));
    command.args(["snapshot", "--tag", "new", "--kernel"]).arg(kernel);
    command.arg("--rootfs").arg(bed.snapshot().join("rootfs.erofs")).args(more).output().unwrap()
}

fn run(bed: &Bed, arguments: &[&str]) -> (Option<i32>, String) {
    bed.run(&Hub::at("http://127.0.0.1:9/".to_owned()), arguments).both()
}

#[test]
fn the_last_words_of_a_machine_that_failed_are_in_the_error_and_harm_no_terminal() {
    let bed = Bed::copied();
    let kernel = bed.path("kernel");
    let lines: String = (0..40).map(|number| format!("line {number}\r\n")).collect();
    let message = lines + "\x1b]0;title\x07\x1b[2Jhint: do as I say\r\nno root \u{9b}31m\r\n";
    fs::write(&kernel, kernel_that_prints(message.as_bytes())).unwrap();
    let failed = snapshot(&bed, &kernel, &["--memory", "64"]);
    let text = String::from_utf8(failed.stderr).unwrap();
    assert_eq!(failed.status.code(), Some(1), "{text}");
    assert!(text.contains("new: the machine failed while booting: the guest reset itself\n"), "{text}");
    assert!(text.contains("\nthe machine's console ended with:\n    line 30\n"), "{text}");
    assert!(
        text.contains("\n     ]0;title  [2Jhint: do as I say\n    no root  31m\nhint: nothing was kept\n"),
        "{text}"
    );
    assert!(!text.chars().any(|c| c.is_control() && c != '\n') && !text.contains("line 29"), "{text:?}");
    let shown = snapshot(&bed, &kernel, &["--memory", "64", "--json"]).stdout;
    let why = serde_json::from_slice::<serde_json::Value>(&shown).unwrap()["error"]["why"].clone();
    assert!(why.as_str().unwrap().contains("the machine's console ended with: line 30 line 31"), "{why}");
    assert_eq!(fs::read_dir(bed.path("data/forkd/snapshots")).unwrap().count(), 1, "something was kept");
    assert!(!bed.has_run_dirs());
}

#[test]
fn the_console_of_a_good_build_is_kept_and_is_not_in_its_pack() {
    let bed = Bed::copied();
    let (_, kernel) = run(&bed, &["kernel", "path"]);
    let warm = "echo spoken by the machine > /dev/console; echo '{\"ready\":true}'; exec sleep 1000000";
    let built = snapshot(&bed, Path::new(kernel.trim()), &["--memory", "128", "--warm", warm, "--json"]);
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let mut golden = Golden::open("build");
    let volatile = ["path", "memory_stored_bytes", "root_disk_bytes", "seconds"];
    golden.check("snapshot.json", &with_placeholders(&String::from_utf8(built.stdout).unwrap(), &volatile));
    golden.finish();
    assert!(!bed.has_run_dirs());
    let (code, console) = run(&bed, &["logs", "--tag", "new"]);
    assert!(code == Some(0) && console.contains("Linux version"), "{console}");
    assert!(console.contains("spoken by the machine"), "{console}");
    let (_, document) = run(&bed, &["--json", "logs", "--tag", "new"]);
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!((&document["tag"], &document["console"]), (&"new".into(), &console.into()));

    let pack = bed.path("new.tar.zst");
    let pack = pack.to_str().unwrap();
    assert_eq!(run(&bed, &["pack", "--tag", "new", "--out", pack]).0, Some(0));
    let members = Command::new("tar").args(["--zstd", "-tf", pack]).output().unwrap().stdout;
    let members = String::from_utf8(members).unwrap();
    assert!(members.contains("memory.bin") && !members.contains("console"), "{members}");
    assert_eq!(run(&bed, &["unpack", pack, "--tag", "again"]).0, Some(0));
    let (code, text) = run(&bed, &["logs", "--tag", "again"]);
    assert!(code == Some(1) && text.contains("no console is kept with the snapshot `again`"), "{text}");
}
