//! What a VM keeps beside its disks: the variables of its firmware, and the state of its software TPM.

use std::fs::File;
use std::path::{Path, PathBuf};

use agent_client::{BlockNode, ChardevInfo, Qmp, QueryTpm, TpmInfo};
use model::PlatformKind;

use crate::Machine;
use crate::disks::{absolute, is_firmware};

/// A file that is part of a VM's state and no disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlatformState {
    /// What it is.
    pub kind: PlatformKind,
    /// Its files. They may be none as long as nothing was kept.
    pub files: Vec<PathBuf>,
}

/// What a VM has of it that cannot be copied, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherPlatform {
    /// What it is.
    pub kind: PlatformKind,
    /// Why it is left out.
    pub why: String,
}

/// What of a VM's platform can be copied, and what cannot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    /// What can.
    pub states: Vec<PlatformState>,
    /// What cannot.
    pub others: Vec<OtherPlatform>,
}

/// Asks QEMU, and looks for the TPM's process.
pub(crate) async fn observe(qmp: &Qmp, machine: &Machine) -> Result<Platform, agent_client::Error> {
    let mut platform = Platform::default();
    let flashes = machine.blocks.iter().filter(|block| is_firmware(block));
    for flash in flashes.filter_map(|block| block.inserted.as_ref()).filter(|flash| !flash.ro) {
        platform.add(PlatformKind::Nvram, nvram(flash, machine.cwd.as_deref()));
    }
    let tpms = match qmp.execute(&QueryTpm {}).await {
        Ok(tpms) => tpms,
        // A QEMU without TPMs has no such command.
        Err(fault) if fault.is_refusal() => Vec::new(),
        Err(fault) => return Err(fault),
    };
    for tpm in &tpms {
        platform.add(PlatformKind::Tpm, tpm_files(tpm, &machine.chardevs, machine.pid));
    }
    Ok(platform)
}

impl Platform {
    /// What this user may not read is no reason to take no snapshot.
    fn add(&mut self, kind: PlatformKind, found: Result<Vec<PathBuf>, String>) {
        let readable = |files: Vec<PathBuf>| {
            let fault = files.iter().find_map(|file| Some((file, File::open(file).err()?)));
            fault.map_or(Ok(files.clone()), |(file, fault)| Err(format!("{}: {fault}", file.display())))
        };
        match found.and_then(readable) {
            Ok(files) => self.states.push(PlatformState { kind, files }),
            Err(why) => self.others.push(OtherPlatform { kind, why }),
        }
    }
}

fn nvram(flash: &BlockNode, cwd: Option<&Path>) -> Result<Vec<PathBuf>, String> {
    match flash.drv.as_str() {
        "raw" | "file" => Ok(vec![absolute(&flash.file, cwd)?]),
        other => {
            Err(format!("it is kept in an image of QEMU's {other:?} driver, and a raw file can be copied"))
        }
    }
}

/// Source: swtpm(8), `--tpmstate dir=PATH` and `--ctrl type=unixio,path=PATH`; QEMU is a client of that socket.
fn tpm_files(tpm: &TpmInfo, chardevs: &[ChardevInfo], pid: Option<u32>) -> Result<Vec<PathBuf>, String> {
    let chardev = tpm.options.data.chardev.as_deref().ok_or("it is no emulated TPM")?;
    let shown = chardevs.iter().find(|known| known.label == chardev);
    let shown = shown.and_then(|shown| socket_of(&shown.filename));
    // QEMU 7.2 does not tell the path to which it has connected.
    let socket = shown.or_else(|| socket_by_command_line(pid?, chardev)).ok_or("its socket is not known")?;
    let dir = state_dir(&socket)
        .ok_or("no swtpm that serves its socket and keeps its state in a directory is found")?;
    let entries = std::fs::read_dir(&dir).map_err(|fault| format!("{}: {fault}", dir.display()))?;
    let mut files: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_state(path)).collect();
    files.sort();
    Ok(files)
}

fn socket_of(filename: &str) -> Option<PathBuf> {
    let socket = filename.strip_prefix("unix:")?;
    let path = socket.split(',').next().unwrap_or(socket);
    (!path.is_empty()).then(|| path.into())
}

fn socket_by_command_line(pid: u32, chardev: &str) -> Option<PathBuf> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words = words(&line);
    let has_id = |word: &&String| word.split(',').any(|part| part.strip_prefix("id=") == Some(chardev));
    let option = words.iter().filter(|word| word.starts_with("socket,")).find(has_id)?;
    option.split(',').find_map(|part| part.strip_prefix("path=").map(PathBuf::from))
}

/// The words of a command line in `/proc`.
fn words(line: &[u8]) -> Vec<String> {
    line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// Source: libtpms and swtpm, `tpm2-00.permall`, `tpm2-00.volatilestate`, `tpm-00.permall`.
fn is_state(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    path.is_file() && name.starts_with("tpm") && (name.ends_with(".permall") || name.ends_with("state"))
}

/// The directory of the swtpm that serves `socket`, by its command line.
fn state_dir(socket: &Path) -> Option<PathBuf> {
    let pids =
        std::fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| std::fs::read(format!("/proc/{pid}/cmdline")).ok())
        .find_map(|line| state_dir_of(&line, socket))
}

fn state_dir_of(line: &[u8], socket: &Path) -> Option<PathBuf> {
    let words = words(line);
    let program = Path::new(words.first()?).file_name()?.to_str()?.to_owned();
    let option = |name: &str, key: &str| {
        let value = words.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1].clone());
        let value = value
            .or_else(|| words.iter().find_map(|w| w.strip_prefix(&format!("{name}=")).map(str::to_owned)));
        value?.split(',').find_map(|part| part.strip_prefix(key).map(PathBuf::from))
    };
    let serves = option("--ctrl", "path=").is_some_and(|path| path == socket);
    (program.starts_with("swtpm") && serves).then(|| option("--tpmstate", "dir=")).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tpm_is_found_by_the_socket_that_its_process_serves() {
        let line = b"/usr/bin/swtpm\0socket\0--tpm2\0--tpmstate\0dir=/var/lib/tpm/vm1,mode=0600\0--ctrl\0type=unixio,path=/run/vm1/tpm\0";
        assert_eq!(state_dir_of(line, Path::new("/run/vm1/tpm")), Some("/var/lib/tpm/vm1".into()));
        assert_eq!(state_dir_of(line, Path::new("/run/vm2/tpm")), None);
        assert_eq!(
            state_dir_of(b"vi\0--tpmstate\0dir=/x\0--ctrl\0path=/run/vm1/tpm\0", Path::new("/run/vm1/tpm")),
            None
        );
        assert_eq!(socket_of("unix:/run/vm1/tpm,server=off"), Some("/run/vm1/tpm".into()));
    }
}
