//! The file of a listening socket. Dropping it removes the file, unless another has taken its place.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A socket file that this process must remove.
pub(crate) struct SocketFile(SocketFileState);

/// Which file it is, for the next owner of the socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SocketFileState {
    /// Where it is.
    pub path: PathBuf,
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

impl SocketFile {
    /// The file that has just been created at `path`.
    pub(crate) fn at(path: PathBuf) -> io::Result<Self> {
        let file = fs::symlink_metadata(&path)?;
        Ok(Self(SocketFileState { path, device: file.dev(), inode: file.ino() }))
    }

    /// The file of a socket that another process has created and handed over.
    pub(crate) fn inherit(state: SocketFileState) -> Self {
        Self(state)
    }

    /// Moves it to `path`, in place of what is there.
    pub(crate) fn rename(&mut self, path: &Path) -> io::Result<()> {
        fs::rename(&self.0.path, path)?;
        path.clone_into(&mut self.0.path);
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0.path
    }

    pub(crate) fn state(&self) -> SocketFileState {
        self.0.clone()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let SocketFileState { path, device, inode } = &self.0;
        let unchanged = fs::symlink_metadata(path).is_ok_and(|file| (file.dev(), file.ino()) == (*device, *inode));
        if unchanged && let Err(error) = fs::remove_file(path) {
            let path: &OsStr = path.as_os_str();
            log::warn!("removing {path:?}: {error}");
        }
    }
}
