//! Firmware variables and the state of a software TPM: small files, copied with a point and put back with it.
//!
//! They are copied before the point, and compared after it: as long as they are the same, the copy is of that instant.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::files;
use model::{PlatformFile, SnapshotRecord};
use storage::publish;
use vm::platform::Platform;

use crate::create::Warning;
use crate::error::StepError;
use crate::recover::require_free;

/// Most that one of them has: QEMU pads the flash of some machines to 64 MiB.
const MOST: u64 = 128 << 20;
/// What swtpm holds open in its directory while it runs. Source: swtpm, `--tpmstate`, lock file.
const TPM_LOCK: &str = ".lock";

/// The copies that a point gets. `overlay` is that of its first disk: they lie beside it.
pub(crate) fn plan(platform: &Platform, overlay: &Path) -> Vec<PlatformFile> {
    let mut planned: Vec<PlatformFile> = Vec::new();
    for state in &platform.states {
        for live in &state.files {
            let ending = format!(".{}-{}", state.kind.as_str(), planned.len());
            let copy = files::append(&overlay.with_extension(""), &ending);
            planned.push(PlatformFile { kind: state.kind, live: live.clone(), copy });
        }
    }
    planned
}

/// Makes the copies. What is there already stays.
pub(crate) fn copy(planned: &[PlatformFile]) -> Result<(), StepError> {
    for file in planned.iter().filter(|file| !file.copy.exists()) {
        replace(&file.live, &file.copy, &file.live, 0o400)?;
    }
    Ok(())
}

/// After the point: a file that was written to meanwhile is copied again.
pub(crate) fn refresh(planned: &[PlatformFile], warnings: &mut Vec<Warning>) -> Result<(), StepError> {
    for file in planned {
        if read(&file.live)? != read(&file.copy)? {
            replace(&file.live, &file.copy, &file.live, 0o400)?;
            let why =
                "it was written to while the point was made; its copy is from a moment later".to_owned();
            warnings.push(Warning::PlatformChanged { path: file.live.clone(), why });
        }
    }
    Ok(())
}

/// Removes the copies; says what could not be.
pub(crate) fn remove(planned: &[PlatformFile]) -> Vec<String> {
    let failed = planned.iter().filter_map(|file| files::remove_durably(&file.copy).err());
    failed.map(|fault| fault.to_string()).collect()
}

/// Makes sure that nothing uses the files that are to be put back.
pub(crate) fn require_unused(saved: &[PlatformFile]) -> Result<(), StepError> {
    for file in saved {
        let lock = files::parent(&file.live).join(TPM_LOCK);
        for path in [file.live.clone(), lock].iter().filter(|path| path.exists()) {
            require_free(path, None)?;
        }
    }
    Ok(())
}

/// Lets the live files be what they were. One that holds that already stays.
pub(crate) fn put_back(saved: &[PlatformFile]) -> Result<(), StepError> {
    for file in saved {
        let is_there = file.live.exists();
        if is_there && read(&file.live)? == read(&file.copy)? {
            continue;
        }
        let like = if is_there { &file.live } else { &file.copy };
        let mode = if is_there { metadata(&file.live)?.mode() & 0o777 } else { 0o600 };
        replace(&file.copy, &file.live, like, mode)?;
    }
    Ok(())
}

/// The files of a snapshot that are no layers: its memory, and copies of the platform's.
pub(crate) fn beside(snapshot: &SnapshotRecord) -> Vec<PathBuf> {
    let memory = snapshot.memory.iter().map(|memory| memory.path.clone());
    memory.chain(snapshot.platform.iter().map(|file| file.copy.clone())).collect()
}

/// Puts what is in `from` into `to` at once, with the owner of `like`.
fn replace(from: &Path, to: &Path, like: &Path, mode: u32) -> Result<(), StepError> {
    let bytes = read(from)?;
    Ok(publish::replace(to, like, mode, |file| file.write_all(&bytes))?)
}

fn read(path: &Path) -> Result<Vec<u8>, StepError> {
    Ok(files::read_bounded(path, MOST)?)
}

fn metadata(path: &Path) -> Result<fs::Metadata, StepError> {
    Ok(fs::metadata(path).map_err(HostError::io("look at", path))?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use model::PlatformKind;
    use vm::platform::PlatformState;

    use super::*;

    #[test]
    fn a_copy_is_made_refreshed_and_put_back_with_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let live = dir.path().join("VARS.fd");
        fs::write(&live, "then").unwrap();
        fs::set_permissions(&live, fs::Permissions::from_mode(0o640)).unwrap();
        let states = vec![PlatformState { kind: PlatformKind::Nvram, files: vec![live.clone()] }];
        let platform = Platform { states, others: Vec::new() };
        let planned = plan(&platform, &dir.path().join("a.1234.qcow2"));
        assert_eq!(planned[0].copy, dir.path().join("a.1234.nvram-0"));
        copy(&planned).unwrap();
        let mut warnings = Vec::new();
        refresh(&planned, &mut warnings).unwrap();
        assert!(warnings.is_empty());
        fs::write(&live, "meanwhile").unwrap();
        refresh(&planned, &mut warnings).unwrap();
        assert_eq!((warnings.len(), fs::read(&planned[0].copy).unwrap()), (1, b"meanwhile".to_vec()));
        fs::write(&live, "later").unwrap();
        put_back(&planned).unwrap();
        assert_eq!(fs::read(&live).unwrap(), b"meanwhile");
        assert_eq!(metadata(&live).unwrap().mode() & 0o777, 0o640);
        fs::remove_file(&live).unwrap();
        put_back(&planned).unwrap();
        assert!(live.exists() && remove(&planned).is_empty() && !planned[0].copy.exists());
    }
}
