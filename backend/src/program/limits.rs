//! The limits of this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit on open files to the hard one. Each memory file of a virtual machine is one, and the usual soft limit of
/// 1024, which exists for `select`, is less than the number of maps that a front-end may make.
pub(crate) fn raise_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let text = |limit: Option<u64>| limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => log::debug!("RLIMIT_NOFILE: raised from {} to {}", text(current), text(maximum)),
        Err(error) => log::debug!("RLIMIT_NOFILE: stays {}: raise it to {}: {error}", text(current), text(maximum)),
    }
}
