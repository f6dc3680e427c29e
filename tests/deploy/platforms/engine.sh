#!/bin/sh
# engine.sh TREE DATA CGROUP SHARED...: Docker Engine with the folder TREE as its root, to be started in a mount
# namespace of its own, with which all mounts go away. DATA is where it keeps images, containers and volumes; SHARED are
# folders that have the same path inside.
#
# pivot_root, for under chroot neither `docker exec` nor health checks work.
set -eu
tree=$1 data=$2 cgroup=$3
shift 3
mount --make-rprivate /
mount --bind "$tree" "$tree"
cd "$tree"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p var/lib/docker old
mount --bind "$data" var/lib/docker
for folder in "$@"; do
    mkdir -p ".$folder"
    mount --bind "$folder" ".$folder"
done
pivot_root . old
umount -l /old
# Neither a proxy nor a registry that this machine may know: nothing is pulled.
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
    dockerd --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "$cgroup" --default-ulimit nofile=1024:20000 \
    -H unix:///run/docker.sock
