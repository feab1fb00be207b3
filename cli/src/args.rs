//! The command line.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use jiff::SignedDuration;
use model::{ByteSize, Name, Quiesce};
use net::{IfName, MacAddress, Rate};
use snapshot::MemoryWish;
use storage::pool::VolumeFormat;

/// Snapshots of running QEMU/KVM virtual machines, consistent across disks and inside the guest
///
/// snapctl talks to QEMU's monitor (QMP) and to the guest agent; no libvirt is needed.
/// Register a VM once, then snapshot it:
///
///   snapctl vm add vm1 --qmp /run/vm1/qmp --agent /run/vm1/qga
///   snapctl create vm1 --quiesce
///
/// Exit codes: 0 done · 1 failed, nothing changed or all undone · 2 bad command line or definition ·
/// 3 done with warnings · 4 guest not quiesced, nothing taken · 5 thaw unconfirmed · 6 not found ·
/// 7 refused as unsafe · 8 failed part-way, see 'snapctl recover' · 9 VM not reachable · 11 busy ·
/// 13 damage found · 130, 143 interrupted by a signal, after cleaning up
#[derive(Debug, Parser)]
#[command(name = "snapctl", version, verbatim_doc_comment, propagate_version = false)]
pub struct Cli {
    /// Options of every command
    #[command(flatten)]
    pub global: Global,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Print one JSON document on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Say less: no notes and hints on stderr
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Say on stderr what QEMU and the agent are asked; twice: and what they answer
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Keep definitions, state and locks below DIR
    #[arg(long, global = true, value_name = "DIR", env = "SNAPCTL_ROOT")]
    pub root: Option<PathBuf>,
    /// How long QEMU or the agent may take for one command
    #[arg(long, global = true, value_name = "TIME", value_parser = time, default_value = "30s")]
    pub timeout: Duration,
    /// Wait so many seconds for a lock or a socket that somebody holds
    #[arg(long, global = true, value_name = "SECONDS", value_parser = time)]
    pub wait: Option<Duration>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Take a snapshot of a running VM: every disk at the same instant
    Create(Create),
    /// Go back to a snapshot; what came after it is kept as a branch
    Revert(Revert),
    /// Delete snapshots; their layers are merged away, also while the VM runs
    Delete(Delete),
    /// Delete the snapshots that no rule keeps, with restic's meaning of the rules
    Prune(Prune),
    /// Keep snapshots from being deleted and pruned
    Protect(Protect),
    /// Let go of protected snapshots
    Unprotect(Protect),
    /// Make disks independent of the layers below, also while the VM runs
    Flatten(Flatten),
    /// List snapshots
    List(List),
    /// Show one snapshot
    Show(Show),
    /// Draw the chain of each disk, with the active layer marked
    Tree(OneVm),
    /// Check that every chain is whole and that the VM runs on the right layer
    Check(Check),
    /// Finish or undo what an interrupted command left
    Recover(Recover),
    /// Register VMs, find running ones, look at them
    #[command(subcommand)]
    Vm(Vm),
    /// Talk to the guest agent
    #[command(subcommand)]
    Guest(Guest),
    /// Look at a VM's disks
    #[command(subcommand)]
    Disk(Disk),
    /// Define the places where volumes live, start them, look at them
    #[command(subcommand)]
    Pool(Pool),
    /// Make, copy, convert and remove volumes
    #[command(subcommand)]
    Volume(Volume),
    /// Define networks, start them, plug ports into them
    #[command(subcommand)]
    Net(Net),
    /// Say what this host has and lacks
    Doctor(Doctor),
    /// Print completions for a shell
    Completions(Completions),
    /// Print the version
    Version,
}

/// Arguments of `create`.
#[derive(Debug, Args)]
pub struct Create {
    /// The VM
    pub vm: Name,
    /// Freeze the guest's file systems while the snapshot is taken; alone it means require
    #[arg(long, value_name = "require|try|off", num_args = 0..=1, require_equals = true, default_missing_value = "require", value_parser = quiesce)]
    pub quiesce: Option<Quiesce>,
    /// Freeze only these mount points of the guest (implies --quiesce)
    #[arg(long = "mountpoint", value_name = "DIR")]
    pub mountpoints: Vec<String>,
    /// Save the memory of the same instant too: while the guest runs on where that can be had (live), or while it stands still
    #[arg(long, value_name = "live|stop", num_args = 0..=1, require_equals = true, default_missing_value = "", value_parser = memory)]
    pub memory: Option<MemoryWish>,
    /// Take only this disk: an alias, qdev id, -drive id or node-name; may be repeated
    #[arg(long = "disk", value_name = "DISK")]
    pub disks: Vec<String>,
    /// The snapshot's name [default: the time in UTC]
    #[arg(long)]
    pub name: Option<Name>,
    /// A sentence about it
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// A mark on it; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub labels: Vec<(String, String)>,
    /// How the point is made: on overlays, by copies that share their data with the disks (reflink on XFS and btrfs, thin on
    /// LVM thin volumes), or inside the qcow2 images with the memory (internal); auto takes copies where every disk can
    /// be copied like that, and overlays otherwise
    #[arg(long, value_name = "auto|overlay|reflink|thin|internal", default_value = "auto")]
    pub method: Method,
    /// Where the overlays of disks on block devices go; those of files lie beside them
    #[arg(long, value_name = "DIR")]
    pub overlay_dir: Option<PathBuf>,
    /// How long the guest may stay frozen; after that it is thawed and nothing is taken
    #[arg(long, value_name = "TIME", value_parser = freeze_time, default_value = "10s")]
    pub max_freeze: Duration,
    /// Let the guest write out its dirty pages before the freeze, so that it stands still for less time
    #[arg(long, value_name = "yes|no", value_parser = yes_no, default_value = "yes", action = clap::ArgAction::Set)]
    pub sync_first: bool,
    /// Print what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// How a point is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    /// The best that every disk can do.
    Auto,
    /// On overlays.
    Overlay,
    /// Copies of files that share extents.
    Reflink,
    /// Copies of thin volumes that share blocks.
    Thin,
    /// Inside the images.
    Internal,
}

