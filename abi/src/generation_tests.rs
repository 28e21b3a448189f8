//! Tests of the generation record.

use super::*;

fn environment(variables: &[(&str, &str)]) -> BTreeMap<String, String> {
    variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn example() -> Generation {
    Generation {
        generation: 7,
        unix_time_ns: 1_700_000_000_123_456_789,
        entropy: std::array::from_fn(|i| i as u8),
        hostname: "python-numpy-7".to_owned(),
        machine_id: [0xab; 16],
        network: Some(NetworkIdentity {
            mac: [2, 1, 2, 3, 4, 5],
            address: Ipv4Addr::new(10, 213, 0, 6),
            prefix: 30,
            gateway: Some(Ipv4Addr::new(10, 213, 0, 5)),
            mtu: Some(65_520),
        }),
        environment: environment(&[("SHARD", "7"), ("EMPTY", ""), ("EQUALS", "a=b=c"), ("UMLAUT", "ü")]),
    }
}

#[test]
fn survives_the_round_trip() {
    let lonely = NetworkIdentity { gateway: None, mtu: None, ..example().network.unwrap() };
    let lonely = Generation { network: Some(lonely), environment: BTreeMap::new(), ..example() };
    for generation in [example(), lonely, Generation::original()] {
        let bytes = generation.encode().unwrap();
        assert_eq!(record_len(bytes.first_chunk().unwrap()), bytes.len());
        assert_eq!(Generation::decode(&bytes).unwrap(), generation);
    }
}

#[test]
fn layout_is_the_documented_one() {
    let bytes = example().encode().unwrap();
    assert_eq!(&bytes[0..8], &[0x52, 0x47, 0x4b, 0x46, 2, 0, 0, 0]);
    assert_eq!(&bytes[8..16], &7u64.to_le_bytes());
    assert_eq!(bytes[24..88], example().entropy);
    assert_eq!(&bytes[88..92], &14u32.to_le_bytes());
    assert_eq!(&bytes[92..106], b"python-numpy-7");
    assert_eq!(&bytes[156..172], &[0xab; 16]);
    assert_eq!(&bytes[172..184], &[1, 0, 0, 0, 2, 1, 2, 3, 4, 5, 30, 0]);
    assert_eq!(&bytes[184..192], &[10, 213, 0, 6, 10, 213, 0, 5]);
    assert_eq!(&bytes[192..196], &38u32.to_le_bytes());
    assert_eq!(&bytes[196..198], &65_520u16.to_le_bytes());
    assert_eq!(&bytes[512..], "EMPTY=\0EQUALS=a=b=c\0SHARD=7\0UMLAUT=ü\0".as_bytes());
}

#[test]
fn host_names_are_checked_both_ways() {
    for bad in ["a b", "a/b", "ü", "-a", ".a", "a\n", &"x".repeat(65)] {
        let generation = Generation { hostname: bad.to_owned(), ..example() };
        assert!(matches!(generation.encode(), Err(GenerationError::Hostname { .. })), "{bad}");
    }
    let longest = Generation { hostname: "x".repeat(64), ..example() };
    assert_eq!(Generation::decode(&longest.encode().unwrap()).unwrap(), longest);
    let mut bytes = example().encode().unwrap();
    bytes[88..92].copy_from_slice(&65u32.to_le_bytes());
    assert_eq!(Generation::decode(&bytes), Err(GenerationError::Hostname { len: 65 }));
    bytes[88..92].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(Generation::decode(&bytes).is_err());
    let mut bytes = example().encode().unwrap();
    bytes[93] = b'/';
    assert_eq!(Generation::decode(&bytes), Err(GenerationError::Hostname { len: 14 }));
}

#[test]
fn anything_else_is_refused() {
    assert_eq!(Generation::decode(&[]), Err(GenerationError::Length(0)));
    assert_eq!(Generation::decode(&[0; 511]), Err(GenerationError::Length(511)));
    assert_eq!(Generation::decode(&[0xff; HEAD_LEN]), Err(GenerationError::Magic(u32::MAX)));
    let mut bytes = example().encode().unwrap();
    bytes[4] = 1;
    assert_eq!(Generation::decode(&bytes), Err(GenerationError::Version(1)));
    for offset in [106, 155, 183, 198, 511] {
        let mut bytes = example().encode().unwrap();
        bytes[offset] = 1;
        assert_eq!(Generation::decode(&bytes), Err(GenerationError::Reserved(offset)));
    }
}

#[test]
fn entropy_and_environment_stay_out_of_debug_output() {
    let text = format!("{:?}", Generation { entropy: [0x5a; 64], ..example() });
    assert!(!text.contains("90") && !text.contains("SHARD"), "{text}");
}

#[test]
fn networks_are_checked_both_ways() {
    let good = example().network.unwrap();
    let bad = [
        NetworkIdentity { mac: [0; 6], ..good },
        NetworkIdentity { mac: [1, 0, 0, 0, 0, 1], ..good },
        NetworkIdentity { address: Ipv4Addr::UNSPECIFIED, ..good },
        NetworkIdentity { address: Ipv4Addr::new(224, 0, 0, 1), ..good },
        NetworkIdentity { prefix: 0, ..good },
        NetworkIdentity { prefix: 33, ..good },
        NetworkIdentity { mtu: Some(67), ..good },
    ];
    for network in bad {
        let generation = Generation { network: Some(network), ..example() };
        assert_eq!(generation.encode(), Err(GenerationError::Network), "{network:?}");
    }
    for (offset, value) in [(172, 3), (176, 1), (182, 33), (184, 0xe0)] {
        let mut bytes = example().encode().unwrap();
        bytes[offset] = value;
        assert_eq!(Generation::decode(&bytes), Err(GenerationError::Network), "{offset}");
    }
    let mut bytes = example().encode().unwrap();
    bytes[172] = 0;
    assert_eq!(
        Generation::decode(&bytes),
        Err(GenerationError::Reserved(176)),
        "addresses without a network"
    );
    let mut bytes = Generation::original().encode().unwrap();
    bytes[196] = 100;
    assert_eq!(Generation::decode(&bytes), Err(GenerationError::Reserved(196)), "an MTU without a network");
}

#[test]
fn environments_are_checked_both_ways() {
    for (name, value) in [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "x\0")] {
        let generation = Generation { environment: environment(&[(name, value)]), ..example() };
        assert_eq!(generation.encode(), Err(GenerationError::Variable { name: name.to_owned() }));
    }
    // One name, `=`, and the zero byte behind the value.
    for (length, fits) in [(ENVIRONMENT_MAX - 3, true), (ENVIRONMENT_MAX - 2, false)] {
        let generation = Generation { environment: environment(&[("A", &"x".repeat(length))]), ..example() };
        match generation.encode() {
            Ok(bytes) => {
                assert!(fits && bytes.len() == RECORD_MAX);
                assert_eq!(Generation::decode(&bytes).unwrap(), generation);
            }
            Err(error) => {
                assert_eq!((fits, error), (false, GenerationError::EnvironmentSize { bytes: 3585 }))
            }
        }
    }
    let with = |tail: &[u8], length: u32| {
        let mut bytes = Generation::original().encode().unwrap();
        bytes[192..196].copy_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(tail);
        Generation::decode(&bytes)
    };
    for bad in [&b"A=1"[..], b"A\0", b"=1\0", b"A=1\0A=2\0", b"A=\xff\0", b"\0"] {
        let refused = with(bad, bad.len() as u32);
        assert!(matches!(refused, Err(GenerationError::Variable { .. })), "{bad:?}: {refused:?}");
    }
    for length in [0, 3, 5, 3585, u32::MAX] {
        assert_eq!(with(b"A=1\0", length), Err(GenerationError::Length(516)), "{length}");
    }
}
