//! Copies of a real Linux guest are machines of their own: nothing that must be unique comes twice, and each has what the
//! command line gives it. Ten of them; `make soak` looks at a hundred (`FORKD_SOAK=full`). Needs what `linux.rs` needs,
//! and root, for the network.

#[path = "linux/harness.rs"]
mod harness;

use harness::{Bed, Hub, distinct, soak};
use serde_json::Value;
use std::time::{SystemTime, UNIX_EPOCH};

/// Prints what a copy is, as one JSON array.
const WHO: &str = r#"
import fcntl, json, os, socket, struct, sys
with socket.socket() as s:
    address = socket.inet_ntoa(fcntl.ioctl(s, 0x8915, struct.pack("256s", b"eth0"))[20:24])
    mac = fcntl.ioctl(s, 0x8927, struct.pack("256s", b"eth0"))[18:24].hex(":")
machine_id = open("/etc/machine-id").read().strip()
sys.stdout.write(json.dumps([os.urandom(32).hex(), machine_id, socket.gethostname(), mac, address,
    float(numpy.random.random()), os.environ["SHARD"], os.environ["MODE"]]))
None
"#;
const UNIQUE: [&str; 6] = ["urandom", "machine id", "host name", "MAC", "address", "numpy's generator"];
const SHARDS: [&str; 3] = ["alpha", "", "gamma=1"];

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

#[test]
fn no_two_copies_share_what_must_be_unique() {
    let full = soak();
    let (count, sample) = if full { (100, 100) } else { (10, 4) };
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let vary = format!("SHARD={}", SHARDS.join(","));
    let number = count.to_string();
    let mut arguments = vec!["fork", "--tag", "python-numpy", "-n", &number, "--detach", "--net", "isolated"];
    arguments.extend(["--vary", &vary, "--env", "MODE=a b", "--eval", WHO]);
    let report = bed.json(&hub, &arguments);
    let children = report["children"].as_array().unwrap();
    assert_eq!(children.len(), count);
    let answers: Vec<Value> = children
        .iter()
        .map(|child| serde_json::from_str(child["answer"].as_str().unwrap()).unwrap())
        .collect();
    for (at, what) in UNIQUE.iter().enumerate() {
        assert!(distinct(answers.iter().map(|answer| &answer[at])), "{what} comes twice: {answers:?}");
    }
    for (number, (child, answer)) in children.iter().zip(&answers).enumerate() {
        assert_eq!((&answer[6], &answer[7]), (&SHARDS[number % 3].into(), &"a b".into()), "{answer}");
        let network = &child["network"];
        assert_eq!((&answer[3], &answer[4]), (&network["mac"], &network["address"]), "{answer}");
    }
    // All at once they start late, and still must know what time it is.
    let mut worst: f64 = 0.0;
    for child in children.iter().take(sample) {
        let id = child["id"].as_str().unwrap();
        let before = now();
        let answer = bed.json(&hub, &["eval", id, "__import__('time').time()"]);
        let (clock, after): (f64, f64) = (answer["answer"].as_str().unwrap().parse().unwrap(), now());
        let off = (before - clock).max(clock - after);
        assert!(off < 1.0, "the clock of {id} is {off} s off");
        worst = worst.max(off);
    }
    println!("{count} copies, the worst clock of {sample} at most {worst:.3} s off");
    // What is started later sees it too.
    let id = children[2]["id"].as_str().unwrap();
    let shell = bed.json(&hub, &["exec", id, "--", "sh", "-c", "echo $SHARD; exec printenv MODE"]);
    assert_eq!(shell["stdout"], "gamma=1\na b\n");
    bed.run(&hub, &["kill", "--all"]).success();
    bed.assert_nothing_left(children.iter().map(|child| child["pid"].as_i64().unwrap()));
}

#[test]
fn an_environment_that_does_not_fit_is_refused_by_its_size() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let long = format!("LONG={}", "x".repeat(3600));
    let cases: [(&[&str], &str); 3] = [
        (&["--env", &long], "3584"),
        (&["--env", "A=1", "--vary", "A=1,2"], "A is given twice"),
        (&["--env", "nothing"], "NAME=VALUE"),
    ];
    for (arguments, said) in cases {
        let (code, text) = bed.run(&hub, &[&["fork", "--tag", "python-numpy"], arguments].concat()).both();
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains(said), "{arguments:?} does not say {said}: {text}");
    }
    let longest = format!("LONG={}", "x".repeat(3584 - 6));
    let code = "len(__import__('os').environ['LONG'])";
    let report = bed.json(&hub, &["fork", "--tag", "python-numpy", "--env", &longest, "--eval", code]);
    assert_eq!(report["children"][0]["answer"], "3578");
}
