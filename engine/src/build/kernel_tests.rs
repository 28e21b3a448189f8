//! The cache, the lock and the choice of source; a whole build takes minutes and is run by hand and in CI.

use super::*;
use tempfile::TempDir;

fn paths(root: &Path) -> Paths {
    Paths { data: root.join("data"), cache: root.join("cache"), runtime: root.join("run") }
}

fn record(source: &str, config: &str) -> Record {
    Record {
        config_sha256: sha256_parts([config.as_bytes()]),
        source: source.to_owned(),
        compiler: "gcc".to_owned(),
    }
}

/// A kernel in the cache, as `publish` puts it there.
fn put(paths: &Paths, key: &str, config: &str) -> PathBuf {
    let kernels = paths.kernels();
    fs::create_dir_all(&kernels).unwrap();
    let vmlinux = kernels.join("built");
    fs::write(&vmlinux, key).unwrap();
    publish(&vmlinux, &record(key, config), &kernels, &kernels.join(key)).unwrap();
    fs::remove_file(vmlinux).unwrap();
    kernels.join(key).join("vmlinux")
}

#[test]
fn the_newest_kernel_of_this_configuration_is_found() {
    let root = TempDir::new().unwrap();
    let paths = paths(root.path());
    assert!(matches!(find(&paths), Err(KernelError::NotBuilt { .. })));
    put(&paths, "other", "CONFIG_SOMETHING_ELSE=y");
    assert!(matches!(find(&paths), Err(KernelError::NotBuilt { .. })));
    let old = put(&paths, "old", CONFIG);
    let long_ago = std::time::SystemTime::UNIX_EPOCH;
    File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
    assert_eq!(find(&paths).unwrap().path, old);
    let new = put(&paths, "new", CONFIG);
    let kernel = find(&paths).unwrap();
    assert_eq!((kernel.path.as_path(), kernel.cached, kernel.source.as_str()), (new.as_path(), true, "new"));
}

#[test]
fn half_a_kernel_is_none() {
    let root = TempDir::new().unwrap();
    let paths = paths(root.path());
    let vmlinux = put(&paths, "one", CONFIG);
    fs::remove_file(&vmlinux).unwrap();
    assert!(matches!(find(&paths), Err(KernelError::NotBuilt { .. })));
    put(&paths, "one", CONFIG);
    assert!(find(&paths).is_ok(), "and is replaced by a whole one");
    fs::write(vmlinux.with_file_name("kernel.json"), "{\"config_sha256\":").unwrap();
    assert!(matches!(find(&paths), Err(KernelError::NotBuilt { .. })));
    let left: Vec<_> =
        fs::read_dir(paths.kernels()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["one"], "no temporary directory stays");
}

#[test]
fn what_a_killed_build_left_is_removed() {
    let root = TempDir::new().unwrap();
    let paths = paths(root.path());
    let vmlinux = put(&paths, "one", CONFIG);
    let left = [paths.cache.join("kernel-build-left"), paths.kernels().join(".new-left")];
    for left in &left {
        fs::create_dir_all(left.join("source/arch")).unwrap();
    }
    fs::create_dir(paths.cache.join("chunks")).unwrap();
    let work = work_directory(&paths.cache).unwrap();
    assert_eq!(remove_dead(&paths).unwrap(), left);
    assert!(work.path().exists() && paths.cache.join("chunks").exists() && vmlinux.exists());
}

#[test]
fn a_source_that_cannot_do_it_is_refused() {
    let all: String = REQUIRED.iter().map(|option| format!("{option}=y\n")).collect();
    check_options(&all).unwrap();
    let without = all.replace("CONFIG_EROFS_FS=y", "# CONFIG_EROFS_FS is not set");
    let as_module = without.replace("CONFIG_TMPFS=y", "CONFIG_TMPFS=m");
    let Err(KernelError::Options { options }) = check_options(&as_module) else { panic!() };
    assert_eq!(options, ["CONFIG_EROFS_FS", "CONFIG_TMPFS"]);
}

#[test]
fn our_configuration_asks_for_what_machines_require() {
    for option in REQUIRED {
        // KVM_GUEST is the kernel's own default for a guest.
        assert!(option == "CONFIG_KVM_GUEST" || CONFIG.contains(&format!("\n{option}=y\n")), "{option}");
    }
    let mut names: Vec<&str> =
        CONFIG.lines().filter_map(|line| line.split(['=', ' ']).find(|w| w.starts_with("CONFIG_"))).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count, "an option is named twice");
}

#[test]
fn the_highest_version_is_taken() {
    let root = TempDir::new().unwrap();
    assert_eq!(source::newest_archive(root.path()), None);
    assert_eq!(source::newest_archive(&root.path().join("absent")), None);
    for name in
        ["linux-source-6.1.tar.xz", "linux-source-6.12.tar.xz", "linux-config-6.12", "linux-source-6.9"]
    {
        fs::write(root.path().join(name), "").unwrap();
    }
    assert_eq!(source::newest_archive(root.path()), Some(root.path().join("linux-source-6.12.tar.xz")));
    let ubuntu = root.path().join("linux-source-6.14.0");
    fs::create_dir(&ubuntu).unwrap();
    assert_eq!(source::newest_archive(root.path()), Some(root.path().join("linux-source-6.12.tar.xz")));
    fs::write(ubuntu.join("linux-source-6.14.0.tar.bz2"), "").unwrap();
    assert_eq!(source::newest_archive(root.path()), Some(ubuntu.join("linux-source-6.14.0.tar.bz2")));
}

#[test]
fn a_directory_that_is_no_source_is_named() {
    let root = TempDir::new().unwrap();
    let paths = paths(root.path());
    let options = BuildOptions { source: Some(root.path().to_owned()), ..BuildOptions::default() };
    let result = build(&paths, &options, &crate::progress::Silent, &Interrupt::default());
    assert!(
        matches!(result, Err(KernelError::NotASource { .. } | KernelError::Missing { .. })),
        "{result:?}"
    );
    assert_eq!(fs::read_dir(&paths.cache).unwrap().count(), 0);
}
