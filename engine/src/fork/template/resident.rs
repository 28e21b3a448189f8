//! A template whose images are whole and in memory, on its way from one process to another.

use super::provenance::{Provenance, ResidentProvenance};
use super::{Images, Template, TemplateError, images_of};
use crate::local::snapshots::{MachineConfiguration, SnapshotError, file_error};
use forkd_vmm::kvm::KvmKind;
use forkd_vmm::memory::{Delta, MemoryError, PAGE_BYTES, create_image, longest_runs};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::path::Path;

/// Most bytes that one call copies.
const COPY_BYTES: u64 = 64 << 20;

/// What is said of a resident image; its vmstate and images come with it as files.
#[derive(Debug, Serialize, Deserialize)]
pub struct ResidentTemplate {
    configuration: MachineConfiguration,
    /// Per image, ranges (start and end, bytes) known to be zero.
    zero_runs: Vec<Vec<(u64, u64)>>,
    /// Of a child's snapshot: how many ranges its memory has in place of what the image has. Their file comes after the images.
    #[serde(default)]
    delta_runs: Option<usize>,
    /// What snapshots of its children are based on. Its images on disk come last, if it has such.
    #[serde(default)]
    provenance: Option<ResidentProvenance>,
}

/// What another process sent is not a machine that can be forked here.
#[derive(Debug, thiserror::Error)]
pub enum ResidentError {
    /// Its configuration.
    #[error(transparent)]
    Configuration(#[from] SnapshotError),
    /// Too many or too few files.
    #[error("{found} files came with it instead of {wanted}")]
    Files {
        /// How many came.
        found: usize,
        /// How many a machine of this configuration has.
        wanted: usize,
    },
    /// A file cannot be looked at.
    #[error("a file that came with it cannot be looked at")]
    Stat(#[source] Errno),
    /// An image of another length than the machine's memory.
    #[error("its {name} has {found} bytes instead of {wanted}")]
    Size {
        /// Which file.
        name: &'static str,
        /// Its size, bytes.
        found: u64,
        /// What the configuration says, bytes.
        wanted: u64,
    },
    /// What it has in place of what the image has.
    #[error("what differs of its memory cannot be used")]
    Delta(#[from] MemoryError),
    /// Ranges of zeros that no image of it has.
    #[error("its ranges of zeros are not whole pages of its images")]
    ZeroRuns,
}

impl Template {
    /// The same template with its images in memory of their own: files on disk come and go in the page cache.
    pub fn into_memory(mut self) -> Result<Template, TemplateError> {
        if let Images::Local { files } = &mut self.images {
            self.zero_runs.clear();
            for (id, file) in images_of(&self.configuration).zip(files) {
                let bytes = self.configuration.layout.image_bytes(id);
                let memory = create_image(id.file_name(), bytes)?;
                let failed = file_error("loading", Path::new(Template::image_name(id)));
                self.zero_runs.push(copy_data(file, &memory, bytes).map_err(|errno| failed(errno.into()))?);
                let on_disk = std::mem::replace(file, memory);
                self.provenance.get_or_insert_default().keep_on_disk(on_disk);
            }
        }
        if let Some(delta) = &self.delta {
            self.delta = Some(delta.to_memory(self.configuration.layout.ram_bytes())?);
        }
        Ok(self)
    }

    /// Bytes of memory that the images take.
    pub fn resident_bytes(&self) -> u64 {
        let blocks =
            |file: &BorrowedFd<'_>| rustix::fs::fstat(file).map_or(0, |found| found.st_blocks as u64 * 512);
        self.images().iter().map(blocks).sum()
    }

    /// What another process needs to fork from this template: descriptors that nobody can write through.
    pub fn resident(&self) -> io::Result<(ResidentTemplate, Vec<OwnedFd>)> {
        let (provenance, on_disk) = self.resident_provenance().unzip();
        let resident = ResidentTemplate {
            configuration: self.configuration,
            zero_runs: self.zero_runs.clone(),
            delta_runs: self.delta().map(|delta| delta.runs().len()),
            provenance,
        };
        let read_only = |file: BorrowedFd<'_>| {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            Ok(OwnedFd::from(File::open(path)?))
        };
        let on_disk = on_disk.into_iter().flatten().map(AsFd::as_fd);
        let mapped =
            std::iter::once(self.vmstate()).chain(self.images()).chain(self.delta().map(Delta::file));
        let files = mapped.chain(on_disk).map(read_only);
        Ok((resident, files.collect::<io::Result<_>>()?))
    }

    /// A template that another process of this user holds, which may be of another version, for a host of the kind `host`.
    pub fn from_resident(
        ResidentTemplate { configuration, zero_runs, delta_runs, provenance }: ResidentTemplate,
        mut files: Vec<OwnedFd>,
        host: KvmKind,
    ) -> Result<Template, ResidentError> {
        configuration.check()?;
        configuration.check_host(host)?;
        let ids: Vec<_> = images_of(&configuration).collect();
        let found = files.len();
        // The machine's state comes first.
        let (first, mapped) = (1 + ids.len(), 1 + ids.len() + usize::from(delta_runs.is_some()));
        if found != mapped && (provenance.is_none() || found != mapped + ids.len()) {
            return Err(ResidentError::Files { found, wanted: mapped });
        }
        let provenance = provenance.map(|said| Provenance::of_resident(said, files.split_off(mapped)));
        let delta = files
            .drain(first..)
            .next()
            .zip(delta_runs)
            .map(|(file, runs)| Delta::from_file(file, configuration.layout.ram_bytes(), runs));
        let delta = delta.transpose()?;
        let vmstate = files.remove(0);
        for (id, file) in ids.iter().zip(&files) {
            let (file, name) =
                (rustix::fs::fstat(file).map_err(ResidentError::Stat)?, Template::image_name(*id));
            let (found, wanted) = (file.st_size as u64, configuration.layout.image_bytes(*id));
            // Reading past the end of a mapped file kills the reader.
            if found != wanted {
                return Err(ResidentError::Size { name, found, wanted });
            }
        }
        if zero_runs.len() != ids.len() {
            return Err(ResidentError::ZeroRuns);
        }
        for (id, runs) in ids.iter().zip(&zero_runs) {
            let bytes = configuration.layout.image_bytes(*id);
            let fits = |(start, end): &(u64, u64)| start <= end && *end <= bytes;
            // Anonymous memory takes their place, which whole pages only can be.
            let aligned = |(start, end): &(u64, u64)| (start | end).is_multiple_of(PAGE_BYTES);
            if !runs.iter().all(|run| fits(run) && aligned(run)) {
                return Err(ResidentError::ZeroRuns);
            }
        }
        let (images, complete) = (Images::Local { files }, true);
        Ok(Template { configuration, vmstate, images, zero_runs, complete, delta, provenance })
    }
}

/// Copies what a sparse file stores, and returns the longest holes.
fn copy_data(from: &OwnedFd, to: &OwnedFd, bytes: u64) -> Result<Vec<(u64, u64)>, Errno> {
    let (mut at, mut holes) = (0, Vec::new());
    while at < bytes {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No more data.
            Err(Errno::NXIO) => bytes,
            Err(errno) => return Err(errno),
        };
        if start > at {
            holes.push(at..start);
        }
        if start >= bytes {
            break;
        }
        at = rustix::fs::seek(from, SeekFrom::Hole(start))?.min(bytes);
        copy_range(from, to, start, at)?;
    }
    Ok(longest_runs(holes).into_iter().map(|run| (run.start, run.end)).collect())
}

fn copy_range(from: &OwnedFd, to: &OwnedFd, mut start: u64, end: u64) -> Result<(), Errno> {
    rustix::fs::seek(to, SeekFrom::Start(start))?;
    while start < end {
        let length = (end - start).min(COPY_BYTES) as usize;
        match rustix::fs::sendfile(to.as_fd(), from.as_fd(), Some(&mut start), length) {
            // The file was cut short under us.
            Ok(0) => return Err(Errno::IO),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// A machine of 64 MiB without content.
#[cfg(test)]
pub(crate) fn empty_template() -> Template {
    let layout = forkd_vmm::memory::MemoryLayout::new(64, 0).unwrap();
    let configuration = MachineConfiguration::new(layout, 1, KvmKind::Pvm, 0);
    let ram = layout.image_bytes(forkd_vmm::memory::ImageId::Ram);
    let files = [100, ram].map(|bytes| create_image("empty", bytes).unwrap()).into();
    let resident = ResidentTemplate {
        configuration,
        zero_runs: vec![vec![(0, ram)]],
        delta_runs: None,
        provenance: None,
    };
    Template::from_resident(resident, files, KvmKind::Pvm).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_vmm::memory::{ImageId, MemoryLayout};
    use std::os::unix::fs::FileExt;

    const BYTES: u64 = 4 << 20;

    fn sparse() -> OwnedFd {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        file.write_all_at(&[7; 8192], 1 << 20).unwrap();
        file.write_all_at(&[9; 4096], (3 << 20) + 4096).unwrap();
        file.into()
    }

    fn content(file: OwnedFd) -> Vec<u8> {
        let mut bytes = vec![0; BYTES as usize];
        File::from(file).read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_copy_has_the_data_and_keeps_the_holes() {
        let (from, to) = (sparse(), create_image("copy", BYTES).unwrap());
        let holes = copy_data(&from, &to, BYTES).unwrap();
        assert_eq!(holes, [(0, 1 << 20), ((1 << 20) + 8192, (3 << 20) + 4096), ((3 << 20) + 8192, BYTES)]);
        assert_eq!(rustix::fs::fstat(&to).unwrap().st_blocks * 512, 12288);
        assert!(content(from) == content(to));
        let empty = OwnedFd::from(tempfile::tempfile().unwrap());
        rustix::fs::ftruncate(&empty, BYTES).unwrap();
        assert_eq!(copy_data(&empty, &create_image("none", BYTES).unwrap(), BYTES).unwrap(), [(0, BYTES)]);
    }

    #[test]
    fn a_file_that_is_cut_short_is_an_error() {
        let from = sparse();
        assert_eq!(
            copy_range(&from, &create_image("copy", 2 * BYTES).unwrap(), BYTES, BYTES + 1),
            Err(Errno::IO)
        );
    }

    #[test]
    fn only_a_whole_machine_of_this_host_is_taken() {
        let layout = MemoryLayout::new(64, 0).unwrap();
        let good = MachineConfiguration::new(layout, 1, KvmKind::Pvm, 0);
        let ram = layout.image_bytes(ImageId::Ram);
        let take = |configuration, runs: &[Vec<(u64, u64)>], bytes: &[u64], host| {
            let files = bytes.iter().map(|bytes| create_image("file", *bytes).unwrap()).collect();
            let resident = ResidentTemplate {
                configuration,
                zero_runs: runs.to_vec(),
                delta_runs: None,
                provenance: None,
            };
            Template::from_resident(resident, files, host).map(|_| ())
        };
        let of_files = |runs: &[Vec<(u64, u64)>], bytes: &[u64]| take(good, runs, bytes, KvmKind::Pvm);
        of_files(&[vec![(0, ram)]], &[100, ram]).unwrap();
        for bytes in [&[][..], &[100], &[100, ram, ram]] {
            let refused = of_files(&[vec![]], bytes);
            assert!(matches!(refused, Err(ResidentError::Files { wanted: 2, .. })), "{bytes:?}: {refused:?}");
        }
        let short = of_files(&[vec![]], &[100, ram - 4096]);
        assert!(matches!(short, Err(ResidentError::Size { .. })), "{short:?}");
        let bad_runs = [
            vec![],
            vec![vec![(0, ram + 4096)]],
            vec![vec![(8192, 4096)]],
            vec![vec![(0, 4095)]],
            vec![vec![(512, 4096)]],
        ];
        for runs in bad_runs {
            let refused = of_files(&runs, &[100, ram]);
            assert!(matches!(refused, Err(ResidentError::ZeroRuns)), "{runs:?}: {refused:?}");
        }
        let of = |configuration, host| take(configuration, &[vec![]], &[100, ram], host).unwrap_err();
        for (configuration, host) in [
            (good, KvmKind::Hardware),
            (MachineConfiguration { format: 2, ..good }, KvmKind::Pvm),
            (MachineConfiguration { vcpus: 99, ..good }, KvmKind::Pvm),
            (MachineConfiguration { scratch_mib: 1 << 30, ..good }, KvmKind::Pvm),
        ] {
            let refused = of(configuration, host);
            assert!(matches!(refused, ResidentError::Configuration(_)), "{configuration:?}: {refused}");
        }
    }
}
