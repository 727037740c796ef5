//! What is saved of a session.

use serde::{Deserialize, Serialize};

use crate::handover::{Description, FrontEnd, Terms};

/// A session between two processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSession {
    /// [`Description::VERSION`].
    pub version: u32,
    /// What the process was started with. The next one must have the same.
    pub terms: Terms,
    /// The rings run, so their positions are not known.
    pub live: bool,
    /// The write cache is on.
    pub write_cache: bool,
    /// The front-end's part.
    pub front_end: FrontEnd,
}

impl SavedSession {
    /// Why a process with `terms` cannot go on with this session; `None` if it can.
    pub(super) fn obstacle(&self, terms: &Terms) -> Option<String> {
        if let Some(conflict) = self.terms.conflict(terms) {
            return Some(conflict);
        }
        let lost = self.live && self.front_end.inflight.is_none();
        lost.then(|| {
            "the process before has crashed, and the front-end keeps no record of requests in flight".to_owned()
        })
    }

    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let malformed = |error: serde_json::Error| format!("the saved session: {error}");
        let Versioned { version } = serde_json::from_slice(text).map_err(malformed)?;
        if version != Description::VERSION {
            return Err(format!("the saved session has version {version}, this is version {}", Description::VERSION));
        }
        serde_json::from_slice(text).map_err(malformed)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::handover::{FdNumber, InflightState};

    pub(in super::super) fn terms() -> Terms {
        Terms {
            device: "0000:00:04.0".into(),
            queues: 1,
            namespace: None,
            read_only: false,
            no_snoop: "suppress".into(),
            kvm_socket: None,
        }
    }

    pub(in super::super) fn saved(live: bool, inflight: bool) -> SavedSession {
        let state = InflightState { file: FdNumber(1), size: 4096, offset: 0, queues: 1, entries: 128 };
        let front_end = FrontEnd {
            connection: FdNumber(0),
            asked_features: true,
            acked_features: Some(1 << 32),
            negotiated: true,
            protocol_features: 0,
            status: 0,
            refusals: 0,
            channel: None,
            files: Vec::new(),
            regions: Vec::new(),
            inflight: inflight.then_some(state),
            log: None,
            log_event: None,
            rings: Vec::new(),
            shim: None,
        };
        SavedSession { version: Description::VERSION, terms: terms(), live, write_cache: true, front_end }
    }

    #[test]
    fn a_crash_without_inflight_regions_is_an_obstacle_and_a_restart_is_not() {
        assert!(saved(true, false).obstacle(&terms()).unwrap().contains("no record of requests in flight"));
        assert_eq!(saved(true, true).obstacle(&terms()), None);
        assert_eq!(saved(false, false).obstacle(&terms()), None);
        let other = Terms { queues: 2, ..terms() };
        assert!(saved(false, true).obstacle(&other).unwrap().contains("--queues 1, the successor 2"));
    }

    #[test]
    fn a_session_of_another_version_is_refused() {
        assert_eq!(
            SavedSession::parse(br#"{"version":9}"#),
            Err("the saved session has version 9, this is version 1".into())
        );
        let text = serde_json::to_vec(&saved(true, true)).unwrap();
        assert_eq!(SavedSession::parse(&text), Ok(saved(true, true)));
    }
}
