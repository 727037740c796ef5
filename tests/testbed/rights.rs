//! Tests which access to a VFIO device another process has through a file that it holds. It duplicates the file from that
//! process and tries each way to access the device. With the owner's file all of them work, except a second bind. With a file
//! that was never bound, none works while the device has an owner. With the file of a group all of them work, too: it opens the
//! device once more.

// UNSAFETY: ioctl() and mmap() have no safe form; each call says why it is sound.
#![expect(unsafe_code)]

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Error};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use vfio_bindings::bindings::vfio::{VFIO_PCI_CONFIG_REGION_INDEX, vfio_device_bind_iommufd, vfio_device_info};

use crate::iommu::size_u32;

// linux/vfio.h: _IO(';', 100 + n).
const VFIO_GROUP_UNSET_CONTAINER: libc::c_ulong = 0x3b69;
const VFIO_GROUP_GET_DEVICE_FD: libc::c_ulong = 0x3b6a;
const VFIO_DEVICE_GET_INFO: libc::c_ulong = 0x3b6b;
const VFIO_DEVICE_BIND_IOMMUFD: libc::c_ulong = 0x3b76;
/// The region's index starts at this bit of the file offset: `VFIO_PCI_OFFSET_SHIFT`.
const REGION_SHIFT: u32 = 40;

/// The name of an attempt, and its result.
pub type Attempt = (&'static str, io::Result<()>);

/// The path of each VFIO device file and group file that `process` holds, with the result of each attempt.
///
/// # Errors
/// The process does not exist, or this process may not inspect it.
pub fn of_process(process: Pid) -> io::Result<Vec<(String, Vec<Attempt>)>> {
    let files = files_of(process)?.into_iter().map(|(path, file)| Ok((path, attempts(&file)?)));
    let groups = groups_of(process)?.into_iter().map(|(path, file)| {
        let attempts = attempts_of_group(&path, &file)?;
        Ok((path, attempts))
    });
    files.chain(groups).collect()
}

/// A duplicate of each VFIO device file that `process` holds, with its path.
pub(crate) fn files_of(process: Pid) -> io::Result<Vec<(String, OwnedFd)>> {
    duplicates(process, |path| path.starts_with("/dev/vfio/devices"))
}

/// A duplicate of each VFIO group file that `process` holds, with its path.
fn groups_of(process: Pid) -> io::Result<Vec<(String, OwnedFd)>> {
    duplicates(process, is_group)
}

/// A duplicate of each VFIO group file that `process` holds, and of each device file from a group.
///
/// # Errors
/// The process does not exist, or this process may not inspect it.
pub fn group_files_of(process: Pid) -> io::Result<Vec<OwnedFd>> {
    // What the kernel calls a file from VFIO_GROUP_GET_DEVICE_FD.
    let found = duplicates(process, |path| is_group(path) || path == Path::new("anon_inode:[vfio-device]"))?;
    Ok(found.into_iter().map(|(_, file)| file).collect())
}

fn is_group(path: &Path) -> bool {
    let number = path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
    path.parent() == Some(Path::new("/dev/vfio")) && number.is_some()
}

fn duplicates(process: Pid, wanted: impl Fn(&Path) -> bool) -> io::Result<Vec<(String, OwnedFd)>> {
    let handle = pidfd_open(process, PidfdFlags::empty())?;
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", process.as_raw_nonzero()))? {
        let entry = entry?;
        let path = fs::read_link(entry.path()).unwrap_or_default();
        let Ok(number) = entry.file_name().to_string_lossy().parse() else { continue };
        if wanted(&path) {
            let file = pidfd_getfd(&handle, number, PidfdGetfdFlags::empty())?;
            found.push((path.display().to_string(), file));
        }
    }
    Ok(found)
}

/// Opens the device of the group at `path` that is bound to vfio-pci, and uses it; takes the group out of its owner's container.
fn attempts_of_group(path: &str, file: &OwnedFd) -> io::Result<Vec<Attempt>> {
    let number = path.rsplit('/').next().unwrap_or_default();
    let mut devices = fs::read_dir(format!("/sys/kernel/iommu_groups/{number}/devices"))?.flatten();
    let driver = |at: &Path| fs::read_link(at.join("driver")).is_ok_and(|driver| driver.ends_with("vfio-pci"));
    let device = devices.find(|device| driver(&device.path())).ok_or(Error::from(io::ErrorKind::NotFound))?;
    let name = CString::new(device.file_name().into_encoded_bytes())?;
    // SAFETY: the kernel reads a string that ends with a zero byte.
    let opened = unsafe { libc::ioctl(file.as_raw_fd(), VFIO_GROUP_GET_DEVICE_FD, name.as_ptr()) };
    let unset = ("unset", ioctl(file, VFIO_GROUP_UNSET_CONTAINER, ptr::null_mut()));
    if opened < 0 {
        return Ok(vec![("device", Err(Error::last_os_error())), unset]);
    }
    // SAFETY: the kernel has just created this descriptor, and nobody else knows it.
    let opened = unsafe { OwnedFd::from_raw_fd(opened) };
    Ok(vec![("device", Ok(())), ("read", read_configuration(&opened)), ("mmap", map_bar_0(&opened)), unset])
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
