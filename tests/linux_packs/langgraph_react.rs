//! `langgraph-react`: three copies of an agent that has made its first decision each carry out another one. The model is a
//! server of the test.

use super::lab::{Guest, Lab};
use serde_json::Value;
use std::fs;

/// A tool, what it says of 1729, and of 1995.
const TOOLS: [(&str, &str, &str); 3] = [
    ("factors", "7 x 13 x 19", "3 x 5 x 7 x 19"),
    ("roman", "MDCCXXIX", "MCMXCV"),
    ("weekday", "Saturday", "Sunday"),
];

#[test]
fn three_copies_take_three_tools_and_answer_as_these_say() {
    let mut lab = Lab::new();
    let asked = lab.bed.path("asked.jsonl");
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/langgraph-react/model.py");
    let arguments = [model, "198.51.100.7", "8000", "the test"];
    lab.internet.serve("python3", &arguments, "198.51.100.7:8000", &asked);
    let guests = lab.fork_of(
        "langgraph-react",
        TOOLS.len(),
        &[
            "--allow=plain.test:8000",
            "--env=OPENAI_BASE_URL=http://plain.test:8000/v1",
            "--vary=TOOL=factors,roman,weekday",
        ],
    );
    let each = |code: &str| -> Vec<String> {
        std::thread::scope(|scope| {
            let ask = |guest: &'_ Guest| {
                let (lab, id) = (&lab, guest.id.clone());
                scope.spawn(move || lab.eval(&Guest { id, address: String::new() }, code))
            };
            let asking: Vec<_> = guests.iter().map(ask).collect();
            asking.into_iter().map(|asking| asking.join().unwrap()).collect()
        })
    };
    // All begin where the machine stopped.
    assert!(each("waiting()").iter().all(|decision| decision == "('factors', {'number': 1729})"));
    let answers = each("take(os.environ['TOOL'])");
    let said = |what: &str| format!("'the test says: {what}'");
    assert_eq!(answers, TOOLS.map(|(_, of_1729, _)| said(of_1729)));
    // Another question: now the first decision, too, is the server's.
    let answers = each("[ask('What is special about 1995?', os.environ['TOOL']), take()]");
    let both = TOOLS.map(|(tool, _, of_1995)| format!("[('{tool}', {{'number': 1995}}), {}]", said(of_1995)));
    assert_eq!(answers, both);
    let ids = each("messages()[1].id");
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2], "{ids:?}");

    let lines = fs::read_to_string(&asked).unwrap();
    let requests: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(requests.len(), 9, "{lines}");
    for (tool, of_1729, of_1995) in TOOLS {
        for content in [of_1729, of_1995] {
            let carried_out = |request: &&Value| {
                request["asked"]["role"] == "tool"
                    && request["asked"]["name"] == tool
                    && request["asked"]["content"] == content
            };
            assert_eq!(requests.iter().filter(carried_out).count(), 1, "{tool} {content}: {lines}");
        }
    }
    lab.kill_all();
}
