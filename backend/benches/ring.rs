//! Cost of one request in the ring loop: take the chain, read the header, translate the data addresses, write the status, and
//! push a used entry. Used entries are published, and the notification decided, once per batch of 32. Our split and packed
//! rings are compared with `virtio-queue`, which has no packed ring, on the same bytes in the same run. Only the ratio is
//! comparable between machines. "recorded" is the same with the requests in flight recorded for the next process.

#![allow(missing_docs, reason = "criterion's macros make public functions")]
#![allow(clippy::unwrap_used, reason = "a benchmark may stop")]

mod requests;

use std::fs::File;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device_vfio::addr::{Gpa, Span};
use vhost_device_vfio::driver::Geometry;
use vhost_device_vfio::engine::LiveGeometry;
use vhost_device_vfio::engine::guest_memory::GuestMemoryView;
use vhost_device_vfio::engine::inflight_region::Tracking;
use vhost_device_vfio::engine::request::pending_used::PendingUsed;
use vhost_device_vfio::engine::request::{Disk, Status, Transfer};
use vhost_device_vfio::engine::virtqueue::{FastRing, Virtqueue};
use vhost_device_vfio::engine::{InflightRegion, Layout, VringSetup};
use vhost_device_vfio::memory::map_shared_file;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use requests::{AVAIL, DESC, INDIRECT, Memory, SIZE, TABLES, USED, fill, memory, setup};

const BATCH: u16 = 32;
/// The packed ring and its indirect tables.
const PACKED: u64 = 0x8000;
const PACKED_SIZE: u16 = 255;
const PACKED_TABLES: u64 = 0x3_0000;

/// The driver side of a packed ring with the requests of [`fill`]. It writes every descriptor again in each round, as every
/// driver must.
struct PackedDriver {
    memory: GuestMemoryMmap,
    /// Descriptors per request.
    descriptors: u16,
    ring: Vec<[u64; 2]>,
    count: u64,
}

impl PackedDriver {
    fn new(memory: &GuestMemoryMmap, regions: u64, indirect: bool) -> Self {
        fill(memory, 0, regions, indirect);
        let descriptors = if indirect { 1 } else { 3 };
        let mut ring = Vec::new();
        for n in 0..u64::from(PACKED_SIZE / 3) {
            let entry = |at: u64| memory.read_obj::<[u64; 2]>(GuestAddress(at)).unwrap();
            // The flags move up by 16 bits, above the buffer ID.
            let pack = |[addr, rest]: [u64; 2]| [addr, rest & 0xffff_ffff | (rest >> 32 & 0xffff) << 48 | n << 32];
            let request = 64 * (n % u64::from(SIZE / 4));
            for part in 0..3 {
                let at = if indirect { TABLES } else { DESC } + request + 16 * part;
                let packed = pack(entry(at));
                if indirect {
                    memory
                        .write_obj([packed[0], packed[1]], GuestAddress(PACKED_TABLES + request + 16 * part))
                        .unwrap();
                } else {
                    ring.push(packed);
                }
            }
            if indirect {
                ring.push([PACKED_TABLES + request, 48 | n << 32 | u64::from(INDIRECT) << 48]);
            }
        }
        Self { memory: memory.clone(), descriptors, ring, count: 0 }
    }

    fn size(&self) -> u16 {
        u16::try_from(self.ring.len()).unwrap()
    }

    /// Makes a batch available.
    fn offer(&mut self) {
        let len = self.ring.len() as u64;
        for _ in 0..BATCH * self.descriptors {
            let slot = self.count % len;
            let flags = if (self.count / len).is_multiple_of(2) { 1 << 55 } else { 1 << 63 };
            let [addr, rest] = self.ring[usize::try_from(slot).unwrap()];
            self.memory.write_obj([addr, rest | flags], GuestAddress(PACKED + 16 * slot)).unwrap();
            self.count += 1;
        }
    }
}

fn packed(memory: &Memory, regions: u64, indirect: bool, recorded: bool) -> impl FnMut(u64) -> Duration {
    let span = |start, len| Span::new(Gpa(start), len).unwrap();
    let mut driver = PackedDriver::new(&memory.theirs, regions, indirect);
    memory.theirs.write_obj(2_u32 << 16, GuestAddress(AVAIL)).unwrap(); // RING_EVENT_FLAGS_DESC, as with EVENT_IDX
    let setup = VringSetup {
        layout: Layout::Packed,
        size: driver.size(),
        desc: span(PACKED, 0x4000),
        base: Layout::Packed.first_base(),
        inflight: recorded.then(|| record(Layout::Packed, driver.size())),
        ..setup(0)
    };
    let mut serve = serve(memory, &setup);
    // The driver writes three descriptors per request; that time is not counted.
    move |rounds| {
        let mut total = Duration::ZERO;
        for _ in 0..rounds {
            driver.offer();
            let start = Instant::now();
            serve();
            total += start.elapsed();
        }
        total
    }
}

fn offer(memory: &GuestMemoryMmap, index: &mut u16) {
    *index = index.wrapping_add(BATCH);
    memory.write_obj(*index, GuestAddress(AVAIL + 2)).unwrap();
}

