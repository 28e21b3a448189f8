//! A registry as one HTML file for people: no script, nothing fetched. Called by `forkd hub page`.
//!
//! All of it is what somebody wrote into a registry, so every text is escaped; maud does.

use forkd_fs::format::is_plain_name;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::hub::registry::{Package, PackageVersion, Registry};
use crate::picture::sizes::show_size;
use crate::reference::{LATEST, PackageName};

const STYLE: &str = "
:root { color-scheme: light dark; --line: light-dark(#d8dce2, #3a3f47); --soft: light-dark(#59616d, #a4acb8);
  --box: light-dark(#f5f6f8, #22262c); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .25rem 0; } .soft { color: var(--soft); }
article { border-top: 1px solid var(--line); padding: 1.25rem 0; }
dl { display: flex; flex-wrap: wrap; gap: .25rem 2rem; margin: .5rem 0; } dl div { display: flex; gap: .5rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--box); border-radius: .4rem; padding: .6rem .8rem; margin: .5rem 0; overflow-x: auto; }
code, pre { font: 14px/1.5 ui-monospace, monospace; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15rem 1.5rem .15rem 0; vertical-align: top; }
td { overflow-wrap: anywhere; } th { color: var(--soft); font-weight: normal; }
summary { cursor: pointer; color: var(--soft); }
";

/// The page. `title` is what it is called.
pub fn render(registry: &Registry, title: &str) -> String {
    let packages = &registry.packages;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (title) }
                p.soft { (count(packages.len())) " of machines that are already running, each started with " code { "forkd fork" } "." }
                main { @for (name, listed) in packages { (package(name, listed)) } }
            }
        }
    };
    page.into_string()
}

fn count(packages: usize) -> String {
    match packages {
        0 => "No packs".to_owned(),
        1 => "1 pack".to_owned(),
        more => format!("{more} packs"),
    }
}

fn package(name: &str, package: &Package) -> Markup {
    let newest = package.newest();
    // Nothing can refer to one that has no plain name.
    let usable = name.parse::<PackageName>().is_ok();
    html! {
        article id=(name) {
            h2 { (name) }
            p { (package.description) }
            @if let Some(newest) = newest.filter(|_| usable) {
                (facts(newest))
                pre { code { (commands(name, newest)) } }
            }
            (versions(package))
        }
    }
}

fn facts(version: &PackageVersion) -> Markup {
    let memory = version.memory_mib.map(|mib| format!("{mib} MiB"));
    let day = version.created_at.as_deref().map(|time| time.split('T').next().unwrap_or(time).to_owned());
    let known = [
        ("Memory", memory),
        ("Pack", version.size_bytes.map(show_size)),
        ("Fetched before its first instruction", version.head_size.map(show_size)),
        ("From", version.base_image.clone()),
        ("Recipe", version.recipe_path.clone()),
        ("Made", day),
    ];
    html! {
        dl {
            @for (what, value) in known {
                @if let Some(value) = value { div { dt { (what) } dd { (value) } } }
            }
        }
    }
}

/// What a reader types to have it. Readers copy it into a shell, so a recipe's path has to be a plain one.
fn commands(name: &str, version: &PackageVersion) -> String {
    let recipe = version.recipe_path.as_ref().filter(|path| path.split('/').all(is_plain_name));
    match recipe {
        _ if version.is_hosted() => format!("forkd fork {name} -n 3\nforkd pull {name}"),
        Some(recipe) => format!("forkd build {recipe}    # its pack is hosted nowhere yet"),
        None => "# its pack is hosted nowhere yet".to_owned(),
    }
}

fn versions(package: &Package) -> Markup {
    let hosted = package.versions.iter().filter(|(name, version)| *name != LATEST && version.is_hosted());
    let mut hosted: Vec<_> = hosted.collect();
    hosted.sort_by(|a, b| b.1.created_at.cmp(&a.1.created_at));
    html! {
        @if !hosted.is_empty() {
            details {
                summary { "Versions" }
                table {
                    tr { th { "Version" } th { "Made" } th { "Pack" } th { "sha256" } }
                    @for (name, version) in hosted {
                        tr {
                            td { (name) }
                            td { (version.created_at.as_deref().unwrap_or("-")) }
                            td { (version.size_bytes.map_or_else(|| "-".to_owned(), show_size)) }
                            td { code { (version.sha256.as_deref().unwrap_or("-")) } }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "<script>alert(1)</script>\" onload='x";

    fn parsed(registry: &serde_json::Value) -> Registry {
        Registry::parse(registry.to_string().as_bytes(), "test").unwrap()
    }

    #[test]
    fn what_a_registry_says_is_text() {
        let registry = serde_json::json!({ "schema_version": 1, "packages": { HOSTILE: {
            "description": HOSTILE,
            "versions": { HOSTILE: { "url": HOSTILE, "sha256": HOSTILE, "recipe_path": HOSTILE,
                "base_image": HOSTILE, "created_at": HOSTILE } },
        }, "o/n": {
            "description": HOSTILE,
            "versions": { "latest": { "recipe_path": HOSTILE, "base_image": HOSTILE, "created_at": HOSTILE } },
        } } });
        let page = render(&parsed(&registry), HOSTILE);
        assert!(!page.contains("<script") && !page.contains("\" onload"), "{page}");
        assert!(page.contains("&lt;script&gt;"), "{page}");
    }

    #[test]
    fn every_package_says_how_to_have_it() {
        let registry = serde_json::json!({ "schema_version": 1, "packages": {
            "o/hosted": { "versions": { "latest": { "url": "p", "size_bytes": 3 << 20, "memory_mib": 512 } } },
            "o/recipe": { "versions": { "latest": { "recipe_path": "recipes/recipe" } } },
            "o/empty": {},
        } });
        let page = render(&parsed(&registry), "Packs");
        for text in
            ["3 packs", "forkd pull o/hosted", "3.0 MiB", "512 MiB", "forkd build recipes/recipe", "o/empty"]
        {
            assert!(page.contains(text), "{text}: {page}");
        }
    }
}
