//! The negotiation at the start of every connection (vfio-user: "VFIO_USER_VERSION"): a version, and limits as JSON. The client
//! can only lower the server's limits, and the reply contains only names that the client has sent.

use serde_json::{Map, Value, json};

use super::error::Error;
use crate::addr::Bytes;
use crate::memory::HostPage;
use crate::sys::MAX_WATCHED;

/// The major version of this server.
pub(super) const MAJOR: u16 = 0;
/// The newest minor version supported.
pub(super) const MINOR: u16 = 1;

/// Maximum descriptors in one message, in either direction. QEMU accepts at most 16 (`VFIO_USER_MAX_MAX_FDS`).
pub(super) const MAX_FDS: usize = 16;
/// Maximum data of one region read or write, in bytes: the protocol's default, and what QEMU proposes.
pub(super) const MAX_TRANSFER: usize = 1 << 20;
/// Maximum number of DMA maps. Each is a watched mapping of this process, and each file behind them a descriptor.
pub(super) const MAX_DMA_MAPS: usize = 4096;
const _: () = assert!(MAX_DMA_MAPS < MAX_WATCHED);
/// The protocol's default page size, the smallest that any host has, bytes.
const DEFAULT_PAGE: u64 = 4096;
/// Maximum length of the capabilities text, in bytes. QEMU's has about 200.
pub(super) const MAX_TEXT: usize = 4096;

/// The negotiated limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Descriptors that the client accepts in one message.
    pub(super) client_fds: usize,
    /// Bytes of data in one message.
    pub(super) transfer: usize,
}

/// Negotiates with a client that sent `text` after its version. Returns the limits and the NUL-terminated text of the reply.
///
/// # Errors
/// [`Error::Capabilities`] with the defect of the text.
pub(super) fn negotiate(text: &[u8], page: HostPage) -> Result<(Limits, Vec<u8>), Error> {
    let proposed = capabilities(text)?;
    let client_fds = number(&proposed, "max_msg_fds")?.unwrap_or(1);
    let transfer = number(&proposed, "max_data_xfer_size")?.unwrap_or(MAX_TRANSFER as u64);
    let limits = Limits {
        client_fds: usize::try_from(client_fds).unwrap_or(MAX_FDS).min(MAX_FDS),
        transfer: usize::try_from(transfer).unwrap_or(MAX_TRANSFER).min(MAX_TRANSFER),
    };
    let limits_offered = [
        ("max_msg_fds", json!(MAX_FDS)),
        ("max_data_xfer_size", json!(limits.transfer)),
        ("max_dma_maps", json!(number(&proposed, "max_dma_maps")?.unwrap_or(u64::MAX).min(MAX_DMA_MAPS as u64))),
        ("pgsizes", json!(page_sizes(&proposed, page)?)),
    ];
    let agreed: Map<String, Value> = limits_offered
        .into_iter()
        .filter(|(name, _)| proposed.contains_key(*name))
        .map(|(n, v)| (n.to_owned(), v))
        .collect();
    let mut reply = json!({ "capabilities": agreed }).to_string().into_bytes();
    reply.push(0);
    Ok((limits, reply))
}

/// The object `capabilities`; empty if there is none.
fn capabilities(text: &[u8]) -> Result<Map<String, Value>, Error> {
    if text.is_empty() {
        return Ok(Map::new());
    }
    let Some((0, json)) = text.split_last() else { return Err(invalid("the text is not NUL-terminated")) };
    let value: Value = serde_json::from_slice(json).map_err(|error| invalid(&error.to_string()))?;
    let Value::Object(mut whole) = value else { return Err(invalid("the text is not a JSON object")) };
    match whole.remove("capabilities") {
        None => Ok(Map::new()),
        Some(Value::Object(capabilities)) => Ok(capabilities),
        Some(_) => Err(invalid("capabilities is not a JSON object")),
    }
}

