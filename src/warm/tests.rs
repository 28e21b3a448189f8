use super::*;
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
    let address = Address(dir.path().join("a.sock"));
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
        Address::of(&paths(dir.path()), &Wanted { target: Some(target), tag: None, hub }).unwrap().0
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
