//! The ioctls of KVM and VFIO that the shim needs: create the VM's kvm-vfio device, add files to it, delete them.
//!
//! KVM accepts them only from the process that created the VM (otherwise EIO), and a VM has one kvm-vfio device (a second one
//! fails with EBUSY). That is why this crate exists, and why the device is created once and shared with the VMM, see
//! [`crate::Vm`].
//!
//! A VM is identified by its descriptor number, not by a borrow: the VMM owns the descriptor and may close it at any time. If
//! the number then belongs to another file, the kernel fails the ioctl with ENOTTY, EINVAL or EBADF and changes nothing.
#![expect(unsafe_code, reason = "ioctls; one of the two places where it is allowed")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_ulong, c_void};

/// `_IO(KVMIO, 0x01)`: creates a VM, returns its descriptor.
pub const KVM_CREATE_VM: c_ulong = 0xae01;
/// `_IO(KVMIO, 0x80)`: runs a vCPU.
pub const KVM_RUN: c_ulong = 0xae80;
/// `_IOWR(KVMIO, 0xe0, struct kvm_create_device)`.
pub const KVM_CREATE_DEVICE: c_ulong = 0xc00c_aee0;
/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)`.
const KVM_SET_DEVICE_ATTR: c_ulong = 0x4018_aee1;
/// `_IO(VFIO_TYPE, VFIO_BASE + 7)`.
const VFIO_DEVICE_GET_INFO: c_ulong = 0x3b6b;

/// [`CreateDevice::kind`] of the kvm-vfio device.
pub const KVM_DEV_TYPE_VFIO: u32 = 4;
/// [`CreateDevice::flags`]: only test whether the device can be created.
const KVM_CREATE_DEVICE_TEST: u32 = 1;
/// Attribute group of [`DeviceAttr`]. It takes VFIO group files, and since Linux 6.6 VFIO device files as well.
const KVM_DEV_VFIO_FILE: u32 = 1;
const KVM_DEV_VFIO_FILE_ADD: u64 = 1;
const KVM_DEV_VFIO_FILE_DEL: u64 = 2;

/// `struct kvm_create_device`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CreateDevice {
    /// `type`.
    pub kind: u32,
    /// Out: the device's descriptor.
    pub fd: u32,
    /// `KVM_CREATE_DEVICE_TEST` or 0.
    pub flags: u32,
}
const _: () = assert!(size_of::<CreateDevice>() == 12);

/// `struct kvm_device_attr`.
#[repr(C)]
struct DeviceAttr {
    flags: u32,
    group: u32,
    attr: u64,
    addr: u64,
}
const _: () = assert!(size_of::<DeviceAttr>() == 24);

/// `struct vfio_device_info`.
#[repr(C)]
#[derive(Default)]
struct VfioDeviceInfo {
    argsz: u32,
    flags: u32,
    num_regions: u32,
    num_irqs: u32,
    cap_offset: u32,
    pad: u32,
}
const _: () = assert!(size_of::<VfioDeviceInfo>() == 24);

/// # Safety
/// `argument` is what `request` expects: here always a live structure of the size encoded in the request.
unsafe fn ioctl(fd: RawFd, request: c_ulong, argument: *mut c_void) -> io::Result<c_int> {
    // Not `libc::ioctl`: that may be the preloaded hook, which would take this for a call by the VMM.
    // SAFETY: guaranteed by the caller.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
    c_int::try_from(result).ok().filter(|&result| result >= 0).ok_or_else(io::Error::last_os_error)
}

fn create_device(vm: RawFd, flags: u32) -> io::Result<CreateDevice> {
    let mut create = CreateDevice { kind: KVM_DEV_TYPE_VFIO, fd: 0, flags };
    // SAFETY: `create` is a kvm_create_device and outlives the call.
    unsafe { ioctl(vm, KVM_CREATE_DEVICE, (&raw mut create).cast()) }?;
    Ok(create)
}

/// True if `vm` is a VM of this process and the kernel has CONFIG_KVM_VFIO. Changes nothing.
#[must_use]
pub fn takes_vfio(vm: RawFd) -> bool {
    create_device(vm, KVM_CREATE_DEVICE_TEST).is_ok()
}

/// The kvm-vfio device of a VM.
#[derive(Debug)]
pub struct VfioDevice(OwnedFd);

impl VfioDevice {
    /// Creates it.
    ///
    /// # Errors
    /// EBUSY if the VM already has one; ENODEV without CONFIG_KVM_VFIO; EIO in a process that did not create the VM.
    pub fn create(vm: RawFd) -> io::Result<Self> {
        let create = create_device(vm, 0)?;
        let fd = RawFd::try_from(create.fd).map_err(io::Error::other)?;
        // SAFETY: KVM has just returned this descriptor and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes over the device that the VMM has created.
    #[must_use]
    pub fn adopt(device: OwnedFd) -> Self {
        Self(device)
    }

    /// Duplicates its descriptor.
    ///
    /// # Errors
    /// The errno of `fcntl(F_DUPFD_CLOEXEC)`.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Adds a VFIO file. KVM holds its own reference until [`Self::delete`] or the end of the VM.
    ///
    /// # Errors
    /// EINVAL for any other file, EEXIST for one that KVM already holds.
    pub fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_ADD, file)
    }

    /// Deletes a file.
    ///
    /// # Errors
    /// ENOENT for a file that KVM does not hold.
    pub fn delete(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_DEL, file)
    }

    fn set(&self, attr: u64, file: BorrowedFd<'_>) -> io::Result<()> {
        let fd: i32 = file.as_raw_fd();
        let addr = (&raw const fd).addr() as u64;
        let mut attr = DeviceAttr { flags: 0, group: KVM_DEV_VFIO_FILE, attr, addr };
        // SAFETY: `attr` is a kvm_device_attr whose `addr` points to an i32; both outlive the call.
        unsafe { ioctl(self.0.as_raw_fd(), KVM_SET_DEVICE_ATTR, (&raw mut attr).cast()) }.map(drop)
    }
}

/// True if `file`, a VFIO device file, is bound to an iommufd. An unbound one fails every ioctl but BIND with EINVAL.
#[must_use]
pub fn is_bound(file: BorrowedFd<'_>) -> bool {
    let mut info = VfioDeviceInfo { argsz: 24, ..Default::default() };
    // SAFETY: `info` is a vfio_device_info of the size it states and outlives the call.
    unsafe { ioctl(file.as_raw_fd(), VFIO_DEVICE_GET_INFO, (&raw mut info).cast()) }.is_ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Creates a VM; `None` without KVM.
    pub(crate) fn create_vm() -> Option<OwnedFd> {
        let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").ok()?;
        // SAFETY: the argument is an integer.
        let vm = unsafe { ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, std::ptr::null_mut()) }.ok()?;
        // SAFETY: KVM has just returned this descriptor and nobody else owns it.
        Some(unsafe { OwnedFd::from_raw_fd(vm) })
    }

    #[test]
    fn only_a_vm_takes_a_vfio_device() {
        let Some(vm) = create_vm() else { return println!("no /dev/kvm here: not tested") };
        assert!(takes_vfio(vm.as_raw_fd()));
        let kvm = std::fs::File::open("/dev/kvm").unwrap();
        assert!(!takes_vfio(kvm.as_raw_fd()), "the system's descriptor is not a VM");
        assert!(!takes_vfio(-1));
    }

    #[test]
    fn a_vm_has_one_vfio_device_which_refuses_other_files() {
        let Some(vm) = create_vm() else { return println!("no /dev/kvm here: not tested") };
        let device = VfioDevice::create(vm.as_raw_fd()).unwrap();
        let second = VfioDevice::create(vm.as_raw_fd()).unwrap_err();
        assert_eq!(second.raw_os_error(), Some(libc::EBUSY));

        let null = std::fs::File::open("/dev/null").unwrap();
        let refused = device.add(std::os::fd::AsFd::as_fd(&null)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    }
}
