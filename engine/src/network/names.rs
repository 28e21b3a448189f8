//! The addresses that the gateway's answers have opened for one child, each until its answer is too old.

use super::policy::NamedPorts;
use super::rule::Rule;
use std::cell::RefCell;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// Addresses that are kept for a child; one more displaces the one that would go first.
const ADDRESSES_MAX: usize = 4096;
/// An answer lives at least this long: who asks connects a moment later.
pub(super) const TTL_MIN: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Opened {
    ports: RangeInclusive<u16>,
    until: Instant,
}

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct NamedAddresses {
    addresses: RefCell<HashMap<Ipv4Addr, Vec<Opened>>>,
}

impl NamedAddresses {
    /// An answer named `address`, and `rules` are about the name; without any, all ports are open.
    pub(super) fn open(&self, address: Ipv4Addr, rules: &[&Rule], ttl: Duration) {
        let mut addresses = self.addresses.borrow_mut();
        if addresses.len() >= ADDRESSES_MAX && !addresses.contains_key(&address) {
            let last = |opened: &[Opened]| opened.iter().map(|opened| opened.until).max();
            let oldest = addresses.iter().min_by_key(|(_, opened)| last(opened)).map(|(address, _)| *address);
            oldest.and_then(|oldest| addresses.remove(&oldest));
        }
        let until = Instant::now() + ttl.max(TTL_MIN);
        let opened = addresses.entry(address).or_default();
        opened.retain(|opened| opened.until > Instant::now());
        let all = 0..=u16::MAX;
        let rules = rules.iter().map(|rule| rule.ports.clone().unwrap_or_else(|| all.clone()));
        let rules: Vec<_> = rules.collect();
        for ports in if rules.is_empty() { vec![all] } else { rules } {
            match opened.iter_mut().find(|opened| opened.ports == ports) {
                Some(known) => known.until = known.until.max(until),
                None => opened.push(Opened { ports, until }),
            }
        }
    }
}

impl NamedPorts for NamedAddresses {
    fn opens(&self, address: Ipv4Addr, port: u16) -> bool {
        let now = Instant::now();
        let addresses = self.addresses.borrow();
        let opened = addresses.get(&address);
        opened.is_some_and(|all| all.iter().any(|opened| opened.until > now && opened.ports.contains(&port)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_open_as_long_as_its_answer_lives() {
        let names = NamedAddresses::default();
        let (address, rule) = (Ipv4Addr::new(203, 0, 113, 5), "a.test:443".parse().unwrap());
        assert!(!names.opens(address, 443));
        names.open(address, &[&rule], Duration::ZERO);
        assert!(names.opens(address, 443) && !names.opens(address, 80));
        names.open(address, &[], Duration::from_secs(60));
        assert!(names.opens(address, 80));
        std::thread::sleep(TTL_MIN);
        assert!(names.opens(address, 443), "by the other answer");
        let short = Ipv4Addr::new(203, 0, 113, 6);
        names.open(short, &[&rule], Duration::from_millis(1));
        std::thread::sleep(TTL_MIN + Duration::from_millis(10));
        assert!(!names.opens(short, 443));
    }

    #[test]
    fn a_child_cannot_fill_the_host_with_answers() {
        let names = NamedAddresses::default();
        for number in 0..3 * ADDRESSES_MAX as u32 {
            names.open(number.into(), &[], Duration::from_secs(60 + u64::from(number)));
        }
        assert_eq!(names.addresses.borrow().len(), ADDRESSES_MAX);
        assert!(names.opens((3 * ADDRESSES_MAX as u32 - 1).into(), 1) && !names.opens(0.into(), 1));
    }
}
