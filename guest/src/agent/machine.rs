//! The machine around the agent when it is PID 1: the doorbell, and what makes a copy a machine of its own.
//!
//! Only the agent's loop uses this. In tests, where the agent is an ordinary process, there is no [`Machine`].

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, symlink};
use std::thread;
use std::time::Duration;

use forkd_abi::doorbell::Command;
use forkd_abi::generation::{ENTROPY_LEN, Generation, GenerationError, NetworkIdentity, RECORD_MAX};
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::system::sethostname;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use super::network::Network;
use super::sys::{self, IoPorts};

/// A plain tmpfs file, because writing through the overlay costs ten times as much; `/etc/machine-id` leads here.
const MACHINE_ID_FILE: &str = "/run/machine-id";
/// Who is asked for names; `/etc/resolv.conf` leads here.
const RESOLVER_FILE: &str = "/run/resolv.conf";
/// Its length, bytes: always the same, so that nothing old is left behind what is written.
const RESOLVER_LEN: usize = 32;
/// What programs read, and where it leads: the host name is the kernel's own, so a copy need not write it to a file.
const LINKS: [(&str, &str); 3] = [
    ("/etc/hostname", "/proc/sys/kernel/hostname"),
    ("/etc/machine-id", MACHINE_ID_FILE),
    ("/etc/resolv.conf", RESOLVER_FILE),
];
/// How a record's entropy is shared out: this much for the kernel, the rest for the warm worker.
const KERNEL_ENTROPY: usize = ENTROPY_LEN / 2;
/// Before a snapshot, for the kernel's own work (closing connections, freeing memory) to come to rest, so that no copy
/// starts with the remains of it.
const SETTLE: Duration = Duration::from_millis(100);
/// How far a copy's clock may be from its host's when it says that it is ready, and how often that is mended.
const CLOCK_TOLERANCE_NS: u64 = 100_000_000;
const CLOCK_CORRECTIONS: u32 = 5;

/// How far the clock of a machine is put back when it boots. OpenSSL's generators, in whatever program, seed themselves anew
/// once their clock has moved by an hour, and nothing else tells them that they are copies: so it moves in every copy.
const CLOCK_BACK: Duration = Duration::from_secs(2 * 60 * 60);

/// What the resumed work needs, opened beforehand: a path lookup costs milliseconds on kvm_pvm.
pub struct Machine {
    urandom: File,
    machine_id: File,
    resolver: File,
    network: Option<Network>,
    /// Where the record is read to: pages that a copy need not fault in.
    record: Box<[u8; RECORD_MAX]>,
    generation: u64,
    /// The machine id in the record of who it is: every copy has another.
    identity: [u8; 16],
}

/// What a copy does with its seed, in hexadecimal, and its environment.
pub type BecomeCopy<'a> = dyn FnMut(&str, &BTreeMap<String, String>) + 'a;

/// [`Machine::snapshot`] or [`Machine::branch`].
pub type Ring = fn(&mut Machine, &mut BecomeCopy<'_>) -> io::Result<GoesOn>;

/// Who goes on behind the ring for a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GoesOn {
    /// The machine that rang.
    Original,
    /// A copy of it, which has taken on its identity.
    Copy,
}

