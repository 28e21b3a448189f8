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
