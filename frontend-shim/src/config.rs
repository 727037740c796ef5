//! The shim's settings, from the VMM's environment.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use rustix::fs::Uid;

use crate::wire::Policy;

/// The server's settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen.
    pub socket: PathBuf,
    /// Whether KVM's answer may change once a vCPU has run.
    pub policy: Policy,
    /// A user that may connect besides this process's own.
    pub peer: Option<Uid>,
    /// Writes one line to the VMM's log.
    pub log: fn(fmt::Arguments<'_>),
}

/// An environment variable with an invalid value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadVariable {
    name: &'static str,
    value: OsString,
    wanted: &'static str,
}

impl fmt::Display for BadVariable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}: wanted {}", self.name, self.value.display(), self.wanted)
    }
}

impl std::error::Error for BadVariable {}

impl Config {
    /// Reads `KVM_VFIO_SHIM_SOCKET` (a path; `None` without it), `KVM_VFIO_SHIM_POLICY` (`lock` or `dynamic`) and
    /// `KVM_VFIO_SHIM_UID` through `variable`.
    ///
    /// # Errors
    /// The variable with the invalid value.
    pub fn from_variables(
        variable: impl Fn(&'static str) -> Option<OsString>,
        log: fn(fmt::Arguments<'_>),
    ) -> Result<Option<Self>, BadVariable> {
        let get = |name| variable(name).filter(|value| !value.is_empty());
        let Some(socket) = get("KVM_VFIO_SHIM_SOCKET") else { return Ok(None) };
        let bad = |name, value, wanted| BadVariable { name, value, wanted };
        let policy = match get("KVM_VFIO_SHIM_POLICY") {
            None => Policy::Lock,
            Some(value) if value == "lock" => Policy::Lock,
            Some(value) if value == "dynamic" => Policy::Dynamic,
            Some(value) => return Err(bad("KVM_VFIO_SHIM_POLICY", value, "`lock` or `dynamic`")),
        };
        let peer = match get("KVM_VFIO_SHIM_UID") {
            None => None,
            // u32::MAX means "no change" to chown.
            Some(value) => match value.to_str().and_then(|text| text.parse().ok()).filter(|&uid| uid != u32::MAX) {
                Some(uid) => Some(Uid::from_raw(uid)),
                None => return Err(bad("KVM_VFIO_SHIM_UID", value, "a numeric user id")),
            },
        };
        Ok(Some(Self { socket: socket.into(), policy, peer, log }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Config>, BadVariable> {
        let find = |name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value));
        Config::from_variables(find, |_| ())
    }

    #[test]
    fn without_a_socket_there_is_no_shim() {
        assert!(read(&[]).unwrap().is_none());
        assert!(read(&[("KVM_VFIO_SHIM_SOCKET", ""), ("KVM_VFIO_SHIM_POLICY", "dynamic")]).unwrap().is_none());
    }

    #[test]
    fn the_default_is_lock_and_this_user() {
        let config = read(&[("KVM_VFIO_SHIM_SOCKET", "/run/vm1/kvm.sock")]).unwrap().unwrap();
        assert_eq!(
            (config.socket.to_str(), config.policy, config.peer),
            (Some("/run/vm1/kvm.sock"), Policy::Lock, None)
        );
    }

    #[test]
    fn an_invalid_value_is_named_with_what_was_wanted() {
        for (name, value) in
            [("KVM_VFIO_SHIM_POLICY", "loose"), ("KVM_VFIO_SHIM_UID", "-1"), ("KVM_VFIO_SHIM_UID", "4294967295")]
        {
            let error = read(&[("KVM_VFIO_SHIM_SOCKET", "/s"), (name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(value) && error.contains("wanted"), "{error}");
        }
    }
}
