//! `forkd serve` on a real Linux guest: a daemon as a user starts it, asked by curl and a WebSocket client. Needs what
//! `linux.rs` needs, and curl.

#[path = "linux_daemon/client.rs"]
mod client;
#[path = "linux/harness.rs"]
mod harness;
#[path = "linux_daemon/limits.rs"]
mod limits;
#[path = "linux_daemon/restarts.rs"]
mod restarts;

use client::{Answer, Service};
use harness::{Bed, Hub, wait_until};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use tungstenite::Message;

/// For anything in the guest, whose kernel is emulated here.
const LONG: Duration = Duration::from_secs(60);

#[test]
fn sandboxes_are_made_listed_asked_and_ended() {
    let service = Service::start(&[]);
    let metadata = json!({ "team": "a" });
    let wanted = json!({ "snapshot_tag": "python-numpy", "n": 3, "vary": { "SHARD": ["x", "y,z"] },
        "env": { "MODE": "m" }, "metadata": metadata });
    let answer = service.post("/v1/sandboxes", &wanted);
    assert_eq!(answer.status, 201, "{answer:?}");
    let made = answer.list();
    assert_eq!(made.len(), 3);
    for one in &made {
        assert_eq!((&one["state"], &one["metadata"]), (&json!("ready"), &metadata), "{one}");
        assert!(one["first_instruction_ms"].as_f64().unwrap() > 0.0 && one["ready_ms"].as_f64().is_some());
    }
    let ids: Vec<&str> = made.iter().map(|one| one["id"].as_str().unwrap()).collect();

    // Two pages.
    let first = service.get("/v1/sandboxes?limit=2");
    let cursor = first.header("x-next-cursor").expect("there is another page");
    let second = service.get(&format!("/v1/sandboxes?limit=2&cursor={cursor}"));
    let listed: Vec<Value> = [first.list(), second.list()].concat();
    assert_eq!(listed.iter().map(|one| one["id"].as_str().unwrap()).collect::<Vec<_>>(), ids);
    assert_eq!(second.header("x-next-cursor"), None);
    for (filter, count) in [
        ("metadata=team%3Da", 3),
        ("metadata=team%3Db", 0),
        ("state=ready", 3),
        ("state=paused", 0),
        ("image=python-numpy", 3),
        ("image=other", 0),
    ] {
        assert_eq!(service.get(&format!("/v1/sandboxes?{filter}")).list().len(), count, "{filter}");
    }

    let environment = "__import__('os').environ['SHARD'] + __import__('os').environ['MODE']";
    let answers: Vec<_> = ids.iter().map(|id| service.eval(id, environment)).collect();
    assert_eq!(answers, [json!("'xm'"), json!("'y,zm'"), json!("'xm'")]);
    assert_eq!(service.eval(ids[0], "numpy.zeros(2).tolist()"), json!("[0.0, 0.0]"));
    let failed = service.post(&format!("/v1/sandboxes/{}/eval", ids[0]), &json!({ "code": "1/0" }));
    assert!(failed.json()["error"].as_str().unwrap().contains("ZeroDivisionError"), "{failed:?}");
    let pong = service.post(&format!("/v1/sandboxes/{}/ping", ids[1]), &json!({}));
    assert_eq!((pong.status, &pong.json()["ok"]), (200, &json!(true)));

    assert_eq!(service.delete(ids[1]).status, 204);
    for gone in [service.get(&format!("/v1/sandboxes/{}", ids[1])), service.delete(ids[1])] {
        assert_eq!((gone.status, &gone.json()["code"]), (404, &json!("not_found")));
    }
    assert_eq!(service.get("/v1/sandboxes").list().len(), 2);
    let metrics = service.get("/metrics").body;
    for line in ["forkd_forks_total 1", "forkd_sandboxes_created_total 3"] {
        assert!(metrics.lines().any(|shown| shown == line), "{metrics}");
    }
    let tags: Vec<_> = service.get("/v1/snapshots").list().iter().map(|one| one["tag"].clone()).collect();
    assert!(tags.contains(&json!("python-numpy")), "{tags:?}");
}

