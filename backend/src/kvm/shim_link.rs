//! One front-end's link to the shim in its process; what follows from which finding stands in the table of this room.
//!
//! ```text
//!             HELLO answered, REGISTER                       the connection ends, the front-end stays
//!  Waiting ────────────────────────────────────────▶ Met ─────────────────────────▶ Waiting, looked for once more
//!     │ nobody to talk with; nobody at all            │ the front-end leaves
//!     │ when memory is to be mapped                   ▼
//!     └────────────────────────────────────────▶ Without
//! ```

use std::fs::File;
use std::mem::replace;
use std::os::fd::BorrowedFd;

use kvm_vfio_shim::{Client, ClientError, Reason, Registration};

use super::{RegistrationError, Shim, Vmm, describe};
use crate::coherency::Verdict;
use crate::sys::peer_credentials;

/// The link of one front-end.
pub(crate) struct ShimLink<'d> {
    vmm: &'d Vmm,
    /// The front-end's process, if it can be seen from here.
    front_end: Option<u32>,
    state: State,
    /// The connection is new, and nobody watches it yet.
    unwatched: bool,
    /// The shim has gone once.
    went: bool,
}

enum State {
    /// Nobody has answered yet, and why.
    Waiting(Option<ClientError>),
    /// Somebody has; the handle of our registration, if there is one.
    Met(Client, Option<u64>),
    /// This front-end is served without a shim, if at all.
    Without,
}

/// Why a registration did not come about.
enum RegisterFailure {
    /// It must not be gone without.
    Refused(RegistrationError),
    /// There is nobody to talk with any more, or it was turned down and can be gone without.
    Lost(ClientError),
}

impl<'d> ShimLink<'d> {
    /// `front_end` is its process id, if that is known.
    pub(crate) fn new(vmm: &'d Vmm, front_end: Option<u32>) -> Self {
        Self { vmm, front_end, state: State::Waiting(None), unwatched: false, went: false }
    }

    /// Looks for the shim and registers with it, unless that is settled. Costs one `connect` while nobody listens, and at
    /// most [`Client::DEFAULT_TIMEOUT`] for an answer that does not come.
    pub(crate) fn register(&mut self) {
        let (State::Waiting(_), Some(shim), false) = (&self.state, &self.vmm.shim, self.vmm.is_released()) else {
            return;
        };
        self.state = match Client::connect(&shim.socket, Client::DEFAULT_TIMEOUT) {
            Ok((client, status)) => {
                log::info!("{}: KVM shim: {}", shim.device, describe(&status));
                self.compare_processes(shim, &client);
                self.unwatched = true;
                let (state, outcome) = self.register_device(shim, client);
                if let Err(why) = outcome {
                    log::warn!("{why}");
                }
                state
            }
            Err(error @ ClientError::NotListening(..)) => State::Waiting(Some(error)),
            Err(error) => serve_unregistered(shim, &error),
        };
    }

    /// Settles how this front-end is served; memory is to be mapped next.
    ///
    /// # Errors
    /// It must not be mapped.
    pub(crate) fn require_registration(&mut self) -> Result<(), RegistrationError> {
        self.register();
        let (Some(shim), false) = (&self.vmm.shim, self.vmm.is_released()) else { return Ok(()) };
        let (state, outcome) = match replace(&mut self.state, State::Without) {
            State::Waiting(Some(error)) => (serve_unregistered(shim, &error), Ok(())),
            // It may have been for the moment only.
            State::Met(client, None) => self.register_device(shim, client),
            settled => (settled, Ok(())),
        };
        self.state = state;
        match (&self.state, shim.verdict(false)) {
            (State::Without, Verdict::Refuse(refusal)) => Err(RegistrationError::Verdict(shim.device.clone(), refusal)),
            _ => outcome,
        }
    }

    /// True while guest memory is kept from being discarded.
    pub(crate) fn blocks_discards(&self) -> bool {
        matches!(self.state, State::Met(_, Some(_)))
    }

