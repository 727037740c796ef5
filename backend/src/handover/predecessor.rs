//! The order of the predecessor's steps. Nothing here does I/O, so the order is tested as it is.
//!
//! ```text
//!  drain ─▶ stop ─▶ describe ─▶ send ─▶ READY ─▶ GO ─▶ TAKEN ─▶ leave
//!    │        │         │         └────────┴───────┴──────┴─ no ─▶ close ─ TAKEN was there ─▶ leave
//!    │        └─────────┴─ no ─▶ resume                              └─ no ─▶ end the successor ─▶ resume
//!    └─ no ─▶ (nothing has changed)
//! ```

/// The process that owns the session. An error is its reason, for both logs.
pub trait Owner {
    /// What is sent.
    type Session;
    /// Takes no more requests, and waits for those taken. On error nothing has changed.
    ///
    /// # Errors
    /// The drive is slow, is being reset, or is away.
    fn drain(&mut self) -> Result<(), String>;
    /// Stops the rings, which keep their positions, and then the controller.
    ///
    /// # Errors
    /// [`Self::resume`] follows.
    fn stop(&mut self) -> Result<(), String>;
    /// Describes the session.
    ///
    /// # Errors
    /// [`Self::resume`] follows.
    fn describe(&mut self) -> Result<Self::Session, String>;
    /// Starts the controller, then the rings where they stopped, and takes requests again.
    fn resume(&mut self);
    /// Leaves everything to the successor.
    fn leave(&mut self);
}

/// The process that asks for the session. All waits are limited. An error is its reason.
pub trait Successor<S> {
    /// Tells it why it does not get the session.
    fn refuse(&mut self, reason: &str);
    /// Sends the session.
    ///
    /// # Errors
    /// It is gone, or does not read.
    fn send(&mut self, session: S) -> Result<(), String>;
    /// Waits until it is ready.
    ///
    /// # Errors
    /// It has failed, is gone, or is silent.
    fn await_ready(&mut self) -> Result<(), String>;
    /// Lets it take the session.
    ///
    /// # Errors
    /// It is gone.
    fn go(&mut self) -> Result<(), String>;
    /// Waits until it has taken the session.
    ///
    /// # Errors
    /// It is gone, or is silent.
    fn await_taken(&mut self) -> Result<(), String>;
    /// Closes the connection, so that it cannot take the session any more. True if it has done so before.
    fn close(&mut self) -> bool;
    /// Ends its process, which may have started the controller.
    fn end(&mut self);
}

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The successor owns the session. This process must not touch it any more.
    Taken,
    /// This process goes on, for this reason.
    Kept(String),
}

/// Hands the session of `owner` over to `successor`, or goes on as if nothing had been.
pub fn hand_over<O: Owner>(owner: &mut O, successor: &mut impl Successor<O::Session>) -> Outcome {
    if let Err(reason) = owner.drain() {
        successor.refuse(&reason);
        return Outcome::Kept(reason);
    }
    let session = match owner.stop().and_then(|()| owner.describe()) {
        Ok(session) => session,
        Err(reason) => {
            owner.resume();
            successor.refuse(&reason);
            return Outcome::Kept(reason);
        }
    };
    let Err(reason) = offer(session, successor) else {
        owner.leave();
        return Outcome::Taken;
    };
    if successor.close() {
        owner.leave();
        return Outcome::Taken;
    }
    successor.end();
    owner.resume();
    Outcome::Kept(reason)
}

fn offer<S>(session: S, successor: &mut impl Successor<S>) -> Result<(), String> {
    successor.send(session)?;
    successor.await_ready()?;
    successor.go()?;
    successor.await_taken()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    type Steps = Rc<RefCell<Vec<&'static str>>>;

    /// Records the steps, and fails at one of them.
    struct Recorder {
        steps: Steps,
        fails_at: &'static str,
        taken_at_close: bool,
    }

    impl Recorder {
        fn step(&self, name: &'static str) -> Result<(), String> {
            self.steps.borrow_mut().push(name);
            if name == self.fails_at { Err(name.to_owned()) } else { Ok(()) }
        }
    }

    impl Owner for Recorder {
        type Session = ();
        fn drain(&mut self) -> Result<(), String> {
            self.step("drain")
        }
        fn stop(&mut self) -> Result<(), String> {
            self.step("stop")
        }
        fn describe(&mut self) -> Result<(), String> {
            self.step("describe")
        }
        fn resume(&mut self) {
            self.steps.borrow_mut().push("resume");
        }
        fn leave(&mut self) {
            self.steps.borrow_mut().push("leave");
        }
    }

    impl Successor<()> for Recorder {
        fn refuse(&mut self, _: &str) {
            self.steps.borrow_mut().push("refuse");
        }
        fn send(&mut self, (): ()) -> Result<(), String> {
            self.step("send")
        }
        fn await_ready(&mut self) -> Result<(), String> {
            self.step("ready")
        }
        fn go(&mut self) -> Result<(), String> {
            self.step("go")
        }
        fn await_taken(&mut self) -> Result<(), String> {
            self.step("taken")
        }
        fn close(&mut self) -> bool {
            self.steps.borrow_mut().push("close");
            self.taken_at_close
        }
        fn end(&mut self) {
            self.steps.borrow_mut().push("end");
        }
    }

    fn run(fails_at: &'static str, taken_at_close: bool) -> (Outcome, Vec<&'static str>) {
        let steps = Steps::default();
        let recorder = || Recorder { steps: Rc::clone(&steps), fails_at, taken_at_close };
        let outcome = hand_over(&mut recorder(), &mut recorder());
        (outcome, steps.take())
    }

    const ALL: [&str; 7] = ["drain", "stop", "describe", "send", "ready", "go", "taken"];

    #[test]
    fn the_session_is_described_when_it_stands_still_and_left_when_it_is_taken() {
        let (outcome, steps) = run("", false);
        assert_eq!((outcome, steps), (Outcome::Taken, [&ALL[..], &["leave"]].concat()));
    }

    #[test]
    fn a_drive_that_does_not_drain_is_not_touched() {
        assert_eq!(run("drain", false).1, ["drain", "refuse"]);
    }

    #[test]
    fn rings_go_on_if_the_controller_does_not_stop_or_the_session_cannot_be_described() {
        assert_eq!(run("stop", false).1, ["drain", "stop", "resume", "refuse"]);
        assert_eq!(run("describe", false).1, ["drain", "stop", "describe", "resume", "refuse"]);
    }

    #[test]
    fn whichever_step_the_successor_fails_at_it_is_cut_off_and_ended_before_the_owner_goes_on() {
        for (at, step) in ALL.iter().enumerate().skip(3) {
            let (outcome, steps) = run(step, false);
            assert_eq!(outcome, Outcome::Kept((*step).to_owned()));
            assert_eq!(steps, [&ALL[..=at], &["close", "end", "resume"]].concat(), "{step}");
        }
    }

    #[test]
    fn a_successor_that_had_taken_the_session_when_the_connection_was_closed_keeps_it() {
        let (outcome, steps) = run("taken", true);
        assert_eq!((outcome, steps), (Outcome::Taken, [&ALL[..], &["close", "leave"]].concat()));
    }
}
