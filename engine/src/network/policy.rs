//! Where a child may go. The gateway asks for each new connection and each question to its resolver.

use super::rule::{Place, Rule};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// Networks that are inside: private, local to the link, to the host or to the provider, shared among strangers, or for
/// other things than talking to one host (the IANA's registry of special-purpose addresses; RFC 6890, 1918, 6598, 3927).
/// What is reserved for documentation is not among them: it leads nowhere.
const INSIDE: [Ipv4Net; 13] = [
    network([0, 0, 0, 0], 8),
    network([10, 0, 0, 0], 8),
    network([100, 64, 0, 0], 10),
    network([127, 0, 0, 0], 8),
    // Azure's host, which answers any process of a machine (learn.microsoft.com, "What is IP address 168.63.129.16?").
    network([168, 63, 129, 16], 32),
    network([169, 254, 0, 0], 16),
    network([172, 16, 0, 0], 12),
    network([192, 0, 0, 0], 24),
    network([192, 168, 0, 0], 16),
    network([198, 18, 0, 0], 15),
    network([192, 88, 99, 0], 24),
    network([224, 0, 0, 0], 4),
    network([240, 0, 0, 0], 4),
];

const fn network(octets: [u8; 4], prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]), prefix)
}

/// What an address is to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// One of the host's own.
    Host,
    /// Inside.
    Inside,
    /// Anything else.
    Public,
}

impl Side {
    /// What it is, by the address alone.
    pub fn of(address: Ipv4Addr) -> Side {
        if INSIDE.iter().any(|network| network.contains(&address)) { Side::Inside } else { Side::Public }
    }
}

/// The kinds of traffic that leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Why a connection or a question was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// A private or otherwise inner address that no rule names.
    Inside,
    /// An address of the host that no rule names.
    Host,
    /// A `--deny`.
    Denied,
    /// There are `--allow`s, and none of them.
    NotAllowed,
    /// Names are denied, and no name that was asked for leads there (any more).
    NotNamed,
    /// The child has too many connections.
    TooMany,
    /// Neither TCP nor UDP.
    Protocol,
    /// Port 0, at which nobody can listen.
    NoPort,
}

impl Refusal {
    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Refusal::Inside => "an inner address that no --allow names",
            Refusal::Host => "an address of the host that no --allow names",
            Refusal::Denied => "denied",
            Refusal::NotAllowed => "not allowed",
            Refusal::NotNamed => "no name that was asked for leads there",
            Refusal::TooMany => "too many connections",
            Refusal::Protocol => "neither TCP nor UDP",
            Refusal::NoPort => "there is no port 0",
        }
    }
}

/// The ports at which the names that a child asked for have opened an address.
pub trait NamedPorts {
    /// Whether a name that was asked for, and whose answer still lives, opens `port` of `address`.
    fn opens(&self, address: Ipv4Addr, port: u16) -> bool;
}

/// The rules for the children of one fork. What is denied stays closed whatever is allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// `--allow`. With none of them everything public is allowed; otherwise nothing else is.
    pub allow: Vec<Rule>,
    /// `--deny`.
    pub deny: Vec<Rule>,
}

impl Policy {
    /// Whether a connection may be made.
    ///
    /// # Errors
    /// Why not.
    pub fn connection(
        &self,
        transport: Transport,
        (address, port): (Ipv4Addr, u16),
        side: Side,
        named: &dyn NamedPorts,
    ) -> Result<(), Refusal> {
        let denied = |rule: &&Rule| {
            let here = match rule.place {
                Place::Public => side == Side::Public,
                Place::Everywhere => true,
                Place::Network(_) => rule.has_address(address),
                // Names are not answered, so that they open nothing: see below.
                Place::Name(_) => false,
            };
            here && rule.has_port(port)
        };
        if self.deny.iter().any(|rule| denied(&rule)) {
            return Err(Refusal::Denied);
        }
        if side != Side::Public {
            let named =
                self.allow.iter().any(|rule| rule.has_port(port) && names_inside(rule, address, side));
            let refusal = if side == Side::Host { Refusal::Host } else { Refusal::Inside };
            return if named { Ok(()) } else { Err(refusal) };
        }
        // A denied name is not to be reached by its address either, and which addresses it has, nobody can know. So what
        // no other name leads to is closed.
        let by_name =
            |rule: &Rule| rule.names().is_some() && transport == Transport::Tcp && named.opens(address, port);
        let by_address = |rule: &Rule| {
            rule.has_port(port)
                && match rule.place {
                    Place::Public | Place::Everywhere => !self.denies_names() || named.opens(address, port),
                    Place::Network(_) => rule.has_address(address),
                    Place::Name(_) => false,
                }
        };
        if self.allow.is_empty() {
            return if !self.denies_names() || named.opens(address, port) {
                Ok(())
            } else {
                Err(Refusal::NotNamed)
            };
        }
        match self.allow.iter().any(|rule| by_address(rule) || by_name(rule)) {
            true => Ok(()),
            false => Err(Refusal::NotAllowed),
        }
    }