    /// The descriptor to watch from now on, told once for each connection; readable, it wants [`Self::heard`].
    pub(crate) fn take_new_socket(&mut self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Met(client, _) if replace(&mut self.unwatched, false) => client.socket(),
            _ => None,
        }
    }

    /// The shim says something without having been asked: it has gone, or has dropped us. Unless the front-end goes as
    /// well, it is looked for once more.
    pub(crate) fn on_shim_event(&mut self, front_end_goes: bool) {
        let (State::Met(client, _), Some(shim)) = (&mut self.state, &self.vmm.shim) else { return };
        let Err(error) = client.query() else { return };
        self.state = State::Waiting(None);
        self.vmm.count(|registrations| registrations.last = None);
        if front_end_goes {
            return log::info!("{}: {error}", shim.device);
        }
        if replace(&mut self.went, true) {
            self.state = serve_unregistered(shim, &error);
            return;
        }
        log::warn!("{}: {error}", shim.device);
        self.register();
        if let State::Waiting(Some(error)) = &self.state {
            self.state = serve_unregistered(shim, error);
        }
    }

    /// The device reaches no memory of the front-end any more.
    pub(crate) fn unregister(&mut self) {
        let state = replace(&mut self.state, State::Without);
        let (State::Met(mut client, Some(handle)), Some(shim)) = (state, &self.vmm.shim) else { return };
        match client.unregister(handle) {
            Ok(status) => {
                self.vmm.count(|registrations| registrations.last = Some(status));
                log::info!("{}: unregistered: {}", shim.device, describe(&status));
            }
            Err(error) => {
                self.vmm.count(|registrations| registrations.last = None);
                log::info!("{}: unregistered by the end of the connection: {error}", shim.device);
            }
        }
    }

    /// One VM's shim should not hear of another VM's device.
    fn compare_processes(&self, shim: &Shim, client: &Client) {
        let listener = client.socket().and_then(|socket| peer_credentials(socket).ok()?.pid);
        let (Some(listener), Some(front_end)) = (listener, self.front_end) else { return };
        if listener != front_end {
            let (device, socket) = (&shim.device, shim.socket.display());
            log::warn!(
                "{device}: process {listener} listens at {socket}, but the front-end is process {front_end}; unless one \
                 has opened the connection for the other, give this VM's --kvm-socket"
            );
        }
    }

    fn register_device(&self, shim: &Shim, mut client: Client) -> (State, Result<(), RegistrationError>) {
        match register(shim, &mut client) {
            Ok((Registration { handle, status }, told)) => {
                self.vmm.count(|registrations| {
                    registrations.registrations += 1;
                    registrations.told += u64::from(told);
                    registrations.last = Some(status);
                });
                log::info!("{}: registered: {}; DMA is {}", shim.device, describe(&status), shim.verdict(told));
                (State::Met(client, Some(handle)), Ok(()))
            }
            Err(RegisterFailure::Refused(why)) => {
                self.vmm.count(|registrations| registrations.refusals += 1);
                (State::Met(client, None), Err(why))
            }
            Err(RegisterFailure::Lost(error)) => (serve_unregistered(shim, &error), Ok(())),
        }
    }
}

fn serve_unregistered(shim: &Shim, error: &ClientError) -> State {
    let (device, verdict) = (&shim.device, shim.verdict(false));
    log::warn!("{device}: {error}. Guest memory is not kept from being discarded; DMA is {verdict}");
    State::Without
}

/// As the verdict asks. True if KVM has been told.
fn register(shim: &Shim, client: &mut Client) -> Result<(Registration, bool), RegisterFailure> {
    let keep_memory = |client: &mut Client| match client.register_coherent() {
        Ok(registration) => Ok((registration, false)),
        Err(error) => Err(RegisterFailure::Lost(error)),
    };
    let Some(path) = shim.file.as_ref().filter(|_| shim.tells_kvm()) else { return keep_memory(client) };
    let device = shim.device.clone();
    // A second open, which is bound to no iommufd: it gives the VMM no right to the device and keeps nothing pinned.
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(source) => {
            return Err(RegisterFailure::Refused(RegistrationError::File { device, file: path.clone(), source }));
        }
    };
    match client.register_non_coherent(&file) {
        Ok(registration) => Ok((registration, true)),
        Err(ClientError::Refused(refused)) if refused.refusal.reason == Reason::NoVm && shim.serves_untold() => {
            log::warn!("{device}: there is no KVM to tell: {refused}");
            keep_memory(client)
        }
        Err(ClientError::Refused(refused)) => {
            Err(RegisterFailure::Refused(RegistrationError::Refused { device, refused }))
        }
        Err(error) => Err(RegisterFailure::Lost(error)),
    }
}