impl Create {
    /// The marks as a map; of a key given twice the last value counts.
    pub fn labels(&self) -> BTreeMap<String, String> {
        self.labels.iter().cloned().collect()
    }

    /// What the user wants of the freeze.
    pub fn quiesce(&self) -> Quiesce {
        let implied = if self.mountpoints.is_empty() { Quiesce::Off } else { Quiesce::Require };
        self.quiesce.unwrap_or(implied)
    }
}

/// Arguments of `revert`.
#[derive(Debug, Args)]
pub struct Revert {
    /// The VM; if it runs, its guest is reset and starts from the snapshot's disks
    pub vm: Name,
    /// The snapshot: its name, its id, a unique prefix of either, or 'latest'
    #[arg(value_name = "SNAP")]
    pub snapshot: String,
    /// Only this disk: an alias, qdev id, -drive id or node-name; may be repeated
    #[arg(long = "disk", value_name = "DISK")]
    pub disks: Vec<String>,
    /// Throw away what was written since the last snapshot, do not keep it as a branch
    #[arg(long)]
    pub discard: bool,
    /// Leave the VM alone, and copy the snapshot's disks into this directory: DIR/DISK.qcow2, each standing alone
    #[arg(long, value_name = "DIR", conflicts_with = "discard")]
    pub to_new: Option<PathBuf>,
    /// Print what would be done and what would be given up, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// The VM
    pub vm: Name,
    /// The snapshots: a name, an id, a unique prefix of either, or 'latest'
    #[arg(value_name = "SNAP", required = true)]
    pub snapshots: Vec<String>,
    /// How the layers are merged
    #[command(flatten)]
    pub merging: Merging,
}

/// Arguments of `protect` and `unprotect`.
#[derive(Debug, Args)]
pub struct Protect {
    /// The VM
    pub vm: Name,
    /// The snapshots: a name, an id, a unique prefix of either, or 'latest'
    #[arg(value_name = "SNAP", required = true)]
    pub snapshots: Vec<String>,
}

/// Arguments of `prune`.
#[derive(Debug, Args)]
pub struct Prune {
    /// The VM
    pub vm: Name,
    /// What is kept
    #[command(flatten)]
    pub keep: Keep,
    /// How the layers are merged
    #[command(flatten)]
    pub merging: Merging,
}

/// What is kept. Each rule keeps the newest snapshot of each period, counting only periods that have one, and the
/// oldest one if it may keep more; a snapshot stays if any rule keeps it, or if it is protected. As restic does.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct Keep {
    /// Keep the N newest
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_last: Option<u32>,
    /// Keep the newest of each of N hours
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_hourly: Option<u32>,
    /// Keep the newest of each of N days, in the host's time zone
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_daily: Option<u32>,
    /// Keep the newest of each of N weeks, which begin on a Monday
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_weekly: Option<u32>,
    /// Keep the newest of each of N months
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_monthly: Option<u32>,
    /// Keep the newest of each of N years
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_yearly: Option<u32>,
    /// Keep all that are at most so much older than the newest, for example 36h or 7d
    #[arg(long, value_name = "TIME", value_parser = age)]
    pub keep_within: Option<SignedDuration>,
    /// Keep all that have this mark; may be repeated
    #[arg(long = "keep-label", value_name = "KEY=VALUE", value_parser = label)]
    pub keep_labels: Vec<(String, String)>,
}

impl Keep {
    /// The rules, for the room that judges.
    pub fn rules(&self) -> snapshot::Rules {
        snapshot::Rules {
            last: self.keep_last.unwrap_or(0),
            hourly: self.keep_hourly.unwrap_or(0),
            daily: self.keep_daily.unwrap_or(0),
            weekly: self.keep_weekly.unwrap_or(0),
            monthly: self.keep_monthly.unwrap_or(0),
            yearly: self.keep_yearly.unwrap_or(0),
            within: self.keep_within,
            labels: self.keep_labels.clone(),
        }
    }
}

