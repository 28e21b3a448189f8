//! One rule about where a child may go: `--allow` and `--deny` as people write them.
//!
//! ```text
//! RULE  = WHERE | WHERE:PORTS | :PORTS
//! WHERE = public | ADDRESS | ADDRESS/PREFIX | NAME | *.NAME
//! PORTS = PORT | PORT-PORT
//! ```

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;

/// Longest name of a host, bytes (RFC 1035, 2.3.4).
const NAME_MAX: usize = 253;
/// Longest part of one, bytes.
const LABEL_MAX: usize = 63;
/// What stands for every address that is not inside.
const PUBLIC: &str = "public";

/// A text that is no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// Nothing, or nothing but a colon.
    #[error("`{text}` names no host, network or port")]
    Empty {
        /// The text.
        text: String,
    },
    /// The part behind the colon.
    #[error("`{ports}` is no port and no range of ports (1 to 65535)")]
    Ports {
        /// That part.
        ports: String,
    },
    /// Bits behind the prefix.
    #[error("`{text}` is no network: did you mean {network}?")]
    HostBits {
        /// The text.
        text: String,
        /// The network that it lies in.
        network: Ipv4Net,
    },
    /// Version 6.
    #[error("`{text}` is an IPv6 address; children have IPv4 only")]
    Ipv6 {
        /// The text.
        text: String,
    },
    /// Neither an address nor a name.
    #[error("`{text}` is neither `public`, an address, a network (10.0.0.0/8), a name nor *.NAME")]
    Where {
        /// The text.
        text: String,
    },
}

/// Which names a rule is about; in lower case, without a dot at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamePattern {
    /// This name.
    Exact(String),
    /// Every name below this one, but not itself.
    Below(String),
}

impl NamePattern {
    /// Whether it is about `name`, which is in lower case and has no dot at the end.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            NamePattern::Exact(exact) => name == exact,
            NamePattern::Below(parent) => name
                .strip_suffix(parent.as_str())
                .is_some_and(|start| start.len() > 1 && start.ends_with('.')),
        }
    }
}

/// Where a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Every address that is not inside.
    Public,
    /// Every address, for ports alone.
    Everywhere,
    /// A network, or one address.
    Network(Ipv4Net),
    /// The addresses that a name has.
    Name(NamePattern),
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rule {
    /// Where.
    pub place: Place,
    /// At which ports; `None` at all of them.
    pub ports: Option<RangeInclusive<u16>>,
}

impl Rule {
    /// Whether it is about `port`.
    pub fn has_port(&self, port: u16) -> bool {
        self.ports.as_ref().is_none_or(|ports| ports.contains(&port))
    }

    /// Whether it is about `address` by itself, whatever names lead there.
    pub fn has_address(&self, address: Ipv4Addr) -> bool {
        matches!(&self.place, Place::Network(network) if network.contains(&address))
    }

