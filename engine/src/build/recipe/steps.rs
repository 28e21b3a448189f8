//! The steps that make a root disk, what goes into each, and doing them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::accounts;
use super::apt_sources::AptSources;
use super::distribution;
use super::enclosure::{self, Command};
use super::error::RecipeError;
use super::format::{NodePackages, Recipe, RecipeFile, RecipeUser, RunStep};
use super::node;
use super::python;
use super::site::Site;
use super::source;
use super::tree::RootDiskTree;
use crate::build::tools::{sha256_file, sha256_parts};

/// Bump when the way of building changes what comes out.
const VERSION: &str = "1";

/// One step.
pub(super) enum Step<'a> {
    Distribution { suite: &'a str, packages: Vec<&'a str>, sources: &'a AptSources },
    Users(&'a [RecipeUser]),
    Python { requirements: PathBuf },
    Node { node: &'a NodePackages, recipe: &'a Recipe },
    Files { files: &'a [RecipeFile], directory: &'a Path },
    Run { step: &'a RunStep, at: usize, recipe: &'a Recipe },
}

/// All steps of a recipe: those of the one that it extends come first, with the packages of both from the beginning.
pub(super) fn steps<'a>(recipe: &'a Recipe, sources: &'a AptSources) -> Vec<Step<'a>> {
    let lineage: Vec<&Recipe> = recipe.lineage().collect();
    let mut packages: Vec<&str> =
        lineage.iter().flat_map(|recipe| recipe.base.packages.iter().map(String::as_str)).collect();
    packages.sort_unstable();
    packages.dedup();
    let mut steps = vec![Step::Distribution { suite: recipe.suite(), packages, sources }];
    for recipe in lineage.into_iter().rev() {
        if !recipe.user.is_empty() {
            steps.push(Step::Users(&recipe.user));
        }
        if let Some(python) = &recipe.python {
            steps.push(Step::Python { requirements: recipe.directory.join(&python.requirements) });
        }
        if let Some(node) = &recipe.node {
            steps.push(Step::Node { node, recipe });
        }
        if !recipe.files.is_empty() {
            steps.push(Step::Files { files: &recipe.files, directory: &recipe.directory });
        }
        steps.extend(recipe.run.iter().enumerate().map(|(at, step)| Step::Run { step, at, recipe }));
    }
    steps
}

impl Step<'_> {
    /// Whether what it makes is kept for the next build. What is quick is done again.
    pub(super) fn is_kept(&self) -> bool {
        !matches!(self, Step::Users(_) | Step::Files { .. })
    }

    /// Of everything that goes into it beside the steps before it.
    pub(super) fn digest(&self) -> Result<String, RecipeError> {
        let parts = match self {
            Step::Distribution { suite, packages, sources } => {
                let fixed = [VERSION, suite, &sources.lines, &sources.stanzas];
                fixed.into_iter().chain(packages.iter().copied()).map(str::to_owned).collect()
            }
            Step::Users(users) => vec!["users".to_owned(), format!("{users:?}")],
            Step::Python { requirements } => {
                let digest = sha256_file(requirements).map_err(RecipeError::file(requirements))?;
                vec!["python".to_owned(), digest]
            }
            Step::Node { node, recipe } => {
                let mut parts = vec!["node".to_owned(), node.to.display().to_string()];
                parts.extend(node.programs.iter().cloned());
                for name in node::INPUTS {
                    let path = recipe.directory.join(&node.from).join(name);
                    parts.push(sha256_file(&path).map_err(RecipeError::file(&path))?);
                }
                parts
            }
            Step::Files { files, directory } => {
                let mut parts = vec!["files".to_owned()];
                for file in *files {
                    let from = directory.join(&file.from);
                    let mode = mode(file, &from)?;
                    parts.push(format!("{:?} {mode:?} {:?}", file.to, file.owner));
                    parts.push(source::digest(&from).map_err(RecipeError::file(&from))?);
                }
                parts
            }
            Step::Run { step, recipe, .. } => vec!["run".to_owned(), format!("{step:?} {:?}", recipe.env)],
        };
        Ok(sha256_parts(parts.iter().map(String::as_bytes)))
    }

    /// Does it in the tree. The first step makes the tree.
    pub(super) fn apply(&self, site: &Site<'_>) -> Result<(), RecipeError> {
        if let Step::Distribution { suite, packages, sources } = self {
            return distribution::install(site, suite, packages, sources).map(drop);
        }
        let tree = RootDiskTree::open(&site.tree()).map_err(RecipeError::file(&site.tree()))?;
        match self {
            Step::Distribution { .. } => Ok(()),
            Step::Users(users) => accounts::add(&tree, users).map_err(|error| RecipeError::Lacks {
                step: "adding users".to_owned(),
                why: error.to_string(),
            }),
            Step::Python { requirements } => python::install(site, &tree, requirements),
            Step::Node { node, recipe } => node::install(site, &tree, node, &recipe.directory),
            Step::Files { files, directory } => {
                site.say("adding the recipe's files");
                files.iter().try_for_each(|file| put(&tree, file, directory))
            }
            Step::Run { step, at, recipe } => run(site, &tree, step, *at, recipe),
        }
    }
}

/// Permissions of a file; a tree's are its own.
fn mode(file: &RecipeFile, from: &Path) -> Result<Option<u32>, RecipeError> {
    let metadata = fs::metadata(from).map_err(RecipeError::file(from))?;
    if metadata.is_dir() {
        return Ok(None);
    }
    let executable = file.executable.unwrap_or_else(|| source::is_executable(&metadata));
    Ok(Some(file.mode.unwrap_or(if executable { 0o755 } else { 0o644 })))
}

fn put(tree: &RootDiskTree, file: &RecipeFile, directory: &Path) -> Result<(), RecipeError> {
    let from = directory.join(&file.from);
    let owner = match &file.owner {
        None => None,
        Some(owner) => {
            let lacks = |error: std::io::Error| RecipeError::Lacks {
                step: format!("files: the owner of {}", file.to.display()),
                why: error.to_string(),
            };
            let account = accounts::find(tree, owner).map_err(lacks)?;
            Some((account.uid, account.gid))
        }
    };
    match mode(file, &from)? {
        None => tree.put_tree(&from, &file.to, owner.unwrap_or((0, 0))).map_err(RecipeError::file(&from)),
        Some(mode) => {
            let mut contents = File::open(&from).map_err(RecipeError::file(&from))?;
            tree.put_for(&file.to, &mut contents, mode, owner).map_err(RecipeError::file(&file.to))
        }
    }
}

fn run(
    site: &Site<'_>,
    tree: &RootDiskTree,
    step: &RunStep,
    at: usize,
    recipe: &Recipe,
) -> Result<(), RecipeError> {
    let argv = match &step.script {
        Some(script) => vec!["/bin/sh", "-euc", script.as_str()],
        None => step.argv.iter().map(String::as_str).collect(),
    };
    let first = match &step.script {
        Some(script) => script.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default(),
        None => step.argv.first().map_or("", String::as_str),
    };
    let title = format!("run {} of {} ({first})", at + 1, recipe.name);
    site.say(&title);
    let env = recipe.env.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let (user, cwd) = (step.user.as_deref(), step.cwd.as_deref());
    let command = Command { argv, user, cwd, env, network: step.network, stage: None };
    enclosure::run(site, tree, &title, &command)
}
