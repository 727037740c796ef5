//! What the controller says of itself and of its health, for an operator.

use super::admin::AdminCommand;
use super::error::NvmeErrorKind;
use super::regs::PAGE_LEN;
use super::{COMMAND_TIMEOUT, Nvme};
use crate::driver::{Health, Identification};

impl Nvme {
    /// Of namespace `disk`, in the order in which they are served.
    pub(super) fn identify_for_operator(&self, disk: usize) -> Identification {
        let Self { identity, namespaces, geometries, queue_count, .. } = self;
        let (namespace, geometry) = (&namespaces[disk], &geometries[disk]);
        let hexadecimal = |bytes: &[u8]| {
            let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            if bytes.iter().all(|&byte| byte == 0) { String::new() } else { digits }
        };
        let (nguid, eui64) = namespace.identifiers;
        Identification {
            model: identity.model.clone(),
            serial: identity.serial.clone(),
            firmware: identity.firmware.clone(),
            namespace: namespace.id,
            nguid: hexadecimal(&nguid),
            eui64: hexadecimal(&eui64),
            blocks: geometry.blocks,
            block_bytes: geometry.block_size,
            queues: *queue_count,
            volatile_cache: geometry.volatile_cache,
        }
    }

    pub(super) fn read_health(&mut self) -> Result<Health, NvmeErrorKind> {
        let (Some(admin), Some(controller)) = (&mut self.admin, &self.controller) else {
            return Err(NvmeErrorKind::Stopped);
        };
        let page = admin.identify(controller, AdminCommand::get_health(), COMMAND_TIMEOUT);
        // The interrupt of an event that was taken from the queue on the way may find nothing any more.
        if admin.has_event() {
            crate::eventfd::signal(&self.admin_event);
        }
        page.map(|page| decode(&page))
    }
}

/// NVMe 2.0 §5.16.1.3, figure 208: offsets in bytes, little endian.
fn decode(page: &[u8; PAGE_LEN]) -> Health {
    let counter = |at: usize| {
        let bytes = page[at..at + 16].try_into().expect("16 bytes");
        u64::try_from(u128::from_le_bytes(bytes)).unwrap_or(u64::MAX)
    };
    Health {
        critical_warning: page[0],
        temperature_kelvin: u16::from_le_bytes([page[1], page[2]]),
        available_spare_percent: page[3],
        available_spare_threshold_percent: page[4],
        used_percent: page[5],
        data_units_read: counter(32),
        data_units_written: counter(48),
        host_reads: counter(64),
        host_writes: counter(80),
        busy_minutes: counter(96),
        power_cycles: counter(112),
        power_on_hours: counter(128),
        unsafe_shutdowns: counter(144),
        media_errors: counter(160),
        error_log_entries: counter(176),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_of_the_health_log_is_at_its_offset() {
        let mut page = [0; PAGE_LEN];
        for (byte, value) in page[..192].iter_mut().zip(0_u8..) {
            *byte = value;
        }
        // The upper halves of the counters.
        (32..192).step_by(16).for_each(|at| page[at + 8..at + 16].fill(0));
        page[176 + 15] = 1;

        let health = decode(&page);

        let counter = |at: u8| u64::from_le_bytes(std::array::from_fn(|n| at + n as u8));
        assert_eq!((health.critical_warning, health.temperature_kelvin), (0, 0x0201));
        let percentages =
            (health.available_spare_percent, health.available_spare_threshold_percent, health.used_percent);
        assert_eq!(percentages, (3, 4, 5));
        assert_eq!((health.data_units_read, health.data_units_written), (counter(32), counter(48)));
        assert_eq!((health.host_reads, health.host_writes), (counter(64), counter(80)));
        assert_eq!((health.busy_minutes, health.power_cycles), (counter(96), counter(112)));
        assert_eq!((health.power_on_hours, health.unsafe_shutdowns), (counter(128), counter(144)));
        assert_eq!((health.media_errors, health.error_log_entries), (counter(160), u64::MAX));
    }
}
