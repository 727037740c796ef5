//! The description in a file in memory, which moves like any other descriptor.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};

use super::description::{Description, VERSION};

/// Longest description, bytes. 509 regions and 64 rings need 100 KiB.
const MAX_BYTES: u64 = 256 << 10;

/// Whoever receives the file reads what was sealed.
const SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

/// Why a description cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// The file cannot be read, or is none in memory.
    #[error("the description: {0}")]
    File(#[from] io::Error),
    /// It is too long, or can still be changed.
    #[error("the description: {0}")]
    Unusable(String),
    /// It is no description.
    #[error("the description: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Another release wrote it.
    #[error(
        "the description has version {found}, this is version {VERSION}; install a release that has both, or restart"
    )]
    Version {
        /// Its version.
        found: u32,
    },
}

/// The part that every version has.
#[derive(serde::Deserialize)]
struct Versioned {
    version: u32,
}

/// Parses a description.
pub(super) fn parse(text: &[u8]) -> Result<Description, DescriptionError> {
    let Versioned { version } = serde_json::from_slice(text)?;
    if version != VERSION {
        return Err(DescriptionError::Version { found: version });
    }
    Ok(serde_json::from_slice(text)?)
}

/// Writes `description` to a sealed file.
pub(super) fn write(description: &Description) -> Result<OwnedFd, DescriptionError> {
    let text = serde_json::to_vec(description)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(DescriptionError::Unusable(format!("{} bytes, at most {MAX_BYTES}", text.len())));
    }
    let file = memfd_create("session", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(io::Error::from)?;
    let file = File::from(file);
    file.write_all_at(&text, 0)?;
    fcntl_add_seals(&file, SEALS).map_err(io::Error::from)?;
    Ok(file.into())
}

/// Reads the description in `file`.
pub(super) fn read(file: OwnedFd) -> Result<Description, DescriptionError> {
    if !fcntl_get_seals(&file).map_err(io::Error::from)?.contains(SEALS) {
        return Err(DescriptionError::Unusable("it is not sealed".into()));
    }
    let file = File::from(file);
    let bytes = file.metadata()?.len();
    if bytes > MAX_BYTES {
        return Err(DescriptionError::Unusable(format!("{bytes} bytes, at most {MAX_BYTES}")));
    }
    let mut text = vec![0; usize::try_from(bytes).expect("at most MAX_BYTES")];
    file.read_exact_at(&mut text, 0)?;
    parse(&text)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::driver::DiskState;
    use crate::handover::description::{DeviceState, FunctionState};

    pub(in super::super) fn description() -> Description {
        let identifiers = ([0; 16], [0; 8]);
        let disk = DiskState {
            serial: "S".into(),
            namespace: 1,
            identifiers,
            block_size: 512,
            zone_blocks: 0,
            write_cache: None,
        };
        Description {
            version: VERSION,
            paused_at: 0,
            device: DeviceState {
                disk,
                blocks: 1,
                read_only: false,
                write_cache: true,
                function: FunctionState::Emulated { medium: None },
            },
            listener: None,
            successors: None,
            stored: Vec::new(),
            front_end: None,
        }
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(read(write(&description()).unwrap()).unwrap(), description());
    }

    #[test]
    fn another_version_is_refused_whatever_else_it_has() {
        let error = parse(br#"{"version":2,"unheard":"of"}"#).unwrap_err().to_string();
        assert!(error.contains("has version 2, this is version 1"), "{error}");
    }

    #[test]
    fn a_file_that_can_still_change_or_is_too_long_is_refused() {
        let open = File::from(memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        open.set_len(MAX_BYTES + 1).unwrap();
        assert!(read(open.try_clone().unwrap().into()).unwrap_err().to_string().contains("not sealed"));
        fcntl_add_seals(&open, SEALS).unwrap();
        assert!(read(open.into()).unwrap_err().to_string().contains("at most"));
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        assert!(read(pipe).is_err());
    }
}
