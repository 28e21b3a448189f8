//! What `forkd fork` prints for people.

use crate::output::table;
use crate::units::show_size;
use forkd_engine::fork::report::ForkReport;

/// For people.
pub(super) fn text(report: &ForkReport) -> String {
    let headings = ["CHILD", ">FIRST INSTRUCTION", ">READY", ">ANSWERED", "ANSWER"];
    let mut rows = vec![headings.map(str::to_owned).to_vec()];
    for child in &report.children {
        rows.push(vec![
            child.id.clone(),
            milliseconds(child.first_instruction_ms),
            milliseconds(child.ready_ms),
            milliseconds(child.answered_ms),
            printable_answer(child.error.as_deref(), child.exit_code, child.answer.as_deref()),
        ]);
    }
    let mut text = table(&rows);
    for child in &report.children {
        for port in &child.ports {
            text.push_str(&format!("127.0.0.1:{} -> {}:{}\n", port.local, child.id, port.guest));
        }
    }
    if report.pack.bytes_total > 0 {
        let total = show_size(report.pack.bytes_total);
        let at = |bytes: Option<u64>| bytes.map_or("-".to_owned(), show_size);
        text.push_str(&format!(
            "{}: of {total} fetched {} at the first instruction, {} when ready, {} when answered ({} requests)\n",
            report.pack.name,
            at(report.fetched.at_first_instruction),
            at(report.fetched.at_ready),
            at(report.fetched.at_answered),
            report.pack.requests,
        ));
    }
    if let (Some(pss), Some(private)) = (report.memory.pss_kib_per_child, report.memory.private_kib_per_child)
    {
        text.push_str(&format!(
            "memory of a child: {pss} KiB PSS, {private} KiB private; images {} KiB, shared\n",
            report.memory.image_kib
        ));
    }
    text
}

/// A time of a child, if it has got there.
pub(super) fn milliseconds(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.1} ms"))
}

/// What a child answered, or why it did not.
pub(super) fn printable_answer(error: Option<&str>, exit_code: Option<i32>, answer: Option<&str>) -> String {
    let code = exit_code.filter(|code| *code != 0).map(|code| format!("(exit code {code}) "));
    let answer = answer.unwrap_or_default().trim_end().replace('\n', "\n    ");
    error.map_or_else(|| code.unwrap_or_default() + &printable(&answer), |error| format!("error: {error}"))
}

/// Guests choose their answers: no control characters for the terminal, but line breaks.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}
