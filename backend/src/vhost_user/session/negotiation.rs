//! The features that the front-end acknowledges.

use super::Session;
use crate::engine::Layout;
use crate::vhost_user::features::{ACCESS_PLATFORM, Names, ProtocolFeatures, VirtioFeatures};
use crate::vhost_user::{Error, config};

impl Session<'_> {
    pub(super) fn accept_features(&mut self, raw: u64) -> Result<(), Error> {
        let acked = VirtioFeatures::from_bits_retain(raw);
        if raw & ACCESS_PLATFORM != 0 {
            return Err(Error::AccessPlatform);
        }
        let unknown = VirtioFeatures::from_bits_retain(raw & !self.offered.bits());
        if !unknown.is_empty() {
            return Err(Error::NotOffered { request: "SET_FEATURES", names: Names(unknown).to_string() });
        }
        // A host-managed device must not be used by a driver that knows no zones (virtio 1.3 §5.2.5.2).
        if self.offered.contains(VirtioFeatures::ZONED) && !acked.contains(VirtioFeatures::ZONED) {
            return Err(Error::ZonesUnknown);
        }
        self.check_log_all(acked)?;
        (self.features, self.negotiation.1) = (Some(acked), Some(raw));
        if self.is_served {
            config::apply_features(&self.device.engine, acked);
        }
        self.apply_log();
        self.start_rings();
        Ok(())
    }

    pub(super) fn accept_protocol(&mut self, raw: u64) -> Result<(), Error> {
        let unknown = ProtocolFeatures::from_bits_retain(raw & !ProtocolFeatures::all().bits());
        if !unknown.is_empty() {
            return Err(Error::NotOffered { request: "SET_PROTOCOL_FEATURES", names: Names(unknown).to_string() });
        }
        let acked = ProtocolFeatures::from_bits_retain(raw);
        if let Some((feature, needed)) = acked.incomplete() {
            return Err(Error::FeatureAlone { feature: Names(feature).to_string(), needed: Names(needed).to_string() });
        }
        self.protocol = acked;
        Ok(())
    }

    /// The virtqueue layout; `None` until features have been negotiated.
    pub(super) fn layout(&self) -> Option<Layout> {
        self.features.map(VirtioFeatures::layout)
    }
}
