//! What a QEMU's arguments say: name, monitors, the agent's socket, and the drives that the guest sees.
//!
//! Source: qemu(1); QEMU softmmu/vl.c `drive_add`, `monitor_parse`; qapi/block-core.json BlockdevOptions.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::options::{Options, text};
use super::{DiskSource, FoundDisk};
use crate::procfs::path_from;

/// The name of the agent's port. Source: qemu-ga(8).
const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// How deep nodes are followed; QEMU's own graphs have two or three levels.
const MAX_NODE_DEPTH: u8 = 16;

/// Most devices, drives and nodes of one VM that are looked at: whoever may start a process may name it
/// `qemu-system-x` and give it two million bytes of options.
const MAX_ITEMS: usize = 4096;

/// The options that take no argument, of QEMU 7.2 to 10.0. All others take one.
/// Source: QEMU qemu-options.hx, the options without `HAS_ARG`.
const FLAGS: &str = "\
    S alt-grab async-teardown audio-help ctrl-grab curses daemonize enable-fips enable-hax \
    enable-kvm enable-sync-profile full-screen h help localtime mem-prealloc no-acpi no-fd-bootchk \
    no-frame no-hpet no-kvm no-kvm-irqchip no-quit no-reboot no-shutdown no-user-config nodefaults \
    nographic old-param one-insn-per-tb only-migratable portrait preconfig s sdl semihosting \
    singlestep snapshot usb version win2k-hack xen-attach xen-create xen-domid-restrict";

/// Drivers that give bytes as they are when a device uses them without a format node.
const PROTOCOLS: &[&str] =
    &["file", "host_device", "host_cdrom", "nbd", "rbd", "iscsi", "nfs", "https", "http"];

/// What a command line says of a VM. Paths are as they were written.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct CommandLine {
    pub(super) guest_name: Option<String>,
    pub(super) uuid: Option<String>,
    pub(super) qmp: Vec<PathBuf>,
    pub(super) agent: Option<PathBuf>,
    pub(super) disks: Vec<FoundDisk>,
    pub(super) managed_by: Option<&'static str>,
}

impl CommandLine {
    /// Reads the arguments behind the program's name.
    pub(super) fn parse(arguments: &[Vec<u8>]) -> Self {
        let mut words = Words::default();
        let mut rest = arguments.iter().map(Vec::as_slice);
        while let Some(word) = rest.next() {
            match option_name(word) {
                None => words.take("hda", word),
                Some(name) if FLAGS.split(' ').any(|flag| flag == name) => {}
                Some(name) => words.take(name, rest.next().unwrap_or_default()),
            }
        }
        Self {
            managed_by: words.manager(),
            qmp: words.monitors(),
            agent: words.agent(),
            disks: words.disks(),
            guest_name: words.guest_name,
            uuid: words.uuid,
        }
    }

    pub(super) fn make_absolute(&mut self, cwd: Option<&Path>) {
        let Some(cwd) = cwd else { return };
        let files = self.disks.iter_mut().filter_map(|disk| match &mut disk.source {
            DiskSource::File(path) => Some(path),
            _ => None,
        });
        for path in self.qmp.iter_mut().chain(&mut self.agent).chain(files) {
            *path = cwd.join(&*path);
        }
    }
}

/// The name of an option, with one dash or two; `None` for anything else.
fn option_name(word: &[u8]) -> Option<&str> {
    let name = word.strip_prefix(b"-")?;
    std::str::from_utf8(name.strip_prefix(b"-").unwrap_or(name)).ok()
}

/// The options that matter, gathered before they are put together: a name may be used before it is defined.
#[derive(Default)]
struct Words {
    guest_name: Option<String>,
    uuid: Option<String>,
    /// Sockets that QEMU listens on, by chardev id.
    listeners: HashMap<Vec<u8>, PathBuf>,
    monitors: Vec<Monitor>,
    devices: Vec<Options>,
    drives: Vec<Drive>,
    nodes: HashMap<Vec<u8>, Node>,
    libvirt: bool,
    proxmox: bool,
}

enum Monitor {
    Path(PathBuf),
    Chardev(Vec<u8>),
}

