//! The successor's side. Each step is a type, so a ring cannot be started before the session has been taken:
//!
//! ```text
//!  apply ─ HELLO ─▶ Offered ─ (restore) ─ READY, GO, TAKEN ─▶ (serve)
//! ```
//!
//! On any error the process must end at once, without a destructor of anything that it was given: the predecessor still owns it.

use super::description::Description;
use super::descriptors::Incoming;
use super::link::{Link, LinkError};
use super::memory_file::{self, DescriptionError};
use super::message::{Hello, Message};
use super::terms::Terms;

/// Why this process does not get the session.
#[derive(Debug, thiserror::Error)]
pub enum NotTaken {
    /// The connection failed.
    #[error("take over: {0}")]
    Link(#[from] LinkError),
    /// The predecessor goes on.
    #[error("take over: the running process refuses: {0}")]
    Refused(String),
    /// The predecessor does not follow the protocol.
    #[error("take over: {0} came, which is not due now")]
    Unexpected(&'static str),
    /// The description cannot be used.
    #[error("take over: {0}")]
    Description(#[from] DescriptionError),
}

/// A session that this process may restore, but not use yet.
pub struct Offered {
    link: Link,
    /// The session.
    pub description: Description,
    /// Its descriptors.
    pub descriptors: Incoming,
}

/// What is needed to take the session.
pub struct Restored(Link);

/// Asks the process at the other end of `link` for its session.
///
/// # Errors
/// See [`NotTaken`].
pub fn apply(mut link: Link, terms: Terms) -> Result<Offered, NotTaken> {
    link.send(&Message::Hello(Hello::new(terms)))?;
    let count = match link.receive()? {
        Message::Session { descriptors } => descriptors,
        Message::Refused(reason) => return Err(NotTaken::Refused(reason)),
        other => return Err(NotTaken::Unexpected(other.name())),
    };
    let mut fds = link.receive_descriptors(count)?;
    if fds.is_empty() {
        return Err(NotTaken::Unexpected("a session without a description"));
    }
    let description = memory_file::read(fds.remove(0))?;
    Ok(Offered { link, description, descriptors: Incoming::counted(fds) })
}

impl Offered {
    /// Splits off what is needed to take the session.
    #[must_use]
    pub fn split(self) -> (Description, Incoming, Restored) {
        (self.description, self.descriptors, Restored(self.link))
    }
}

impl Restored {
    /// Takes the session, of which everything is restored. When this returns, this process owns it.
    ///
    /// # Errors
    /// The predecessor owns it.
    pub fn take(mut self) -> Result<(), NotTaken> {
        self.0.send(&Message::Ready)?;
        match self.0.receive()? {
            Message::Go => {}
            Message::Refused(reason) => return Err(NotTaken::Refused(reason)),
            other => return Err(NotTaken::Unexpected(other.name())),
        }
        Ok(self.0.send(&Message::Taken)?)
    }

    /// Tells the predecessor why the session cannot be restored.
    pub fn fail(mut self, reason: &str) {
        // If it is gone, there is nobody to tell.
        let _ = self.0.send(&Message::Failed(reason.chars().take(2000).collect()));
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::handover::memory_file::tests::description;
    use crate::handover::terms::tests::terms;

    /// Runs a successor against `predecessor`. True if it has taken the session.
    fn run(predecessor: impl FnOnce(Link) + Send + 'static) -> Result<(), NotTaken> {
        let (ours, theirs) = Link::pair().unwrap();
        let thread = thread::spawn(move || predecessor(theirs));
        let taken = apply(ours, terms()).and_then(|offered| offered.split().2.take());
        thread.join().unwrap();
        taken
    }

    fn offer(link: &mut Link) {
        assert!(matches!(link.receive().unwrap(), Message::Hello(hello) if hello.terms == terms()));
        link.send(&Message::Session { descriptors: 1 }).unwrap();
        link.send_descriptors(&[memory_file::write(&description()).unwrap()]).unwrap();
    }

    #[test]
    fn it_owns_the_session_after_ready_go_taken() {
        let taken = run(|mut link| {
            offer(&mut link);
            assert_eq!(link.receive().unwrap(), Message::Ready);
            link.send(&Message::Go).unwrap();
            assert_eq!(link.receive().unwrap(), Message::Taken);
        });
        assert!(taken.is_ok(), "{taken:?}");
    }

    #[test]
    fn it_does_not_own_the_session_if_the_predecessor_closes_after_go() {
        let (ours, mut theirs) = Link::pair().unwrap();
        let predecessor = thread::spawn(move || {
            offer(&mut theirs);
            theirs.send(&Message::Go).unwrap();
            theirs.shut();
            theirs
        });
        let (_, _, restored) = apply(ours, terms()).unwrap().split();
        let mut theirs = predecessor.join().unwrap();

        let taken = restored.take();

        assert!(matches!(taken, Err(NotTaken::Link(LinkError::Closed))), "{taken:?}");
        assert!(!theirs.drain_taken(), "the kernel has refused READY, and nothing came before");
    }

    #[test]
    fn it_does_not_own_the_session_without_go() {
        let closed = run(|mut link| {
            offer(&mut link);
            assert_eq!(link.receive().unwrap(), Message::Ready);
        });
        assert!(matches!(closed, Err(NotTaken::Link(LinkError::Closed))), "{closed:?}");
        let refused = run(|mut link| {
            offer(&mut link);
            link.send(&Message::Refused("stopping".into())).unwrap();
            link.receive().unwrap();
        });
        assert!(matches!(&refused, Err(NotTaken::Refused(reason)) if reason == "stopping"), "{refused:?}");
        let garbled = run(|mut link| {
            offer(&mut link);
            link.send(&Message::Ready).unwrap();
            link.receive().unwrap();
        });
        assert!(matches!(garbled, Err(NotTaken::Unexpected("READY"))), "{garbled:?}");
    }
}
