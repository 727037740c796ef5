//! What happens to requests in flight after a device reset.

/// What happens to requests in flight after a device reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum InflightPolicy {
    /// Submit them again, unless they were resubmitted before, or a ring stop or memory removal waits for them.
    Resubmit,
    /// Submit them again, also those that were resubmitted before: the reset does not mean that something is wrong with them.
    Continue,
    /// Complete them with an error.
    Fail,
}
