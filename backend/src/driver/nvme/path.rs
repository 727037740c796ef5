//! Whether this controller reaches a namespace: Asymmetric Namespace Access, of subsystems with several controllers. NVMe 2.0
//! §8.1, log page §5.16.1.13

use super::error::NvmeErrorKind;

/// Bytes of the log before its first group, and of a group without its namespaces, which are not requested.
const LOG_HEADER: usize = 16;
const GROUP: usize = 32;

/// The state of ANA group `group`; `None` if the log does not have the group.
pub(super) fn state(log: &[u8; 4096], group: u32) -> Option<u8> {
    let count = u16::from_le_bytes([log[8], log[9]]);
    let groups = log[LOG_HEADER..].chunks_exact(GROUP).take(count.into());
    let found = groups.into_iter().find(|entry| entry[..4] == group.to_le_bytes());
    found.map(|entry| entry[16] & 0xf)
}

/// Refuses a path on which every command would fail.
pub(super) fn check(namespace: u32, state: u8) -> Result<(), NvmeErrorKind> {
    let refuse = |state, fix| Err(NvmeErrorKind::Path { namespace, state, fix });
    const ELSEWHERE: &str = "serve it through another controller of the subsystem, or make this path accessible there";
    match state {
        3 => refuse("inaccessible", ELSEWHERE),
        4 => refuse("lost for good", ELSEWHERE),
        15 => refuse("about to change", "try again in a few seconds"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(groups: &[(u32, u8)], count: u16) -> [u8; 4096] {
        let mut log = [0; 4096];
        log[8..10].copy_from_slice(&count.to_le_bytes());
        for (n, (group, state)) in groups.iter().enumerate() {
            let at = LOG_HEADER + n * GROUP;
            log[at..at + 4].copy_from_slice(&group.to_le_bytes());
            log[at + 16] = *state | 0xa0;
        }
        log
    }

    #[test]
    fn the_state_is_that_of_the_group_among_those_that_count() {
        let groups = [(1, 1), (7, 3), (9, 15)];
        assert_eq!(state(&log(&groups, 3), 7), Some(3), "without the reserved bits");
        assert_eq!(state(&log(&groups, 3), 9), Some(15));
        assert_eq!(state(&log(&groups, 2), 9), None, "beyond the number of groups");
        assert_eq!(state(&log(&groups, u16::MAX), 5), None, "no more than the page holds");
    }

    #[test]
    fn paths_on_which_commands_fail_are_refused_with_the_state() {
        assert!([1, 2].into_iter().all(|state| check(1, state).is_ok()));
        for (state, name) in [(3, "inaccessible"), (4, "lost for good"), (15, "about to change")] {
            let error = check(1, state).unwrap_err().to_string();
            assert!(error.starts_with(&format!("the path to namespace 1 is {name}")), "{error}");
        }
    }
}
