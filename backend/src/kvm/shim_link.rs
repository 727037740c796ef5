//! The connection to the shim in one front-end's process. The table in `mod.rs` says what each answer leads to.
//!
//! ```text
//!             HELLO answered, REGISTER                 the connection ends, the front-end stays
//!  Waiting ──────────────────────────────▶ Connected ─────────────────────────▶ Waiting, one more attempt
//!     │ an answer that cannot be used;         │ the front-end leaves
//!     │ no answer when memory must be mapped   ▼
//!     └─────────────────────────────────▶ NoShim
//! ```

use std::io;
use std::mem::replace;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_vfio_shim::{Client, ClientError, Reason, Registration};

use super::{RegistrationError, Shim, Vmm, describe};
use crate::coherency::Verdict;
use crate::handover::{DescriptorError, Incoming, Outgoing, ShimState};
use crate::rate_limited_log::SharedLog;
use crate::sys::peer_credentials;

/// See the top of this file.
pub(crate) struct ShimLink<'d> {
    vmm: &'d Vmm,
    shim: Option<Arc<Shim>>,
    /// The front-end's process id, if it is visible in this PID namespace.
    front_end: Option<u32>,
    state: State,
    /// The socket has not been returned by [`Self::take_new_socket`] yet.
    new_socket: bool,
    /// The shim has disconnected once.
    disconnected: bool,
}

enum State {
    /// Nobody has answered yet; the error of the last attempt.
    Waiting(Option<ClientError>),
    /// The shim has answered; the handle of the registration, if there is one.
    Connected(Client, Option<u64>),
    /// This front-end is served without a shim, or not at all.
    NoShim,
}

/// Why the device was not registered.
enum RegisterFailure {
    /// Memory must be refused.
    Refused(RegistrationError),
    /// The shim cannot be reached any more, or has refused a registration that is not required.
    Unregistered(ClientError),
}

impl<'d> ShimLink<'d> {
    /// `front_end` is its process id, if that is known.
    pub(crate) fn new(vmm: &'d Vmm, front_end: Option<u32>) -> Self {
        Self::with(vmm, vmm.shim(None), front_end)
    }

    /// The same for the next VM, whose shim listens at `socket`. [`Self::succeed`] makes it the one that is served.
    pub(crate) fn of_next(vmm: &'d Vmm, front_end: Option<u32>, socket: Option<PathBuf>) -> Self {
        Self::with(vmm, vmm.shim(socket), front_end)
    }

    fn with(vmm: &'d Vmm, shim: Option<Shim>, front_end: Option<u32>) -> Self {
        let (shim, state) = (shim.map(Arc::new), State::Waiting(None));
        Self { vmm, shim, front_end, state, new_socket: false, disconnected: false }
    }

    /// The VM of this link is the one that is served from now on.
    pub(crate) fn succeed(&self) {
        self.shim.iter().for_each(|shim| self.vmm.move_to(&shim.socket));
    }

    /// Connects to the shim and registers with it, unless that has been tried with a final result. Costs one `connect` while
    /// nobody listens, and at most [`Client::DEFAULT_TIMEOUT`] if no answer comes.
    pub(crate) fn register(&mut self) {
        let (State::Waiting(_), Some(shim), false) = (&self.state, self.shim.clone(), self.vmm.is_released()) else {
            return;
        };
        self.state = match Client::connect(&shim.socket, Client::DEFAULT_TIMEOUT) {
            Ok((client, status)) => {
                self.vmm.log.info(|| format!("{}: KVM shim: {}", shim.device, describe(&status)));
                self.compare_processes(&shim, &client);
                self.new_socket = true;
                let (state, outcome) = self.register_device(&shim, client);
                if let Err(why) = outcome {
                    self.vmm.log.warn(|| why.to_string());
                }
                state
            }
            Err(error @ ClientError::NotListening(..)) => State::Waiting(Some(error)),
            Err(error) => serve_unregistered(&shim, &error, &self.vmm.log),
        };
    }

    /// Decides how this front-end is served. Must be called before memory is mapped.
    ///
    /// # Errors
    /// Why memory must not be mapped.
    pub(crate) fn require_registration(&mut self) -> Result<(), RegistrationError> {
        self.register();
        let (Some(shim), false) = (self.shim.clone(), self.vmm.is_released()) else { return Ok(()) };
        let (state, outcome) = match replace(&mut self.state, State::NoShim) {
            State::Waiting(Some(error)) => (serve_unregistered(&shim, &error, &self.vmm.log), Ok(())),
            // The reason for the refusal may no longer exist.
            State::Connected(client, None) => self.register_device(&shim, client),
            state => (state, Ok(())),
        };
        self.state = state;
        match (&self.state, shim.verdict(false)) {
            (State::NoShim, Verdict::Refuse(refusal)) => Err(RegistrationError::Verdict(shim.device.clone(), refusal)),
            _ => outcome,
        }
    }

