//! What a machine is asked while it is built: the recipe's rehearsal and its probes.

use super::error::BuildError;
use super::rig::BuildMachine;
use crate::build::recipe::{Probe, Rehearse};
use crate::fork::agent::AgentClient;
use crate::fork::ask::ChildRequest;
use forkd_abi::protocol::{Answer, ExecRequest, Exit};
use std::io;
use std::time::Duration;

/// How long a question may take that nothing has been done for yet: minutes where KVM emulates the guest's kernel.
const FIRST_TIMEOUT: Duration = Duration::from_secs(900);
/// Most that is kept of what a program prints, in bytes.
const OUTPUT_MAX: usize = 1 << 20;
/// The agent as a client of HTTP in its own machine.
const GET: [&str; 2] = ["/forkd/agent", "--get"];

/// The question that a probe is, as a child is asked it.
pub(super) fn request(probe: &Probe) -> ChildRequest {
    match (&probe.eval, &probe.exec, &probe.http) {
        (Some(code), _, _) => ChildRequest::Eval(code.clone()),
        (None, Some(argv), _) => ChildRequest::Exec(argv.clone()),
        (None, None, Some(url)) => ChildRequest::Exec(get(url)),
        (None, None, None) => ChildRequest::Ping,
    }
}

fn get(url: &str) -> Vec<String> {
    GET.into_iter().chain([url]).map(str::to_owned).collect()
}

/// Does what copies will do first.
pub(super) fn rehearse(machine: &BuildMachine<'_>, rehearse: &Rehearse) -> Result<(), BuildError> {
    let evals = rehearse.evals.iter().cloned().map(ChildRequest::Eval);
    let execs = rehearse.execs.iter().cloned().map(ChildRequest::Exec);
    let requests = rehearse.requests.iter().map(|url| ChildRequest::Exec(get(url)));
    for request in evals.chain(execs).chain(requests) {
        machine.interrupt.check()?;
        let Err(found) = ask(machine.agent("rehearsing")?, "rehearsing", &request)? else { continue };
        return Err(BuildError::Rehearsal { what: shown(&request), found });
    }
    Ok(())
}

/// Asks a probe and compares its answer.
pub(super) fn prove(machine: &BuildMachine<'_>, probe: &Probe) -> Result<(), BuildError> {
    machine.interrupt.check()?;
    let answer = ask(machine.agent("probing")?, "probing", &request(probe))?;
    check_answer(
        probe,
        answer.as_ref().ok().and_then(Option::as_deref),
        answer.as_ref().err().map(String::as_str),
    )
}

/// Asks. The inner result is the answer, or what the machine says went wrong.
fn ask(
    agent: AgentClient,
    doing: &'static str,
    request: &ChildRequest,
) -> Result<Result<Option<String>, String>, BuildError> {
    let failed = |source| BuildError::Agent { doing, source };
    match request {
        ChildRequest::Eval(code) => {
            let Answer { answer, error, .. } = agent.eval(code, FIRST_TIMEOUT).map_err(failed)?;
            Ok(error.map_or(Ok(answer), Err))
        }
        ChildRequest::Exec(argv) => {
            let (mut stdout, mut stderr) = (Capped::default(), Capped::default());
            let request = ExecRequest { argv: argv.clone(), ..ExecRequest::default() };
            let exit =
                agent.exec(request, None, &mut stdout, &mut stderr, Some(FIRST_TIMEOUT)).map_err(failed)?;
            Ok(if exit.code == Some(0) { Ok(Some(stdout.text())) } else { Err(why(exit, &stderr.text())) })
        }
        ChildRequest::Ping | ChildRequest::Nothing => {
            agent.ping(FIRST_TIMEOUT).map_err(failed).map(|()| Ok(None))
        }
    }
}

fn why(exit: Exit, stderr: &str) -> String {
    let ended = match (exit.code, exit.signal) {
        (Some(code), _) => format!("exit code {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or(0)),
    };
    let last = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    if last.is_empty() { ended } else { format!("{ended}: {last}") }
}

/// Compares what the probe was answered with what it should be: a value, or why there is none.
pub(super) fn check_answer(
    probe: &Probe,
    value: Option<&str>,
    error: Option<&str>,
) -> Result<(), BuildError> {
    let wrong = match &probe.expect {
        Some(expected) => (error.is_some() || value != Some(expected)).then_some(expected.as_str()),
        None => error.is_some().then_some("without an error"),
    };
    let Some(expected) = wrong else { return Ok(()) };
    let found = error.map(|error| format!("the error {error}")).or_else(|| value.map(str::to_owned));
    Err(BuildError::Probe {
        code: shown(&request(probe)),
        found: found.unwrap_or_else(|| "nothing".to_owned()),
        expected: expected.to_owned(),
    })
}

fn shown(request: &ChildRequest) -> String {
    match request {
        ChildRequest::Eval(code) => code.clone(),
        ChildRequest::Exec(argv) => match argv.strip_prefix(&GET.map(str::to_owned)) {
            Some(url) => url.join(" "),
            None => argv.join(" "),
        },
        ChildRequest::Ping | ChildRequest::Nothing => String::new(),
    }
}

/// Keeps the first [`OUTPUT_MAX`] bytes.
#[derive(Default)]
struct Capped(Vec<u8>);

impl Capped {
    /// Without the last line's end.
    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        text.strip_suffix('\n').unwrap_or(&text).to_owned()
    }
}

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = OUTPUT_MAX.saturating_sub(self.0.len()).min(bytes.len());
        self.0.extend_from_slice(&bytes[..room]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_compared_letter_by_letter() {
        let probe = |expect: Option<&str>| Probe {
            exec: Some(vec!["/bin/echo".to_owned(), "hello".to_owned()]),
            expect: expect.map(str::to_owned),
            ..Probe::default()
        };
        check_answer(&probe(None), None, None).unwrap();
        check_answer(&probe(Some("x")), Some("x"), None).unwrap();
        let told = |probe, value, error| check_answer(&probe, value, error).unwrap_err().to_string();
        assert_eq!(told(probe(Some("x")), Some("y"), None), "the probe `/bin/echo hello` answered y, not x");
        assert_eq!(
            told(probe(None), None, Some("exit code 1")),
            "the probe `/bin/echo hello` answered the error exit code 1, not without an error"
        );
    }

    #[test]
    fn urls_are_got_by_the_agent() {
        let probe = Probe { http: Some("http://127.0.0.1/".to_owned()), ..Probe::default() };
        let request = request(&probe);
        assert_eq!(shown(&request), "http://127.0.0.1/");
        let ChildRequest::Exec(argv) = request else { panic!() };
        assert_eq!(argv, ["/forkd/agent", "--get", "http://127.0.0.1/"]);
        let exit = Exit { code: Some(1), signal: None };
        assert_eq!(why(exit, "one\nstatus 404\n\n"), "exit code 1: status 404");
        assert_eq!(why(Exit { code: None, signal: Some(9) }, ""), "signal 9");
    }
}
