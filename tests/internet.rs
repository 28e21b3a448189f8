//! The internet of the tests, tried with plain programs instead of a guest: what fails here is no fault of forkd's. Needs
//! root and the packages of `make deps`.

#[path = "support/internet/mod.rs"]
mod internet;

use internet::{Internet, SECRET};
use std::process::Command;

/// Runs a shell command in `host`, which must succeed and print `expected` somewhere.
fn says(internet: &Internet, script: &str, expected: &str) {
    let (code, text) = internet.shell(script);
    assert!(code == Some(0) && text.contains(expected), "{script}: {code:?} {text}");
}

#[test]
fn every_server_answers_by_name() {
    let internet = Internet::start();
    let before = internet.state();
    let ask = |script: &str, expected: &str| says(&internet, script, expected);
    ask("curl -sS http://www.test/", "It works");
    ask("curl -sS http://cname.test/whoami", "203.0.113.2");
    ask("curl -sS --cacert ca.pem https://tls.test/", "It works");
    ask("curl -sS http://169.254.169.254/latest/meta-data/", SECRET);
    ask("curl -sS http://10.77.0.1/whoami", "10.77.0.2");
    ask("curl -sS 'http://[2001:db8::10]/whoami'", "2001:db8::2");
    ask("getent ahostsv4 rebind.test", "169.254.169.254");
    ask("getent ahostsv4 many.test | grep -c STREAM", "40");
    ask("git clone -q git://git.test/greeting.git clone && ls clone", "test_greeting.py");
    let pip =
        "pip --disable-pip-version-check --no-cache-dir --isolated install -q --no-compile --target site";
    ask(
        &format!("{pip} --index-url https://pypi-mirror.test/simple --cert ca.pem greet && ls site"),
        "polite.py",
    );
    ask("PYTHONPATH=site python3 -c \"import greet; print(greet.greet('you'))\"", "hello you, please");
    let (code, text) = internet.shell("curl -sS https://tls.test/");
    assert!(code != Some(0) && text.contains("certificate"), "without the authority's certificate: {text}");
    let (code, text) = internet.shell("getent hosts nobody.test");
    assert!(code == Some(2), "a name that is not there: {code:?} {text}");
    assert!(internet.questions().iter().any(|asked| asked.starts_with("query[A] git.test from 203.0.113.2")));
    assert!(internet.visits().iter().any(|visit| visit.ends_with("10.77.0.1:80 10.77.0.1 /whoami 200")));
    let left: Vec<_> = internet.state().symmetric_difference(&before).cloned().collect();
    assert!(left.is_empty(), "plain programs left {left:#?}");
}

#[test]
fn what_tests_of_packs_add_is_served() {
    let mut internet = Internet::start();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/langgraph-react/model.py");
    let log = internet.served().join("asked.jsonl");
    internet.serve("python3", &[model, "198.51.100.7", "8000", "it"], "198.51.100.7:8000", &log);
    let asked = r#"{"model":"any","messages":[{"role":"tool","name":"roman","content":"IX"}]}"#;
    let post = format!("curl -sS -d '{asked}' http://plain.test:8000/v1/chat/completions");
    says(&internet, &post, r#""content": "it says: IX""#);
    assert!(std::fs::read_to_string(log).unwrap().contains("203.0.113.2"));
    let git =
        "git init -q --bare repositories/one.git && git ls-remote git://git.test/one.git && echo served";
    says(&internet, git, "served");
}

#[test]
fn a_name_moves_and_echoes_and_packets_are_seen() {
    let internet = Internet::start();
    says(&internet, "getent hosts short.test", "203.0.113.20");
    internet.move_short("203.0.113.21");
    says(&internet, "getent hosts short.test", "203.0.113.21");
    let python = |code: &str| {
        let output = internet.command(Command::new("python3").args(["-c", code])).output().unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    let tcp =
        "import socket\ns = socket.create_connection(('IP', 22), 5)\ns.sendall(b'there')\nprint(s.recv(9))";
    let count = internet.packet_count();
    for address in ["203.0.113.14", "10.77.0.1", "198.51.100.200", "2001:db8::1"] {
        assert_eq!(python(&tcp.replace("IP", address)), "b'there'\n", "{address}");
    }
    for address in ["203.0.113.2", "10.77.0.2", "127.0.0.1", "::1"] {
        assert_eq!(python(&tcp.replace("IP", address)), "b'there'\n", "{address}");
    }
    assert_eq!((internet.echoed().len(), internet.echoed_in_host().len()), (4, 4));
    let udp = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.settimeout(5)\n\
        s.sendto(b'there', ('IP', 7))\nprint(s.recv(9))";
    for address in ["203.0.113.10", "198.51.100.7", "10.77.0.1", "169.254.169.254"] {
        assert_eq!(python(&udp.replace("IP", address)), "b'there'\n", "{address}");
    }
    let packets = internet.packets_since(count);
    let saw = |what: &str| packets.iter().any(|packet| packet.contains(what));
    assert!(
        saw("> 198.51.100.200:22") && saw("> 198.51.100.7:7") && saw("> [2001:db8::1]:22"),
        "{packets:#?}"
    );
    assert!(!saw("127.0.0.1"), "{packets:#?}");
    assert!(internet.other_questions().is_empty());
    let asked = python("import socket\nprint(socket.gethostbyname('www.test'))");
    assert_eq!(asked, "203.0.113.10\n");
}

#[test]
fn two_internets_do_not_meet_and_none_is_left() {
    let (one, other) = (Internet::start(), Internet::start());
    says(&one, "curl -sS http://www.test/whoami", "203.0.113.2");
    assert!(other.visits().is_empty(), "{:?}", other.visits());
    let holders = [&one.host, &one.net, &other.host, &other.net].map(|namespace| namespace.pid());
    let in_host = one.processes();
    assert!(in_host.is_empty(), "a fresh host has {in_host:?}");
    drop((one, other));
    for pid in holders {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "the namespace of {pid} is left");
    }
}
