//! What the service manager passes at the start: sockets to listen on, and what the process before has stored.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{OwnedFd, RawFd};

use super::saved::SavedSession;
use super::state_file::{Left, StateFile};
use super::store::{PREFIX, TEXT, name};
use crate::handover::{FdKey, Incoming, Terms};
use crate::sys::{inherit, take_variable};

/// The first descriptor that is passed (sd_listen_fds(3)).
const LISTEN_FDS_START: RawFd = 3;

/// Names of descriptors that are not sockets for front-ends: the device's file, an open `/dev/iommu`, the device's second file, and a
/// listening socket for the operator.
const NAMES: [&str; 4] = ["device", "iommu", "kvm", "control"];

/// The descriptors that the service manager has passed to this process.
#[derive(Debug)]
pub struct Passed {
    /// `$LISTEN_FDS`, without what was stored.
    pub count: String,
    /// Those to listen on.
    pub sockets: Vec<RawFd>,
    /// Those that have one of [`NAMES`].
    named: Vec<(RawFd, String)>,
    /// What was stored.
    pub stored: Option<Stored>,
}

/// What the process before has stored.
#[derive(Debug)]
pub struct Stored {
    names: Vec<String>,
    /// Their numbers tell which is newer.
    texts: BTreeMap<u32, OwnedFd>,
    fds: HashMap<u32, OwnedFd>,
    /// Which files those are.
    known: HashMap<FdKey, u32>,
}

impl Passed {
    /// Takes what was passed; `None` if nothing was.
    ///
    /// # Errors
    /// A stored descriptor cannot be taken, or two have the same name.
    pub fn take() -> io::Result<Option<Self>> {
        let [count, pid, names] = ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"].map(take_variable);
        let (Some(count), Some(pid)) = (count, pid) else { return Ok(None) };
        if pid.parse() != Ok(std::process::id()) {
            return Ok(None);
        }
        let Ok(number) = count.parse::<u16>() else {
            return Ok(Some(Self { count, sockets: Vec::new(), named: Vec::new(), stored: None }));
        };
        let (sockets, stored) = split(number, names.as_deref())?;
        let (named, stored): (Vec<_>, Vec<_>) =
            stored.into_iter().partition(|(_, name)| NAMES.contains(&name.as_str()));
        let stored = if stored.is_empty() { None } else { Some(Stored::inherit(&stored)?) };
        Ok(Some(Self { count: sockets.len().to_string(), sockets, named, stored }))
    }

    /// The descriptor that was passed with this name.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<RawFd> {
        self.named.iter().find(|(_, found)| found == name).map(|(number, _)| *number)
    }
}

/// The sockets, and the other descriptors with their names.
type Split = (Vec<RawFd>, Vec<(RawFd, String)>);

/// Tells them apart. Without names all are sockets.
fn split(count: u16, names: Option<&str>) -> io::Result<Split> {
    let count = usize::from(count);
    let names = names.map_or_else(|| vec![""; count], |names| names.split(':').collect());
    // A socket is named after its unit, if nothing else is said, and the instance may be a PCI address.
    if count != 0 && names.len() != count {
        return Err(io::Error::other(format!(
            "LISTEN_FDNAMES has {} names for {count} descriptors, so one of them contains a colon; give the socket unit \
             FileDescriptorName=socket",
            names.len()
        )));
    }
    let all = (LISTEN_FDS_START..).zip(names).take(count);
    let (others, sockets): (Vec<_>, Vec<_>) =
        all.partition(|(_, name)| name.starts_with(PREFIX) || NAMES.contains(name));
    let twice = NAMES.into_iter().find(|wanted| others.iter().filter(|(_, name)| name == wanted).count() > 1);
    if let Some(name) = twice {
        return Err(io::Error::other(format!("LISTEN_FDNAMES has the name {name} twice")));
    }
    let others = others.into_iter().map(|(number, name)| (number, name.to_owned())).collect();
    Ok((sockets.into_iter().map(|(number, _)| number).collect(), others))
}

impl Stored {
    /// What a process has stored that has handed its session over: names only, because this process has the session.
    #[must_use]
    pub fn of_predecessor(stored: &[(Option<FdKey>, u32)]) -> Self {
        let name =
            |(key, number): &(Option<FdKey>, u32)| key.as_ref().map_or(format!("{TEXT}{number}"), |_| name(*number));
        let known = stored.iter().filter_map(|(key, number)| Some((key.clone()?, *number))).collect();
        Self { names: stored.iter().map(name).collect(), texts: BTreeMap::new(), fds: HashMap::new(), known }
    }

    fn inherit(passed: &[(RawFd, String)]) -> io::Result<Self> {
        let (mut names, mut texts, mut fds) = (Vec::new(), BTreeMap::new(), HashMap::new());
        let mut known = HashMap::new();
        for (fd, name) in passed {
            let fd = inherit(*fd)?;
            names.push(name.clone());
            let number = |prefix| name.strip_prefix(prefix).and_then(|number| number.parse::<u32>().ok());
            if let Some(number) = number(TEXT) {
                texts.insert(number, fd);
            } else if let Some(number) = number(PREFIX) {
                known.insert(FdKey::of(&fd)?, number);
                fds.insert(number, fd);
            }
        }
        Ok(Self { names, texts, fds, known })
    }

