//! Pictures as SVG files: bars, texts, legends, and how such a file comes into its place. What is in a picture is its
//! caller's business.

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use svg::node::Node;
use svg::node::element::{Group, Line, Rectangle, SVG, Text, Title};
use tempfile::NamedTempFile;

/// How unfinished pictures are named.
const DRAFT_PREFIX: &str = ".forkd-picture-";
/// Colour of texts.
pub const INK: &str = "#222222";
/// Colour of what is there but matters little.
pub const PALE: &str = "#dddddd";

/// A picture cannot be put where it was wanted.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// Something else than a file is there, which a picture must not take the place of: a directory, device or link.
    #[error("{} is no regular file", path.display())]
    Special {
        /// The place.
        path: PathBuf,
    },
    /// It cannot be written.
    #[error("{}", path.display())]
    Write {
        /// The place.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Which end of a text its position is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    /// Its left end.
    Start,
    /// Its right end.
    End,
}

/// A filled rectangle.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    /// Left edge.
    pub x: f64,
    /// Upper edge.
    pub y: f64,
    /// Width; thin ones are widened until they can be seen.
    pub width: f64,
    /// Height.
    pub height: f64,
    /// Colour.
    pub colour: &'static str,
}

/// One entry of a legend.
#[derive(Debug, Clone)]
pub struct LegendEntry {
    /// Colour that it explains.
    pub colour: &'static str,
    /// What the colour means.
    pub text: String,
}

/// A picture in the making. Lengths are pixels.
#[derive(Debug, Default)]
pub struct Picture {
    nodes: Group,
    width: f64,
    height: f64,
}

impl Picture {
    /// Narrowest bar that is drawn.
    const THINNEST: f64 = 0.75;
    /// Space around everything.
    const MARGIN: f64 = 16.0;

    /// An empty one.
    pub fn new() -> Picture {
        Picture::default()
    }

    /// Writes a line of text. Control characters, which SVG does not allow, become spaces.
    pub fn text(&mut self, (x, y): (f64, f64), size: u32, anchor: Anchor, text: &str) {
        let shown: String = text.chars().map(|c| if is_drawable(c) { c } else { ' ' }).collect();
        // The renderer's font is not known: a generous guess at the width of a line.
        let length = shown.chars().count() as f64 * f64::from(size) * 0.62;
        self.cover(if anchor == Anchor::Start { x + length } else { x }, y + f64::from(size));
        let node = Text::new(shown).set("x", rounded(x)).set("y", rounded(y)).set("font-size", size);
        self.nodes.append(match anchor {
            Anchor::Start => node,
            Anchor::End => node.set("text-anchor", "end"),
        });
    }

    /// Draws a bar, with a text that shows when it is pointed at.
    pub fn bar(&mut self, bar: Bar, tip: Option<&str>) {
        let width = bar.width.max(Picture::THINNEST);
        self.cover(bar.x + width, bar.y + bar.height);
        let node = Rectangle::new()
            .set("x", rounded(bar.x))
            .set("y", rounded(bar.y))
            .set("width", rounded(width))
            .set("height", rounded(bar.height))
            .set("fill", bar.colour);
        self.nodes.append(match tip {
            Some(tip) => node.add(Title::new(tip.chars().filter(|c| is_drawable(*c)).collect::<String>())),
            None => node,
        });
    }

    /// Draws a thin upright line.
    pub fn upright(&mut self, x: f64, (from, to): (f64, f64), colour: &'static str) {
        self.cover(x, to);
        let node = Line::new().set("x1", rounded(x)).set("x2", rounded(x)).set("stroke", colour);
        self.nodes.append(node.set("y1", rounded(from)).set("y2", rounded(to)).set("stroke-width", 0.5));
    }

