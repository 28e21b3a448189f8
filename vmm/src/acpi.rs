//! ACPI tables: what a stock kernel needs to find the machine's processors and devices without a command line, and the
//! generation device ("Virtual Machine Generation ID", Microsoft 2012) by which a kernel hears that it is a copy and
//! reseeds its random numbers.
//!
//! ```text
//! GENERATION_PAGE   16 random bytes, new in every copy
//! ACPI_TABLES       RSDP | XSDT -> FADT, MADT; FADT -> DSDT
//! ```
//! The machine is "hardware-reduced" (ACPI 6.5, section 4.1): no timers, buttons or sleep states to emulate.

use crate::arch;
use crate::devices::virtio::DeviceKind;
use crate::sys;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use std::io;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

const OEM: [u8; 6] = *b"FORKD ";
const OEM_TABLE: [u8; 8] = *b"FORKDVM ";
const OEM_REVISION: u32 = 1;
/// Length of the header of every table, bytes (ACPI 6.5, section 5.2.6).
const TABLE_HEADER: u32 = 36;

/// The tables or the generation could not be put into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// Guest memory has no room below one megabyte.
    #[error("guest memory has no room for the ACPI tables")]
    Memory(#[from] GuestMemoryError),
    /// The tables grew over their place.
    #[error("the ACPI tables take {bytes} bytes, over the room of {room}")]
    TooLarge {
        /// Their length.
        bytes: u64,
        /// What there is.
        room: u64,
    },
    /// No random bytes.
    #[error("no random bytes for the generation ID")]
    Random(#[source] io::Error),
}

struct Bytecode(Vec<u8>);

impl AmlSink for Bytecode {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut code = Bytecode(Vec::new());
    table.to_aml_bytes(&mut code);
    code.0
}

/// Writes the tables of a machine; returns where its RSDP is.
pub fn write_tables(
    ram: &GuestMemoryMmap,
    vcpus: u8,
    devices: &[DeviceKind],
) -> Result<GuestAddress, AcpiError> {
    let mut tables = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut place = |table: Vec<u8>| {
        let at = arch::ACPI_TABLES + tables.len() as u64;
        tables.extend(table);
        tables.resize(tables.len().next_multiple_of(16), 0);
        at
    };
    let dsdt = place(dsdt(devices));
    let fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    let fadt = place(bytes_of(&fadt.finalize()));
    let madt = place(madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes_of(&xsdt));
    let rsdp = bytes_of(&Rsdp::new(OEM, xsdt));
    tables[..rsdp.len()].copy_from_slice(&rsdp);
    let (bytes, room) = (tables.len() as u64, arch::HIGH_MEMORY_START - arch::ACPI_TABLES);
    if bytes > room {
        return Err(AcpiError::TooLarge { bytes, room });
    }
    let at = GuestAddress(arch::ACPI_TABLES);
    ram.write_slice(&tables, at)?;
    Ok(at)
}

/// Gives the machine a generation of its own: before its first instruction, and again in every copy.
pub fn write_generation(ram: &GuestMemoryMmap) -> Result<(), AcpiError> {
    let id: [u8; 16] = sys::random_bytes().map_err(AcpiError::Random)?;
    Ok(ram.write_slice(&id, GuestAddress(arch::GENERATION_PAGE))?)
}

fn madt(vcpus: u8) -> Vec<u8> {
    let controller = LocalInterruptController::Address(arch::LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, controller);
    madt.add_structure(IoApic::new(0, arch::IO_APIC, 0));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    bytes_of(&madt)
}

fn dsdt(devices: &[DeviceKind]) -> Vec<u8> {
    let mut code = Bytecode(Vec::new());
    serial_port(&mut code);
    for (slot, line) in (0..devices.len() as u32).zip(arch::VIRTIO_IRQS) {
        virtio_window(slot, line, &mut code);
    }
    generation_device(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", TABLE_HEADER, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&code.0);
    dsdt.as_slice().to_vec()
}

/// Edge-triggered and active high, as an irqfd pulses it.
fn line(number: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, number)
}

fn serial_port(code: &mut Bytecode) {
    let ports = IO::new(arch::SERIAL_PORT, arch::SERIAL_PORT, 1, 8);
    let irq = line(arch::SERIAL_IRQ);
    let id = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &irq]));
    let device = Device::new("COM1".into(), vec![&id, &resources]);
    Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(code);
}

