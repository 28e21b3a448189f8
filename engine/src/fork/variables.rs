//! The environment of each child, as `forkd fork --env` and `--vary` name it.

use forkd_abi::generation::{Generation, GenerationError};
use std::collections::BTreeMap;

/// Variables that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VariablesError {
    /// `--env`.
    #[error("`{0}` is not NAME=VALUE")]
    Variable(String),
    /// `--vary`.
    #[error("`{0}` is not NAME=VALUE,VALUE,...")]
    Varied(String),
    /// The same name in two places.
    #[error("the variable {name} is given twice")]
    Twice {
        /// Its name.
        name: String,
    },
    /// A child's record has no room for them, or they cannot be variables.
    #[error("the environment of child {number} cannot be handed over")]
    Child {
        /// Which child, counted from 1.
        number: u32,
        /// Why.
        #[source]
        source: GenerationError,
    },
}

/// A variable that is the same in all children.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variable {
    name: String,
    value: String,
}

impl Variable {
    /// One of that name and value.
    ///
    /// # Errors
    /// [`VariablesError::Variable`] for what is no name.
    pub fn new(name: &str, value: &str) -> Result<Variable, VariablesError> {
        let variable = Variable { name: name.to_owned(), value: value.to_owned() };
        if name.is_empty() || name.contains('=') {
            return Err(VariablesError::Variable(format!("{name}={value}")));
        }
        Ok(variable)
    }
}

impl VariedVariable {
    /// One of that name and these values.
    ///
    /// # Errors
    /// [`VariablesError::Varied`] for what is no name, and without values.
    pub fn new(name: &str, values: &[String]) -> Result<VariedVariable, VariablesError> {
        if name.is_empty() || name.contains('=') || values.is_empty() {
            return Err(VariablesError::Varied(format!("{name}={}", values.join(","))));
        }
        Ok(VariedVariable { name: name.to_owned(), values: values.to_vec() })
    }
}

/// A variable of which each child gets the next value, the first one again after the last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VariedVariable {
    name: String,
    values: Vec<String>,
}

/// Reads `NAME=VALUE`.
pub fn parse_variable(text: &str) -> Result<Variable, VariablesError> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => {
            Ok(Variable { name: name.to_owned(), value: value.to_owned() })
        }
        _ => Err(VariablesError::Variable(text.to_owned())),
    }
}

/// Reads `NAME=VALUE,VALUE,...`. Values have no commas.
pub fn parse_varied(text: &str) -> Result<VariedVariable, VariablesError> {
    let failed = |_| VariablesError::Varied(text.to_owned());
    let Variable { name, value } = parse_variable(text).map_err(failed)?;
    Ok(VariedVariable { name, values: value.split(',').map(str::to_owned).collect() })
}

/// The variables of a fork's children.
#[derive(Debug, Clone, Default)]
pub struct Variables {
    fixed: Vec<Variable>,
    varied: Vec<VariedVariable>,
}

impl Variables {
    /// Variables for `count` children: no name comes twice, and no child gets more than fits.
    pub fn new(
        fixed: &[Variable],
        varied: &[VariedVariable],
        count: u32,
    ) -> Result<Variables, VariablesError> {
        let names = fixed.iter().map(|v| &v.name).chain(varied.iter().map(|v| &v.name));
        let mut seen = std::collections::BTreeSet::new();
        for name in names {
            if !seen.insert(name) {
                return Err(VariablesError::Twice { name: name.clone() });
            }
        }
        let variables = Variables { fixed: fixed.to_vec(), varied: varied.to_vec() };
        for number in 1..=count {
            let record =
                Generation { environment: variables.of_child(number.into()), ..Generation::original() };
            record.encode().map_err(|source| VariablesError::Child { number, source })?;
        }
        Ok(variables)
    }

    /// The environment of child `number`, counted from 1.
    pub fn of_child(&self, number: u64) -> BTreeMap<String, String> {
        let turn = usize::try_from(number.saturating_sub(1)).unwrap_or(usize::MAX);
        let fixed = self.fixed.iter().map(|variable| (&variable.name, &variable.value));
        // `split` gives one value at least.
        let varied =
            self.varied.iter().map(|varied| (&varied.name, &varied.values[turn % varied.values.len()]));
        fixed.chain(varied).map(|(name, value)| (name.clone(), value.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_abi::generation::ENVIRONMENT_MAX;

    #[test]
    fn children_take_turns() {
        let fixed = [parse_variable("MODE=a=b").unwrap(), parse_variable("EMPTY=").unwrap()];
        let varied = [parse_varied("SHARD=x,,z").unwrap(), parse_varied("SEED=1,2").unwrap()];
        let variables = Variables::new(&fixed, &varied, 1000).unwrap();
        let value = |number, name| variables.of_child(number)[name].clone();
        let shards: Vec<_> = (1..=5).map(|number| value(number, "SHARD")).collect();
        assert_eq!(shards, ["x", "", "z", "x", ""]);
        assert_eq!((1..=3).map(|number| value(number, "SEED")).collect::<Vec<_>>(), ["1", "2", "1"]);
        assert_eq!((value(4, "MODE"), value(4, "EMPTY")), ("a=b".to_owned(), String::new()));
        assert_eq!(variables.of_child(1000).len(), 4);
    }

    #[test]
    fn what_is_no_variable_is_refused() {
        for bad in ["", "A", "=a"] {
            assert_eq!(parse_variable(bad), Err(VariablesError::Variable(bad.to_owned())));
            assert_eq!(parse_varied(bad), Err(VariablesError::Varied(bad.to_owned())));
        }
        let one = [parse_variable("A=1").unwrap()];
        let twice = Variables::new(&one, &[parse_varied("A=1,2").unwrap()], 1).unwrap_err();
        assert_eq!(twice, VariablesError::Twice { name: "A".to_owned() });
    }

    #[test]
    fn only_the_child_with_too_long_a_value_is_named() {
        let long = format!("A=1,{}", "x".repeat(ENVIRONMENT_MAX));
        let varied = [parse_varied(&long).unwrap()];
        assert!(Variables::new(&[], &varied, 1).is_ok());
        let refused = Variables::new(&[], &varied, 4).unwrap_err();
        assert!(matches!(refused, VariablesError::Child { number: 2, .. }), "{refused:?}");
    }
}