impl Machine {
    /// Opens everything and gives the machine its first identity.
    pub fn new(hostname: &str) -> io::Result<Self> {
        let back = clock_ns().saturating_sub(CLOCK_BACK.as_nanos() as u64);
        if let Err(error) = set_clock(back) {
            eprintln!("forkd-agent: cannot put the clock back: {error}");
        }
        let urandom = OpenOptions::new().write(true).open("/dev/urandom")?;
        for (link, to) in LINKS {
            match fs::remove_file(link) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => symlink(to, link)?,
            }
        }
        let machine_id = overwrite(MACHINE_ID_FILE)?;
        let resolver = overwrite(RESOLVER_FILE)?;
        let network = Network::open().map_err(io::Error::other)?;
        let record = Box::new([0xff; RECORD_MAX]);
        let machine =
            Self { urandom, machine_id, resolver, network, record, generation: 0, identity: [0; 16] };
        let mut machine_id = [0; 16];
        getrandom(&mut machine_id, GetRandomFlags::empty())?;
        machine.set_names(hostname, &machine_id)?;
        Ok(machine)
    }

    /// 0 in the original machine, else which fork this is.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Tells the monitor that the agent listens. Without a doorbell nobody hears it.
    pub fn booted(&self) {
        match IoPorts::open() {
            Ok(ports) => ports.ring(Command::Booted),
            Err(error) => eprintln!("forkd-agent: no access to the doorbell: {error}"),
        }
    }

    /// Rings for a snapshot, after what makes its copies start fast.
    ///
    /// Returns in the original and in every copy, there with an identity of its own. In a copy, `become_copy` is called
    /// with a seed in hexadecimal, different in every copy, and with the copy's own environment, before "ready" is rung.
    pub fn snapshot(&mut self, become_copy: &mut BecomeCopy<'_>) -> io::Result<GoesOn> {
        // Somebody may have replaced the file since boot.
        self.machine_id = overwrite(MACHINE_ID_FILE)?;
        self.resolver = overwrite(RESOLVER_FILE)?;
        self.rehearse()?;
        rustix::fs::sync();
        thread::sleep(SETTLE);
        self.branch(become_copy)
    }

    /// Rings for a snapshot in the midst of work, which goes on as soon as it is taken. Returns as
    /// [`Machine::snapshot`] does.
    pub fn branch(&mut self, become_copy: &mut BecomeCopy<'_>) -> io::Result<GoesOn> {
        let ports = IoPorts::open()?;
        let _ = ports.read_record(&mut self.record);

        ports.ring_snapshot();

        // In every copy each instruction from here on is on the way to its first answer.
        match Generation::decode(ports.read_record(&mut self.record)) {
            Ok(record) if record.generation != 0 && record.machine_id != self.identity => {
                self.identity = record.machine_id;
                self.become_copy(&record, true);
                become_copy(&hex(&record.entropy[KERNEL_ENTROPY..]), &record.environment);
                correct_clock(&ports);
                ports.ring(Command::Ready);
                Ok(GoesOn::Copy)
            }
            // The original, going on; or no doorbell, so no snapshot was taken either.
            Ok(_) | Err(GenerationError::Magic(_)) => Ok(GoesOn::Original),
            // It would go on as somebody else, with random numbers that its siblings have too.
            Err(error) => give_up(&format!("this copy cannot tell who it is: {error}")),
        }
    }

    /// Takes on the identity in the record. Each step is tried whatever became of the one before: a copy with an old
    /// name but fresh entropy is better than one with neither.
    fn become_copy(&mut self, record: &Generation, credit: bool) {
        self.generation = record.generation;
        // First, as the time in the record grows old.
        let clock = set_clock(record.unix_time_ns);
        let mut entropy = [0; KERNEL_ENTROPY];
        entropy.copy_from_slice(&record.entropy[..KERNEL_ENTROPY]);
        let entropy = sys::add_entropy(self.urandom.as_fd(), &entropy, credit);
        let names = self.set_names(&record.hostname, &record.machine_id);
        let network = self.set_network(record.network.as_ref());
        for (what, result) in [("clock", clock), ("entropy", entropy), ("names", names), ("network", network)]
        {
            if let Err(error) = result {
                eprintln!("forkd-agent: resumed, but cannot set the {what}: {error}");
            }
        }
    }

    /// Does the resumed work once with the present identity, so that every page it touches is mapped in the snapshot.
    fn rehearse(&mut self) -> io::Result<()> {
        let uname = rustix::system::uname();
        let present = Generation {
            generation: self.generation,
            unix_time_ns: clock_ns(),
            hostname: uname.nodename().to_string_lossy().into_owned(),
            ..Generation::original()
        };
        if let Ok(bytes) = present.encode()
            && let Ok(record) = Generation::decode(&bytes)
        {
            self.become_copy(&record, false);
        }
        self.network.as_ref().map_or(Ok(()), Network::rehearse).map_err(io::Error::other)
    }

    fn set_network(&self, identity: Option<&NetworkIdentity>) -> io::Result<()> {
        match (identity, &self.network) {
            (None, _) => Ok(()),
            (Some(identity), Some(network)) => {
                if let Some(gateway) = identity.gateway {
                    self.set_resolver(gateway)?;
                }
                network.take_on(identity).map_err(io::Error::other)
            }
            (Some(_), None) => {
                Err(io::Error::new(io::ErrorKind::NotFound, "this machine has no network device"))
            }
        }
    }

    /// The gateway answers for names, where it leads anywhere.
    fn set_resolver(&self, gateway: Ipv4Addr) -> io::Result<()> {
        let line = format!("nameserver {gateway}\n{:1$}", "", RESOLVER_LEN);
        self.resolver.write_all_at(&line.as_bytes()[..RESOLVER_LEN], 0)
    }

    /// An empty name or an all-zero id keeps the old one.
    fn set_names(&self, hostname: &str, machine_id: &[u8; 16]) -> io::Result<()> {
        if !hostname.is_empty() {
            sethostname(hostname.as_bytes())?;
        }
        if *machine_id != [0; 16] {
            let mut line = hex(machine_id);
            line.push('\n');
            // Always the same length, so nothing old is left behind it.
            self.machine_id.write_all_at(line.as_bytes(), 0)?;
        }
        Ok(())
    }
}

fn set_clock(unix_time_ns: u64) -> io::Result<()> {
    let tv_sec = i64::try_from(unix_time_ns / 1_000_000_000).unwrap_or(i64::MAX);
    let time = Timespec { tv_sec, tv_nsec: (unix_time_ns % 1_000_000_000) as _ };
    clock_settime(ClockId::Realtime, time).map_err(io::Error::from)
}

fn clock_ns() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// A copy among many may have been put aside between reading the time and setting its clock.
fn correct_clock(ports: &IoPorts) {
    for _ in 0..CLOCK_CORRECTIONS {
        let host = ports.host_time_ns();
        if host.abs_diff(clock_ns()) < CLOCK_TOLERANCE_NS || set_clock(host).is_err() {
            return;
        }
    }
}

/// Opens a file for writing over its contents, creating it if it is not there.
fn overwrite(path: &str) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).open(path)
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Says on the console what went wrong and resets the machine, which ends the monitor.
pub fn give_up(message: &str) -> ! {
    let _ = writeln!(io::stderr(), "forkd-agent: {message}");
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    // Only where PID 1 may not reboot: ending it makes the kernel panic, and `panic=-1` resets.
    std::process::exit(1)
}
