//! From lists of calls to seccomp filters.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::Role;
use super::calls::{Call, Condition, of_role};

/// The filter of a role. `process` is the number of this process.
///
/// # Errors
/// This architecture has no filters, or the lists contradict themselves.
pub(super) fn of(role: Role, process: u32) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for Call { number, condition } in of_role(role) {
        let rules = rules.entry(number).or_default();
        if let Some(condition) = condition {
            rules.extend(alternatives(condition, process)?);
        }
    }
    SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, architecture()?)?.try_into()
}

/// The filter that makes C libraries use `clone`, whose flags a filter can see, in place of `clone3`.
///
/// # Errors
/// This architecture has no filters.
pub(super) fn without_clone3() -> Result<BpfProgram, BackendError> {
    let answer = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    SeccompFilter::new(rules, SeccompAction::Allow, answer, architecture()?)?.try_into()
}

/// A call is allowed if any of these holds.
fn alternatives(condition: Condition, process: u32) -> Result<Vec<SeccompRule>, BackendError> {
    let one = |argument, operator, value| {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
        SeccompRule::new(vec![condition])
    };
    match condition {
        Condition::OneOf(argument, values) => {
            values.iter().map(|&value| one(argument, SeccompCmpOp::Eq, value)).collect()
        }
        Condition::Without(argument, bits) => Ok(vec![one(argument, SeccompCmpOp::MaskedEq(bits), 0)?]),
        Condition::With(argument, bits) => Ok(vec![one(argument, SeccompCmpOp::MaskedEq(bits), bits)?]),
        Condition::ThisProcess(argument) => Ok(vec![one(argument, SeccompCmpOp::Eq, process.into())?]),
    }
}

fn architecture() -> Result<TargetArch, BackendError> {
    std::env::consts::ARCH.try_into()
}
