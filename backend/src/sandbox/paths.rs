//! The files that can be named after the start, by landlock: what the command line names, and what the kernel says of the device and
//! of front-ends. Files that are open already are not affected.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, NetPort, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus,
};

/// The newest interface whose rights are meant (Linux 6.12). A newer kernel enforces the same.
const NEWEST: ABI = ABI::V6;

/// What may be named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    /// Directories of sockets that are created or removed while serving.
    pub sockets: Vec<PathBuf>,
    /// What may be read.
    pub readable: Vec<PathBuf>,
    /// Ports to listen on.
    pub ports: Vec<u16>,
}

impl Paths {
    /// A socket at `path` may be created, renamed and removed.
    pub fn add_socket(&mut self, path: &Path) {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !self.sockets.iter().any(|known| known == directory) {
            self.sockets.push(directory.to_owned());
        }
    }

    /// Its rules, for a thread that enters it later. `required`: the kernel must know all rights.
    ///
    /// # Errors
    /// The kernel lacks what is required, or a rule cannot be added. A path that does not exist has no rule.
    pub(super) fn ruleset(&self, required: bool) -> Result<RulesetCreated, RulesetError> {
        let mut ruleset = empty(required)?;
        for (paths, access) in [(&self.sockets, AccessFs::MakeSock | AccessFs::RemoveFile), (&self.readable, reading())]
        {
            for file in paths.iter().filter_map(|path| PathFd::new(path).ok()) {
                ruleset = ruleset.add_rule(PathBeneath::new(file, access))?;
            }
        }
        for port in &self.ports {
            ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::BindTcp))?;
        }
        Ok(ruleset)
    }
}

fn reading() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::ReadDir
}

/// Rules that allow nothing.
///
/// # Errors
/// As for [`Paths::ruleset`].
pub(super) fn empty(required: bool) -> Result<RulesetCreated, RulesetError> {
    let level = if required { CompatLevel::HardRequirement } else { CompatLevel::BestEffort };
    let ruleset = Ruleset::default().set_compatibility(level);
    ruleset.handle_access(AccessFs::from_all(NEWEST))?.handle_access(AccessNet::from_all(NEWEST))?.create()
}

/// What the kernel made of it.
pub(super) fn describe(status: &RestrictionStatus) -> &'static str {
    match status.ruleset {
        RulesetStatus::FullyEnforced => "landlock",
        RulesetStatus::PartiallyEnforced => "landlock as far as this kernel has it",
        RulesetStatus::NotEnforced => "no landlock, which this kernel lacks",
    }
}

/// True if the kernel has landlock at all.
pub(super) fn available() -> bool {
    let first =
        Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::from_all(ABI::V1));
    first.and_then(Ruleset::create).is_ok()
}

/// What a thread finds that restricts itself, and then ends. `None` if it cannot.
pub(super) fn status() -> Option<LandlockStatus> {
    let restrict = || empty(false).and_then(RulesetCreated::restrict_self).map(|status| status.landlock);
    std::thread::spawn(restrict).join().ok()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_a_socket_is_named_once() {
        let mut paths = Paths::default();
        for path in ["/run/a.sock", "/run/b.sock", "here.sock"] {
            paths.add_socket(Path::new(path));
        }
        assert_eq!(paths.sockets, [PathBuf::from("/run"), PathBuf::from(".")]);
    }
}
