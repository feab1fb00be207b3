#!/bin/busybox sh
# Init of the lab's host VM: the real host's root file system, read-only below a tmpfs. The kernel command line
# says where the modules (lab.modules=) and the script (lab.script=) are.
B=/bin/busybox
$B mkdir -p /proc /sys /dev /ro /rw /new
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
die() { echo "lab: $*"; $B poweroff -f; }
for m in $($B cat /modules/order); do $B insmod "/modules/$m" || echo "lab: insmod $m failed"; done
for word in $($B cat /proc/cmdline); do
  case $word in
    lab.modules=*) modules=${word#lab.modules=} ;;
    lab.script=*) script=${word#lab.script=} ;;
  esac
done
$B mount -t virtiofs host /ro -o ro || die "the host's files cannot be mounted"
$B mount -t tmpfs -o size=90% rw /rw; $B mkdir /rw/upper /rw/work
$B mount -t overlay root /new -o lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work || die "no overlay"
for dir in proc sys dev; do $B mount --move /$dir /new/$dir; done
$B mkdir -p /new/lib/modules /new/dev/pts /new/dev/shm /new/run
$B mount -t tmpfs run /new/run; $B mount -t devpts pts /new/dev/pts; $B mount -t tmpfs shm /new/dev/shm
$B mount --bind "/new$modules" /new/lib/modules || die "no modules"
exec $B chroot /new /bin/sh "$script"
