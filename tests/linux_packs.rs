//! The packs of `recipes/` on a real Linux guest, as their users know them. Needs what `linux.rs` needs, and a snapshot of
//! each recipe: `make test-packs` builds them and runs this.

#[path = "linux_packs/coding_agent.rs"]
mod coding_agent;
#[path = "linux_packs/coding_agent_fork.rs"]
mod coding_agent_fork;
#[path = "linux/copies.rs"]
mod copies;
#[path = "linux_packs/e2b_codeinterpreter.rs"]
mod e2b_codeinterpreter;
#[path = "linux/harness.rs"]
mod harness;
#[path = "support/internet/mod.rs"]
mod internet;
#[path = "linux_packs/jupyter_kernel.rs"]
mod jupyter_kernel;
#[path = "linux_nat/lab.rs"]
mod lab;
#[path = "linux_packs/langgraph_react.rs"]
mod langgraph_react;
#[path = "linux_packs/playwright_browser.rs"]
mod playwright_browser;
#[path = "linux_packs/python.rs"]
mod python;

use copies::Copies;
use harness::distinct;
use serde_json::Value;

fn of(tag: &str, count: usize) -> Copies {
    Copies::of(tag, &["-n", &count.to_string()])
}

/// What one copy answers.
fn value(copies: &Copies, at: usize, code: &str) -> String {
    let answer = copies.eval(at, code);
    answer.as_str().unwrap_or_else(|| panic!("{code}: {answer}")).to_owned()
}

/// How code fails in one copy.
fn failure(copies: &Copies, at: usize, code: &str) -> String {
    copies.failure(&["eval", copies.id(at), code])
}

#[test]
fn node_evaluates_and_its_copies_draw_other_numbers() {
    let copies = of("nodejs", 2);
    assert_eq!(value(&copies, 0, "require('path').join('a', 'b')"), "'a/b'");
    assert_eq!(value(&copies, 0, "await new Promise((resolve) => setTimeout(() => resolve(7), 20))"), "7");
    let stack = failure(&copies, 0, "function f() {\n  throw new TypeError('no');\n}\nf()");
    assert!(stack.contains("TypeError: no") && stack.contains("at f ([eval]:2"), "{stack}");
    for code in [
        "Math.random()",
        "crypto.randomUUID()",
        "require('crypto').randomBytes(16).toString('hex')",
        "require('crypto').generateKeyPairSync('ed25519').publicKey.export({ type: 'spki', format: 'der' }).toString('hex')",
    ] {
        let drawn: Vec<Value> = (0..2).map(|at| value(&copies, at, code).into()).collect();
        assert!(distinct(drawn.iter()), "{code}: {drawn:?}");
    }
}

#[test]
fn ten_databases_do_as_they_like_and_none_sees_another() {
    let copies = of("postgres-fixture", 10);
    let count = "select count(*) from pg_tables where schemaname = 'public'";
    for at in 0..10 {
        value(&copies, at, &format!("create table of_{at} (word text); insert into of_{at} values ('{at}')"));
    }
    for at in 0..10 {
        assert_eq!(value(&copies, at, count), "[(1,)]");
        assert_eq!(value(&copies, at, &format!("select word from of_{at}")), format!("[('{at}',)]"));
        let other = failure(&copies, at, &format!("select word from of_{}", (at + 1) % 10));
        assert!(other.contains("does not exist"), "{other}");
    }
    value(&copies, 0, "drop table of_0");
    assert_eq!(
        (value(&copies, 0, count), value(&copies, 1, count)),
        ("[(0,)]".to_owned(), "[(1,)]".to_owned())
    );
    assert_eq!(value(&copies, 0, "show fsync"), "[('off',)]");
}
