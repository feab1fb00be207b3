//! A guest: what it is asked to be, how it is booted, and what a test can ask of it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;
use serde_json::json;
use tokio::sync::Mutex;

use super::control::{Control, agent_answers};
use super::disk::{Disk, DiskSpec, Format};
use super::netns::Netns;
use super::place::{Place, Slot, mount_xfs};
use super::process::Process;
use super::qmp::RawQmp;
use super::{Accel, Lab, Qemu, QemuProgram};

/// A boot takes 3 to 6 s here; a machine that is busy building takes several times that.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// What the guest's program answers at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How often a socket that QEMU has yet to make is looked for.
const SOCKET_POLL: Duration = Duration::from_millis(5);
/// Free `pcie-root-port`s for hotplug.
const ROOT_PORTS: u32 = 4;
const MEMORY_MIB: u32 = 256;

/// What a guest is to be.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    disks: Vec<DiskSpec>,
    qemu: Qemu,
    writer: Option<u32>,
    agent: bool,
    cdrom: bool,
    memory_mib: u32,
    root_ports: u32,
    args: Vec<String>,
    beside: Option<Slot>,
    held: bool,
    xfs: Option<u64>,
    netns: Option<String>,
    device: Option<PathBuf>,
}

impl Default for GuestSpec {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestSpec {
    /// A guest without disks, on the distribution's QEMU, with the agent.
    pub fn new() -> Self {
        Self {
            disks: Vec::new(),
            qemu: Qemu::Distro,
            writer: None,
            agent: true,
            cdrom: false,
            memory_mib: MEMORY_MIB,
            root_ports: ROOT_PORTS,
            args: Vec::new(),
            beside: None,
            held: false,
            xfs: None,
            netns: None,
            device: None,
        }
    }

    /// With its QEMU in a network namespace, and a NIC of this address on the tap that is there. The guest asks for an
    /// address when it boots.
    pub fn plugged(self, netns: &Netns, tap: &str, mac: &str) -> Self {
        self.nic(netns, &format!("tap,id=net0,ifname={tap},script=no,downscript=no"), mac)
    }

    /// The same on the device of a macvtap, which QEMU is handed as descriptor 3.
    pub fn plugged_device(self, netns: &Netns, device: &Path, mac: &str) -> Self {
        let spec = Self { device: Some(device.to_owned()), ..self };
        spec.nic(netns, "tap,id=net0,fd=3", mac)
    }

    fn nic(self, netns: &Netns, netdev: &str, mac: &str) -> Self {
        let device = format!("virtio-net-pci,id=nic0,netdev=net0,mac={mac}");
        let spec = Self { netns: Some(netns.name().to_owned()), ..self };
        spec.args(["-netdev", netdev, "-device", &device])
    }

    /// With its disks on an XFS of their own, of so many MiB, where files can share extents.
    pub fn on_xfs(self, mib: u64) -> Self {
        Self { xfs: Some(mib), ..self }
    }

    /// With one more disk.
    pub fn disk(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk);
        self
    }

    /// With these disks after the others.
    pub fn disks(mut self, disks: impl IntoIterator<Item = DiskSpec>) -> Self {
        self.disks.extend(disks);
        self
    }

    /// On this QEMU.
    pub fn qemu(self, qemu: Qemu) -> Self {
        Self { qemu, ..self }
    }

    /// With the writers running when [`boot`](Self::boot) returns: `per_second` records on each disk, 0 for no limit.
    pub fn writer(self, per_second: u32) -> Self {
        Self { writer: Some(per_second), ..self }
    }

    /// Without a guest agent inside; its port and socket are there.
    pub fn without_agent(self) -> Self {
        Self { agent: false, ..self }
    }

    /// With an empty CD-ROM drive, qdev id `cd0`.
    pub fn cdrom(self) -> Self {
        Self { cdrom: true, ..self }
    }

    /// With this much memory.
    pub fn memory_mib(self, memory_mib: u32) -> Self {
        Self { memory_mib, ..self }
    }

    /// With this many free `pcie-root-port`s, qdev ids `rp0` and on.
    pub fn root_ports(self, root_ports: u32) -> Self {
        Self { root_ports, ..self }
    }

