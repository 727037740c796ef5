//! A minimal VMM for the tests of the preloaded library. It executes one command per line of its input, through libc as QEMU
//! does, and prints the result. At each `run` its guest executes WBINVD and halts; on arm64 it stores to a device that does
//! not exist.
//!
//! `vm`, `vcpu`, `run`, `vfio` (KVM_CREATE_DEVICE), `vfio-test` (the same with KVM_CREATE_DEVICE_TEST), `close NAME`,
//! `memory` (2 MiB of a memfd, mapped shared), `huge` (the same as one huge page), `image` (a memfd that is not mapped),
//! `private` (2 MiB of anonymous memory),
//! `dontfork`, `punch NAME`, `madvise NAME remove|dontneed|free`, `blocks NAME`, `first-byte NAME`.
#![expect(unsafe_code, reason = "calls C functions")]

use std::collections::HashMap;
use std::ffi::CString;
use std::io::{self, BufRead, Write};
use std::ptr;

use libc::{c_int, c_uint, c_ulong, c_void};

/// Size of each memory: one huge page.
const SIZE: usize = 2 << 20;
const KVM_CREATE_VM: c_ulong = 0xae01;
const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_GET_VCPU_MMAP_SIZE: c_ulong = 0xae04;
const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_ae46;
const KVM_RUN: c_ulong = 0xae80;
const KVM_CREATE_DEVICE: c_ulong = 0xc00c_aee0;

/// The guest's code, where it is in memory, and where the memory is.
#[cfg(target_arch = "x86_64")]
mod guest {
    /// Ends at 4 GiB.
    pub(crate) const MEMORY: u64 = (4 << 30) - super::SIZE as u64;
    /// The reset vector, 16 bytes below 4 GiB.
    pub(crate) const AT: usize = super::SIZE - 16;
    pub(crate) type Code = [u8; 5];
    /// WBINVD, HLT, and a jump back.
    pub(crate) const CODE: Code = [0x0f, 0x09, 0xf4, 0xeb, 0xfb];

    pub(crate) fn initialize(_: super::c_int, _: super::c_int) {}
}
#[cfg(target_arch = "aarch64")]
mod guest {
    use super::{c_int, c_ulong, ioctl};

    /// The vCPU starts at address 0.
    pub(crate) const MEMORY: u64 = 0;
    pub(crate) const AT: usize = 0;
    pub(crate) type Code = [u32; 3];
    /// `mov x0, #0x10000000`, where there is no memory; `str w0, [x0]`; a jump back to the store.
    pub(crate) const CODE: Code = [0xd2a2_0000, 0xb900_0000, 0x17ff_ffff];

    const KVM_ARM_PREFERRED_TARGET: c_ulong = 0x8020_aeaf;
    const KVM_ARM_VCPU_INIT: c_ulong = 0x4020_aeae;

    /// A vCPU of the host's kind.
    pub(crate) fn initialize(vm: c_int, vcpu: c_int) {
        let mut init = [0_u32; 8];
        ioctl(vm, KVM_ARM_PREFERRED_TARGET, init.as_mut_ptr().cast());
        ioctl(vcpu, KVM_ARM_VCPU_INIT, init.as_mut_ptr().cast());
    }
}

#[derive(Default)]
struct TestVmm {
    files: HashMap<String, c_int>,
    maps: HashMap<String, usize>,
    run: usize,
}

fn result_text(result: c_int) -> String {
    if result < 0 {
        io::Error::last_os_error().raw_os_error().map_or("?".into(), |e| format!("errno {e}"))
    } else {
        result.to_string()
    }
}

fn map(fd: c_int, flags: c_int, bytes: usize) -> usize {
    // SAFETY: a new mapping at an address that the kernel chooses.
    unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) }.addr()
}

fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    // SAFETY: each caller passes the argument that `request` expects.
    unsafe { libc::ioctl(fd, request, argument) }
}

impl TestVmm {
    fn file(&self, name: &str) -> c_int {
        self.files.get(name).copied().unwrap_or(-1)
    }

    fn open(&mut self, name: &str, fd: c_int) -> String {
        self.files.insert(name.into(), fd);
        result_text(fd)
    }

    fn vm(&mut self, name: &str) -> String {
        let path = CString::from(c"/dev/kvm");
        // SAFETY: the path is NUL-terminated.
        let kvm = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        self.files.insert("kvm".into(), kvm);
        let vm = ioctl(kvm, KVM_CREATE_VM, ptr::null_mut());
        self.open(name, vm)
    }

