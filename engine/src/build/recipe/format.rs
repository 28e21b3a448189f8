//! `recipe.toml` as it is written. `docs/RECIPES.md` explains every key; [`super::check`] says which values make sense.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use forkd_abi::protocol::{ServiceCommand, WarmCommand};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// The file that makes a folder a recipe.
pub const RECIPE_FILE: &str = "recipe.toml";

/// A recipe.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Its name: a tag, and the host name of its machines.
    pub name: String,
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// What the root disk starts from.
    pub base: RecipeBase,
    /// Packages from PyPI.
    #[serde(default)]
    pub python: Option<PythonPackages>,
    /// Packages from npm.
    #[serde(default)]
    pub node: Option<NodePackages>,
    /// Users to add.
    #[serde(default)]
    pub user: Vec<RecipeUser>,
    /// Files of the recipe's own.
    #[serde(default)]
    pub files: Vec<RecipeFile>,
    /// What is run once in the root disk, in this order, when all else is there.
    #[serde(default)]
    pub run: Vec<RunStep>,
    /// Guest RAM in MiB.
    #[serde(default = "default_memory_mib")]
    pub memory_mib: u32,
    /// Processors, 1 to 8.
    #[serde(default = "default_vcpus")]
    pub vcpus: u32,
    /// Size of each copy's empty scratch disk in MiB; none unless given.
    #[serde(default)]
    pub scratch_mib: u32,
    /// Machines have a second console, /dev/hvc0, cheaper to print to than the serial port.
    #[serde(default)]
    pub second_console: bool,
    /// Environment of all that runs in the machine, and of `[[run]]`.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Programs that run beside the warm worker, started in this order and before it.
    #[serde(default)]
    pub service: Vec<ServiceCommand>,
    /// The warm worker.
    #[serde(default)]
    pub warm: Option<WarmCommand>,
    /// When the warm worker counts as failed.
    #[serde(default)]
    pub readiness: Readiness,
    /// What copies will do first, done before the snapshot.
    #[serde(default)]
    pub rehearse: Rehearse,
    /// Proof that it is warm.
    #[serde(default, deserialize_with = "one_or_many")]
    pub probe: Vec<Probe>,
    /// Ports with a name.
    #[serde(default)]
    pub port: Vec<NamedPort>,
    /// The folder it was read from.
    #[serde(skip)]
    pub(super) directory: PathBuf,
    /// The recipe that `base.recipe` names.
    #[serde(skip)]
    pub(super) parent: Option<Box<Recipe>>,
}

/// What a root disk starts from: a distribution, or another recipe's root disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeBase {
    /// Debian's name for a release: "bookworm".
    #[serde(default)]
    pub suite: Option<String>,
    /// The folder of the recipe whose root disk is extended, seen from this recipe's.
    #[serde(default)]
    pub recipe: Option<PathBuf>,
    /// Packages beside the essential ones, or beside those of the other recipe.
    #[serde(default)]
    pub packages: Vec<String>,
}

/// Packages from PyPI.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PythonPackages {
    /// pip's requirements with a `--hash` for each, in the recipe's folder.
    pub requirements: PathBuf,
}

/// Packages from npm.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodePackages {
    /// Where package.json and package-lock.json are in the recipe's folder.
    #[serde(default = "here")]
    pub from: PathBuf,
    /// The directory in the machine that gets them, and node_modules.
    pub to: PathBuf,
    /// Programs of node_modules/.bin that /usr/local/bin leads to.
    #[serde(default)]
    pub programs: Vec<String>,
}

fn here() -> PathBuf {
    PathBuf::from(".")
}

/// A user of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeUser {
    /// The user's name, and its group's.
    pub name: String,
    /// The number of both; from 1000 on when absent.
    #[serde(default)]
    pub uid: Option<u32>,
    /// The home directory, which is made; /home/NAME when absent.
    #[serde(default)]
    pub home: Option<PathBuf>,
}

/// A file or a tree from the recipe's folder.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeFile {
    /// Path in the recipe's folder.
    pub from: PathBuf,
    /// Absolute path in the machine.
    pub to: PathBuf,
    /// Whether it may be executed; as in the folder when absent.
    #[serde(default)]
    pub executable: Option<bool>,
    /// Permissions of a file, instead.
    #[serde(default)]
    pub mode: Option<u32>,
    /// `NAME|UID[:GROUP|GID]`; root when absent.
    #[serde(default)]
    pub owner: Option<String>,
}

/// Something that is run once in the root disk while it is made.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunStep {
    /// Program and arguments.
    #[serde(default)]
    pub argv: Vec<String>,
    /// Lines for /bin/sh -eu, instead.
    #[serde(default)]
    pub script: Option<String>,
    /// Who runs it; root when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// Working directory; / when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Whether it has this machine's network; none otherwise.
    #[serde(default)]
    pub network: bool,
}

/// How long the warm worker may take.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Readiness {
    /// Seconds until it must have printed `{"ready":true}`, once the services are ready.
    pub timeout_s: u32,
}

impl Default for Readiness {
    fn default() -> Self {
        Self { timeout_s: 120 }
    }
}

/// What copies will do first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rehearse {
    /// Code for the warm worker.
    #[serde(default)]
    pub evals: Vec<String>,
    /// Programs and their arguments.
    #[serde(default)]
    pub execs: Vec<Vec<String>>,
    /// `http://` URLs in the machine.
    #[serde(default)]
    pub requests: Vec<String>,
}

/// Something that must succeed before the snapshot is taken: exactly one of `eval`, `exec` and `http`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// Code in the worker's language. `code` is its older name.
    #[serde(default, alias = "code")]
    pub eval: Option<String>,
    /// Program and arguments; it must end with code 0.
    #[serde(default)]
    pub exec: Option<Vec<String>>,
    /// An `http://` URL; its status must be below 400.
    #[serde(default)]
    pub http: Option<String>,
    /// What it must answer, letter by letter; of a program and a URL without the last line's end.
    #[serde(default)]
    pub expect: Option<String>,
}

/// A port with a name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedPort {
    /// What people call it.
    pub name: String,
    /// Its number.
    pub number: u16,
}

const fn default_memory_mib() -> u32 {
    512
}

const fn default_vcpus() -> u32 {
    1
}

/// `[key]` once, or `[[key]]` as often as wanted.
fn one_or_many<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    struct OneOrMany<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrMany<T> {
        type Value = Vec<T>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a table, or several")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<T>, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map)).map(|one| vec![one])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, tables: A) -> Result<Vec<T>, A::Error> {
            Vec::deserialize(SeqAccessDeserializer::new(tables))
        }
    }
    deserializer.deserialize_any(OneOrMany(PhantomData))
}
