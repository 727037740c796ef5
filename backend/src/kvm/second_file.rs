//! The device's file, opened a second time: what the shim gives KVM. It is never bound to iommufd, so the VM's process cannot use the
//! device with it, and it keeps nothing pinned.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

/// How to get such a file, each time KVM must be told.
#[derive(Clone)]
pub struct SecondFile {
    name: String,
    open: Arc<dyn Fn() -> io::Result<OwnedFd> + Send + Sync>,
}

impl SecondFile {
    /// `open` opens it; `name` is what it opens, for an error.
    #[must_use]
    pub fn new(name: String, open: impl Fn() -> io::Result<OwnedFd> + Send + Sync + 'static) -> Self {
        Self { name, open: Arc::new(open) }
    }

    /// Opens it.
    ///
    /// # Errors
    /// The errno of `open`.
    pub(super) fn open(&self) -> io::Result<OwnedFd> {
        (self.open)()
    }
}

/// A path.
impl<P: Into<PathBuf>> From<P> for SecondFile {
    fn from(path: P) -> Self {
        let path = path.into();
        let name = path.display().to_string();
        Self::new(name, move || Ok(File::options().read(true).write(true).open(&path)?.into()))
    }
}

/// What is opened.
impl fmt::Display for SecondFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl fmt::Debug for SecondFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SecondFile").field(&self.name).finish()
    }
}
