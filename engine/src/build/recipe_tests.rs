//! Recipes that are wrong in every way we thought of, and the ones in the repository.

use super::*;
use std::os::unix::fs::symlink;
use tempfile::TempDir;

const GOOD: &str = r#"
name = "good"
description = "A good recipe"
[base]
suite = "bookworm"
packages = ["python3", "libstdc++6", "g++"]
[[files]]
from = "worker.py"
to = "/opt/worker.py"
[warm]
argv = ["/usr/bin/python3", "/opt/worker.py"]
env = { A = "b=c" }
cwd = "/opt"
[readiness]
timeout_s = 60
[probe]
code = "1+1"
expect = "2"
"#;

fn write(text: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join(RECIPE_FILE), text).unwrap();
    fs::write(dir.path().join("worker.py"), "print()").unwrap();
    fs::create_dir(dir.path().join("folder")).unwrap();
    symlink("/etc/passwd", dir.path().join("link")).unwrap();
    symlink("worker.py", dir.path().join("inner")).unwrap();
    dir
}

#[test]
fn a_good_recipe_is_read_from_its_folder_and_from_its_file() {
    let dir = write(GOOD);
    let recipe = Recipe::load(dir.path()).unwrap();
    assert_eq!(recipe, Recipe::load(&dir.path().join(RECIPE_FILE)).unwrap());
    assert_eq!((recipe.memory_mib, recipe.vcpus, recipe.ready_timeout().as_secs()), (512, 1, 60));
    let machine = recipe.machine_file();
    assert_eq!(machine.hostname.as_deref(), Some("good"));
    assert_eq!(machine.warm.unwrap().env["A"], "b=c");
}

#[test]
fn a_small_recipe_is_enough() {
    let dir = write("name = \"small\"\n[base]\nsuite = \"bookworm\"\n");
    let recipe = Recipe::load(dir.path()).unwrap();
    assert!(recipe.warm.is_none() && recipe.files.is_empty());
    assert_eq!(recipe.ready_timeout().as_secs(), 120);
}

#[test]
fn what_is_wrong_is_named() {
    let cases = [
        ("name = \"good\"", "name = \"\"", "name"),
        ("name = \"good\"", "name = \"../x\"", "name"),
        ("name = \"good\"", "name = \"good\"\nscratch_mib = 65537", "scratch_mib"),
        ("name = \"good\"", "name = \"Good\"", "name"),
        ("name = \"good\"", "name = \"-good\"", "name"),
        ("A good recipe", "two\\nlines", "description"),
        ("\"bookworm\"", "\"--help\"", "base.suite"),
        ("\"bookworm\"", "\"book worm\"", "base.suite"),
        ("\"bookworm\"", "\"\"", "base.suite"),
        ("\"python3\",", "\"python3,evil\",", "base.packages"),
        ("\"python3\",", "\"-python3\",", "base.packages"),
        ("\"python3\",", "\"./local.deb\",", "base.packages"),
        ("\"worker.py\"\nto", "\"../worker.py\"\nto", "files.from"),
        ("\"worker.py\"\nto", "\"/etc/passwd\"\nto", "files.from"),
        ("\"worker.py\"\nto", "\"link\"\nto", "files.from"),
        ("\"worker.py\"\nto", "\"folder\"\nto", "files.from"),
        ("\"worker.py\"\nto", "\"absent\"\nto", "files.from"),
        ("\"worker.py\"\nto", "\"\"\nto", "files.from"),
        ("to = \"/opt/worker.py\"", "to = \"opt/worker.py\"", "files.to"),
        ("to = \"/opt/worker.py\"", "to = \"/opt/../etc/shadow\"", "files.to"),
        ("to = \"/opt/worker.py\"", "to = \"/forkd/agent\"", "files.to"),
        ("to = \"/opt/worker.py\"", "to = \"/proc/x\"", "files.to"),
        ("to = \"/opt/worker.py\"", "to = \"/\"", "files.to"),
        ("to = \"/opt/worker.py\"", "to = \"/opt/\"", "files.to"),
        ("to = \"/opt/worker.py\"", "to = \"/opt/a\\u0000b\"", "files.to"),
        ("[warm]\nargv = [\"/usr/bin/python3\", \"/opt/worker.py\"]", "[warm]\nargv = []", "warm.argv"),
        ("A = \"b=c\"", "\"A=B\" = \"c\"", "warm.env"),
        ("A = \"b=c\"", "A = \"\\u0000\"", "warm.env"),
        ("cwd = \"/opt\"", "cwd = \"opt\"", "warm.cwd"),
        ("timeout_s = 60", "timeout_s = 0", "readiness.timeout_s"),
        ("timeout_s = 60", "timeout_s = 1000000", "readiness.timeout_s"),
        ("code = \"1+1\"", "code = \" \"", "probe.code"),
        ("[base]", "memory_mib = 63\n[base]", "memory_mib"),
        ("[base]", "memory_mib = 4000000000\n[base]", "memory_mib"),
        ("[base]", "vcpus = 9\n[base]", "vcpus"),
    ];
    for (from, to, field) in cases {
        assert!(GOOD.contains(from), "{from}");
        let dir = write(&GOOD.replace(from, to));
        match Recipe::load(dir.path()) {
            Err(RecipeError::Invalid { field: named, .. }) => assert_eq!(named, field, "{to}"),
            other => panic!("{to}: {other:?}"),
        }
    }
}