    /// With more QEMU arguments at the end.
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// As a second guest of the same test: it shares the other's place among the running guests.
    pub fn beside(self, other: &Guest) -> Self {
        Self { beside: Some(other.slot.clone()), ..self }
    }

    /// Boots the guest and waits until its program, its agent and its writers run.
    ///
    /// # Errors
    /// When the lab cannot be made, or the guest does not come up; the message ends with what its
    /// console and QEMU said.
    pub async fn boot(self) -> Result<Guest> {
        let lab = Lab::get()?;
        let slot = match &self.beside {
            Some(slot) => slot.clone(),
            None => Slot::take(&lab.run_dir()).await?,
        };
        let place = Place::new(&lab.run_dir())?;
        let images = place.dir().join("disks");
        fs::create_dir(&images)?;
        if let Some(mib) = self.xfs {
            mount_xfs(&images, mib)?;
        }
        let disks = self.disks.iter().map(|spec| Disk::make(spec.clone(), &images));
        let disks = disks.collect::<Result<Vec<Disk>>>()?;
        Guest::start(lab, self, place, slot, disks).await
    }

    fn command(&self, lab: &Lab, dir: &Path, disks: &[Disk]) -> Result<Command> {
        let qemu = lab.qemu(self.qemu)?;
        let mut command = match &self.netns {
            Some(netns) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", netns]);
                if let Some(device) = &self.device {
                    command.args(["sh", "-c", "exec 3<>\"$0\"; exec \"$@\""]).arg(device);
                }
                command.arg(&qemu.path);
                command
            }
            None => Command::new(&qemu.path),
        };
        if let Some(modules) = &qemu.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
        for firmware in &qemu.firmware {
            command.arg("-L").arg(firmware);
        }
        let (accel, cpu) = match lab.accel()? {
            Accel::Tcg => {
                ("tcg,thread=multi,tb-size=128", "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+rdrand")
            }
            Accel::Kvm => ("kvm", "host"),
        };
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-accel", accel, "-cpu", cpu, "-M", "q35,usb=off", "-smp", "1"]);
        if has_qboot(&qemu) {
            // The kernel is given, so no device need be booted from; SeaBIOS would ask 256 SCSI targets all the
            // same, which takes 32 s on QEMU 10.
            command.args(["-bios", QBOOT]);
        }
        command.args(["-m", &self.memory_mib.to_string(), "-name", "lab"]);
        command.arg("-kernel").arg(lab.kernel()).arg("-initrd").arg(lab.initrd());
        command.args(["-append", &self.kernel_words(disks)]);
        for arg in
            self.port_args(dir).iter().chain(disks.iter().flat_map(Disk::args).collect::<Vec<_>>().iter())
        {
            command.arg(arg);
        }
        command.args(&self.args);
        Ok(command)
    }

    fn kernel_words(&self, disks: &[Disk]) -> String {
        let mounts: Vec<&str> = disks.iter().filter(|d| d.spec.mounted()).map(Disk::id).collect();
        let mut words = KERNEL_WORDS.to_owned();
        // Writing to a String does not fail.
        let _ = write!(words, " lab.agent={} lab.mount={}", u8::from(self.agent), mounts.join(","));
        words
    }

    fn port_args(&self, dir: &Path) -> Vec<String> {
        let path = |name: &str| dir.join(name).display().to_string();
        let socket = |id: &str, name: &str| format!("socket,id={id},path={},server=on,wait=off", path(name));
        let mut args: Vec<String> = Vec::new();
        let mut add = |option: &str, value: String| args.extend([option.to_owned(), value]);
        add("-serial", format!("file:{}", path("console")));
        for (id, name) in [("qmp0", "qmp"), ("qmp1", "qmp-lab")] {
            add("-chardev", socket(id, name));
            add("-mon", format!("chardev={id},mode=control"));
        }
        add("-device", "virtio-serial-pci,id=ports".to_owned());
        add("-chardev", socket("qga0", "qga"));
        add("-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0,id=agent".to_owned());
        add("-chardev", socket("labc", "control"));
        add("-device", "virtserialport,chardev=labc,name=lab.control".to_owned());
        add("-chardev", format!("file,id=labp,path={}", path("progress")));
        add("-device", "virtserialport,chardev=labp,name=lab.progress".to_owned());
        for n in 0..self.root_ports {
            add("-device", format!("pcie-root-port,id=rp{n},chassis={},slot={}", n + 1, n + 1));
        }
        if self.cdrom {
            add("-device", "ide-cd,id=cd0,bus=ide.0".to_owned());
        }
        args
    }
}

