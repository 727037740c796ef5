//! The choice that a device reset leaves open.

/// What happens to requests in flight when the device has been reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum InflightPolicy {
    /// Submit them again, unless they were already, or a stop or memory removal waits for them.
    Resubmit,
    /// Complete them with an error.
    Fail,
}
