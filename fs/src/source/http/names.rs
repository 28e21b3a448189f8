//! Addresses of host names, by the system's own resolver.
//!
//! forkd is linked statically, and the C library of a static program cannot safely load what `/etc/nsswitch.conf`
//! names. getent(1), which comes with the system's C library, can; where it is missing, the C library's built-in files
//! and DNS do.

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Stdio;
use tokio::process::Command;

/// Most addresses of a name that are tried.
const ADDRESSES_MAX: usize = 16;

/// A name has no address.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// The system's resolver says so, or gave up.
    #[error("the system's resolver (`getent ahosts {name}`) knows no address of the host `{name}`")]
    Unknown {
        /// The name.
        name: String,
    },
    /// The resolver cannot be asked.
    #[error("the address of the host `{name}` cannot be asked for")]
    Resolver {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The system's resolver.
#[derive(Debug)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            // reqwest puts the port in.
            let addresses =
                lookup(name.as_str()).await?.into_iter().map(|address| SocketAddr::new(address, 0));
            Ok(Box::new(addresses) as Addrs)
        })
    }
}

/// The addresses of `name`, best first, at least one.
async fn lookup(name: &str) -> Result<Vec<IpAddr>, NameError> {
    // RFC 6761, section 6.3: these are this host, whatever anybody says.
    if name == "localhost" || name.ends_with(".localhost") {
        return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
    }
    let unknown = || NameError::Unknown { name: name.to_owned() };
    // No host is called so, but an option of getent's is.
    if name.starts_with('-') {
        return Err(unknown());
    }
    let asked =
        Command::new("getent").args(["ahosts", name]).stdin(Stdio::null()).kill_on_drop(true).output();
    let found = match asked.await {
        Ok(output) => parse(&String::from_utf8_lossy(&output.stdout)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => built_in(name).await?,
        Err(source) => return Err(NameError::Resolver { name: name.to_owned(), source }),
    };
    if found.is_empty() { Err(unknown()) } else { Ok(found) }
}

/// What the C library does without help.
async fn built_in(name: &str) -> Result<Vec<IpAddr>, NameError> {
    let found = tokio::net::lookup_host((name, 0)).await;
    let found = found.map_err(|source| NameError::Resolver { name: name.to_owned(), source })?;
    Ok(found.map(|address| address.ip()).take(ADDRESSES_MAX).collect())
}

/// The addresses in what getent prints: a line for each and kind of socket, which begins with the address.
fn parse(printed: &str) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for line in printed.lines() {
        let first = line.split_whitespace().next().and_then(|word| word.parse().ok());
        if let Some(address) = first.filter(|address| !addresses.contains(address))
            && addresses.len() < ADDRESSES_MAX
        {
            addresses.push(address);
        }
    }
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_once_and_in_order() {
        let printed = "2001:db8::1     STREAM example.org\n2001:db8::1     DGRAM\n192.0.2.7       STREAM\n\
            192.0.2.7       RAW\nfe80::1%eth0    STREAM\n\nno address\n";
        assert_eq!(parse(printed), ["2001:db8::1".parse::<IpAddr>().unwrap(), "192.0.2.7".parse().unwrap()]);
        let many: String = (0..300).map(|n| format!("10.0.{}.{} STREAM\n", n / 256, n % 256)).collect();
        assert_eq!(parse(&many).len(), ADDRESSES_MAX);
    }

    #[tokio::test]
    async fn the_system_is_asked() {
        let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let known = std::process::Command::new("getent").args(["ahosts", &name]).output().unwrap();
        match lookup(&name).await {
            Ok(found) => assert_eq!(found, parse(&String::from_utf8_lossy(&known.stdout))),
            Err(error) => assert!(!known.status.success(), "{error}"),
        }
        assert_eq!(lookup("192.0.2.7").await.unwrap(), [IpAddr::from([192, 0, 2, 7])]);
        assert_eq!(built_in("192.0.2.7").await.unwrap(), [IpAddr::from([192, 0, 2, 7])]);
        assert!(lookup("hub.localhost").await.unwrap().contains(&Ipv4Addr::LOCALHOST.into()));
    }

    #[tokio::test]
    async fn unknown_names_are_named() {
        for name in ["no-such-host.invalid", "--help", "-s"] {
            let error = lookup(name).await.unwrap_err();
            assert!(matches!(&error, NameError::Unknown { name: named } if named == name), "{error}");
        }
    }
}
