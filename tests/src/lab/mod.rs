//! Real guests for tests: a Debian kernel, busybox and the real guest agent, up in seconds without KVM.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use tests::lab::{DiskSpec, Guest, Qemu, fs_state};
//! let guest = Guest::spec().disk(DiskSpec::new("a")).disk(DiskSpec::new("b").raw()).writer(100);
//! let guest = guest.qemu(Qemu::Backports).boot().await?;
//! let synced = guest.wait_records(10).await?;
//! # Ok(())
//! # }
//! ```
//!
//! - [`GuestSpec`], [`DiskSpec`]: what to boot; [`Guest`]: what runs; it dies with its test, whatever ends that
//! - [`Layer`], [`read_records`], [`fs_state`], [`check_same_instant`]: what a layer holds
//! - [`HostVm`]: a whole host in a VM, for what this host's kernel lacks or must not be done to it
//! - [`Netns`]: a network namespace that plays a host, a client or the outside
//! - [`RawQmp`]: the test's own look at QEMU; [`Cli`]: the built `snapctl` with a private root
//!
//! | environment | meaning |
//! | --- | --- |
//! | `SNAPCTL_LAB_CACHE` | where the kernel, the initramfs, the second QEMU and the guests live (`target/lab`) |
//! | `SNAPCTL_LAB_ACCEL` | `tcg`, `kvm`, or `auto`: KVM if a guest really boots on it (the default) |
//! | `SNAPCTL_LAB_GUESTS` | how many guests may run at once on this machine (2) |
//! | `SNAPCTL_LAB_BACKPORTS=distro` | where no newer QEMU is to be had, its tests run on the distribution's |
//! | `SNAPCTL_LAB_KEEP=1` | keep the directory of a guest that has ended, and print where it is |
//! | `SNAPCTL_LAB=optional` | a test without a lab is shown as skipped; otherwise it fails |
//!
//! Guests need no root: images are made by `mke2fs` on files, the initramfs is written by hand.

mod accel;
mod apt;
mod assets;
mod cli;
mod control;
mod cpio;
mod disk;
mod guest;
mod host_vm;
mod layer;
pub mod need;
mod netns;
mod place;
mod process;
mod qmp;
mod record;
mod run;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

pub use accel::Accel;
pub use assets::{Qemu, QemuProgram};
pub use cli::{Cli, Run};
pub use disk::{Bus, Disk, DiskSpec, Format, KEY, KEY_ID, Style, key};
pub use guest::{Guest, GuestSpec, Progress, Stalls};
pub use host_vm::{HostVm, Ran, is_inside, run_test};
pub use layer::{FsState, Layer, check_same_instant, fs_state, read_records};
pub use netns::{HostState, Netns};
pub use place::{Place, can_mount_xfs, places, remove_tree};
pub use qmp::RawQmp;
pub use record::{BadRecord, RECORD_SIZE, Record};

use assets::Assets;

/// The cached parts that guests are made of.
#[derive(Debug, Clone)]
pub struct Lab {
    cache: PathBuf,
    assets: Assets,
}

impl Lab {
    /// Returns the lab; makes what is missing of it, once for all processes.
    ///
    /// # Errors
    /// When programs are missing (see [`require`]) or a package cannot be fetched.
    pub fn get() -> Result<Self> {
        static LAB: Mutex<Option<Lab>> = Mutex::new(None);
        let mut lab = LAB.lock().unwrap_or_else(PoisonError::into_inner);
        if lab.is_none() {
            *lab = Some(Self::make()?);
        }
        lab.clone().context("no lab")
    }

    fn make() -> Result<Self> {
        require()?;
        let cache = cache_dir()?;
        std::fs::create_dir_all(cache.join("run")).with_context(|| cache.display().to_string())?;
        let assets = assets::guest_parts(&cache, &built_program("lab-guest")?)?;
        Ok(Self { cache, assets })
    }

    /// Where everything is cached.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// The directory of the guests' directories.
    pub fn run_dir(&self) -> PathBuf {
        self.cache.join("run")
    }

    /// The guest's kernel.
    pub fn kernel(&self) -> &Path {
        &self.assets.kernel
    }

    /// The guest's initramfs.
    pub fn initrd(&self) -> &Path {
        &self.assets.initrd
    }

    /// How to start this QEMU; fetches the backports suite's once.
    ///
    /// # Errors
    /// When it is not installed, or no package source has it.
    pub fn qemu(&self, qemu: Qemu) -> Result<QemuProgram> {
        assets::qemu_program(&self.cache, qemu)
    }

    /// How guests run here.
    ///
    /// # Errors
    /// When `SNAPCTL_LAB_ACCEL` asks for something unknown.
    pub fn accel(&self) -> Result<Accel> {
        accel::choose(self)
    }
}

/// Says which programs the lab lacks on this machine.
///
/// # Errors
/// When some are missing: which, and the packages that bring them.
pub fn require() -> Result<()> {
    let missing = need::missing();
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<String> =
        missing.iter().map(|(program, package)| format!("{program} ({package})")).collect();
    bail!("the lab lacks {}: run `cargo xtask test`, it installs what is missing", list.join(", "))
}

/// Whether a test that needs the lab may run: true, or false when the lab is missing and optional.
///
/// # Errors
/// When it is missing and `SNAPCTL_LAB` is not `optional`.
#[allow(clippy::print_stderr, reason = "a skip must be seen")]
pub fn available() -> Result<bool> {
    let optional = std::env::var_os("SNAPCTL_LAB").is_some_and(|value| value == "optional");
    match Lab::get() {
        Ok(_) => Ok(true),
        Err(error) if optional => {
            eprintln!("SKIPPED: {error:#}");
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Returns a program of this workspace, built with the same profile as the running one.
///
/// # Errors
/// When it is not built.
pub fn built_program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    // Tests run from `target/PROFILE/deps`, programs from `target/PROFILE`.
    let dirs = own.ancestors().skip(1).take(2);
    let found = dirs.map(|dir| dir.join(name)).find(|file| file.is_file());
    found.with_context(|| {
        format!("{name} is not built; run `cargo build --workspace --bins`, or `cargo xtask test`")
    })
}

/// Returns the built `snapctl`.
///
/// # Errors
/// When it is not built.
pub fn snapctl() -> Result<PathBuf> {
    built_program("snapctl")
}

/// Returns where the lab keeps everything, whether or not it is there yet.
///
/// # Errors
/// When `SNAPCTL_LAB_CACHE` is not set and this program is not in a cargo target directory.
pub fn cache_dir() -> Result<PathBuf> {
    match std::env::var_os("SNAPCTL_LAB_CACHE") {
        Some(dir) => Ok(std::path::absolute(PathBuf::from(dir))?),
        None => {
            let own = std::env::current_exe()?;
            let target = own.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
            Ok(target.context("not in a cargo target directory; set SNAPCTL_LAB_CACHE")?.join("lab"))
        }
    }
}