/// Arguments of `flatten`.
#[derive(Debug, Args)]
pub struct Flatten {
    /// The VM
    pub vm: Name,
    /// Only this disk: an alias, qdev id, -drive id or node-name; may be repeated
    #[arg(long = "disk", value_name = "DISK")]
    pub disks: Vec<String>,
    /// How the layers are merged
    #[command(flatten)]
    pub merging: Merging,
}

/// How layers are merged.
#[derive(Debug, Args)]
pub struct Merging {
    /// Print what would be done and how much it would copy, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Copy at most so much a second on each disk, for example 50M
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    pub bandwidth: Option<ByteSize>,
    /// How long the guest may be held for a merge of its active layer; a merge that would take longer is given up
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "5s")]
    pub max_pause: Duration,
    /// How long to wait for room where the file system is full; then what is left is for later
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "60s")]
    pub wait_for_room: Duration,
    /// Show how far it is: on a terminal (auto), as JSON lines on stderr, or not at all
    #[arg(long, value_name = "auto|json|off", default_value = "auto")]
    pub progress: ProgressStyle,
}

impl Merging {
    /// The limits, for the room that does the work.
    pub fn limits(&self) -> snapshot::Limits {
        let Self { bandwidth, max_pause, wait_for_room, .. } = *self;
        snapshot::Limits { bandwidth, max_pause, wait_for_room }
    }
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ProgressStyle {
    /// On a terminal.
    Auto,
    /// As JSON, one object a line.
    Json,
    /// Not at all.
    Off,
}

/// Arguments of `list`.
#[derive(Debug, Args)]
pub struct List {
    /// Only this VM's
    pub vm: Option<Name>,
}

/// Arguments of `show`.
#[derive(Debug, Args)]
pub struct Show {
    /// The VM
    pub vm: Name,
    /// The snapshot: its name, its id, a unique prefix of either, or 'latest'
    #[arg(value_name = "SNAP")]
    pub snapshot: String,
}

/// One VM.
#[derive(Debug, Args)]
pub struct OneVm {
    /// The VM
    pub vm: Name,
}

/// Arguments of `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// The VM
    pub vm: Name,
    /// Look into the frozen layers too: let qemu-img check each, and read all of it to see whether it was changed
    #[arg(long)]
    pub deep: bool,
}

/// Arguments of `recover`.
#[derive(Debug, Args)]
pub struct Recover {
    /// Only this VM's operations
    pub vm: Option<Name>,
}

/// `vm` and its verbs.
#[derive(Debug, Subcommand)]
pub enum Vm {
    /// Register a VM by its sockets
    Add(VmAdd),
    /// Find running QEMUs and propose how to register them
    Discover,
    /// List registered VMs
    List,
    /// Show one VM: its QEMU, its agent, its disks
    Show(OneVm),
    /// Forget a VM; it runs on, and its files stay
    Remove(VmRemove),
    /// Send one QMP command and print the reply
    Call(Call),
}

/// Arguments of `vm add`.
#[derive(Debug, Args)]
pub struct VmAdd {
    /// A name for the VM
    pub vm: Name,
    /// QEMU's monitor: the socket of -qmp unix:PATH,server=on,wait=off
    #[arg(long, value_name = "PATH")]
    pub qmp: PathBuf,
    /// The guest agent's channel: the socket of its chardev
    #[arg(long, value_name = "PATH")]
    pub agent: Option<PathBuf>,
    /// Register it though it does not answer now
    #[arg(long)]
    pub offline: bool,
}

/// Arguments of `vm remove`.
#[derive(Debug, Args)]
pub struct VmRemove {
    /// The VM
    pub vm: Name,
    /// Forget it though it has snapshots; they stay on disk and in the catalogue
    #[arg(long)]
    pub keep_snapshots: bool,
}

/// A raw command.
#[derive(Debug, Args)]
pub struct Call {
    /// The VM
    pub vm: Name,
    /// The command, for example query-block or guest-info
    pub command: String,
    /// Its arguments, a JSON object
    #[arg(value_name = "JSON", value_parser = json_object)]
    pub arguments: Option<serde_json::Value>,
}

/// `guest` and its verbs.
#[derive(Debug, Subcommand)]
pub enum Guest {
    /// Show the agent's version and commands, and the guest's system
    Info(OneVm),
    /// List the guest's file systems
    Fsinfo(OneVm),
    /// List the guest's network interfaces and addresses
    Network(OneVm),
    /// Freeze the guest's file systems while a command runs, or until Ctrl-C
    Freeze(GuestFreeze),
    /// Thaw the guest's file systems
    Thaw(OneVm),
    /// Say whether the agent holds a freeze
    Status(OneVm),
    /// Let the guest give unused blocks back
    Trim(OneVm),
    /// Send one agent command and print the reply
    Call(Call),
}

