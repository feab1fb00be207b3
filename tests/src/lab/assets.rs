//! What all guests share, made once: the kernel, the initramfs, the two QEMUs.
//!
//! Each asset is a directory or file in the cache whose name holds the version of its recipe or a
//! hash of its inputs. It is made under a file lock, under a temporary name, and renamed when whole.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use super::apt::{Apt, os_release};
use super::cpio::Cpio;
use super::record::fnv1a;
use super::run::{outcome, output, program};

/// Raise when what is unpacked changes, so that old caches are made anew.
const RECIPE: u32 = 2;
/// Loaded in this order, each behind what it depends on.
const MODULES: [&str; 6] =
    ["virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "virtio_scsi", "sd_mod"];
const INIT: &str = include_str!("init.sh");
/// What the host VM loads before it sees any other file.
const HOST_MODULES: [&str; 5] = ["virtio_pci", "virtio_console", "virtio_blk", "overlay", "virtiofs"];
const HOST_INIT: &str = include_str!("host-init.sh");
/// The first QEMU of the line that the backports suite brings.
const NEW_QEMU_MAJOR: u32 = 10;

/// Which QEMU runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Qemu {
    /// The distribution's own, `qemu-system-x86_64` in PATH.
    Distro,
    /// 10.0 or newer: from the backports suite, or the distribution's own where that is new enough.
    Backports,
}

impl Qemu {
    /// Both, for tests that loop.
    pub const ALL: [Self; 2] = [Self::Distro, Self::Backports];
}

/// How to start one QEMU.
#[derive(Debug, Clone)]
pub struct QemuProgram {
    /// The binary.
    pub path: PathBuf,
    /// What `--version` says, such as `7.2.22`.
    pub version: String,
    /// Directory of loadable modules, for `QEMU_MODULE_DIR`.
    pub modules: Option<PathBuf>,
    /// Directories of firmware, each for an `-L`.
    pub firmware: Vec<PathBuf>,
}

/// The cached parts of a guest.
#[derive(Debug, Clone)]
pub(super) struct Assets {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
}

/// Makes what is missing of the guest's parts; `guest_program` is the built `lab-guest`.
pub(super) fn guest_parts(cache: &Path, guest_program: &Path) -> Result<Assets> {
    let kernel = once(cache, &format!("kernel-{RECIPE}"), unpack_kernel)?;
    let agent = guest_binary(cache, "qemu-ga", "qemu-guest-agent")?;
    let busybox = guest_binary(cache, "busybox", "busybox-static")?;
    let parts = [&agent, &busybox, &guest_program.to_owned()];
    let key = key_of(&parts, &kernel)?;
    let initrd = once(cache, &format!("initrd-{key:016x}"), |path| {
        forget_old(cache, "initrd-");
        fs::write(path, initramfs(&kernel, &agent, &busybox, guest_program)?)?;
        Ok(())
    })?;
    Ok(Assets { kernel: kernel.join("vmlinuz"), initrd })
}

/// The cached parts of the host VM.
#[derive(Debug, Clone)]
pub(super) struct HostParts {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    /// All modules of the kernel, in a directory of its version.
    pub(super) modules: PathBuf,
}

/// Makes what is missing of the host VM's parts.
pub(super) fn host_parts(cache: &Path) -> Result<HostParts> {
    let kernel = once(cache, &format!("kernel-{RECIPE}"), unpack_kernel)?;
    let busybox = guest_binary(cache, "busybox", "busybox-static")?;
    let key = fnv1a(format!("{HOST_INIT} {:016x}", key_of(&[&busybox], &kernel)?).as_bytes());
    let initrd = once(cache, &format!("host-initrd-{key:016x}"), |path| {
        forget_old(cache, "host-initrd-");
        let version = fs::read_to_string(kernel.join("version"))?;
        let modules = tempfile::tempdir_in(cache)?;
        collect_modules(&kernel, &version, &HOST_MODULES, modules.path())?;
        let mut cpio = initramfs_of(&[("/bin/busybox", &busybox)], modules.path())?;
        cpio.device("/dev/console", 5, 1);
        cpio.file("/init", HOST_INIT.as_bytes());
        fs::write(path, cpio.finish())?;
        Ok(())
    })?;
    Ok(HostParts { initrd, modules: kernel.join("lib/modules"), kernel: kernel.join("vmlinuz") })
}

/// Returns how to start `qemu`.
///
/// # Errors
/// When it is not installed, or when no package source has a new one.
pub(super) fn qemu_program(cache: &Path, qemu: Qemu) -> Result<QemuProgram> {
    let path = program("qemu-system-x86_64")?;
    let version = qemu_version(&path, None)?;
    let distro = QemuProgram { path, version, modules: None, firmware: Vec::new() };
    match qemu {
        Qemu::Distro => Ok(distro),
        Qemu::Backports if major(&distro.version) >= NEW_QEMU_MAJOR || distro_is_both() => Ok(distro),
        Qemu::Backports => backports(cache),
    }
}

