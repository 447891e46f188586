#!/bin/bash
# PID 1 of one lab node, in its own pid, mount, uts, ipc, net and cgroup namespaces: nodeinit.sh NAME DIRECTORY
set -e
name=$1 dir=$2
hostname "$name"
mount --make-rprivate /
umount -R -l /run/netns 2>/dev/null || true # other nodes' network namespaces must not be kept alive from here
mkdir -p "$dir"/{run,spool,log,cg}
mount -t proc -o nosuid,nodev,noexec proc /proc
# A sysfs of this network namespace, under the cgroup mounts of the machine.
mount --rbind /sys/fs/cgroup "$dir/cg"
mount -t sysfs -o ro sysfs /sys
mount --rbind "$dir/cg" /sys/fs/cgroup
# Mounted anew, the freezer's root is this node's own cgroup: Slurm's step cgroups go below it.
if [ -d /sys/fs/cgroup/freezer ]; then
  umount /sys/fs/cgroup/freezer
  mount -t cgroup -o freezer freezer /sys/fs/cgroup/freezer
fi
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "$dir/run" /run
mkdir -p /run/sshd /run/lock
mount --bind "$dir/../../etc/hosts" /etc/hosts
mount --bind "$dir/../../etc/resolv.conf" /etc/resolv.conf
# Two nodes must not look like one boot of one machine.
cat /proc/sys/kernel/random/uuid >"$dir/boot_id"
mount --bind "$dir/boot_id" /proc/sys/kernel/random/boot_id
ip link set lo up
: >"$dir/ready"
# An ignored SIGCHLD stays ignored through exec: the kernel reaps this node's orphans.
trap '' CHLD
exec -a "lab-init-$name" sleep infinity
