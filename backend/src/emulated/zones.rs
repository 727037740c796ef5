//! The Zoned Namespace command set (ZNS Command Set 1.1): the zones, their states, and the rules of commands on them.
//!
//! ```text
//!         write, append           finish, or the last block
//! Empty ----------------> Open --------------------------> Full
//!   ^ ^                   |  ^                               |
//!   | +--- reset, or      |  | write, append, open           |
//!   |   nothing written --+  |                               |
//!   |              close  v  |                               |
//!   +------- reset ------ Closed <-- another zone is opened  |
//!   +--------------------------- reset ----------------------+
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use super::lock;
use super::wire::Status;
use super::zone_options::ZoneOptions;

/// ZS, of a zone descriptor. ZNS Command Set 1.1 §3.4.2.2.1
const EMPTY: u8 = 1;
const IMPLICITLY_OPEN: u8 = 2;
const EXPLICITLY_OPEN: u8 = 3;
const CLOSED: u8 = 4;
const FULL: u8 = 14;

// Status codes of the command set, all command specific. ZNS Command Set 1.1 §3.1.2
const BOUNDARY_ERROR: Status = Status::new(1, 0xb8).do_not_retry();
const IS_FULL: Status = Status::new(1, 0xb9).do_not_retry();
const INVALID_WRITE: Status = Status::new(1, 0xbc).do_not_retry();
const TOO_MANY_ACTIVE: Status = Status::new(1, 0xbd).do_not_retry();
const TOO_MANY_OPEN: Status = Status::new(1, 0xbe).do_not_retry();
const INVALID_TRANSITION: Status = Status::new(1, 0xbf).do_not_retry();

/// Bytes of a zone in the file that keeps the zones of a medium.
const RECORD: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Zone {
    state: u8,
    /// Blocks written.
    written: u64,
}

/// The zones of the namespace. They are kept beside the medium, if that is a file.
pub(super) struct Zones {
    /// Blocks of a zone, and how many of them can be written.
    size: u64,
    capacity: u64,
    options: ZoneOptions,
    table: Mutex<Vec<Zone>>,
    file: Option<File>,
}

impl Zones {
    /// The zones of a disk of `blocks` blocks of `lba` bytes, as `path` has kept them.
    pub(super) fn open(options: ZoneOptions, lba: u32, blocks: u64, path: Option<&Path>) -> io::Result<Self> {
        let (size, capacity) = (options.size / u64::from(lba), options.capacity() / u64::from(lba));
        let count = usize::try_from(blocks / size).map_err(io::Error::other)?;
        let mut table = vec![Zone { state: EMPTY, written: 0 }; count];
        let file = match path {
            Some(path) => Some(OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?),
            None => None,
        };
        for (n, zone) in table.iter_mut().enumerate() {
            let mut record = [0; RECORD];
            let Some(file) = &file else { break };
            // A zone that is not in the file has never been written.
            if file.read_exact_at(&mut record, (n * RECORD) as u64).is_ok() && record[0] != 0 {
                let written = u64::from_le_bytes(record[8..].try_into().expect("eight bytes"));
                *zone = Zone { state: record[0], written: written.min(capacity) };
            }
        }
        Ok(Self { size, capacity, options, table: Mutex::new(table), file })
    }

    /// Keeps every zone as it is until the result is dropped.
    pub(super) fn lock(&self) -> Locked<'_> {
        Locked { zones: self, table: lock(&self.table) }
    }

    /// MAR, MOR: 0's based; FFFFFFFFh: no limit.
    pub(super) fn limits(&self) -> (u32, u32) {
        (self.options.max_active.wrapping_sub(1), self.options.max_open.wrapping_sub(1))
    }

    /// ZSZE.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// ZASL.
    pub(super) fn append_limit(&self) -> u8 {
        self.options.append_limit
    }
}

/// The locked zones.
pub(super) struct Locked<'a> {
    zones: &'a Zones,
    table: MutexGuard<'a, Vec<Zone>>,
}

