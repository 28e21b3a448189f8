//! One child's side of the gateway: what all its tasks share. Everything runs on the gateway's one thread.

use super::flow::DatagramFlow;
use super::frame::{Flow, Wire};
use super::name_servers::NameServers;
use super::stack::Stack;
use crate::network::names::NamedAddresses;
use crate::network::policy::{Policy, Transport};
use crate::network::routes::HostRoutes;
use crate::network::traffic::Traffic;
use std::cell::{Cell, RefCell, RefMut};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// The port of the resolver (RFC 1035, 4.2).
pub const DNS_PORT: u16 = 53;

/// Questions of one child that are answered at a time: each takes sockets of this process.
pub const QUESTIONS_MAX: usize = 16;

/// What the children of one fork share.
pub struct Shared {
    /// Where they may go.
    pub policy: Policy,
    /// Who knows names.
    pub name_servers: NameServers,
    /// Which addresses are the host's own.
    pub routes: HostRoutes,
    /// Connections and flows that each of them may have.
    pub flows_max: usize,
}

/// A question that is being answered.
pub struct Question(Rc<ChildGateway>);

impl Drop for Question {
    fn drop(&mut self) {
        self.0.questions.set(self.0.questions.get() - 1);
    }
}

/// What is known of a connection or flow.
pub(super) enum KnownFlow {
    /// A connection that is being made, or is there.
    Connection { answered: bool },
    /// Datagrams.
    Datagrams(Rc<DatagramFlow>),
}

/// See the module's description.
pub struct ChildGateway {
    /// The wire's ends.
    pub wire: Wire,
    /// What its machine is called.
    pub hostname: String,
    /// What it has in common with its siblings.
    pub shared: Rc<Shared>,
    /// What it did.
    pub traffic: Arc<Traffic>,
    /// The addresses that are open to it by name.
    pub names: NamedAddresses,
    /// There is work for the stack, or something to send.
    pub work: Notify,
    /// Questions that are being answered.
    questions: Cell<usize>,
    stack: RefCell<Stack>,
    pub(super) flows: RefCell<HashMap<(Transport, Flow), KnownFlow>>,
    tasks: RefCell<JoinSet<()>>,
}

impl ChildGateway {
    /// The gateway's side for a child without connections.
    pub fn new(wire: Wire, hostname: String, shared: Rc<Shared>, traffic: Arc<Traffic>) -> Rc<ChildGateway> {
        Rc::new(ChildGateway {
            wire,
            hostname,
            shared,
            traffic,
            names: NamedAddresses::default(),
            work: Notify::new(),
            questions: Cell::new(0),
            stack: RefCell::new(Stack::new(wire)),
            flows: RefCell::default(),
            tasks: RefCell::default(),
        })
    }

    /// The stack; short-lived.
    pub fn stack(&self) -> RefMut<'_, Stack> {
        self.stack.borrow_mut()
    }

    /// Puts a frame on the way to the child.
    pub fn send(&self, frame: Vec<u8>) {
        self.stack().send(frame);
        self.work.notify_one();
    }

    /// A connection's packets go to the stack from now on.
    pub fn answered(&self, flow: Flow) {
        let known = KnownFlow::Connection { answered: true };
        self.flows.borrow_mut().insert((Transport::Tcp, flow), known);
    }

    /// A connection or flow is over.
    pub fn forget(&self, transport: Transport, flow: Flow) {
        self.flows.borrow_mut().remove(&(transport, flow));
    }

    /// Has a task run for as long as the child lives.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let mut tasks = self.tasks.borrow_mut();
        // Those that are over are forgotten.
        while tasks.try_join_next().is_some() {}
        tasks.spawn_local(task);
    }

    /// A question begins; it is over when what is returned is dropped. `None` when there are too many.
    pub fn ask(self: &Rc<Self>) -> Option<Question> {
        let asked = self.questions.get();
        (asked < QUESTIONS_MAX).then(|| {
            self.questions.set(asked + 1);
            Question(Rc::clone(self))
        })
    }

    /// The child is over: its connections are, too.
    pub fn end(&self) {
        self.tasks.borrow_mut().abort_all();
    }
}
