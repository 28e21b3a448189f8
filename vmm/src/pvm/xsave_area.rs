//! The memory image of a processor's x87, SSE, AVX and further state, as XSAVE writes and XRSTOR reads it in the
//! standard format, and as KVM_GET_XSAVE and KVM_SET_XSAVE pass it (Intel SDM volume 1, chapter "Managing State Using
//! the XSAVE Feature Set"; Documentation/virt/kvm/api.rst of Linux).
//!
//! ```text
//!   0..24   x87 control, status, pointers        24..32  MXCSR and its mask
//!  32..160  x87 registers                       160..416 XMM registers
//! 512..520  XSTATE_BV: components in the image  520..536 XCOMP_BV and zeros
//! 576..     further components, each where CPUID leaf 0xD says
//! ```

use std::ops::Range;

/// Components that the first 576 bytes hold.
const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
/// Loads MXCSR, as SSE does.
const AVX: u64 = 1 << 2;
/// The matrix unit's tiles: Linux lets a VM have them only when the monitor asks, and ours does not.
const AMX: u64 = 1 << 17 | 1 << 18;

const X87_CONTROL: Range<usize> = 0..24;
const MXCSR: Range<usize> = 24..28;
const MXCSR_MASK: Range<usize> = 28..32;
const X87_REGISTERS: Range<usize> = 32..160;
const XMM: Range<usize> = 160..416;
/// Where XSTATE_BV lies in an image.
pub const XSTATE_BV: Range<usize> = 512..520;
/// Bytes that XRSTOR wants to be zero in the standard format.
const MUST_BE_ZERO: Range<usize> = 520..536;
/// Upper halves of the x87 pointers: what the 32-bit forms use for selectors, which processors of today store as zero.
const POINTER_TOPS: [Range<usize>; 2] = [12..16, 20..24];
/// Length of the image's fixed part, bytes.
pub const FIXED: usize = 576;
/// Most bytes of an image that are believed.
const MAX: u32 = 64 * 1024;

/// x87 control word after FNINIT.
const X87_INITIAL: [u8; 2] = 0x37f_u16.to_le_bytes();
/// MXCSR bits that a processor with a mask of zero has.
const MXCSR_DEFAULT_MASK: u32 = 0xffbf;

const EXTENDED_STATE: u32 = 0xd;
/// Component numbers: bit 63 of XSTATE_BV is none.
const COMPONENTS: Range<u32> = 2..63;

/// Registers of one CPUID leaf, EAX to EDX.
pub type CpuidLeaf = [u32; 4];

/// A component behind the fixed part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Component {
    number: u32,
    offset: usize,
    bytes: usize,
}

impl Component {
    fn bit(self) -> u64 {
        1 << self.number
    }

    fn range(self) -> Range<usize> {
        self.offset..self.offset + self.bytes
    }
}

/// Where this host's processor keeps which component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XsaveLayout {
    components: Vec<Component>,
}

/// The image is one that XRSTOR refuses with a general protection exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefusedImage;