    /// Whether the resolver may be asked for `name` (in lower case, without a dot at the end), and which ports of the
    /// addresses in the answer are open then: all that any of the rules has.
    ///
    /// # Errors
    /// Why not.
    pub fn name(&self, name: &str) -> Result<Vec<&Rule>, Refusal> {
        let about = |rule: &&Rule| rule.names().is_some_and(|pattern| pattern.matches(name));
        if self.denies_name(name) {
            return Err(Refusal::Denied);
        }
        let general = |rule: &&Rule| matches!(rule.place, Place::Public | Place::Everywhere);
        let opening: Vec<_> = self.allow.iter().filter(|rule| about(rule) || general(rule)).collect();
        if opening.is_empty() && !self.allow.is_empty() { Err(Refusal::NotAllowed) } else { Ok(opening) }
    }

    /// Whether addresses are open only as far as names lead there.
    pub fn goes_by_names(&self) -> bool {
        self.denies_names() || self.allow.iter().any(|rule| rule.names().is_some())
    }

    /// Whether a `--deny` is about `name`. A rule with ports denies those ports of the name, and nobody can tell with which
    /// other names it shares its addresses: the whole name is denied.
    pub fn denies_name(&self, name: &str) -> bool {
        self.deny.iter().any(|rule| rule.names().is_some_and(|pattern| pattern.matches(name)))
    }

    fn denies_names(&self) -> bool {
        self.deny.iter().any(|rule| rule.names().is_some())
    }
}

