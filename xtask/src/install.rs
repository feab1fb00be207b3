//! Installing the programs that the lab needs, through the system's package manager.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{Setup, need};

/// Another apt may be at work, such as a nightly upgrade: it is waited for, in seconds.
const LOCK_TIMEOUT: &str = "DPkg::Lock::Timeout=300";

/// To bring one program, apt may remove another of a different release: a second round brings that back.
const ROUNDS: u32 = 2;

/// Installs what is missing, or says so.
///
/// # Errors
/// When something is missing and `--no-install` was given, or the system has no apt, or apt fails.
pub fn run(setup: Setup) -> Result<()> {
    for _ in 0..ROUNDS {
        let missing = need::missing();
        if missing.is_empty() {
            return Ok(());
        }
        println!("Missing on this machine:");
        for (program, package) in &missing {
            println!("  {program:20} (package {package} on Debian and Ubuntu)");
        }
        if setup.no_install {
            bail!("not installed, as --no-install says");
        }
        if need::find("apt-get").is_none() {
            bail!(
                "this system has no apt-get: install these programs with its package manager, then try again"
            );
        }
        install(&missing.iter().map(|(_, package)| *package).collect())?;
    }
    match need::missing()[..] {
        [] => Ok(()),
        [(program, package), ..] => bail!("{program} is still missing after installing {package}"),
    }
}

fn install(packages: &BTreeSet<&str>) -> Result<()> {
    let mut updated = false;
    if !packages.iter().all(|package| is_known(package)) {
        apt_get(&["update"])?;
        updated = true;
    }
    let arguments: Vec<&str> =
        ["-y", "install", "--no-install-recommends"].into_iter().chain(packages.iter().copied()).collect();
    match apt_get(&arguments) {
        Err(_) if !updated => {
            // Stale lists name package versions that the mirror has replaced.
            apt_get(&["update"])?;
            apt_get(&arguments)
        }
        result => result,
    }
}

fn is_known(package: &str) -> bool {
    let mut command = Command::new("apt-cache");
    command.args(["show", package]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Runs apt-get as root, by sudo if need be, which asks for the password as it always does.
fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut words = vec!["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", LOCK_TIMEOUT];
    words.extend(arguments);
    if !rustix::process::geteuid().is_root() {
        if need::find("sudo").is_none() {
            bail!("not root, and there is no sudo; as root, run: {}", words.join(" "));
        }
        words.insert(0, "sudo");
    }
    println!("$ {}", words.join(" "));
    let status = Command::new(words[0]).args(&words[1..]).status().context("apt-get")?;
    if !status.success() {
        bail!("apt-get failed ({status})");
    }
    Ok(())
}
