//! Recipes that are wrong in every way we thought of, and the ones in the repository.

use super::*;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use tempfile::TempDir;

/// Longest recipe.toml, in bytes.
const RECIPE_MAX: usize = 1 << 20;

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
        ("\"worker.py\"\nto", "\"folder\"\nmode = 0o700\nto", "files.mode"),
        ("\"worker.py\"\nto", "\"folder\"\nexecutable = true\nto", "files.executable"),
        ("\"worker.py\"\nto", "\"worker.py\"\nmode = 0o10000\nto", "files.mode"),
        ("\"worker.py\"\nto", "\"worker.py\"\nowner = \"a:b:c\"\nto", "files.owner"),
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
            Err(RecipeError::Invalid { key: named, line, .. }) => {
                assert_eq!(named, field, "{to}");
                assert!(line.is_some(), "{to}");
            }
            other => panic!("{to}: {other:?}"),
        }
    }
}

const GROWN: &str = r#"
name = "grown"
[base]
suite = "bookworm"
[[user]]
name = "db"
uid = 70
home = "/var/db"
[[files]]
from = "folder"
to = "/opt/folder"
owner = "db"
[[run]]
script = "initdb"
user = "db"
[[run]]
argv = ["/bin/true"]
cwd = "/opt"
network = true
[env]
A = "b"
[[service]]
name = "db"
argv = ["/usr/bin/db"]
user = "db:staff"
ready = { tcp = 5432 }
timeout_s = 7
[[service]]
name = "web"
argv = ["/usr/bin/web"]
env = { C = "d" }
cwd = "/srv"
ready = { line = "listening" }
[warm]
argv = ["/usr/bin/worker"]
user = "db"
[rehearse]
evals = ["1"]
execs = [["/bin/true"]]
requests = ["http://127.0.0.1:80/"]
[[probe]]
eval = "1"
[[probe]]
exec = ["/bin/echo", "x"]
expect = "x"
[[probe]]
http = "http://127.0.0.1/"
[[port]]
name = "db"
number = 5432
"#;

#[test]
fn a_grown_recipe_says_what_the_machine_starts() {
    let recipe = Recipe::load(write(GROWN).path()).unwrap();
    // Two services, of which one has the usual time, and the worker.
    assert_eq!(recipe.ready_timeout().as_secs(), 7 + 120 + 120);
    assert_eq!(recipe.probe.len(), 3);
    let file = recipe.machine_file();
    assert_eq!(file.env["A"], "b");
    assert_eq!(file.warm.as_ref().unwrap().user.as_deref(), Some("db"));
    let names: Vec<_> = file.services.iter().map(|service| service.name.as_str()).collect();
    assert_eq!(names, ["db", "web"]);
    let text = serde_json::to_string(&file).unwrap();
    assert!(text.contains(r#""ready":{"tcp":5432}"#), "{text}");
    assert_eq!(serde_json::from_str::<forkd_abi::protocol::MachineFile>(&text).unwrap(), file);
}

#[test]
fn what_is_wrong_in_a_grown_recipe_is_named_with_its_line() {
    let cases = [
        ("suite = \"bookworm\"", "recipe = \"../x\"\nsuite = \"bookworm\"", "base.recipe", 4),
        ("suite = \"bookworm\"", "packages = []", "base", 3),
        ("name = \"db\"\nuid", "name = \"D B\"\nuid", "user.name", 6),
        ("uid = 70", "uid = 0", "user.uid", 7),
        ("\"/var/db\"", "\"/proc/db\"", "user.home", 8),
        ("\"/var/db\"", "\"/var:db\"", "user.home", 8),
        ("script = \"initdb\"", "script = \" \"", "run.script", 14),
        ("script = \"initdb\"", "script = \"x\"\nargv = [\"y\"]", "run.script", 14),
        ("script = \"initdb\"\n", "", "run.argv", 13),
        ("cwd = \"/opt\"", "cwd = \"opt\"", "run.cwd", 18),
        ("A = \"b\"", "\"A=\" = \"b\"", "env", 20),
        ("user = \"db:staff\"", "user = \"db:staff:x\"", "service.user", 25),
        ("tcp = 5432", "tcp = 0", "service.ready", 26),
        ("tcp = 5432", "exec = []", "service.ready", 26),
        ("tcp = 5432", "http = \"ftp://x/\"", "service.ready", 26),
        ("timeout_s = 7", "timeout_s = 4000", "service.timeout_s", 27),
        ("name = \"web\"", "name = \"db\"", "service.name", 29),
        ("[warm]\nargv = [\"/usr/bin/worker\"]\nuser = \"db\"\n", "", "rehearse.evals", 35),
        ("execs = [[\"/bin/true\"]]", "execs = [[]]", "rehearse.execs", 39),
        ("\"http://127.0.0.1:80/\"", "\"127.0.0.1\"", "rehearse.requests", 40),
        ("eval = \"1\"", "expect = \"1\"", "probe", 41),
        ("exec = [\"/bin/echo\", \"x\"]", "exec = [\"/bin/echo\"]\neval = \"1\"", "probe", 43),
        ("http = \"http://127.0.0.1/\"", "http = \"https://127.0.0.1/\"", "probe.http", 47),
        ("name = \"db\"\nnumber", "name = \"80\"\nnumber", "port.name", 49),
        ("number = 5432", "number = 0", "port.number", 50),
    ];
    for (from, to, field, at) in cases {
        assert!(GROWN.contains(from), "{from}");
        match Recipe::load(write(&GROWN.replacen(from, to, 1)).path()) {
            Err(RecipeError::Invalid { key, line, .. }) => {
                assert_eq!((key.as_str(), line), (field, Some(at)), "{to}")
            }
            other => panic!("{to}: {other:?}"),
        }
    }
}

#[test]
fn unknown_keys_are_wrong_everywhere() {
    for place in [
        "[base]",
        "[[user]]",
        "[[files]]",
        "[[run]]",
        "[[service]]",
        "[warm]",
        "[rehearse]",
        "[[probe]]",
        "[[port]]",
    ] {
        let text = GROWN.replacen(place, &format!("{place}\nnonsense = 1"), 1);
        let result = Recipe::load(write(&text).path());
        let Err(RecipeError::Syntax { source, .. }) = result else { panic!("{place}: {result:?}") };
        let said = source.to_string();
        assert!(said.contains("nonsense") && said.contains("line"), "{place}: {said}");
    }
    let result = Recipe::load(write(&GROWN.replace("tcp = 5432", "tcp = 5432, line = \"x\"")).path());
    assert!(matches!(result, Err(RecipeError::Syntax { .. })), "{result:?}");
}

#[test]
fn a_probe_needs_a_worker() {
    let text = "name = \"x\"\n[base]\nsuite = \"bookworm\"\n[probe]\ncode = \"1\"\n";
    let result = Recipe::load(write(text).path());
    assert!(matches!(result, Err(RecipeError::Invalid { ref key, .. }) if key == "probe"), "{result:?}");
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
    let result = Recipe::load(write(&format!("# {}", "x".repeat(RECIPE_MAX))).path());
    assert!(matches!(result, Err(RecipeError::Invalid { ref key, .. }) if key == RECIPE_FILE), "{result:?}");
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
