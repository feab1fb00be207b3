//! KVM where a guest really boots on it; software emulation everywhere else.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::{Lab, Qemu};

/// A guest on working hardware virtualisation is up in one second.
const PROBE_LIMIT: Duration = Duration::from_secs(8);
const PROBE_POLL: Duration = Duration::from_millis(50);

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Software emulation.
    Tcg,
    /// Hardware virtualisation.
    Kvm,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcg => "software emulation",
            Self::Kvm => "KVM",
        })
    }
}

/// Follows `SNAPCTL_LAB_ACCEL`; otherwise finds out, once in the life of this host's kernel.
pub(super) fn choose(lab: &Lab) -> Result<Accel> {
    match std::env::var("SNAPCTL_LAB_ACCEL").as_deref() {
        Ok("tcg") => Ok(Accel::Tcg),
        Ok("kvm") => Ok(Accel::Kvm),
        Ok("auto") | Err(_) => probed(lab),
        Ok(other) => bail!("SNAPCTL_LAB_ACCEL={other}: tcg, kvm or auto"),
    }
}

fn probed(lab: &Lab) -> Result<Accel> {
    if OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(Accel::Tcg);
    }
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let known = lab.cache().join(format!("accel-{}", boot_id.trim()));
    let accel = match fs::read_to_string(&known) {
        Ok(text) if text == "kvm" => Accel::Kvm,
        Ok(_) => Accel::Tcg,
        Err(_) => {
            let works = boots_on_kvm(lab)?;
            fs::write(&known, if works { "kvm" } else { "tcg" })?;
            if works { Accel::Kvm } else { Accel::Tcg }
        }
    };
    Ok(accel)
}

/// The device being there proves nothing: nested virtualisation may accept every call and never run.
fn boots_on_kvm(lab: &Lab) -> Result<bool> {
    let dir = tempfile::tempdir_in(lab.run_dir())?;
    let console = dir.path().join("console");
    let mut qemu = Command::new(lab.qemu(Qemu::Distro)?.path);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    qemu.args(["-accel", "kvm", "-cpu", "host", "-M", "q35", "-m", "256"]);
    qemu.arg("-kernel").arg(lab.kernel()).arg("-initrd").arg(lab.initrd());
    qemu.args(["-append", "console=ttyS0 quiet panic=-1 lab.probe=1"]);
    qemu.arg("-serial").arg(format!("file:{}", console.display()));
    let mut child = qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let until = Instant::now() + PROBE_LIMIT;
    while Instant::now() < until && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(PROBE_POLL);
    }
    // It may have ended by itself.
    let _ = child.kill();
    child.wait()?;
    Ok(fs::read(&console).is_ok_and(|text| String::from_utf8_lossy(&text).contains("lab: probe ok")))
}