impl Words {
    fn take(&mut self, option: &str, value: &[u8]) {
        match option {
            "name" => self.take_name(value),
            "uuid" => self.uuid = Some(text(value)),
            "chardev" => self.take_chardev(&Options::parse(value, "backend")),
            "qmp" | "qmp-pretty" => self.monitors.extend(monitor(value)),
            "mon" => self.take_mon(&Options::parse(value, "chardev")),
            "device" if self.devices.len() < MAX_ITEMS => self.devices.push(Options::parse(value, "driver")),
            "blockdev" if self.nodes.len() < MAX_ITEMS => self.take_node(Node::parse(value)),
            "drive" | "hda" | "hdb" | "hdc" | "hdd" | "cdrom" if self.drives.len() < MAX_ITEMS => {
                self.drives.push(Drive::of(option, value));
            }
            "object" => {
                self.libvirt |= Options::parse(value, "qom-type").get("id") == Some(b"masterKey0");
            }
            _ => {}
        }
    }

    fn take_name(&mut self, value: &[u8]) {
        let options = Options::parse(value, "guest");
        self.guest_name = options.get("guest").map(text).or(self.guest_name.take());
    }

    fn take_chardev(&mut self, options: &Options) {
        let Some(path) = options.get("path") else { return };
        self.libvirt |= holds(path, b"/lib/libvirt/qemu/") || holds(path, b"/libvirt/qemu/channel/");
        self.proxmox |= holds(path, b"/run/qemu-server/");
        if let (Some(id), Some(path)) = (options.get("id"), listener(options)) {
            self.listeners.insert(id.to_vec(), path);
        }
    }

    fn take_mon(&mut self, options: &Options) {
        if options.get("mode") == Some(b"control") {
            self.monitors.extend(options.get("chardev").map(|id| Monitor::Chardev(id.to_vec())));
        }
    }

    fn take_node(&mut self, node: Node) {
        if let Some(name) = node.name.clone() {
            self.nodes.insert(name, node);
        }
    }

    fn manager(&self) -> Option<&'static str> {
        match (self.libvirt, self.proxmox) {
            (true, _) => Some("libvirt"),
            (false, true) => Some("proxmox"),
            (false, false) => None,
        }
    }

    fn monitors(&self) -> Vec<PathBuf> {
        let path = |monitor: &Monitor| match monitor {
            Monitor::Path(path) => Some(path.clone()),
            Monitor::Chardev(id) => self.listeners.get(id).cloned(),
        };
        self.monitors.iter().filter_map(path).collect()
    }

    fn agent(&self) -> Option<PathBuf> {
        let is_port = |device: &&Options| {
            device.get("driver") == Some(b"virtserialport")
                && device.get("name") == Some(AGENT_PORT.as_bytes())
        };
        self.listeners.get(self.devices.iter().find(is_port)?.get("chardev")?).cloned()
    }

    /// What the guest sees: drives that bring their own device, and devices that name a drive or a node.
    fn disks(&self) -> Vec<FoundDisk> {
        let own = self.drives.iter().filter(|drive| drive.has_device).map(|drive| self.own_disk(drive));
        let named = self.devices.iter().filter_map(|device| self.device_disk(device));
        own.chain(named).collect()
    }

    fn own_disk(&self, drive: &Drive) -> FoundDisk {
        FoundDisk { cdrom: drive.cdrom, ..self.disk(&drive.node, drive.id.as_deref()) }
    }

    fn device_disk(&self, device: &Options) -> Option<FoundDisk> {
        let name = device.get("drive")?;
        let drive = self.drives.iter().find(|drive| drive.id.as_deref() == Some(name));
        let unknown = Node::default();
        let node = drive.map(|drive| &drive.node).or(self.nodes.get(name)).unwrap_or(&unknown);
        let cdrom = matches!(device.get("driver"), Some(b"scsi-cd" | b"ide-cd"));
        let mut disk = self.disk(node, Some(name));
        disk.qdev = device.text("id").or_else(|| device.text("qdev"));
        disk.cdrom = cdrom || drive.is_some_and(|drive| drive.cdrom);
        Some(disk)
    }

    fn disk(&self, node: &Node, drive: Option<&[u8]>) -> FoundDisk {
        FoundDisk {
            qdev: None,
            drive: drive.map(text),
            source: self.source(node, MAX_NODE_DEPTH),
            format: self.format(node, MAX_NODE_DEPTH),
            read_only: node.read_only,
            cdrom: false,
        }
    }

    fn child<'a>(&'a self, node: &'a Node) -> Option<&'a Node> {
        match node.file.as_ref()? {
            Child::Inline(node) => Some(node),
            Child::Named(name) => self.nodes.get(name),
        }
    }

    fn source(&self, node: &Node, depth: u8) -> DiskSource {
        if let Some(source) = &node.source {
            return source.clone();
        }
        match (self.child(node), depth) {
            (Some(child), 1..) => self.source(child, depth - 1),
            _ => DiskSource::Protocol("unknown".into()),
        }
    }

    /// The first format below filters, which have a `file` too.
    fn format(&self, node: &Node, depth: u8) -> Option<String> {
        let is_filter = matches!(node.driver.as_deref(), Some("throttle" | "copy-on-read" | "compress"));
        match (self.child(node), depth) {
            (Some(child), 1..) if is_filter => self.format(child, depth - 1),
            (None, _) if PROTOCOLS.contains(&node.driver.as_deref().unwrap_or_default()) => {
                Some("raw".into())
            }
            _ => node.driver.clone(),
        }
    }
}