/// Arguments of `guest freeze`.
#[derive(Debug, Args)]
pub struct GuestFreeze {
    /// The VM
    pub vm: Name,
    /// Freeze only these mount points
    #[arg(long = "mountpoint", value_name = "DIR")]
    pub mountpoints: Vec<String>,
    /// How long the guest may stay frozen
    #[arg(long, value_name = "TIME", value_parser = freeze_time, default_value = "10s")]
    pub max_freeze: Duration,
    /// The command to run meanwhile, with --json its output goes to stderr; without one the freeze holds until
    /// Ctrl-C or the limit
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<std::ffi::OsString>,
}

/// `disk` and its verbs.
#[derive(Debug, Subcommand)]
pub enum Disk {
    /// List a VM's disks with their active layers
    List(OneVm),
    /// Print the path of a disk's active layer, for start scripts
    Path(DiskPath),
}

/// Arguments of `disk path`.
#[derive(Debug, Args)]
pub struct DiskPath {
    /// The VM
    pub vm: Name,
    /// The disk: an alias, qdev id, -drive id or node-name
    pub disk: String,
    /// The image that the disk began with, for a VM that does not run: printed as long as there is no
    /// snapshot of it
    #[arg(long, value_name = "IMAGE")]
    pub or: Option<PathBuf>,
    /// Print what QEMU's -blockdev is to be given, in JSON, in place of the path: with the format, with all that the layer
    /// stands on, and with the id of the key's object where it is encrypted; a node-name is for you to add
    #[arg(long, conflicts_with = "or")]
    pub blockdev: bool,
}

/// `pool` and its verbs.
#[derive(Debug, Subcommand)]
pub enum Pool {
    /// Define a pool: by its kind and what that needs, or by a file
    Define(PoolDefine),
    /// List pools
    List,
    /// Show one pool: how full it is, what it can do, its volumes
    Show(OnePool),
    /// Start a pool: mount or activate it, after a look whether it is the one that was defined
    Start(PoolStart),
    /// Stop a pool: unmount or deactivate it, unless a volume is in use
    Stop(OnePool),
    /// Start the pool with the host
    Autostart(PoolAutostart),
    /// Look at the pool anew, and remove what killed commands left in it
    Refresh(OnePool),
    /// Forget a pool; its volumes stay
    Remove(OnePool),
}

/// Arguments of `pool define`.
#[derive(Debug, Args)]
pub struct PoolDefine {
    /// A name for the pool
    pub pool: Name,
    /// Its kind: dir, fs, btrfs, disk, lvm or lvm-thin
    #[arg(value_name = "TYPE", required_unless_present = "file")]
    pub kind: Option<String>,
    /// Take the definition from a TOML file: 'type' and the options below, without their dashes
    #[arg(long, value_name = "FILE", conflicts_with = "kind")]
    pub file: Option<PathBuf>,
    /// dir, btrfs: the directory; fs: where it is mounted
    #[arg(long, value_name = "DIR")]
    pub path: Option<PathBuf>,
    /// fs: the formatted partition, disk or loop image
    #[arg(long, value_name = "DEVICE|IMAGE")]
    pub source: Option<PathBuf>,
    /// disk: the whole disk
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<PathBuf>,
    /// lvm, lvm-thin: the volume group
    #[arg(long, value_name = "NAME")]
    pub vg: Option<String>,
    /// lvm-thin: the thin pool in it
    #[arg(long, value_name = "NAME")]
    pub thin_pool: Option<String>,
    /// lvm-thin: how full its data may be, in percent, before new volumes and snapshots are refused [default: 90]
    #[arg(long, value_name = "PERCENT")]
    pub data_limit: Option<f64>,
    /// lvm-thin: likewise for its metadata [default: 80]
    #[arg(long, value_name = "PERCENT")]
    pub metadata_limit: Option<f64>,
    /// disk: write a partition table, if the disk is blank
    #[arg(long)]
    pub initialize: bool,
    /// Start it with the host
    #[arg(long)]
    pub autostart: bool,
}

/// One pool.
#[derive(Debug, Args)]
pub struct OnePool {
    /// The pool
    pub pool: Name,
}

/// Arguments of `pool start`.
#[derive(Debug, Args)]
pub struct PoolStart {
    /// The pool
    #[arg(required_unless_present = "autostart")]
    pub pool: Option<Name>,
    /// Start every pool that is to be started with the host; a unit of the system's does that
    #[arg(long, conflicts_with = "pool")]
    pub autostart: bool,
}

/// Arguments of `pool autostart`.
#[derive(Debug, Args)]
pub struct PoolAutostart {
    /// The pool
    pub pool: Name,
    /// Do not start it with the host any more
    #[arg(long)]
    pub off: bool,
}

