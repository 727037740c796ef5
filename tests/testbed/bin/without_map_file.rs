//! `without-map-file PROGRAM [ARGUMENT…]`: runs a program for which IOMMU_IOAS_MAP_FILE answers ENOTTY, as before Linux 6.13. A
//! seccomp filter answers instead of the kernel; every other call is the kernel's.

use std::error::Error;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use iommufd_bindings::iommufd::{IOMMUFD_CMD_IOAS_MAP_FILE, IOMMUFD_TYPE};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let Some((program, arguments)) = words.split_first() else {
        eprintln!("usage: without-map-file PROGRAM [ARGUMENT…]");
        return ExitCode::from(2);
    };
    let error = match filter().and_then(|filter| Ok(apply_filter(&filter)?)) {
        Ok(()) => Command::new(program).args(arguments).exec().into(),
        Err(error) => error,
    };
    eprintln!("without-map-file: {error}");
    ExitCode::FAILURE
}

/// Answers ENOTTY to the ioctl, whose number is the second argument of the system call.
fn filter() -> Result<BpfProgram, Box<dyn Error>> {
    // _IO(type, number), as in linux/iommufd.h.
    let number = u64::from(IOMMUFD_TYPE) << 8 | u64::from(IOMMUFD_CMD_IOAS_MAP_FILE);
    let is_map_file = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, number)?;
    let rules = [(libc::SYS_ioctl, vec![SeccompRule::new(vec![is_map_file])?])];
    let answer = SeccompAction::Errno(libc::ENOTTY.unsigned_abs());
    let filter = SeccompFilter::new(rules.into_iter().collect(), SeccompAction::Allow, answer, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}
