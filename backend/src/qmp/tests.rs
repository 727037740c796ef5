//! Against monitors without a QEMU: what is asked of them, and what those do that answer badly or not at all.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::net::SocketAddrUnix;
use serde_json::Value;
use testbed::monitor::{FakeMonitor, GREETING, Objects};
use vmm_sys_util::tempdir::TempDir;

use super::connection::{MAX_LINE, MAX_TOTAL};
use super::*;

/// Long enough for any answer of a monitor that answers.
const LONG: Duration = Duration::from_secs(20);
const WITH_ID: &str = "/machine/peripheral";
const WITHOUT_ID: &str = "/machine/peripheral-anon";
const OURS: (&str, &str) = ("edu", "child<vfio-user-pci>");

fn ask(monitor: &FakeMonitor, device: Option<&str>) -> Result<String, QmpError> {
    let front_end = FrontEnd { process: Some(std::process::id()), socket: Some("/run/vm[1]/nic.sock".into()) };
    let asked = Monitor::new(monitor.path().into(), device.map(str::to_owned));
    asked.unplug(&front_end, Instant::now() + LONG)
}

/// Asks a monitor that does this with its client, within `limit`.
fn ask_serving(
    limit: Duration,
    serve: impl FnOnce(UnixStream) -> std::io::Result<()> + Send + 'static,
) -> Result<String, QmpError> {
    let monitor = FakeMonitor::serving(|stream, _| serve(stream));
    Monitor::new(monitor.path().into(), None).unplug(&FrontEnd::default(), Instant::now() + limit)
}

/// A virtual machine with these devices, each without children.
fn machine(with_id: &[(&'static str, &'static str)], without_id: &[(&'static str, &'static str)]) -> FakeMonitor {
    let mut objects: Objects = vec![(WITH_ID, with_id.to_vec()), (WITHOUT_ID, without_id.to_vec())];
    objects.push(("/machine/peripheral/edu", vec![("romfile", "str"), ("BAR 0[0]", "child<memory-region>")]));
    objects.push(("/machine/peripheral/nic", vec![]));
    objects.push(("/machine/peripheral-anon/device[1]", vec![]));
    FakeMonitor::of(objects)
}

fn removals(monitor: &FakeMonitor) -> Vec<String> {
    monitor.commands().into_iter().filter(|command| command.starts_with("device_del")).collect()
}

#[test]
fn the_only_device_of_its_type_is_unplugged() {
    let monitor = machine(&[("type", "string"), ("disk", "child<virtio-blk-pci>"), OURS], &[("type", "string")]);

    let device = ask(&monitor, None).unwrap();

    assert_eq!(device, "/machine/peripheral/edu");
    assert_eq!(
        monitor.commands(),
        [
            "qmp_capabilities {}",
            r#"qom-list {"path":"/machine/peripheral"}"#,
            r#"qom-list {"path":"/machine/peripheral/edu"}"#,
            r#"qom-list {"path":"/machine/peripheral-anon"}"#,
            r#"device_del {"id":"/machine/peripheral/edu"}"#,
        ]
    );
}

