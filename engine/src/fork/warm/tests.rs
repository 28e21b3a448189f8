use super::*;
use crate::target::Target;
use rustix::process::Uid;
use std::path::Path;

fn listen(at: &Path, backlog: i32) -> OwnedFd {
    let socket = seqpacket().unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(at).unwrap()).unwrap();
    rustix::net::listen(&socket, backlog).unwrap();
    socket
}

#[test]
fn an_image_is_taken_from_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let address = WarmSocket(dir.path().join("a.sock"));
    let socket = listen(&address.0, 8);
    assert!(address.connect().unwrap().is_some(), "our own process is refused");
    // Who answers is who called listen(2); credentials are a thread's own.
    let other = Uid::from_raw(65534);
    let listens = || {
        rustix::thread::set_thread_res_uid(other, other, other).expect("the test is run as root");
        rustix::net::listen(&socket, 8).unwrap();
    };
    std::thread::scope(|scope| scope.spawn(listens).join()).unwrap();
    let found = address.image().map(|_| ());
    assert!(matches!(found, Err(WarmError::Foreign { owner: 65534, .. })), "{found:?}");
    assert!(!address.remove_if_dead(), "what is not ours is left alone");
}

fn paths(dir: &Path) -> Paths {
    Paths { data: dir.join("data"), cache: dir.join("cache"), runtime: dir.join("run") }
}

#[test]
fn an_image_has_one_key_however_its_hub_is_spelled() {
    let dir = tempfile::tempdir().unwrap();
    let key = |hub: Option<&str>, target: &str| {
        WarmSocket::of(&paths(dir.path()), &Target::parse(&paths(dir.path()), target, hub)).unwrap().0
    };
    let here = std::env::current_dir().unwrap().join("hub");
    let same = [
        (key(Some("http://h"), "o/n"), key(Some("http://h/"), "o/n")),
        (key(Some("http://h"), "o/n"), key(Some("http://h/registry.json"), "o/n@latest")),
        // The working directory is part of a relative one.
        (key(Some("hub"), "o/n"), key(here.to_str(), "o/n")),
    ];
    for (a, b) in same {
        assert_eq!(a, b);
    }
    let others = [(Some("http://i/"), "o/n"), (Some("http://h/"), "o/m"), (Some("http://h/"), "o/n@v1")];
    for (hub, target) in others {
        assert_ne!(key(Some("http://h/"), "o/n"), key(hub, target), "{hub:?} {target}");
    }
}

#[test]
fn what_has_no_key_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let paths = paths(dir.path());
    let of = |target: Option<&str>, tag: Option<&str>| {
        let found = WarmSocket::of(&paths, &Target::of(&paths, tag, target, Some("http://h/")));
        found.map(|address| address.0).map_err(|error| error.to_string())
    };
    let of_tag = |tag| of(None, Some(tag)).unwrap_err();
    assert_eq!(of_tag("nothing"), "there is no local snapshot `nothing`");
    assert!(of_tag("a/b").contains("is not a tag"), "{}", of_tag("a/b"));
    fs::create_dir_all(paths.snapshot("t").unwrap()).unwrap();
    let tag = of(None, Some("t")).unwrap();
    assert_eq!(of(None, Some("t")).unwrap(), tag);
    assert_eq!(of(Some("/nowhere"), None).unwrap_err(), "there is no pack or snapshot at /nowhere");
    assert!(of(Some("/"), None).unwrap_err().contains("cannot be kept in memory"));
    assert!(of(Some("nothing"), None).unwrap_err().contains("is not a package name"));
    // Tests run in the package's directory: a folder does not hide the package of its name, a file does.
    assert!(Path::new("src/fork").is_dir());
    of(Some("src/fork"), None).unwrap();
    assert_ne!(of(Some("src/target.rs"), None).unwrap(), of(Some("src/target.rs@latest"), None).unwrap());
}

#[test]
fn a_replaced_file_has_another_key_and_the_same_family() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pack");
    let paths = paths(dir.path());
    let target = Target::File { path: file.clone(), hub: None };
    let key = || WarmSocket::of(&paths, &target).unwrap().0;
    let family = || -> Vec<_> {
        WarmSocket::family_of(&paths, &target).unwrap().into_iter().map(|address| address.0).collect()
    };
    fs::create_dir_all(directory(&paths)).unwrap();
    fs::write(&file, "one").unwrap();
    let before = key();
    let _first = listen(&before, 1);
    let of_tag = Target::Tag("pack".to_owned());
    fs::create_dir_all(paths.snapshot("pack").unwrap()).unwrap();
    let _other = listen(&WarmSocket::of(&paths, &of_tag).unwrap().0, 1);
    assert_eq!(key(), before);
    fs::write(dir.path().join("new"), "two").unwrap();
    fs::rename(dir.path().join("new"), &file).unwrap();
    assert_ne!(key(), before);
    let _second = listen(&key(), 1);
    let both = family();
    assert_eq!((both.len(), both.contains(&before), both.contains(&key())), (2, true, true));
    assert_eq!(WarmSocket(key()).family(&paths).len(), 2);
    fs::remove_file(&file).unwrap();
    assert_eq!(family(), both, "what is gone is not found by its name");
}

#[test]
fn nobody_waits_for_a_daemon_with_a_full_backlog() {
    let dir = tempfile::tempdir().unwrap();
    let address = WarmSocket(dir.path().join("a.sock"));
    let _daemon = listen(&address.0, 1);
    let (done, waited) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut held = Vec::new();
        while let Ok(Some(connected)) = address.connect() {
            held.push(connected);
        }
        done.send((held.len(), address.status().map(|_| ()))).unwrap();
    });
    let (connected, found) = waited.recv_timeout(Duration::from_secs(10)).expect("connecting does not end");
    assert!(connected > 0 && matches!(found, Err(WarmError::Silent { pid: None, .. })), "{found:?}");
}

#[test]
fn a_daemon_without_its_name_ends() {
    let dir = tempfile::tempdir().unwrap();
    let paths = paths(dir.path());
    let address = WarmSocket(directory(&paths).join("f-k.sock"));
    let start = || {
        WarmDaemon::start(
            &paths,
            address.clone(),
            "x".to_owned(),
            "x@v1".to_owned(),
            &crate::fork::template::empty_template(),
        )
        .unwrap()
    };
    let mut lost = start();
    // Another took the name without having seen the first.
    fs::rename(&address.0, dir.path().join("elsewhere")).unwrap();
    let mut found = start();
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(lost.serve().is_ok()));
    let holder = std::thread::spawn(move || found.serve().is_ok());
    assert_eq!(address.status().unwrap().unwrap().name, "x");
    assert!(ended.recv_timeout(Duration::from_secs(20)).expect("it holds its image on unseen"));
    assert!(address.image().unwrap().is_some(), "the other one has lost its name too");
    assert_eq!(address.stop().unwrap().unwrap().forks, 1);
    assert!(holder.join().unwrap());
    assert_eq!(fs::read_dir(directory(&paths)).unwrap().count(), 0);
    drop(start());
    assert_eq!(
        fs::read_dir(directory(&paths)).unwrap().count(),
        0,
        "a daemon that is dropped leaves its socket"
    );
}
