//! A whole host as a throwaway VM: Debian's own kernel with every module, over this host's root file system.
//!
//! What this host's kernel may lack (device-mapper, partitions of a disk, 802.1Q) is there, and what a test does to
//! disks and interfaces there stays there. The files of this host are seen at their own paths, read-only below a
//! tmpfs; so the built programs are where they are here.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::place::{Place, Slot};
use super::process::Process;
use super::{Accel, Lab, Qemu, assets};

/// How long a run may take unless the test says otherwise.
const LIMIT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(20);
/// Where the file server may be; it is in nobody's PATH.
const VIRTIOFSD: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];
/// Set for what runs inside.
pub const INSIDE: &str = "SNAPCTL_LAB_HOST_VM";

/// LVM without udevd: its nodes are made by LVM itself.
const LVM_CONF: &str = "activation { udev_sync=0 udev_rules=0 monitoring=0 }\n\
    devices { obtain_device_list_from_udev=0 use_devicesfile=0 }\nbackup { backup=0 archive=0 }\n";

/// What to boot.
#[derive(Clone, Debug)]
pub struct HostVm {
    disks: Vec<PathBuf>,
    empty: Vec<u64>,
    modules: Vec<String>,
    memory: u32,
    limit: Duration,
}

/// What ran inside.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Its exit code.
    pub code: i32,
    /// Its standard output and error.
    pub output: String,
}

impl Default for HostVm {
    fn default() -> Self {
        Self { disks: Vec::new(), empty: Vec::new(), modules: Vec::new(), memory: 1024, limit: LIMIT }
    }
}

impl HostVm {
    /// With one more disk, empty, of so many MiB: `/dev/vda`, `/dev/vdb`, … behind those that are files.
    pub fn disk(mut self, mib: u64) -> Self {
        self.empty.push(mib << 20);
        self
    }

    /// With one more disk that is this file, and outlives the VM.
    pub fn disk_file(mut self, file: &Path) -> Self {
        self.disks.push(file.to_owned());
        self
    }

    /// With these kernel modules loaded.
    pub fn modules(mut self, names: &[&str]) -> Self {
        self.modules.extend(names.iter().map(|name| (*name).to_owned()));
        self
    }

    /// With so much memory, in MiB.
    pub fn memory(mut self, mib: u32) -> Self {
        self.memory = mib;
        self
    }

