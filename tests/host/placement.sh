#!/bin/sh
# profiles: debian
# minutes: 0.2
# boot: iommu
# options: --qemu-arg -object --qemu-arg memory-backend-ram,id=node0,size=2G --qemu-arg -object --qemu-arg memory-backend-ram,id=node1,size=2G --qemu-arg -numa --qemu-arg node,nodeid=0,cpus=0,memdev=node0 --qemu-arg -numa --qemu-arg node,nodeid=1,cpus=1,memdev=node1
# Workers and the driver's memory are on the drive's NUMA node. The host has two, with a processor each. What is read is the same for
# every IOMMU; Debian's kernel has NUMA.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

NODE=/sys/bus/pci/devices/$FUNCTION/numa_node

# of_workers: the processors of each worker. A worker has its name and its place a moment after it has been started.
of_workers() {
    cat "/proc/$(cat "$BACKEND_PID")/task"/*/status | awk '
        $1 == "Name:" { worker = $2 ~ /^vdv-worker-/ }
        $1 == "Cpus_allowed_list:" && worker { print $2 }' | paste -s -d ' '
}
run_on() { equal "$1" "$(of_workers)" "processors of the workers"; }
# memory_on NODE: the driver's queues and the workers' buffers have pages there, and on no other node.
memory_on() {
    grep vhost-device-vfio-dma "/proc/$(cat "$BACKEND_PID")/numa_maps" >/run/maps
    pages=$(tr ' ' '\n' </run/maps | grep -oE '^N[0-9]+=' | sort -u | paste -s -d ' ')
    equal "N$1=" "$pages" "nodes with memory of the driver"
}

no_node() {
    equal -1 "$(cat "$NODE")" "the node that the firmware names"
    backend_start --queues 2
    logged "$FUNCTION: workers run on CPUs 0-1; sysfs names no NUMA node"
    within 10 run_on '0-1 0-1'
    backend_stop
}
on_node() {
    echo 1 >"$NODE"
    vhost-device-vfio inspect "$FUNCTION" | grep -q 'numa-node  *1, CPUs 1$'
    backend_start --queues 2
    logged "$FUNCTION: workers run on CPUs 1, because the drive is on NUMA node 1"
    within 10 run_on '1 1'
    memory_on 1
    equal 0-1 "$(awk '$1 == "Cpus_allowed_list:" { print $2 }' "/proc/$(cat "$BACKEND_PID")/status")" "the first thread's processors"
    backend_stop
}
list_counts_more() {
    backend_start --queues 2 --cpus 0
    logged "$FUNCTION: workers run on CPUs 0, because of --cpus"
    within 10 run_on '0 0'
    memory_on 1
    backend_stop
    backend_start --queues 2 --cpus 0,1
    within 10 run_on '0 1'
    backend_stop
}
not_on_node() {
    UNDER='taskset -c 0' backend_start --queues 2
    logged "WARN.*$FUNCTION: workers run on CPUs 0, although the drive is on NUMA node 1 .CPUs 1.:"
    within 10 run_on '0 0'
    # Whoever allocates it has run on the other node only.
    memory_on 1
    backend_stop
}

claim "workers of a drive without a node run where the program does" no_node
claim "workers run on the processors of the drive's node, and the driver's memory is there" on_node
claim "--cpus counts more than the node, and is divided if there is one for each worker" list_counts_more
claim "without a processor of the node workers run where the program does, with a warning" not_on_node
echo -1 >"$NODE"
finished
