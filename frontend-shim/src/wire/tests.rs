use super::*;
use proptest::prelude::*;

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Hello),
        Just(Kind::Register(Dma::Coherent)),
        Just(Kind::Register(Dma::NonCoherent)),
        any::<u64>().prop_map(Kind::Unregister),
        Just(Kind::Query),
    ]
}

fn outcomes() -> impl Strategy<Value = Result<u64, Refusal>> {
    let reason = prop_oneof![prop::sample::select(Reason::ALL), (1000_u16..).prop_map(Reason::Other)];
    let refusal = (reason, 1..i32::MAX).prop_map(|(reason, errno)| Refusal { reason, errno });
    prop_oneof![any::<u64>().prop_map(Ok), refusal.prop_map(Err)]
}

fn statuses() -> impl Strategy<Value = Status> {
    let policy = prop_oneof![Just(Policy::Lock), Just(Policy::Dynamic)];
    let fields = (any::<u32>(), any::<u16>(), policy, any::<u64>(), any::<u16>(), any::<u16>(), any::<bool>());
    fields.prop_map(|(vmm_pid, vms, policy, started_ms, registered, told, kept)| Status {
        vmm_pid,
        vms,
        policy,
        started_ms,
        registered,
        told,
        kept,
    })
}

proptest! {
    #[test]
    fn a_request_arrives_as_it_was_sent(serial: u32, kind in kinds()) {
        let request = Request { serial, kind };
        prop_assert_eq!(Request::from_bytes(&request.to_bytes()), Ok(request));
    }

    #[test]
    fn a_reply_arrives_as_it_was_sent(serial: u32, outcome in outcomes(), status in statuses()) {
        let reply = Reply { serial, outcome, status };
        prop_assert_eq!(Reply::from_bytes(&reply.to_bytes()), Ok(reply));
    }

    #[test]
    fn a_decoded_request_encodes_to_the_same_bytes(bytes: [u8; REQUEST_BYTES], fixed: bool) {
        let mut bytes = bytes;
        if fixed {
            // Random bytes rarely have a valid header; with one, the other fields are tested too.
            bytes[..8].copy_from_slice(&Request { serial: 0, kind: Kind::Query }.to_bytes()[..8]);
            bytes[6] %= 6;
            bytes[13..16].fill(0);
        }
        if let Ok(request) = Request::from_bytes(&bytes) {
            prop_assert_eq!(request.to_bytes(), bytes);
        }
    }

    #[test]
    fn random_bytes_of_any_length_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        prop_assert!(Request::from_bytes(&bytes).is_err());
        prop_assert!(Reply::from_bytes(&bytes).is_err());
    }

    #[test]
    fn a_flipped_bit_never_decodes_to_a_reply_with_other_bytes(
        outcome in outcomes(), status in statuses(), bit in 0..REPLY_BYTES * 8,
    ) {
        let mut bytes = Reply { serial: 7, outcome, status }.to_bytes();
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(reply) = Reply::from_bytes(&bytes) {
            prop_assert_eq!(reply.to_bytes(), bytes);
        }
    }
}

#[test]
fn another_version_is_recognized_at_any_length() {
    let mut bytes = Request { serial: 1, kind: Kind::Hello }.to_bytes().to_vec();
    bytes[4] = 9;
    bytes.extend([1, 2, 3]);
    assert_eq!(Request::from_bytes(&bytes), Err(DecodeError::Version(9)));
}

#[test]
fn the_layout_is_the_one_in_the_module_documentation() {
    let bytes = Request { serial: 0x0403_0201, kind: Kind::Unregister(0x0d0c_0b0a) }.to_bytes();
    assert_eq!(bytes[..12], *b"KVSH\x01\0\x03\0\x01\x02\x03\x04");
    assert_eq!(bytes[16..24], [0xa, 0xb, 0xc, 0xd, 0, 0, 0, 0]);

    let status =
        Status { vmm_pid: 1, vms: 2, policy: Policy::Dynamic, started_ms: 3, registered: 4, told: 5, kept: true };
    let bytes = Reply { serial: 6, outcome: Err(Reason::Locked.into()), status }.to_bytes();
    assert_eq!((bytes[6], bytes[8], bytes[12]), (8, 6, 1), "reason, serial, errno");
    assert_eq!((bytes[24], bytes[28], bytes[30], bytes[32]), (1, 2, 1, 3), "pid, vms, policy, started");
    assert_eq!((bytes[40], bytes[42], bytes[44]), (4, 5, 1), "registered, told, kept");
}
