//! The control loop's session in the service manager's store.

use std::os::fd::AsFd;

use super::Error;
use super::server::ControlLoop;

impl ControlLoop<'_> {
    /// Saves the session of the running rings, if messages have been served since it was last saved.
    pub(super) fn save(&mut self) {
        let Some(store) = self.store.as_mut().filter(|store| store.is_due()) else { return };
        match &self.connection {
            Some(connection) => {
                let write_cache = self.device.engine.write_cache();
                store.save((true, write_cache), |outgoing| connection.describe(outgoing));
            }
            None => store.clear(),
        }
    }

    /// Stops the rings and leaves the session in the store, with their positions. The front-end stays connected. False if there is
    /// no session, or no store that could keep it.
    ///
    /// # Errors
    /// The engine has failed.
    pub(super) fn leave_stored(&mut self) -> Result<bool, Error> {
        let (Some(store), Some(connection)) = (self.store.as_mut(), &self.connection) else { return Ok(false) };
        // A message may have arrived in part; it is the next process's. One that was served is saved here.
        connection.session().pause()?;
        let write_cache = self.device.engine.write_cache();
        store.save((false, write_cache), |outgoing| connection.describe(outgoing));
        if !store.is_saved() {
            return Ok(false);
        }
        store.flush();
        self.poller.remove(connection.socket().as_fd()).map_err(Error::system("epoll_ctl"))?;
        log::info!("stopping; the service manager keeps {} connected", connection.session().peer());
        // The registration with the VM's shim lasts as long as its socket, which is stored, too.
        connection.session().release_memory()?;
        self.connection = None;
        Ok(true)
    }
}
