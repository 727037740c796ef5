//! The I/O command set of a namespace: what its blocks are, or that it has none. Namespaces of the NVM command set are disks,
//! and those of the Zoned Namespace command set are disks with zones. NVMe 2.0 §3.1.1 and §5.17.2.4

use super::error::NvmeErrorKind;

/// Command Set Identifier of the NVM command set.
pub(super) const NVM: u8 = 0;
/// Command Set Identifier of the Zoned Namespace command set.
pub(super) const ZONED: u8 = 2;

/// Namespace Identifier Type of a Command Set Identifier. NVMe 2.0 §5.17.2.4, figure "Namespace Identification Descriptor"
const CSI: u8 = 4;
/// Bytes of a descriptor before its identifier.
const HEADER: usize = 4;

/// The Command Set Identifier in a list of Namespace Identification Descriptors. A list without one is of a namespace of the
/// NVM command set.
pub(super) fn identifier(list: &[u8; 4096]) -> u8 {
    let mut rest = &list[..];
    // A descriptor of length 0 ends the list.
    while let [kind, length, _, _, value, ..] = *rest
        && length != 0
    {
        if kind == CSI {
            return value;
        }
        rest = rest.get(HEADER + usize::from(length)..).unwrap_or_default();
    }
    NVM
}

/// Refuses a namespace that is no disk.
pub(super) fn check(namespace: u32, set: u8) -> Result<(), NvmeErrorKind> {
    let what = match set {
        NVM | ZONED => return Ok(()),
        0x01 => "a key-value store",
        0x03 => "subsystem local memory",
        0x04 => "computational programs",
        0x30..=0x3f => "of its vendor's own command set",
        _ => "of an unknown command set",
    };
    Err(NvmeErrorKind::CommandSet { namespace, set, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(descriptors: &[&[u8]]) -> [u8; 4096] {
        let mut list = [0; 4096];
        let bytes = descriptors.concat();
        list[..bytes.len()].copy_from_slice(&bytes);
        list
    }

    #[test]
    fn the_identifier_is_found_behind_others_of_any_length() {
        let eui64: &[u8] = &[1, 8, 0, 0, 4, 1, 0, 0, 9, 4, 1, 9];
        let uuid: &[u8] = &[3, 16, 0, 0, 4, 1, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7];
        let zoned: &[u8] = &[4, 1, 0, 0, 2];
        assert_eq!(identifier(&list(&[eui64, uuid, zoned])), 2);
        assert_eq!(identifier(&list(&[zoned, eui64])), 2);
        assert_eq!(identifier(&list(&[eui64, uuid])), NVM, "none");
        assert_eq!(identifier(&list(&[eui64, &[0, 0, 0, 0], zoned])), NVM, "after the end");
    }

    #[test]
    fn no_list_is_read_beyond_its_page() {
        assert_eq!(identifier(&[0xff; 4096]), NVM);
        let mut last = [0; 4096];
        // 15 descriptors of 259 bytes each, one of 206, and a header in the last bytes.
        let mut at = 0;
        for length in [255_u8; 15].into_iter().chain([203]) {
            (last[at], last[at + 1]) = (1, length);
            at += 4 + usize::from(length);
        }
        assert_eq!(at, 4092);
        (last[at], last[at + 1]) = (4, 1);
        assert_eq!(identifier(&last), NVM, "its value would be past the end");
    }

    #[test]
    fn each_command_set_without_blocks_is_refused_by_its_name() {
        assert!(check(1, NVM).is_ok() && check(1, ZONED).is_ok());
        for (set, name) in [(1, "key-value"), (3, "memory"), (4, "programs"), (0x31, "vendor"), (9, "unknown")] {
            let error = check(7, set).unwrap_err().to_string();
            assert!(error.starts_with("namespace 7 is ") && error.contains(name), "{error}");
            assert!(error.contains("--namespace") && error.contains("--vfio-user"), "{error}");
        }
    }
}
