//! Everyday tools on a mounted pack: whatever they print about a plain copy of its files, they print about the mount.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use forkd_fs::format::PACK_VERSION;
use forkd_fs::manifest::{KvmKind, Manifest, Requires};
use forkd_fs::writer::{PackOptions, PackWriter};
use support::{CHUNK, Hub, Lab, Mount, noise};

/// Files of many sizes and kinds, packed, published, mounted; and a plain copy of them that `tar` took out of the pack.
struct Both<'a> {
    mount: Mount<'a>,
    _hub: Hub,
    copy: PathBuf,
}

impl<'a> Both<'a> {
    fn new(lab: &'a Lab) -> Both<'a> {
        let (files, pack, copy) = (lab.path("files"), lab.path("tools.tar.zst"), lab.path("copy"));
        fs::create_dir_all(&files).unwrap();
        fs::create_dir_all(&copy).unwrap();
        make_files(&files);
        let options = PackOptions { chunk_size: CHUNK as u32, ..PackOptions::default() };
        PackWriter::new(options).write(&files, manifest(), &pack, &|_| ()).unwrap();
        lab.publish(&pack, "lab/tools").ok();
        done(Command::new("tar").arg("--zstd").arg("-xf").arg(&pack).arg("-C").arg(&copy));
        let hub = Hub::start(lab, &[]);
        let mount = Mount::new(lab, "mnt", &hub.url(), &[]);
        // What a copy cannot have of itself: the mount's permissions and times.
        for entry in fs::read_dir(&copy).unwrap() {
            let name = entry.unwrap().file_name();
            let (local, mounted) = (copy.join(&name), mount.version("tools").join(&name));
            done(Command::new("chmod").arg("--reference").arg(&mounted).arg(&local));
            done(Command::new("touch").arg("-r").arg(&mounted).arg(&local));
        }
        let mounted = mount.version("tools");
        done(Command::new("chmod").arg("--reference").arg(&mounted).arg(&copy));
        done(Command::new("touch").arg("-r").arg(&mounted).arg(&copy));
        Both { mount, _hub: hub, copy }
    }

    fn mounted(&self) -> PathBuf {
        self.mount.version("tools")
    }

    /// Runs a shell command in the mount and in the copy; both have to succeed and print the same. Returns what.
    fn same(&self, script: &str) -> String {
        let run = |dir: &Path| {
            let output = shell(dir, script);
            let (out, err) = (text(&output.stdout), text(&output.stderr));
            assert!(output.status.success(), "{script} in {}: {out}{err}", dir.display());
            (out, err)
        };
        let (mounted, copied) = (run(&self.mounted()), run(&self.copy));
        assert_eq!(mounted, copied, "{script}");
        mounted.0
    }
}

fn shell(dir: &Path, script: &str) -> Output {
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", script]).current_dir(dir).env("LC_ALL", "C");
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn done(command: &mut Command) -> String {
    let output = command.env("LC_ALL", "C").output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn manifest() -> Manifest {
    let requires = Requires {
        memory_mib: 1,
        vcpus: 1,
        kvm_kind: KvmKind::Pvm,
        kernel: "6.12".into(),
        vmstate_version: 1,
        cpu_features: Vec::new(),
        cpu_vendor: String::new(),
    };
    let (description, base_image, forkd_version) = ("many files".into(), String::new(), "0.1.0".into());
    let created_at = "2026-01-02T03:04:05Z".into();
    Manifest {
        forkd_pack_version: PACK_VERSION,
        tag: "tools".into(),
        description,
        base_image,
        created_at,
        forkd_version,
        requires,
        files: Vec::new(),
        probe: None,
    }
}

/// Sizes around pages, chunks and requests; text, noise, zeros, holes, and archives with files of their own.
fn make_files(dir: &Path) {
    let mebi = 1 << 20;
    for (seed, size) in [0, 1, 511, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, mebi - 1, mebi, mebi + 1]
        .into_iter()
        .enumerate()
    {
        fs::write(dir.join(format!("size-{size}")), noise(seed as u64, size)).unwrap();
    }
    let lines: String = (0..60_000).map(|n| format!("line {n} of the haystack\n")).collect();
    fs::write(dir.join("text.txt"), lines.replace("line 31415 of", "line 31415, the needle, of")).unwrap();
    fs::write(dir.join("zeros.bin"), vec![0; 3 * CHUNK + 5]).unwrap();
    let holes = File::create(dir.join("holes.bin")).unwrap();
    holes.set_len(40 << 20).unwrap();
    for at in [5, 20, 39] {
        holes.write_all_at(&noise(at, 300_000), at << 20).unwrap();
    }
    let make = "import sys, tarfile, zipfile\n\
                names = ['text.txt', 'size-4097', 'size-0', 'size-1048577']\n\
                with zipfile.ZipFile('archive.zip', 'w', zipfile.ZIP_DEFLATED) as z: [z.write(n) for n in names]\n\
                with tarfile.open('archive.tar', 'w') as t: [t.add(n) for n in names]\n\
                with tarfile.open('archive.tar.gz', 'w:gz') as t: [t.add(n) for n in names]\n";
    done(Command::new("python3").args(["-c", make]).current_dir(dir));
}

#[test]
fn commands_print_what_they_print_about_a_copy() {
    let lab = Lab::new();
    let both = Both::new(&lab);
    let listed = both.same("ls -1; sha256sum *");
    assert!(listed.lines().count() > 30 && listed.contains("size-65537"), "{listed}");
    for script in [
        "md5sum *; cksum *; wc -c *; wc text.txt",
        "stat -c '%n %s %F %a %u %g %h %Y' *",
        "ls -ln | tail -n +2",
        "du -b --exclude=.forkd . | cut -f2; du --apparent-size -k *",
        "find . -path ./.forkd -prune -o -type f -size +100k -print | sort",
        "find . -path ./.forkd -prune -o -type f -size -9c -printf '%s %p %m %TY\\n' | sort",
        "find . -path ./.forkd -prune -o -newer manifest.toml -print; find . -maxdepth 1 -type f -newermt 2020-01-01 | sort",
        "find . -maxdepth 1 -type f -empty -o -maxdepth 1 -type f -links +1; find . -maxdepth 1 -type f ! -perm 444",
        "grep -rn --exclude-dir=.forkd needle . | sort; grep -c haystack text.txt; grep -abo needle archive.tar",
        "for n in 0 1 100 4096 70000; do tail -c $n size-1048577 | sha256sum; head -c $n text.txt | sha256sum; done",
        "tail -n 3 text.txt; tail -n +59998 text.txt; sed -n 31416p text.txt; tac text.txt | sed -n 1,2p",
        "for bs in 1 7 511 777 4099 65535 1048577; do dd if=size-65537 bs=$bs status=none | sha256sum; done",
        "dd if=holes.bin bs=777 skip=13 count=40001 status=none | sha256sum; dd if=text.txt bs=3 skip=99991 count=5 status=none",
        "dd if=size-1048576 bs=4096 iflag=direct status=none | sha256sum; dd if=size-1048577 bs=64K iflag=direct status=none | sha256sum",
        "dd if=size-1048577 bs=1M iflag=fullblock,nonblock status=none | sha256sum; cat holes.bin | wc -c",
        "split -b 100000 size-1048577 --filter='sha256sum'; od -A d -t x1 -j 4090 -N 20 size-4097; cmp size-1048576 size-1048577 2>&1 || true",
        "sort text.txt | sha256sum; gzip -c size-65536 | gunzip | sha256sum; zstd -qc holes.bin | zstd -qdc | sha256sum",
        "tar --sort=name --exclude=./.forkd --no-recursion -cf - * | sha256sum; tar -tf archive.tar; tar -xOf archive.tar.gz size-4097 | sha256sum",
        "git hash-object -- *",
        "xxd -s 5242880 -l 64 holes.bin 2>/dev/null || true; strings -n 8 text.txt 2>/dev/null | head -1 || true",
    ] {
        both.same(script);
    }
}

#[test]
fn copies_and_comparisons_find_no_difference() {
    let lab = Lab::new();
    let both = Both::new(&lab);
    let (mounted, copy, work) = (both.mounted(), both.copy.as_path(), lab.path("work"));
    let (from, to) = (mounted.to_str().unwrap(), copy.to_str().unwrap());
    let quiet = |program: &str, args: &[&str]| {
        assert_eq!(done(Command::new(program).args(args).current_dir(&work)), "", "{program} {args:?}");
    };
    quiet("diff", &["-r", "--exclude=.forkd", from, to]);
    quiet(
        "rsync",
        &[
            "-rtpn",
            "--checksum",
            "--itemize-changes",
            "--exclude=.forkd",
            &format!("{from}/"),
            &format!("{to}/"),
        ],
    );
    quiet(
        "rsync",
        &["-aXn", "--itemize-changes", "--exclude=.forkd", &format!("{from}/"), &format!("{to}/")],
    );
    for (program, args) in [
        ("cp", &["-a", "--sparse=always"][..]),
        ("cp", &["-a", "--sparse=auto"]),
        ("cp", &["-a", "--reflink=never", "--sparse=never"]),
        ("rsync", &["-a", "--sparse"]),
    ] {
        let target = work.join("taken");
        done(Command::new(program).args(args).arg(format!("{from}/")).arg(&target));
        quiet("diff", &["-r", "--exclude=.forkd", target.to_str().unwrap(), to]);
        let taken = fs::metadata(target.join("holes.bin")).unwrap();
        let dense = args.contains(&"--sparse=never");
        assert_eq!(taken.blocks() * 512 >= 40 << 20, dense, "{program} {args:?}: {} blocks", taken.blocks());
        assert_eq!(taken.mtime(), fs::metadata(mounted.join("holes.bin")).unwrap().mtime());
        done(Command::new("rm").arg("-rf").arg(&target));
    }
}

#[test]
fn git_takes_the_mount_for_a_work_tree() {
    let lab = Lab::new();
    let both = Both::new(&lab);
    let work = lab.path("work");
    let git = |tree: &Path, args: &[&str]| {
        let mut command = Command::new("git");
        command.arg("--git-dir").arg(work.join("repository")).arg("--work-tree").arg(tree);
        command.args([
            "-c",
            "user.name=x",
            "-c",
            "user.email=x@y",
            "-c",
            "safe.directory=*",
            "-c",
            "core.fileMode=true",
        ]);
        done(command.args(args).current_dir(tree))
    };
    let mounted = both.mounted();
    git(&both.copy, &["init", "-q"]);
    fs::write(work.join("repository/info/exclude"), ".forkd\n").unwrap();
    git(&both.copy, &["add", "-A"]);
    git(&both.copy, &["commit", "-q", "-m", "all"]);
    assert_eq!(git(&mounted, &["status", "--porcelain"]), "");
    assert_eq!(git(&mounted, &["diff", "--stat", "HEAD"]), "");
    let tree = git(&both.copy, &["write-tree"]);
    fs::remove_file(work.join("repository/index")).unwrap();
    git(&mounted, &["add", "-A"]);
    assert_eq!(git(&mounted, &["write-tree"]), tree, "the same tree from the mount's files");
    for name in ["text.txt", "size-1048577", "holes.bin"] {
        let diff = |other: &str| {
            let mut command = Command::new("git");
            command
                .args(["diff", "--no-index", "--stat"])
                .arg(mounted.join(name))
                .arg(lab.path("files").join(other));
            let output = command.output().unwrap();
            (output.status.code(), text(&output.stdout))
        };
        assert_eq!(diff(name), (Some(0), String::new()), "{name}");
        assert_eq!(diff("size-4096").0, Some(1), "{name} is not size-4096");
    }
}

/// What Python sees of a directory's files by archive readers, maps and unusual system calls. Prints digests.
const READERS: &str = r#"
import errno, hashlib, mmap, os, random, shutil, tarfile, tempfile, zipfile
show = lambda name, data: print(name, len(data), hashlib.sha256(data).hexdigest())
with zipfile.ZipFile("archive.zip") as z:
    print(z.testzip(), z.namelist())
    for name in reversed(z.namelist()):
        show(name, z.read(name))
for archive in ("archive.tar", "archive.tar.gz"):
    with tarfile.open(archive) as t:
        for member in reversed(t.getmembers()):
            show(member.name, t.extractfile(member).read())
rng = random.Random(1)
for name in sorted(n for n in os.listdir(".") if os.path.isfile(n) and os.path.getsize(n)):
    size = os.path.getsize(name)
    with open(name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        digest = hashlib.sha256()
        for _ in range(50):
            at = rng.randrange(size)
            digest.update(memory[at : at + rng.randrange(200_000)])
        print(name, digest.hexdigest(), memory.rfind(b"needle"), memory[-1], memory.find(b"\x01\x02"))
    with open(name, "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as memory:
        memory[size // 2] = 7
        show(name + " private", memory[:])
    fd = os.open(name, os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    parts = [bytearray(10), bytearray(0), bytearray(70_000), bytearray(1)]
    got = os.preadv(fd, parts, size // 3)
    show(f"{name} preadv {got}", b"".join(parts))
    print(os.pread(fd, 10, size), os.pread(fd, 10, size + 5), os.lseek(fd, 0, os.SEEK_END), os.read(fd, 3))
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.fsync(fd)
    with tempfile.TemporaryFile() as out:
        sent = 0
        while chunk := os.sendfile(out.fileno(), fd, sent, 1 << 20):
            sent += chunk
        out.seek(0)
        show(f"{name} sendfile", out.read())
    with tempfile.TemporaryFile() as out:
        os.lseek(fd, 0, os.SEEK_SET)
        try:
            while os.copy_file_range(fd, out.fileno(), 300_000):
                pass
        except OSError as error:  # The kernel's answer between file systems of different types; cp then reads.
            assert error.errno == errno.EXDEV, error
            shutil.copyfileobj(os.fdopen(os.dup(fd), "rb"), out)
        out.seek(0)
        show(f"{name} copy_file_range", out.read())
    os.close(fd)
    stat, again = os.stat(name), os.lstat(name)
    print(stat.st_size, stat.st_mode, stat.st_nlink, stat.st_mtime_ns, stat.st_ino == again.st_ino)
here = os.open(".", os.O_DIRECTORY)
print(sorted(set(os.listdir(here)) - {".forkd"}), os.path.realpath("text.txt") == os.getcwd() + "/text.txt")
print(os.stat("text.txt", dir_fd=here).st_size, os.path.samefile(".", os.path.join("..", os.path.basename(os.getcwd()))))
"#;

#[test]
fn python_reads_archives_and_maps_as_it_does_in_a_copy() {
    let lab = Lab::new();
    let both = Both::new(&lab);
    let script = lab.path("work/readers.py");
    fs::write(&script, READERS).unwrap();
    let printed = both.same(&format!("python3 {}", script.display()));
    assert!(
        printed.lines().count() > 100 && printed.contains("holes.bin copy_file_range 41943040"),
        "{printed}"
    );
}

/// Everything that would change something, and the errno it got instead.
const WRITERS: &str = r#"
import errno, os
def attempt(name, call):
    try:
        call()
        print(name, "done")
    except OSError as error:
        print(name, errno.errorcode[error.errno])
fd = os.open("text.txt", os.O_RDONLY)
attempt("open for writing", lambda: os.open("text.txt", os.O_WRONLY))
attempt("open for both", lambda: os.open("text.txt", os.O_RDWR))
attempt("append", lambda: os.open("text.txt", os.O_WRONLY | os.O_APPEND))
attempt("truncating open", lambda: os.open("text.txt", os.O_WRONLY | os.O_TRUNC))
attempt("create", lambda: os.open("new", os.O_CREAT | os.O_WRONLY))
attempt("nameless", lambda: os.open(".", os.O_TMPFILE | os.O_WRONLY))
attempt("truncate", lambda: os.truncate("text.txt", 0))
attempt("unlink", lambda: os.unlink("text.txt"))
attempt("mkdir", lambda: os.mkdir("dir"))
attempt("rmdir", lambda: os.rmdir(".forkd"))
attempt("rename", lambda: os.rename("text.txt", "other"))
attempt("link", lambda: os.link("text.txt", "other"))
attempt("symlink", lambda: os.symlink("text.txt", "other"))
attempt("mknod", lambda: os.mkfifo("pipe"))
attempt("chmod", lambda: os.chmod("text.txt", 0o600))
attempt("chown", lambda: os.chown("text.txt", 1, 1))
attempt("utime", lambda: os.utime("text.txt"))
attempt("setxattr", lambda: os.setxattr("text.txt", "user.x", b"1"))
attempt("may write", lambda: None if os.access("text.txt", os.W_OK) else os.open("text.txt", os.O_WRONLY))
attempt("write to a reader's descriptor", lambda: os.write(fd, b"x"))
attempt("allocate by a reader's descriptor", lambda: os.posix_fallocate(fd, 0, 10))
attempt("truncate by a reader's descriptor", lambda: os.ftruncate(fd, 0))
"#;

#[test]
fn nothing_can_be_written() {
    let lab = Lab::new();
    let both = Both::new(&lab);
    let printed = done(Command::new("python3").args(["-c", WRITERS]).current_dir(both.mounted()));
    for line in printed.lines() {
        let expected = match line {
            line if line.starts_with("write to") || line.starts_with("allocate by") => "EBADF",
            line if line.starts_with("truncate by") => "EINVAL",
            _ => "EROFS",
        };
        assert!(line.ends_with(expected), "{line}: expected {expected}");
    }
    assert_eq!(printed.lines().count(), 22, "{printed}");
    let fallocate = shell(&both.mounted(), "fallocate -l 10 text.txt");
    assert!(!fallocate.status.success() && text(&fallocate.stderr).contains("Read-only"), "{fallocate:?}");
    both.same("sha256sum text.txt");
}

#[test]
fn it_says_of_itself_what_a_read_only_disk_says() {
    let lab = Lab::new();
    let both = Both::new(&lab);
    let mounted = both.mounted();
    both.same("for f in *; do test -r $f && ! test -x $f && test -f $f; done; test -x . && test -d . && ! test -e none");
    // No attributes, no lists of access rights: a mount has none, and may say that it knows of none, as vfat does.
    let attributes = "getfattr -d -m - -- * 2>&1 | grep -v 'Operation not supported' || true; getcap text.txt 2>/dev/null || true";
    assert_eq!(both.same(attributes), "");
    both.same("ls -lZ text.txt | cut -d' ' -f5-; d=$(mktemp -d); cp --preserve=all text.txt $d; rm -r $d");
    let of_system = done(Command::new("stat").args(["-f", "-c", "%T %a %f %s %l"]).arg(&mounted));
    let fields: Vec<_> = of_system.split_whitespace().collect();
    assert_eq!(fields[1..4], ["0", "0", "4096"], "nothing is free: {of_system}");
    assert!(fields[0].starts_with("fuse") && fields[4].parse::<u32>().unwrap() >= 64, "{of_system}");
    let df = done(Command::new("df").args(["-B1", "--output=source,avail,target,fstype"]).arg(&mounted));
    let shown: Vec<_> = df.lines().nth(1).unwrap().split_whitespace().collect();
    assert!(shown[0].starts_with("forkd:http") && shown[1] == "0" && shown[3].starts_with("fuse"), "{df}");
    assert_eq!(shown[2], both.mount.dir.to_str().unwrap());
    let options = done(Command::new("findmnt").args(["-no", "OPTIONS"]).arg(&both.mount.dir));
    assert!(
        ["ro", "nosuid", "nodev"].iter().all(|wanted| options.split(',').any(|o| o == *wanted)),
        "{options}"
    );
    if rustix::process::geteuid().is_root() {
        done(Command::new("chmod").arg("755").arg(mounted.ancestors().nth(4).unwrap()));
        let nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups sh -c 'sha256sum text.txt; ! test -w text.txt'";
        assert_eq!(
            text(&shell(&mounted, nobody).stdout),
            text(&shell(&both.copy, "sha256sum text.txt").stdout)
        );
    }
}