fn number(capabilities: &Map<String, Value>, name: &'static str) -> Result<Option<u64>, Error> {
    let number = |value: &Value| value.as_u64().ok_or_else(|| invalid(&format!("{name} is not an unsigned integer")));
    capabilities.get(name).map(number).transpose()
}

/// The page sizes of the reply: that of this host. QEMU proposes 4 KiB on every host, and adopts a larger size. So a client may
/// propose any size up to the host's; a map of less than a page is refused later.
fn page_sizes(capabilities: &Map<String, Value>, page: HostPage) -> Result<u64, Error> {
    let page = page.bytes();
    let usable = (page << 1) - DEFAULT_PAGE;
    match number(capabilities, "pgsizes")? {
        Some(sizes) if sizes & usable == 0 => Err(invalid(&format!(
            "pgsizes {sizes:#x} includes no size from 4 KiB to this host's page size of {}",
            Bytes(page)
        ))),
        _ => Ok(page),
    }
}

fn invalid(defect: &str) -> Error {
    Error::Capabilities(defect.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What QEMU 11.1 sends.
    const QEMU: &[u8] = b"{\"capabilities\": {\"max_msg_fds\": 8, \"max_data_xfer_size\": 1048576, \"pgsizes\": 4096, \
        \"max_dma_maps\": 65535, \"migration\": {\"pgsize\": 4096, \"max_bitmap_size\": 268435456}, \
        \"write_multiple\": true}}\0";

    fn reply(text: &[u8]) -> Value {
        let (_, reply) = negotiate(text, HostPage::of(4096)).unwrap();
        serde_json::from_slice(reply.strip_suffix(b"\0").unwrap()).unwrap()
    }

    #[test]
    fn the_reply_lowers_limits_and_contains_only_proposed_names() {
        let expected = json!({"capabilities": {
            "max_msg_fds": 16, "max_data_xfer_size": 1_048_576, "pgsizes": 4096, "max_dma_maps": 4096}});
        assert_eq!(reply(QEMU), expected);
        assert_eq!(reply(b""), json!({"capabilities": {}}));
        assert_eq!(
            reply(b"{\"capabilities\":{\"max_data_xfer_size\":64}}\0"),
            json!({"capabilities": {"max_data_xfer_size": 64}})
        );
    }

    #[test]
    fn a_client_that_proposes_no_limits_gets_the_defaults_of_the_protocol() {
        assert_eq!(negotiate(b"", HostPage::of(4096)).unwrap().0, Limits { client_fds: 1, transfer: 1 << 20 });
        assert_eq!(negotiate(QEMU, HostPage::of(4096)).unwrap().0, Limits { client_fds: 8, transfer: 1 << 20 });
    }

    #[test]
    fn the_page_size_of_the_reply_is_the_hosts() {
        for page in [4096, 16384, 65536] {
            let (_, reply) = negotiate(QEMU, HostPage::of(page)).unwrap();
            let reply: Value = serde_json::from_slice(reply.strip_suffix(b"\0").unwrap()).unwrap();
            assert_eq!(reply["capabilities"]["pgsizes"], page);
        }
        let large = b"{\"capabilities\":{\"pgsizes\":65536}}\0";
        assert!(negotiate(large, HostPage::of(65536)).is_ok());
        let refused = negotiate(large, HostPage::of(16384)).unwrap_err().to_string();
        assert!(refused.contains("no size from 4 KiB to this host's page size of 16K"), "{refused}");
    }

    #[test]
    fn invalid_capabilities_are_refused() {
        let texts: [&[u8]; 9] = [
            b"{}",
            b"\0",
            b"{\0",
            b"[]\0",
            b"{\"capabilities\":[]}\0",
            b"{\"capabilities\":{\"max_msg_fds\":-1}}\0",
            b"{\"capabilities\":{\"max_data_xfer_size\":\"much\"}}\0",
            b"{\"capabilities\":{\"pgsizes\":2097152}}\0",
            b"\xff\xfe\0",
        ];
        for text in texts {
            assert!(negotiate(text, HostPage::of(4096)).is_err(), "{}", String::from_utf8_lossy(text));
        }
    }
}
