//! Services under the real agent: order, readiness of every kind, and those that never get ready.

mod support;

use std::time::Instant;

use forkd_abi::protocol::WorkerState;
use serde_json::{Value, json};
use support::{Agent, SOON, eventually};
use tempfile::TempDir;

/// A machine with these services and a worker that says what it found in `/DIR/order`.
fn agent(dir: &TempDir, services: &Value) -> Agent {
    let worker = format!(
        "echo '{{\"ready\":true}}'; while read -r line; do \
         echo \"{{\\\"answer\\\":\\\"$(tr '\\n' ' ' < {}/order)\\\"}}\"; done",
        dir.path().display()
    );
    let file = json!({
        "env": {"PLACE": dir.path()},
        "services": services,
        "warm": {"argv": ["/bin/sh", "-c", worker]},
    });
    Agent::with_machine_file(&file.to_string())
}

fn failure(agent: &Agent) -> String {
    match agent.client().status(true, SOON).unwrap().worker {
        WorkerState::Failed { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

fn shell(script: &str) -> Value {
    json!(["/bin/sh", "-c", script])
}

#[test]
fn services_start_in_order_and_the_worker_after_them() {
    let dir = TempDir::new().unwrap();
    let services = json!([
        // The line comes in two pieces, and before it others.
        {"name": "one", "argv": shell("echo loading; sleep 0.3; printf 'now '; sleep 0.2; echo one >> $PLACE/order; \
            echo listening; exec sleep 60"), "ready": {"line": "now listening"}},
        {"name": "two", "argv": shell("echo two >> $PLACE/order; exec sleep 60"), "env": {"A": "b"},
            "ready": {"exec": ["grep", "two", format!("{}/order", dir.path().display())]}},
        {"name": "three", "argv": shell("echo three >> $PLACE/order; exec sleep 60")},
    ]);
    let agent = agent(&dir, &services);
    // It waits for all of them.
    let answer = agent.client().eval("", SOON).unwrap().answer.unwrap();
    assert!(answer.starts_with("one two"), "{answer}");
    eventually("the last has run", || {
        agent.client().eval("", SOON).unwrap().answer.unwrap() == "one two three "
    });
    assert_eq!(agent.run(&["sh", "-c", "echo $PLACE"]).unwrap().text().trim(), dir.path().to_str().unwrap());
}

#[test]
fn ports_and_urls_are_tried_until_they_answer() {
    let dir = TempDir::new().unwrap();
    // 404 until the file is there.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server = format!("sleep 0.3; exec python3 -m http.server {port} --bind 127.0.0.1 --directory $PLACE");
    let services = json!([
        {"name": "tcp", "argv": shell(&server), "ready": {"tcp": port}, "timeout_s": 20},
        {"name": "http", "argv": shell("sleep 0.5; echo x > $PLACE/order; exec sleep 60"),
            "ready": {"http": format!("http://127.0.0.1:{port}/order")}, "timeout_s": 20},
    ]);
    let agent = agent(&dir, &services);
    let answer = agent.client().eval("", 2 * SOON).unwrap().answer.unwrap();
    assert_eq!(answer, "x ");
}

#[test]
fn what_never_gets_ready_is_named() {
    let dir = TempDir::new().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let cases = [
        (json!({"argv": ["/no/such"]}), "cannot run \"/no/such\""),
        (json!({"argv": ["/no/such"], "user": "root"}), "cannot run \"/no/such\""),
        (json!({"argv": ["/bin/true"], "user": "nobody-of-that-name"}), "nobody-of-that-name"),
        (json!({"argv": ["/bin/sleep", "60"], "ready": {"tcp": port}}), "was not ready within 1 s: port"),
        (
            json!({"argv": ["/bin/sleep", "60"], "ready": {"line": "x"}}),
            "was not ready within 1 s: no such line",
        ),
        (
            json!({"argv": ["/bin/sleep", "60"], "ready": {"exec": ["/bin/false"]}}),
            "/bin/false: exit status: 1",
        ),
        (
            json!({"argv": ["/bin/sh", "-c", "exit 3"], "ready": {"tcp": port}}),
            "exited with code 3 before it was ready",
        ),
    ];
    for (mut service, expected) in cases {
        service["name"] = json!("db");
        service["timeout_s"] = json!(1);
        let agent = agent(&dir, &json!([service, {"name": "next", "argv": shell("touch $PLACE/next")}]));
        let started = Instant::now();
        let reason = failure(&agent);
        assert!(reason.contains("the service db") && reason.contains(expected), "{reason}");
        assert!(started.elapsed() < SOON);
        let refused = agent.client().eval("1", SOON).unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
        assert!(!dir.path().join("next").exists(), "{expected}");
        assert_eq!(agent.run(&["echo", "alive"]).unwrap().text(), "alive\n");
    }
}

#[test]
fn a_machine_of_services_alone_has_no_worker() {
    let services = json!([{"name": "x", "argv": ["/bin/sleep", "60"], "ready": {"exec": ["/bin/true"]}}]);
    let agent = Agent::with_machine_file(&json!({"services": services}).to_string());
    assert_eq!(agent.client().status(true, SOON).unwrap().worker, WorkerState::None);
    let said = agent.client().eval("1", SOON).unwrap_err().to_string();
    assert!(said.contains("no warm worker"), "{said}");
}

#[test]
fn a_worker_of_another_user_is_one_or_says_why_not() {
    let warm = |user: &str| {
        let script = "echo '{\"ready\":true}'; while read -r line; do echo \"{\\\"answer\\\":\\\"$(id -u)\\\"}\"; done";
        Agent::with_machine_file(
            &json!({"warm": {"argv": ["/bin/sh", "-c", script], "user": user}}).to_string(),
        )
    };
    let reason = failure(&warm("nobody-of-that-name"));
    assert!(reason.contains("nobody-of-that-name"), "{reason}");
    if std::process::Command::new("id").arg("-u").output().unwrap().stdout != b"0\n" {
        println!("the rest takes root");
        return;
    }
    assert_eq!(warm("nobody").client().eval("", SOON).unwrap().answer.as_deref(), Some("65534"));
}