    /// Boots, runs `command` as root with its output on one stream, and ends.
    ///
    /// # Errors
    /// When the lab is missing, the VM does not come up, or the command does not end in time.
    pub async fn run(&self, command: &[&str]) -> Result<Ran> {
        if !rustix::process::geteuid().is_root() {
            bail!("the host VM shows this host's files, and only root may see them all");
        }
        let lab = Lab::get()?;
        let place = Place::new(&lab.run_dir())?;
        let _slot = Slot::take(&lab.run_dir()).await?;
        let parts = assets::host_parts(lab.cache())?;
        let dir = place.dir();
        fs::write(dir.join("script.sh"), self.script(command)?)?;
        let _server = serve_files(dir)?;
        let mut qemu = Process::spawn(&self.qemu(&lab, &parts, dir)?, &dir.join("qemu.log"))?;
        let until = Instant::now() + self.limit;
        while !qemu.has_ended() && Instant::now() < until {
            tokio::time::sleep(POLL).await;
        }
        let text = |name: &str| {
            let bytes = fs::read(dir.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let output = text("out");
        match text("code").trim().parse() {
            Ok(code) => Ok(Ran { code, output }),
            Err(_) => bail!(
                "the host VM gave no result in {} s:\n{output}\nconsole: {}\nqemu: {}",
                self.limit.as_secs(),
                text("console"),
                text("qemu.log")
            ),
        }
    }

    /// What the VM's shell does: find its ports, set the stage, run the command, tell its code.
    fn script(&self, command: &[&str]) -> Result<String> {
        let mut script = String::new();
        let path = std::env::var("PATH").unwrap_or_default();
        writeln!(
            script,
            "export PATH={}:/usr/sbin:/sbin HOME=/root LC_ALL=C.UTF-8 {INSIDE}=1",
            quoted(&path)
        )?;
        script += "for i in /sys/class/virtio-ports/*; do read -r n <$i/name\n";
        script += "case $n in lab.out) out=/dev/${i##*/};; lab.code) code=/dev/${i##*/};; esac; done\n";
        script += "exec >$out 2>&1 </dev/null; umask 022; ip link set lo up; hostname lab\n";
        // One descriptor of the file server's for each inode that is known: they must not become too many.
        script += "(while sleep 1; do read -r n _ </proc/sys/fs/inode-nr; [ $n -gt 12000 ] && \
                   echo 2 >/proc/sys/vm/drop_caches; done) >/dev/null 2>&1 &\n";
        if !self.modules.is_empty() {
            writeln!(script, "modprobe -a {}", self.modules.join(" "))?;
        }
        writeln!(
            script,
            "mkdir -p /run/lvm-config; printf %s {} >/run/lvm-config/lvm.conf",
            quoted(LVM_CONF)
        )?;
        script += "export LVM_SYSTEM_DIR=/run/lvm-config\n";
        writeln!(script, "cd {}", quoted(&std::env::current_dir()?.display().to_string()))?;
        let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
        writeln!(script, "{}\necho $? >$code; sync", words.join(" "))?;
        script += "echo 1 >/proc/sys/kernel/sysrq; echo o >/proc/sysrq-trigger; sleep 60\n";
        Ok(script)
    }

    fn qemu(&self, lab: &Lab, parts: &assets::HostParts, dir: &Path) -> Result<Command> {
        let program = lab.qemu(Qemu::Distro)?;
        let mut qemu = Command::new(&program.path);
        qemu.args(["-M", "pc,usb=off", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        match lab.accel()? {
            Accel::Kvm => qemu.args(["-accel", "kvm", "-cpu", "host"]),
            Accel::Tcg => qemu.args([
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+rdrand",
            ]),
        };
        let memory = self.memory;
        qemu.args(["-smp", "2", "-m", &memory.to_string(), "-numa", "node,memdev=ram"]);
        qemu.args(["-object", &format!("memory-backend-memfd,id=ram,size={memory}M,share=on")]);
        qemu.arg("-kernel").arg(&parts.kernel).arg("-initrd").arg(&parts.initrd);
        let (modules, script) = (parts.modules.display(), dir.join("script.sh"));
        qemu.arg("-append").arg(format!(
            "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check nowatchdog \
             audit=0 apparmor=0 random.trust_cpu=on net.ifnames=0 cryptomgr.notests raid=noautodetect \
             lab.modules={modules} lab.script={}",
            script.display()
        ));
        let file = |name: &str| dir.join(name).display().to_string();
        qemu.args(["-serial", &format!("file:{}", file("console")), "-device", "virtio-serial-pci"]);
        for name in ["out", "code"] {
            qemu.args(["-chardev", &format!("file,id={name},path={}", file(name))]);
            qemu.args(["-device", &format!("virtserialport,chardev={name},name=lab.{name}")]);
        }
        qemu.args(["-chardev", &format!("socket,id=files,path={}", file("files"))]);
        qemu.args(["-device", "vhost-user-fs-pci,chardev=files,tag=host,queue-size=1024"]);
        for (index, disk) in self.disk_files(dir)?.iter().enumerate() {
            let drive =
                format!("if=none,id=d{index},format=raw,cache=unsafe,discard=unmap,file={}", disk.display());
            qemu.args([
                "-drive",
                &drive,
                "-device",
                &format!("virtio-blk-pci,drive=d{index},serial=lab{index}"),
            ]);
        }
        Ok(qemu)
    }

    fn disk_files(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let mut files = self.disks.clone();
        for (index, size) in self.empty.iter().enumerate() {
            let path = dir.join(format!("disk{index}"));
            File::create(&path)?.set_len(*size)?;
            files.push(path);
        }
        Ok(files)
    }
}

/// Runs the test `name` of this test binary inside; for that test itself, which finds out by [`is_inside`] where it is.
///
/// # Errors
/// When it fails there, with what it printed.
pub async fn run_test(vm: &HostVm, name: &str) -> Result<()> {
    let own = std::env::current_exe()?;
    let own = own.to_str().context("the test's path")?;
    let ran = vm.run(&[own, "--exact", name, "--nocapture"]).await?;
    // A name that is no test's would succeed, and test nothing.
    if ran.code != 0 || !ran.output.contains("1 passed") {
        bail!("{name} failed in the host VM (exit code {}):\n{}", ran.code, ran.output);
    }
    Ok(())
}

/// Whether this process runs inside the VM.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Serves the host's files to the VM as long as it lives.
fn serve_files(dir: &Path) -> Result<Process> {
    let found = VIRTIOFSD.iter().find(|path| Path::new(path).exists());
    let program = found.context("virtiofsd is not installed (package qemu-system-common, or virtiofsd)")?;
    let socket = dir.join("files");
    let mut command = Command::new(program);
    command.arg(format!("--socket-path={}", socket.display()));
    command.args(["-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot", "--thread-pool-size=2"]);
    let mut server = Process::spawn(&command, &dir.join("files.log"))?;
    let until = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        if server.has_ended() || Instant::now() > until {
            bail!("virtiofsd does not serve: {}", fs::read_to_string(dir.join("files.log"))?);
        }
        std::thread::sleep(POLL);
    }
    Ok(server)
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_shell_as_they_are() {
        let vm = HostVm::default().modules(&["dm-thin-pool"]);
        let script = vm.script(&["echo", "it's $HOME"]).unwrap();
        assert!(script.contains("'echo' 'it'\\''s $HOME'\necho $? >$code"), "{script}");
        assert!(script.contains("modprobe -a dm-thin-pool"));
    }
}
