//! The internet checksum (RFC 1071) of a frame's TCP or UDP: completed for the guest, and checked for it.

/// Length of an Ethernet header, bytes.
const ETHERNET_HEADER: usize = 14;
/// Ethernet's number of IPv4.
const IPV4: [u8; 2] = [8, 0];
/// IPv4's numbers of TCP and UDP.
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The ones' complement sum of `bytes` as big endian words, on top of `sum`. Frames are short: it does not overflow.
fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        sum += u64::from(u32::from_be_bytes(*word));
    }
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum + u64::from(u32::from_be_bytes(last))
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Writes the checksum of what begins at `start`, where the guest left the sum of the pseudo header `offset` behind it.
/// Does nothing where the guest names places outside of its frame.
pub fn complete(frame: &mut [u8], start: usize, offset: usize) {
    let Some(covered) = frame.get_mut(start..) else { return };
    let sum = !fold(add(0, covered));
    if let Some(field) = covered.get_mut(offset..offset + 2) {
        // Zero says that there is none (RFC 768); both are the same number in ones' complement.
        field.copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    }
}

/// Whether `frame` is a whole TCP or UDP packet of IPv4 with a checksum, and that is right. Of other frames nothing is
/// known.
pub fn is_right(frame: &[u8]) -> bool {
    checked(frame).unwrap_or(false)
}

fn checked(frame: &[u8]) -> Option<bool> {
    let ethertype = frame.get(12..ETHERNET_HEADER)?;
    let ip = frame.get(ETHERNET_HEADER..)?;
    let header_length = usize::from(ip.first()? & 15) * 4;
    let length = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
    let payload = ip.get(..length)?.get(header_length..)?;
    let (version, protocol) = (ip[0] >> 4, *ip.get(9)?);
    // More fragments, and a fragment's place.
    let whole = u16::from_be_bytes([*ip.get(6)?, *ip.get(7)?]) & 0x3fff == 0;
    if ethertype != IPV4 || version != 4 || header_length < 20 || !whole {
        return None;
    }
    match protocol {
        TCP => {}
        UDP if payload.get(6..8)? != [0, 0] => {}
        _ => return None,
    }
    // The pseudo header (RFC 9293, 3.1).
    let pseudo = add(u64::from(protocol) + payload.len() as u64, ip.get(12..20)?);
    Some(fold(add(pseudo, payload)) == 0xffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame with so much payload, as a guest leaves it to the device.
    fn unfinished(protocol: u8, payload: usize) -> (Vec<u8>, usize, usize) {
        let (header, offset) = if protocol == TCP { (20, 16) } else { (8, 6) };
        let length = 20 + header + payload;
        let mut frame = vec![0; ETHERNET_HEADER + length];
        frame[12..14].copy_from_slice(&IPV4);
        let ip = &mut frame[ETHERNET_HEADER..];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        ip[9] = protocol;
        ip[12..20].copy_from_slice(&[10, 213, 0, 6, 203, 0, 113, 7]);
        let pseudo = fold(add(u64::from(protocol) + (length - 20) as u64, &[10, 213, 0, 6, 203, 0, 113, 7]));
        for (at, byte) in ip[20..].iter_mut().enumerate() {
            *byte = (at * 7) as u8;
        }
        ip[20 + offset..22 + offset].copy_from_slice(&pseudo.to_be_bytes());
        (frame, ETHERNET_HEADER + 20, offset)
    }

    #[test]
    fn what_is_completed_is_right_and_what_is_changed_is_not() {
        for (protocol, payload) in [(TCP, 0), (TCP, 1), (TCP, 1460), (TCP, 65_000), (UDP, 3), (UDP, 512)] {
            let (mut frame, start, offset) = unfinished(protocol, payload);
            assert!(!is_right(&frame), "{protocol} {payload}: not completed");
            complete(&mut frame, start, offset);
            assert!(is_right(&frame), "{protocol} {payload}");
            let mut padded = frame.clone();
            padded.extend([7; 9]);
            assert!(is_right(&padded), "{protocol} {payload}: with padding");
            for at in [26, 33, 34, frame.len() - 1] {
                let mut changed = frame.clone();
                changed[at] ^= 1;
                assert!(!is_right(&changed), "{protocol} {payload}: byte {at}");
            }
        }
    }

    #[test]
    fn an_example_of_the_rfc() {
        // RFC 1071, section 3.
        assert_eq!(fold(add(0, &[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
    }

    #[test]
    fn of_other_frames_nothing_is_known() {
        let (mut frame, start, offset) = unfinished(UDP, 8);
        complete(&mut frame, start, offset);
        for length in 0..frame.len() {
            assert!(!is_right(&frame[..length]), "{length} bytes");
        }
        // Another kind, a version, a short header, a fragment, another protocol, no checksum.
        for (at, byte) in [(12, 9), (14, 0x65), (14, 0x44), (20, 0x20), (23, 1)] {
            let mut other = frame.clone();
            other[at] = byte;
            assert!(!is_right(&other), "byte {at}");
        }
        frame[40..42].fill(0);
        assert!(!is_right(&frame));
    }

    #[test]
    fn a_guest_that_names_places_outside_of_its_frame_gets_nothing() {
        let frame: Vec<u8> = (0..60).collect();
        for (start, offset) in [(60, 0), (61, 0), (65_535, 65_535), (59, 0), (20, 39), (20, 65_535)] {
            let mut tried = frame.clone();
            complete(&mut tried, start, offset);
            assert_eq!(tried, frame, "{start} {offset}");
        }
    }
}
