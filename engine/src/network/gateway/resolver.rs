//! The resolver that children ask for names: the policy first, then the host's name servers by hickory.
//!
//! Only it opens addresses by name. It answers for IPv4: children have nothing else.

use super::child::ChildGateway;
use crate::network::names::TTL_MIN;
use crate::network::policy::Refusal;
use hickory_resolver::proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_resolver::proto::rr::rdata::A;
use hickory_resolver::proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::io;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// Longest answer in a datagram: what everybody can take (RFC 1035, 4.2.1), and what those who say so can (RFC 9715).
const DATAGRAM: (usize, usize) = (512, 1232);
/// How long a connection of questions may be silent.
const IDLE: Duration = Duration::from_secs(10);

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// UDP: the answer has to fit.
    Datagram,
    /// TCP.
    Stream,
}

/// The answer to a question; `None` to what is no question at all.
pub async fn answer(child: &Rc<ChildGateway>, question: &[u8], carrier: Carrier) -> Option<Vec<u8>> {
    let question = Message::from_vec(question).ok()?;
    if question.metadata.message_type != MessageType::Query {
        return None;
    }
    let mut reply = Message::response(question.metadata.id, question.metadata.op_code);
    reply.metadata.recursion_desired = question.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    let outcome = match &question.queries[..] {
        _ if question.metadata.op_code != OpCode::Query => Err(ResponseCode::NotImp),
        [query] if query.query_class() == DNSClass::IN => {
            reply.add_query(query.clone());
            resolve(child, query).await
        }
        _ => Err(ResponseCode::FormErr),
    };
    match outcome {
        Ok(records) => drop(reply.add_answers(records)),
        Err(code) => reply.metadata.response_code = code,
    }
    let said = question.edns.as_ref().map(|edns| usize::from(edns.max_payload()));
    if said.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(DATAGRAM.1 as u16);
        reply.set_edns(edns);
    }
    let bytes = reply.to_vec().ok()?;
    let room = said.map_or(DATAGRAM.0, |said| said.clamp(DATAGRAM.0, DATAGRAM.1));
    if carrier == Carrier::Datagram && bytes.len() > room {
        let mut short = reply.truncate();
        short.metadata.truncation = true;
        return short.to_vec().ok();
    }
    Some(bytes)
}

/// The records that answer a child's question, if it may ask it. What they name is open to it from now on.
async fn resolve(child: &Rc<ChildGateway>, query: &Query) -> Result<Vec<Record>, ResponseCode> {
    child.traffic.asked();
    let _question = child.ask().ok_or(ResponseCode::ServFail)?;
    let name = &*plain(query.name());
    if name == child.hostname {
        return Ok(own_address(child, query));
    }
    let policy = &child.shared.policy;
    let rules = policy.name(name).map_err(|refusal| refuse(child, name, refusal))?;
    // Other kinds of addresses lead round the policy, or nowhere.
    let other = [RecordType::AAAA, RecordType::HTTPS, RecordType::SVCB, RecordType::ANY];
    if other.contains(&query.query_type()) {
        return Ok(Vec::new());
    }
    let (mut records, left) = match child.shared.name_servers.records(query).await {
        Ok(found) => found,
        // There is the name, without records of this kind.
        Err(ResponseCode::NoError) => return Ok(Vec::new()),
        Err(code) => return Err(code),
    };
    // A name that is denied may hide behind one that is not.
    let names = records.iter().flat_map(|record| match &record.data {
        RData::CNAME(target) => vec![&record.name, &target.0],
        _ => vec![&record.name],
    });
    for alias in names {
        let alias = plain(alias);
        if policy.denies_name(&alias) {
            return Err(refuse(child, &alias, Refusal::Denied));
        }
    }
    for record in &mut records {
        record.ttl = record.ttl.min(u32::try_from(left.as_secs()).unwrap_or(u32::MAX));
        if let RData::A(address) = &record.data
            && policy.goes_by_names()
        {
            child.names.open(address.0, &rules, left.max(TTL_MIN));
        }
    }
    Ok(records)
}

/// What its own name leads to: programs look it up when they start.
fn own_address(child: &ChildGateway, query: &Query) -> Vec<Record> {
    let address = RData::A(A(child.wire.child));
    let asked = query.query_type() == RecordType::A;
    asked.then(|| Record::from_rdata(query.name().clone(), 0, address)).into_iter().collect()
}

/// A name as rules have it.
fn plain(name: &Name) -> String {
    let mut plain = name.to_lowercase().to_ascii();
    if plain.ends_with('.') {
        plain.pop();
    }
    plain
}

/// As if there were no such name: programs give up at once, and do not ask somebody else.
fn refuse(child: &ChildGateway, name: &str, refusal: Refusal) -> ResponseCode {
    // Names hold what a guest likes; to_ascii has escaped it.
    child.traffic.refused(format!("name {name}"), refusal);
    ResponseCode::NXDomain
}

/// Answers the questions of a connection, each behind its length (RFC 1035, 4.2.2).
pub async fn answer_stream(
    child: &Rc<ChildGateway>,
    stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin),
) -> io::Result<()> {
    loop {
        let length = match timeout(IDLE, stream.read_u16()).await {
            Ok(Ok(length)) => length,
            // It asks nothing more.
            _ => return Ok(()),
        };
        let mut question = vec![0; length.into()];
        timeout(IDLE, stream.read_exact(&mut question)).await??;
        let Some(answer) = answer(child, &question, Carrier::Stream).await else { return Ok(()) };
        let Ok(length) = u16::try_from(answer.len()) else { return Ok(()) };
        timeout(IDLE, stream.write_all(&[&length.to_be_bytes()[..], &answer[..]].concat())).await??;
    }
}
