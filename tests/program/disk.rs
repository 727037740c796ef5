//! Requests of a front-end with a guest's rings, through the process to the emulated drive and back.

use testbed::client::{Client, Request, Shape};

use crate::process::{LIMIT, Process};

/// Bytes that differ from sector to sector.
fn pattern(sector: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|i| ((sector + i / 512).wrapping_mul(31) + i).to_le_bytes()[0]).collect()
}

#[test]
fn written_data_is_read_back_at_every_size() {
    for options in ["size=16M", "size=16M,lba=4096", "size=16M,sgl=on,mdts=1", "size=16M,mode=inline"] {
        let process = Process::serve(options);
        let mut client = process.client();
        assert_eq!(client.capacity(), 16 << 11);
        for (sector, bytes) in [(0, 4096), (8, 8192), (1024, 65536), ((16 << 11) - 8, 4096)] {
            let written = pattern(sector, bytes);
            client.write(sector, &written).unwrap();
            let mut found = vec![0; bytes];
            client.read(sector, &mut found).unwrap();
            assert!(found == written, "{options}: {bytes} bytes at {sector}");
        }
        client.flush().unwrap();
    }
}

#[test]
fn a_request_past_the_end_fails_and_the_next_one_does_not() {
    let process = Process::serve("size=1M");
    let mut client = process.client();
    let error = client.read(2048, &mut [0; 512]).unwrap_err().to_string();
    assert!(error.contains("status 1"), "{error}");
    client.read(2047, &mut [0; 512]).unwrap();
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let process = Process::serve_with("size=1M", &["--read-only"]);
    let mut client = process.client();
    assert!(client.write(0, &[1; 512]).is_err());
    client.read(0, &mut [0; 512]).unwrap();
}

#[test]
fn a_file_keeps_the_data_from_one_process_to_the_next() {
    let mut first = Process::serve("file=DIR/disk,create=on,size=4M");
    first.client().write(16, &pattern(16, 4096)).unwrap();
    let file = first.path("disk");
    first.stop();
    assert!(std::fs::read(&file).unwrap()[8192..12288] == pattern(16, 4096));

    let second = Process::serve(&format!("file={}", file.display()));

    let mut found = vec![0; 4096];
    second.client().read(16, &mut found).unwrap();
    assert!(found == pattern(16, 4096));
}

/// Submits as many writes at once as fit into all rings of the client, then reads the same sectors.
fn all_slots_of_all_rings(client: &mut Client, shape: Shape) {
    let (depth, bytes) = (u64::from(shape.depth), shape.bytes);
    let sector_of = |queue: u64, n: u64| (queue * depth + n) * (bytes as u64 / 512);
    for (queue, ring) in (0..).zip(&mut client.rings) {
        for sector in (0..depth).map(|n| sector_of(queue, n)) {
            let slot = ring.submit(Request::Write { sector, bytes });
            ring.set_data(slot, &pattern(sector, bytes));
        }
        ring.publish();
    }
    for ring in &mut client.rings {
        for _ in 0..depth {
            assert_eq!(ring.wait(LIMIT).unwrap().expect("in time").status, 0, "{shape:?}");
        }
    }
    let mut sectors = vec![vec![0; usize::from(shape.depth)]; shape.queues];
    for (queue, ring) in client.rings.iter_mut().enumerate() {
        for sector in (0..depth).map(|n| sector_of(queue as u64, n)) {
            let slot = ring.submit(Request::Read { sector, bytes });
            ring.set_data(slot, &vec![0xcc; bytes]);
            sectors[queue][usize::from(slot)] = sector;
        }
        ring.publish();
    }
    for (ring, sectors) in client.rings.iter_mut().zip(sectors) {
        for _ in 0..depth {
            let done = ring.wait(LIMIT).unwrap().expect("in time");
            let mut found = vec![0; bytes];
            ring.data(done.slot, &mut found);
            assert!(
                done.status == 0 && found == pattern(sectors[usize::from(done.slot)], bytes),
                "{done:?}, {shape:?}"
            );
        }
    }
}

#[test]
fn many_requests_in_flight_on_two_queues_complete_with_their_data() {
    let process = Process::serve("size=16M,latency=100us");
    for shape in (Shape { queues: 2, depth: 32, bytes: 4096, ..Shape::default() }).kinds() {
        all_slots_of_all_rings(&mut process.client_of(shape), shape);
    }
}

#[test]
fn sixty_four_full_virtqueues_of_1024_descriptors_are_served() {
    let mut process =
        Process::start(&["--socket-path", "DIR/socket", "--device", "emulated:size=64M", "--queues", "64"]);
    process.wait_for_socket();
    // Each request has three descriptors. The size of a split ring is the next power of two, 1024.
    for packed in [false, true] {
        let shape = Shape { queues: 64, depth: 256, bytes: 4096, indirect: false, packed, ..Shape::default() };
        all_slots_of_all_rings(&mut process.client_of(shape), shape);
    }
}

#[test]
fn no_snoop_is_disabled_or_the_drive_is_refused() {
    let mut process = Process::serve("size=1M,no-snoop=controllable,snoop-enforced=off");
    let mut client = process.client();
    client.write(8, &pattern(8, 4096)).unwrap();
    let mut found = vec![0; 4096];
    client.read(8, &mut found).unwrap();
    assert!(found == pattern(8, 4096));
    let log = process.stop().log;
    assert!(log.contains("DMA is coherent: No Snoop is disabled"), "{log}");

    let device = "emulated:no-snoop=controllable,snoop-enforced=off";
    let output = Process::run(&["--socket-path", "DIR/socket", "--device", device, "--no-snoop", "refuse"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.log.contains("refused: the device can bypass the CPU caches"), "{}", output.log);
}

#[test]
fn a_non_coherent_drive_serves_correct_data_because_memory_is_flushed() {
    for mode in ["threaded", "inline"] {
        let options = format!("size=1M,no-snoop=controllable,snoop-enforced=off,mode={mode}");
        let mut process = Process::serve_with(&options, &["--no-snoop", "allow"]);
        let mut client = process.client();
        for round in 0..20 {
            for (sector, bytes) in [(8, 512), (9, 512), (64, 4096), (128, 65536)] {
                let written = pattern(sector + round, bytes);
                client.write(sector, &written).unwrap();
                let mut found = vec![0; bytes];
                client.read(sector, &mut found).unwrap();
                assert!(found == written, "{mode}, round {round}: {bytes} bytes at {sector}");
            }
        }
        let log = process.stop().log;
        assert!(log.contains("DMA is not coherent: flushed"), "{log}");
    }
}

#[test]
fn the_log_has_the_device_the_front_end_and_the_statistics() {
    let mut process = Process::serve("size=16M,serial=ABC");
    let mut client = process.client();
    client.write(0, &[1; 4096]).unwrap();
    client.read(0, &mut [0; 4096]).unwrap();
    client.flush().unwrap();
    drop(client);

    let log = process.stop().log;

    for part in [
        "emulated: software IOMMU; No Snoop never set",
        "emulated: DMA is coherent: the IOMMU enforces snooping",
        "(serial ABC, ",
        "listening on ",
        "front-end connected: ",
        "front-end disconnected: ",
        "statistics: reads=1 writes=1 flushes=1 ",
        "bytes_read=4096 bytes_written=4096 ",
        "errors=0 ",
    ] {
        assert!(log.contains(part), "{part} is not in:\n{log}");
    }
}