    /// Decides whether memory may stay mapped after an event at the shim's socket: a device that is refused without a shim may
    /// do DMA only while it is registered.
    ///
    /// # Errors
    /// Why the device must be taken from the front-end.
    pub(crate) fn check_registration(&self) -> Result<(), RegistrationError> {
        let (Some(shim), false) = (self.shim.clone(), self.vmm.is_released()) else { return Ok(()) };
        match (&self.state, shim.verdict(false)) {
            (State::Connected(_, Some(_)), _) => Ok(()),
            (_, Verdict::Refuse(refusal)) => Err(RegistrationError::Verdict(shim.device.clone(), refusal)),
            _ => Ok(()),
        }
    }

    /// True while the shim blocks discards of guest memory.
    pub(crate) fn blocks_discards(&self) -> bool {
        matches!(self.state, State::Connected(_, Some(_)))
    }

    /// The descriptor to poll, returned once for each connection. Call [`Self::on_shim_event`] when it is readable.
    pub(crate) fn take_new_socket(&mut self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Connected(client, _) if replace(&mut self.new_socket, false) => client.socket(),
            _ => None,
        }
    }

    /// The shim's socket is readable without a request, most likely because the shim has closed the connection. Unless the
    /// front-end leaves as well, one more attempt is made to register.
    pub(crate) fn on_shim_event(&mut self, front_end_goes: bool) {
        let (State::Connected(client, _), Some(shim)) = (&mut self.state, self.shim.clone()) else { return };
        let error = match client.query() {
            Ok(status) => return self.vmm.count(|registrations| registrations.last = Some(status)),
            Err(error) => error,
        };
        self.state = State::Waiting(None);
        self.vmm.count(|registrations| registrations.last = None);
        if front_end_goes {
            return self.vmm.log.info(|| format!("{}: {error}", shim.device));
        }
        if replace(&mut self.disconnected, true) {
            self.state = serve_unregistered(&shim, &error, &self.vmm.log);
            return;
        }
        self.vmm.log.warn(|| format!("{}: {error}", shim.device));
        self.register();
        if let State::Waiting(Some(error)) = &self.state {
            self.state = serve_unregistered(&shim, error, &self.vmm.log);
        }
    }

    /// Describes the registration, if there is a connection.
    pub(crate) fn describe(&self, outgoing: &mut Outgoing) -> io::Result<Option<ShimState>> {
        let State::Connected(client, handle) = &self.state else { return Ok(None) };
        let Some(socket) = client.socket() else { return Ok(None) };
        Ok(Some(ShimState { socket: outgoing.push(socket)?, serial: client.serial(), handle: *handle }))
    }

    /// Goes on with a registration that was handed over. Nothing is sent: the registration may still be another process's.
    pub(crate) fn restore(
        &mut self,
        state: Option<&ShimState>,
        descriptors: &mut Incoming,
    ) -> Result<(), DescriptorError> {
        let (Some(state), Some(shim)) = (state, &self.shim) else { return Ok(()) };
        let socket = descriptors.take(state.socket)?;
        let client = Client::resume(&shim.socket, Client::DEFAULT_TIMEOUT, socket, state.serial);
        (self.state, self.new_socket) = (State::Connected(client, state.handle), true);
        Ok(())
    }

    /// Asks for the status of a registration that [`Self::restore`] has restored, now that it is this process's: for the log and
    /// the statistics, and to register again if the shim has gone meanwhile.
    pub(crate) fn confirm(&mut self) {
        self.on_shim_event(false);
        let (State::Connected(..), Some(shim), Some(status)) = (&self.state, &self.shim, self.vmm.registrations().last)
        else {
            return;
        };
        self.vmm.log.info(|| format!("{}: KVM shim of the process before: {}", shim.device, describe(&status)));
    }

    /// Unregisters the device, which must no longer reach any memory of the front-end.
    pub(crate) fn unregister(&mut self) {
        let state = replace(&mut self.state, State::NoShim);
        let (State::Connected(mut client, Some(handle)), Some(shim)) = (state, &self.shim) else { return };
        match client.unregister(handle) {
            Ok(status) => {
                self.vmm.count(|registrations| registrations.last = Some(status));
                self.vmm.log.info(|| format!("{}: unregistered: {}", shim.device, describe(&status)));
            }
            Err(error) => {
                self.vmm.count(|registrations| registrations.last = None);
                let line = || format!("{}: unregistered by the end of the connection: {error}", shim.device);
                self.vmm.log.info(line);
            }
        }
    }

    /// Warns if the shim is in another process than the front-end: the device must not be registered with another VM.
    fn compare_processes(&self, shim: &Shim, client: &Client) {
        let listener = client.socket().and_then(|socket| peer_credentials(socket).ok()?.pid);
        let (Some(listener), Some(front_end)) = (listener, self.front_end) else { return };
        if listener != front_end {
            let (device, socket) = (&shim.device, shim.socket.display());
            self.vmm.log.warn(|| {
                format!(
                    "{device}: process {listener} listens at {socket}, but the front-end is process {front_end}; give the \
                     --kvm-socket of this VM, unless another process such as libvirt opened the connection for it"
                )
            });
        }
    }

    fn register_device(&self, shim: &Shim, mut client: Client) -> (State, Result<(), RegistrationError>) {
        match register(shim, &mut client, &self.vmm.log) {
            Ok((Registration { handle, status }, told)) => {
                self.vmm.count(|registrations| {
                    registrations.registrations += 1;
                    registrations.told += u64::from(told);
                    registrations.last = Some(status);
                });
                let (device, status, verdict) = (&shim.device, describe(&status), shim.verdict(told));
                self.vmm.log.info(|| format!("{device}: registered: {status}; DMA is {verdict}"));
                (State::Connected(client, Some(handle)), Ok(()))
            }
            Err(RegisterFailure::Refused(why)) => {
                self.vmm.count(|registrations| registrations.refusals += 1);
                (State::Connected(client, None), Err(why))
            }
            Err(RegisterFailure::Unregistered(error)) => (serve_unregistered(shim, &error, &self.vmm.log), Ok(())),
        }
    }
}