/// Whether a rule names an inner address on purpose: it has to lie in one inner network itself, so that 0.0.0.0/0 does not
/// open what is inside; the host's own addresses one by one.
fn names_inside(rule: &Rule, address: Ipv4Addr, side: Side) -> bool {
    let Place::Network(network) = &rule.place else { return false };
    let meant = match side {
        Side::Host => network.prefix_len() == 32,
        _ => INSIDE.iter().any(|inner| inner.contains(network)),
    };
    meant && network.contains(&address)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Named(&'static [(&'static str, u16)]);

    impl NamedPorts for Named {
        fn opens(&self, address: Ipv4Addr, port: u16) -> bool {
            self.0.iter().any(|(named, at)| named.parse() == Ok(address) && *at == port)
        }
    }

    fn policy(allow: &[&str], deny: &[&str]) -> Policy {
        let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Policy { allow: rules(allow), deny: rules(deny) }
    }

    fn ask(policy: &Policy, to: &str, named: &'static [(&'static str, u16)]) -> Result<(), Refusal> {
        let (address, port) = to.split_once(':').unwrap();
        let address = address.parse().unwrap();
        policy.connection(Transport::Tcp, (address, port.parse().unwrap()), Side::of(address), &Named(named))
    }

    #[test]
    fn everything_public_is_open_and_nothing_inside() {
        let open = policy(&[], &[]);
        assert_eq!(ask(&open, "203.0.113.1:80", &[]), Ok(()));
        for inner in [
            "10.1.2.3:80",
            "172.16.0.1:80",
            "172.31.255.255:1",
            "192.168.1.1:22",
            "169.254.169.254:80",
            "168.63.129.16:80",
            "127.0.0.1:22",
            "100.64.0.1:80",
            "0.0.0.0:80",
            "224.0.0.1:80",
            "255.255.255.255:67",
            "198.19.0.1:1",
            "192.0.0.1:80",
        ] {
            assert_eq!(ask(&open, inner, &[]), Err(Refusal::Inside), "{inner}");
            // Not even by a name.
            assert!(
                ask(&policy(&["*.test"], &[]), inner, &[("10.1.2.3", 80), ("169.254.169.254", 80)]).is_err()
            );
            // Nor by a network that is larger than what is inside.
            assert_eq!(ask(&policy(&["0.0.0.0/0", "public", ":80"], &[]), inner, &[]), Err(Refusal::Inside));
        }
        assert_eq!(ask(&open, "172.32.0.1:80", &[]), Ok(()));
    }

    #[test]
    fn what_is_inside_is_open_where_it_is_named() {
        let named = policy(&["10.0.0.0/8:5432", "169.254.169.254"], &[]);
        assert_eq!(ask(&named, "10.1.2.3:5432", &[]), Ok(()));
        assert_eq!(ask(&named, "10.1.2.3:22", &[]), Err(Refusal::Inside));
        assert_eq!(ask(&named, "169.254.169.254:80", &[]), Ok(()));
        assert_eq!(ask(&named, "203.0.113.1:80", &[]), Err(Refusal::NotAllowed));
        let own = |policy: &Policy| {
            let to = (Ipv4Addr::new(203, 0, 113, 2), 22);
            policy.connection(Transport::Tcp, to, Side::Host, &Named(&[]))
        };
        assert_eq!(own(&policy(&["203.0.113.0/24", "public"], &[])), Err(Refusal::Host));
        assert_eq!(own(&policy(&["203.0.113.2:22"], &[])), Ok(()));
    }

    #[test]
    fn a_name_opens_its_addresses_at_its_ports_for_tcp() {
        let mirror = policy(&["mirror.test:443"], &[]);
        assert_eq!(ask(&mirror, "203.0.113.5:443", &[("203.0.113.5", 443)]), Ok(()));
        assert_eq!(ask(&mirror, "203.0.113.5:443", &[]), Err(Refusal::NotAllowed));
        assert_eq!(ask(&mirror, "203.0.113.5:80", &[("203.0.113.5", 443)]), Err(Refusal::NotAllowed));
        let to = (Ipv4Addr::new(203, 0, 113, 5), 443);
        let udp = mirror.connection(Transport::Udp, to, Side::Public, &Named(&[("203.0.113.5", 443)]));
        assert_eq!(udp, Err(Refusal::NotAllowed));
        assert_eq!(mirror.name("mirror.test").unwrap(), [&mirror.allow[0]]);
        assert_eq!(mirror.name("other.test"), Err(Refusal::NotAllowed));
        // With networks alone nobody may ask for names: a question can carry a secret out.
        assert_eq!(policy(&["203.0.113.0/24"], &[]).name("a.test"), Err(Refusal::NotAllowed));
        assert_eq!(policy(&[], &[]).name("a.test"), Ok(vec![]));
    }

    #[test]
    fn what_is_denied_stays_closed() {
        let denied = policy(&["public", "10.0.0.5"], &["203.0.113.0/24", ":25", "10.0.0.5:22"]);
        assert_eq!(ask(&denied, "203.0.113.9:80", &[]), Err(Refusal::Denied));
        assert_eq!(ask(&denied, "198.51.100.1:25", &[]), Err(Refusal::Denied));
        assert_eq!(ask(&denied, "198.51.100.1:80", &[]), Ok(()));
        assert_eq!(ask(&denied, "10.0.0.5:22", &[]), Err(Refusal::Denied));
        assert_eq!(ask(&denied, "10.0.0.5:80", &[]), Ok(()));
        assert_eq!(ask(&policy(&[], &["public"]), "198.51.100.1:80", &[]), Err(Refusal::Denied));
    }

    #[test]
    fn a_denied_name_is_not_reached_by_its_address() {
        for rules in [policy(&[], &["*.evil.test"]), policy(&["public"], &["*.evil.test"])] {
            assert_eq!(rules.name("a.evil.test"), Err(Refusal::Denied));
            assert!(rules.name("good.test").is_ok() && rules.goes_by_names());
            assert!(ask(&rules, "203.0.113.66:80", &[]).is_err());
            assert_eq!(ask(&rules, "203.0.113.5:80", &[("203.0.113.5", 80)]), Ok(()));
        }
    }
}