/// Set by `cargo xtask test` after it has said that there is no newer QEMU to be had.
fn distro_is_both() -> bool {
    std::env::var_os("SNAPCTL_LAB_BACKPORTS").is_some_and(|value| value == "distro")
}

fn backports(cache: &Path) -> Result<QemuProgram> {
    let tree = once(cache, &format!("qemu-backports-{RECIPE}"), |tree| {
        let state = tempfile::tempdir_in(cache)?;
        let suite = format!("{}-backports", os_release("VERSION_CODENAME")?);
        let apt = Apt::private(state.path(), &["backports"])?;
        let packages =
            ["qemu-system-x86", "qemu-system-common", "qemu-system-data"].map(|p| format!("{p}/{suite}"));
        apt.unpack(&packages.each_ref().map(String::as_str), tree)?;
        let modules = module_dir(tree);
        let version = qemu_version(&tree.join("usr/bin/qemu-system-x86_64"), modules.as_deref())?;
        if major(&version) < NEW_QEMU_MAJOR {
            bail!("{suite} has QEMU {version}, which is older than {NEW_QEMU_MAJOR}");
        }
        Ok(())
    })?;
    let path = tree.join("usr/bin/qemu-system-x86_64");
    let modules = module_dir(&tree);
    let version = qemu_version(&path, modules.as_deref())?;
    let firmware = ["/usr/share/qemu", "/usr/share/seabios"].map(PathBuf::from);
    let firmware = firmware.into_iter().chain([tree.join("usr/share/qemu")]).collect();
    Ok(QemuProgram { path, version, modules, firmware })
}

fn module_dir(tree: &Path) -> Option<PathBuf> {
    let libraries = fs::read_dir(tree.join("usr/lib")).ok()?;
    libraries.filter_map(Result::ok).map(|entry| entry.path().join("qemu")).find(|dir| dir.is_dir())
}

fn qemu_version(path: &Path, modules: Option<&Path>) -> Result<String> {
    let mut command = Command::new(path);
    command.arg("--version");
    if let Some(modules) = modules {
        command.env("QEMU_MODULE_DIR", modules);
    }
    let text = output(&mut command)?;
    let version = text.split_whitespace().skip_while(|word| *word != "version").nth(1);
    version.map(str::to_owned).with_context(|| format!("{} --version says {text:?}", path.display()))
}

fn major(version: &str) -> u32 {
    version.split('.').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Returns `cache/name`, made by `make` at the path that it is given if it is not there yet.
fn once(cache: &Path, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let whole = cache.join(name);
    if whole.exists() {
        return Ok(whole);
    }
    let lock = File::create(cache.join("lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    if whole.exists() {
        return Ok(whole);
    }
    let part = cache.join(format!("{name}.part"));
    remove(&part)?;
    make(&part).with_context(|| format!("making {} for the lab", whole.display()))?;
    fs::rename(&part, &whole)?;
    Ok(whole)
}

fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path)?,
        Ok(_) => fs::remove_file(path)?,
        Err(_) => (),
    }
    Ok(())
}

/// Removes what an earlier build of the guest program left; a day is longer than any test runs.
fn forget_old(cache: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(cache) else { return };
    for entry in entries.filter_map(Result::ok) {
        let old = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age.as_secs() > 86_400));
        if old && entry.file_name().to_string_lossy().starts_with(prefix) {
            // Somebody else may clean at the same moment.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Fetches from the host's lists, and where these do not do, from fresh ones of our own.
fn fetch<T>(cache: &Path, fetch: impl Fn(&Apt) -> Result<T>) -> Result<T> {
    fetch(&Apt::host()).or_else(|first| {
        let state = tempfile::tempdir_in(cache)?;
        let apt = Apt::private(state.path(), &[])?;
        fetch(&apt).with_context(|| format!("after the host's own package lists failed: {first:#}"))
    })
}

fn unpack_kernel(into: &Path) -> Result<()> {
    let cache = into.parent().context("no parent")?;
    let tree = tempfile::tempdir_in(cache)?;
    let tree = tree.path().join("tree");
    fetch(cache, |apt| {
        let image = kernel_package(apt)?;
        let modules = apt.dependency(&image, "linux-modules-")?;
        let packages: Vec<&str> = [Some(image.as_str()), modules.as_deref()].into_iter().flatten().collect();
        apt.unpack(&packages, &tree)
    })?;
    let modules = ["usr/lib/modules", "lib/modules"].map(|dir| tree.join(dir));
    let modules = modules.iter().find(|dir| dir.is_dir()).context("the kernel package has no modules")?;
    let version = fs::read_dir(modules)?.next().context("the kernel package has no modules")??.file_name();
    let version = version.to_str().context("kernel version")?;
    fs::create_dir_all(into.join("lib"))?;
    fs::rename(modules, into.join("lib/modules"))?;
    fs::rename(tree.join(format!("boot/vmlinuz-{version}")), into.join("vmlinuz"))?;
    output(Command::new(program("depmod")?).arg("-b").arg(into).arg(version))?;
    collect_modules(into, version, &MODULES, &into.join("modules"))?;
    Ok(fs::write(into.join("version"), version)?)
}

/// The small kernel for virtual machines: Debian's, or Ubuntu's.
fn kernel_package(apt: &Apt) -> Result<String> {
    for meta in ["linux-image-cloud-amd64", "linux-image-virtual"] {
        if let Ok(Some(image)) = apt.dependency(meta, "linux-image-") {
            return Ok(image);
        }
    }
    bail!("no package linux-image-cloud-amd64 or linux-image-virtual is known here")
}

/// Copies modules with what they depend on, uncompressed, and the order in which they are loaded.
fn collect_modules(kernel: &Path, version: &str, names: &[&str], into: &Path) -> Result<()> {
    let mut order: Vec<String> = Vec::new();
    fs::create_dir_all(into)?;
    for module in names {
        let mut command = Command::new(program("modprobe")?);
        command.arg("-d").arg(kernel).args(["-S", version, "--show-depends", module]);
        // `builtin NAME` lines need nothing.
        for file in output(&mut command)?.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let file = Path::new(file.trim());
            let name = file.file_name().and_then(|name| name.to_str()).context("module name")?;
            let plain = name.split_once(".ko").map_or(name, |(stem, _)| stem).to_owned() + ".ko";
            if !order.contains(&plain) {
                fs::write(into.join(&plain), uncompressed(file)?)?;
                order.push(plain);
            }
        }
    }
    Ok(fs::write(into.join("order"), order.join("\n") + "\n")?)
}

