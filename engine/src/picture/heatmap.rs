//! Pictures of images chunk by chunk: one small square a chunk, its colour saying what it is, a stripe below it that it
//! has something besides. What the colours mean is the caller's business.

use crate::picture::sizes::show_size;
use crate::picture::svg::{Anchor, Bar, LegendEntry, Picture};

/// Squares in a row.
const COLUMNS: usize = 64;
/// Squares an image has at most; a square stands for several chunks where there are more.
const CELLS_MAX: usize = 64 * 256;
const CELL: f64 = 10.0;
/// What is left of a square above the stripe.
const UPPER: f64 = 7.0;
const LEFT: f64 = 16.0;

/// One chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeatmapCell {
    /// Position of its colour in [`Heatmap::shades`]. The first matter most: they are shown when a square stands for several.
    pub shade: u8,
    /// Whether it has a stripe.
    pub marked: bool,
}

/// One image.
#[derive(Debug, Clone)]
pub struct ImageCells {
    /// What it is called.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Bytes of each chunk; the last may be shorter.
    pub chunk_bytes: u64,
    /// Its chunks.
    pub cells: Vec<HeatmapCell>,
}

/// A picture of images.
#[derive(Debug, Clone)]
pub struct Heatmap {
    /// Its title.
    pub title: String,
    /// Lines below the title.
    pub lines: Vec<String>,
    /// The colours.
    pub shades: Vec<LegendEntry>,
    /// What a stripe means, where there are any.
    pub mark: Option<LegendEntry>,
    /// The images.
    pub images: Vec<ImageCells>,
}

impl ImageCells {
    /// How many chunks `is` tells of, and their bytes.
    fn count(&self, is: impl Fn(&HeatmapCell) -> bool) -> (u64, u64) {
        let bytes = |at: usize| self.bytes.saturating_sub(at as u64 * self.chunk_bytes).min(self.chunk_bytes);
        let those = self.cells.iter().enumerate().filter(|(_, cell)| is(cell));
        those.fold((0, 0), |(chunks, sum), (at, _)| (chunks + 1, sum + bytes(at)))
    }

    /// The squares: how many chunks each stands for, and what they show.
    fn squares(&self) -> (usize, Vec<HeatmapCell>) {
        let each = self.cells.len().div_ceil(CELLS_MAX).max(1);
        let square = |chunks: &[HeatmapCell]| HeatmapCell {
            shade: chunks.iter().map(|chunk| chunk.shade).min().unwrap_or(0),
            marked: chunks.iter().any(|chunk| chunk.marked),
        };
        (each, self.cells.chunks(each).map(square).collect())
    }
}

impl Heatmap {
    /// The picture.
    pub fn draw(&self) -> Picture {
        let mut picture = Picture::new();
        let mut y = 28.0;
        picture.text((LEFT, y), 16, Anchor::Start, &self.title);
        for line in &self.lines {
            y += 18.0;
            picture.text((LEFT, y), 12, Anchor::Start, line);
        }
        for image in &self.images {
            y = self.draw_image(&mut picture, image, y + 30.0);
        }
        picture.legend((LEFT, y + 26.0), &self.keys());
        picture
    }

    fn draw_image(&self, picture: &mut Picture, image: &ImageCells, y: f64) -> f64 {
        let (each, squares) = image.squares();
        let mut label = format!(
            "{}: {} in {} chunks of {}",
            image.name,
            show_size(image.bytes),
            image.cells.len(),
            show_size(image.chunk_bytes)
        );
        if each > 1 {
            label.push_str(&format!(", {each} a square"));
        }
        picture.text((LEFT, y), 13, Anchor::Start, &label);
        let top = y + 8.0;
        for (row, squares) in squares.chunks(COLUMNS).enumerate() {
            // Neighbours alike are one shape: most of an image is.
            let mut column = 0;
            for alike in squares.chunk_by(|a, b| a == b) {
                let first = (row * COLUMNS + column) * each;
                self.draw_squares(
                    picture,
                    alike,
                    (LEFT + column as f64 * CELL, top + row as f64 * CELL),
                    first,
                );
                column += alike.len();
            }
        }
        top + squares.len().div_ceil(COLUMNS) as f64 * CELL
    }