/// A firmware that does nothing but hand over to the kernel.
const QBOOT: &str = "qboot.rom";

/// Not every distribution ships it beside QEMU; SeaBIOS does the same, later.
fn has_qboot(qemu: &QemuProgram) -> bool {
    let usual = PathBuf::from("/usr/share/qemu");
    qemu.firmware.iter().chain([&usual]).any(|dir| dir.join(QBOOT).exists())
}

/// Quiet, without what only costs time in a guest that lives for seconds; a panic ends QEMU.
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable \
     no_timer_check nowatchdog audit=0 apparmor=0 random.trust_cpu=on net.ifnames=0 cryptomgr.notests \
     raid=noautodetect";

/// What the writers have synced: the disk's id and its highest sequence number.
pub type Progress = BTreeMap<String, u64>;

/// The longest time that one write stood still inside the guest, since it was last asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stalls {
    /// Of the writers: one append and its fdatasync.
    pub write: Duration,
    /// How many of these there were.
    pub writes: u64,
    /// Of the dirtier: one write of 64 KiB into the page cache.
    pub dirty: Duration,
    /// How many of these there were.
    pub dirties: u64,
}

/// A running guest; dropping it kills QEMU and removes its directory.
#[derive(Debug)]
pub struct Guest {
    // Dropped in this order: the process, then what it used.
    process: Process,
    control: Mutex<Option<Control>>,
    spec: GuestSpec,
    disks: Vec<Disk>,
    boot_time: Duration,
    lab: Lab,
    place: Place,
    slot: Slot,
}

impl Guest {
    /// Begins the description of a guest.
    pub fn spec() -> GuestSpec {
        GuestSpec::new()
    }

    async fn start(lab: Lab, spec: GuestSpec, place: Place, slot: Slot, disks: Vec<Disk>) -> Result<Self> {
        let since = Instant::now();
        for name in ["qmp", "qmp-lab", "qga", "control", "progress", "console"] {
            // Left by an earlier QEMU in the same directory, or not there.
            let _ = fs::remove_file(place.dir().join(name));
        }
        let command = spec.command(&lab, place.dir(), &disks)?;
        let process = Process::spawn(&command, &place.dir().join("qemu.log"))?;
        let control = Mutex::new(None);
        let boot_time = Duration::ZERO;
        let mut guest = Self { process, control, spec, disks, boot_time, lab, place, slot };
        let up = tokio::time::timeout(BOOT_LIMIT, guest.come_up()).await;
        up.unwrap_or_else(|_| Err(anyhow!("no sign of life within {BOOT_LIMIT:?}")))
            .with_context(|| guest.last_words())?;
        guest.boot_time = since.elapsed();
        if let Some(per_second) = guest.spec.writer {
            guest.start_writer(per_second).await?;
        }
        Ok(guest)
    }

    async fn come_up(&self) -> Result<()> {
        let up = async {
            let socket = self.path("control");
            // QEMU binds the socket's name a moment before it listens.
            let connected = loop {
                match Control::connect(&socket).await {
                    Ok(connected) => break connected,
                    Err(_) => tokio::time::sleep(SOCKET_POLL).await,
                }
            };
            *self.control.lock().await = Some(connected);
            if self.spec.held {
                self.let_go().await?;
            }
            self.control("ping").await?;
            if self.spec.agent { self.wait_agent().await } else { Ok(()) }
        };
        tokio::select! {
            result = up => result,
            ended = self.process.ended() => { ended?; bail!("QEMU ended") }
        }
    }

    /// Memory that was saved while a guest was held is that of a guest that is held.
    async fn let_go(&self) -> Result<()> {
        let mut qmp = self.lab_qmp().await?;
        while qmp.call("query-status", json!({})).await?["status"] == "inmigrate" {
            tokio::time::sleep(SOCKET_POLL).await;
        }
        qmp.call("cont", json!({})).await.map(drop)
    }

