//! The libraries of warm workers under the real agent, in Python and in Node: the same questions to both.

mod support;

use std::path::Path;
use std::time::Duration;

use forkd_abi::protocol::Answer;
use serde_json::json;
use support::{Agent, SOON};

/// Loading Node's prompt takes a while where much else runs.
const LONG: Duration = Duration::from_secs(60);

fn library(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("workers").join(path).to_str().unwrap().to_owned()
}

fn python(serve: &str) -> Agent {
    let library = library("python");
    let program = format!("import sys\nsys.path.insert(0, {library:?})\nimport forkd_worker\n{serve}");
    let warm = json!({"argv": ["python3", "-u", "-c", program]});
    Agent::with_machine_file(&json!({ "warm": warm }).to_string())
}

fn node(options: &str) -> Agent {
    let library = library("node/forkd_worker.js");
    let program = format!("require({library:?}).serve({{ require, {options} }})");
    let warm = json!({"argv": ["node", "-e", program]});
    Agent::with_machine_file(&json!({ "warm": warm }).to_string())
}

fn ask(agent: &Agent, code: &str) -> Answer {
    agent.client().eval(code, LONG).unwrap_or_else(|error| panic!("{code}: {error}"))
}

fn value(agent: &Agent, code: &str) -> String {
    let Answer { answer, error, .. } = ask(agent, code);
    answer.unwrap_or_else(|| panic!("{code}: {error:?}"))
}

fn error(agent: &Agent, code: &str) -> String {
    ask(agent, code).error.unwrap_or_else(|| panic!("{code} has no error"))
}

/// Interrupts the worker as soon as it is busy with `code`.
fn interrupted(agent: &Agent, pid: &str, code: &str) -> String {
    let socket = agent.socket();
    let code = code.to_owned();
    let asked = std::thread::spawn(move || {
        forkd_engine::fork::agent::AgentClient::connect_direct(&socket, SOON).unwrap().eval(&code, LONG)
    });
    std::thread::sleep(Duration::from_millis(700));
    agent.run(&["kill", "-INT", pid]).unwrap();
    asked.join().unwrap().unwrap().error.unwrap()
}

#[test]
fn python_evaluates_as_its_prompt_does() {
    let agent = python("forkd_worker.serve({'given': 5}, rehearse=['given + 1'])");
    assert_eq!(value(&agent, "x = given\nx * 2"), "10");
    assert_eq!(value(&agent, "x"), "5");
    let printed = ask(&agent, "print('hi')");
    assert_eq!((printed.answer, printed.output.as_deref()), (None, Some("hi\n")));
    assert_eq!(value(&agent, "import asyncio\nawait asyncio.sleep(0.01)\n'slept'"), "'slept'");
    let trace = error(&agent, "def f():\n    raise ValueError('no')\nf()");
    assert!(trace.contains("line 2, in f") && trace.ends_with("ValueError: no"), "{trace}");
    assert!(!trace.contains("forkd_worker"), "{trace}");
    // What other programs print is no answer, and standard input is empty.
    assert_eq!(value(&agent, "import os, sys; os.system('echo sub; cat'), sys.stdin.read()"), "(0, '')");
    // Python's own exit closes standard input.
    assert!(error(&agent, "exit(3)").contains("SystemExit"));
    assert!(error(&agent, "(").contains("SyntaxError"));
    assert!(error(&agent, "'x' * 2000000").contains("2000002 characters"));
    assert_eq!(value(&agent, "len('x' * 900000)"), "900000");
    let output = ask(&agent, "print('y' * 400000)").output.unwrap();
    assert!(output.ends_with("characters more\n") && output.len() < 300_000);
}

#[test]
fn python_can_be_interrupted_and_goes_on() {
    let agent = python("forkd_worker.serve()");
    let pid = value(&agent, "import os; os.getpid()");
    // Between two evals nothing is interrupted.
    agent.run(&["kill", "-INT", &pid]).unwrap();
    for code in ["while True: pass", "import time; time.sleep(50)", "import asyncio\nawait asyncio.sleep(50)"]
    {
        assert!(interrupted(&agent, &pid, code).ends_with("KeyboardInterrupt"), "{code}");
    }
    assert_eq!(value(&agent, "1 + 1"), "2");
}

