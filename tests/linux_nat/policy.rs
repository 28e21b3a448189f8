//! The policy table: each row is tried from a guest as root, and the internet and the host are looked at for what came.
//!
//! `cargo test --release --test linux_nat policy -- --nocapture` prints it for docs/SECURITY.md.

use super::internet::SECRET;
use super::lab::{Guest, Lab};
use super::rows::{self, Group, Row};

/// What the sibling of the child that tries things listens with.
const SIBLING: &str = "import socket, threading\nserver = socket.create_server(('0.0.0.0', 7000))\n\
    def greet():\n    while True: server.accept()[0].sendall(b'here\\n')\n\
    threading.Thread(target=greet, daemon=True).start()";

#[test]
fn without_rules_what_is_public_is_open_and_nothing_else() {
    try_group(&rows::WITHOUT);
}

#[test]
fn with_names_nothing_is_open_but_what_they_lead_to() {
    try_group(&rows::BY_NAME);
}

#[test]
fn an_alias_opens_no_more_than_itself() {
    try_group(&rows::BY_ALIAS);
}

#[test]
fn what_is_denied_is_shut_though_public_is_open() {
    try_group(&rows::BUT_DENIED);
}

#[test]
fn what_is_inside_is_open_where_a_rule_names_it() {
    try_group(&rows::INSIDE);
}

fn try_group(group: &Group) {
    let lab = Lab::new();
    let guests = lab.fork(2, group.options);
    let [guest, sibling] = &guests[..] else { panic!("two children were asked for") };
    lab.eval(sibling, SIBLING);
    lab.teach(guest);
    lab.eval(guest, &format!("SIBLING = '{}'", sibling.address));
    let options = group.options.iter().map(|option| option.replace('=', " ")).collect::<Vec<_>>();
    let rules = if options.is_empty() { "no rules".to_owned() } else { format!("`{}`", options.join(" ")) };
    println!("\n{rules}\n\n| attempt | what happened |\n|---|---|");
    let mut wrong = Vec::new();
    for row in group.rows {
        if let Err(said) = try_row(&lab, guest, row) {
            wrong.push(format!("{}, {}: {said}", row.attempt, row.code));
        }
    }
    lab.kill_all();
    assert!(wrong.is_empty(), "{} rows are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

fn try_row(lab: &Lab, guest: &Guest, row: &Row) -> Result<(), String> {
    (row.before)(&lab.internet);
    let mark = lab.internet.mark();
    let answer = lab.eval(guest, row.code);
    let happened = answer.trim_matches(['\'', '"']);
    println!("| {} | {happened} |", row.attempt);
    let as_it_should =
        if row.open { happened.starts_with("open: ") } else { happened.starts_with("refused: ") };
    if !as_it_should || happened.contains(SECRET) {
        return Err(happened.to_owned());
    }
    if row.unseen.is_empty() {
        return Ok(());
    }
    let seen = lab.internet.seen_since(&mark).into_iter().find(|line| line.contains(row.unseen));
    seen.map_or(Ok(()), |line| Err(format!("{happened}, but there was {line}")))
}
