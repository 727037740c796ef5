//! Closes a function whose own file was handed out, and acquires it anew.

use std::sync::PoisonError;

use anyhow::anyhow;

use super::replaceable_function::{ReacquireError, Reacquired};
use super::{Passthrough, PassthroughError, route_request};
use crate::coherency::{Facts, decide};

impl Passthrough {
    /// Remembers the process that was given the device's own file, for the log.
    pub(crate) fn note_given_to(&self, process: Option<u32>) {
        *self.given_to.lock().unwrap_or_else(PoisonError::into_inner) = process;
    }

    /// True from the end of an assignment that handed the device's own file out until the function is acquired anew.
    pub(crate) fn is_closed(&self) -> bool {
        !self.function.is_open()
    }

    /// Closes the function if others may have its own file. They keep it; no bind succeeds until they have closed it.
    pub(super) fn close_if_handed_out(&self) {
        if self.function.is_handed_out() {
            // Before the close, while the function is still attached.
            self.space.release();
            self.function.close();
        }
    }

    /// Acquires the function anew if its own file was handed out. Then nobody else has a file of it, and nothing is left of
    /// what others did with the former one.
    ///
    /// # Errors
    /// [`PassthroughError::Held`] if somebody still has the former file; others if the function cannot be acquired, or if the
    /// verdict on its DMA has changed. It stays closed then.
    pub(crate) fn reacquire(&self) -> Result<(), PassthroughError> {
        self.close_if_handed_out();
        if self.function.is_open() {
            return Ok(());
        }
        self.check_unmapped()?;
        let unable = || ReacquireError::Failed(anyhow!("this is not possible; restart this program"));
        let reacquired = self.reacquire.as_ref().map_or_else(|| Err(unable()), |reacquire| reacquire());
        let Reacquired { function, facts } = reacquired.map_err(|error| self.explain(error))?;
        let routed = |()| {
            let step = "route the host's request";
            route_request(&*function, &self.request).map_err(PassthroughError::function(&*function, step))
        };
        // On error the function is dropped. The space must be released before that, while the function is still attached.
        self.check_verdict(&facts).and_then(routed).inspect_err(|_| self.space.release())?;
        self.function.reopen(function);
        self.logs.grants.info(|| format!("{}: acquired anew; nobody else has its file", self.name()));
        Ok(())
    }

    /// Memory would be mapped as the verdict at the start required, so `facts` must lead to the same verdict.
    fn check_verdict(&self, facts: &Facts) -> Result<(), PassthroughError> {
        for shim in [false, true] {
            let [was, now] = [self.facts, *facts].map(|facts| decide(&Facts { shim, ..facts }));
            if was != now {
                return Err(PassthroughError::Verdict { name: self.name().to_owned(), was, now });
            }
        }
        Ok(())
    }

    fn explain(&self, error: ReacquireError) -> PassthroughError {
        let name = self.name().to_owned();
        let given_to = *self.given_to.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            ReacquireError::Held(reason) => PassthroughError::Held { name, given_to, reason },
            ReacquireError::Taken(reason) => PassthroughError::Taken { name, reason },
            ReacquireError::Failed(reason) => PassthroughError::Reacquire { name, reason },
        }
    }
}
