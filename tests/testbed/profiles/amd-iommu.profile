# AMD-Vi, which always enforces snooping. With pt=on, its default, QEMU 10 translates no DMA at all.
# Under TCG the timer interrupt does not pass a remapped IO-APIC, hence noapic. Interrupts are then not remapped, and VFIO must
# be allowed to use the device anyway.
machine = q35,kernel-irqchip=split
device = amd-iommu,pt=off
kernel = noapic iommufd.allow_unsafe_interrupts=1 vfio_iommu_type1.allow_unsafe_interrupts=1
answer = iommu=amd
answer = hw_type=4
answer = dma_cc=1
answer = iova_ranges=0x0-0xfedfffff,0xfef00000-0xfcffffffff,0x10000000000-0xffffffffffffffff
verdict = suppress coherent: the IOMMU enforces snooping
verdict = allow coherent: the IOMMU enforces snooping
verdict = refuse coherent: the IOMMU enforces snooping
verdict = assume coherent: the IOMMU enforces snooping
kvm = suppress=0 allow=0 refuse=0 assume=0 own=0