    /// The names that it is about.
    pub fn names(&self) -> Option<&NamePattern> {
        match &self.place {
            Place::Name(pattern) => Some(pattern),
            _ => None,
        }
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Rule, RuleError> {
        if text.parse::<Ipv6Addr>().is_ok() || text.starts_with('[') {
            return Err(RuleError::Ipv6 { text: text.to_owned() });
        }
        let (place, ports) = match text.rsplit_once(':') {
            Some((place, ports)) => (place, Some(parse_ports(ports)?)),
            None => (text, None),
        };
        let empty = || RuleError::Empty { text: text.to_owned() };
        let place = match place {
            "" if ports.is_none() => return Err(empty()),
            "" => Place::Everywhere,
            PUBLIC => Place::Public,
            _ => parse_place(place)?,
        };
        Ok(Rule { place, ports })
    }
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, RuleError> {
    let bad = || RuleError::Ports { ports: text.to_owned() };
    let port = |text: &str| {
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|port| plain && *port != 0).ok_or_else(bad)
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if first <= last { Ok(first..=last) } else { Err(bad()) }
}

fn parse_place(text: &str) -> Result<Place, RuleError> {
    if let Ok(address) = text.parse::<Ipv4Addr>() {
        return Ok(Place::Network(address.into()));
    }
    if let Ok(network) = text.parse::<Ipv4Net>() {
        if network != network.trunc() {
            return Err(RuleError::HostBits { text: text.to_owned(), network: network.trunc() });
        }
        return Ok(Place::Network(network));
    }
    if text.split_once('/').is_some_and(|(address, _)| address.parse::<Ipv6Addr>().is_ok()) {
        return Err(RuleError::Ipv6 { text: text.to_owned() });
    }
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let pattern = match name.strip_prefix("*.") {
        Some(parent) => NamePattern::Below(parent.to_owned()),
        None => NamePattern::Exact(name),
    };
    let (NamePattern::Exact(checked) | NamePattern::Below(checked)) = &pattern;
    if is_host_name(checked) {
        Ok(Place::Name(pattern))
    } else {
        Err(RuleError::Where { text: text.to_owned() })
    }
}

/// Whether it can be a host's name (RFC 1123, 2.1; underscores are common enough). What ends in a number is a mistyped address.
fn is_host_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=LABEL_MAX).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let numeric = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    name.len() <= NAME_MAX && name.split('.').all(label) && !name.rsplit('.').next().is_some_and(numeric)
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Public => f.write_str(PUBLIC)?,
            Place::Everywhere => {}
            Place::Network(network) if network.prefix_len() == 32 => write!(f, "{}", network.addr())?,
            Place::Network(network) => write!(f, "{network}")?,
            Place::Name(NamePattern::Exact(name)) => f.write_str(name)?,
            Place::Name(NamePattern::Below(parent)) => write!(f, "*.{parent}")?,
        }
        match &self.ports {
            None => Ok(()),
            Some(ports) if ports.start() == ports.end() => write!(f, ":{}", ports.start()),
            Some(ports) => write!(f, ":{}-{}", ports.start(), ports.end()),
        }
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> String {
        rule.to_string()
    }
}

impl TryFrom<String> for Rule {
    type Error = RuleError;

    fn try_from(text: String) -> Result<Rule, RuleError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_shown() {
        for text in [
            "public",
            "public:443",
            ":25",
            ":8000-8080",
            "10.0.0.0/8",
            "10.0.0.5",
            "10.0.0.5:5432",
            "pypi.org",
            "pypi.org:443",
            "*.pypi.org",
            "*.pypi.org:80-443",
            "0.0.0.0/0",
            "_srv.example.com",
        ] {
            assert_eq!(text.parse::<Rule>().unwrap().to_string(), text);
        }
        assert_eq!("PyPI.org.".parse::<Rule>().unwrap().to_string(), "pypi.org");
        assert_eq!("10.0.0.5/32".parse::<Rule>().unwrap().to_string(), "10.0.0.5");
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in [
            "",
            ":",
            ":0",
            ":70000",
            ":80-",
            ":90-80",
            ":+80",
            "a:b",
            "10.0.0.1/8",
            "10.0.0.256",
            "1.2.3",
            "::1",
            "[::1]:80",
            "2001:db8::/32",
            "*",
            "*.",
            "*.*.a",
            "-a.b",
            "a..b",
            "a b",
            "a/b",
            "http://a.b",
            "10.0.0.0/33",
            ".a",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text}");
        }
        assert!("a".repeat(64).parse::<Rule>().is_err());
        assert!(vec!["a"; 130].join(".").parse::<Rule>().is_err());
    }

    #[test]
    fn a_star_stands_for_names_below() {
        let rule: Rule = "*.example.com".parse().unwrap();
        let names = rule.names().unwrap();
        assert!(names.matches("a.example.com") && names.matches("a.b.example.com"));
        assert!(
            !names.matches("example.com")
                && !names.matches("badexample.com")
                && !names.matches(".example.com")
        );
    }
}
