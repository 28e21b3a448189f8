//! Flows of datagrams: a socket for each, as long as something comes or goes. And questions for names.

use super::child::ChildGateway;
use super::flow::DatagramFlow;
use super::frame::Flow;
use super::resolver::{Carrier, answer};
use crate::network::policy::Transport;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::time::timeout_at;

/// How long a flow lives without a datagram (RFC 4787, REQ-5, says at least two minutes; conntrack takes that, too).
const IDLE: Duration = Duration::from_secs(120);
/// What is read of a datagram, bytes: more than fits on the wire, so that longer ones are noticed.
const DATAGRAM_MAX: usize = 2048;

/// Gives the child what comes back, until nothing has moved for a while.
pub async fn serve(child: Rc<ChildGateway>, flow: Flow, datagrams: Rc<DatagramFlow>) {
    let _open = child.traffic.opened();
    let mut payload = vec![0; DATAGRAM_MAX];
    loop {
        let idle = datagrams.last.get() + IDLE;
        match timeout_at(idle.into(), datagrams.socket.recv(&mut payload)).await {
            Ok(Ok(bytes)) => {
                datagrams.last.set(Instant::now());
                match child.wire.datagram(flow, &payload[..bytes]) {
                    Some(frame) => child.send(frame),
                    None => tracing::debug!(bytes, ?flow, "a datagram is too long for the wire"),
                }
            }
            // Nobody listens at its port.
            Ok(Err(_)) => break,
            Err(_) if datagrams.last.get() + IDLE > Instant::now() => {}
            Err(_) => break,
        }
    }
    child.forget(Transport::Udp, flow);
}

/// Answers one question for a name.
pub async fn answer_question(child: Rc<ChildGateway>, flow: Flow, question: Vec<u8>) {
    let answered = answer(&child, &question, Carrier::Datagram).await;
    if let Some(frame) = answered.and_then(|answer| child.wire.datagram(flow, &answer)) {
        child.send(frame);
    }
}
