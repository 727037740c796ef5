//! A process that keeps the VFIO device file of another one, and has used every right over the device that this file gives:
//! the device is detached from its page table, its request for the host goes nowhere, and its MSI-X is on.

// UNSAFETY: ioctl() has no safe form; each call says why it is sound.
#![expect(unsafe_code)]

use std::io::{self, Error};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::Pid;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, vfio_device_detach_iommufd_pt,
};

use crate::iommu::size_u32;
use crate::rights::files_of;

// linux/vfio.h: _IO(';', 100 + n).
const VFIO_DEVICE_SET_IRQS: libc::c_ulong = 0x3b6e;
const VFIO_DEVICE_DETACH_IOMMUFD_PT: libc::c_ulong = 0x3b78;

/// `struct vfio_irq_set` with one eventfd.
#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    eventfd: i32,
}

/// What was taken, to be kept open.
pub struct Held {
    files: Vec<OwnedFd>,
    _vector: OwnedFd,
}

impl Held {
    /// Duplicates the bound VFIO device files of `process`, which are those of one device, and uses them.
    ///
    /// # Errors
    /// `process` has no such file, or a step fails.
    pub fn take_from(process: Pid) -> io::Result<Self> {
        let mut files: Vec<_> = files_of(process)?.into_iter().map(|(_, file)| file).collect();
        // A file that was never bound, such as the one for KVM, allows nothing.
        files.retain(|file| set_irq(file, VFIO_PCI_REQ_IRQ_INDEX, None).is_ok());
        let vector = eventfd(0, EventfdFlags::CLOEXEC)?;
        let file = files.first().ok_or_else(|| Error::other("it has no bound VFIO device file"))?;
        // VFIO refuses MSI-X while INTx is on. The error says that it is off.
        let _ = set_irq(file, VFIO_PCI_INTX_IRQ_INDEX, None);
        set_irq(file, VFIO_PCI_MSIX_IRQ_INDEX, Some(&vector))?;
        let mut detach =
            vfio_device_detach_iommufd_pt { argsz: size_u32::<vfio_device_detach_iommufd_pt>(), ..Default::default() };
        ioctl(file, VFIO_DEVICE_DETACH_IOMMUFD_PT, ptr::from_mut(&mut detach).cast())?;
        Ok(Self { files, _vector: vector })
    }

    /// The number of files.
    #[must_use]
    pub fn count(&self) -> usize {
        self.files.len()
    }
}

/// Routes vector 0 of an interrupt, or turns it off.
fn set_irq(file: &OwnedFd, index: u32, vector: Option<&OwnedFd>) -> io::Result<()> {
    let data = if vector.is_some() { VFIO_IRQ_SET_DATA_EVENTFD } else { VFIO_IRQ_SET_DATA_NONE };
    let mut set = IrqSet {
        argsz: size_u32::<IrqSet>(),
        flags: data | VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        start: 0,
        count: vector.is_some().into(),
        eventfd: vector.map_or(-1, AsRawFd::as_raw_fd),
    };
    ioctl(file, VFIO_DEVICE_SET_IRQS, ptr::from_mut(&mut set).cast())
}

fn ioctl(file: &OwnedFd, request: libc::c_ulong, argument: *mut libc::c_void) -> io::Result<()> {
    // SAFETY: each request above is used with the structure that linux/vfio.h defines for it, whose size field is correct.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}
