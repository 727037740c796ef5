//! Storage of the disk's blocks: memory, a file, or none. Offsets and lengths are in bytes. Callers have checked them against
//! the size of the disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use vm_memory::MmapRegion;

use crate::sys::SharedMemory;

use super::EmulatedError;

/// The storage behind the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Medium {
    /// Memory of this process, initially zero. Pages are allocated when they are written.
    Memory,
    /// No storage: writes are discarded and reads leave the buffer unchanged. Addresses are still checked.
    Null,
    /// A raw image file.
    File {
        /// Path of the file.
        path: PathBuf,
        /// Creates the file if it does not exist.
        create: bool,
        /// True leaves a new file sparse; false allocates its blocks immediately.
        sparse: bool,
    },
}

/// An opened medium.
pub(super) enum Store {
    Memory(SharedMemory),
    Null,
    File(Arc<File>),
}

const CHUNK: usize = 4096;

impl Store {
    /// Opens `medium` and returns its size in bytes. If `size` is zero, the size of an existing file is used.
    pub(super) fn open(medium: &Medium, size: u64) -> Result<(Self, u64), EmulatedError> {
        match medium {
            Medium::Null => Ok((Self::Null, size)),
            Medium::Memory => {
                let allocate = |source| EmulatedError::Memory { size, source };
                let len = usize::try_from(size).map_err(|error| allocate(io::Error::other(error)))?;
                let memory = MmapRegion::new(len).map_err(|error| allocate(io::Error::other(error)))?;
                Ok((Self::Memory(SharedMemory::of(Arc::new(memory))), size))
            }
            Medium::File { path, create, sparse } => {
                let failed = |operation| move |source| EmulatedError::File { path: path.clone(), operation, source };
                let (file, found) = match OpenOptions::new().read(true).write(true).open(path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound && *create && size != 0 => {
                        (Self::create(path, size, *sparse).map_err(failed("create"))?, size)
                    }
                    opened => {
                        let file = opened.map_err(failed("open"))?;
                        let found = file.metadata().map_err(failed("stat"))?.len();
                        (file, found)
                    }
                };
                if size != 0 && found != size {
                    return Err(EmulatedError::FileSize { path: path.clone(), wanted: size, found });
                }
                flock(&file, FlockOperation::NonBlockingLockExclusive)
                    .map_err(|errno| failed("lock (is another process using it?)")(errno.into()))?;
                Ok((Self::File(Arc::new(file)), found))
            }
        }
    }

    /// The medium in a file that another process has opened and locked. Returns its size in bytes.
    pub(super) fn adopt(file: Arc<File>, size: u64) -> Result<(Self, u64), EmulatedError> {
        let path = PathBuf::from("(handed over)");
        let found = match file.metadata() {
            Ok(metadata) => metadata.len(),
            Err(source) => return Err(EmulatedError::File { path, operation: "stat", source }),
        };
        let fits = size == 0 || size == found;
        if fits { Ok((Self::File(file), found)) } else { Err(EmulatedError::FileSize { path, wanted: size, found }) }
    }

    /// The open file, for another process.
    pub(super) fn file(&self) -> Option<Arc<File>> {
        if let Self::File(file) = self { Some(Arc::clone(file)) } else { None }
    }

    fn create(path: &Path, size: u64, sparse: bool) -> io::Result<File> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        let sized = if sparse {
            file.set_len(size)
        } else {
            fallocate(&file, FallocateFlags::empty(), 0, size).map_err(io::Error::from)
        };
        if let Err(error) = sized {
            std::fs::remove_file(path)?;
            return Err(error);
        }
        Ok(file)
    }

    /// Copies `len` bytes at `offset` of the disk to `at` of `shared`.
    #[inline]
    pub(super) fn read(&self, offset: u64, shared: &SharedMemory, at: usize, len: usize) -> io::Result<()> {
        match self {
            Self::Null => Ok(()),
            Self::Memory(memory) => {
                memory.copy_to_shared(index(offset), shared, at, len);
                Ok(())
            }
            Self::File(file) => {
                let mut chunk = [0; CHUNK];
                for done in (0..len).step_by(CHUNK) {
                    let part = &mut chunk[..CHUNK.min(len - done)];
                    file.read_exact_at(part, offset + done as u64)?;
                    shared.copy_from(at + done, part);
                }
                Ok(())
            }
        }
    }

    /// Copies `len` bytes at `at` of `shared` to `offset` of the disk.
    #[inline]
    pub(super) fn write(&self, offset: u64, shared: &SharedMemory, at: usize, len: usize) -> io::Result<()> {
        match self {
            Self::Null => Ok(()),
            Self::Memory(memory) => {
                shared.copy_to_shared(at, memory, index(offset), len);
                Ok(())
            }
            Self::File(file) => {
                let mut chunk = [0; CHUNK];
                for done in (0..len).step_by(CHUNK) {
                    let part = &mut chunk[..CHUNK.min(len - done)];
                    shared.copy_to(at + done, part);
                    file.write_all_at(part, offset + done as u64)?;
                }
                Ok(())
            }
        }
    }

    /// Zeroes `len` bytes at `offset`. `release` allows the medium to deallocate the space.
    pub(super) fn zero(&self, offset: u64, len: u64, release: bool) -> io::Result<()> {
        match self {
            Self::Null => Ok(()),
            Self::Memory(memory) => {
                memory.slice(index(offset), index(len)).expect("inside the disk").clear();
                Ok(())
            }
            Self::File(file) => {
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                if release && fallocate(file, punch, offset, len).is_ok() {
                    return Ok(());
                }
                let zeroes = [0; CHUNK];
                for done in (0..len).step_by(CHUNK) {
                    let part = CHUNK.min(index(len - done));
                    file.write_all_at(&zeroes[..part], offset + done)?;
                }
                Ok(())
            }
        }
    }

    /// Grows the medium to `size` bytes if needed. It never shrinks, so data past the end of a smaller disk stays.
    pub(super) fn resize(&self, size: u64) -> io::Result<()> {
        match self {
            Self::Memory(memory) if size > memory.len() as u64 => Err(io::ErrorKind::Unsupported.into()),
            Self::File(file) if size > file.metadata()?.len() => file.set_len(size),
            _ => Ok(()),
        }
    }

    /// Makes all earlier writes durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        match self {
            Self::Null | Self::Memory(_) => Ok(()),
            Self::File(file) => file.sync_data(),
        }
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("the disk was mapped, so its offsets fit")
}