#[test]
fn a_probe_needs_a_worker() {
    let text = "name = \"x\"\n[base]\nsuite = \"bookworm\"\n[probe]\ncode = \"1\"\n";
    let result = Recipe::load(write(text).path());
    assert!(matches!(result, Err(RecipeError::Invalid { field: "probe", .. })), "{result:?}");
}

#[test]
fn what_is_no_recipe_is_said_so() {
    let dir = TempDir::new().unwrap();
    assert!(matches!(Recipe::load(dir.path()), Err(RecipeError::NotARecipe { .. })));
    assert!(matches!(Recipe::load(&dir.path().join("absent")), Err(RecipeError::NotARecipe { .. })));
    for text in ["", "name = ", "name = \"x\"", "nmae = \"x\"", "name = 3", &GOOD.replace("[warm]", "[worm]")]
    {
        let result = Recipe::load(write(text).path());
        assert!(matches!(result, Err(RecipeError::Syntax { .. })), "{text}: {result:?}");
    }
    let result = Recipe::load(write(&format!("# {}", "x".repeat(RECIPE_MAX as usize))).path());
    assert!(matches!(result, Err(RecipeError::Invalid { field: RECIPE_FILE, .. })), "{result:?}");
    fs::write(dir.path().join(RECIPE_FILE), b"name = \"\xff\"").unwrap();
    assert!(matches!(Recipe::load(dir.path()), Err(RecipeError::File { .. })));
    fs::remove_file(dir.path().join(RECIPE_FILE)).unwrap();
    fs::create_dir(dir.path().join(RECIPE_FILE)).unwrap();
    assert!(matches!(Recipe::load(dir.path()), Err(RecipeError::File { .. })));
}

#[test]
fn a_link_within_the_folder_is_fine() {
    let recipe = Recipe::load(write(&GOOD.replace("\"worker.py\"\nto", "\"inner\"\nto")).path());
    assert!(recipe.is_ok(), "{recipe:?}");
}

#[test]
fn the_recipes_of_the_repository_are_good() {
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join("recipes");
    let mut names = Vec::new();
    for entry in fs::read_dir(recipes).unwrap() {
        let path = entry.unwrap().path();
        let recipe = Recipe::load(&path).unwrap();
        assert_eq!(path.file_name().unwrap().to_str(), Some(recipe.name.as_str()));
        names.push(recipe.name);
    }
    assert!(names.contains(&"python-numpy".to_owned()), "{names:?}");
}