    /// The guest's own directory; its images are in `disks`.
    pub fn dir(&self) -> &Path {
        self.place.dir()
    }

    /// The QMP socket for snapctl.
    pub fn qmp(&self) -> PathBuf {
        self.path("qmp")
    }

    /// A second QMP socket, for the test.
    pub fn qmp_lab(&self) -> PathBuf {
        self.path("qmp-lab")
    }

    /// The guest agent's socket.
    pub fn agent(&self) -> PathBuf {
        self.path("qga")
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The disks, in the order of the spec.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The disks that the guest has mounted, in the order that records count them in.
    pub fn mounted(&self) -> impl Iterator<Item = &Disk> {
        self.disks.iter().filter(|disk| disk.spec.mounted())
    }

    /// The time from starting QEMU to the agent's answer.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// What the guest's kernel and init have printed.
    pub fn console(&self) -> String {
        fs::read(self.path("console"))
            .map_or_else(|_| String::new(), |b| String::from_utf8_lossy(&b).into_owned())
    }

    /// Connects to the second QMP socket.
    ///
    /// # Errors
    /// Those of [`RawQmp::connect`].
    pub async fn lab_qmp(&self) -> Result<RawQmp> {
        RawQmp::connect(&self.qmp_lab()).await
    }

    /// Waits until the guest agent answers; holds its socket meanwhile.
    ///
    /// # Errors
    /// When it does not within the time that a boot may take.
    pub async fn wait_agent(&self) -> Result<()> {
        let socket = self.agent();
        let answers = tokio::time::timeout(BOOT_LIMIT, agent_answers(&socket)).await;
        answers.context("the guest agent does not answer")?
    }

    /// Sends one command to the guest's program and returns its answer: see `src/bin/lab-guest.rs`.
    ///
    /// # Errors
    /// When the guest refuses, or does not answer within a minute.
    pub async fn control(&self, command: &str) -> Result<String> {
        let mut control = self.control.lock().await;
        let patience = if self.boot_time.is_zero() { BOOT_LIMIT } else { ANSWER_LIMIT };
        control.as_mut().context("not connected")?.call(command, patience).await
    }

    /// Runs a shell command in the guest and returns its exit status and its output, both streams.
    ///
    /// # Errors
    /// Those of [`Guest::control`].
    pub async fn shell(&self, command: &str) -> Result<(i32, String)> {
        let answer = self.control(&format!("exec {command}")).await?;
        let (status, text) = answer.split_once(' ').context("no exit status")?;
        Ok((status.parse()?, text.to_owned()))
    }

    /// Starts the writers: `per_second` records on each disk, 0 for as many as it can.
    ///
    /// # Errors
    /// Those of [`Guest::control`].
    pub async fn start_writer(&self, per_second: u32) -> Result<()> {
        self.control(&format!("start {per_second}")).await.map(drop)
    }

    /// Stops the writers and the dirtier; returns when the last write is done.
    ///
    /// # Errors
    /// When a writer failed (a full disk); those of [`Guest::control`].
    pub async fn stop_writer(&self) -> Result<()> {
        self.control("stop").await.map(drop)
    }

    /// Dirties `mib` of page cache on a disk again and again at `mib_per_second`, without a sync.
    ///
    /// # Errors
    /// When the disk is not mounted; those of [`Guest::control`].
    pub async fn dirty(&self, disk: &str, mib: u32, mib_per_second: u32) -> Result<()> {
        self.control(&format!("dirty {disk} {mib} {mib_per_second}")).await.map(drop)
    }

    /// Asks for the longest stalls since the last time, and starts to count anew.
    ///
    /// # Errors
    /// Those of [`Guest::control`].
    pub async fn stalls(&self) -> Result<Stalls> {
        let answer = self.control("stalls").await?;
        let number = |key: &str| -> Result<u64> {
            let mut words = answer.split(' ').filter_map(|word| word.split_once('='));
            Ok(words.find(|(name, _)| *name == key).context("stalls")?.1.parse()?)
        };
        Ok(Stalls {
            write: Duration::from_micros(number("write_us")?),
            writes: number("writes")?,
            dirty: Duration::from_micros(number("dirty_us")?),
            dirties: number("dirties")?,
        })
    }

    /// What the writers have synced and QEMU has told, up to now.
    ///
    /// Whatever this returns was durable in the guest before the call.
    ///
    /// # Errors
    /// When the progress file cannot be read.
    pub fn progress(&self) -> Result<Progress> {
        let text = fs::read_to_string(self.path("progress"))?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut progress: Progress = self.mounted().map(|disk| (disk.id().to_owned(), 0)).collect();
        for line in whole.lines() {
            let mut words = line.split(' ');
            let (disk, seq) = (words.next().context("progress")?, words.next().context("progress")?);
            progress.insert(disk.to_owned(), seq.parse()?);
        }
        Ok(progress)
    }

    /// Waits until every disk's writer has synced `more` records more than now.
    ///
    /// # Errors
    /// When a writer failed; those of [`Guest::control`].
    pub async fn wait_records(&self, more: u64) -> Result<Progress> {
        let highest = self.progress()?.into_values().max().unwrap_or(0);
        self.control(&format!("wait {}", highest + more)).await?;
        self.progress()
    }

    /// Kills QEMU, as a power failure would end the guest; the directory stays until the drop.
    ///
    /// # Errors
    /// When its end cannot be awaited.
    pub async fn kill(&mut self) -> Result<()> {
        self.process.signal(Signal::KILL);
        self.wait_end().await
    }

    /// Asks QEMU to quit in order, as SIGTERM does: images are flushed and closed.
    ///
    /// # Errors
    /// When it does not end within a minute.
    pub async fn quit(&mut self) -> Result<()> {
        self.process.signal(Signal::TERM);
        self.wait_end().await
    }

    /// Waits until QEMU has ended, which something else has brought about.
    ///
    /// # Errors
    /// When it does not within a minute.
    pub async fn wait_end(&mut self) -> Result<()> {
        let ended = tokio::time::timeout(ANSWER_LIMIT, self.process.ended()).await;
        ended.context("QEMU does not end")??;
        self.process.has_ended();
        *self.control.get_mut() = None;
        Ok(())
    }

    /// Waits until QEMU ends, however long that takes.
    ///
    /// # Errors
    /// When its end cannot be awaited.
    pub async fn wait_exit(&mut self) -> Result<()> {
        self.process.ended().await
    }

    /// Whether QEMU runs.
    pub fn is_running(&mut self) -> bool {
        !self.process.has_ended()
    }

    /// Boots a new QEMU in the same directory, on the same socket paths, after killing this one.
    ///
    /// `image` says for each disk which image it starts on, and its format: the old one, or a layer of it.
    ///
    /// # Errors
    /// Those of [`GuestSpec::boot`].
    pub async fn boot_again(mut self, image: impl Fn(&Disk) -> (PathBuf, Format)) -> Result<Self> {
        self.kill().await?;
        let Self { spec, mut disks, lab, place, slot, process, .. } = self;
        drop(process);
        for disk in &mut disks {
            (disk.path, disk.spec.format) = image(disk);
        }
        Self::start(lab, spec, place, slot, disks).await
    }

    /// As [`Guest::boot_again`], for a guest that goes on from saved memory: `args` tell QEMU where that is. Its writers
    /// are in there.
    ///
    /// # Errors
    /// Those of [`GuestSpec::boot`].
    pub async fn go_on_from<S: Into<String>>(
        mut self,
        args: impl IntoIterator<Item = S>,
        image: impl Fn(&Disk) -> (PathBuf, Format),
    ) -> Result<Self> {
        self.spec = self.spec.args(args);
        (self.spec.writer, self.spec.held) = (None, true);
        self.boot_again(image).await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.dir().join(name)
    }

    fn last_words(&self) -> String {
        let tail = |text: &str| {
            text.lines()
                .rev()
                .take(20)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .fold(String::new(), |all, line| all + "\n  " + line)
        };
        let log = fs::read_to_string(self.path("qemu.log")).unwrap_or_default();
        format!("the guest did not come up; console:{}\nqemu:{}", tail(&self.console()), tail(&log))
    }
}
