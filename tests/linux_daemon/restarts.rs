//! What becomes of sandboxes when their daemon ends.

use super::client::Service;
use super::harness::{Bed, Hub, alive, soak, wait_until};
use serde_json::{Value, json};
use std::fs::File;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// For processes to be gone.
const SOON: Duration = Duration::from_secs(20);

fn pids(service: &Service) -> Vec<i64> {
    let hub = Hub::at("http://127.0.0.1:9/".to_owned());
    let shown = service.bed.json(&hub, &["ps"]);
    let forks = shown.as_array().unwrap().iter();
    let children = forks.flat_map(|fork| fork["children"].as_array().unwrap().clone());
    children.map(|child| child["pid"].as_i64().unwrap()).collect()
}

#[test]
fn after_a_kill_the_next_daemon_finds_them() {
    let mut service = Service::start(&[]);
    let id = service.one(&json!({ "metadata": { "kept": "yes" } }));
    service.eval(&id, "globals().update(kept=7)");
    for signal in ["KILL", "TERM", "KILL"] {
        let bed = service.stop(signal);
        service = Service::start_in(bed, &[]);
        let listed = service.get("/v1/sandboxes?metadata=kept%3Dyes").list();
        assert_eq!(listed.len(), 1, "after SIG{signal}");
        assert_eq!((&listed[0]["id"], &listed[0]["state"]), (&json!(id), &json!("ready")));
        assert_eq!(service.eval(&id, "kept"), json!("7"));
    }
    let pid = pids(&service)[0];
    assert_eq!(service.delete(&id).status, 204);
    service.bed.assert_nothing_left([pid].into_iter());
}

#[test]
fn they_end_with_their_daemon_where_that_was_asked() {
    for signal in ["TERM", "KILL"] {
        let service = Service::start(&["--on-exit", "end"]);
        service.one(&json!({}));
        service.one(&json!({}));
        let pids = pids(&service);
        assert_eq!(pids.len(), 2);
        let bed = service.stop(signal);
        for pid in pids {
            assert!(wait_until(SOON, || !alive(pid)), "machine {pid} outlives its daemon after SIG{signal}");
        }
        assert!(wait_until(SOON, || !bed.has_run_dirs()), "a run directory is left after SIG{signal}");
        let waiting = || super::harness::processes_of(&bed.path("run")).is_empty();
        assert!(wait_until(SOON, waiting), "a supervisor is left after SIG{signal}");
    }
}

#[test]
fn there_is_one_daemon_for_a_run_directory() {
    let service = Service::start(&[]);
    let hub = Hub::at("http://127.0.0.1:9/".to_owned());
    let said = service.bed.run(&hub, &["serve"]).failure();
    assert!(said.contains("a daemon runs already"), "{said}");
    assert_eq!(service.get("/healthz").status, 200);
}

#[test]
fn what_a_user_forked_is_not_the_daemon_s() {
    let service = Service::start(&[]);
    let hub = Hub::at("http://127.0.0.1:9/".to_owned());
    let forked = service.bed.json(&hub, &["fork", "--tag", "python-numpy", "--detach"]);
    let id = forked["children"][0]["id"].as_str().unwrap();
    assert_eq!(service.get("/v1/sandboxes").list().len(), 0);
    assert_eq!(service.get(&format!("/v1/sandboxes/{id}")).status, 404);
    assert_eq!(service.delete(id).status, 404);
    assert_eq!(service.bed.json(&hub, &["eval", id, "1+1"])["answer"], json!("2"));
}

/// Opens a socket, and becomes `forkd serve` as systemd would have it.
const ACTIVATE: &str = "
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(64)
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
";

