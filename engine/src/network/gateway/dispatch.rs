//! What becomes of each frame of a child: its connection or flow, the resolver, or a refusal.

use super::child::{ChildGateway, DNS_PORT, KnownFlow};
use super::connection::{self, Service};
use super::datagrams;
use super::flow::DatagramFlow;
use super::frame::{Flow, Incoming};
use crate::network::policy::{Refusal, Side, Transport};
use std::rc::Rc;

impl ChildGateway {
    /// Acts on a frame of the child.
    pub fn on_frame(self: &Rc<Self>, frame: &[u8]) {
        self.traffic.sent(frame.len());
        match self.wire.read(frame) {
            Incoming::Arp(reply) => self.stack().send(reply),
            Incoming::Tcp { flow, opens, packet } => self.on_segment(flow, opens, packet),
            Incoming::Udp { flow, payload, packet } => self.on_datagram(flow, payload, packet),
            Incoming::Ping(packet) => self.stack().take(packet),
            Incoming::Other { what, packet } => self.refuse_packet(what, Refusal::Protocol, packet),
            Incoming::Nobodys => self.traffic.dropped(),
        }
    }

    /// Whether the child may go there.
    fn check(&self, transport: Transport, flow: Flow) -> Result<(), Refusal> {
        let (address, port) = flow.to;
        if port == 0 {
            return Err(Refusal::NoPort);
        }
        if address == self.wire.gateway {
            return Err(Refusal::Host);
        }
        let side = if self.shared.routes.is_own(address) { Side::Host } else { Side::of(address) };
        self.shared.policy.connection(transport, flow.to, side, &self.names)
    }

    fn has_room(&self) -> Result<(), Refusal> {
        let room = self.flows.borrow().len() < self.shared.flows_max;
        if room { Ok(()) } else { Err(Refusal::TooMany) }
    }

    fn on_segment(self: &Rc<Self>, flow: Flow, opens: bool, packet: &[u8]) {
        let key = (Transport::Tcp, flow);
        match self.flows.borrow().get(&key) {
            // It asks again for what is not decided yet.
            Some(KnownFlow::Connection { answered: false }) => return,
            Some(_) => return self.stack().take(packet),
            None => {}
        }
        if !opens {
            // The stack says that there is no such connection.
            return self.stack().take(packet);
        }
        let is_dns = flow.to == (self.wire.gateway, DNS_PORT);
        let checked = if is_dns {
            Ok(Service::Names)
        } else {
            self.check(Transport::Tcp, flow).map(|()| Service::Host)
        };
        match checked.and_then(|service| self.has_room().map(|()| service)) {
            Ok(service) => {
                self.flows.borrow_mut().insert(key, KnownFlow::Connection { answered: false });
                self.spawn(connection::serve(Rc::clone(self), flow, packet.to_vec(), service));
            }
            Err(refusal) => {
                self.traffic.refused(format!("tcp {}:{}", flow.to.0, flow.to.1), refusal);
                // Nobody listens there: the stack resets it.
                self.stack().take(packet);
            }
        }
    }

    fn on_datagram(self: &Rc<Self>, flow: Flow, payload: &[u8], packet: &[u8]) {
        let key = (Transport::Udp, flow);
        if let Some(KnownFlow::Datagrams(known)) = self.flows.borrow().get(&key) {
            return known.send(payload);
        }
        if flow.to == (self.wire.gateway, DNS_PORT) {
            // Questions are no flows: many come from one port at once. They have a limit of their own.
            return self.spawn(datagrams::answer_question(Rc::clone(self), flow, payload.to_vec()));
        }
        match self.check(Transport::Udp, flow).and_then(|()| self.has_room()) {
            Ok(()) => match DatagramFlow::open(flow) {
                Ok(opened) => {
                    let opened = Rc::new(opened);
                    opened.send(payload);
                    self.flows.borrow_mut().insert(key, KnownFlow::Datagrams(Rc::clone(&opened)));
                    self.spawn(datagrams::serve(Rc::clone(self), flow, opened));
                }
                Err(error) => tracing::debug!(%error, ?flow, "a flow of datagrams cannot be opened"),
            },
            Err(refusal) => {
                self.refuse_packet(format!("udp {}:{}", flow.to.0, flow.to.1), refusal, packet);
            }
        }
    }

    fn refuse_packet(&self, what: String, why: Refusal, packet: &[u8]) {
        self.traffic.refused(what, why);
        if let Some(frame) = self.wire.prohibited(packet) {
            self.stack().send(frame);
        }
    }
}
