//! Running a machine's vCPUs, each on a thread of its own, until one of them ends the run.

use crate::devices::bus::{Bus, PortWrite};
use crate::devices::doorbell::Ring;
use crate::kvm::KvmKind;
use crate::pvm::{self, InstructionMender, PvmError};
use crate::sys::{self, ThreadId};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// Pause between the first two signals to a vCPU that is to leave the guest: one that was about to enter it may miss the
/// first. Each pause is twice the one before. Signals queue up, and a vCPU that got them faster than it takes them would
/// never come to see that it is to stop.
const KICK_PAUSE: Duration = Duration::from_micros(200);
const KICK_PAUSE_MAX: Duration = Duration::from_millis(50);
/// Most entries that completing one instruction takes (a page-crossing access has two parts).
const COMPLETIONS_MAX: usize = 16;

/// A machine's vCPUs cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VcpuRunError {
    /// kvm_pvm.
    #[error(transparent)]
    Pvm(#[from] PvmError),
    /// The signal that stops vCPUs.
    #[error("the signal that stops vCPUs cannot be set up")]
    Kicks(#[source] io::Error),
    /// The vCPU stopped in a way that nobody knows.
    #[error("the vCPU stopped with {exit}")]
    Exit {
        /// How.
        exit: String,
    },
    /// A vCPU does not come to the end of an instruction.
    #[error("a vCPU could not be stopped between two instructions")]
    Unfinished,
    /// KVM_RUN failed.
    #[error("KVM_RUN failed")]
    Run(#[source] vmm_sys_util::errno::Error),
}

/// Why [`crate::machine::Machine::run`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The callback asked for it.
    Asked,
    /// The guest reset itself or crashed so hard that its CPU did.
    Reset,
}

/// Whether to go on after a ring of the doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterRing {
    /// Run on.
    Continue,
    /// Leave [`crate::machine::Machine::run`], the instruction done.
    Stop,
}

/// What the vCPUs of one run share.
struct Run<'a, F> {
    vm: &'a VmFd,
    bus: &'a Bus,
    ram: &'a GuestMemoryMmap,
    kind: KvmKind,
    on_ring: Mutex<F>,
    stopping: AtomicBool,
    /// Whether a vCPU that has stopped is signalling the others.
    kicking: AtomicBool,
    outcome: Mutex<Option<Result<StopReason, VcpuRunError>>>,
    threads: Vec<Mutex<Option<ThreadId>>>,
}

/// What came of one exit.
enum Step {
    Continue,
    Stop(StopReason),
}

/// Runs all `vcpus` until `on_ring` stops them or the guest resets itself. The first one runs on this thread.
/// Afterwards no vCPU has an instruction half done.
pub fn run<F: FnMut(Ring) -> AfterRing + Send>(
    vcpus: &mut [VcpuFd],
    vm: &VmFd,
    bus: &Bus,
    ram: &GuestMemoryMmap,
    kind: KvmKind,
    on_ring: F,
) -> Result<StopReason, VcpuRunError> {
    let run = Run {
        vm,
        bus,
        ram,
        kind,
        on_ring: Mutex::new(on_ring),
        stopping: AtomicBool::new(false),
        kicking: AtomicBool::new(false),
        outcome: Mutex::new(None),
        threads: vcpus.iter().map(|_| Mutex::new(None)).collect(),
    };
    if vcpus.len() > 1 {
        sys::prepare_kicks().map_err(VcpuRunError::Kicks)?;
    }
    std::thread::scope(|scope| {
        let mut numbered = vcpus.iter_mut().enumerate();
        let first = numbered.next();
        for (number, vcpu) in numbered {
            let run = &run;
            scope.spawn(move || run.vcpu(number, vcpu));
        }
        if let Some((number, vcpu)) = first {
            run.vcpu(number, vcpu);
        }
    });
    let outcome = run.outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
    outcome.unwrap_or(Ok(StopReason::Reset))
}