/// `net` and its verbs.
#[derive(Debug, Subcommand)]
pub enum Net {
    /// Define a network: by its kind and what that needs, or by a file
    Define(Box<NetDefine>),
    /// List networks
    List,
    /// Show one network: its parts, what is not as it should be, its ports
    Show(OneNet),
    /// Start a network, or mend what somebody changed of it
    Start(NetStart),
    /// Stop a network: everything that was made for it is taken away, and nothing else
    Stop(NetStop),
    /// Start the network with the host
    Autostart(NetAutostart),
    /// Forget a network that is stopped
    Remove(OneNet),
    /// List the addresses that its guests have
    Leases(OneNet),
    /// Plug a port in: make a tap for a NIC of a guest
    Plug(NetPlug),
    /// Unplug a port: remove its tap
    Unplug(NetUnplug),
}

/// Arguments of `net define`.
#[derive(Debug, Args)]
pub struct NetDefine {
    /// A name for the network
    pub network: Name,
    /// Its kind: isolated, nat, routed, bridge, macvtap, vlan or vxlan
    #[arg(value_name = "KIND", required_unless_present = "file")]
    pub kind: Option<String>,
    /// Take the definition from a TOML file: 'type' and the options below, without their dashes
    #[arg(long, value_name = "FILE", conflicts_with = "kind")]
    pub file: Option<PathBuf>,
    /// isolated, nat, routed, vxlan: the IPv4 subnet; the host has the address that is named in it, or the first
    /// [default for nat and routed: a free one]
    #[arg(long, value_name = "ADDRESS/BITS")]
    pub subnet: Option<String>,
    /// Likewise for IPv6
    #[arg(long, value_name = "ADDRESS/BITS")]
    pub subnet6: Option<String>,
    /// Addresses that guests are given, again for several ranges [default: all of the subnet]
    #[arg(long, value_name = "FIRST-LAST")]
    pub dhcp: Vec<String>,
    /// Give guests no addresses
    #[arg(long, conflicts_with = "dhcp")]
    pub no_dhcp: bool,
    /// A guest that always has the same address, again for several
    #[arg(long, value_name = "MAC,ADDRESS[,NAME]")]
    pub host: Vec<String>,
    /// The domain of the guests' names
    #[arg(long, value_name = "DOMAIN")]
    pub domain: Option<String>,
    /// A name beside those of the guests, again for several
    #[arg(long, value_name = "NAME=ADDRESS")]
    pub name: Vec<String>,
    /// The interface that leads out. nat, routed: the only one [default: wherever the host's routes lead];
    /// bridge, vlan: is put into the bridge; macvtap: the NICs are on it; vxlan: the tunnel goes over it
    #[arg(long, value_name = "INTERFACE")]
    pub uplink: Option<String>,
    /// The bridge's name [default: sbr-NETWORK]; bridge without --uplink: one that the host has
    #[arg(long, value_name = "INTERFACE")]
    pub bridge: Option<String>,
    /// The bridge's MAC address [default: one that nobody has]
    #[arg(long, value_name = "MAC")]
    pub mac: Option<String>,
    /// The MTU of the bridge and of its ports
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// Let the bridge speak the spanning tree protocol
    #[arg(long)]
    pub stp: bool,
    /// bridge: the VLAN of the uplink
    #[arg(long, value_name = "ID")]
    pub vlan: Option<u16>,
    /// macvtap: whom a NIC reaches beside what is behind the interface [default: bridge]
    #[arg(long, value_name = "bridge|vepa|private|passthru")]
    pub mode: Option<String>,
    /// vxlan: the identifier that all its hosts have in common
    #[arg(long, value_name = "ID")]
    pub vni: Option<u32>,
    /// vxlan: this host's address of the tunnel
    #[arg(long, value_name = "ADDRESS")]
    pub local: Option<String>,
    /// vxlan: another host, again for several
    #[arg(long, value_name = "ADDRESS")]
    pub peer: Vec<String>,
    /// vxlan: the multicast group where the other hosts are found
    #[arg(long, value_name = "ADDRESS", conflicts_with = "peer")]
    pub group: Option<String>,
    /// vxlan: the UDP port [default: 4789]
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Start it with the host
    #[arg(long)]
    pub autostart: bool,
    /// Start it now, and forget it when it is stopped
    #[arg(long, conflicts_with = "autostart")]
    pub transient: bool,
}

/// One network.
#[derive(Debug, Args)]
pub struct OneNet {
    /// The network
    pub network: Name,
}

/// Arguments of `net start`.
#[derive(Debug, Args)]
pub struct NetStart {
    /// The network
    #[arg(required_unless_present = "autostart")]
    pub network: Option<Name>,
    /// Start every network that is to be started with the host; a unit of the system's does that
    #[arg(long, conflicts_with = "network")]
    pub autostart: bool,
    /// Print what would be done, and do nothing
    #[arg(long, conflicts_with = "autostart")]
    pub dry_run: bool,
}