/// A virtio-mmio window, by the ID that Linux' driver knows ("LNRO0005").
fn virtio_window(slot: u32, irq: u32, code: &mut Bytecode) {
    let base = arch::MMIO_START as u32 + slot * arch::MMIO_WINDOW as u32;
    let (memory, irq) = (Memory32Fixed::new(true, base, arch::MMIO_WINDOW as u32), line(irq));
    let id = Name::new("_HID".into(), &"LNRO0005");
    let number = Name::new("_UID".into(), &slot);
    let coherent = Name::new("_CCA".into(), &1_u8);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory, &irq]));
    let name = Path::new(&format!("VIO{slot}"));
    let device = Device::new(name, vec![&id, &number, &coherent, &resources]);
    Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(code);
}

/// The generation device, and the event device whose interrupt notifies it.
fn generation_device(code: &mut Bytecode) {
    let id = Name::new("_HID".into(), &"FRKD0001");
    let compatible = Name::new("_CID".into(), &"VM_Gen_Counter");
    let description = Name::new("_DDN".into(), &"VM_Gen_Counter");
    let (low, high) = (arch::GENERATION_PAGE as u32, 0_u32);
    let address = Name::new("ADDR".into(), &Package::new(vec![&low, &high]));
    let counter = Device::new("VGEN".into(), vec![&id, &compatible, &description, &address]);
    Scope::new("\\_SB_".into(), vec![&counter]).to_aml_bytes(code);

    let id = Name::new("_HID".into(), &"ACPI0013");
    let number = Name::new("_UID".into(), &0_u8);
    let irq = line(arch::GENERATION_IRQ);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&irq]));
    let (target, changed) = (Path::new("\\_SB_.VGEN"), 0x80_u8);
    let notify = Notify::new(&target, &changed);
    // Linux passes the line to an edge's own method too, which takes no argument, and then complains on every resume.
    let method = Method::new("_EVT".into(), 1, true, vec![&notify]);
    let events = Device::new("GED_".into(), vec![&id, &number, &resources, &method]);
    Scope::new("\\_SB_".into(), vec![&events]).to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn table(ram: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let length: u32 = ram.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    #[test]
    fn tables_are_found_from_the_root_and_add_up_to_zero() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let devices = [DeviceKind::Vsock, DeviceKind::Rng, DeviceKind::Pmem];
        let rsdp = write_tables(&ram, 8, &devices).unwrap();
        let mut root = vec![0; Rsdp::len()];
        ram.read_slice(&mut root, rsdp).unwrap();
        assert_eq!((&root[..8], sum(&root), sum(&root[..20])), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(&ram, u64::from_le_bytes(root[24..32].try_into().unwrap()));
        assert_eq!((&xsdt[..4], sum(&xsdt)), (&b"XSDT"[..], 0));
        let entries: Vec<_> = xsdt[36..]
            .chunks_exact(8)
            .map(|entry| table(&ram, u64::from_le_bytes(entry.try_into().unwrap())))
            .collect();
        assert_eq!(entries.iter().map(|table| sum(table)).collect::<Vec<_>>(), [0, 0]);
        let (fadt, madt) = (&entries[0], &entries[1]);
        assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
        assert_eq!(madt.len(), 44 + 12 + 8 * 8);
        let dsdt = table(&ram, u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
        let windows = dsdt.windows(8).filter(|text| text == b"LNRO0005").count();
        assert_eq!(windows, devices.len());
    }

    #[test]
    fn every_generation_differs() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let fresh = || {
            write_generation(&ram).unwrap();
            ram.read_obj::<u128>(GuestAddress(arch::GENERATION_PAGE)).unwrap()
        };
        assert_ne!(fresh(), fresh());
    }
}
