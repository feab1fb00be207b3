#!/bin/busybox sh
# Init of a lab guest. The kernel command line says what to mount (lab.mount=SERIAL,SERIAL) and whether
# the guest agent runs (lab.agent=1).
/bin/busybox mkdir -p /bin /sbin /proc /sys /dev /run /data /etc /tmp /var
/bin/busybox --install -s /bin
/bin/busybox ln -s /run /var/run
export PATH=/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
for m in $(cat /modules/order); do insmod "/modules/$m" || echo "lab: insmod $m failed"; done
echo "0 0 0 0" >/proc/sys/kernel/printk
hostname lab
ip link set lo up

mount_list=; agent=1; probe=0
for word in $(cat /proc/cmdline); do
  case $word in
    lab.mount=*) mount_list=$(echo "${word#lab.mount=}" | tr , ' ') ;;
    lab.agent=*) agent=${word#lab.agent=} ;;
    lab.probe=*) probe=${word#lab.probe=} ;;
  esac
done
if [ "$probe" = 1 ]; then echo "lab: probe ok"; poweroff -f; fi

serial_of() { # BLOCK-NAME; virtio-blk has a plain file, SCSI has VPD page 0x80 behind a four byte header
  if [ -e "/sys/block/$1/serial" ]; then cat "/sys/block/$1/serial"
  elif [ -e "/sys/block/$1/device/vpd_pg80" ]; then tail -c +5 "/sys/block/$1/device/vpd_pg80"
  fi | tr -d ' \0'
}
find_disk() { # SERIAL
  for path in /sys/block/vd* /sys/block/sd*; do
    [ -e "$path" ] && [ "$(serial_of "${path##*/}")" = "$1" ] && { echo "/dev/${path##*/}"; return 0; }
  done
  return 1
}
find_port() { # NAME
  for path in /sys/class/virtio-ports/*; do
    [ -e "$path/name" ] && [ "$(cat "$path/name")" = "$1" ] && { echo "/dev/${path##*/}"; return 0; }
  done
  return 1
}
until_found() { # COMMAND...; devices are found by the kernel in their own time
  tries=0
  until "$@"; do
    tries=$((tries + 1))
    [ $tries -gt 500 ] && { echo "lab: not found: $*"; poweroff -f; }
    usleep 20000
  done
}

mounts=
for serial in $mount_list; do
  disk=$(until_found find_disk "$serial")
  mkdir -p "/data/$serial"
  mount -t ext4 "$disk" "/data/$serial" || { echo "lab: cannot mount $serial ($disk)"; poweroff -f; }
  mounts="$mounts /data/$serial"
done

if [ -e /sys/class/net/eth0 ]; then
  # What the network's server gives is what the guest has.
  printf '%s\n' '#!/bin/sh' '[ "$1" = bound ] || exit 0' 'ip addr add $ip/${mask:-24} dev $interface' \
    '[ -z "$router" ] || ip route add default via $router' 'echo nameserver $dns >/etc/resolv.conf' >/etc/udhcpc.sh
  chmod +x /etc/udhcpc.sh
  ip link set eth0 up
  udhcpc -i eth0 -b -q -t 20 -T 1 -x hostname:lab -s /etc/udhcpc.sh >/dev/null 2>&1 &
fi
mkdir -p /dev/virtio-ports
for name in lab.control lab.progress org.qemu.guest_agent.0; do
  ln -s "$(until_found find_port $name)" "/dev/virtio-ports/$name"
done
/lab-guest /dev/virtio-ports/lab.control /dev/virtio-ports/lab.progress $mounts &
[ "$agent" = 1 ] && qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run -f /run/qga.pid &
echo "lab: up after $(cut -d' ' -f1 /proc/uptime) s"
while :; do wait; sleep 3600 & done
