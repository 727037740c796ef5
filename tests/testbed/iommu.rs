//! Asks the kernel about one function and its IOMMU.
//!
//! This code uses the same interfaces as the backend but shares no code with it, so that a profile's answers are not checked by
//! the code under test. It is simple because it maps nothing and runs for milliseconds; the kernel cleans up when the files are
//! closed.

// UNSAFETY: ioctl() has no safe form; every call goes through `ioctl` below.
#![expect(unsafe_code)]

mod type1;

use std::fs::{self, File};
use std::io::{self, Error};
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use iommufd_bindings as uapi;
use vfio_bindings::bindings::vfio as vfio_uapi;

const PCI_DEVICES: &str = "/sys/bus/pci/devices";
/// ECAP.SC, Snoop Control: leaf entries may carry SNP. Intel VT-d 4.1 §11.4.3
const ECAP_SC: u64 = 1 << 7;
/// ECAP.SMTS, Scalable Mode Translation Support.
const ECAP_SMTS: u64 = 1 << 43;
/// `VFIO_CHECK_EXTENSION` argument: does the IOMMU enforce snooping? linux/vfio.h
const VFIO_DMA_CC_IOMMU: libc::c_ulong = 4;

// linux/iommufd.h: _IO(';', 0x80 + n). linux/vfio.h: _IO(';', 100 + n).
const IOAS_ALLOC: libc::c_ulong = 0x3b81;
const IOAS_IOVA_RANGES: libc::c_ulong = 0x3b84;
const VFIO_IOAS: libc::c_ulong = 0x3b88;
const HWPT_ALLOC: libc::c_ulong = 0x3b89;
const GET_HW_INFO: libc::c_ulong = 0x3b8a;
const VFIO_CHECK_EXTENSION: libc::c_ulong = 0x3b65;
const VFIO_DEVICE_BIND_IOMMUFD: libc::c_ulong = 0x3b76;
const VFIO_DEVICE_ATTACH_IOMMUFD_PT: libc::c_ulong = 0x3b77;