fn serve_unregistered(shim: &Shim, error: &ClientError, log: &SharedLog) -> State {
    let (device, verdict) = (&shim.device, shim.verdict(false));
    log.warn(|| format!("{device}: {error}. Guest memory is not kept from being discarded; DMA is {verdict}"));
    State::NoShim
}

/// Registers as the verdict requires. True if KVM has been told.
fn register(shim: &Shim, client: &mut Client, log: &SharedLog) -> Result<(Registration, bool), RegisterFailure> {
    let block_discards = |client: &mut Client| match client.register_coherent() {
        Ok(registration) => Ok((registration, false)),
        Err(error) => Err(RegisterFailure::Unregistered(error)),
    };
    let Some(second) = shim.file.as_ref().filter(|_| shim.must_tell_kvm()) else { return block_discards(client) };
    let device = shim.device.clone();
    let file = match second.open() {
        Ok(file) => file,
        Err(source) => {
            let file = second.to_string();
            return Err(RegisterFailure::Refused(RegistrationError::File { device, file, source }));
        }
    };
    match client.register_non_coherent(&file) {
        Ok(registration) => Ok((registration, true)),
        Err(ClientError::Refused(refused)) if refused.refusal.reason == Reason::NoVm && shim.serves_without_kvm() => {
            log.warn(|| format!("{device}: there is no KVM to tell: {refused}"));
            block_discards(client)
        }
        Err(ClientError::Refused(refused)) => {
            Err(RegisterFailure::Refused(RegistrationError::Refused { device, refused }))
        }
        Err(error) => Err(RegisterFailure::Unregistered(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::thread;

    use kvm_vfio_shim::{Config, Policy, Server, Vm};
    use vmm_sys_util::tempdir::TempDir;

    use super::*;
    use crate::coherency::{self, CacheOps, Facts, NoSnoop, Personality};

    /// A shim in this process, until the test program exits.
    fn shim(directory: &Path) -> PathBuf {
        let socket = directory.join("kvm");
        let config = Config { socket: socket.clone(), policy: Policy::Lock, peer: None, log: |_| () };
        let mut server = Server::new(&config, Box::leak(Box::<Vm>::default())).unwrap();
        thread::spawn(move || server.run());
        socket
    }

    /// One process of several that serve the same coherent device.
    fn process(socket: &Path) -> Vmm {
        let facts = Facts {
            snoop_enforced: true,
            no_snoop: NoSnoop::NeverSet,
            policy: coherency::Policy::Suppress,
            staging: true,
            personality: Personality::Mediated,
            cache_ops: CacheOps::Clflush,
            shim: false,
        };
        Vmm::with_shim(Shim { socket: socket.into(), device: "disk".into(), facts, file: None })
    }

    fn hand_over(from: &ShimLink<'_>, to: &mut ShimLink<'_>) {
        let mut outgoing = Outgoing::default();
        let state = from.describe(&mut outgoing).unwrap();
        let fds = outgoing.as_slice().iter().map(|fd| fd.try_clone().unwrap()).collect();
        to.restore(state.as_ref(), &mut Incoming::counted(fds)).unwrap();
    }

    #[test]
    fn a_registration_that_was_handed_over_is_kept_and_its_status_is_asked_for() {
        let directory = TempDir::new().unwrap();
        let socket = shim(directory.as_path());
        let (before, after) = (process(&socket), process(&socket));
        let (mut predecessor, mut successor) = (ShimLink::new(&before, None), ShimLink::new(&after, None));
        predecessor.register();

        hand_over(&predecessor, &mut successor);
        drop(predecessor);
        successor.confirm();

        assert!(successor.blocks_discards());
        let found = after.registrations();
        assert_eq!((found.registrations, found.last.map(|status| status.registered)), (0, Some(1)));
        successor.unregister();
        assert_eq!(after.registrations().last.map(|status| status.registered), Some(0));
    }
}