fn uncompressed(file: &Path) -> Result<Vec<u8>> {
    let tool = match file.extension().and_then(|ext| ext.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(file).with_context(|| file.display().to_string()),
    };
    let out = Command::new(program(tool)?).arg("-dc").arg(file).output()?;
    if !out.status.success() {
        bail!("{tool} cannot unpack {}", file.display());
    }
    Ok(out.stdout)
}

/// Returns a program for the guest: the host's own, or one that is unpacked into the cache.
fn guest_binary(cache: &Path, name: &str, package: &str) -> Result<PathBuf> {
    if let Ok(path) = program(name) {
        return Ok(path);
    }
    let tree =
        once(cache, &format!("{package}-{RECIPE}"), |tree| fetch(cache, |apt| apt.unpack(&[package], tree)))?;
    let places = ["usr/sbin", "usr/bin", "bin", "sbin"].map(|dir| tree.join(dir).join(name));
    places.into_iter().find(|path| path.exists()).with_context(|| format!("{package} has no {name}"))
}

fn key_of(parts: &[&PathBuf], kernel: &Path) -> Result<u64> {
    let mut text = format!("{RECIPE} {INIT} {}", fs::read_to_string(kernel.join("version"))?);
    for part in parts {
        let meta = fs::metadata(part).with_context(|| part.display().to_string())?;
        text += &format!("\n{} {} {}.{}", part.display(), meta.len(), meta.mtime(), meta.mtime_nsec());
    }
    Ok(fnv1a(text.as_bytes()))
}

fn initramfs(kernel: &Path, agent: &Path, busybox: &Path, guest_program: &Path) -> Result<Vec<u8>> {
    let programs = [("/bin/busybox", busybox), ("/usr/sbin/qemu-ga", agent), ("/lab-guest", guest_program)];
    let mut cpio = initramfs_of(&programs, &kernel.join("modules"))?;
    cpio.device("/dev/console", 5, 1);
    cpio.device("/dev/null", 1, 3);
    cpio.file("/init", INIT.as_bytes());
    cpio.link("/bin/sh", "busybox");
    Ok(cpio.finish())
}

/// Programs with their libraries, and modules with their order.
fn initramfs_of(programs: &[(&str, &Path)], modules: &Path) -> Result<Cpio> {
    let mut cpio = Cpio::default();
    let mut libraries = BTreeSet::new();
    for (path, file) in programs {
        cpio.file(path, &fs::read(file).with_context(|| file.display().to_string())?);
        libraries.extend(closure(file)?);
    }
    for library in libraries {
        cpio.file(&library, &fs::read(&library).with_context(|| library.clone())?);
    }
    for entry in fs::read_dir(modules)? {
        let entry = entry?;
        cpio.file(&format!("/modules/{}", entry.file_name().to_string_lossy()), &fs::read(entry.path())?);
    }
    Ok(cpio)
}

/// Returns the shared libraries that `file` needs, the dynamic loader among them; none if it is static.
fn closure(file: &Path) -> Result<Vec<String>> {
    let (ok, text, _) = outcome(Command::new(program("ldd")?).arg(file).env("LC_ALL", "C"))?;
    if !ok {
        return Ok(Vec::new());
    }
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        bail!("{} needs a library that is not installed: {}", file.display(), line.trim());
    }
    let words = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(words.map(str::to_owned).collect())
}
