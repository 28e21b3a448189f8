//! What a process has of a file that it maps privately, page by page, as the kernel tells in /proc.
//!
//! What is *mapped* can be more than what was touched: on a fault the kernel also maps pages around it that happen to be
//! there (64 KiB by default). What is *private* was written to.

use forkd_vmm::memory::{ImageId, add_run};
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes of a page.
pub const PAGE: u64 = forkd_vmm::memory::PAGE_BYTES;
/// Longest table of mappings that is read, bytes: processes have 65530 mappings at most.
const MAPS_MAX: u64 = 16 << 20;
/// Pages that are asked for at a time.
const BATCH: u64 = 8192;
/// Bytes the kernel tells of each page.
const ENTRY: usize = 8;

// See Documentation/admin-guide/mm/pagemap.rst.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
const EXCLUSIVE: u64 = 1 << 56;

/// What a process has of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// Nothing.
    Absent,
    /// The file's page, shared with everybody who maps it.
    Mapped,
    /// A copy of its own: it was written to.
    Private,
    /// No file's, and not its alone: the zero page, which costs nothing.
    Zero,
}

impl PageState {
    fn of_entry(entry: u64) -> PageState {
        let (present, of_file) = (entry & PRESENT != 0, entry & OF_FILE != 0);
        match (present, of_file) {
            (true, true) => PageState::Mapped,
            (true, false) if entry & EXCLUSIVE != 0 => PageState::Private,
            (true, false) => PageState::Zero,
            (false, false) if entry & SWAPPED != 0 => PageState::Private,
            _ => PageState::Absent,
        }
    }
}

/// One mapping of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedFile {
    /// Where in its address space.
    pub addresses: Range<u64>,
    /// Which part of the file is at the start.
    pub offset: u64,
    /// The file's device, major and minor.
    pub device: (u32, u32),
    /// Its inode.
    pub inode: u64,
    /// Its path as the kernel shows it.
    pub path: String,
}

impl MappedFile {
    /// A line of /proc/PID/maps; `None` for memory that is no file's.
    fn parse(line: &str) -> Option<MappedFile> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let addresses = hex(start)?..hex(end)?;
        let (offset, device, inode) = (hex(fields.nth(1)?)?, fields.next()?, fields.next()?.parse().ok()?);
        let (major, minor) = device.split_once(':')?;
        let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
        let path = fields.next()?.trim_start().to_owned();
        (inode != 0 && addresses.start < addresses.end).then_some(MappedFile {
            addresses,
            offset,
            device,
            inode,
            path,
        })
    }

    /// Whether it is a part of an image: of a file in memory, or of a local snapshot's, which is called `in_snapshot`.
    pub fn is_image(&self, id: ImageId, in_snapshot: &str) -> bool {
        let path = self.path.trim_end_matches(" (deleted)");
        path.strip_prefix("/memfd:") == Some(id.file_name()) || path.rsplit('/').next() == Some(in_snapshot)
    }

    /// Where the file's first byte is, or would be.
    pub fn base(&self) -> Option<u64> {
        self.addresses.start.checked_sub(self.offset)
    }
}

/// The files a process maps.
pub fn mapped_files(pid: i32) -> io::Result<Vec<MappedFile>> {
    let mut table = Vec::new();
    File::open(format!("/proc/{pid}/maps"))?.take(MAPS_MAX).read_to_end(&mut table)?;
    Ok(String::from_utf8_lossy(&table).lines().filter_map(MappedFile::parse).collect())
}

/// The file behind a mapping, as far as this process may know.
pub fn file_behind(pid: i32, mapping: &MappedFile) -> io::Result<Metadata> {
    let Range { start, end } = mapping.addresses;
    std::fs::metadata(format!("/proc/{pid}/map_files/{start:x}-{end:x}"))
}

/// Where a process has an image, and in which parts: between them lies memory that took the image's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageMapping {
    /// Address of the first byte.
    pub address: u64,
    /// Address and length of what is mapped of it.
    pub parts: Vec<(u64, u64)>,
}

/// Where a process has an image: a file in memory, or that of a local snapshot, which is called `in_snapshot`.
pub fn image_mapping(pid: i32, id: ImageId, in_snapshot: &str) -> io::Result<ImageMapping> {
    let mappings = mapped_files(pid)?;
    let own: Vec<_> = mappings.iter().filter(|mapping| mapping.is_image(id, in_snapshot)).collect();
    let address = own.first().and_then(|mapping| mapping.base()).ok_or(io::ErrorKind::NotFound)?;
    let part =
        |mapping: &&MappedFile| (mapping.addresses.start, mapping.addresses.end - mapping.addresses.start);
    Ok(ImageMapping { address, parts: own.iter().map(part).collect() })
}

