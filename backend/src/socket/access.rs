//! Who may connect to a socket that is created here: the mode and the owner of its file. Connecting takes the right to write
//! (unix(7)).

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;

use nix::unistd::{Gid, Group, Uid, User};

/// The mode and the owner of a socket file; what is `None` stays as the kernel makes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Its mode; without it 0777 less the umask.
    pub mode: Option<SocketMode>,
    /// Its user.
    pub user: Option<UserId>,
    /// Its group.
    pub group: Option<GroupId>,
}

/// The mode of a socket file, parsed from octal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketMode(u32);

/// A user, by name or number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserId(u32);

/// A group, by name or number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupId(u32);

impl SocketMode {
    /// For the user of this process alone.
    pub const OWNER: Self = Self(0o600);

    /// The permission bits.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }
}

impl FromStr for SocketMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        match u32::from_str_radix(text, 8) {
            Ok(mode) if digits && mode <= 0o777 => Ok(Self(mode)),
            _ => Err("not an octal mode of at most 777; give 0660 for the user and the group, 0600 for the user alone"
                .into()),
        }
    }
}

impl FromStr for UserId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let find = |name: &str| User::from_name(name).map(|user| user.map(|user| user.uid.as_raw()));
        identity(text, "user", find).map(Self)
    }
}

impl FromStr for GroupId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let find = |name: &str| Group::from_name(name).map(|group| group.map(|group| group.gid.as_raw()));
        identity(text, "group", find).map(Self)
    }
}

/// A number, or the number of a name in the system's databases. The highest number means "no change" to chown(2).
fn identity(text: &str, kind: &str, find: impl Fn(&str) -> nix::Result<Option<u32>>) -> Result<u32, String> {
    if let Ok(number) = text.parse::<u32>() {
        return if number == u32::MAX { Err(format!("{number} is not the number of a {kind}")) } else { Ok(number) };
    }
    match find(text) {
        Ok(Some(number)) => Ok(number),
        Ok(None) => Err(format!("there is no {kind} of this name; create it, or give a number (getent lists them)")),
        Err(errno) => Err(format!("look the {kind} up: {errno}; give its number")),
    }
}

impl Access {
    /// Gives the socket file at `path` its owner. The link itself is meant, not what it may point to.
    pub(super) fn apply(&self, path: &Path) -> io::Result<()> {
        if self.user.is_none() && self.group.is_none() {
            return Ok(());
        }
        let (user, group) = (self.user.map(|UserId(id)| id), self.group.map(|GroupId(id)| id));
        std::os::unix::fs::lchown(path, user, group)
    }
}

/// What `apply` wanted, for an error.
impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = self.user.map(|UserId(id)| match User::from_uid(Uid::from_raw(id)) {
            Ok(Some(user)) => format!("user {} ({id})", user.name),
            _ => format!("user {id}"),
        });
        let group = self.group.map(|GroupId(id)| match Group::from_gid(Gid::from_raw(id)) {
            Ok(Some(group)) => format!("group {} ({id})", group.name),
            _ => format!("group {id}"),
        });
        let names: Vec<_> = user.into_iter().chain(group).collect();
        f.write_str(&names.join(" and "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_octal_and_has_permission_bits_only() {
        assert_eq!("0660".parse(), Ok(SocketMode(0o660)));
        assert_eq!("777".parse(), Ok(SocketMode(0o777)));
        for wrong in ["", "0668", "1777", "rw", "+660", "0o660", "-1"] {
            assert!(wrong.parse::<SocketMode>().unwrap_err().contains("give 0660"), "{wrong}");
        }
    }

    #[test]
    fn names_and_numbers_of_users_and_groups_are_known() {
        assert_eq!("root".parse(), Ok(UserId(0)));
        assert_eq!("root".parse(), Ok(GroupId(0)));
        assert_eq!("107".parse(), Ok(GroupId(107)));
        assert!("no-such-group".parse::<GroupId>().unwrap_err().contains("there is no group of this name; create it"));
        assert!("4294967295".parse::<UserId>().is_err(), "chown(2) takes it for no change");
        let access = Access { user: Some(UserId(0)), group: Some(GroupId(4_000_000_000)), mode: None };
        assert_eq!(access.to_string(), "user root (0) and group 4000000000");
    }
}