#[test]
fn a_device_without_an_id_is_unplugged_by_its_path() {
    let monitor = machine(&[], &[("device[0]", "child<virtio-net-pci>"), ("device[1]", OURS.1)]);

    ask(&monitor, None).unwrap();

    assert_eq!(removals(&monitor), [r#"device_del {"id":"/machine/peripheral-anon/device[1]"}"#]);
}

#[test]
fn of_several_devices_the_one_that_uses_the_socket_is_unplugged() {
    // As QEMU 11.1.3 names the regions of /run/vm[1]/nic.sock and of a socket whose path only starts like that.
    let ours = r"vfio-user:\x2frun\x2fvm\x5b1\x5d\x2fnic.sock BAR 0[0]";
    let similar = r"vfio-user:\x2frun\x2fvm\x5b1\x5d\x2fnic.sock2 BAR 0[0]";
    let region = "child<memory-region>";
    let monitor = FakeMonitor::of(vec![
        (WITH_ID, vec![OURS, ("nic", OURS.1), ("drive", OURS.1)]),
        (WITHOUT_ID, vec![]),
        ("/machine/peripheral/edu", vec![(similar, region)]),
        ("/machine/peripheral/nic", vec![("bus master[0]", region), (ours, region)]),
        ("/machine/peripheral/drive", vec![(ours, "link<memory-region>"), ("msix-table[0]", region)]),
    ]);

    ask(&monitor, None).unwrap();

    assert_eq!(removals(&monitor), [r#"device_del {"id":"/machine/peripheral/nic"}"#]);
}

#[test]
fn of_several_devices_none_is_unplugged_unless_it_is_named() {
    let several = || machine(&[OURS, ("nic", OURS.1)], &[("device[1]", OURS.1)]);
    let (unnamed, by_id, by_path) = (several(), several(), several());

    let error = ask(&unnamed, None).unwrap_err();
    ask(&by_id, Some("nic")).unwrap();
    ask(&by_path, Some("/machine/peripheral-anon/device[1]")).unwrap();

    let all = "/machine/peripheral/edu, /machine/peripheral/nic, /machine/peripheral-anon/device[1]";
    assert!(error.to_string().contains(&format!("vfio-user-pci: {all}; name the one")), "{error}");
    assert_eq!(removals(&unnamed), [""; 0]);
    assert_eq!(removals(&by_id), [r#"device_del {"id":"/machine/peripheral/nic"}"#]);
    assert_eq!(removals(&by_path), [r#"device_del {"id":"/machine/peripheral-anon/device[1]"}"#]);
}

#[test]
fn a_device_of_another_type_is_never_unplugged() {
    let others = || machine(&[("disk", "child<virtio-blk-pci>"), ("edu", "child<vfio-user-pci-other>")], &[]);
    let (unnamed, named) = (others(), others());

    let errors = [ask(&unnamed, None), ask(&named, Some("disk"))].map(|result| result.unwrap_err().to_string());

    assert_eq!(errors[0], "QEMU has no device of type vfio-user-pci at all");
    assert_eq!(errors[1], "QEMU has no device of type vfio-user-pci with the ID or QOM path `disk`");
    assert_eq!([removals(&unnamed), removals(&named)], [[""; 0], [""; 0]]);
}

#[test]
fn a_device_with_msix_is_not_unplugged() {
    let monitor = FakeMonitor::of(vec![
        (WITH_ID, vec![OURS]),
        (WITHOUT_ID, vec![]),
        ("/machine/peripheral/edu", vec![("msix-table[0]", "child<memory-region>")]),
    ]);

    let error = ask(&monitor, None).unwrap_err();

    assert!(matches!(&error, QmpError::Msix(device) if device == "/machine/peripheral/edu"), "{error}");
    assert_eq!(removals(&monitor), [""; 0]);
}

#[test]
fn the_monitor_of_another_process_is_sent_nothing() {
    let monitor = machine(&[OURS], &[]);
    let other = std::os::unix::process::parent_id();

    let asked = Monitor::new(monitor.path().into(), None);
    let error = asked.unplug(&FrontEnd { process: Some(other), socket: None }, Instant::now() + LONG).unwrap_err();

    assert!(matches!(error, QmpError::OtherProcess { front_end, .. } if front_end == other), "{error}");
    assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
    assert_eq!(monitor.commands(), [""; 0]);
}

#[test]
fn an_error_of_qemu_is_reported_without_control_characters_and_cut_off() {
    let refusal = |command: &str, _: &Value| match command {
        "qmp_capabilities" => json!({ "return": {} }),
        _ => json!({ "error": { "class": "GenericError", "desc": format!("\x1b[2J{}", "x".repeat(10_000)) } }),
    };
    let error = ask(&FakeMonitor::answering(refusal), None).unwrap_err().to_string();

    assert!(error.starts_with(r"qom-list: QEMU's error: \u{1b}[2Jxxx"), "{error}");
    assert!(error.len() < 400, "{} bytes", error.len());
}

#[test]
fn an_answer_of_another_form_is_an_error() {
    for list in [json!(null), json!({}), json!([1]), json!([{ "name": 1, "type": [] }]), json!("text")] {
        let monitor = FakeMonitor::answering(move |_, _| json!({ "return": list }));
        assert!(matches!(ask(&monitor, None), Err(QmpError::Garbage("list of properties", _))));
    }
    let neither = FakeMonitor::answering(|_, _| json!({ "success": true }));
    assert!(matches!(ask(&neither, None), Err(QmpError::Refused("qmp_capabilities", reason)) if reason == "no reason"));
}

#[test]
fn another_program_at_the_socket_is_recognised() {
    for sent in ["SSH-2.0-x\r\n", "[]\n", "{}\n", "{\"QMP\": 1}\n", "\n", "\0\u{ff}\n", &"[".repeat(100_000), "\"\n"] {
        let sent = format!("{sent}\n");
        let error = ask_serving(LONG, move |mut stream| {
            stream.write_all(sent.as_bytes())?;
            stream.read(&mut [0; 64]).map(drop)
        });
        assert!(matches!(error, Err(QmpError::Garbage("greeting", _))), "{error:?}");
    }
}

#[test]
fn a_monitor_that_is_silent_is_waited_for_in_bounded_time() {
    let silent = |sent: String| {
        ask_serving(Duration::from_millis(50), move |mut stream| {
            stream.write_all(sent.as_bytes())?;
            // Until the other side closes the connection.
            std::io::copy(&mut stream, &mut std::io::sink()).map(drop)
        })
    };
    assert!(matches!(silent(String::new()), Err(QmpError::TimedOut("greeting"))), "as with another client");
    assert!(matches!(silent("{\"QMP\"".into()), Err(QmpError::TimedOut("greeting"))));
    assert!(matches!(silent(format!("{GREETING}\n")), Err(QmpError::TimedOut("qmp_capabilities"))));
}

#[test]
fn a_monitor_that_sends_byte_by_byte_has_no_more_time() {
    let error = ask_serving(Duration::from_millis(200), |mut stream| {
        (0..300).try_for_each(|_| {
            std::thread::sleep(Duration::from_millis(10));
            stream.write_all(b" ")
        })
    });
    assert!(matches!(error, Err(QmpError::TimedOut("greeting"))), "{error:?}");
}

#[test]
fn a_monitor_whose_backlog_is_full_is_waited_for_in_bounded_time() {
    use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("qmp");
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    let _waiting = UnixStream::connect(&path).unwrap();

    let error = Monitor::new(path, None).unplug(&FrontEnd::default(), Instant::now() + Duration::from_millis(50));

    assert!(matches!(error, Err(QmpError::TimedOut("connection"))), "{error:?}");
}

#[test]
fn a_monitor_that_floods_is_read_to_a_limit() {
    let repeated = |before: String, text: &'static str| {
        ask_serving(LONG, move |mut stream| {
            stream.write_all(before.as_bytes())?;
            loop {
                stream.write_all(text.repeat(100).as_bytes())?;
            }
        })
    };
    let line = repeated(String::new(), "no end of the line ");
    let lines = repeated(format!("{GREETING}\n"), "{\"event\": \"RTC_CHANGE\"}\n");

    assert!(matches!(line, Err(QmpError::TooMuch(MAX_LINE, "in a line"))), "{line:?}");
    assert!(matches!(lines, Err(QmpError::TooMuch(MAX_TOTAL, "in all"))), "{lines:?}");
}

#[test]
fn a_monitor_that_closes_the_connection_is_an_error() {
    let at_once = ask_serving(LONG, |stream| {
        drop(stream);
        Ok(())
    });
    let greeted = ask_serving(LONG, |mut stream| writeln!(stream, "{GREETING}"));

    assert!(matches!(at_once, Err(QmpError::Closed("greeting"))), "{at_once:?}");
    assert!(matches!(greeted, Err(QmpError::Closed("qmp_capabilities"))), "{greeted:?}");
}

#[test]
fn nobody_at_the_socket_and_a_path_that_is_too_long_are_errors_with_the_fix() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("qmp");
    let missing = Monitor::new(path.clone(), None).unplug(&FrontEnd::default(), Instant::now() + LONG).unwrap_err();
    drop(UnixListener::bind(&path).unwrap());
    let left_behind = Monitor::new(path, None).unplug(&FrontEnd::default(), Instant::now() + LONG).unwrap_err();

    for error in [missing, left_behind] {
        assert!(error.to_string().contains("start QEMU with -qmp unix:"), "{error}");
    }
    let long = Monitor::new("x".repeat(109).into(), None).unplug(&FrontEnd::default(), Instant::now() + LONG);
    assert!(matches!(long, Err(QmpError::Path(..))), "{long:?}");
}