impl ImageMapping {
    /// Address and length of what lies between the parts, in `bytes` from its first byte.
    pub fn gaps(&self, bytes: u64) -> Vec<(u64, u64)> {
        let (mut at, mut gaps) = (self.address, Vec::new());
        let end = self.address.saturating_add(bytes);
        for (start, length) in self.parts.iter().copied().chain([(end, 0)]) {
            if start > at {
                gaps.push((at, start - at));
            }
            at = at.max(start.saturating_add(length));
        }
        gaps
    }
}

/// What a process has of its pages, by address.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Of the process `pid`.
    pub fn open(pid: i32) -> io::Result<Pagemap> {
        File::open(format!("/proc/{pid}/pagemap")).map(Pagemap)
    }

    /// The ranges of `bytes` at `base` that are not the file's, in bytes from there: whatever their content is, it is not to
    /// be had elsewhere.
    pub fn own(&self, base: u64, bytes: u64) -> io::Result<Vec<Range<u64>>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        self.visit(base, 0..bytes / PAGE, |page, state| {
            if matches!(state, PageState::Private | PageState::Zero) {
                let start = page * PAGE;
                add_run(&mut runs, start..start + PAGE);
            }
        })?;
        Ok(runs)
    }

    /// Tells `visit` the state of each of `pages` of what lies at `base`, in order, as far as the address space goes.
    pub fn visit(
        &self,
        base: u64,
        pages: Range<u64>,
        mut visit: impl FnMut(u64, PageState),
    ) -> io::Result<()> {
        let mut entries = vec![0; (pages.end.saturating_sub(pages.start).min(BATCH)) as usize * ENTRY];
        let mut next = pages.start;
        while next < pages.end {
            let count = (pages.end - next).min(BATCH);
            let part = &mut entries[..count as usize * ENTRY];
            let read = self.0.read_at(part, (base / PAGE + next) * ENTRY as u64)?;
            let told = part[..read].as_chunks::<ENTRY>().0;
            if told.is_empty() {
                return Ok(());
            }
            for (page, entry) in (next..).zip(told) {
                visit(page, PageState::of_entry(u64::from_ne_bytes(*entry)));
            }
            next += told.len() as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_others_passed_over() {
        let line = "7f00-9f00 rw-p 00200000 00:01 1042                       /memfd:forkd-Ram (deleted)";
        let mapping = MappedFile::parse(line).unwrap();
        assert_eq!((mapping.addresses.clone(), mapping.offset), (0x7f00..0x9f00, 0x20_0000));
        assert_eq!((mapping.device, mapping.inode), ((0, 1), 1042));
        assert_eq!(mapping.path, "/memfd:forkd-Ram (deleted)");
        assert_eq!(mapping.base(), None, "it cannot begin before the address space");
        for bad in [
            "",
            "7f00-9f00 rw-p 00000000 00:00 0",
            "7f00-9f00 rw-p 00000000 00:00 0   [heap]",
            "x-y",
            "9-7 r 0 0:1 1 /a",
        ] {
            assert_eq!(MappedFile::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_lies_between_the_parts_of_an_image_is_known() {
        let mapping = ImageMapping { address: 100, parts: vec![(110, 10), (120, 5), (140, 10)] };
        assert_eq!(mapping.gaps(60), [(100, 10), (125, 15), (150, 10)]);
        assert_eq!(ImageMapping { address: 100, parts: vec![(100, 10)] }.gaps(10), []);
    }

    #[test]
    fn states_are_told_apart() {
        for (entry, state) in [
            (0, PageState::Absent),
            (PRESENT | OF_FILE, PageState::Mapped),
            (PRESENT | OF_FILE | EXCLUSIVE, PageState::Mapped),
            (PRESENT | EXCLUSIVE, PageState::Private),
            (SWAPPED, PageState::Private),
            (PRESENT, PageState::Zero),
        ] {
            assert_eq!(PageState::of_entry(entry), state, "{entry:#x}");
        }
    }

    #[test]
    fn this_process_has_its_own_program_mapped() {
        let (pid, program) = (std::process::id() as i32, std::env::current_exe().unwrap());
        let mappings = mapped_files(pid).unwrap();
        let own = mappings.iter().find(|mapping| mapping.path == program.to_str().unwrap()).unwrap();
        let (mut seen, mut there) = (0, 0);
        let pages = (own.addresses.end - own.addresses.start) / PAGE;
        let visit = |_, state| (seen, there) = (seen + 1, there + u64::from(state != PageState::Absent));
        Pagemap::open(pid).unwrap().visit(own.addresses.start, 0..pages, visit).unwrap();
        assert_eq!(seen, pages);
        assert!(there > 0, "its first mapping is read by the loader");
        let none = |_, _| panic!("there is nothing at the end of the address space");
        Pagemap::open(pid).unwrap().visit(0, u64::MAX / 64..u64::MAX / 64 + 5, none).unwrap();
        assert!(mapped_files(i32::MAX).is_err());
    }
}