#[test]
fn a_package_of_the_hub_is_an_image() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let service = Service::start_in(bed, &["--hub", &hub.url]);
    let listed = service.get("/v1/images").json();
    assert_eq!(listed["packages"][0]["name"], json!("deeplethe/python-numpy"), "{listed}");
    let made = service.post("/v1/sandboxes", &json!({ "image": "deeplethe/python-numpy" }));
    assert_eq!(made.status, 201, "{made:?}");
    let one = &made.list()[0];
    let from = one["forked_from"].as_str().unwrap();
    assert!(one["image"] == json!("deeplethe/python-numpy") && from.contains("numpy@"), "{one}");
    assert_eq!(service.eval(one["id"].as_str().unwrap(), "2 + 2"), json!("4"));
    for missing in ["deeplethe/nothing", "deeplethe/python-numpy@v9"] {
        let answer = service.post("/v1/sandboxes", &json!({ "image": missing }));
        assert_eq!((answer.status, &answer.json()["code"]), (404, &json!("not_found")), "{missing}");
    }
}

#[test]
fn programs_run_and_their_output_comes_as_they_write_it() {
    let service = Service::start(&[]);
    let id = service.one(&json!({}));
    let path = format!("/v1/sandboxes/{id}/exec");
    let ran = service.post(&path, &json!({ "cmd": "cat; echo no >&2; exit 3", "stdin": "yes\n" })).json();
    assert_eq!(
        (&ran["exit_code"], &ran["stdout"], &ran["stderr"]),
        (&json!(3), &json!("yes\n"), &json!("no\n"))
    );
    let whose = json!({ "argv": ["sh", "-c", "id -un; pwd; echo $A"], "user": "nobody", "cwd": "/tmp",
        "env": { "A": "b" } });
    assert_eq!(service.post(&path, &whose).json()["stdout"], json!("nobody\n/tmp\nb\n"));
    let slow = service.post(&path, &json!({ "cmd": "sleep 1000", "timeout_s": 0.5 })).json();
    assert_eq!((&slow["timed_out"], &slow["exit_code"]), (&json!(true), &Value::Null));
    let missing = service.post(&path, &json!({ "argv": ["no-such-program"] }));
    assert_eq!((missing.status, &missing.json()["code"]), (422, &json!("not_started")));
    let detached = service.post(&path, &json!({ "cmd": "sleep 1001", "detach": true }));
    assert!(detached.status == 202 && detached.json()["pid"].as_u64().is_some(), "{detached:?}");
    for bad in [json!({}), json!({ "argv": [] }), json!({ "cmd": "a", "argv": ["a"] }), json!({ "run": "a" })]
    {
        assert_eq!(service.post(&path, &bad).status, 400, "{bad}");
    }

    // As events: the first does not wait for the second.
    let mut events = service.events(&path, &json!({ "cmd": "echo one; sleep 3; echo two >&2" }));
    assert_eq!(events.next(), Some(("stdout".to_owned(), json!({ "text": "one\n" }))));
    let first = Instant::now();
    assert_eq!(events.next(), Some(("stderr".to_owned(), json!({ "text": "two\n" }))));
    assert!(first.elapsed() > Duration::from_secs(2), "{:?} between both", first.elapsed());
    let (name, exit) = events.next().unwrap();
    assert_eq!((name.as_str(), &exit["exit_code"]), ("exit", &json!(0)));
    assert_eq!(events.next(), None);

    // A program whose client goes away is killed, though it writes nothing.
    let watched = service.events(&path, &json!({ "cmd": "echo begun; sleep 1002" }));
    let running = || {
        let count = "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -cx '100[2]'";
        service.post(&path, &json!({ "cmd": count })).json()["stdout"] != json!("0\n")
    };
    assert!(wait_until(LONG, running), "it does not run");
    drop(watched);
    assert!(wait_until(LONG, || !running()), "it runs on");
}

