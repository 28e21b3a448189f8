//! What a running child has in its memory, image by image.

use std::io;

use forkd_vmm::memory::ImageId;
use serde::Serialize;

use crate::fork::children::ChildrenError;
use crate::fork::pagemap::{self, MappedFile, PAGE, PageState, Pagemap};
use crate::fork::template::Template;
use crate::local::paths::Paths;
use crate::local::run_dir::{ForkDir, RunDirError};
use crate::picture::heatmap::{Heatmap, HeatmapCell, ImageCells};
use crate::picture::sizes::show_size;
use crate::picture::svg::{LegendEntry, PALE};

/// A square of the picture.
const CHUNK: u64 = 256 << 10;
/// Largest image: guests have 16 GiB of memory at most, root disks less than a pack's largest file.
const IMAGE_MAX: u64 = 1 << 40;
const PRIVATE: &str = "#c0392b";
const MAPPED: &str = "#4e79a7";

/// A child's memory, as `forkd inspect --child --json` shows it.
#[derive(Debug, Serialize)]
pub struct ChildMemory {
    /// Its name.
    pub child: String,
    /// Its process.
    pub pid: i32,
    /// What it was forked from.
    pub pack: String,
    /// Its images.
    pub images: Vec<Image>,
}

/// One image as the child has it.
#[derive(Debug, Serialize)]
pub struct Image {
    /// Its file in a pack.
    pub name: &'static str,
    /// Pages of 4 KiB.
    pub pages: u64,
    /// Pages of its own: it wrote to them.
    pub private_pages: u64,
    /// Pages of the shared image that it has mapped.
    pub mapped_pages: u64,
    #[serde(skip)]
    cells: Vec<HeatmapCell>,
}

/// Looks at the child `id`. Takes root.
pub fn look(paths: &Paths, id: &str) -> Result<ChildMemory, ChildrenError> {
    let status = ForkDir::of_child(paths, id)?.status()?;
    let pack = status.pack;
    let child = status.children.into_iter().find(|child| child.id == id && !child.state.is_over());
    let pid = child.ok_or_else(|| RunDirError::UnknownChild { id: id.to_owned() })?.pid;
    let failed = |source| ChildrenError::Memory { id: id.to_owned(), source };
    let mappings = pagemap::mapped_files(pid).map_err(failed)?;
    let pages = Pagemap::open(pid).map_err(failed)?;
    let images = ImageId::ALL.into_iter().filter_map(|id| {
        let own = mappings
            .iter()
            .filter(|mapping| mapping.is_image(id, Template::image_name(id)))
            .collect::<Vec<_>>();
        look_at(pid, Template::image_name(id), &own, &pages).transpose()
    });
    let images = images.collect::<io::Result<Vec<_>>>().map_err(failed)?;
    if images.is_empty() {
        return Err(ChildrenError::NoImage { id: id.to_owned(), pid });
    }
    Ok(ChildMemory { child: id.to_owned(), pid, pack, images })
}

/// An image whose parts are mapped at `own`. What lies between them is anonymous memory in place of zeros.
fn look_at(
    pid: i32,
    name: &'static str,
    own: &[&MappedFile],
    pagemap: &Pagemap,
) -> io::Result<Option<Image>> {
    let Some((base, last)) = own.first().and_then(|mapping| mapping.base()).zip(own.last()) else {
        return Ok(None);
    };
    let mapped = last.addresses.end.saturating_sub(base);
    // The end may be zeros too; without the right to see the file they are left out.
    let bytes = pagemap::file_behind(pid, last).map_or(mapped, |file| file.len().max(mapped));
    let pages = bytes.min(IMAGE_MAX) / PAGE;
    let per_chunk = CHUNK / PAGE;
    let mut image = Image {
        name,
        pages,
        private_pages: 0,
        mapped_pages: 0,
        cells: vec![HeatmapCell { shade: 2, marked: false }; pages.div_ceil(per_chunk) as usize],
    };
    pagemap.visit(base, 0..pages, |page, state| {
        let (count, shade) = match state {
            PageState::Absent | PageState::Zero => return,
            PageState::Private => (&mut image.private_pages, 0),
            PageState::Mapped => (&mut image.mapped_pages, 1),
        };
        *count += 1;
        let cell = &mut image.cells[(page / per_chunk) as usize];
        cell.shade = cell.shade.min(shade);
    })?;
    Ok(Some(image))
}

impl ChildMemory {
    /// As a picture.
    pub fn heatmap(&self) -> Heatmap {
        let line = |image: &Image| {
            format!(
                "{}: {} private in {} pages, {} shared",
                image.name,
                show_size(image.private_pages * PAGE),
                image.private_pages,
                show_size(image.mapped_pages * PAGE)
            )
        };
        let key = |colour, text: &str| LegendEntry { colour, text: text.to_owned() };
        let image = |image: &Image| ImageCells {
            name: image.name.to_owned(),
            bytes: image.pages * PAGE,
            chunk_bytes: CHUNK,
            cells: image.cells.clone(),
        };
        Heatmap {
            title: format!("child {} of {}", self.child, self.pack),
            lines: self.images.iter().map(line).collect(),
            shades: vec![
                key(PRIVATE, "dirty: at least one page is the child's own"),
                key(MAPPED, "read: pages of the shared image are mapped"),
                key(PALE, "not touched"),
            ],
            mark: None,
            images: self.images.iter().map(image).collect(),
        }
    }
}