/// Arguments of `net stop`.
#[derive(Debug, Args)]
pub struct NetStop {
    /// The network
    pub network: Name,
    /// Unplug its ports too; their guests lose the link
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `net autostart`.
#[derive(Debug, Args)]
pub struct NetAutostart {
    /// The network
    pub network: Name,
    /// Do not start it with the host any more
    #[arg(long)]
    pub off: bool,
}

/// Arguments of `net plug`.
#[derive(Debug, Args)]
pub struct NetPlug {
    /// The network
    pub network: Name,
    /// A name for the tap, at most 15 characters: say whose it is, for example vm1-0
    pub port: IfName,
    /// The MAC address of the guest's NIC
    #[arg(long, value_name = "MAC")]
    pub mac: Option<MacAddress>,
    /// An address of the guest's own, again for several: with it, or one that the network has fixed for the NIC, it
    /// can have no other
    #[arg(long, value_name = "ADDRESS", requires = "mac")]
    pub address: Vec<IpAddr>,
    /// Do not hold the guest to its MAC address and its addresses, and let it be a DHCP server or a router
    #[arg(long)]
    pub trust: bool,
    /// The user who may open the tap beside root, by number: whom QEMU runs as
    #[arg(long, value_name = "UID")]
    pub owner: Option<u32>,
    /// Let QEMU open it several times (queues=N)
    #[arg(long)]
    pub multi_queue: bool,
    /// Keep it from reaching other isolated ports
    #[arg(long)]
    pub isolated: bool,
    /// vlan: the VLAN of what the guest sends untagged
    #[arg(long, value_name = "ID")]
    pub vlan: Option<u16>,
    /// vlan: VLANs that the guest may send tagged, again for several
    #[arg(long, value_name = "ID|FIRST-LAST", value_parser = trunk)]
    pub trunk: Vec<(u16, u16)>,
    /// The MTU [default: the network's]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// What the guest may receive, in bytes a second: 10M, or with a peak and how much may come at once 10M,20M,1M
    #[arg(long, value_name = "AVERAGE[,PEAK[,BURST]]")]
    pub in_rate: Option<Rate>,
    /// What the guest may send, likewise
    #[arg(long, value_name = "AVERAGE[,PEAK[,BURST]]")]
    pub out_rate: Option<Rate>,
}

/// Arguments of `net unplug`.
#[derive(Debug, Args)]
pub struct NetUnplug {
    /// The network
    pub network: Name,
    /// The tap
    pub port: IfName,
}

/// One VLAN, or a range of them.
fn trunk(text: &str) -> Result<(u16, u16), String> {
    let parsed = match text.split_once('-') {
        Some((first, last)) => first.parse().ok().zip(last.parse().ok()),
        None => text.parse().ok().map(|id| (id, id)),
    };
    let valid = parsed.filter(|(first, last)| (1..=*last).contains(first) && *last <= 4094);
    valid.ok_or_else(|| format!("{text:?} is no VLAN and no range of them; VLANs are 1 to 4094"))
}

/// `volume` and its verbs.
#[derive(Debug, Subcommand)]
pub enum Volume {
    /// Make a new volume
    Create(VolumeCreate),
    /// List the volumes of a pool, or of all
    List(VolumeList),
    /// Show one volume
    Show(VolumeShow),
    /// Give a volume another size; the guest's partitions and file systems are the guest's
    Resize(VolumeResize),
    /// Make a volume that begins as another one is
    Clone(VolumeClone),
    /// Make a volume of another one in another format
    Convert(VolumeConvert),
    /// Copy a volume into another pool
    Copy(VolumeCopy),
    /// Make a volume of an image file, or of the disks in an OVA
    Import(VolumeImport),
    /// Write a volume into an image file
    Export(VolumeExport),
    /// Make a volume's content unreadable; its size and format stay
    Wipe(VolumeWipe),
    /// Remove volumes
    Delete(VolumeDelete),
}

/// Options of what takes long.
#[derive(Debug, Args)]
pub struct Copying {
    /// Print what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Copy at most so much a second, for example 50M
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    pub bandwidth: Option<ByteSize>,
    /// Show how far it is: on a terminal (auto), as JSON lines on stderr, or not at all
    #[arg(long, value_name = "auto|json|off", default_value = "auto")]
    pub progress: ProgressStyle,
}

/// Arguments of `volume create`.
#[derive(Debug, Args)]
pub struct VolumeCreate {
    /// The pool
    pub pool: Name,
    /// A name for the volume
    pub volume: Name,
    /// Its size, for example 20G; that of what it stands on if left out with --backing
    #[arg(required_unless_present = "backing")]
    pub size: Option<ByteSize>,
    /// Its format [default: qcow2 in files, raw on devices]
    #[arg(long, value_name = "raw|qcow2|vmdk")]
    pub format: Option<VolumeFormat>,
    /// How much of it takes room at once
    #[arg(long, value_name = "off|metadata|falloc|full", default_value = "off")]
    pub preallocation: Preallocate,
    /// Let it stand on this volume of the same pool, which is sealed against writing
    #[arg(long, value_name = "VOLUME")]
    pub backing: Option<Name>,
    /// Encrypt it; the passphrase comes from --key-file
    #[arg(long, value_name = "luks", value_parser = ["luks"], requires = "key_file")]
    pub encrypt: Option<String>,
    /// The file that holds the passphrase, as it is, without a newline
    #[arg(long, value_name = "FILE", requires = "encrypt")]
    pub key_file: Option<PathBuf>,
    /// How it is done
    #[command(flatten)]
    pub copying: Copying,
}

/// How much of a volume takes room at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Preallocate {
    /// Nothing.
    Off,
    /// The tables of a qcow2 image.
    Metadata,
    /// All of it, reserved.
    Falloc,
    /// All of it, written.
    Full,
}

