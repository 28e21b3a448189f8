//! Users of a tree: those that a recipe adds, and whose the others are.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::format::RecipeUser;
use super::tree::RootDiskTree;

/// The first number of a user that names none.
const FIRST_UID: u32 = 1000;
/// Longest of the files read, in bytes.
const FILE_MAX: u64 = 4 << 20;

/// Who something belongs to, or runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// The user's name when it is listed, and no other group was asked for.
    pub(super) name: Option<String>,
    pub(super) home: String,
}

/// Adds users with groups of the same name, and makes their home directories.
pub(super) fn add(tree: &RootDiskTree, users: &[RecipeUser]) -> io::Result<()> {
    for user in users {
        let (mut passwd, mut group) = (read(tree, "/etc/passwd")?, read(tree, "/etc/group")?);
        if line_of(&passwd, &user.name).is_some() || line_of(&group, &user.name).is_some() {
            return Err(invalid(format!("the user or group {} is there already", user.name)));
        }
        let taken = |text: &str, number: u32| {
            text.lines().any(|line| line.split(':').nth(2) == Some(&number.to_string()))
        };
        let free = |number: &u32| !taken(&passwd, *number) && !taken(&group, *number);
        let uid = match user.uid {
            Some(uid) if free(&uid) => uid,
            Some(uid) => return Err(invalid(format!("somebody has the number {uid} already"))),
            None => (FIRST_UID..=u32::from(u16::MAX)).find(free).unwrap_or(FIRST_UID),
        };
        let home = user.home.clone().unwrap_or_else(|| PathBuf::from("/home").join(&user.name));
        let name = &user.name;
        passwd.push_str(&format!("{name}:x:{uid}:{uid}::{}:/bin/sh\n", home.display()));
        group.push_str(&format!("{name}:x:{uid}:\n"));
        write(tree, "/etc/passwd", &passwd, 0o644)?;
        write(tree, "/etc/group", &group, 0o644)?;
        if tree.has(Path::new("/etc/shadow")) {
            // No password opens it.
            let shadow = read(tree, "/etc/shadow")? + &format!("{name}:!:::::::\n");
            write(tree, "/etc/shadow", &shadow, 0o640)?;
        }
        tree.make_directory(&home)?;
        tree.set_owner(&home, (uid, uid))?;
    }
    Ok(())
}

/// Finds `NAME|UID[:GROUP|GID]`.
pub(super) fn find(tree: &RootDiskTree, spec: &str) -> io::Result<Account> {
    let (user, wanted_group) = spec.split_once(':').map_or((spec, None), |(user, group)| (user, Some(group)));
    let passwd = read(tree, "/etc/passwd")?;
    let number = user.parse::<u32>().ok();
    let listed = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() > 5
            && (fields[0] == user || number.is_some() && fields[2].parse() == Ok(number.unwrap_or(0)))
    });
    let mut account = match (&listed, number) {
        (Some(fields), _) => {
            let number = |at: usize| {
                fields[at].parse().map_err(|_| invalid(format!("{user}: no number in /etc/passwd")))
            };
            let (name, home) = (Some(fields[0].to_owned()), fields[5].to_owned());
            Account { uid: number(2)?, gid: number(3)?, name, home }
        }
        (None, Some(uid)) => Account { uid, gid: uid, name: None, home: "/".to_owned() },
        (None, None) => return Err(invalid(format!("there is no user {user}"))),
    };
    if let Some(group) = wanted_group {
        let text = read(tree, "/etc/group")?;
        let listed = line_of(&text, group).and_then(|line| line.split(':').nth(2)?.parse().ok());
        let gid = group.parse().ok().or(listed);
        account.gid = gid.ok_or_else(|| invalid(format!("there is no group {group}")))?;
        account.name = None;
    }
    Ok(account)
}

fn line_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find(|line| line.split(':').next() == Some(name))
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

fn read(tree: &RootDiskTree, path: &str) -> io::Result<String> {
    let mut text = String::new();
    match tree.read(Path::new(path)) {
        Ok(file) => file.take(FILE_MAX).read_to_string(&mut text)?,
        // A tree need not have them: root needs no entry.
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

fn write(tree: &RootDiskTree, path: &str, text: &str, mode: u32) -> io::Result<()> {
    tree.put(Path::new(path), &mut text.as_bytes(), mode)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use tempfile::TempDir;

    fn tree(passwd: &str, group: &str) -> (TempDir, RootDiskTree) {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
        fs::write(dir.path().join("etc/group"), group).unwrap();
        let tree = RootDiskTree::open(dir.path()).unwrap();
        (dir, tree)
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let (_dir, tree) =
            tree("root:x:0:0::/root:/bin/sh\ndb:x:5:6::/var/db:/bin/sh\n", "root:x:0:\nstaff:x:50:\n");
        let found = |spec| find(&tree, spec).map(|account| (account.uid, account.gid, account.home)).ok();
        assert_eq!(found("db"), Some((5, 6, "/var/db".to_owned())));
        assert_eq!(found("5"), found("db"));
        assert_eq!(found("db:staff"), Some((5, 50, "/var/db".to_owned())));
        assert_eq!(found("77:88"), Some((77, 88, "/".to_owned())));
        assert_eq!((found("nobody"), found("db:none")), (None, None));
        assert_eq!(find(&tree, "db").unwrap().name.as_deref(), Some("db"));
    }

    #[test]
    fn users_are_added_once_with_a_home() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: this takes root");
            return;
        }
        let (dir, tree) = tree("old:x:1000:1000::/home/old:/bin/sh", "old:x:1000:\n");
        let user = |name: &str, uid| RecipeUser { name: name.to_owned(), uid, home: None };
        add(&tree, &[user("new", None), user("other", Some(70))]).unwrap();
        let account = find(&tree, "new").unwrap();
        assert_eq!((account.uid, account.gid, account.home.as_str()), (1001, 1001, "/home/new"));
        assert_eq!(find(&tree, "other").unwrap().uid, 70);
        assert!(dir.path().join("home/new").is_dir());
        assert!(add(&tree, &[user("new", None)]).is_err() && add(&tree, &[user("more", Some(70))]).is_err());
    }
}
