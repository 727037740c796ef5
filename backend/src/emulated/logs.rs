//! Get Log Page (NVMe 2.0 §5.16). The offsets are those in the specification's figures.

use super::controller::Controller;
use super::event_state::{CHANGED_LOG, ERROR_LOG, ERRORS_KEPT};
use super::nvm::BROADCAST;
use super::traffic::Traffic;
use super::wire::{Entry, Status};
use super::{FIRMWARE, lock};

const SMART: u8 = 0x02;
const FIRMWARE_SLOT: u8 = 0x03;
const ANA: u8 = 0x0c;
const ERROR_BYTES: usize = 64;
const PAGE_BYTES: usize = ERRORS_KEPT * ERROR_BYTES;

/// Buffer for the largest log page. Shorter pages use only the start.
type Page = [u8; PAGE_BYTES];

fn put(page: &mut Page, offset: usize, bytes: &[u8]) {
    page[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl Controller {
    /// Transfers the requested part of a log page to the host.
    pub(super) fn get_log_page(&self, entry: &Entry) -> Result<u32, Status> {
        let page_id = entry.cdw(10).to_le_bytes()[0];
        let retain_event = entry.cdw(10) & 1 << 15 != 0;
        let mut page = [0; PAGE_BYTES];
        let size = match page_id {
            ERROR_LOG => self.error_log(&mut page),
            SMART if self.namespaces.get(entry.nsid()).is_some() => return Err(Status::INVALID_FIELD), // LPA: no page per namespace
            SMART if !matches!(entry.nsid(), 0 | BROADCAST) => return Err(Status::INVALID_NAMESPACE),
            SMART => self.smart(&mut page),
            FIRMWARE_SLOT => firmware_slot(&mut page),
            ANA if self.ana().is_some() => self.path_states(entry.cdw(10) & 1 << 8 != 0, &mut page),
            CHANGED_LOG => self.changed_namespaces(&mut page),
            _ => return Err(Status::INVALID_LOG_PAGE),
        };
        let dwords = u64::from(entry.cdw(10) >> 16) | u64::from(entry.cdw(11) & 0xffff) << 16;
        let wanted = (dwords + 1) * 4;
        self.check_size(wanted)?;
        let offset = usize::try_from(entry.u64(48)).map_err(|_| Status::INVALID_FIELD)?;
        if offset > size || !offset.is_multiple_of(4) {
            return Err(Status::INVALID_FIELD);
        }
        let rest = &page[offset..size];
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        self.send(entry, &rest[..rest.len().min(wanted)])?;
        if page_id == ERROR_LOG && !retain_event {
            lock(&self.admin).events.unmask();
        }
        Ok(0)
    }

    /// Error Information (§5.16.1.2).
    fn error_log(&self, page: &mut Page) -> usize {
        let admin = lock(&self.admin);
        for (i, error) in admin.events.errors.iter().enumerate() {
            let at = i * ERROR_BYTES;
            put(page, at, &error.count.to_le_bytes());
            put(page, at + 8, &error.sq.to_le_bytes());
            put(page, at + 10, &error.cid.to_le_bytes());
            put(page, at + 12, &(error.status.bits() << 1).to_le_bytes());
            put(page, at + 14, &u16::MAX.to_le_bytes()); // parameter location: not specific
            put(page, at + 16, &error.lba.to_le_bytes());
            put(page, at + 24, &error.nsid.to_le_bytes());
        }
        PAGE_BYTES
    }

    /// Asymmetric Namespace Access (§5.16.1.13): one group with all namespaces.
    fn path_states(&self, groups_only: bool, page: &mut Page) -> usize {
        put(page, 8, &1_u16.to_le_bytes()); // number of groups
        put(page, 16, &1_u32.to_le_bytes()); // ANAGRPID
        page[32] = self.ana().map_or(0, |state| state as u8);
        if groups_only {
            return 48;
        }
        put(page, 20, &self.namespaces.count().to_le_bytes());
        let mut size = 48;
        for id in self.namespaces.ids_after(0) {
            put(page, size, &id.to_le_bytes());
            size += 4;
        }
        size
    }

    /// Changed Namespace List (§5.16.1.5). Reading it clears it.
    fn changed_namespaces(&self, page: &mut Page) -> usize {
        for (id, at) in lock(&self.admin).events.take_changes().into_iter().zip((0..).step_by(4)) {
            put(page, at, &id.to_le_bytes());
        }
        PAGE_BYTES
    }

    /// SMART / Health Information (§5.16.1.3).
    fn smart(&self, page: &mut Page) -> usize {
        let Traffic { reads, writes, bytes_read, bytes_written, .. } = self.io_traffic();
        let errors = lock(&self.admin).events.error_count;
        let thousands = |bytes: u64| bytes.div_ceil(512 * 1000);
        put(page, 1, &300_u16.to_le_bytes()); // composite temperature, kelvin
        page[3] = 100; // available spare, per cent
        page[4] = 10; // and its threshold
        put(page, 32, &thousands(bytes_read).to_le_bytes());
        put(page, 48, &thousands(bytes_written).to_le_bytes());
        put(page, 64, &reads.to_le_bytes());
        put(page, 80, &writes.to_le_bytes());
        put(page, 112, &1_u64.to_le_bytes()); // power cycles
        put(page, 176, &errors.to_le_bytes());
        512
    }
}

/// Firmware Slot Information (§5.16.1.4): slot 1 is active.
fn firmware_slot(page: &mut Page) -> usize {
    page[0] = 1;
    page[8..16].fill(b' ');
    put(page, 8, FIRMWARE.as_bytes());
    512
}
