# Debian 12's own kernel, Linux 6.1, on Intel VT-d that does not enforce snooping.
machine = q35,kernel-irqchip=split
device = intel-iommu,intremap=on,aw-bits=48,snoop-control=off
kernel = intel_iommu=on
debian = bookworm
