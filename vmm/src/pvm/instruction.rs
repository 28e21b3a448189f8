//! XSAVE and XRSTOR as bytes: which of them it is, where its operand lies, how long it is (Intel SDM volume 2,
//! "Instruction Format"). Written by hand, because a complete decoder's tables would be built in every
//! child before its first use; the tests compare it with a complete one.

use kvm_bindings::kvm_regs;

/// Longest instruction, bytes.
pub const LONGEST: usize = 15;

/// Register numbers of ModRM and SIB bytes that mean something else.
const HAS_SIB: u8 = 4;
const NO_INDEX: u8 = 4;
const NO_BASE: u8 = 5;

/// What is done to the processor's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XsaveOperation {
    /// XSAVE: it is written to memory.
    Save,
    /// XRSTOR: it is read from memory.
    Restore,
}

/// One XSAVE or XRSTOR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XsaveInstruction {
    /// Which of the two.
    pub operation: XsaveOperation,
    /// XSAVE64 or XRSTOR64: x87 pointers have 64 bits.
    pub wide: bool,
    /// Linear address of the area.
    pub address: u64,
    /// Length of the instruction, bytes.
    pub length: usize,
}

/// Prefix that extends register numbers; zero without one.
#[derive(Clone, Copy)]
struct Rex(u8);

impl Rex {
    fn wide(self) -> bool {
        self.0 & 8 != 0
    }

    fn index(self, number: u8) -> u8 {
        number | (self.0 & 2) << 2
    }

    fn base(self, number: u8) -> u8 {
        number | (self.0 & 1) << 3
    }
}

impl XsaveInstruction {
    /// The instruction at `regs.rip` of 64-bit code, if its `bytes` are `0F AE /4` or `/5` with no prefix but REX,
    /// which is what Linux executes.
    pub fn decode(bytes: &[u8], regs: &kvm_regs) -> Option<XsaveInstruction> {
        let (rex, opcode_at) = match *bytes.first()? {
            prefix @ 0x40..=0x4f => (Rex(prefix), 1),
            _ => (Rex(0), 0),
        };
        let [0x0f, 0xae, modrm, rest @ ..] = bytes.get(opcode_at..)? else { return None };
        let (mode, extension, number) = (modrm >> 6, modrm >> 3 & 7, modrm & 7);
        let operation = match extension {
            4 => XsaveOperation::Save,
            5 => XsaveOperation::Restore,
            _ => return None,
        };
        if mode == 3 {
            return None;
        }
        let (sum, mut displacement_bytes, rest) = if number == HAS_SIB {
            let (sib, rest) = rest.split_first()?;
            (scaled(*sib, mode, rex, regs), if mode == 0 && sib & 7 == NO_BASE { 4 } else { 0 }, rest)
        } else if mode == 0 && number == NO_BASE {
            (None, 4, rest)
        } else {
            (Some(register(regs, rex.base(number))), 0, rest)
        };
        displacement_bytes = match mode {
            1 => 1,
            2 => 4,
            _ => displacement_bytes,
        };
        let displacement = match displacement_bytes {
            1 => i64::from(*rest.first()? as i8),
            4 => i64::from(i32::from_le_bytes(*rest.first_chunk()?)),
            _ => 0,
        };
        let length = bytes.len() - rest.len() + displacement_bytes;
        // Without registers the displacement counts from the next instruction.
        let from = sum.unwrap_or_else(|| regs.rip.wrapping_add(length as u64));
        let address = from.wrapping_add_signed(displacement);
        Some(XsaveInstruction { operation, wide: rex.wide(), address, length })
    }
}

/// Base and scaled index that a SIB byte names.
fn scaled(sib: u8, mode: u8, rex: Rex, regs: &kvm_regs) -> Option<u64> {
    let (scale, index, base) = (sib >> 6, rex.index(sib >> 3 & 7), sib & 7);
    let index = if index == NO_INDEX { 0 } else { register(regs, index) << scale };
    let base = if mode == 0 && base == NO_BASE { 0 } else { register(regs, rex.base(base)) };
    Some(base.wrapping_add(index))
}

