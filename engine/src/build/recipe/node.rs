//! Packages from npm: this machine's npm gets what the lock file pins by its hashes, and runs none of it.

use std::fs;
use std::path::Path;

use super::error::RecipeError;
use super::format::NodePackages;
use super::site::Site;
use super::tree::RootDiskTree;

const STEP: &str = "getting Node packages";
/// What npm reads.
pub(super) const INPUTS: [&str; 2] = ["package.json", "package-lock.json"];

/// Installs the packages for `node`, whose files are in the recipe's `directory`.
pub(super) fn install(
    site: &Site<'_>,
    tree: &RootDiskTree,
    node: &NodePackages,
    directory: &Path,
) -> Result<(), RecipeError> {
    site.say(STEP);
    let stage = site.place("node");
    fs::create_dir_all(&stage).map_err(RecipeError::file(&stage))?;
    for name in INPUTS {
        let from = directory.join(&node.from).join(name);
        fs::copy(&from, stage.join(name)).map_err(RecipeError::file(&from))?;
    }
    site.tool("npm")
        .args(["ci", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund", "--no-update-notifier"])
        .arg("--prefix")
        .arg(&stage)
        .run(|line| site.say(line))
        .map_err(RecipeError::tool(STEP))?;
    tree.put_tree(&stage, &node.to, (0, 0)).map_err(RecipeError::file(&node.to))?;
    for program in &node.programs {
        let at = Path::new("/usr/local/bin").join(program);
        let to = node.to.join("node_modules/.bin").join(program);
        if !stage.join("node_modules/.bin").join(program).exists() {
            let why = format!("node.programs: no package has a program {program}");
            return Err(RecipeError::Lacks { step: STEP.to_owned(), why });
        }
        tree.link(&at, &to).map_err(RecipeError::file(&at))?;
    }
    fs::remove_dir_all(&stage).map_err(RecipeError::file(&stage))
}