/// The argument of `-qmp`: `chardev:ID`, or `unix:PATH` with options. Others have no path.
fn monitor(value: &[u8]) -> Option<Monitor> {
    if let Some(id) = value.strip_prefix(b"chardev:") {
        return Some(Monitor::Chardev(id.to_vec()));
    }
    let mut options = Options::parse(value.strip_prefix(b"unix:")?, "path");
    options.0.push((b"backend".to_vec(), b"socket".to_vec()));
    listener(&options).map(Monitor::Path)
}

/// The path of a chardev on which QEMU listens. Where QEMU is the client there is nothing to connect to.
fn listener(options: &Options) -> Option<PathBuf> {
    let is_socket = options.get("backend") == Some(b"socket");
    let listens = options.switch("server") && !options.switch("abstract");
    options.get("path").filter(|path| is_socket && listens && !path.is_empty()).map(path_from)
}

/// A `-drive`, or one of its short forms.
struct Drive {
    id: Option<Vec<u8>>,
    node: Node,
    cdrom: bool,
    /// Whether the guest sees it without a `-device`.
    has_device: bool,
}

impl Drive {
    fn of(option: &str, value: &[u8]) -> Self {
        match option {
            "drive" => Self::parse(value),
            _ => Self::plain(value, option == "cdrom"),
        }
    }

    fn parse(value: &[u8]) -> Self {
        let options = Options::parse(value, "file");
        let mut node = Node::from_options(&options, "", 0);
        node.driver = options.text("format").or(node.driver);
        node.read_only |= options.switch("readonly");
        if let Some(name) = options.get("file") {
            (node.source, node.file) = (Some(named_source(name)), None);
        }
        if node.source.is_none() && node.file.is_none() {
            node.source = Some(DiskSource::Empty);
        }
        let has_device = !matches!(options.get("if"), Some(b"none" | b"pflash" | b"mtd" | b"sd" | b"floppy"));
        let cdrom = options.get("media") == Some(b"cdrom");
        Self { id: options.get("id").map(<[u8]>::to_vec), node, cdrom, has_device }
    }

    fn plain(value: &[u8], cdrom: bool) -> Self {
        let node = Node { source: Some(named_source(value)), read_only: cdrom, ..Node::default() };
        Self { id: None, node, cdrom, has_device: true }
    }
}