    fn draw_squares(&self, picture: &mut Picture, alike: &[HeatmapCell], (x, y): (f64, f64), first: usize) {
        let Some((cell, key)) =
            alike.first().and_then(|cell| Some((cell, self.shades.get(usize::from(cell.shade))?)))
        else {
            return;
        };
        let width = alike.len() as f64 * CELL - 1.0;
        let mark = self.mark.as_ref().filter(|_| cell.marked);
        let height = if mark.is_some() { UPPER } else { CELL - 1.0 };
        let tip = format!("from chunk {first}: {}", key.text);
        picture.bar(Bar { x, y, width, height, colour: key.colour }, Some(&tip));
        if let Some(mark) = mark {
            let height = CELL - 1.0 - UPPER;
            picture.bar(Bar { x, y: y + UPPER, width, height, colour: mark.colour }, None);
        }
    }

    /// The legend, with how much there is of everything.
    fn keys(&self) -> Vec<LegendEntry> {
        let counted = |key: &LegendEntry, is: &dyn Fn(&HeatmapCell) -> bool| {
            let of_images: Vec<_> = self.images.iter().map(|image| (image, image.count(is))).collect();
            let chunks: u64 = of_images.iter().map(|(_, (chunks, _))| chunks).sum();
            let bytes: u64 = of_images.iter().map(|(_, (_, bytes))| bytes).sum();
            let each: Vec<_> =
                of_images.iter().map(|(image, (chunks, _))| format!("{} {chunks}", image.name)).collect();
            let mib = bytes as f64 / f64::from(1 << 20);
            let text = format!("{}: {chunks} chunks, {mib:.1} MiB ({})", key.text, each.join(", "));
            LegendEntry { colour: key.colour, text }
        };
        let shades = self.shades.iter().enumerate();
        let mut keys: Vec<_> =
            shades.map(|(at, key)| counted(key, &|cell| usize::from(cell.shade) == at)).collect();
        keys.extend(self.mark.as_ref().map(|mark| counted(mark, &|cell| cell.marked)));
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(cells: Vec<HeatmapCell>, bytes: u64) -> Heatmap {
        let key = |colour, text: &str| LegendEntry { colour, text: text.to_owned() };
        Heatmap {
            title: "a pack".to_owned(),
            lines: vec!["of somebody".to_owned()],
            shades: vec![key("#111111", "hot"), key("#222222", "cold")],
            mark: Some(key("#333333", "here")),
            images: vec![ImageCells { name: "memory.bin".to_owned(), bytes, chunk_bytes: 65536, cells }],
        }
    }

    fn cell(shade: u8, marked: bool) -> HeatmapCell {
        HeatmapCell { shade, marked }
    }

    #[test]
    fn the_legend_counts() {
        let map = map(vec![cell(0, true), cell(1, true), cell(1, false)], 2 * 65536 + 10);
        let keys: Vec<_> = map.keys().into_iter().map(|key| key.text).collect();
        assert_eq!(keys[0], "hot: 1 chunks, 0.1 MiB (memory.bin 1)");
        assert_eq!(map.images[0].count(|cell| cell.shade == 1), (2, 65536 + 10));
        assert_eq!(keys[2], "here: 2 chunks, 0.1 MiB (memory.bin 2)");
        let text = map.draw().render();
        assert!(text.contains("from chunk 1: cold") && text.contains("#333333"), "{text}");
    }

    #[test]
    fn huge_images_are_drawn_in_bounded_space() {
        let chunks = 3 * CELLS_MAX - 5;
        let mut cells = vec![cell(1, false); chunks];
        cells[4] = cell(0, false);
        let map = map(cells, chunks as u64 * 65536);
        let (each, squares) = map.images[0].squares();
        assert_eq!((each, squares.len()), (3, CELLS_MAX - 1));
        assert_eq!(squares[1].shade, 0, "what matters most is shown");
        let text = map.draw().render();
        assert!(text.contains("3 a square") && text.len() < 200_000, "{}", text.len());
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        let text = map(Vec::new(), 0).draw().render();
        assert!(text.contains("memory.bin: 0 B in 0 chunks") && !text.contains("NaN"), "{text}");
        // A shade that nobody explains draws nothing rather than failing.
        assert!(map(vec![cell(9, false)], 1).draw().render().contains("<svg"));
    }
}
