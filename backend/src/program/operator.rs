//! How an operator reaches this process: the control socket and the metrics.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Signal, getpid, kill_process};

use vhost_device_vfio::config::Config;
use vhost_device_vfio::control::{Hooks, Lines, PermitFn, Personality, Subject};
use vhost_device_vfio::local_server::{Admission, LocalAddress, LocalListener, LocalServer};
use vhost_device_vfio::metrics::Http;
use vhost_device_vfio::service_manager::{self, Passed};
use vhost_device_vfio::socket::{Access, SocketMode};
use vhost_device_vfio::vhost_user::Succession;

use super::logging;

/// How often, and at what intervals, a successor tries to get the port of its predecessor, which is about to end.
const PORT_ATTEMPTS: u32 = 100;
const PORT_INTERVAL: Duration = Duration::from_millis(50);

/// The open sockets, before there is anything to see.
#[derive(Default)]
pub(crate) struct Doors {
    control: Option<LocalListener>,
    metrics: Option<LocalListener>,
}

/// The running servers. They end when the last clone is dropped.
#[derive(Clone, Default)]
pub(crate) struct Operator(Arc<Mutex<Vec<LocalServer>>>);

/// The control socket resets devices: it is for the user of this process and root.
fn for_owner() -> Access {
    Access { mode: Some(SocketMode::OWNER), ..Access::default() }
}

impl Doors {
    /// Opens the sockets that the command line names.
    ///
    /// # Errors
    /// Which one cannot be opened, and why. A path and a passed-in socket exclude each other.
    pub(crate) fn open(config: &Config, passed: Option<&Passed>) -> Result<Self> {
        let control = match (&config.control, passed.and_then(|passed| passed.named("control"))) {
            (Some(path), None) => {
                Some(LocalListener::open(&LocalAddress::Path(path.clone()), &for_owner()).context("--control"))
            }
            (None, Some(number)) => Some(LocalListener::inherit(number).context("the socket named control")),
            (None, None) => None,
            (Some(_), Some(_)) => {
                bail!("--control: a socket named control was passed as well; leave that argument out")
            }
        };
        let metrics = config.metrics.as_ref();
        let metrics = metrics.map(|address| LocalListener::open(address, &Access::default()).context("--metrics"));
        Ok(Self { control: control.transpose()?, metrics: metrics.transpose()? })
    }

    /// Serves `subject` there.
    ///
    /// # Errors
    /// The errno of making a thread.
    pub(crate) fn serve(self, subject: &Arc<Subject>) -> Result<Operator> {
        let operator = Operator::default();
        if let Some(listener) = self.control {
            operator.serve_control(listener, subject)?;
        }
        if let Some(listener) = self.metrics {
            operator.serve_metrics(listener, subject)?;
        }
        Ok(operator)
    }
}

impl Operator {
    fn serve_control(&self, listener: LocalListener, subject: &Arc<Subject>) -> Result<()> {
        let lines = Lines::new(Arc::clone(subject));
        self.keep(LocalServer::start("vdv-control", listener, Admission::OwnUser, lines).context("--control")?);
        Ok(())
    }

    fn serve_metrics(&self, listener: LocalListener, subject: &Arc<Subject>) -> Result<()> {
        let http = Http::new(Arc::clone(subject));
        self.keep(LocalServer::start("vdv-metrics", listener, Admission::Anybody, http).context("--metrics")?);
        Ok(())
    }

    fn keep(&self, server: LocalServer) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(server);
    }

    /// Takes the places of the process that served before this one. A failure is only logged, because the session has been taken.
    pub(crate) fn succeed(&self, config: &Config, subject: &Arc<Subject>) {
        let control = config.control.as_ref().map_or(Ok(()), |path| {
            self.serve_control(LocalListener::replace(path, &for_owner()).context("--control")?, subject)
        });
        let metrics = match &config.metrics {
            None => Ok(()),
            Some(LocalAddress::Path(path)) => LocalListener::replace(path, &Access::default())
                .context("--metrics")
                .and_then(|listener| self.serve_metrics(listener, subject)),
            Some(address @ LocalAddress::Port(_)) => self.await_port(address.clone(), Arc::clone(subject)),
        };
        for error in [control, metrics].into_iter().filter_map(Result::err) {
            log::error!("{error:#}");
        }
    }

    /// Serves at a port as soon as the process before has ended.
    fn await_port(&self, address: LocalAddress, subject: Arc<Subject>) -> Result<()> {
        let operator = self.clone();
        let attempts = move || {
            for attempt in 1..=PORT_ATTEMPTS {
                match LocalListener::open(&address, &Access::default()) {
                    Ok(listener) => {
                        if let Err(error) = operator.serve_metrics(listener, &subject) {
                            log::error!("{error:#}");
                        }
                        return;
                    }
                    Err(error) if attempt == PORT_ATTEMPTS => log::error!("--metrics: {error}"),
                    Err(_) => std::thread::sleep(PORT_INTERVAL),
                }
            }
        };
        std::thread::Builder::new().name("vdv-port".into()).spawn(attempts).context("--metrics").map(drop)
    }

    /// Ends the servers.
    pub(crate) fn close(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// What an operator may ask of the program itself.
pub(crate) fn hooks(personality: Personality, succession: &Succession) -> Hooks {
    let start_successor = move || match personality {
        Personality::VhostUserBlk => kill_process(getpid(), Signal::USR2).map_err(|errno| format!("SIGUSR2: {errno}")),
        Personality::VfioUser => Err("a whole function is not handed over".into()),
    };
    let (set_log_level, start_successor) = (Box::new(logging::set_level), Box::new(start_successor));
    Hooks { set_log_level, start_successor, permit_successor: permit(personality, succession.clone()) }
}

fn permit(personality: Personality, succession: Succession) -> PermitFn {
    Box::new(move |permission| {
        if personality == Personality::VfioUser {
            return Err("a whole function changes its front-end only after the one before has left".into());
        }
        match permission {
            Some(kvm_socket) => {
                log::info!("the operator lets the next front-end wait while this one is served");
                succession.allow_once(kvm_socket);
            }
            None => succession.withdraw(),
        }
        Ok(())
    })
}

/// Tells the service manager who is served.
pub(crate) fn report_front_ends(board: &vhost_device_vfio::board::Board, name: &str, verdict: &str) {
    let line = move |front_end: &str| format!("{name}: {front_end}; DMA {verdict}");
    let (waiting, name, verdict) = (line("no front-end"), name.to_owned(), verdict.to_owned());
    service_manager::status(&waiting);
    board.on_front_end(move |front_end| {
        let front_end = front_end.map_or("no front-end".to_owned(), |front_end| format!("serving {}", front_end.name));
        service_manager::status(&format!("{name}: {front_end}; DMA {verdict}"));
    });
}