/// Where a file name of `-drive` leads: it may begin with a protocol, or be JSON.
///
/// Only the protocol of others is kept, since the rest can hold a secret (`rbd:…:key=…`).
///
/// Source: QEMU block.c `path_has_protocol`.
fn named_source(name: &[u8]) -> DiskSource {
    if name.is_empty() {
        return DiskSource::Empty;
    }
    if let Some(json) = name.strip_prefix(b"json:") {
        let node = Node::parse(json);
        return node.innermost().source.clone().unwrap_or(DiskSource::Protocol("unknown".into()));
    }
    match name.iter().position(|byte| matches!(byte, b':' | b'/')) {
        Some(at) if name[at] == b':' => match &name[..at] {
            b"file" | b"host_device" | b"host_cdrom" => DiskSource::File(path_from(&name[at + 1..])),
            protocol => DiskSource::Protocol(text(protocol)),
        },
        _ => DiskSource::File(path_from(name)),
    }
}

/// A node of the block graph, as `-blockdev` or `-drive` asks for it.
#[derive(Default)]
struct Node {
    name: Option<Vec<u8>>,
    driver: Option<String>,
    /// Set for a protocol node, and where a drive names its file.
    source: Option<DiskSource>,
    file: Option<Child>,
    read_only: bool,
}

enum Child {
    Named(Vec<u8>),
    Inline(Box<Node>),
}

impl Node {
    fn parse(value: &[u8]) -> Self {
        Self::from_options(&Options::parse(value, "driver"), "", 0)
    }

    /// Reads the options that begin with `prefix`: children are written as `file.driver`, `file.filename`.
    fn from_options(options: &Options, prefix: &str, depth: u8) -> Self {
        let key = |name: &str| format!("{prefix}{name}");
        let inner = key("file.");
        let driver = options.text(&key("driver"));
        let file = match options.get(&key("file")) {
            // In a `-drive` this is a file name; `Drive::parse` sees to it.
            Some(name) => Some(Child::Named(name.to_vec())),
            None if depth < MAX_NODE_DEPTH && options.has_prefix(&inner) => {
                Some(Child::Inline(Box::new(Self::from_options(options, &inner, depth + 1))))
            }
            None => None,
        };
        let source = match (options.get(&key("filename")), driver.as_deref()) {
            (Some(name), Some("file" | "host_device" | "host_cdrom") | None) => Some(named_source(name)),
            (_, Some(protocol)) if file.is_none() => Some(DiskSource::Protocol(text(protocol.as_bytes()))),
            _ => None,
        };
        let read_only = options.switch(&key("read-only"));
        Self { name: options.get(&key("node-name")).map(<[u8]>::to_vec), driver, source, file, read_only }
    }

    fn innermost(&self) -> &Self {
        match &self.file {
            Some(Child::Inline(node)) => node.innermost(),
            _ => self,
        }
    }
}

