//! Who a program is run as: names looked up in the machine's `/etc/passwd` and `/etc/group`.

use std::fs;
use std::io;

/// Where users are listed.
const PASSWD: &str = "/etc/passwd";
/// Where groups are listed.
const GROUP: &str = "/etc/group";

/// One user, as a program is started for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups, without `gid`.
    pub groups: Vec<u32>,
    /// Its name; a user id that nobody has is its own name.
    pub name: String,
    /// Home directory; `/` for a user id that nobody has.
    pub home: String,
    /// Login shell, when one is listed.
    pub shell: Option<String>,
}

/// Finds `NAME|UID[:GROUP|GID]`; an empty name is root. With a group the user has only that one.
pub fn find(spec: &str) -> Result<Account, String> {
    let read = |path| match fs::read(path) {
        // A machine need not have them: user 0 needs no entry.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        result => result
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .map_err(|error| format!("cannot read {path}: {error}")),
    };
    find_in(spec, &read(PASSWD)?, &read(GROUP)?)
}

fn find_in(spec: &str, passwd: &str, group: &str) -> Result<Account, String> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let mut account = account(user, passwd).ok_or_else(|| format!("no user {user:?} in {PASSWD}"))?;
    match wanted_group {
        Some(wanted) => {
            account.gid = group_id(wanted, group).ok_or_else(|| format!("no group {wanted:?} in {GROUP}"))?;
        }
        None => account.groups = groups_of(&account, group),
    }
    // To the kernel it means "as it is" (man 2 setresuid), which is root.
    if [account.uid, account.gid].contains(&u32::MAX) {
        return Err(format!("{} is nobody's number", u32::MAX));
    }
    Ok(account)
}

/// The account of a name, or else of a number.
fn account(user: &str, passwd: &str) -> Option<Account> {
    let entries = || passwd.lines().filter_map(entry);
    let number = user.parse().ok();
    let found = entries().find(|account| account.name == user);
    let found = found.or_else(|| entries().find(|account| Some(account.uid) == number));
    found.or_else(|| {
        let home = if number? == 0 { "/root" } else { "/" }.to_owned();
        Some(Account { uid: number?, gid: 0, groups: Vec::new(), name: user.to_owned(), home, shell: None })
    })
}

/// `name:password:uid:gid:comment:home:shell`.
fn entry(line: &str) -> Option<Account> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1).filter(|home| home.starts_with('/')).unwrap_or("/").to_owned();
    let shell = fields.next().filter(|shell| shell.starts_with('/')).map(str::to_owned);
    Some(Account { uid, gid, groups: Vec::new(), name, home, shell })
}

/// `name:password:gid:members`.
fn group_entries(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

fn group_id(wanted: &str, group: &str) -> Option<u32> {
    let named = group_entries(group).find(|(name, ..)| *name == wanted).map(|(_, gid, _)| gid);
    named.or_else(|| wanted.parse().ok())
}

fn groups_of(account: &Account, group: &str) -> Vec<u32> {
    let has = |members: &str| members.split(',').any(|member| member == account.name);
    let mut groups: Vec<u32> = group_entries(group)
        .filter(|(_, gid, members)| *gid != account.gid && has(members))
        .map(|(_, gid, _)| gid)
        .collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str = "root:x:0:0:root:/root:/bin/bash\n\
        broken line\n\
        ann:x:1000:100:Ann,,,:/home/ann:/bin/sh\n\
        7:x:9:9::/seven:\n\
        nobody:x:65534:65534:nobody:nonexistent:/usr/sbin/nologin\n";
    const GROUPS: &str = "root:x:0:\nusers:x:100:ann\nsudo:x:27:bob,ann\naudio:x:29:ann\nbad\n";

    fn found(spec: &str) -> (u32, u32, Vec<u32>, String) {
        let account = find_in(spec, USERS, GROUPS).unwrap();
        (account.uid, account.gid, account.groups, account.home)
    }

    #[test]
    fn names_come_before_numbers_and_groups_replace_all_others() {
        for (spec, uid, gid, groups, home) in [
            ("", 0, 0, vec![], "/root"),
            ("ann", 1000, 100, vec![27, 29], "/home/ann"),
            ("1000", 1000, 100, vec![27, 29], "/home/ann"),
            ("ann:sudo", 1000, 27, vec![], "/home/ann"),
            ("ann:31", 1000, 31, vec![], "/home/ann"),
            ("7", 9, 9, vec![], "/seven"),
            ("nobody", 65534, 65534, vec![], "/"),
            ("4711", 4711, 0, vec![], "/"),
            (":27", 0, 27, vec![], "/root"),
        ] {
            assert_eq!(found(spec), (uid, gid, groups, home.to_owned()), "{spec:?}");
        }
        assert_eq!(find_in("", "", "").unwrap().home, "/root");
    }

    #[test]
    fn what_is_not_there_is_named() {
        for (spec, words) in [
            ("eve", "no user \"eve\""),
            ("ann:eve", "no group \"eve\""),
            ("ann:", "no group \"\""),
            ("-1", "no user \"-1\""),
            ("4294967296", "no user"),
            ("4294967295", "nobody's number"),
            ("ann:4294967295", "nobody's number"),
            ("broken line", "no user"),
        ] {
            let message = find_in(spec, USERS, GROUPS).unwrap_err();
            assert!(message.contains(words), "{spec:?}: {message}");
        }
    }
}