/// Memory for the record of a ring's requests in flight.
fn record(layout: Layout, size: u16) -> InflightRegion {
    let len = InflightRegion::bytes(layout, size) as u64;
    let file = File::from(memfd_create("record", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, len).unwrap();
    InflightRegion::new(map_shared_file(file, 0, len).unwrap(), layout, size).unwrap()
}

fn split(memory: &Memory, recorded: bool) -> impl FnMut() {
    for ring in [AVAIL, USED] {
        memory.theirs.write_obj(0_u32, GuestAddress(ring)).unwrap();
    }
    let inflight = recorded.then(|| record(Layout::Split, SIZE));
    let mut serve = serve(memory, &VringSetup { inflight, ..setup(0) });
    let (theirs, mut index) = (memory.theirs.clone(), 0);
    move || {
        offer(&theirs, &mut index);
        serve();
    }
}

/// Takes a batch of requests of the fast shape as a worker does.
#[inline]
fn take_fast(ring: &mut impl FastRing, guest: &mut GuestMemoryView, disk: &Disk, taken: &mut Vec<PendingUsed>) {
    let (mut guest, bounds) = (guest.batch().unwrap(), disk.bounds());
    while taken.len() < usize::from(BATCH) {
        let Some(fast) = ring.peek_fast(&mut guest) else { return };
        let Some(transfer) = Transfer::in_batch(&fast, &mut guest, bounds) else {
            return ring.leave_fast(fast.head());
        };
        ring.take_fast(fast.head());
        assert_eq!(transfer.data.len(), 4096);
        black_box(&transfer.data);
        taken.push(transfer.pending_used(fast.head()));
    }
}

/// Serves all available requests, which are a batch of the fast shape.
fn serve(memory: &Memory, setup: &VringSetup) -> impl FnMut() + use<> {
    let geometry = Geometry { blocks: 1 << 20, block_size: 512, physical_block_size: 512, ..Geometry::default() };
    let disk = Disk::new(&geometry, Arc::new(LiveGeometry::of(&geometry)));
    let mut ring = Virtqueue::new(setup, &memory.ours).unwrap();
    if let Some(record) = &setup.inflight {
        assert_eq!(ring.track(record), Ok(Tracking::On { recovered: 0 }));
    }
    let mut guest = GuestMemoryView::default();
    guest.publish(Arc::clone(&memory.ours));
    let mut taken = Vec::with_capacity(BATCH.into());
    move || {
        assert!(ring.available().unwrap() >= BATCH);
        match &mut ring {
            Virtqueue::Split(ring) => take_fast(ring, &mut guest, &disk, &mut taken),
            Virtqueue::Packed(ring) => take_fast(ring, &mut guest, &disk, &mut taken),
        }
        assert_eq!(taken.len(), usize::from(BATCH));
        for pending_used in taken.drain(..) {
            guest.write_status(pending_used.status().unwrap(), Status::Ok as u8);
            ring.push_used(pending_used.complete(), 4097);
        }
        black_box(ring.publish());
    }
}

fn virtio_queue(memory: &Memory) -> impl FnMut() {
    let memory = memory.theirs.clone();
    memory.write_obj(0_u32, GuestAddress(AVAIL)).unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(u32::try_from(DESC).unwrap()), Some(0));
    queue.set_avail_ring_address(Some(u32::try_from(AVAIL).unwrap()), Some(0));
    queue.set_used_ring_address(Some(u32::try_from(USED).unwrap()), Some(0));
    queue.set_event_idx(true);
    queue.set_ready(true);
    let mut index = 0;
    move || {
        offer(&memory, &mut index);
        let mut done = [0_u16; BATCH as usize];
        for (chain, slot) in queue.iter(&memory).unwrap().zip(&mut done) {
            *slot = chain.head_index();
            for (n, desc) in chain.enumerate() {
                match n {
                    0 => drop(black_box(memory.read_obj::<[u8; 16]>(desc.addr()).unwrap())),
                    1 => drop(black_box(memory.get_slice(desc.addr(), desc.len() as usize).unwrap())),
                    _ => memory.write_obj(0_u8, desc.addr()).unwrap(),
                }
            }
        }
        for head in done {
            queue.add_used(&memory, head, 4097).unwrap();
        }
        black_box(queue.needs_notification(&memory).unwrap());
    }
}

fn ring_loop(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("request");
    group.throughput(Throughput::Elements(BATCH.into()));
    for (chains, indirect) in [("linked", false), ("indirect", true)] {
        for regions in [1, 16] {
            let memory = memory(regions);
            fill(&memory.theirs, 0, regions, indirect);
            let name = format!("{chains}, {regions} regions");
            for (suffix, recorded) in [("", false), (", recorded", true)] {
                let id = |layout| BenchmarkId::new(format!("{layout}{suffix}"), &name);
                fill(&memory.theirs, 0, regions, indirect);
                group.bench_function(id("split"), |bench| bench.iter(split(&memory, recorded)));
                group.bench_function(id("packed"), |bench| {
                    bench.iter_custom(packed(&memory, regions, indirect, recorded));
                });
            }
            fill(&memory.theirs, 0, regions, indirect);
            group.bench_function(BenchmarkId::new("virtio-queue", &name), |bench| bench.iter(virtio_queue(&memory)));
        }
    }
    group.finish();
}

criterion_group!(benches, ring_loop);
criterion_main!(benches);
