//! `lab fetch` and `lab clean`: the cache.

use anyhow::{Result, bail};
use tests::lab::{self, Lab, Qemu};

/// Makes the guest's parts and, if it is not the distribution's, fetches this QEMU.
pub fn run(qemu: Qemu) -> Result<()> {
    let lab = Lab::get()?;
    let program = lab.qemu(qemu)?;
    println!("lab: QEMU {} ({}), guests run on {}", program.version, program.path.display(), lab.accel()?);
    if qemu == Qemu::Backports && program.modules.is_none() {
        println!("lab: the distribution's own QEMU is new enough to be both");
    }
    Ok(())
}

/// Removes the cache, unless guests run.
pub fn clean() -> Result<()> {
    let cache = lab::cache_dir()?;
    let running = lab::places(&cache.join("run"));
    if let Some(place) = running.first() {
        bail!("a guest runs in {}", place.display());
    }
    lab::remove_tree(&cache)?;
    println!("lab: removed {}", cache.display());
    Ok(())
}
