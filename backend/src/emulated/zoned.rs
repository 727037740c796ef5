//! I/O commands of the Zoned Namespace command set (ZNS Command Set 1.1 §3.4), and of the NVM command set what zones refuse.

use super::controller::Controller;
use super::dma::Dma;
use super::queue::Hints;
use super::wire::{Entry, Status, nvm};

impl Controller {
    /// Executes a command that an ordinary namespace does not have, or has in another way. Returns dwords 0 and 1 of its
    /// completion.
    #[cold]
    pub(super) fn zoned(&self, entry: &Entry, hints: &mut Hints, dma: &Dma<'_>) -> Result<u64, Status> {
        self.namespace(entry)?;
        match entry.opcode() {
            nvm::ZONE_APPEND => self.append(entry, hints, dma),
            nvm::ZONE_MANAGEMENT_SEND => {
                let [action, all, ..] = entry.cdw(13).to_le_bytes();
                let zones = self.zones.as_ref().ok_or(Status::INVALID_OPCODE)?;
                zones.lock().manage(entry.u64(40), action, all & 1 != 0).map(|()| 0)
            }
            nvm::ZONE_MANAGEMENT_RECEIVE => self.report(entry, hints, dma),
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    /// Zone Append. The completion has the block at which the data were placed. ZNS Command Set 1.1 §3.4.1
    fn append(&self, entry: &Entry, hints: &mut Hints, dma: &Dma<'_>) -> Result<u64, Status> {
        let zones = self.zones.as_ref().ok_or(Status::INVALID_OPCODE)?;
        let (zone, count) = (entry.u64(40), u64::from(entry.cdw(12) & 0xffff) + 1);
        let len = count * u64::from(self.options.lba);
        self.check_size(len)?;
        if zones.append_limit() != 0 && len > 4096 << zones.append_limit() {
            return Err(Status::INVALID_FIELD);
        }
        let mut zones = zones.lock();
        let block = zones.admit_append(zone, count)?;
        self.store(entry, self.blocks(entry, block, count)?, hints, dma)?;
        zones.written(block, count);
        Ok(block)
    }

    /// Zone Management Receive: a report of all zones. ZNS Command Set 1.1 §3.4.2
    fn report(&self, entry: &Entry, hints: &mut Hints, dma: &Dma<'_>) -> Result<u64, Status> {
        let zones = self.zones.as_ref().ok_or(Status::INVALID_OPCODE)?;
        let len = (u64::from(entry.cdw(12)) + 1) * 4;
        self.check_size(len)?;
        if entry.cdw(13) & 0xffff != 0 {
            return Err(Status::INVALID_FIELD); // ZRA, ZRASF: the driver reports all zones
        }
        let partial = entry.cdw(13) & 1 << 16 != 0;
        let report = zones.lock().report(entry.u64(40), usize::try_from(len).expect("below 2^35"), partial)?;
        let (mut done, Hints { list, data }) = (0, hints);
        self.walk(entry, len, dma, list, |span| {
            let part = usize::try_from(span.len()).expect("part of a report");
            dma.write(span.start(), &report[done..done + part], data)?;
            done += part;
            Ok(())
        })?;
        Ok(0)
    }
}
