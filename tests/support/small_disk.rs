//! A small file system in memory, which can be full.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Mounted until this is dropped. Needs root, as mounting does.
pub struct SmallDisk {
    pub dir: PathBuf,
}

impl SmallDisk {
    pub fn mount(dir: PathBuf, kib: u32) -> SmallDisk {
        fs::create_dir_all(&dir).unwrap();
        let options = format!("size={kib}k");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&dir).status();
        assert!(mounted.unwrap().success(), "mounting a tmpfs needs root");
        SmallDisk { dir }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
    }
}