#[test]
fn a_websocket_has_input_signals_and_a_terminal() {
    let service = Service::start(&[]);
    let id = service.one(&json!({}));
    let path = format!("/v1/sandboxes/{id}/exec");

    let mut socket = service.websocket(&path);
    socket.send(text(&json!({ "cmd": "cat; echo done >&2" }))).unwrap();
    socket.send(Message::binary(&b"in\xff"[..])).unwrap();
    socket.send(text(&json!({ "eof": true }))).unwrap();
    let (stdout, stderr, exit) = client::read_all(&mut socket);
    assert_eq!((&stdout[..], &stderr[..]), (&b"in\xff"[..], &b"done\n"[..]));
    assert_eq!(exit["exit"]["exit_code"], json!(0));

    let mut socket = service.websocket(&path);
    let terminal = json!({ "argv": ["sh"], "tty": { "rows": 11, "cols": 22, "term": "dumb" } });
    socket.send(text(&terminal)).unwrap();
    socket
        .send(Message::binary(&b"stty size; trap 'echo caught; exit 5' TERM; echo rea''dy; sleep 100\n"[..]))
        .unwrap();
    client::read_until(&mut socket, "11 22");
    client::read_until(&mut socket, "ready");
    socket.send(text(&json!({ "resize": { "rows": 33, "cols": 44 } }))).unwrap();
    // Ctrl-C is a byte to the terminal.
    socket.send(Message::binary(&[3][..])).unwrap();
    socket.send(Message::binary(&b"stty size\n"[..])).unwrap();
    client::read_until(&mut socket, "33 44");
    socket.send(text(&json!({ "signal": 15 }))).unwrap();
    let (stdout, _, exit) = client::read_all(&mut socket);
    assert!(String::from_utf8_lossy(&stdout).contains("caught"), "{stdout:?}");
    assert_eq!(exit["exit"]["exit_code"], json!(5));

    let mut socket = service.websocket(&path);
    socket.send(text(&json!({ "nonsense": 1 }))).unwrap();
    assert_eq!(client::read_all(&mut socket).2["error"]["code"], json!("invalid_request"));
}

fn text(value: &Value) -> Message {
    Message::text(value.to_string())
}

#[test]
fn files_go_both_ways_and_nothing_leads_out_of_a_sandbox() {
    let service = Service::start(&["--max-file-size", "64MiB"]);
    let id = service.one(&json!({}));
    let base = format!("/v1/sandboxes/{id}/files");
    let content: Vec<u8> = (0..9_000_000_u32).map(|number| (number.wrapping_mul(7919) >> 8) as u8).collect();
    let local = service.bed.path("sent");
    std::fs::write(&local, &content).unwrap();
    let sent = service.curl(&["-T", local.to_str().unwrap()], &format!("{base}?path=/tmp/it&mode=600"));
    assert_eq!(sent.status, 204, "{sent:?}");
    let received = service.bed.path("received");
    let got = service.curl(&["-o", received.to_str().unwrap()], &format!("{base}?path=/tmp/it"));
    assert_eq!((got.status, std::fs::read(&received).unwrap() == content), (200, true));
    let path = format!("/v1/sandboxes/{id}/exec");
    let run = |cmd: &str| service.post(&path, &json!({ "cmd": cmd })).json()["stdout"].clone();
    assert_eq!(run("stat -c '%a %s' /tmp/it"), json!("600 9000000\n"));

    // A directory as an archive, and back in another place.
    run("mkdir -p /tmp/d/e /tmp/f; echo x >/tmp/d/e/x");
    let archive = service.bed.path("archive");
    let got = service.curl(&["-o", archive.to_str().unwrap()], &format!("{base}?path=/tmp/d&format=tar"));
    assert_eq!(got.status, 200, "{got:?}");
    let back = service.curl(&["-T", archive.to_str().unwrap()], &format!("{base}?path=/tmp/f&format=tar"));
    assert_eq!(back.status, 204, "{back:?}");
    assert_eq!(run("cat /tmp/f/d/e/x"), json!("x\n"));

    // Paths are the sandbox's own, however they are written.
    let canary = service.bed.path("canary");
    std::fs::write(&canary, "of the host").unwrap();
    let hostile = format!("{base}?path=/../../../..{}", canary.display());
    assert_eq!(service.get(&hostile).status, 422);
    for (path, status) in [
        ("relative", 400),
        ("../etc/passwd", 400),
        ("", 400),
        ("/a%00b", 400),
        ("/no/such/file", 422),
        ("/tmp", 422),
        ("/dev/null", 422),
    ] {
        let answer = service.get(&format!("{base}?path={path}"));
        assert_eq!(answer.status, status, "{path}: {answer:?}");
        assert!(answer.json()["message"].is_string(), "{answer:?}");
    }
    let written = service.curl(&["-T", local.to_str().unwrap()], &hostile);
    assert_eq!((written.status, std::fs::read_to_string(&canary).unwrap()), (422, "of the host".to_owned()));
    for other in ["..%2f..", "x-1", "%2e%2e", "000000-1"] {
        assert_eq!(
            service.get(&format!("/v1/sandboxes/{other}/files?path=/etc/passwd")).status,
            404,
            "{other}"
        );
    }
}

