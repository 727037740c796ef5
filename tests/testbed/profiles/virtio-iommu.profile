# The paravirtual IOMMU: 39 address bits, no hardware information, no enforced snooping. It does not remap interrupts, and VFIO
# must be allowed to use the device anyway.
machine = q35,kernel-irqchip=split
device = virtio-iommu-pci,addr=2
kernel = iommufd.allow_unsafe_interrupts=1 vfio_iommu_type1.allow_unsafe_interrupts=1
answer = iommu=virtio
answer = hw_type=0
answer = dma_cc=0
answer = iova_ranges=0x0-0xfedfffff,0xfef00000-0x7fffffffff
verdict = suppress coherent: the device never sets No Snoop
verdict = allow coherent: the device never sets No Snoop
verdict = refuse coherent: the device never sets No Snoop
verdict = assume not coherent: flushed at map, at unmap and around each request; KVM is not told
kvm = suppress=0 allow=0 refuse=0 assume=1 own=1
