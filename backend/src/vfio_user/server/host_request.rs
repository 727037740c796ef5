//! What follows when the host requests the function: the virtual machine is asked to unplug it, by whichever way it has.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::passthrough::Passthrough;
use crate::qmp::{FrontEnd, Monitor};
use crate::vfio_user::connection::Connection;
use crate::vfio_user::session::Session;

/// Time-out for a monitor to take the request, so that the guest has the rest of `UNPLUG_TIMEOUT` to eject the function.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(5);

/// Asks the `current` front-end, or its `monitor`, to unplug `device`, and logs how. Does not wait for anybody.
pub(super) fn ask(device: &Passthrough, monitor: Option<&Arc<Monitor>>, current: Option<(&Session<'_>, &Connection)>) {
    let how = match current {
        None => "it is not in use",
        Some((session, _)) if session.request_unplug() => "the virtual machine is asked to unplug it within 10 s",
        Some((session, connection)) => {
            let address = connection.socket().local_addr().ok();
            let socket = address.and_then(|address| address.as_pathname().map(Path::to_path_buf));
            ask_monitor(device, monitor, FrontEnd { process: session.peer().pid(), socket })
        }
    };
    log::warn!("{}: the host wants the device back; {how}", device.name());
}

/// Asks the monitor of `front_end`, in a thread: it need not answer. Returns how, for the log.
fn ask_monitor(device: &Passthrough, monitor: Option<&Arc<Monitor>>, front_end: FrontEnd) -> &'static str {
    let Some(monitor) = monitor.cloned() else {
        return "the virtual machine has set no eventfd to be asked by; the device is taken away after 10 s";
    };
    if device.has_msix() {
        return "QEMU is not asked to unplug it, because it aborts when a vfio-user function with MSI-X is unplugged; the device \
                is taken away after 10 s";
    }
    let name = device.name().to_owned();
    let asking = move || match monitor.unplug(&front_end, Instant::now() + MONITOR_TIMEOUT) {
        Ok(device) => log::warn!("{name}: QEMU has asked the guest to eject {device}"),
        Err(error) => log::warn!("{name}: QEMU is not unplugging it: {error}; the device is taken away after 10 s"),
    };
    match std::thread::Builder::new().name("unplug".into()).spawn(asking) {
        Ok(_) => "QEMU's monitor is asked to unplug it within 10 s",
        Err(_) => "no thread can be started to ask QEMU's monitor; the device is taken away after 10 s",
    }
}

#[cfg(test)]
mod tests {
    use testbed::monitor::FakeMonitor;

    use super::*;
    use crate::coherency::{Facts, Personality, Policy};
    use crate::emulated::{Machine, Options};
    use crate::passthrough::BarAccess;

    #[test]
    fn the_monitor_is_not_asked_to_unplug_a_function_with_msix() {
        let machine = Machine::new(Options { size: 1 << 20, ..Options::default() }).unwrap();
        let facts = Facts { personality: Personality::WholeFunction, ..machine.facts(Policy::Suppress).unwrap() };
        let (function, space) = (machine.whole_function(), machine.space());
        let device = Passthrough::new(function, space, BarAccess::Direct, facts, false).unwrap();
        let (asked, commands) = std::sync::mpsc::channel();
        let fake = FakeMonitor::serving(move |_, _| {
            asked.send(()).expect("the test waits");
            Ok(())
        });
        let monitor = Arc::new(Monitor::new(fake.path().into(), None));

        let how = ask_monitor(&device, Some(&monitor), FrontEnd::default());

        assert!(how.contains("it aborts when a vfio-user function with MSI-X is unplugged"), "{how}");
        assert!(commands.try_recv().is_err(), "nobody has connected");
        assert_eq!(Arc::strong_count(&monitor), 1, "and no thread will");
    }
}
