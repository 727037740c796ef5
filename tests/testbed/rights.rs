//! Tests which access to a VFIO device another process has through a file that it holds. It duplicates the file from that
//! process and tries each way to access the device. With the owner's file all of them work, except a second bind. With a file
//! that was never bound, none works while the device has an owner.

// UNSAFETY: ioctl() and mmap() have no safe form; each call says why it is sound.
#![expect(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Error};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use vfio_bindings::bindings::vfio::{VFIO_PCI_CONFIG_REGION_INDEX, vfio_device_bind_iommufd, vfio_device_info};

use crate::iommu::size_u32;

// linux/vfio.h: _IO(';', 100 + n).
const VFIO_DEVICE_GET_INFO: libc::c_ulong = 0x3b6b;
const VFIO_DEVICE_BIND_IOMMUFD: libc::c_ulong = 0x3b76;
/// The region's index starts at this bit of the file offset: `VFIO_PCI_OFFSET_SHIFT`.
const REGION_SHIFT: u32 = 40;

/// The name of an attempt, and its result.
pub type Attempt = (&'static str, io::Result<()>);

/// The path of each VFIO device file that `process` holds, with the result of each attempt.
///
/// # Errors
/// The process does not exist, or this process may not inspect it.
pub fn of_process(process: Pid) -> io::Result<Vec<(String, Vec<Attempt>)>> {
    files_of(process)?.into_iter().map(|(path, file)| Ok((path, attempts(&file)?))).collect()
}

/// A duplicate of each VFIO device file that `process` holds, with its path.
pub(crate) fn files_of(process: Pid) -> io::Result<Vec<(String, OwnedFd)>> {
    let handle = pidfd_open(process, PidfdFlags::empty())?;
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", process.as_raw_nonzero()))? {
        let entry = entry?;
        let path = fs::read_link(entry.path()).unwrap_or_default();
        let Ok(number) = entry.file_name().to_string_lossy().parse() else { continue };
        if path.starts_with("/dev/vfio/devices") {
            let file = pidfd_getfd(&handle, number, PidfdGetfdFlags::empty())?;
            found.push((path.display().to_string(), file));
        }
    }
    Ok(found)
}

fn attempts(file: &OwnedFd) -> io::Result<Vec<Attempt>> {
    let iommufd = File::options().read(true).write(true).open("/dev/iommu")?;
    let mut bind = vfio_device_bind_iommufd {
        argsz: size_u32::<vfio_device_bind_iommufd>(),
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    let mut info = vfio_device_info { argsz: size_u32::<vfio_device_info>(), ..Default::default() };
    Ok(vec![
        ("bind", ioctl(file, VFIO_DEVICE_BIND_IOMMUFD, ptr::from_mut(&mut bind).cast())),
        ("info", ioctl(file, VFIO_DEVICE_GET_INFO, ptr::from_mut(&mut info).cast())),
        ("read", read_configuration(file)),
        ("mmap", map_bar_0(file)),
    ])
}

fn read_configuration(file: &OwnedFd) -> io::Result<()> {
    let at = u64::from(VFIO_PCI_CONFIG_REGION_INDEX) << REGION_SHIFT;
    let read = rustix::io::pread(file, &mut [0; 4], at)?;
    if read == 4 { Ok(()) } else { Err(Error::from(io::ErrorKind::UnexpectedEof)) }
}

fn map_bar_0(file: &OwnedFd) -> io::Result<()> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses; it is not accessed.
    let mapped = unsafe { mmap(ptr::null_mut(), 4096, access, MapFlags::SHARED, file, 0) }?;
    // SAFETY: the mapping created above.
    unsafe { munmap(mapped, 4096) }?;
    Ok(())
}

fn ioctl(file: &OwnedFd, request: libc::c_ulong, argument: *mut libc::c_void) -> io::Result<()> {
    // SAFETY: each request above is used in one call, with the structure that linux/vfio.h defines for it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}
