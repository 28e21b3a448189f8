//! e2b-codeinterpreter over plain HTTP, through a forwarded port: what the SDK sends and parses.

use super::copies::Copies;
use super::harness::distinct;
use super::python::Python;
use serde_json::{Value, json};

const STREAMED: &str = "0\n1\n2\n";

#[test]
fn python_and_javascript_run_behind_the_code_interpreters_interface() {
    let copies = Copies::of("e2b-codeinterpreter", &["-n", "2", "--env", "GIVEN=to all"]);
    let python = Python::plain();
    let mut forwards = Vec::new();
    let mut said: Vec<Value> = Vec::new();
    for at in 0..2 {
        let (forward, ports) = copies.forward(&[copies.id(at), "49999"]);
        forwards.push(forward);
        said.push(python.json("code_interpreter_proof.py", &[&ports[0].to_string()]));
    }
    for said in &said {
        println!("{:#}", said["seconds"]);
        python_answers(&said["python"]);
        javascript_answers(&said["javascript"]);
        assert_eq!(said["health"], 200);
        assert_eq!(said["streams"], json!({"python": [STREAMED, true], "javascript": [STREAMED, true]}));
        assert_eq!(said["interrupts"], json!({"python": "still here", "javascript": "still here"}));
        let contexts = &said["contexts"];
        assert_eq!(contexts["python"], json!(["python", "/tmp", "/tmp", "5"]));
        assert_eq!(contexts["javascript"], json!(["javascript", "/tmp", "/tmp", "6"]));
        assert_eq!((&contexts["listed"], &contexts["apart"]), (&json!(true), &json!("NameError")));
        assert_eq!((&contexts["restarted"], &contexts["after"]), (&json!(204), &json!("NameError")));
        assert_eq!((&contexts["removed"], &contexts["gone"]), (&json!(204), &json!(404)));
        assert_eq!(contexts["ended"], json!(["error", "end_of_execution"]));
        assert_eq!(
            (&contexts["both"], &said["nonsense"], &said["nowhere"]),
            (&json!(400), &json!(400), &json!(404))
        );
        assert_eq!(said["language"][0], 400);
    }
    for (language, name) in [("python", "random"), ("javascript", "random")] {
        let drawn: Vec<_> = said.iter().map(|said| &said[language][name]).collect();
        assert!(drawn[0].is_string() && distinct(drawn.iter().copied()), "{language}: {drawn:?}");
    }
    // The worker evaluates in the default Python context.
    assert_eq!(copies.eval(0, "x"), "it is kept");
    copies.end();
    for mut forward in forwards {
        let _ = forward.wait();
    }
}

fn python_answers(said: &Value) {
    assert_eq!((&said["sum"], &said["last"]), (&json!("2"), &json!("end_of_execution")));
    assert_eq!((&said["string"], &said["counted"]), (&json!("it is kept"), &json!(2)));
    assert_eq!(said["kept"], json!({"stdout": "it is kept\n", "stderr": "oops\n"}));
    assert_eq!((&said["child"], &said["awaited"]), (&json!("from a child\n"), &json!("7")));
    assert_eq!(said["error"], json!(["ZeroDivisionError", "division by zero", true]));
    assert_eq!(said["syntax"], "SyntaxError");
    assert_eq!(said["unicode"], "Grüße, 世界 🎈\n");
    assert_eq!(said["env"], json!(["b", null, "to all"]));
    assert_eq!(said["imported"], "[]", "what had to be imported after the snapshot");
    assert_eq!(said["plot"], json!(["89504e470d0a1a0a", true, true]));
    assert_eq!(said["chart"], json!(["line", "Growth", "year", [[1.0, 4.0], [2.0, 5.0], [3.0, 9.0]]]));
    assert_eq!(said["frame"][0], json!({"a": [1, 2], "b": ["x", "y"]}));
    assert_eq!(said["frame"][1], true);
    let rich = json!([
        ["<b>h</b>", null, null, null, false],
        [null, {"a": 1}, null, null, false],
        [null, null, "*m*", null, false],
        [null, null, null, "$l$", true],
    ]);
    assert_eq!(said["rich"], rich);
}

fn javascript_answers(said: &Value) {
    assert_eq!(
        (&said["sum"], &said["count"], &said["last"]),
        (&json!("2"), &json!(1), &json!("end_of_execution"))
    );
    assert_eq!((&said["kept"], &said["declared_again"]), (&json!(["it is kept", "10"]), &json!("again")));
    assert_eq!(said["printed"], json!({"stdout": "out\n", "stderr": "err\n"}));
    assert_eq!(said["awaited"], "7");
    assert_eq!(said["imported"], json!(["a/b", "/", "function"]));
    assert_eq!(said["error"], json!(["TypeError", "no", true]));
    assert_eq!(said["env"], json!(["b", "undefined", "to all"]));
    assert_eq!(said["typescript"], "4");
}
