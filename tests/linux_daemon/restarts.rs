//! What becomes of sandboxes when their daemon ends.

use super::client::Service;
use super::harness::{alive, wait_until};
use serde_json::json;
use std::time::Duration;

/// For processes to be gone.
const SOON: Duration = Duration::from_secs(20);

fn pids(service: &Service) -> Vec<i64> {
    let hub = super::harness::Hub::at("http://127.0.0.1:9/".to_owned());
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
    let hub = super::harness::Hub::at("http://127.0.0.1:9/".to_owned());
    let said = service.bed.run(&hub, &["serve"]).failure();
    assert!(said.contains("a daemon runs already"), "{said}");
    assert_eq!(service.get("/healthz").status, 200);
}

#[test]
fn what_a_user_forked_is_not_the_daemon_s() {
    let service = Service::start(&[]);
    let hub = super::harness::Hub::at("http://127.0.0.1:9/".to_owned());
    let forked = service.bed.json(&hub, &["fork", "--tag", "python-numpy", "--detach"]);
    let id = forked["children"][0]["id"].as_str().unwrap();
    assert_eq!(service.get("/v1/sandboxes").list().len(), 0);
    assert_eq!(service.get(&format!("/v1/sandboxes/{id}")).status, 404);
    assert_eq!(service.delete(id).status, 404);
    assert_eq!(service.bed.json(&hub, &["eval", id, "1+1"])["answer"], json!("2"));
}
