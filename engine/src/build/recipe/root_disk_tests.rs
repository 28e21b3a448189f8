//! Keys and the image's frame; the test that builds a whole disk is `tests/root_disk.rs`.

use super::apt_sources::AptSources;
use super::*;
use tempfile::TempDir;

const RECIPE: &str = "name = \"x\"\n[base]\nsuite = \"bookworm\"\npackages = [\"a\", \"b\"]\n\
    [python]\nrequirements = \"pins\"\n[[user]]\nname = \"u\"\n\
    [[files]]\nfrom = \"file\"\nto = \"/file\"\n[[files]]\nfrom = \"tree\"\nto = \"/tree\"\n\
    [[run]]\nscript = \"one\"\n[[run]]\nscript = \"two\"\n";

/// A recipe of `text`, whose single file, whose tree's file and whose requirements have these contents.
fn recipe(dir: &TempDir, text: &str, [file, tree, pins]: [&str; 3]) -> Recipe {
    fs::write(dir.path().join("recipe.toml"), text).unwrap();
    fs::write(dir.path().join("file"), file).unwrap();
    fs::create_dir_all(dir.path().join("tree/below")).unwrap();
    fs::write(dir.path().join("tree/below/it"), tree).unwrap();
    fs::write(dir.path().join("pins"), pins).unwrap();
    Recipe::load(dir.path()).unwrap()
}

fn layer_keys(recipe: &Recipe, sources: &AptSources) -> Vec<String> {
    layers::keys(&steps::steps(recipe, sources)).unwrap()
}

#[test]
fn every_input_is_in_the_key_and_their_place_is_not() {
    let dir = TempDir::new().unwrap();
    let agent = dir.path().join("agent");
    fs::write(&agent, "one").unwrap();
    let sources = AptSources { lines: "deb a b main\n".to_owned(), stanzas: String::new() };
    let key = |recipe: &Recipe, sources: &AptSources| {
        disk_key(recipe, &agent, layer_keys(recipe, sources).last().unwrap()).unwrap()
    };
    const CONTENTS: [&str; 3] = ["1", "1", "1"];
    let plain = |text: &str| key(&recipe(&dir, text, CONTENTS), &sources);
    let first = plain(RECIPE);
    assert_eq!(first, key(&recipe(&TempDir::new().unwrap(), RECIPE, CONTENTS), &sources));
    assert_eq!(first, plain(&RECIPE.replace("\"a\", \"b\"", "\"b\", \"a\"")));
    let other_sources = AptSources { lines: String::new(), stanzas: "deb a b main\n".to_owned() };
    let mut others = vec![
        key(&recipe(&dir, RECIPE, ["2", "1", "1"]), &sources),
        key(&recipe(&dir, RECIPE, ["1", "2", "1"]), &sources),
        key(&recipe(&dir, RECIPE, ["1", "1", "2"]), &sources),
        key(&recipe(&dir, RECIPE, CONTENTS), &other_sources),
    ];
    let changes = [
        ("\"b\"", "\"c\""),
        ("\"x\"", "\"y\""),
        ("/file", "/file2"),
        ("/file\"", "/file\"\nexecutable = true"),
        ("/file\"", "/file\"\nmode = 0o600"),
        ("/file\"", "/file\"\nowner = \"u\""),
        ("bookworm", "trixie"),
        ("\"u\"", "\"v\""),
        ("\"one\"", "\"other\""),
        ("\"one\"", "\"one\"\nuser = \"u\""),
        ("\"one\"", "\"one\"\nnetwork = true"),
        ("[base]", "[env]\nA = \"b\"\n[base]"),
        ("[base]", "[[service]]\nname = \"s\"\nargv = [\"s\"]\n[base]"),
    ];
    others.extend(changes.map(|(from, to)| plain(&RECIPE.replace(from, to))));
    fs::write(&agent, "two").unwrap();
    others.push(plain(RECIPE));
    others.push(first);
    let count = others.len();
    others.sort_unstable();
    others.dedup();
    assert_eq!(others.len(), count);
}

#[test]
fn a_change_leaves_the_steps_before_it() {
    let dir = TempDir::new().unwrap();
    let sources = AptSources::default();
    let keys = |text: &str, contents| layer_keys(&recipe(&dir, text, contents), &sources);
    let common =
        |other: &[String], first: &[String]| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    let first = keys(RECIPE, ["1", "1", "1"]);
    assert_eq!(first.len(), 6, "distribution, users, Python, files, twice run");
    assert_eq!(common(&keys(RECIPE, ["2", "1", "1"]), &first), 3);
    assert_eq!(common(&keys(RECIPE, ["1", "1", "2"]), &first), 2);
    assert_eq!(common(&keys(&RECIPE.replace("two", "zwei"), ["1", "1", "1"]), &first), 5);
    assert_eq!(common(&keys(&RECIPE.replace("\"b\"", "\"c\""), ["1", "1", "1"]), &first), 0);
}

#[test]
fn a_recipe_that_extends_another_begins_with_its_steps() {
    let place = TempDir::new().unwrap();
    let make = |name: &str, text: &str| {
        let dir = place.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("recipe.toml"), text).unwrap();
        fs::write(dir.join("file"), name).unwrap();
        Recipe::load(&dir)
    };
    let sources = AptSources::default();
    let files = "[[files]]\nfrom = \"file\"\nto = \"/file\"\n";
    let parent = make("parent", &format!("name = \"parent\"\n[base]\nsuite = \"trixie\"\n{files}")).unwrap();
    let text = format!("name = \"child\"\n[base]\nrecipe = \"../parent\"\n{files}");
    let child = make("child", &text).unwrap();
    assert_eq!(child.suite(), "trixie");
    let (of_parent, of_child) = (layer_keys(&parent, &sources), layer_keys(&child, &sources));
    assert_eq!((of_parent.as_slice(), of_child.len()), (&of_child[..2], 3));
    // Packages are installed together.
    let more = text.replace("../parent\"", "../parent\"\npackages = [\"c\"]");
    assert_ne!(layer_keys(&make("child", &more).unwrap(), &sources)[0], of_parent[0]);
    let result = make("parent", "name = \"parent\"\n[base]\nrecipe = \"../parent\"\n");
    assert!(
        matches!(result, Err(RecipeError::Invalid { ref key, line: Some(3), .. }) if key == "base.recipe"),
        "{result:?}"
    );
}

#[test]
fn images_are_checked_and_padded() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("image");
    for len in [0, 1024, 1 << 20] {
        fs::write(&path, vec![0; len]).unwrap();
        assert!(pad(&path).is_err(), "{len}");
    }
    let mut image = vec![0; (2 << 20) + 1];
    image[1024..1028].copy_from_slice(&SUPERBLOCK.1);
    fs::write(&path, &image).unwrap();
    pad(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 4 << 20);
    pad(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 4 << 20);
}
