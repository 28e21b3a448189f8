//! Recipes: what a warmed machine is made of, read from `recipe.toml` and believed only after checking, and the root disks
//! made of them. `docs/RECIPES.md` explains every key.
//!
//! ```text
//! RECIPE/recipe.toml
//! RECIPE/...             files that the recipe puts into the machine, lists of packages
//! ```

mod accounts;
mod agent_binary;
mod apt_sources;
mod check;
mod distribution;
mod enclosure;
mod error;
mod format;
mod kept;
mod layers;
mod load;
mod node;
mod place;
mod python;
mod root_disk;
mod site;
mod source;
mod steps;
mod tree;

pub use self::agent_binary::agent_binary;
pub use self::error::RecipeError;
pub use self::format::{NamedPort, Probe, RECIPE_FILE, Recipe, Rehearse};
pub use self::kept::collect;
pub use self::root_disk::{remove_dead, root_disk};

#[cfg(test)]
#[path = "recipe_tests.rs"]
mod tests;
