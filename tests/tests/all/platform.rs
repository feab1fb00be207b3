//! Firmware variables and the state of a software TPM belong to the point in time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tests::lab::{self, DiskSpec, Guest, Qemu};

use crate::support::{KILLED, Scene, assert_says, copies_of, wait_until};

/// Where Debian keeps a firmware that fits flash.
const QBOOT: &str = "/usr/share/qemu/qboot.rom";
const VARIABLES: usize = 128 << 10;
const REFUSED: i32 = 7;

/// A software TPM; it ends with its client, or with this.
struct Tpm {
    child: Child,
    dir: tempfile::TempDir,
}

impl Tpm {
    async fn start(dir: tempfile::TempDir) -> Result<Self> {
        let socket = dir.path().join("sock");
        let state = dir.path().join("state");
        fs::create_dir_all(&state)?;
        let mut swtpm = Command::new("swtpm");
        swtpm.args(["socket", "--tpm2", "--terminate"]);
        swtpm.arg("--tpmstate").arg(format!("dir={}", state.display()));
        swtpm.arg("--ctrl").arg(format!("type=unixio,path={}", socket.display()));
        let child = swtpm.stdin(Stdio::null()).spawn()?;
        wait_until("swtpm serves its socket", || socket.exists()).await?;
        Ok(Self { child, dir })
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state/tpm2-00.permall")
    }

    fn args(&self) -> Vec<String> {
        let socket = self.dir.path().join("sock").display().to_string();
        let args = ["-chardev", &format!("socket,id=chrtpm,path={socket}"), "-tpmdev"];
        let tpm = ["emulator,id=tpm0,chardev=chrtpm", "-device", "tpm-crb,tpmdev=tpm0"];
        args.iter().chain(&tpm).map(|word| (*word).to_owned()).collect()
    }

    /// Its guest is gone: it ends by itself.
    fn end(mut self) -> Result<tempfile::TempDir> {
        self.child.wait()?;
        Ok(self.dir)
    }
}

/// Flash for the firmware and for its variables.
fn flash(dir: &Path) -> Result<(PathBuf, Vec<String>)> {
    let variables = dir.join("VARS.fd");
    fs::write(&variables, vec![0xff; VARIABLES])?;
    let code = format!("if=pflash,unit=0,format=raw,readonly=on,file={QBOOT}");
    let vars = format!("if=pflash,unit=1,format=raw,file={}", variables.display());
    let args = ["-drive".to_owned(), code, "-drive".to_owned(), vars];
    Ok((variables, args.to_vec()))
}

/// Writes to the flash as the firmware does, through QEMU.
async fn set_variable(scene: &mut Scene, pattern: u8) -> Result<()> {
    let line = format!("qemu-io pflash1 \"write -P {pattern} 4096 512\"");
    let said = scene.qmp.call("human-monitor-command", json!({"command-line": line})).await?;
    // What it wrote it tells elsewhere; here it would say what went wrong.
    ensure!(said == "", "{said}");
    Ok(())
}

fn variable(file: &Path) -> Result<u8> {
    fs::read(file)?.get(4096).copied().context("too short")
}

async fn goes_back_on(qemu: Qemu) -> Result<()> {
    if !lab::available()? || !Path::new(QBOOT).exists() {
        return Ok(());
    }
    let place = tempfile::tempdir()?;
    let tpm = Tpm::start(tempfile::tempdir()?).await?;
    let (variables, flash) = flash(place.path())?;
    let spec = Guest::spec().disk(DiskSpec::new("va")).qemu(qemu).args(flash).args(tpm.args());
    let mut scene = Scene::boot(spec).await?;
    set_variable(&mut scene, 1).await?;
    let created = scene.run("create vm1 --name a").await?;
    assert_says(&created.ok()?.stdout, &["firmware variables", "TPM state"]);
    assert_says(&scene.run("show vm1 a").await?.ok()?.stdout, &["nvram", "tpm", "VARS.fd"]);
    let state = tpm.state();
    let then = fs::read(&state)?;
    set_variable(&mut scene, 2).await?;
    scene.assert_sound().await?;

    // A running QEMU has read them long ago: nothing is changed below it.
    let running = scene.run("revert vm1 a").await?;
    assert_says(&running.ok()?.stderr, &["VARS.fd stays as it is", "stop the VM"]);
    ensure!(variable(&variables)? == 2, "it stays");
    scene.back_up().await?;
    scene.assert_sound().await?;

    scene.guest.kill().await?;
    let dir = tpm.end()?;
    fs::write(&state, "another state")?;
    let plan = scene.run("revert vm1 a --dry-run").await?;
    assert_says(&plan.ok()?.stdout, &["put", "VARS.fd back"]);
    // Killed in the middle, it goes on.
    let killed = scene.run_faulty("revert vm1 a", "revert.entered=kill").await?;
    killed.expect_code(KILLED)?;
    scene.run("recover vm1").await?.ok()?;
    ensure!(variable(&variables)? == 1 && fs::read(&state)? == then, "they are as they were");

    // What was there until then is kept with the branch.
    let names = scene.names().await?;
    let branch = names.iter().rfind(|name| name.starts_with("before-revert")).context("a branch")?.clone();
    scene.run(&format!("revert vm1 {branch}")).await?.ok()?;
    ensure!(variable(&variables)? == 2 && fs::read(&state)? == b"another state", "and come back");

    // A swtpm holds its lock open once it has read the state.
    let lock = fs::File::create(dir.path().join("state/.lock"))?;
    let refused = scene.run("revert vm1 a").await?;
    drop(lock);
    assert_says(&refused.expect_code(REFUSED)?.stderr, &["open"]);

    // The copies go with their snapshots.
    let copies: Vec<PathBuf> = scene.snapshots().await?.iter().flat_map(copies_of).collect();
    ensure!(!copies.is_empty() && copies.iter().all(|copy| copy.exists()), "{copies:?}");
    let names = scene.names().await?.join(" ");
    scene.run(&format!("delete vm1 {names}")).await?.ok()?;
    ensure!(!copies.iter().any(|copy| copy.exists()), "{copies:?}");
    Ok(())
}

#[tokio::test]
async fn variables_and_tpm_go_back_with_a_stopped_vm() -> Result<()> {
    goes_back_on(Qemu::Distro).await
}

#[tokio::test]
async fn variables_and_tpm_go_back_with_a_stopped_vm_on_the_newer_qemu() -> Result<()> {
    goes_back_on(Qemu::Backports).await
}
