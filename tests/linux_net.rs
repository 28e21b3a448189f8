//! The network of a real Linux guest: who can be reached, and who cannot. Needs what `linux.rs` needs, and root.

#[path = "linux/harness.rs"]
mod harness;

use harness::{Bed, Hub, alive, wait_until};
use rustix::fd::AsFd;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::time::Duration;

/// Does something in a network namespace: on a thread, as only that is moved.
fn inside<R: Send>(namespace: &File, work: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        let there = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        });
        there.join().unwrap()
    })
}

/// One child as its fork reports it, and its namespace.
struct Peer {
    id: String,
    address: String,
    host: String,
    namespace: File,
}

impl Peer {
    fn all(report: &Value) -> Vec<Peer> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let peer = |child: &Value| Peer {
            id: text(&child["id"]),
            address: text(&child["network"]["address"]),
            host: text(&child["network"]["host_address"]),
            namespace: File::open(text(&child["network"]["namespace"])).unwrap(),
        };
        report["children"].as_array().unwrap().iter().map(peer).collect()
    }

    /// Listens at the host's end and sends back what comes, in capitals.
    fn echo(&self) -> u16 {
        let address = format!("{}:0", self.host);
        let listener = inside(&self.namespace, || TcpListener::bind(address).unwrap());
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut bytes = [0; 64];
                let length = stream.read(&mut bytes).unwrap();
                stream.write_all(&bytes[..length].to_ascii_uppercase()).unwrap();
            }
        });
        port
    }
}

/// Python that asks `address:port` and gives the answer, or the error's name.
fn ask(address: &str, port: u16) -> String {
    format!(
        "import socket\ntry:\n    s = socket.create_connection(('{address}', {port}), 2)\n    s.sendall(b'hello')\n    \
         r = s.recv(64).decode()\nexcept OSError as error:\n    r = 'refused: ' + type(error).__name__\nr"
    )
}

fn pids(report: &Value) -> Vec<i64> {
    report["children"].as_array().unwrap().iter().map(|child| child["pid"].as_i64().unwrap()).collect()
}

#[test]
fn a_child_reaches_its_own_namespace_and_nothing_else() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let report =
        bed.json(&hub, &["fork", "--tag", "python-numpy", "-n", "2", "--detach", "--net", "isolated"]);
    let peers = Peer::all(&report);
    let eval = |peer: &Peer, code: &str| bed.json(&hub, &["eval", &peer.id, code])["answer"].clone();
    for peer in &peers {
        assert_eq!(eval(peer, &ask(&peer.host, peer.echo())), "'HELLO'", "from the child to the host's end");
        let serve = format!(
            "import socket, threading\nserver = socket.create_server(('{}', 7000))\n\
             threading.Thread(target=lambda: server.accept()[0].sendall(b'from the child'), daemon=True).start()",
            peer.address
        );
        eval(peer, &serve);
        let address = (peer.address.clone(), 7000);
        let said = inside(&peer.namespace, move || {
            let mut text = String::new();
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            // The child's end stays open: reading ends with what it says.
            let mut bytes = [0; 14];
            stream.read_exact(&mut bytes).unwrap();
            text.push_str(std::str::from_utf8(&bytes).unwrap());
            text
        });
        assert_eq!(said, "from the child");
    }

    // A service of the host on all its addresses, one in the sibling's namespace, and one of the sibling.
    let service = TcpListener::bind("0.0.0.0:0").unwrap();
    service.set_nonblocking(true).unwrap();
    let port = service.local_addr().unwrap().port();
    let mut targets = vec![
        ("127.0.0.1".to_owned(), port),
        (peers[0].host.clone(), port),
        (peers[1].host.clone(), peers[1].echo()),
        (peers[1].address.clone(), 7000),
    ];
    targets.extend(own_address().map(|address| (address, port)));
    for (address, port) in targets {
        let answer = eval(&peers[0], &ask(&address, port));
        assert!(answer.as_str().unwrap().starts_with("'refused: "), "{address}:{port} answers {answer}");
    }
    assert!(service.accept().is_err(), "a child reached a service of the host");
    bed.run(&hub, &["kill", "--all"]).success();
    bed.assert_nothing_left(pids(&report).into_iter());
}

/// An address of this host that is not its loopback's; none where it has no way out.
fn own_address() -> Option<String> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent: the kernel only looks which way it would be.
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip().to_string())
}

#[test]
fn without_being_asked_for_there_is_no_network() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let look = "cat /sys/class/net/eth0/carrier /proc/net/route | wc -l; cat /sys/class/net/eth0/carrier";
    let report = bed.json(&hub, &["fork", "--tag", "python-numpy", "--exec", "--", "sh", "-c", look]);
    let child = &report["children"][0];
    // The carrier's line and the route table's heading.
    assert_eq!((&child["answer"], &child["network"]), (&"2\n0\n".into(), &Value::Null), "{child}");
}

#[test]
fn a_killed_fork_leaves_no_network_behind() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let mut fork = bed
        .command(&hub)
        .args(["fork", "--tag", "python-numpy", "-n", "2", "--net", "isolated"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let all = || bed.json(&hub, &["ps"]).get(0).cloned().unwrap_or_default();
    let ready = || {
        all()["children"]
            .as_array()
            .is_some_and(|all| all.iter().filter(|c| c["state"] == "ready").count() == 2)
    };
    assert!(wait_until(Duration::from_secs(60), ready), "the children are not ready: {}", all());
    let status = all();
    let peers = Peer::all(&status);
    let has_tap = |peer: &Peer| {
        inside(&peer.namespace, || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            rustix::net::netdevice::name_to_index(&socket, "tap0").is_ok()
        })
    };
    assert!(peers.iter().all(has_tap));
    // One machine alone takes its network with it.
    bed.run(&hub, &["kill", &peers[0].id]).success();
    assert!(wait_until(Duration::from_secs(5), || !has_tap(&peers[0])), "a killed child leaves its tap");
    assert!(has_tap(&peers[1]), "its sibling lost its tap");
    assert!(wait_until(Duration::from_secs(5), || all()["children"][0]["network"].is_null()));
    fork.kill().unwrap();
    fork.wait().unwrap();
    assert!(wait_until(Duration::from_secs(5), || !has_tap(&peers[1])), "a killed fork leaves its tap");
    assert!(wait_until(Duration::from_secs(5), || !pids(&status).into_iter().any(alive)));
    bed.run(&hub, &["cleanup"]).success();
    assert!(!bed.has_run_dirs());
}