    /// Explains colours, one a line; returns where the next thing can be drawn.
    pub fn legend(&mut self, (x, mut y): (f64, f64), keys: &[LegendEntry]) -> f64 {
        for key in keys {
            self.bar(Bar { x, y: y - 9.0, width: 12.0, height: 10.0, colour: key.colour }, None);
            self.text((x + 20.0, y), 12, Anchor::Start, &key.text);
            y += 17.0;
        }
        y
    }

    /// The file's text.
    pub fn render(self) -> String {
        let (width, height) = (rounded(self.width + Picture::MARGIN), rounded(self.height + Picture::MARGIN));
        SVG::new()
            .set("viewBox", (0, 0, width, height))
            .set("width", width)
            .set("height", height)
            .set("font-family", "sans-serif")
            .set("fill", INK)
            .add(Rectangle::new().set("width", width).set("height", height).set("fill", "#ffffff"))
            .add(self.nodes)
            .to_string()
    }

    /// Puts it at `path`, as [`put`] does.
    pub fn write(self, path: &Path) -> Result<(), PictureError> {
        put(path, &self.render())
    }

    fn cover(&mut self, x: f64, y: f64) {
        (self.width, self.height) = (self.width.max(x), self.height.max(y));
    }
}

/// Puts a text at `path`, at once: whoever reads that file meanwhile sees the old one or the new one.
pub fn put(path: &Path, text: &str) -> Result<(), PictureError> {
    let failed = |source| PictureError::Write { path: path.to_owned(), source };
    let mut draft = draft(path)?;
    draft.write_all(text.as_bytes()).map_err(failed)?;
    draft.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// Whether [`Picture::write`] could write to `path` now; for before the work whose picture it is.
pub fn check_place(path: &Path) -> Result<(), PictureError> {
    draft(path).map(drop)
}

fn draft(path: &Path) -> Result<NamedTempFile, PictureError> {
    if let Ok(there) = path.symlink_metadata()
        && !there.is_file()
    {
        return Err(PictureError::Special { path: path.to_owned() });
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    tempfile::Builder::new()
        .prefix(DRAFT_PREFIX)
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(parent)
        // The draft's own name, which the error has in it, says nothing to anybody.
        .map_err(|error| PictureError::Write { path: path.to_owned(), source: error.kind().into() })
}

fn is_drawable(c: char) -> bool {
    // XML has no place for these at all, not even escaped.
    !c.is_control() && c != '\u{fffe}' && c != '\u{ffff}'
}

/// Hundredths of a pixel: more digits only make the file longer.
fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_from_outside_stay_texts() {
        let mut picture = Picture::new();
        picture.text((1.0, 2.0), 12, Anchor::Start, "</text><script>\u{1b}[31m&\"'\u{0}");
        let bar = Bar { x: 0.0, y: 0.0, width: 0.0, height: 1.0, colour: PALE };
        picture.bar(bar, Some("<evil/>\n"));
        let text = picture.render();
        assert!(!text.contains("<script>") && !text.contains("<evil"), "{text}");
        assert!(!text.contains('\u{1b}') && !text.contains('\u{0}'), "{text}");
        assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"), "{text}");
        let mut content = String::new();
        content.push_str(&text);
        let parsed = svg::read(&content).unwrap();
        assert!(!parsed.into_iter().any(|event| matches!(event, svg::parser::Event::Error(_))));
    }

    #[test]
    fn a_picture_replaces_the_file_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.svg");
        std::fs::write(&path, "old").unwrap();
        check_place(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
        Picture::new().write(&path).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("<svg "));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let (device, link) = (Path::new("/dev/null"), dir.path().join("link"));
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for special in [dir.path(), device, &link] {
            assert!(
                matches!(check_place(special), Err(PictureError::Special { .. })),
                "{}",
                special.display()
            );
        }
        let nowhere = dir.path().join("none/p.svg");
        let error = check_place(&nowhere).unwrap_err();
        assert!(error.to_string().contains("none/p.svg"), "{error}");
        assert!(matches!(Picture::new().write(&nowhere), Err(PictureError::Write { .. })));
    }
}
