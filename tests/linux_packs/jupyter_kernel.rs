//! jupyter-kernel, used from this host by an unmodified `jupyter_client` through forwarded ports.

use super::copies::Copies;
use super::harness::distinct;
use super::python::Python;
use serde_json::Value;
use std::path::PathBuf;
use std::process::Child;

const PORTS: [&str; 5] = ["50001", "50002", "50003", "50004", "50005"];

/// One copy's kernel as this host reaches it.
struct Reached {
    connection: PathBuf,
    forward: Child,
}

/// The connection file that the copy wrote, with the ports of this host instead of its own.
fn reach(copies: &Copies, at: usize) -> Reached {
    // What is asked of the worker is answered behind what makes the copy another than its siblings.
    assert_eq!(copies.eval(at, "1 + 1"), "2");
    let (from, connection) =
        (format!("{}:/home/user/kernel.json", copies.id(at)), copies.bed.path(&at.to_string()));
    copies.run(&["cp", &from, connection.to_str().unwrap()]).success();
    let (forward, ports) = copies.forward(&[&[copies.id(at)][..], &PORTS].concat());
    let mut text = std::fs::read_to_string(&connection).unwrap();
    for (theirs, ours) in PORTS.iter().zip(ports) {
        text = text.replace(theirs, &ours.to_string());
    }
    std::fs::write(&connection, text).unwrap();
    Reached { connection, forward }
}

#[test]
fn a_hosts_jupyter_client_plots_interrupts_and_restarts() {
    let python = Python::with("jupyter_client.txt");
    let copies = Copies::of("jupyter-kernel", &["-n", "2"]);
    let mut reached: Vec<_> = (0..2).map(|at| reach(&copies, at)).collect();
    let file = |at: usize| reached[at].connection.to_str().unwrap();
    let said: Vec<Value> =
        (0..2).map(|at| python.json("jupyter_client_proof.py", &[file(at), file(1 - at)])).collect();
    for said in &said {
        println!("{:#}", said["seconds"]);
        assert_eq!(said["implementation"], "ipython");
        assert_eq!(said["heart_beats"], true);
        assert_eq!(said["imported"], "[]", "what had to be imported after the snapshot");
        assert_eq!(said["sum"], "6.0");
        assert_eq!(said["printed"], "here\n");
        assert_eq!(said["plot"], serde_json::json!({"width": 300, "height": 200, "corner": "ff0000ff"}));
        assert_eq!(said["error"], "ZeroDivisionError");
        assert_eq!(said["interrupted"], "KeyboardInterrupt");
        assert_eq!(said["after_interrupt"], "'still here'");
        assert_eq!(said["other_key_is_answered"], false);
        assert_eq!(said["after_restart"], "(False, True)", "a name of before, and a module");
        assert_eq!(said["count_after_restart"], 1);
    }
    for name in [
        "key",
        "session",
        "numpy",
        "random",
        "uuid",
        "message",
        "numpy_after_restart",
        "session_after_restart",
    ] {
        let drawn: Vec<_> = said.iter().map(|said| &said[name]).collect();
        assert!(drawn[0].is_string() && distinct(drawn.iter().copied()), "{name}: {drawn:?}");
    }
    // The worker evaluates in the kernel, the one of after the restart.
    assert_eq!(copies.eval(0, "kept"), "'since the restart'");
    assert_eq!(copies.eval(0, "import asyncio\nawait asyncio.sleep(0.01)\nnp.arange(4).sum().item()"), "6");
    let failed = copies.failure(&["eval", copies.id(0), "1 / 0"]);
    assert!(failed.contains("ZeroDivisionError"), "{failed}");
    copies.end();
    for reached in &mut reached {
        let _ = reached.forward.wait();
    }
}
