# Intel VT-d that enforces snooping: every DMA goes through the processor's caches.
machine = q35,kernel-irqchip=split
device = intel-iommu,intremap=on,aw-bits=48,snoop-control=on
kernel = intel_iommu=on
answer = iommu=intel
answer = hw_type=1
answer = vtd_ecap_sc=1
answer = vtd_ecap_smts=0
answer = dma_cc=1
answer = iova_ranges=0x0-0xfedfffff,0xfef00000-0xffffffffffff
verdict = suppress coherent: the IOMMU enforces snooping
verdict = allow coherent: the IOMMU enforces snooping
verdict = refuse coherent: the IOMMU enforces snooping
verdict = assume coherent: the IOMMU enforces snooping
kvm = suppress=0 allow=0 refuse=0 assume=0 own=0