impl Locked<'_> {
    /// Index of the zone of `block`, and the position of the block in it.
    fn find(&self, block: u64) -> Result<(usize, u64), Status> {
        let index = usize::try_from(block / self.zones.size).ok().filter(|index| *index < self.table.len());
        Ok((index.ok_or(Status::LBA_OUT_OF_RANGE)?, block % self.zones.size))
    }

    /// The zone that starts at `block`.
    fn starting_at(&self, block: u64) -> Result<usize, Status> {
        let (index, at) = self.find(block)?;
        if at == 0 { Ok(index) } else { Err(Status::INVALID_FIELD) }
    }

    fn count(&self, states: &[u8]) -> usize {
        self.table.iter().filter(|zone| states.contains(&zone.state)).count()
    }

    fn set(&mut self, index: usize, zone: Zone) {
        self.table[index] = zone;
        let mut record = [0; RECORD];
        record[0] = zone.state;
        record[8..].copy_from_slice(&zone.written.to_le_bytes());
        if let Some(file) = &self.zones.file
            && let Err(error) = file.write_all_at(&record, (index * RECORD) as u64)
        {
            log::error!("emulated function: record zone {index}: {error}");
        }
    }

    /// A read must stay in one zone: OZCS.RAZB is 0.
    pub(super) fn admit_read(&self, block: u64, count: u64) -> Result<(), Status> {
        let (_, at) = self.find(block)?;
        if at + count <= self.zones.size { Ok(()) } else { Err(BOUNDARY_ERROR) }
    }

    /// Opens the zone for `count` blocks at `block`, where its write pointer must be. ZNS Command Set 1.1 §2.1.1.3
    pub(super) fn admit_write(&mut self, block: u64, count: u64) -> Result<(), Status> {
        let (index, at) = self.find(block)?;
        let Zone { state, written } = self.table[index];
        if at + count > self.zones.size {
            return Err(BOUNDARY_ERROR);
        }
        if state == FULL {
            return Err(IS_FULL);
        }
        if at != written {
            return Err(INVALID_WRITE);
        }
        if at + count > self.zones.capacity {
            return Err(BOUNDARY_ERROR);
        }
        let open = if state == EXPLICITLY_OPEN { state } else { IMPLICITLY_OPEN };
        self.open(index, open)
    }

    /// Opens the zone that starts at `zone` for `count` blocks. Returns where they go.
    pub(super) fn admit_append(&mut self, zone: u64, count: u64) -> Result<u64, Status> {
        let index = self.starting_at(zone)?;
        let block = zone + self.table[index].written;
        // A full zone would be searched past its end.
        if self.table[index].state == FULL {
            return Err(IS_FULL);
        }
        self.admit_write(block, count)?;
        Ok(block)
    }

    /// Moves the write pointer behind `count` blocks at `block`, which were admitted.
    pub(super) fn written(&mut self, block: u64, count: u64) {
        let Ok((index, at)) = self.find(block) else { return };
        let written = at + count;
        let state = if written == self.zones.capacity { FULL } else { self.table[index].state };
        self.set(index, Zone { state, written });
    }

    /// Puts the zone into an open state, if the limits allow it. An implicitly opened one gives way.
    fn open(&mut self, index: usize, state: u8) -> Result<(), Status> {
        const OPEN: [u8; 2] = [IMPLICITLY_OPEN, EXPLICITLY_OPEN];
        const ACTIVE: [u8; 3] = [IMPLICITLY_OPEN, EXPLICITLY_OPEN, CLOSED];
        let exceeded = |limit: u32, count: usize| limit != 0 && count >= limit as usize;
        let ZoneOptions { max_active, max_open, .. } = self.zones.options;
        let before = self.table[index];
        if !ACTIVE.contains(&before.state) && exceeded(max_active, self.count(&ACTIVE)) {
            return Err(TOO_MANY_ACTIVE);
        }
        if !OPEN.contains(&before.state) && exceeded(max_open, self.count(&OPEN)) {
            let implicit = self.table.iter().position(|zone| zone.state == IMPLICITLY_OPEN);
            self.close(implicit.ok_or(TOO_MANY_OPEN)?);
        }
        self.set(index, Zone { state, ..before });
        Ok(())
    }

    fn close(&mut self, index: usize) {
        let written = self.table[index].written;
        self.set(index, Zone { state: if written == 0 { EMPTY } else { CLOSED }, written });
    }

    /// Zone Management Send: ZSA `action` on the zone at `block`, or on all. ZNS Command Set 1.1 §3.4.3
    pub(super) fn manage(&mut self, block: u64, action: u8, all: bool) -> Result<(), Status> {
        if all && action == 4 {
            for index in 0..self.table.len() {
                self.set(index, Zone { state: EMPTY, written: 0 });
            }
            return Ok(());
        }
        if all {
            return Err(Status::INVALID_FIELD); // the driver has no use for it
        }
        let index = self.starting_at(block)?;
        let Zone { state, .. } = self.table[index];
        match (action, state) {
            (1, IMPLICITLY_OPEN | EXPLICITLY_OPEN) => self.close(index),
            (1, CLOSED) | (2, FULL) => {}
            (2, _) => self.set(index, Zone { state: FULL, written: self.zones.capacity }),
            (3, FULL) | (1, _) => return Err(INVALID_TRANSITION),
            (3, _) => self.open(index, EXPLICITLY_OPEN)?,
            (4, _) => self.set(index, Zone { state: EMPTY, written: 0 }),
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(())
    }

    /// Report Zones of `len` bytes, from the zone of `block` on. ZNS Command Set 1.1 §3.4.2.2.1
    pub(super) fn report(&self, block: u64, len: usize, partial: bool) -> Result<Vec<u8>, Status> {
        const HEADER: usize = 64;
        const DESCRIPTOR: usize = 64;
        let (first, _) = self.find(block)?;
        let matching = self.table.len() - first;
        let fits = len.saturating_sub(HEADER) / DESCRIPTOR;
        let number = if partial { matching.min(fits) } else { matching };
        let mut report = vec![0; len];
        for (to, from) in report.iter_mut().zip((number as u64).to_le_bytes()) {
            *to = from;
        }
        for (n, zone) in self.table[first..].iter().take(fits).enumerate() {
            let start = (first + n) as u64 * self.zones.size;
            let pointer = if zone.state == FULL { u64::MAX } else { start + zone.written };
            let descriptor = &mut report[HEADER + n * DESCRIPTOR..][..DESCRIPTOR];
            (descriptor[0], descriptor[1]) = (2, zone.state << 4); // ZT: sequential write required
            for (at, value) in [(8, self.zones.capacity), (16, start), (24, pointer)] {
                descriptor[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        Ok(report)
    }
}