fn holds(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Splits a command line as a shell would: at blanks, except inside single quotes.
    fn parse(line: &str) -> CommandLine {
        let mut words = Vec::new();
        for (at, part) in line.split('\'').enumerate() {
            match at % 2 {
                0 => words.extend(part.split_whitespace().map(|word| word.as_bytes().to_vec())),
                _ => words.push(part.as_bytes().to_vec()),
            }
        }
        CommandLine::parse(&words[1..])
    }

    fn file(path: &str) -> DiskSource {
        DiskSource::File(path.into())
    }

    /// A disk in short: device, drive, source, format.
    type Short<'a> = (Option<&'a str>, Option<&'a str>, DiskSource, Option<&'a str>);

    fn disks(found: &CommandLine) -> Vec<Short<'_>> {
        let short = |disk: &FoundDisk| disk.source.clone();
        let disks = found.disks.iter();
        disks
            .map(|disk| (disk.qdev.as_deref(), disk.drive.as_deref(), short(disk), disk.format.as_deref()))
            .collect()
    }

    #[test]
    fn a_unit_that_uses_blockdev() {
        let found = parse(
            "/usr/bin/qemu-system-x86_64 -name guest=web1,process=vm-web1,debug-threads=on -enable-kvm -nodefaults
             -nographic -machine q35 -m 4G -qmp unix:/run/vm/web1/qmp,server=on,wait=off
             -uuid 6d1c1c3e-6f5f-4f43-b5c4-4a9ad4a2d1b8 -no-reboot
             -blockdev driver=file,node-name=f0,filename=/srv/vm/web1.qcow2,aio=io_uring,cache.direct=on
             -blockdev driver=qcow2,node-name=d0,file=f0,discard=unmap
             -blockdev driver=raw,node-name=d1,read-only=on,file.driver=host_device,file.filename=/dev/vg0/data
             -blockdev driver=throttle,node-name=t1,throttle-group=g,file=d1
             -device virtio-blk-pci,drive=d0,id=root,bootindex=0 -device scsi-hd,drive=t1,id=data
             -device virtio-serial -chardev socket,id=qga0,path=/run/vm/web1/qga,server=on,wait=off
             -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
        );
        assert_eq!(found.guest_name.as_deref(), Some("web1"));
        assert_eq!(found.uuid.as_deref(), Some("6d1c1c3e-6f5f-4f43-b5c4-4a9ad4a2d1b8"));
        assert_eq!(found.qmp, [PathBuf::from("/run/vm/web1/qmp")]);
        assert_eq!(found.agent, Some("/run/vm/web1/qga".into()));
        assert_eq!(found.managed_by, None);
        assert_eq!(
            disks(&found),
            [
                (Some("root"), Some("d0"), file("/srv/vm/web1.qcow2"), Some("qcow2")),
                (Some("data"), Some("t1"), file("/dev/vg0/data"), Some("raw")),
            ]
        );
    }

    #[test]
    fn proxmox() {
        let found = parse(
            "/usr/bin/kvm -id 100 -name 'vm-100,debug-threads=on' -no-shutdown
             -chardev 'socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off'
             -mon 'chardev=qmp,mode=control'
             -chardev 'socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5' -mon 'chardev=qmp-event,mode=control'
             -pidfile /var/run/qemu-server/100.pid -daemonize -nodefaults -vnc 'unix:/var/run/qemu-server/100.vnc,password=on'
             -chardev 'socket,path=/var/run/qemu-server/100.qga,server=on,wait=off,id=qga0'
             -device 'virtio-serial,id=qga0,bus=pci.0,addr=0x8'
             -device 'virtserialport,chardev=qga0,name=org.qemu.guest_agent.0'
             -drive 'if=none,id=drive-ide2,media=cdrom,aio=io_uring'
             -device 'ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2,bootindex=101'
             -drive 'file=/dev/pve/vm-100-disk-0,if=none,id=drive-scsi0,format=raw,cache=none,aio=io_uring'
             -device 'scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,bootindex=100'
             -drive 'file=rbd:pool/vm-100-disk-1:id=admin:key=c2VjcmV0,if=none,id=drive-scsi1,format=raw'
             -device 'scsi-hd,bus=virtioscsi0.0,drive=drive-scsi1,id=scsi1' -machine 'type=pc+pve0'",
        );
        assert_eq!(found.managed_by, Some("proxmox"));
        assert_eq!(found.guest_name.as_deref(), Some("vm-100"));
        // The second monitor is one where QEMU is the client.
        assert_eq!(found.qmp, [PathBuf::from("/var/run/qemu-server/100.qmp")]);
        assert_eq!(found.agent, Some("/var/run/qemu-server/100.qga".into()));
        assert_eq!(
            disks(&found),
            [
                (Some("ide2"), Some("drive-ide2"), DiskSource::Empty, None),
                (Some("scsi0"), Some("drive-scsi0"), file("/dev/pve/vm-100-disk-0"), Some("raw")),
                (Some("scsi1"), Some("drive-scsi1"), DiskSource::Protocol("rbd".into()), Some("raw")),
            ]
        );
        assert_eq!(found.disks.iter().map(|disk| disk.cdrom).collect::<Vec<_>>(), [true, false, false]);
        assert!(!format!("{found:?}").contains("c2VjcmV0"), "P8: no secret is kept");
    }

    #[test]
    fn libvirt() {
        let found = parse(
            r#"/usr/bin/qemu-system-x86_64 -name guest=deb12,debug-threads=on -S
             -object '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-3-deb12/master-key.aes"}'
             -blockdev '{"driver":"file","filename":"/usr/share/OVMF/OVMF_CODE_4M.fd","node-name":"libvirt-pflash0-storage","auto-read-only":true,"discard":"unmap"}'
             -blockdev '{"node-name":"libvirt-pflash0-format","read-only":true,"driver":"raw","file":"libvirt-pflash0-storage"}'
             -machine pc-q35-7.2,usb=off,pflash0=libvirt-pflash0-format -accel kvm
             -no-user-config -nodefaults -chardev socket,id=charmonitor,fd=31,server=on,wait=off
             -mon chardev=charmonitor,id=monitor,mode=control
             -device '{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}'
             -blockdev '{"driver":"file","filename":"/var/lib/libvirt/images/deb12.qcow2","node-name":"libvirt-3-storage","auto-read-only":true}'
             -blockdev '{"node-name":"libvirt-3-format","read-only":true,"driver":"qcow2","file":"libvirt-3-storage","backing":null}'
             -blockdev '{"driver":"file","filename":"/var/lib/libvirt/images/deb12.snap1","node-name":"libvirt-2-storage"}'
             -blockdev '{"node-name":"libvirt-2-format","read-only":false,"driver":"qcow2","file":"libvirt-2-storage","backing":"libvirt-3-format"}'
             -device '{"driver":"virtio-blk-pci","bus":"pci.4","addr":"0x0","drive":"libvirt-2-format","id":"virtio-disk0","bootindex":1}'
             -device '{"driver":"ide-cd","bus":"ide.0","id":"sata0-0-0"}'
             -chardev socket,id=charchannel0,path=/run/libvirt/qemu/channel/3-deb12/org.qemu.guest_agent.0,server=on,wait=off
             -device '{"driver":"virtserialport","bus":"virtio-serial0.0","nr":1,"chardev":"charchannel0","id":"channel0","name":"org.qemu.guest_agent.0"}'
             -sandbox on,obsolete=deny -msg timestamp=on"#,
        );
        assert_eq!(found.managed_by, Some("libvirt"));
        assert_eq!(found.guest_name.as_deref(), Some("deb12"));
        assert_eq!(found.qmp, [] as [PathBuf; 0], "libvirt hands its monitor over as a descriptor");
        assert_eq!(found.agent, Some("/run/libvirt/qemu/channel/3-deb12/org.qemu.guest_agent.0".into()));
        assert_eq!(
            disks(&found),
            [(
                Some("virtio-disk0"),
                Some("libvirt-2-format"),
                file("/var/lib/libvirt/images/deb12.snap1"),
                Some("qcow2")
            )]
        );
    }

    #[test]
    fn typed_by_hand() {
        let found = parse(
            "qemu-system-x86_64 --enable-kvm -hda disk.img -hdb second,,half.img -cdrom debian.iso -boot d -snapshot
             -qmp unix:qmp.sock,server,nowait -monitor unix:hmp.sock,server,nowait -serial mon:stdio tail.img",
        );
        assert_eq!(found.guest_name, None);
        assert_eq!(found.qmp, [PathBuf::from("qmp.sock")]);
        let sources: Vec<_> = found.disks.iter().map(|disk| &disk.source).collect();
        // -hda takes its file as it is; only -drive has commas to double.
        assert_eq!(
            sources,
            [&file("disk.img"), &file("second,,half.img"), &file("debian.iso"), &file("tail.img")]
        );
        assert!(found.disks[2].cdrom && found.disks[2].read_only);
        assert_eq!(found.disks[0].format, None);
    }

    #[test]
    fn relative_paths_are_the_process_own() {
        let mut found =
            parse("qemu-system-x86_64 -hda d/disk.img -cdrom /iso -qmp unix:qmp,server=on,wait=off");
        found.make_absolute(Some(Path::new("/home/u")));
        assert_eq!(found.qmp, [PathBuf::from("/home/u/qmp")]);
        assert_eq!(found.disks[0].source, file("/home/u/d/disk.img"));
        assert_eq!(found.disks[1].source, file("/iso"));
    }

    #[test]
    fn drives_in_all_their_forms() {
        let found = parse(
            r#"qemu-system-x86_64 -drive file=/a,,b.qcow2,if=virtio,format=qcow2,readonly=on
             -drive if=pflash,format=raw,unit=0,file=/usr/share/OVMF/OVMF_CODE.fd
             -drive file=/v,if=pflash -drive file=nbd:unix:/run/nbd:exportname=x,if=virtio,format=raw
             -drive driver=qcow2,file.driver=file,file.filename=/c.qcow2,if=scsi
             -drive 'file=json:{"driver":"qcow2",,"file":{"driver":"file",,"filename":"/j.qcow2"}},if=ide'
             -drive file=file:/with:colon,format=raw -drive if=ide,media=cdrom -drive file=/unused,if=none,id=x"#,
        );
        let sources: Vec<_> = found.disks.iter().map(|disk| disk.source.clone()).collect();
        assert_eq!(
            sources,
            [
                file("/a,b.qcow2"),
                DiskSource::Protocol("nbd".into()),
                file("/c.qcow2"),
                file("/j.qcow2"),
                file("/with:colon"),
                DiskSource::Empty,
            ]
        );
        assert!(found.disks[0].read_only);
        assert!(found.disks[5].cdrom);
        assert_eq!(found.disks[2].format.as_deref(), Some("qcow2"));
    }

    #[test]
    fn monitors_in_all_their_forms() {
        let found = parse(
            "qemu-system-x86_64 -qmp-pretty unix:/p,server=on -qmp tcp:localhost:4444,server=on -qmp chardev:late
             -qmp stdio -qmp unix:/client -mon chardev=late,mode=readline -mon late,mode=control
             -chardev socket,id=abs,path=name,abstract=on,server=on -mon abs,mode=control
             -chardev socket,id=late,path=/late,server=on",
        );
        assert_eq!(found.qmp, ["/p", "/late", "/late"].map(PathBuf::from));
    }

    #[test]
    fn a_loop_of_nodes_ends() {
        let found = parse(
            "qemu-system-x86_64 -blockdev raw,node-name=a,file=b -blockdev throttle,node-name=b,file=a
             -blockdev throttle,node-name=c,file=c -device virtio-blk,drive=a -device virtio-blk,drive=c",
        );
        assert!(found.disks.iter().all(|disk| disk.source == DiskSource::Protocol("unknown".into())));
        assert_eq!(found.disks.len(), 2);
    }

    #[test]
    fn a_hostile_command_line_costs_little() {
        let mut words = Vec::new();
        for n in 0..40_000 {
            words.extend([
                "-device".into(),
                format!("v,drive=d{n}"),
                "-drive".into(),
                format!("id=d{n},if=none"),
            ]);
        }
        let words: Vec<Vec<u8>> = words.into_iter().map(String::into_bytes).collect();
        assert_eq!(CommandLine::parse(&words).disks.len(), MAX_ITEMS);
    }

    proptest! {
        #[test]
        fn no_command_line_makes_it_panic(words in proptest::collection::vec(word(), 0..24)) {
            let mut found = CommandLine::parse(&words);
            found.make_absolute(Some(Path::new("/")));
        }
    }

    /// Options and their pieces in any order, with bytes of any kind between.
    fn word() -> impl Strategy<Value = Vec<u8>> {
        const OPTIONS: &[&str] =
            &["-name", "-qmp", "-mon", "-chardev", "-device", "-blockdev", "-drive", "-hda", "-S", "--", "-"];
        const PIECES: &[&str] = &[
            "a",
            ",",
            ",,",
            "=",
            "{",
            "}",
            "\"file\":",
            "file.",
            "file=",
            "driver=",
            "node-name=",
            "json:",
            "path=",
            "server",
            "chardev:",
            "unix:",
            "drive=",
            "id=",
            "no",
            ":",
            "é",
            "masterKey0",
        ];
        let piece = prop_oneof![
            4 => proptest::sample::select(PIECES).prop_map(|piece| piece.as_bytes().to_vec()),
            1 => proptest::collection::vec(any::<u8>(), 0..4),
        ];
        prop_oneof![
            proptest::sample::select(OPTIONS).prop_map(|option| option.as_bytes().to_vec()),
            proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat()),
        ]
    }
}