#[test]
fn sandboxes_are_paused_given_time_and_branched() {
    let service = Service::start(&[]);
    let id = service.one(&json!({ "timeout_s": 600, "on_timeout": "pause" }));
    let path = |verb: &str| format!("/v1/sandboxes/{id}/{verb}");
    assert!((1..=600_000).contains(&service.show(&id)["expires_in_ms"].as_u64().unwrap()));
    let endless = service.post(&path("timeout"), &json!({ "timeout_s": null })).json();
    assert_eq!(endless["expires_in_ms"], Value::Null);

    assert_eq!(service.post(&path("pause"), &json!({})).json()["state"], json!("paused"));
    let refused = service.post(&path("exec"), &json!({ "cmd": "true" }));
    assert_eq!((refused.status, &refused.json()["code"]), (409, &json!("paused")));
    assert_eq!(service.get("/v1/sandboxes?state=paused").list().len(), 1);
    assert_eq!(service.post(&path("resume"), &json!({})).json()["state"], json!("ready"));

    service.eval(&id, "globals().update(kept=41)");
    let wanted = json!({ "n": 2, "vary": { "WAY": ["left", "right"] } });
    let answer = service.post(&path("branch"), &wanted);
    assert_eq!(answer.status, 201, "{answer:?}");
    let branched = answer.json();
    assert!(branched["pause_ms"].as_f64().unwrap() > 0.0);
    let branches: Vec<_> = branched["sandboxes"].as_array().unwrap().clone();
    let ways = branches.iter().map(|branch| {
        assert_eq!(branch["parent"], json!(id));
        let code = "__import__('os').environ['WAY'] + str(kept + 1)";
        service.eval(branch["id"].as_str().unwrap(), code)
    });
    assert_eq!(ways.collect::<Vec<_>>(), [json!("'left42'"), json!("'right42'")]);
    assert_eq!(service.eval(&id, "kept"), json!("41"));
    assert_eq!(service.get("/v1/sandboxes").list().len(), 3);

    service.post(&path("timeout"), &json!({ "timeout_s": 1 }));
    let gone = || service.get(&format!("/v1/sandboxes/{id}")).status == 404;
    assert!(wait_until(LONG, gone), "it outlives its time");
    assert_eq!(service.get("/v1/sandboxes").list().len(), 2, "its branches live");
}

