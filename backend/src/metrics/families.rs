//! The metrics, by name. Names and units follow the conventions of Prometheus: base units, `_total` for counters.

use super::text::{Exposition, Format, Kind};
use crate::control::{Snapshot, Subject};
use crate::engine::{DeviceState, OPERATIONS, Statistics};

/// The bounds of the histogram, as powers of two of nanoseconds: 8 µs to 8.6 s.
const BOUNDS: std::ops::RangeInclusive<u32> = 13..=33;

/// All metrics of `subject`.
pub(super) fn write(subject: &Subject, format: Format) -> String {
    let mut text = Exposition::new(format);
    write_subject(&mut text, subject);
    if let Some(snapshot) = subject.snapshot() {
        write_requests(&mut text, &snapshot);
        write_queues(&mut text, &snapshot);
        write_latencies(&mut text, &snapshot);
    }
    text.finish()
}

fn write_subject(text: &mut Exposition, subject: &Subject) {
    let posted = subject.board().read();
    text.family("vhost_device_vfio", Kind::Info, "The program and the device that it serves.");
    text.sample(
        &[
            ("version", env!("CARGO_PKG_VERSION")),
            ("personality", subject.personality()),
            ("device", subject.device()),
            ("verdict", subject.verdict_word()),
        ],
        1,
    );
    text.family("vhost_device_vfio_front_end_connected", Kind::Gauge, "1 while a front-end is connected.");
    text.sample(&[], u8::from(posted.front_end.is_some()));
    text.family("vhost_device_vfio_front_ends", Kind::Counter, "Front-ends that have connected.");
    text.sample(&[], posted.front_ends);
    text.family("vhost_device_vfio_mapped_memory_bytes", Kind::Gauge, "Memory that is mapped for the device.");
    text.sample(&[], subject.space().mapped);
    if let Some(state) = subject.device_state() {
        text.family(
            "vhost_device_vfio_device_up",
            Kind::Gauge,
            "1 while the device works, 0 while it is reset or away.",
        );
        text.sample(&[], u8::from(state == DeviceState::Up));
    }
}

fn write_requests(text: &mut Exposition, snapshot: &Snapshot) {
    let Statistics { aborts, recoveries, .. } = snapshot.counters;
    text.family(
        "vhost_device_vfio_device_resets",
        Kind::Counter,
        "Device resets because of overdue commands, failures or requests.",
    );
    text.sample(&[], recoveries);
    text.family(
        "vhost_device_vfio_command_aborts",
        Kind::Counter,
        "Commands that were aborted because they took too long.",
    );
    text.sample(&[], aborts);

    text.family("vhost_device_vfio_requests", Kind::Counter, "Requests that the device has completed.");
    for_each_worker(snapshot, |worker, counted| {
        let Statistics { reads, writes, flushes, discards, write_zeroes, .. } = *counted;
        for (operation, count) in OPERATIONS.iter().zip([reads, writes, flushes, discards, write_zeroes]) {
            text.sample(&[("worker", worker), ("operation", operation)], count);
        }
    });
    text.family("vhost_device_vfio_transferred_bytes", Kind::Counter, "Data that was read or written successfully.");
    for_each_worker(snapshot, |worker, counted| {
        text.sample(&[("worker", worker), ("operation", "read")], counted.bytes_read);
        text.sample(&[("worker", worker), ("operation", "write")], counted.bytes_written);
    });
    type Value = fn(&Statistics) -> u64;
    let counters: [(&str, &str, Value); 7] = [
        ("vhost_device_vfio_request_errors", "Requests that ended in an error.", |s| s.errors),
        ("vhost_device_vfio_resubmitted_requests", "Requests that were submitted again.", |s| s.resubmitted),
        ("vhost_device_vfio_bounced_commands", "Commands whose data went through a bounce buffer.", |s| s.bounced),
        ("vhost_device_vfio_kicks", "Kicks that woke a worker.", |s| s.kicks),
        ("vhost_device_vfio_calls", "Notifications sent to a driver.", |s| s.calls),
        ("vhost_device_vfio_doorbells", "Doorbells written.", |s| s.doorbells),
        ("vhost_device_vfio_cache_flushed_bytes", "Data whose cache lines were flushed around requests.", |s| {
            s.flushed_bytes
        }),
    ];
    for (name, help, value) in counters {
        text.family(name, Kind::Counter, help);
        for_each_worker(snapshot, |worker, counted| text.sample(&[("worker", worker)], value(counted)));
    }
}

fn for_each_worker(snapshot: &Snapshot, mut write: impl FnMut(&str, &Statistics)) {
    for (worker, report) in snapshot.workers.iter().enumerate() {
        write(&worker.to_string(), &report.statistics);
    }
}

fn write_queues(text: &mut Exposition, snapshot: &Snapshot) {
    let mut rings: Vec<_> = snapshot.workers.iter().flat_map(|worker| &worker.rings).collect();
    rings.sort_by_key(|ring| ring.virtqueue);
    text.family(
        "vhost_device_vfio_virtqueue_requests",
        Kind::Counter,
        "Requests of a virtqueue that have a used entry.",
    );
    for ring in &rings {
        text.sample(&[("virtqueue", &ring.virtqueue.to_string())], ring.completed);
    }
    text.family(
        "vhost_device_vfio_virtqueue_in_flight",
        Kind::Gauge,
        "Requests taken from a virtqueue and not yet completed.",
    );
    for ring in &rings {
        text.sample(&[("virtqueue", &ring.virtqueue.to_string())], ring.in_flight);
    }
}

/// Only operations of which any were timed.
fn write_latencies(text: &mut Exposition, snapshot: &Snapshot) {
    let timed = OPERATIONS.iter().zip(&snapshot.latencies).filter(|(_, summary)| summary.count() != 0);
    for (n, (operation, summary)) in timed.enumerate() {
        if n == 0 {
            let help = "Time from taking a request to completing it, while that is measured.";
            text.family("vhost_device_vfio_request_duration_seconds", Kind::Histogram, help);
        }
        let below: Vec<_> = BOUNDS.map(|power| ((1_u64 << power) as f64 / 1e9, summary.below_power(power))).collect();
        text.histogram(&[("operation", operation)], &below, (summary.count(), summary.total().as_secs_f64()));
    }
}