impl XsaveLayout {
    /// The layout that CPUID leaf 0xD of this processor names.
    pub fn of_host() -> XsaveLayout {
        XsaveLayout::new(|subleaf| {
            let leaf = raw_cpuid::cpuid!(EXTENDED_STATE, subleaf);
            [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
        })
    }

    /// The layout that the sub-leaves of leaf 0xD name. What is no user state, or lies where none can lie, is left out.
    pub fn new(leaf: impl Fn(u32) -> CpuidLeaf) -> XsaveLayout {
        let [low, _, _, high] = leaf(0);
        let listed = u64::from(high) << 32 | u64::from(low);
        let component = |number: u32| {
            let [bytes, offset, flags, _] = leaf(number);
            let supervisor = flags & 1 == 1;
            let plausible = bytes > 0 && offset >= FIXED as u32 && bytes <= MAX && offset <= MAX - bytes;
            let component = Component { number, offset: offset as usize, bytes: bytes as usize };
            (plausible && !supervisor).then_some(component)
        };
        let numbers = COMPONENTS.filter(|number| listed & !AMX & 1 << number != 0);
        XsaveLayout { components: numbers.filter_map(component).collect() }
    }

    /// The components that lie within an image of `bytes`, as bits of XSTATE_BV.
    pub fn within(&self, bytes: usize) -> u64 {
        let fixed = if bytes >= FIXED { X87 | SSE } else { 0 };
        let inside = self.components.iter().filter(|component| component.range().end <= bytes);
        inside.fold(fixed, |bits, component| bits | component.bit())
    }

    /// Length of an image with `components`, bytes.
    pub fn bytes(&self, components: u64) -> usize {
        self.ranges(components).map(|range| range.end).fold(FIXED, usize::max)
    }

    /// Parts of the image that XSAVE of `components` writes.
    pub fn saved(&self, components: u64) -> impl Iterator<Item = Range<usize>> {
        let fixed = [
            (X87, X87_CONTROL),
            (SSE | AVX, MXCSR.start..MXCSR_MASK.end),
            (X87, X87_REGISTERS),
            (SSE, XMM),
            (u64::MAX, XSTATE_BV),
        ];
        let fixed = fixed.into_iter().filter(move |(bits, _)| *bits == u64::MAX || components & bits != 0);
        fixed.map(|(_, range)| range).chain(self.ranges(components))
    }

    fn ranges(&self, components: u64) -> impl Iterator<Item = Range<usize>> {
        let wanted = self.components.iter().filter(move |component| components & component.bit() != 0);
        wanted.map(|component| component.range())
    }

    /// Loads `components` of the image `from` into the state `to`, each that the image does not have in its initial
    /// form. Both are long enough for all of them. `available` are the components that the processor has enabled
    /// (XCR0).
    pub fn restore(
        &self,
        from: &[u8],
        to: &mut [u8],
        components: u64,
        available: u64,
        wide: bool,
    ) -> Result<(), RefusedImage> {
        let there = present(from);
        if there & !available != 0 || from[MUST_BE_ZERO].iter().any(|byte| *byte != 0) {
            return Err(RefusedImage);
        }
        if components & (SSE | AVX) != 0 {
            if word(from, MXCSR) & !mxcsr_mask(to) != 0 {
                return Err(RefusedImage);
            }
            to[MXCSR].copy_from_slice(&from[MXCSR]);
        }
        if components & X87 != 0 {
            for range in [X87_CONTROL, X87_REGISTERS] {
                load(from, to, range, there & X87 != 0);
            }
            if there & X87 == 0 {
                to[..X87_INITIAL.len()].copy_from_slice(&X87_INITIAL);
            } else if !wide {
                POINTER_TOPS.into_iter().for_each(|range| to[range].fill(0));
            }
        }
        if components & SSE != 0 {
            load(from, to, XMM, there & SSE != 0);
        }
        for component in self.components.iter().filter(|component| components & component.bit() != 0) {
            load(from, to, component.range(), there & component.bit() != 0);
        }
        // KVM takes MXCSR only with components that have it, so these are never in their initial form.
        set_present(to, present(to) & !components | there & components | X87 | SSE);
        Ok(())
    }
}

/// Turns a state of the processor into the image that XSAVE of `components` leaves where XSTATE_BV was `before`.
pub fn save(state: &mut [u8], components: u64, before: u64, wide: bool) {
    set_present(state, before & !components | present(state) & components);
    if !wide {
        POINTER_TOPS.into_iter().for_each(|range| state[range].fill(0));
    }
}

/// XSTATE_BV of an image.
pub fn present(image: &[u8]) -> u64 {
    u64::from(word(image, XSTATE_BV.start + 4..XSTATE_BV.end)) << 32
        | u64::from(word(image, XSTATE_BV.start..XSTATE_BV.start + 4))
}

fn set_present(image: &mut [u8], components: u64) {
    image[XSTATE_BV].copy_from_slice(&components.to_le_bytes());
}

fn load(from: &[u8], to: &mut [u8], range: Range<usize>, there: bool) {
    if there { to[range.clone()].copy_from_slice(&from[range]) } else { to[range].fill(0) }
}

fn word(image: &[u8], range: Range<usize>) -> u32 {
    image[range].iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

fn mxcsr_mask(state: &[u8]) -> u32 {
    match word(state, MXCSR_MASK) {
        0 => MXCSR_DEFAULT_MASK,
        mask => mask,
    }
}

/// Leaf 0xD of an AMD processor with AVX-512, protection keys and shadow stacks: what tests
/// use, on whatever host they run.
#[doc(hidden)]
pub fn amd_leaf(subleaf: u32) -> CpuidLeaf {
    match subleaf {
        0 => [0x2e7, 0x980, 0x980, 0],
        1 => [0xf, 0x9a8, 0x1800, 0],
        2 => [0x100, 0x240, 0, 0],
        5 => [0x40, 0x340, 0, 0],
        6 => [0x200, 0x380, 0, 0],
        7 => [0x400, 0x580, 0, 0],
        9 => [8, 0x980, 0, 0],
        11 => [0x10, 0, 1, 0],
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(layout: &XsaveLayout, seed: u8) -> Vec<u8> {
        let mut image: Vec<u8> =
            (0..layout.bytes(u64::MAX)).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect();
        image[MXCSR].copy_from_slice(&0x1f80_u32.to_le_bytes());
        image[MXCSR_MASK].copy_from_slice(&0x2_ffff_u32.to_le_bytes());
        image[XSTATE_BV].fill(0);
        image[MUST_BE_ZERO].fill(0);
        image
    }

    #[test]
    fn the_layout_is_what_the_processor_says() {
        let layout = XsaveLayout::new(amd_leaf);
        assert_eq!(layout.within(4096), 0x2e7);
        assert_eq!((layout.within(2432), layout.within(832), layout.within(575)), (0xe7, 7, 0));
        assert_eq!((layout.bytes(0), layout.bytes(7), layout.bytes(0xe7)), (FIXED, 832, 2432));
        let saved: Vec<_> = layout.saved(0x21).collect();
        assert_eq!(saved, [0..24, 32..160, 512..520, 832..896]);
        let saved: Vec<_> = layout.saved(4).collect();
        assert_eq!(saved, [24..32, 512..520, 576..832], "AVX brings MXCSR along");
    }

    #[test]
    fn this_host_has_what_its_programs_use() {
        let layout = XsaveLayout::of_host();
        let avx = std::arch::is_x86_feature_detected!("avx");
        assert_eq!(layout.within(4096) & AVX != 0, avx, "{layout:?}");
        let avx512 = std::arch::is_x86_feature_detected!("avx512f");
        assert_eq!(layout.within(4096) & 0xe0 == 0xe0, avx512, "{layout:?}");
    }

    #[test]
    fn matrix_tiles_and_impossible_places_are_left_out() {
        let wild = |subleaf| match subleaf {
            0 => [0x600ff, 0, 0, 0x8000_0000],
            2 => [0x100, 0x23f, 0, 0],
            3 => [u32::MAX, 0x240, 0, 0],
            4 => [0x40, u32::MAX, 0, 0],
            5 => [0, 0x240, 0, 0],
            6 => [0x40, 0x240, 1, 0],
            17 => [0x40, 0x240, 0, 0],
            18 => [0x2000, 0x240, 0, 0],
            _ => [0x40, 0x240, 0, 0],
        };
        assert_eq!(XsaveLayout::new(wild).within(usize::MAX), 0x83);
    }

    #[test]
    fn absent_components_go_to_their_initial_form_and_others_stay() {
        let layout = XsaveLayout::new(amd_leaf);
        let (mut from, mut to) = (image(&layout, 1), image(&layout, 2));
        let before = to.clone();
        set_present(&mut from, 0);
        set_present(&mut to, 0xe7);
        layout.restore(&from, &mut to, 0x47, 0xe7, true).unwrap();
        assert_eq!(present(&to), 0xa3, "x87 and SSE are always passed on");
        assert_eq!(to[..2], X87_INITIAL);
        for range in [2..24, 32..160, 160..416, 576..832, 896..1408] {
            assert!(to[range.clone()].iter().all(|byte| *byte == 0), "{range:?}");
        }
        for range in [832..896, 1408..2432] {
            assert_eq!(to[range.clone()], before[range.clone()], "{range:?}");
        }
    }

    #[test]
    fn what_the_processor_refuses_is_refused_and_changes_nothing() {
        let layout = XsaveLayout::new(amd_leaf);
        let damages: [(usize, u8, u64); 5] =
            [(513, 2, 7), (520, 1, 7), (527, 0x80, 7), (535, 1, 0), (27, 1, 4)];
        for (at, value, components) in damages {
            let (mut from, mut to) = (image(&layout, 1), image(&layout, 2));
            from[at] = value;
            let before = to.clone();
            assert_eq!(
                layout.restore(&from, &mut to, components, 0xe7, true),
                Err(RefusedImage),
                "byte {at}"
            );
            assert_eq!(to, before, "byte {at}");
        }
        let (mut from, mut to) = (image(&layout, 1), image(&layout, 2));
        from[27] = 1;
        assert_eq!(layout.restore(&from, &mut to, X87, 0xe7, true), Ok(()), "MXCSR is not loaded");
        from[540] = 1;
        assert_eq!(
            layout.restore(&from, &mut to, X87, 0xe7, true),
            Ok(()),
            "the rest of the header is ignored"
        );
    }

    #[test]
    fn narrow_forms_have_no_tops_of_pointers() {
        let layout = XsaveLayout::new(amd_leaf);
        let mut state = image(&layout, 3);
        set_present(&mut state, 3);
        save(&mut state, 3, 0, false);
        let mut restored = image(&layout, 4);
        layout.restore(&image(&layout, 5), &mut restored, 0, 3, false).unwrap();
        let mut from = image(&layout, 5);
        set_present(&mut from, 1);
        layout.restore(&from, &mut restored, 1, 3, false).unwrap();
        for image in [state, restored] {
            assert!(image[12..16].iter().chain(&image[20..24]).all(|byte| *byte == 0));
            assert!(image[8..12].iter().any(|byte| *byte != 0));
        }
    }

    proptest! {
        #[test]
        fn what_is_saved_and_restored_is_what_was_there(
            in_use in 0_u64..0x400, saved in 0_u64..0x400, restored in 0_u64..0x400, before in any::<u64>(), seed in any::<u8>(),
        ) {
            let layout = XsaveLayout::new(amd_leaf);
            let all = layout.within(4096);
            let (in_use, saved, restored) = (in_use & all, saved & all, restored & all);
            let mut original = image(&layout, seed);
            // What is in its initial form is passed on as such.
            for range in layout.ranges(!in_use) {
                original[range].fill(0);
            }
            set_present(&mut original, in_use | X87 | SSE);
            let mut state = original.clone();
            save(&mut state, saved, before & all, true);
            prop_assert_eq!(present(&state), before & all & !saved | (in_use | X87 | SSE) & saved);
            let mut memory = image(&layout, !seed);
            for range in layout.saved(saved) {
                memory[range.clone()].copy_from_slice(&state[range]);
            }
            let mut other = image(&layout, seed.wrapping_add(1));
            set_present(&mut other, all);
            let elsewhere = other.clone();
            layout.restore(&memory, &mut other, restored & saved, all, true).unwrap();
            let both = restored & saved;
            for range in layout.ranges(both) {
                prop_assert_eq!(&other[range.clone()], &original[range]);
            }
            for range in layout.ranges(!both) {
                prop_assert_eq!(&other[range.clone()], &elsewhere[range]);
            }
            let sse = if both & SSE != 0 { &original } else { &elsewhere };
            prop_assert_eq!(&other[XMM], &sse[XMM]);
            let x87 = if both & X87 != 0 { &original } else { &elsewhere };
            prop_assert_eq!(&other[X87_CONTROL], &x87[X87_CONTROL]);
            prop_assert_eq!(&other[X87_REGISTERS], &x87[X87_REGISTERS]);
        }
    }
}