#[test]
fn a_network_is_shown_with_what_was_refused() {
    let service = Service::start(&[]);
    let id = service.one(&json!({ "network": { "allow": ["192.0.2.1:80"], "rate": "10mbit" } }));
    let exec = format!("/v1/sandboxes/{id}/exec");
    let attempt = "import socket; s = socket.socket(); s.settimeout(20); s.connect_ex(('192.0.2.2', 80))";
    service.post(&exec, &json!({ "argv": ["python3", "-c", attempt] }));
    let network = service.get(&format!("/v1/sandboxes/{id}/network")).json();
    assert_eq!(network["mode"], json!("nat"));
    assert_eq!(network["refusals"][0]["what"], json!("tcp 192.0.2.2:80"), "{network}");
    let none = service.one(&json!({}));
    assert_eq!(service.get(&format!("/v1/sandboxes/{none}/network")).json(), json!({ "mode": "none" }));
    for bad in [json!("everything"), json!({ "allow": ["10.0.0.1/8"] }), json!({ "rate": "fast" })] {
        let wanted = json!({ "snapshot_tag": "python-numpy", "network": bad });
        assert_eq!(service.post("/v1/sandboxes", &wanted).status, 400, "{wanted}");
    }
}

#[test]
fn a_request_that_makes_no_sense_is_refused_and_leaves_nothing() {
    let service = Service::start(&[]);
    for (wanted, status) in [
        (json!({}), 400),
        (json!({ "snapshot_tag": "python-numpy", "image": "a/b" }), 400),
        (json!({ "snapshot_tag": "../../etc" }), 400),
        (json!({ "image": "/etc/passwd" }), 400),
        (json!({ "image": "file:///etc/passwd" }), 400),
        (json!({ "snapshot_tag": "python-numpy", "n": 0 }), 400),
        (json!({ "snapshot_tag": "python-numpy", "n": 1001 }), 400),
        (json!({ "snapshot_tag": "python-numpy", "env": { "A=B": "c" } }), 400),
        (json!({ "snapshot_tag": "python-numpy", "timeout_s": 0 }), 400),
        (json!({ "snapshot_tag": "python-numpy", "unknown": 1 }), 400),
        (json!({ "snapshot_tag": "no-such-tag" }), 404),
        (json!({ "image": "nobody/nothing" }), 502),
    ] {
        let answer = service.post("/v1/sandboxes", &wanted);
        assert_eq!(answer.status, status, "{wanted}: {answer:?}");
        assert!(answer.json()["code"].is_string() && answer.header("x-request-id").is_some(), "{answer:?}");
    }
    let mine = service.curl(&["-H", "x-request-id: mine-1"], "/healthz");
    assert_eq!(mine.header("x-request-id").as_deref(), Some("mine-1"));
    let theirs = service.curl(&["-H", "x-request-id: a b"], "/healthz");
    assert_ne!(theirs.header("x-request-id").as_deref(), Some("a b"));
    for (method, path, status) in
        [("DELETE", "/healthz", 405), ("GET", "/v2", 404), ("PUT", "/v1/sandboxes", 405)]
    {
        assert_eq!(service.curl(&["-X", method], path).status, status, "{method} {path}");
    }
    assert!(!service.bed.has_run_dirs(), "a run directory is left");
}

#[test]
fn a_client_that_says_nothing_is_hung_up_on() {
    let service = Service::start(&[]);
    let mut slow = UnixStream::connect(service.socket()).unwrap();
    slow.write_all(b"GET /healthz HTTP/1.1\r\nhost: d\r\nx-a: ").unwrap();
    let begun = Instant::now();
    let mut answer = Vec::new();
    // An error is as good an end as any.
    let _ = slow.read_to_end(&mut answer);
    assert!((5..20).contains(&begun.elapsed().as_secs()), "after {:?}", begun.elapsed());
    let mut flood = UnixStream::connect(service.socket()).unwrap();
    flood.set_read_timeout(Some(LONG)).unwrap();
    let _ = flood.write_all(b"GET /healthz HTTP/1.1\r\n");
    for number in 0..100_000 {
        if flood.write_all(format!("x-{number}: y\r\n").as_bytes()).is_err() {
            break;
        }
    }
    let mut answer = String::new();
    let _ = flood.read_to_string(&mut answer);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    let fine: Answer = service.get("/healthz");
    assert_eq!(fine.status, 200);
}