/// A general register by its number in instructions.
fn register(regs: &kvm_regs, number: u8) -> u64 {
    match number {
        0 => regs.rax,
        1 => regs.rcx,
        2 => regs.rdx,
        3 => regs.rbx,
        4 => regs.rsp,
        5 => regs.rbp,
        6 => regs.rsi,
        7 => regs.rdi,
        8 => regs.r8,
        9 => regs.r9,
        10 => regs.r10,
        11 => regs.r11,
        12 => regs.r12,
        13 => regs.r13,
        14 => regs.r14,
        _ => regs.r15,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, Decoder, DecoderOptions, Register};
    use proptest::prelude::*;

    fn value(regs: &kvm_regs, register: Register) -> u64 {
        match register {
            Register::RAX => regs.rax,
            Register::RCX => regs.rcx,
            Register::RDX => regs.rdx,
            Register::RBX => regs.rbx,
            Register::RSP => regs.rsp,
            Register::RBP => regs.rbp,
            Register::RSI => regs.rsi,
            Register::RDI => regs.rdi,
            Register::R8 => regs.r8,
            Register::R9 => regs.r9,
            Register::R10 => regs.r10,
            Register::R11 => regs.r11,
            Register::R12 => regs.r12,
            Register::R13 => regs.r13,
            Register::R14 => regs.r14,
            Register::R15 => regs.r15,
            // Segments of 64-bit code that no prefix names begin at zero.
            Register::DS | Register::SS => 0,
            other => panic!("an operand with {other:?}"),
        }
    }

    /// What a complete decoder makes of the same bytes.
    fn reference(bytes: &[u8], regs: &kvm_regs) -> Option<XsaveInstruction> {
        let instruction = Decoder::with_ip(64, bytes, regs.rip, DecoderOptions::NONE).decode();
        let (operation, wide) = match instruction.code() {
            Code::Xsave_mem => (XsaveOperation::Save, false),
            Code::Xsave64_mem => (XsaveOperation::Save, true),
            Code::Xrstor_mem => (XsaveOperation::Restore, false),
            Code::Xrstor64_mem => (XsaveOperation::Restore, true),
            _ => return None,
        };
        let address =
            instruction.virtual_address(0, 0, |register, _, _| Some(value(regs, register))).unwrap();
        Some(XsaveInstruction { operation, wide, address, length: instruction.len() })
    }

    /// Registers that are all different, so that none can stand for another.
    fn registers(seed: u64) -> kvm_regs {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        kvm_regs {
            rax: next(),
            rcx: next(),
            rdx: next(),
            rbx: next(),
            rsp: next(),
            rbp: next(),
            rsi: next(),
            rdi: next(),
            r8: next(),
            r9: next(),
            r10: next(),
            r11: next(),
            r12: next(),
            r13: next(),
            r14: next(),
            r15: next(),
            rip: next(),
            ..Default::default()
        }
    }

    #[test]
    fn every_rex_modrm_and_sib_is_decoded_as_a_complete_decoder_does() {
        let regs = registers(0x9e37_79b9_7f4a_7c15);
        let mut found = 0;
        for rex in [None].into_iter().chain((0x40..=0x4f).map(Some)) {
            for modrm in 0..=255_u8 {
                // Elsewhere the byte belongs to a displacement.
                let last_sib = if modrm & 7 == HAS_SIB { 255 } else { 0 };
                for sib in 0..=last_sib {
                    for displacement in
                        [[0; 4], [0x80, 0, 0, 0], [0x7f, 0xff, 0xff, 0xff], [0xff, 0xff, 0xff, 0x7f]]
                    {
                        let mut bytes: Vec<u8> = rex.into_iter().collect();
                        bytes.extend([0x0f, 0xae, modrm, sib]);
                        bytes.extend(displacement);
                        bytes.push(0x90);
                        let decoded = XsaveInstruction::decode(&bytes, &regs);
                        assert_eq!(decoded, reference(&bytes, &regs), "{bytes:02x?}");
                        found += u32::from(decoded.is_some());
                    }
                }
            }
        }
        // 17 prefixes, 3 modes, 2 instructions, 7 registers and all SIB bytes, 4 displacements.
        assert_eq!(found, 17 * 3 * 2 * (7 + 256) * 4);
    }

    proptest! {
        #[test]
        fn every_displacement_and_register_is_decoded_as_a_complete_decoder_does(
            rex in 0x40_u8..0x50, modrm in any::<u8>(), rest in any::<[u8; 6]>(), seed in any::<u64>(),
        ) {
            let bytes = [&[rex, 0x0f, 0xae, modrm][..], &rest].concat();
            let regs = registers(seed);
            prop_assert_eq!(XsaveInstruction::decode(&bytes, &regs), reference(&bytes, &regs));
        }

        #[test]
        fn any_bytes_are_decoded_as_a_complete_decoder_does_or_left_alone(bytes in proptest::collection::vec(any::<u8>(), 0..16)) {
            let regs = registers(7);
            if let Some(decoded) = XsaveInstruction::decode(&bytes, &regs) {
                prop_assert_eq!(Some(decoded), reference(&bytes, &regs));
            }
        }
    }

    #[test]
    fn instructions_that_are_cut_short_are_none() {
        let regs = registers(3);
        let whole = [0x48, 0x0f, 0xae, 0xa4, 0x25, 1, 2, 3, 4];
        assert!(XsaveInstruction::decode(&whole, &regs).is_some());
        for length in 0..whole.len() {
            assert_eq!(XsaveInstruction::decode(&whole[..length], &regs), None, "{length} bytes");
        }
    }
}