#[test]
fn another_language_can_be_evaluated() {
    let agent = python("forkd_worker.serve(evaluate=lambda code, names: code.upper(), rehearse=['x'])");
    assert_eq!(value(&agent, "select 1"), "SELECT 1");
}

#[test]
fn another_process_can_evaluate() {
    let agent = python(
        "forkd_worker.serve(elsewhere=lambda code: {'answer': code[::-1], 'error': None, 'output': 'said'})",
    );
    let said = ask(&agent, "abc");
    assert_eq!((said.answer.as_deref(), said.output.as_deref()), (Some("cba"), Some("said")));
    let agent = python("forkd_worker.serve(elsewhere=lambda code: {'answer': None, 'error': 'gone'})");
    assert_eq!(error(&agent, "abc"), "gone");
}

#[test]
fn a_worker_may_have_its_own_loop() {
    let own = "import asyncio\nforkd_worker.loop = own = asyncio.new_event_loop()\nforkd_worker.serve({'own': own})";
    let agent = python(own);
    value(&agent, "import asyncio\nasync def here(): return asyncio.get_running_loop()\n1");
    assert_eq!(value(&agent, "await here() is own"), "True");
}

#[test]
fn a_rehearsal_that_fails_is_no_worker() {
    for agent in [python("forkd_worker.serve(rehearse=['1 / 0'])"), node("rehearse: ['nothing.at.all']")] {
        let said = agent.client().eval("1", LONG).unwrap_err().to_string();
        assert!(said.contains("the rehearsal failed"), "{said}");
    }
}

#[test]
fn node_evaluates_as_its_prompt_does() {
    let agent = node("names: { given: 5 }, rehearse: ['given + 1']");
    assert_eq!(error(&agent, "throw undefined"), "Uncaught undefined");
    assert!(
        error(&agent, "({ [util.inspect.custom]() { throw new Error('shy') } })").starts_with("Error: shy")
    );
    assert_eq!(value(&agent, "const x = given; x * 2"), "10");
    assert_eq!(value(&agent, "x"), "5");
    let printed = ask(&agent, "console.log('hi')");
    assert_eq!((printed.answer, printed.output.as_deref()), (None, Some("hi\n")));
    assert_eq!(value(&agent, "await new Promise((resolve) => setTimeout(() => resolve(7), 20))"), "7");
    assert_eq!(value(&agent, "Promise.resolve({ a: 1 })"), "{ a: 1 }");
    let stack = error(&agent, "function f() {\n  throw new TypeError('no');\n}\nf()");
    assert!(stack.starts_with("TypeError: no") && stack.contains("at f ([eval]:2"), "{stack}");
    assert!(!stack.contains("forkd_worker") && !stack.contains("node:"), "{stack}");
    assert!(error(&agent, "await Promise.reject(new Error('later'))").starts_with("Error: later"));
    assert!(
        error(&agent, "await new Promise(() => setTimeout(() => { throw new Error('out'); }, 5))")
            .contains("out")
    );
    assert!(error(&agent, "let a =").contains("SyntaxError"));
    assert!(error(&agent, "'x'.repeat(2000000)").contains("2000002 characters"));
    assert_eq!(value(&agent, "require('path').join('a', 'b')"), "'a/b'");
    let output = ask(&agent, "console.log('y'.repeat(400000))").output.unwrap();
    assert!(output.ends_with("characters more\n") && output.len() < 300_000);
    assert_eq!(
        value(&agent, "require('child_process').execSync('echo sub; cat', { stdio: 'inherit' }); 1"),
        "1"
    );
}

#[test]
fn node_can_be_interrupted_and_goes_on() {
    let agent = node("");
    let pid = value(&agent, "process.pid");
    agent.run(&["kill", "-INT", &pid]).unwrap();
    for code in ["while (true) {}", "await new Promise(() => setTimeout(() => {}, 50000))"] {
        assert!(interrupted(&agent, &pid, code).contains("interrupted"), "{code}");
    }
    assert_eq!(value(&agent, "1 + 1"), "2");
}
