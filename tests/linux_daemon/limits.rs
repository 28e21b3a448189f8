//! Who may use a daemon, and how much of it.

use super::client::Service;
use super::harness::{Bed, wait_until};
use serde_json::json;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

const ALICE: &str = "alice-0123456789abcdef";
const BOB: &str = "bob-0123456789abcdef";

fn tokens(bed: &Bed) -> String {
    let file = bed.path("tokens");
    std::fs::write(&file, format!("# who may\nalice {ALICE}\nbob {BOB}\n")).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn over_tcp_a_token_decides_what_there_is() {
    let bed = Bed::new();
    let file = tokens(&bed);
    let service = Service::start_tcp(bed, &["--token-file", &file], &[]);
    let (alice, bob) = (format!("authorization: Bearer {ALICE}"), format!("authorization: bearer {BOB}"));
    assert_eq!(service.get("/healthz").status, 200);
    for wrong in [
        "x-nothing: y".to_owned(),
        "authorization: Bearer ".to_owned(),
        "authorization: Bearer wrong-0123456789abcdef".to_owned(),
        format!("authorization: Bearer {ALICE}x"),
        format!("authorization: Basic {ALICE}"),
        format!("authorization: {ALICE}"),
    ] {
        for path in ["/v1/sandboxes", "/version", "/metrics", "/openapi.json", "/v1/snapshots", "/v1/images"]
        {
            let answer = service.curl(&["-H", &wrong], path);
            assert_eq!((answer.status, &answer.json()["code"]), (401, &json!("unauthorized")), "{path}");
        }
    }
    let wanted = json!({ "snapshot_tag": "python-numpy" }).to_string();
    let made = service.curl(&["-H", &alice, "--data", &wanted], "/v1/sandboxes");
    assert_eq!(made.status, 201, "{made:?}");
    let id = made.json()[0]["id"].as_str().unwrap().to_owned();
    let one = format!("/v1/sandboxes/{id}");

    // To another tenant it is as if there were none.
    assert_eq!(service.curl(&["-H", &bob], "/v1/sandboxes").list().len(), 0);
    for (arguments, path) in [
        (&["-X", "GET"][..], one.clone()),
        (&["-X", "DELETE"], one.clone()),
        (&["--data", "{\"cmd\":\"true\"}"], format!("{one}/exec")),
        (&["--data", "{\"code\":\"1\"}"], format!("{one}/eval")),
        (&["-X", "GET"], format!("{one}/files?path=/etc/passwd")),
        (&["-X", "PUT", "--data", "x"], format!("{one}/files?path=/tmp/x")),
        (&["-X", "POST"], format!("{one}/pause")),
        (&["-X", "POST"], format!("{one}/resume")),
        (&["-X", "POST"], format!("{one}/ping")),
        (&["-X", "POST"], format!("{one}/branch")),
        (&["--data", "{\"timeout_s\":1}"], format!("{one}/timeout")),
        (&["-X", "GET"], format!("{one}/network")),
    ] {
        let answer = service.curl(&[&["-H", &bob], arguments].concat(), &path);
        assert_eq!(answer.status, 404, "{arguments:?} {path}: {answer:?}");
    }
    let shown = service.curl(&["-H", &alice], &one);
    assert_eq!((shown.status, &shown.json()["state"]), (200, &json!("ready")));
    let log = std::fs::read_to_string(service.bed.path("daemon.log")).unwrap();
    assert!(!log.contains(ALICE) && !log.contains(BOB), "a token is in the log");
}

#[test]
fn a_tcp_port_without_a_token_is_refused() {
    let bed = Bed::new();
    let hub = super::harness::Hub::at("http://127.0.0.1:9/".to_owned());
    let said = bed.run(&hub, &["serve", "--listen", "127.0.0.1:0"]).failure();
    assert!(said.contains("name a file with tokens"), "{said}");
    let cert = ["serve", "--tls-cert", "c.pem", "--tls-key", "k.pem"];
    assert!(bed.run(&hub, &cert).failure().contains("only to a TCP port"));
}

#[test]
fn tls_is_spoken_with_the_certificate_that_was_given() {
    let bed = Bed::new();
    let file = tokens(&bed);
    let (certificate, key) = (bed.path("cert.pem"), bed.path("key.pem"));
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let (certificate, key) = (certificate.to_str().unwrap().to_owned(), key.to_str().unwrap().to_owned());
    let arguments = ["--token-file", &file, "--tls-cert", &certificate, "--tls-key", &key];
    let service = Service::start_tcp(bed, &arguments, &["--cacert", &certificate]);
    assert_eq!(service.get("/healthz").status, 200);
    let authorized = service.curl(&["-H", &format!("authorization: Bearer {BOB}")], "/version");
    assert_eq!(authorized.json()["api"], json!("v1"));
}

#[test]
fn a_body_of_ten_gib_is_refused_at_once() {
    let service = Service::start(&[]);
    let id = service.one(&json!({}));
    let sparse = service.bed.path("huge");
    std::fs::File::create(&sparse).unwrap().set_len(10 << 30).unwrap();
    let sparse = sparse.to_str().unwrap();
    let path = format!("/v1/sandboxes/{id}/files?path=/tmp/huge");
    let begun = std::time::Instant::now();
    let refused = service.curl(&["-T", sparse], &path);
    assert_eq!((refused.status, &refused.json()["code"]), (413, &json!("too_large")));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let refused = service.curl(&["-X", "POST", "-T", sparse], "/v1/sandboxes");
    assert_eq!(refused.status, 413, "{refused:?}");
    let left = service.post(&format!("/v1/sandboxes/{id}/exec"), &json!({ "cmd": "ls /tmp | wc -l" })).json();
    assert_eq!(left["stdout"], json!("0\n"));
}

#[test]
fn a_body_that_does_not_say_how_long_it_is_is_cut_off() {
    let service = Service::start(&["--max-file-size", "1MiB"]);
    let id = service.one(&json!({}));
    let file = service.bed.path("long");
    std::fs::write(&file, vec![1; 3 << 20]).unwrap();
    let arguments = ["-T", file.to_str().unwrap(), "-H", "transfer-encoding: chunked"];
    let refused = service.curl(&arguments, &format!("/v1/sandboxes/{id}/files?path=/tmp/long"));
    assert_eq!(refused.status, 413, "{refused:?}");
    let left = service.post(&format!("/v1/sandboxes/{id}/exec"), &json!({ "cmd": "ls /tmp | wc -l" })).json();
    assert_eq!(left["stdout"], json!("0\n"));
}

#[test]
fn there_are_as_many_sandboxes_and_connections_as_may_be() {
    let service = Service::start(&["--max-sandboxes", "3", "--max-connections", "4"]);
    let two = json!({ "snapshot_tag": "python-numpy", "n": 2 });
    let made = service.post("/v1/sandboxes", &two);
    assert_eq!(made.status, 201, "{made:?}");
    let refused = service.post("/v1/sandboxes", &two);
    assert_eq!((refused.status, refused.header("retry-after").as_deref()), (429, Some("1")), "{refused:?}");
    let id = made.json()[0]["id"].as_str().unwrap().to_owned();
    let branched = service.post(&format!("/v1/sandboxes/{id}/branch"), &json!({ "n": 2 }));
    assert_eq!(branched.status, 429, "{branched:?}");
    assert_eq!(service.delete(&id).status, 204);
    assert_eq!(service.post("/v1/sandboxes", &two).status, 201);

    let mode = std::fs::metadata(service.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "others could connect");
    let held: Vec<_> = (0..4).map(|_| UnixStream::connect(service.socket()).unwrap()).collect();
    assert!(wait_until(Duration::from_secs(5), || service.get("/healthz").status == 503));
    drop(held);
    assert!(wait_until(Duration::from_secs(5), || service.get("/healthz").status == 200));
}

#[test]
fn a_key_makes_a_request_count_once() {
    let service = Service::start(&[]);
    let wanted = json!({ "snapshot_tag": "python-numpy" }).to_string();
    let create = |body: &str| service.curl(&["-H", "idempotency-key: once", "--data", body], "/v1/sandboxes");
    let ids: Vec<_> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..3).map(|_| scope.spawn(|| create(&wanted))).collect();
        asked.into_iter().map(|asked| asked.join().unwrap().json()[0]["id"].clone()).collect()
    });
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    let other = create(&json!({ "snapshot_tag": "python-numpy", "n": 2 }).to_string());
    assert_eq!((other.status, &other.json()["code"]), (409, &json!("key_reused")));
    assert_eq!(service.get("/v1/sandboxes").list().len(), 1);
}