impl<F: FnMut(Ring) -> AfterRing> Run<'_, F> {
    fn vcpu(&self, number: usize, vcpu: &mut VcpuFd) {
        *lock(&self.threads[number]) = Some(sys::this_thread());
        let mut mender = InstructionMender::default();
        while !self.stopping.load(Ordering::Acquire) {
            match self.step(vcpu, &mut mender) {
                Ok(Step::Continue) => {}
                Ok(Step::Stop(stop)) => self.conclude(Ok(stop)),
                Err(error) => self.conclude(Err(error)),
            }
        }
        if let Err(error) = self.finish_instruction(vcpu) {
            self.conclude(Err(error));
        }
        *lock(&self.threads[number]) = None;
        self.kick_others();
    }

    /// The first outcome counts, as what other vCPUs run into while they stop is a consequence; but a machine that
    /// could not be stopped in good order has not stopped.
    fn conclude(&self, outcome: Result<StopReason, VcpuRunError>) {
        let mut known = lock(&self.outcome);
        match (&*known, &outcome) {
            (None, _) | (Some(Ok(_)), Err(_)) => *known = Some(outcome),
            _ => {}
        }
        drop(known);
        self.stopping.store(true, Ordering::Release);
    }

    /// Signals every vCPU that may still be in the guest, until none is; unless another has begun to.
    fn kick_others(&self) {
        if self.kicking.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut pause = KICK_PAUSE;
        loop {
            let inside: Vec<_> = self.threads.iter().filter_map(|thread| *lock(thread)).collect();
            if inside.is_empty() {
                return;
            }
            inside.into_iter().for_each(sys::kick);
            std::thread::sleep(pause);
            pause = KICK_PAUSE_MAX.min(pause * 2);
        }
    }

    fn step(&self, vcpu: &mut VcpuFd, mender: &mut InstructionMender) -> Result<Step, VcpuRunError> {
        let exit = vcpu.run();
        self.bus.resume_devices();
        match exit {
            Ok(VcpuExit::IoOut(port, bytes)) => match self.bus.port_write(port, bytes) {
                PortWrite::Done => {}
                PortWrite::Reset => return Ok(Step::Stop(StopReason::Reset)),
                PortWrite::Rang(ring) => {
                    if lock(&self.on_ring)(ring) == AfterRing::Stop {
                        return Ok(Step::Stop(StopReason::Asked));
                    }
                }
            },
            Ok(VcpuExit::IoIn(port, bytes)) => self.bus.port_read(port, bytes),
            Ok(VcpuExit::MmioRead(address, bytes)) => self.bus.mmio_read(address, bytes),
            Ok(VcpuExit::MmioWrite(address, bytes)) => self.bus.mmio_write(address, bytes),
            Ok(VcpuExit::X86Wrmsr(exit)) => {
                let (index, value) = (exit.index, exit.data);
                *exit.error = 0;
                pvm::write_msr(vcpu, self.ram, index, value)?;
            }
            Ok(VcpuExit::InternalError) if self.kind == KvmKind::Pvm => {
                mender.mend(self.vm, vcpu, self.ram)?;
            }
            Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => return Ok(Step::Stop(StopReason::Reset)),
            Ok(exit) => return Err(VcpuRunError::Exit { exit: format!("{exit:?}") }),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
            Err(error) => return Err(VcpuRunError::Run(error)),
        }
        Ok(Step::Continue)
    }

    /// KVM completes an I/O instruction only when it is entered again; this enters it until nothing is left to
    /// complete.
    fn finish_instruction(&self, vcpu: &mut VcpuFd) -> Result<(), VcpuRunError> {
        vcpu.set_kvm_immediate_exit(1);
        let mut finished = Err(VcpuRunError::Unfinished);
        for _ in 0..COMPLETIONS_MAX {
            match vcpu.run() {
                Err(_) => {
                    finished = Ok(());
                    break;
                }
                Ok(VcpuExit::IoIn(port, bytes)) => self.bus.port_read(port, bytes),
                Ok(VcpuExit::MmioRead(address, bytes)) => self.bus.mmio_read(address, bytes),
                Ok(VcpuExit::MmioWrite(address, bytes)) => self.bus.mmio_write(address, bytes),
                Ok(VcpuExit::IoOut(port, bytes)) => drop(self.bus.port_write(port, bytes)),
                Ok(exit) => {
                    finished = Err(VcpuRunError::Exit { exit: format!("{exit:?}") });
                    break;
                }
            }
        }
        vcpu.set_kvm_immediate_exit(0);
        finished
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
