//! The warm worker under the real agent: waiting, order, failure, and lines that are not answers.

mod support;

use std::time::{Duration, Instant};

use forkd_abi::protocol::{Exit, Request, WorkerState, write_control};
use forkd_engine::fork::agent::{AgentClient, ClientError};
use support::{Agent, SOON, code, eventually, signal};

/// Answers each eval with a running number, and does what the code names.
const WORKER: &str = r#"
echo 'a library talks while it loads'
echo loading >&2
echo '{"ready":true}'
n=0
while read -r line; do
    n=$((n + 1))
    case "$line" in
        *crash*) echo 'out of luck' >&2; exit 3 ;;
        *slow*) sleep 0.4; echo "{\"answer\":\"slow $n\"}" ;;
        *hang*) sleep 60 ;;
        *garbage*) echo 'this is not JSON' ;;
        *twice*) echo '{"answer":"1"}'; echo '{"answer":"2"}' ;;
        *long*) head -c 3000000 /dev/zero | tr '\0' x; echo ;;
        *big*) printf '{"answer":"'; head -c 1000000 /dev/zero | tr '\0' y; echo '"}' ;;
        *deaf*) exec 1>&-; sleep 60 ;;
        *error*) echo '{"error":"no","output":"printed"}' ;;
        *) echo "{\"answer\":\"$n\"}" ;;
    esac
done
"#;

fn failed(agent: &Agent, wanted: Exit, words: &str, stderr_has: &str) {
    let state = agent.client().status(true, SOON).unwrap().worker;
    let WorkerState::Failed { reason, exit, stderr } = &state else { panic!("{state:?}") };
    assert_eq!(*exit, wanted);
    assert!(reason.contains(words) && stderr.contains(stderr_has), "{state:?}");
    assert!(stderr.len() <= 4096);
    let result = agent.client().eval("1", SOON);
    let Err(ClientError::Agent { message }) = result else { panic!("{result:?}") };
    assert!(message.contains(words) && message.contains(stderr_has), "{message}");
}

fn answer(agent: &Agent, code: &str) -> String {
    agent.client().eval(code, SOON).unwrap().answer.unwrap()
}

#[test]
fn evals_are_answered_one_after_the_other() {
    let agent = Agent::with_worker(WORKER);
    // The first may come before the worker is ready: it waits.
    assert_eq!(answer(&agent, "a"), "1");
    assert_eq!(agent.client().status(true, SOON).unwrap().worker, WorkerState::Ready);
    assert_eq!(answer(&agent, "line\nbreak \"quoted\" \u{1F980}"), "2");
    let failed = agent.client().eval("error", SOON).unwrap();
    assert_eq!(
        (failed.answer, failed.error.as_deref(), failed.output.as_deref()),
        (None, Some("no"), Some("printed"))
    );
    let socket = agent.socket();
    let threads: Vec<_> = (0..30)
        .map(|_| {
            let client = AgentClient::connect_direct(&socket, SOON).unwrap();
            std::thread::spawn(move || {
                client.eval("x", SOON).unwrap().answer.unwrap().parse::<u32>().unwrap()
            })
        })
        .collect();
    let mut numbers: Vec<u32> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (4..34).collect::<Vec<_>>());
}

#[test]
fn a_waiting_status_answers_when_the_worker_is_ready() {
    let agent = Agent::with_worker("sleep 0.3; echo '{\"ready\":true}'; read line");
    assert_eq!(agent.client().status(false, SOON).unwrap().worker, WorkerState::Starting);
    let started = Instant::now();
    assert_eq!(agent.client().status(true, SOON).unwrap().worker, WorkerState::Ready);
    assert!(started.elapsed() > Duration::from_millis(50), "it waited");
}

#[test]
fn a_worker_that_ends_fails_what_runs_and_what_comes() {
    let agent = Agent::with_worker(WORKER);
    let result = agent.client().eval("crash", SOON);
    let Err(ClientError::Agent { message }) = result else { panic!("{result:?}") };
    assert!(message.contains("exited with code 3") && message.contains("out of luck"), "{message}");
    failed(&agent, code(3), "exited with code 3", "out of luck");
    assert_eq!(agent.run(&["echo", "alive"]).unwrap().text(), "alive\n");
}

#[test]
fn a_worker_that_cannot_start_or_never_gets_ready() {
    let agent = Agent::with_worker("echo 'no module named numpy' >&2; exit 1");
    failed(&agent, code(1), "exited with code 1", "no module named numpy");
    let agent =
        Agent::with_worker("i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done >&2; kill -9 $$");
    failed(&agent, signal(9), "killed by signal 9", "line 2999");
    let agent = Agent::with_missing_worker();
    failed(&agent, Exit::default(), "cannot run", "");
}

#[test]
fn lines_that_are_no_answers_end_the_worker() {
    let agent = Agent::with_worker(WORKER);
    let result = agent.client().eval("garbage", SOON);
    assert!(matches!(result, Err(ClientError::Agent { .. })), "{result:?}");
    failed(&agent, signal(9), "something other than a JSON answer", "loading");
    // With an answer too many, the next eval would get the wrong one.
    let agent = Agent::with_worker(WORKER);
    assert_eq!(answer(&agent, "twice"), "1");
    eventually("it is ended", || agent.client().status(true, SOON).unwrap().worker != WorkerState::Ready);
    failed(&agent, signal(9), "nobody asked for", "loading");
    let agent = Agent::with_worker(WORKER);
    assert!(agent.client().eval("deaf", SOON).is_err());
    failed(&agent, signal(9), "killed by signal 9", "loading");
}

#[test]
fn answers_have_a_longest_length() {
    let agent = Agent::with_worker(WORKER);
    assert_eq!(answer(&agent, "big").len(), 1_000_000);
    let result = agent.client().eval("long", SOON);
    assert!(
        matches!(&result, Err(ClientError::Agent { message }) if message.contains("longer")),
        "{result:?}"
    );
    assert_eq!(answer(&agent, "x"), "3", "the worker goes on");
    let code = "x".repeat(1_000_000);
    assert_eq!(answer(&agent, &code), "4", "code as long as a frame");
}

#[test]
fn an_eval_whose_host_has_gone_gives_its_answer_to_nobody() {
    let agent = Agent::with_worker(WORKER);
    agent.client().status(true, SOON).unwrap();
    let mut running = agent.raw();
    write_control(&mut running, &Request::Eval { code: "slow".to_owned() }).unwrap();
    let mut waiting = agent.raw();
    write_control(&mut waiting, &Request::Eval { code: "y".to_owned() }).unwrap();
    eventually("both have arrived", || agent.client().status(false, SOON).unwrap().connections == 3);
    drop(running);
    drop(waiting);
    eventually("both have gone", || agent.client().status(false, SOON).unwrap().connections == 1);
    assert_eq!(answer(&agent, "x"), "2", "the first ran to its end, the second never began");
}

#[test]
fn a_worker_that_hangs_holds_up_evals_only() {
    let agent = Agent::with_worker(WORKER);
    let limit = Duration::from_millis(200);
    let result = agent.client().eval("hang", limit);
    assert!(matches!(result, Err(ClientError::Timeout { .. })), "{result:?}");
    let result = agent.client().eval("x", limit);
    assert!(matches!(result, Err(ClientError::Timeout { .. })), "{result:?}");
    agent.client().ping(SOON).unwrap();
    assert_eq!(agent.run(&["echo", "alive"]).unwrap().text(), "alive\n");
}
