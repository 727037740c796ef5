#!/bin/sh
# profiles: vtd vtd-snoop vtd-scalable amd-iommu virtio-iommu
# minutes: 0.1
# boot: iommu
# The kernel reports the IOMMU's properties as the profile lists them.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

iommu-probe >/run/answers || exit

answered() { contains "$1" /run/answers; }

while read -r answer; do
    claim "the kernel answers $answer" answered "$answer"
done <<END
$(sed -n 's/^answer = //p' /testbed/profile)
END

finished
