#!/bin/sh
# profiles: vtd
# minutes: 0.4
# boot: plain
# A kernel with iommufd but without IOMMU_IOAS_MAP_FILE, which came with Linux 6.13: guest memory is mapped by its address in the
# backend's process. The ioctl answers as such a kernel does (tests/testbed/bin/without_map_file.rs).

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

UNDER=without-map-file

# Counts what reaches the kernel: maps of a file, and maps of an address.
by_address() {
    equal 0 "$(hits iommufd_ioas_map_file)" "maps of a file"
    [ "$(hits iommufd_ioas_map)" -ge "$1" ]
}
serves() {
    guest_start --mem 96M --hugepages
    verify --size=16M
    equal "$(ledger)" "$(pinned)" "kB pinned, by the ledger and by the kernel"
    # Two queues of the drive and their bounce buffers, then the guest's region.
    by_address 6
}
flushed() {
    guest stop
    backend_stop
    [ "$(statistic map_flushed_bytes)" -gt 100663296 ]
    [ "$(statistic unmap_flushed_bytes)" -ge 100663296 ]
    [ "$(statistic staged)" -gt 6 ]
    equal 0 "$(statistic errors)" "requests failed"
}

probe iommufd_ioas_map_file iommufd_ioas_map
backend_start --no-snoop assume || exit
claim "without IOMMU_IOAS_MAP_FILE memory is mapped by address, and a verifying workload finds no wrong byte" serves
claim "it is staged and flushed as with it" flushed
finished