#[test]
fn systemd_s_socket_is_taken_over_and_left_there() {
    let bed = Bed::new();
    let (socket, log) = (bed.path("theirs.sock"), bed.path("daemon.log"));
    let forkd = bed.command(&Hub::at("http://127.0.0.1:9/".to_owned()));
    let mut activated = Command::new("python3");
    activated.args(["-c", ACTIVATE]).arg(&socket).arg(forkd.get_program()).arg("serve");
    activated.envs(forkd.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut daemon = activated.stderr(File::create(&log).unwrap()).spawn().unwrap();
    let health = || {
        let curl = Command::new("curl")
            .arg("-sS")
            .arg("--unix-socket")
            .arg(&socket)
            .arg("http://d/healthz")
            .output();
        String::from_utf8_lossy(&curl.unwrap().stdout).contains("ok")
    };
    let answers = wait_until(SOON, health);
    let ended = Command::new("kill").arg(daemon.id().to_string()).status().unwrap().success()
        && wait_until(SOON, || daemon.try_wait().unwrap().is_some());
    assert!(answers && ended, "{}", std::fs::read_to_string(&log).unwrap());
    assert!(socket.exists() && !bed.path("run/forkd/daemon.sock").exists());
}

#[test]
fn units_have_the_options_that_were_given() {
    let bed = Bed::new();
    let (hub, units) = (Hub::at("http://127.0.0.1:9/".to_owned()), bed.path("units"));
    let arguments = ["serve", "--ready", "5", "--install-unit", units.to_str().unwrap(), "--on-exit", "end"];
    assert!(bed.run(&hub, &arguments).success().contains("enable --now forkd.socket"));
    let service = std::fs::read_to_string(units.join("forkd.service")).unwrap();
    assert!(
        service.contains(" serve --ready 5 --on-exit end\n") && service.contains("KillMode=process"),
        "{service}"
    );
    let socket = std::fs::read_to_string(units.join("forkd.socket")).unwrap();
    let place = bed.path("run/forkd/daemon.sock");
    assert!(socket.contains(&format!("ListenStream={}\n", place.display())), "{socket}");
}

#[test]
fn actions_are_noted_and_nothing_secret_is() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let service = Service::start(&["--audit-log", log.path().to_str().unwrap()]);
    let id = service.one(&json!({ "env": { "SECRET": "of-the-variable" } }));
    service.eval(&id, "'of-the-code'");
    service.get("/v1/sandboxes");
    service.delete(&id);
    let text = std::fs::read_to_string(log.path()).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let shown: Vec<_> = lines.iter().map(|line| (line["method"].clone(), line["status"].clone())).collect();
    let expected = [("POST", 201), ("POST", 200), ("DELETE", 204)];
    assert_eq!(shown, expected.map(|(method, status)| (json!(method), json!(status))));
    assert_eq!(
        (&lines[2]["path"], &lines[2]["tenant"]),
        (&json!(format!("/v1/sandboxes/{id}")), &Value::Null)
    );
    assert!(!text.contains("of-the"), "{text}");
}

/// Clients that make sandboxes and end them, until they are told to stop; how many they have made.
fn make_and_end(service: &Mutex<Service>, stop: &AtomicBool) -> usize {
    let mut made = 0;
    while !stop.load(Ordering::Acquire) {
        let socket = service.lock().unwrap().socket();
        let ask = |arguments: &[&str], path: &str| {
            let mut curl = Command::new("curl");
            curl.args(["-s", "--max-time", "60", "--unix-socket"]).arg(&socket).args(arguments);
            let output = curl.arg(format!("http://d/v1/sandboxes{path}")).output().unwrap();
            serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default()
        };
        let answer = ask(&["--data", &json!({ "snapshot_tag": "python-numpy" }).to_string()], "");
        if let Some(id) = answer.pointer("/0/id").and_then(Value::as_str) {
            made += 1;
            ask(&["-X", "DELETE"], &format!("/{id}"));
        }
    }
    made
}

#[test]
fn kills_under_load_leave_sandboxes_that_answer_and_no_others() {
    let kills = if soak() { 100 } else { 10 };
    let (service, stop) = (Mutex::new(Service::start(&[])), AtomicBool::new(false));
    let made: usize = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..2).map(|_| scope.spawn(|| make_and_end(&service, &stop))).collect();
        for number in 0..kills {
            std::thread::sleep(Duration::from_millis(300 + 70 * (number % 8)));
            let mut service = service.lock().unwrap();
            service.kill_and_start();
        }
        stop.store(true, Ordering::Release);
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    assert!(made > 0, "no sandbox was made between the kills");
    let service = service.into_inner().unwrap();
    // Those whose daemon was killed before it had heard of them are on their way out.
    std::thread::sleep(Duration::from_secs(2));
    let left = service.get("/v1/sandboxes?limit=1000").list();
    println!("{made} made, {} left by {kills} kills", left.len());
    for one in &left {
        let id = one["id"].as_str().unwrap();
        assert_eq!(service.eval(id, "1 + 1"), json!("2"), "{one}");
        assert_eq!(service.delete(id).status, 204);
    }
    assert!(wait_until(SOON, || !service.bed.has_run_dirs()), "a run directory is left");
    let bed = service.stop("TERM");
    let gone = || super::harness::processes_of(&bed.path("run")).is_empty();
    assert!(wait_until(SOON, gone), "a process is left");
}
