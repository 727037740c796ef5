//! The few things asked of KVM and VFIO by ioctl, each with its errno: one kvm-vfio device per VM, and files put into it.
//!
//! KVM serves only the process that made the VM (EIO else), and a VM has one kvm-vfio device (EBUSY else). That is why
//! this crate exists, and why the device is made once and shared with the VMM, see [`crate::Vm`].
//!
//! A VM is named by the number of its descriptor, not by a borrow: it is the VMM's, which may close it at any moment. A
//! number that has become another file's is answered ENOTTY, EINVAL or EBADF by the kernel, and nothing happens.
#![expect(unsafe_code, reason = "ioctls; one of the two places where it is allowed")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_ulong, c_void};

/// `_IO(KVMIO, 0x01)`: makes a VM, returns its descriptor.
pub const KVM_CREATE_VM: c_ulong = 0xae01;
/// `_IO(KVMIO, 0x80)`: lets a vCPU run in the guest.
pub const KVM_RUN: c_ulong = 0xae80;
/// `_IOWR(KVMIO, 0xe0, struct kvm_create_device)`.
pub const KVM_CREATE_DEVICE: c_ulong = 0xc00c_aee0;
/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)`.
const KVM_SET_DEVICE_ATTR: c_ulong = 0x4018_aee1;
/// `_IO(VFIO_TYPE, VFIO_BASE + 7)`.
const VFIO_DEVICE_GET_INFO: c_ulong = 0x3b6b;

/// [`CreateDevice::kind`] of the kvm-vfio device.
pub const KVM_DEV_TYPE_VFIO: u32 = 4;
/// [`CreateDevice::flags`]: only say whether it could be made.
const KVM_CREATE_DEVICE_TEST: u32 = 1;
/// Group of [`DeviceAttr`]; its members were groups' files once, and devices' files since Linux 6.6.
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
    /// `KVM_CREATE_DEVICE_TEST` or nothing.
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
/// `argument` is what `request` wants: here always a live structure of the size in the number's middle.
unsafe fn ioctl(fd: RawFd, request: c_ulong, argument: *mut c_void) -> io::Result<c_int> {
    // `syscall`, as `ioctl` may be the preloaded hook, which would take this for a call of the VMM's.
    // SAFETY: the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
    c_int::try_from(result).ok().filter(|&result| result >= 0).ok_or_else(io::Error::last_os_error)
}

fn create_device(vm: RawFd, flags: u32) -> io::Result<CreateDevice> {
    let mut create = CreateDevice { kind: KVM_DEV_TYPE_VFIO, fd: 0, flags };
    // SAFETY: `create` is a kvm_create_device and outlives the call.
    unsafe { ioctl(vm, KVM_CREATE_DEVICE, (&raw mut create).cast()) }?;
    Ok(create)
}

/// True if `vm` is a VM of this process, in a kernel with CONFIG_KVM_VFIO. Changes nothing.
#[must_use]
pub fn takes_vfio(vm: RawFd) -> bool {
    create_device(vm, KVM_CREATE_DEVICE_TEST).is_ok()
}

/// The kvm-vfio device of a VM.
#[derive(Debug)]
pub struct VfioDevice(OwnedFd);

impl VfioDevice {
    /// Makes it.
    ///
    /// # Errors
    /// EBUSY when the VM has one; ENODEV without CONFIG_KVM_VFIO; EIO in a process that did not make the VM.
    pub fn create(vm: RawFd) -> io::Result<Self> {
        let create = create_device(vm, 0)?;
        let fd = RawFd::try_from(create.fd).map_err(io::Error::other)?;
        // SAFETY: KVM has just returned this descriptor and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes the one that the VMM has made.
    #[must_use]
    pub fn adopt(device: OwnedFd) -> Self {
        Self(device)
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    /// The errno of `fcntl(F_DUPFD_CLOEXEC)`.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Gives KVM a VFIO file. KVM then holds it until [`Self::delete`] or the VM's end, whatever the caller closes.
    ///
    /// # Errors
    /// EINVAL for any other file, EEXIST for one that KVM holds.
    pub fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_ADD, file)
    }

    /// Takes it back.
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
        // SAFETY: `attr` is a kvm_device_attr whose address names an i32; both outlive the call.
        unsafe { ioctl(self.0.as_raw_fd(), KVM_SET_DEVICE_ATTR, (&raw mut attr).cast()) }.map(drop)
    }
}

/// True if `file`, known to be a VFIO device's, is bound to an iommufd: an unbound one answers EINVAL to every ioctl
/// but BIND.
#[must_use]
pub fn is_bound(file: BorrowedFd<'_>) -> bool {
    let mut info = VfioDeviceInfo { argsz: 24, ..Default::default() };
    // SAFETY: `info` is a vfio_device_info of the size it states and outlives the call.
    unsafe { ioctl(file.as_raw_fd(), VFIO_DEVICE_GET_INFO, (&raw mut info).cast()) }.is_ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A VM, where there is KVM.
    pub(crate) fn create_vm() -> Option<OwnedFd> {
        let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").ok()?;
        // SAFETY: the argument is a number.
        let vm = unsafe { ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, std::ptr::null_mut()) }.ok()?;
        // SAFETY: KVM has just returned this descriptor and nobody else owns it.
        Some(unsafe { OwnedFd::from_raw_fd(vm) })
    }

    #[test]
    fn a_vm_takes_vfio_and_other_files_do_not() {
        let Some(vm) = create_vm() else { return println!("no /dev/kvm here: not tested") };
        assert!(takes_vfio(vm.as_raw_fd()));
        let kvm = std::fs::File::open("/dev/kvm").unwrap();
        assert!(!takes_vfio(kvm.as_raw_fd()), "the system's descriptor is no VM");
        assert!(!takes_vfio(-1));
    }

    #[test]
    fn a_vm_has_one_vfio_device_which_refuses_what_is_no_vfio_file() {
        let Some(vm) = create_vm() else { return println!("no /dev/kvm here: not tested") };
        let device = VfioDevice::create(vm.as_raw_fd()).unwrap();
        let second = VfioDevice::create(vm.as_raw_fd()).unwrap_err();
        assert_eq!(second.raw_os_error(), Some(libc::EBUSY));

        let null = std::fs::File::open("/dev/null").unwrap();
        let refused = device.add(std::os::fd::AsFd::as_fd(&null)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    }
}