/// Arguments of `volume list`.
#[derive(Debug, Args)]
pub struct VolumeList {
    /// Only this pool's
    pub pool: Option<Name>,
}

/// One volume.
#[derive(Debug, Args)]
pub struct OneVolume {
    /// The pool
    pub pool: Name,
    /// The volume
    pub volume: Name,
}

/// Arguments of `volume show`.
#[derive(Debug, Args)]
pub struct VolumeShow {
    /// The volume
    #[command(flatten)]
    pub volume: OneVolume,
    /// Print what of it is data, and where: start, length, how far below, and the byte of that file
    #[arg(long)]
    pub map: bool,
}

/// Arguments of `volume resize`.
#[derive(Debug, Args)]
pub struct VolumeResize {
    /// The volume
    #[command(flatten)]
    pub volume: OneVolume,
    /// The size, for example 40G
    pub size: ByteSize,
    /// Cut off what is behind a smaller size
    #[arg(long)]
    pub shrink: bool,
    /// Print what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `volume clone`.
#[derive(Debug, Args)]
pub struct VolumeClone {
    /// The volume to clone
    #[command(flatten)]
    pub volume: OneVolume,
    /// A name for the clone
    #[arg(value_name = "NEW")]
    pub new: Name,
    /// How: sharing extents (reflink) or blocks (thin), standing on the original, which is frozen then (backing), or by
    /// copying; auto takes reflink, thin, a backing file if the original is frozen already, else a copy
    #[arg(long, value_name = "auto|reflink|thin|backing|copy", default_value = "auto")]
    pub method: CloneBy,
    /// How it is done
    #[command(flatten)]
    pub copying: Copying,
}

/// How a clone is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum CloneBy {
    /// The best that can be had.
    Auto,
    /// Shared extents.
    Reflink,
    /// Shared blocks of a thin pool.
    Thin,
    /// An overlay.
    Backing,
    /// All data copied.
    Copy,
}

/// Arguments of `volume convert`.
#[derive(Debug, Args)]
pub struct VolumeConvert {
    /// The volume to convert; it stays
    #[command(flatten)]
    pub volume: OneVolume,
    /// A name for the new volume
    #[arg(value_name = "NEW")]
    pub new: Name,
    /// The format of the new volume
    #[arg(long, value_name = "raw|qcow2|vmdk")]
    pub format: VolumeFormat,
    /// How it is done
    #[command(flatten)]
    pub copying: Copying,
}

/// Arguments of `volume copy`.
#[derive(Debug, Args)]
pub struct VolumeCopy {
    /// The volume to copy
    #[command(flatten)]
    pub volume: OneVolume,
    /// The pool that it is copied into
    #[arg(value_name = "TO_POOL")]
    pub to: Name,
    /// A name for the copy [default: the same]
    #[arg(value_name = "NEW")]
    pub new: Option<Name>,
    /// The format of the copy [default: the same, if that pool can hold it]
    #[arg(long, value_name = "raw|qcow2|vmdk")]
    pub format: Option<VolumeFormat>,
    /// How it is done
    #[command(flatten)]
    pub copying: Copying,
}

/// Arguments of `volume import`.
#[derive(Debug, Args)]
pub struct VolumeImport {
    /// The pool
    pub pool: Name,
    /// A name for the volume; the disks of an OVA that holds several get -1, -2, …
    pub volume: Name,
    /// The image: qcow2, raw, vmdk, vhdx, vdi or ova
    pub file: PathBuf,
    /// Its format [default: as its ending says; nothing is guessed from its content]
    #[arg(long, value_name = "FORMAT")]
    pub from: Option<VolumeFormat>,
    /// The format of the volume [default: qcow2 in files, raw on devices]
    #[arg(long, value_name = "raw|qcow2|vmdk")]
    pub format: Option<VolumeFormat>,
    /// How it is done
    #[command(flatten)]
    pub copying: Copying,
}

/// Arguments of `volume export`.
#[derive(Debug, Args)]
pub struct VolumeExport {
    /// The volume
    #[command(flatten)]
    pub volume: OneVolume,
    /// The file, which must not be there yet
    pub file: PathBuf,
    /// Its format [default: as its ending says]
    #[arg(long, value_name = "raw|qcow2|vmdk|vhdx|vdi")]
    pub format: Option<VolumeFormat>,
    /// How it is done
    #[command(flatten)]
    pub copying: Copying,
}