/// The kernel's answers, as keys and values in a fixed order.
pub type Answers = Vec<(&'static str, String)>;

/// Binds `function` (`0000:00:04.0`), attaches it to an address space of its own, and asks. On a kernel without iommufd it goes
/// through VFIO type1.
///
/// # Errors
/// The step that failed, and the errno.
pub fn ask(function: &str) -> io::Result<Answers> {
    let at = Path::new(PCI_DEVICES).join(function);
    let mut answers = vec![
        ("iommu", vendor(&at)),
        ("group", link_name(&at.join("iommu_group"))?),
        ("driver", link_name(&at.join("driver"))?),
    ];

    if !Path::new("/dev/iommu").exists() {
        type1::ask(&at, &mut answers)?;
        return Ok(answers);
    }
    let iommufd = open(Path::new("/dev/iommu"))?;
    let cdev = open(&character_device(&at)?)?;
    let mut bind = vfio_uapi::vfio_device_bind_iommufd {
        argsz: size_u32::<vfio_uapi::vfio_device_bind_iommufd>(),
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    ioctl("bind to iommufd", &cdev, VFIO_DEVICE_BIND_IOMMUFD, &mut bind)?;
    hardware(&iommufd, bind.out_devid, &mut answers)?;

    let ioas = address_space(&iommufd, &cdev, bind.out_devid)?;
    answers.push(("dma_cc", enforces_snooping(&iommufd, ioas)?.to_string()));
    answers.push(("iova_ranges", iova_ranges(&iommufd, ioas)?));
    Ok(answers)
}

/// The IOMMU's vendor, from the name and path of its object in sysfs.
fn vendor(at: &Path) -> String {
    let object = fs::canonicalize(at.join("iommu")).unwrap_or_default();
    let name = object.file_name().unwrap_or_default().to_string_lossy();
    let vendor = match name.as_ref() {
        _ if name.starts_with("dmar") => "intel",
        _ if name.starts_with("ivhd") => "amd",
        _ if name.starts_with("smmu3") => "smmuv3",
        _ if object.to_string_lossy().contains("/virtio") => "virtio",
        _ => "none",
    };
    vendor.into()
}

fn hardware(iommufd: &File, dev_id: u32, answers: &mut Answers) -> io::Result<()> {
    // Large enough for Intel's and for AMD's registers; the kernel zeroes the rest.
    let mut data = [0_u64; 4];
    let mut info = uapi::iommu_hw_info {
        size: size_u32::<uapi::iommu_hw_info>(),
        flags: 0,
        dev_id,
        data_len: size_u32::<[u64; 4]>(),
        data_uptr: data.as_mut_ptr() as u64,
        __bindgen_anon_1: uapi::iommu_hw_info__bindgen_ty_1 { in_data_type: 0 },
        out_max_pasid_log2: 0,
        __reserved: [0; 3],
        out_capabilities: 0,
    };
    ioctl("hardware information", iommufd, GET_HW_INFO, &mut info)?;
    // SAFETY: both fields of this union are the same u32, and one was written above.
    let kind = unsafe { info.__bindgen_anon_1.out_data_type };
    answers.push(("hw_type", kind.to_string()));
    answers.push(("hw_capabilities", format!("{:#x}", info.out_capabilities)));
    match kind {
        uapi::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD => {
            let [_flags, cap, ecap, _] = data;
            answers.push(("vtd_cap", format!("{cap:#x}")));
            answers.push(("vtd_ecap", format!("{ecap:#x}")));
            answers.push(("vtd_ecap_sc", u8::from(ecap & ECAP_SC != 0).to_string()));
            answers.push(("vtd_ecap_smts", u8::from(ecap & ECAP_SMTS != 0).to_string()));
        }
        uapi::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_AMD => {
            answers.push(("amd_efr", format!("{:#x}", data[0])));
        }
        _ => {}
    }
    Ok(())
}

/// Attaches the device to a new IOAS with its own page table. An IOAS without a device reports the properties of an ideal IOMMU.
fn address_space(iommufd: &File, cdev: &File, dev_id: u32) -> io::Result<u32> {
    let mut ioas = uapi::iommu_ioas_alloc { size: size_u32::<uapi::iommu_ioas_alloc>(), ..Default::default() };
    ioctl("allocate an IOAS", iommufd, IOAS_ALLOC, &mut ioas)?;
    let mut hwpt = uapi::iommu_hwpt_alloc {
        size: size_u32::<uapi::iommu_hwpt_alloc>(),
        dev_id,
        pt_id: ioas.out_ioas_id,
        ..Default::default()
    };
    ioctl("allocate a page table", iommufd, HWPT_ALLOC, &mut hwpt)?;
    let mut attach = vfio_uapi::vfio_device_attach_iommufd_pt {
        argsz: size_u32::<vfio_uapi::vfio_device_attach_iommufd_pt>(),
        pt_id: hwpt.out_hwpt_id,
        ..Default::default()
    };
    ioctl("attach the device", cdev, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut attach)?;
    Ok(ioas.out_ioas_id)
}

/// 1 or 0, from the compatibility interface that iommufd has for older programs. KVM uses the same information.
fn enforces_snooping(iommufd: &File, ioas_id: u32) -> io::Result<i32> {
    let mut compat = uapi::iommu_vfio_ioas {
        size: size_u32::<uapi::iommu_vfio_ioas>(),
        ioas_id,
        op: 1, // IOMMU_VFIO_IOAS_SET
        ..Default::default()
    };
    ioctl("set the compatibility IOAS", iommufd, VFIO_IOAS, &mut compat)?;
    // SAFETY: this request takes a number, not a pointer.
    let answer = unsafe { libc::ioctl(iommufd.as_raw_fd(), VFIO_CHECK_EXTENSION, VFIO_DMA_CC_IOMMU) };
    if answer < 0 { Err(context("check the coherency extension", &Error::last_os_error())) } else { Ok(answer) }
}

fn iova_ranges(iommufd: &File, ioas_id: u32) -> io::Result<String> {
    let mut found = [uapi::iommu_iova_range::default(); 16];
    let mut query = uapi::iommu_ioas_iova_ranges {
        size: size_u32::<uapi::iommu_ioas_iova_ranges>(),
        ioas_id,
        num_iovas: 16,
        allowed_iovas: found.as_mut_ptr() as u64,
        ..Default::default()
    };
    ioctl("list the IOVA ranges", iommufd, IOAS_IOVA_RANGES, &mut query)?;
    let ranges = found.iter().take(query.num_iovas as usize);
    Ok(ranges.map(|r| format!("{:#x}-{:#x}", r.start, r.last)).collect::<Vec<_>>().join(","))
}

fn character_device(at: &Path) -> io::Result<PathBuf> {
    let entries = fs::read_dir(at.join("vfio-dev")).map_err(|e| context("not bound to vfio-pci", &e))?;
    let entry = entries.flatten().next().ok_or_else(|| Error::other("vfio-dev is empty"))?;
    Ok(Path::new("/dev/vfio/devices").join(entry.file_name()))
}

fn link_name(link: &Path) -> io::Result<String> {
    let target = fs::read_link(link).map_err(|e| context(&link.display().to_string(), &e))?;
    Ok(target.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path).map_err(|e| context(&path.display().to_string(), &e))
}

fn ioctl<T>(action: &str, file: &File, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request above is used in one call, with the structure that linux/iommufd.h or linux/vfio.h defines for it.
    // Its size field is correct, and its pointers refer to live locals.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(context(action, &Error::last_os_error())) } else { Ok(()) }
}

/// Adds the failed action to an error.
fn context(action: &str, cause: &Error) -> Error {
    Error::new(cause.kind(), format!("{action}: {cause}"))
}

pub(crate) fn size_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("an ioctl structure is small")
}