    /// The session that was saved, with its descriptors, if this process can go on with it. `Err` says why it cannot; then the
    /// front-end is disconnected as soon as the store and this value are gone.
    ///
    /// # Errors
    /// The reason.
    pub fn session(&mut self, terms: &Terms) -> Result<Option<(SavedSession, Incoming)>, String> {
        let (_, text) = self.texts.pop_last().ok_or("the saved session is missing")?;
        let left = StateFile::open(text)
            .and_then(|text| text.left())
            .map_err(|error| format!("the saved session: {error}"))?;
        let text = match left {
            Left::InAMessage => return Err("the process before has ended in the midst of a message".into()),
            Left::Text(text) if text.is_empty() => return Ok(None),
            Left::Text(text) => text,
        };
        let session = SavedSession::parse(&text)?;
        if let Some(obstacle) = session.obstacle(terms) {
            return Err(obstacle);
        }
        Ok(Some((session, Incoming::numbered(std::mem::take(&mut self.fds)))))
    }

    /// The files that are stored, with their numbers. They keep these: the manager ignores a file that it has already, so under
    /// a second name it would not be there.
    pub(super) fn known(&self) -> HashMap<FdKey, u32> {
        self.known.clone()
    }

    /// The names of everything else: the texts.
    pub(super) fn others(&self) -> Vec<String> {
        let known: Vec<_> = self.known.values().map(|number| name(*number)).collect();
        self.names.iter().filter(|name| !known.contains(name)).cloned().collect()
    }

    /// A number that none of them has.
    pub(super) fn next_number(&self) -> u32 {
        let number = |name: &String| name.rsplit('.').next()?.parse::<u32>().ok();
        self.names.iter().filter_map(number).max().map_or(0, |last| last.wrapping_add(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service_manager::saved::tests::{saved, terms};

    fn stored(file: &StateFile) -> Stored {
        use std::os::fd::AsFd;
        let texts = BTreeMap::from([(8, file.as_fd().try_clone_to_owned().unwrap())]);
        let names = ["vdv.session.8", "vdv.7", "vdv.40"].map(str::to_owned).to_vec();
        Stored { names, texts, fds: HashMap::new(), known: HashMap::new() }
    }

    #[test]
    fn sockets_and_stored_descriptors_are_told_apart_by_their_names() {
        let (sockets, stored) = split(4, Some("disk.socket:vdv.session.0:vdv.3:")).unwrap();
        assert_eq!(sockets, [3, 6], "one has no name");
        assert_eq!(stored, [(4, "vdv.session.0".to_owned()), (5, "vdv.3".to_owned())]);
        assert_eq!(split(1, Some("")).unwrap(), (vec![3], Vec::new()));
        assert_eq!(split(2, None).unwrap().0, [3, 4]);
    }

    #[test]
    fn the_device_and_what_belongs_to_it_are_no_sockets() {
        let (sockets, others) = split(6, Some("device:disk.socket:iommu:kvm:control:vdv.3")).unwrap();
        assert_eq!(sockets, [4]);
        let others: Vec<_> = others.iter().map(|(number, name)| (*number, name.as_str())).collect();
        assert_eq!(others, [(3, "device"), (5, "iommu"), (6, "kvm"), (7, "control"), (8, "vdv.3")]);
        assert!(split(2, Some("device:device")).unwrap_err().to_string().contains("the name device twice"));
    }

    #[test]
    fn a_name_with_colons_is_refused_with_the_setting_that_avoids_it() {
        let error = split(1, Some("disk@0000:00:04.0.socket")).unwrap_err().to_string();
        assert!(error.contains("has 3 names for 1 descriptors"), "{error}");
        assert!(error.contains("FileDescriptorName=socket"), "{error}");
    }

    #[test]
    fn a_file_that_is_stored_keeps_its_name_and_the_text_does_not() {
        let (one, two) = rustix::pipe::pipe().unwrap();
        let [one, two] = [one, two].map(|fd| FdKey::of(&fd).unwrap());
        let stored = Stored::of_predecessor(&[(Some(one.clone()), 3), (None, 2), (Some(two.clone()), 7)]);
        assert_eq!(stored.known(), HashMap::from([(one, 3), (two, 7)]));
        assert_eq!(stored.others(), ["vdv.session.2"]);
    }

    #[test]
    fn the_newer_of_two_texts_counts() {
        let (mut older, newer) = (StateFile::create().unwrap(), StateFile::create().unwrap());
        older.replace(&serde_json::to_vec(&saved(true, true)).unwrap()).unwrap();
        let mut both = stored(&older);
        both.texts.extend(stored(&newer).texts.into_values().map(|text| (9, text)));
        assert!(both.session(&terms()).unwrap().is_none());
    }

    #[test]
    fn names_are_not_used_again() {
        assert_eq!(stored(&StateFile::create().unwrap()).next_number(), 41);
    }

    #[test]
    fn a_session_saved_between_messages_is_found_and_none_after_a_message() {
        let mut file = StateFile::create().unwrap();
        assert!(stored(&file).session(&terms()).unwrap().is_none(), "no session");
        file.replace(&serde_json::to_vec(&saved(true, true)).unwrap()).unwrap();
        assert_eq!(stored(&file).session(&terms()).unwrap().unwrap().0, saved(true, true));
        file.set_busy().unwrap();
        assert!(stored(&file).session(&terms()).unwrap_err().contains("in the midst of a message"));
    }

    #[test]
    fn a_session_that_cannot_go_on_is_refused_with_the_reason() {
        let mut file = StateFile::create().unwrap();
        file.replace(&serde_json::to_vec(&saved(true, false)).unwrap()).unwrap();
        assert!(stored(&file).session(&terms()).unwrap_err().contains("has crashed"));
        file.replace(b"no JSON").unwrap();
        assert!(stored(&file).session(&terms()).is_err());
        assert!(Stored { texts: BTreeMap::new(), ..stored(&file) }.session(&terms()).is_err());
    }
}