/// Arguments of `volume wipe`.
#[derive(Debug, Args)]
pub struct VolumeWipe {
    /// The volume
    #[command(flatten)]
    pub volume: OneVolume,
    /// Write zeroes over what is there (zero), or only give the blocks back (discard)
    #[arg(long, value_name = "zero|discard", default_value = "zero")]
    pub method: WipeBy,
    /// How it is done
    #[command(flatten)]
    pub copying: Copying,
}

/// How a volume is wiped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum WipeBy {
    /// By writing zeroes.
    Zero,
    /// By giving blocks back.
    Discard,
}

/// Arguments of `volume delete`.
#[derive(Debug, Args)]
pub struct VolumeDelete {
    /// The pool
    pub pool: Name,
    /// The volumes
    #[arg(value_name = "VOLUME", required = true)]
    pub volumes: Vec<Name>,
    /// Print what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Look at this VM only
    pub vm: Option<Name>,
}

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// Nothing means whatever is better.
fn memory(text: &str) -> Result<MemoryWish, String> {
    match text {
        "" => Ok(MemoryWish::Best),
        method => method.parse().map(MemoryWish::Only),
    }
}

fn quiesce(text: &str) -> Result<Quiesce, String> {
    text.parse()
}

/// `10s`, `500ms`, `2m`, or a plain number of seconds.
fn time(text: &str) -> Result<Duration, String> {
    let fault = || format!("{text:?} is no time; write for example 10s, 500ms or 2m");
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    let span: SignedDuration = text.parse().map_err(|_| fault())?;
    Duration::try_from(span).map_err(|_| fault())
}

/// QEMU takes 0 for no limit, and a user who writes it hardly means that.
fn bandwidth(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(ByteSize(0)) => Err("nothing would ever be copied; leave it out for no limit".into()),
        Ok(size) => Ok(size),
        Err(fault) => Err(fault.to_string()),
    }
}

/// `36h`, `7d`, `2w`: days of 24 hours.
fn age(text: &str) -> Result<SignedDuration, String> {
    let fault = || format!("{text:?} is no time; write for example 36h, 7d or 2w");
    let span: jiff::Span = text.parse().map_err(|_| fault())?;
    let age = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|_| fault())?;
    if age.is_negative() { Err(fault()) } else { Ok(age) }
}

fn freeze_time(text: &str) -> Result<Duration, String> {
    let limit = time(text)?;
    let most = snapshot::MAX_FREEZE_LIMIT;
    match limit {
        Duration::ZERO => Err("a freeze of no time holds nothing".into()),
        long if long > most => {
            Err(format!("a guest must not stand still for more than {} s", most.as_secs()))
        }
        fine => Ok(fine),
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

fn yes_no(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err("write yes or no".into()),
    }
}

fn json_object(text: &str) -> Result<serde_json::Value, String> {
    match serde_json::from_str::<serde_json::Value>(text) {
        Ok(value) if value.is_object() => Ok(value),
        Ok(_) => Err("the arguments have to be a JSON object, for example '{\"id\": 1}'".into()),
        Err(fault) => Err(format!("this is no JSON: {fault}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn quiesce_alone_means_require() {
        let quiesce = |arguments: &[&str]| {
            let line = ["snapctl", "create", "vm1"].iter().chain(arguments);
            match Cli::try_parse_from(line).unwrap().command {
                Command::Create(create) => create.quiesce(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(quiesce(&[]), Quiesce::Off);
        assert_eq!(quiesce(&["--quiesce"]), Quiesce::Require);
        assert_eq!(quiesce(&["--quiesce=try"]), Quiesce::Try);
        assert_eq!(quiesce(&["--quiesce=off"]), Quiesce::Off);
        assert_eq!(quiesce(&["--mountpoint", "/srv"]), Quiesce::Require);
    }

    #[test]
    fn a_prune_without_a_rule_is_refused() {
        let prune = |arguments: &[&str]| {
            let line = ["snapctl", "prune", "vm1"].iter().chain(arguments);
            Cli::try_parse_from(line).map(|cli| match cli.command {
                Command::Prune(prune) => prune.keep.rules(),
                other => panic!("{other:?}"),
            })
        };
        assert!(prune(&[]).is_err() && prune(&["--dry-run"]).is_err());
        assert_eq!(prune(&["--keep-last", "3"]).unwrap().last, 3);
        let within = prune(&["--keep-within", "7d", "--keep-label", "a=b"]).unwrap();
        assert_eq!(within.within, Some(SignedDuration::from_hours(7 * 24)));
        for wrong in [["--keep-within", "-7d"], ["--keep-last", "-1"], ["--keep-last", "0"]] {
            assert!(prune(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn times_are_read_with_and_without_units() {
        assert_eq!(time("10"), Ok(Duration::from_secs(10)));
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert!(time("-1s").is_err() && time("soon").is_err());
        assert!(freeze_time("0s").is_err() && freeze_time("1h").is_err());
    }
}