    fn vcpu(&mut self) -> String {
        let bytes = usize::try_from(ioctl(self.file("kvm"), KVM_GET_VCPU_MMAP_SIZE, ptr::null_mut())).unwrap_or(4096);
        let vcpu = ioctl(self.file("vm"), KVM_CREATE_VCPU, ptr::null_mut());
        self.run = map(vcpu, libc::MAP_SHARED, bytes);
        let memory = map(-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, SIZE);
        let reset_vector = ptr::with_exposed_provenance_mut::<guest::Code>(memory + guest::AT);
        // SAFETY: within the mapping created above.
        unsafe { reset_vector.write(guest::CODE) };
        let mut region: [u64; 4] = [0, guest::MEMORY, SIZE as u64, memory as u64];
        let set = ioctl(self.file("vm"), KVM_SET_USER_MEMORY_REGION, region.as_mut_ptr().cast());
        guest::initialize(self.file("vm"), vcpu);
        self.open("vcpu", if set < 0 { set } else { vcpu })
    }

    fn vfio(&mut self, flags: u32) -> String {
        let mut create: [u32; 3] = [4, u32::MAX, flags];
        let result = ioctl(self.file("vm"), KVM_CREATE_DEVICE, create.as_mut_ptr().cast());
        if result == 0 && flags == 0 {
            self.files.insert("vfio".into(), create[1].cast_signed());
        }
        result_text(result)
    }

    fn memory(&mut self, name: &str, mapped: bool, flags: c_uint) -> String {
        let path = CString::new(name).expect("a word");
        // SAFETY: the name is NUL-terminated, the other argument an integer.
        let fd = unsafe { libc::memfd_create(path.as_ptr(), libc::MFD_CLOEXEC | flags) };
        // SAFETY: the arguments are integers.
        unsafe { libc::ftruncate(fd, SIZE.cast_signed() as libc::off_t) };
        let address = map(fd, libc::MAP_SHARED, SIZE);
        // SAFETY: the mapping created above.
        unsafe { ptr::with_exposed_provenance_mut::<u8>(address).write(b'x') };
        if mapped {
            self.maps.insert(name.into(), address);
        } else {
            // SAFETY: the mapping created above, to which nothing refers any more.
            unsafe { libc::munmap(ptr::with_exposed_provenance_mut(address), SIZE) };
        }
        self.open(name, fd)
    }

    fn private(&mut self) -> String {
        let address = map(-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, SIZE);
        // SAFETY: the mapping created above.
        unsafe { ptr::with_exposed_provenance_mut::<u8>(address).write(b'x') };
        self.maps.insert("private".into(), address);
        result_text(0)
    }

    fn advise(&self, name: &str, advice: c_int) -> String {
        let address = ptr::with_exposed_provenance_mut(self.maps[name]);
        // SAFETY: one of the mappings created above; nothing refers to their contents.
        result_text(unsafe { libc::madvise(address, SIZE, advice) })
    }

    fn punch(&self, name: &str) -> String {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the arguments are integers.
        result_text(unsafe { libc::fallocate64(self.file(name), mode, 0, SIZE.cast_signed() as libc::off64_t) })
    }

    fn blocks(&self, name: &str) -> String {
        // SAFETY: `stat` is plain data, and the kernel writes it.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        unsafe { libc::fstat(self.file(name), &raw mut stat) };
        stat.st_blocks.to_string()
    }

    fn first_byte(&self, name: &str) -> String {
        let address = ptr::with_exposed_provenance::<u8>(self.maps[name]);
        // SAFETY: one of the mappings created above.
        unsafe { address.read_volatile() }.to_string()
    }

    fn close(&mut self, name: &str) -> String {
        // SAFETY: the argument is an integer.
        let result = unsafe { libc::close(self.file(name)) };
        if name == "vm" {
            self.files.remove("vm");
        }
        result_text(result)
    }

    fn execute(&mut self, line: &str) -> String {
        match *line.split_whitespace().collect::<Vec<_>>() {
            ["vm"] => self.vm("vm"),
            ["vm", name] => self.vm(name),
            ["vcpu"] => self.vcpu(),
            ["run"] => result_text(ioctl(self.file("vcpu"), KVM_RUN, ptr::null_mut())),
            ["vfio"] => self.vfio(0),
            ["vfio-test"] => self.vfio(1),
            ["close", name] => self.close(name),
            ["memory"] => self.memory("memory", true, 0),
            ["huge"] => self.memory("huge", true, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB),
            ["image"] => self.memory("image", false, 0),
            ["private"] => self.private(),
            ["dontfork"] => self.advise("memory", libc::MADV_DONTFORK),
            ["punch", name] => self.punch(name),
            ["madvise", name, "remove"] => self.advise(name, libc::MADV_REMOVE),
            ["madvise", name, "dontneed"] => self.advise(name, libc::MADV_DONTNEED),
            ["madvise", name, "free"] => self.advise(name, libc::MADV_FREE),
            ["blocks", name] => self.blocks(name),
            ["first-byte", name] => self.first_byte(name),
            _ => "unknown command".into(),
        }
    }
}

fn main() -> io::Result<()> {
    let mut vmm = TestVmm::default();
    for line in io::stdin().lock().lines() {
        let answer = vmm.execute(&line?);
        println!("{answer}");
        io::stdout().flush()?;
    }
    Ok(())
}
