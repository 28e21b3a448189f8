//! `--net nat` of a real Linux guest, over an internet that the test makes: real programs, who can be reached and who
//! cannot, what is counted, and what is left. Needs what `linux.rs` needs, the machine `tools` (CONTRIBUTING.md), and root.
//! `FORKD_NAT_CHILDREN` says how many work at once.

#[path = "linux/harness.rs"]
mod harness;
#[path = "support/internet/mod.rs"]
mod internet;
#[path = "linux_nat/lab.rs"]
mod lab;
#[path = "linux_nat/policy.rs"]
mod policy;
#[path = "linux_nat/rows.rs"]
mod rows;

use harness::soak;
use lab::Lab;
use std::collections::BTreeSet;
use std::fs;
use std::process::Stdio;
use std::time::Instant;

/// What an agent does first, by name all of it. Prints a line for each.
const WORK: &str = r#"
cd /root; printf '%s' "$CA" >ca.pem
curl -sS --cacert ca.pem https://tls.test/
git clone -q git://git.test/greeting.git
(cd greeting; python3 -m pytest -q -p no:cacheprovider)
pip install -q --index-url https://pypi-mirror.test/simple --cert ca.pem greet
python3 -c "import greet; print(greet.greet('you'))"
ip -o -4 address show dev eth0
"#;

#[test]
fn children_at_once_clone_install_test_and_fetch_by_name() {
    // A child takes minutes of a processor for it where KVM emulates its kernel.
    let count = std::env::var("FORKD_NAT_CHILDREN").map_or(2, |count| count.parse().unwrap());
    let lab = Lab::new();
    let allowed = ["--allow=tls.test:443", "--allow=git.test:9418", "--allow=pypi-mirror.test:443"];
    let guests = lab.fork(count, &allowed);
    let addresses: BTreeSet<_> = guests.iter().map(|guest| &guest.address).collect();
    assert_eq!(addresses.len(), count, "addresses repeat: {addresses:?}");
    let authority = format!("CA={}", fs::read_to_string(lab.internet.certificate()).unwrap());
    let environment = [authority];
    let started = Instant::now();
    std::thread::scope(|scope| {
        for guest in &guests {
            let (lab, environment) = (&lab, &environment);
            scope.spawn(move || {
                let (code, text) = lab.exec(guest, environment, WORK);
                let expected = ["It works", "2 passed", "hello you, please", &format!(" {}/", guest.address)];
                let missing: Vec<_> = expected.iter().filter(|said| !text.contains(**said)).collect();
                assert!(code == Some(0) && missing.is_empty(), "{}: {code:?} {missing:?} {text}", guest.id);
            });
        }
    });
    let took = started.elapsed().as_secs_f64();
    println!("{count} children cloned, installed, tested and fetched in {took:.0} s");
    let visits = lab.internet.visits();
    let visited = |what: &str| visits.iter().filter(|visit| visit.contains(what)).count();
    let both = (visited(" tls.test / 200"), visited("greet-1.0-py3-none-any.whl 200"));
    assert_eq!(both, (count, count), "{visits:#?}");
    lab.kill_all();
}

#[test]
fn bytes_connections_and_refusals_are_counted_for_each_child() {
    let lab = Lab::new();
    let guests = lab.fork(2, &["--deny=198.51.100.0/24"]);
    let [busy, idle] = &guests[..] else { panic!("two children were asked for") };
    lab.teach(busy);
    let fetch = "import urllib.request\n\
        request = urllib.request.Request('http://www.test/large', headers={'Range': 'bytes=0-999999'})\n\
        len(urllib.request.urlopen(request).read())";
    assert_eq!(lab.eval(busy, fetch), "1000000");
    for _ in 0..3 {
        assert!(lab.eval(busy, "tcp('198.51.100.7', 80)").contains("refused: "));
    }
    let net = |id: &str| lab.json(&["net", id]);
    let number = |document: &serde_json::Value, name: &str| document[name].as_u64().unwrap();
    let (of_busy, of_idle) = (net(&busy.id), net(&idle.id));
    let received = number(&of_busy, "bytes_received");
    // What came, its headers, and a tenth for what had to be sent again.
    assert!((1_000_000..1_200_000).contains(&received), "{of_busy}");
    assert!((1_000..200_000).contains(&number(&of_busy, "bytes_sent")), "{of_busy}");
    assert_eq!((number(&of_busy, "connections"), number(&of_busy, "refused")), (1, 3), "{of_busy}");
    assert!(of_busy.to_string().contains("tcp 198.51.100.7:80"), "what was refused is not said: {of_busy}");
    assert!(number(&of_idle, "bytes_received") < 10_000, "{of_idle}");
    assert_eq!((number(&of_idle, "connections"), number(&of_idle, "refused")), (0, 0), "{of_idle}");
    let all = lab.json(&["ps"]);
    let shown = all[0]["children"].as_array().unwrap();
    let shown = shown.iter().find(|child| child["id"] == busy.id.as_str()).unwrap();
    for name in ["bytes_sent", "bytes_received", "connections", "refused"] {
        assert_eq!(shown["network"][name], of_busy[name], "{name} in {shown}");
    }
    lab.kill_all();
}

#[test]
fn nothing_is_left_of_one_fork_after_the_other() {
    let lab = Lab::new();
    let before = lab.internet.state();
    let count = if soak() { 1000 } else { 20 };
    // The worker asks for a name and connects, so that the gateway has sockets to leave behind.
    let code = "__import__('socket').create_connection(('www.test', 80), 20).getpeername()";
    for number in 1..=count {
        let fork = ["--json", "fork", "--tag", "tools", "--net", "nat", "--eval", code];
        let report = lab::document(&lab.forkd(&fork).output().unwrap());
        assert_eq!(report["children"][0]["answer"], "('203.0.113.10', 80)", "fork {number}: {report}");
    }
    lab.assert_as_before(&before, &format!("after {count} forks"));
}

#[test]
fn nothing_is_left_of_a_fork_that_is_killed() {
    let lab = Lab::new();
    let before = lab.internet.state();
    let code =
        "c = __import__('socket').create_connection(('www.test', 8080), 20)\nc.sendall(b'x')\nc.recv(1)";
    let fork = ["fork", "--tag", "tools", "-n", "2", "--net", "nat", "--eval", code];
    let start = || lab.forkd(&fork).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    assert!(start().wait().unwrap().success(), "a fork that is left alone");
    let whole = began.elapsed();
    let count = if soak() { 200 } else { 12 };
    for number in 0..count {
        let mut fork = start();
        // Each part of the whole comes up, and those of two runs differ.
        let moment = whole.mul_f64((f64::from(number) + 0.5) / f64::from(count));
        std::thread::sleep(moment);
        fork.kill().unwrap();
        fork.wait().unwrap();
        lab.assert_as_before(&before, &format!("killed after {moment:?} of {whole:?}"));
    }
    // One that stays, in the middle of a connection.
    let guest = &lab.fork(1, &[])[0];
    assert_eq!(lab.eval(guest, code), "b'x'");
    let supervisor = harness::supervisor_of(lab.json(&["ps"])[0]["children"][0]["pid"].as_i64().unwrap());
    let named = format!("{supervisor} ");
    assert!(
        lab.internet.processes().iter().any(|process| process.starts_with(&named)),
        "it is not in `host`"
    );
    let pid = rustix::process::Pid::from_raw(supervisor.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    lab.assert_as_before(&before, "a supervisor killed in the middle of a connection");
}
