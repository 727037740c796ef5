# Intel VT-d that does not enforce snooping: a function's DMA may bypass the processor's caches.
machine = q35,kernel-irqchip=split
device = intel-iommu,intremap=on,aw-bits=48,snoop-control=off
kernel = intel_iommu=on
answer = iommu=intel
answer = hw_type=1
answer = vtd_ecap_sc=0
answer = vtd_ecap_smts=0
answer = dma_cc=0
answer = iova_ranges=0x0-0xfedfffff,0xfef00000-0xffffffffffff
verdict = suppress coherent: the device never sets No Snoop
verdict = allow coherent: the device never sets No Snoop
verdict = refuse coherent: the device never sets No Snoop
verdict = assume not coherent: flushed at map, at unmap and around each request; KVM is not told
kvm = suppress=0 allow=0 refuse=0 assume=1 own=1
