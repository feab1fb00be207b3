//! A copy of a snapshot that stands alone: each disk in one image without a backing file, in a directory of its own.
//!
//! Nothing of the VM is changed, and it may run. The caller holds the VM's lock, so that no layer is merged meanwhile. Killed, it
//! leaves images that are whole, and at most one file that ends in `.part` and is replaced by the next attempt.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::files;
use host::tied::Tie;
use model::{ByteSize, DiskName, History, ImageFormat, LayerRecord, Name, PlannedStep, SnapshotRecord};
use serde::Serialize;
use storage::chain::Chain;
use storage::publish::{self, partial};
use storage::space;

use crate::create::{Interrupt, step_error};
use crate::encrypted;
use crate::error::{Error, Fate, StepError};
use crate::merge::Going;
use crate::plan::Refusal;
use crate::qemu_img;
use crate::view::{find_snapshot, policy};

/// What may be done with a copy, and by its owner alone.
const MODE: u32 = 0o600;
/// What failed, for people.
const STEP: &str = "copying the snapshot";

/// What the user asks for.
#[derive(Clone, Debug)]
pub struct CopyRequest {
    /// The snapshot: its name, its id, a unique prefix of either, or `latest`.
    pub snapshot: String,
    /// Disks to copy, as the snapshot names them; all if empty.
    pub disks: Vec<String>,
    /// Where the copies go.
    pub dir: PathBuf,
}

/// Everything that [`copy()`] will do, decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CopyPlan {
    /// The VM.
    pub vm: Name,
    /// The snapshot.
    pub snapshot: Going,
    /// Where the copies go.
    pub dir: PathBuf,
    /// Its disks.
    pub disks: Vec<CopiedDisk>,
    /// Firmware variables and TPM state, which are copied as they are: from where, and to where.
    pub files: Vec<(PathBuf, PathBuf)>,
}

/// One disk's copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CopiedDisk {
    /// The disk.
    pub disk: DiskName,
    /// The layer that holds the snapshot.
    pub from: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// The copy, a qcow2 image.
    pub to: PathBuf,
    /// At most so much is copied.
    pub bytes: ByteSize,
}

impl CopyPlan {
    /// Decides what to do. Only headers are read.
    fn new(vm: &Name, request: &CopyRequest, known: &History) -> Result<Self, Error> {
        let snapshot = find_snapshot(vm, known, &request.snapshot)?;
        if snapshot.internal.is_some() {
            return Err(Refusal::CopyOfInternal { snapshot: snapshot.name.clone() }.into());
        }
        let mut names = BTreeSet::new();
        let mut disks = Vec::new();
        for layer in chosen(vm, request, snapshot)? {
            let chain = Chain::open(&layer.path, layer.format, &policy(known)).map_err(Refusal::Chain)?;
            encrypted::refuse_offline(vm, chain.layers().map(|layer| (layer.path.as_path(), layer.format)))?;
            let bytes = chain.layers().map(|layer| layer.allocated.0).fold(0, u64::saturating_add);
            disks.push(CopiedDisk {
                disk: layer.disk.clone(),
                from: layer.path.clone(),
                format: layer.format,
                to: request.dir.join(format!("{}.qcow2", file_name(&layer.disk, &mut names))),
                bytes: ByteSize(bytes.min(layer.virtual_size.0)),
            });
        }
        let file = |live: &Path| live.file_name().map(|name| request.dir.join(name));
        let files =
            snapshot.platform.iter().filter_map(|saved| Some((saved.copy.clone(), file(&saved.live)?)));
        let plan = Self {
            vm: vm.clone(),
            snapshot: Going { id: snapshot.id, name: snapshot.name.clone() },
            dir: request.dir.clone(),
            disks,
            files: files.collect(),
        };
        if let Some(path) = plan.targets().find(|path| path.exists()) {
            return Err(Refusal::CopyExists { path: path.to_owned() }.into());
        }
        Ok(plan)
    }

    /// The plan for people.
    pub fn steps(&self) -> Vec<PlannedStep> {
        let step = |from: &Path, to: &Path, what: &str| PlannedStep {
            step: format!("copy {what}{} into {}", from.display(), to.display()),
            undo: Some(format!("remove {}", to.display())),
        };
        let disk = |disk: &CopiedDisk| step(&disk.from, &disk.to, &format!("at most {} from ", disk.bytes));
        let files = self.files.iter().map(|(from, to)| step(from, to, ""));
        self.disks.iter().map(disk).chain(files).collect()
    }

    fn targets(&self) -> impl Iterator<Item = &Path> {
        let files = self.files.iter().map(|(_, to)| to.as_path());
        self.disks.iter().map(|disk| disk.to.as_path()).chain(files)
    }
}

fn chosen<'a>(
    vm: &Name,
    request: &CopyRequest,
    snapshot: &'a SnapshotRecord,
) -> Result<Vec<&'a LayerRecord>, Refusal> {
    if request.disks.is_empty() {
        return Ok(snapshot.disks.iter().collect());
    }
    let of_name = |name: &String| {
        let found = snapshot.disks.iter().find(|layer| layer.disk.as_str() == name);
        found.ok_or_else(|| Refusal::NotInSnapshot {
            vm: vm.clone(),
            disk: DiskName::new(name),
            snapshot: snapshot.name.clone(),
        })
    };
    request.disks.iter().map(of_name).collect()
}

/// A disk's name as the name of a file that no other disk has.
fn file_name(disk: &DiskName, taken: &mut BTreeSet<String>) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = disk.as_str().chars().map(plain).collect();
    let name = name.trim_start_matches('.');
    let name = if name.is_empty() { "disk" } else { name };
    let names = std::iter::once(name.to_owned()).chain((2..).map(|n| format!("{name}-{n}")));
    names.into_iter().find(|name| taken.insert(name.clone())).unwrap_or_default()
}

/// Decides what [`copy()`] would do, and touches nothing.
///
/// # Errors
/// As [`copy()`], before its first step.
pub fn plan_copy(vm: &Name, known: &History, request: &CopyRequest) -> Result<CopyPlan, Error> {
    let plan = CopyPlan::new(vm, request, known)?;
    let place = if plan.dir.exists() { plan.dir.as_path() } else { files::parent(&plan.dir) };
    let bytes = plan.disks.iter().map(|disk| disk.bytes.0).fold(0, u64::saturating_add);
    space::require(place, ByteSize(bytes.saturating_add(bytes / 100))).map_err(Refusal::NoRoom)?;
    Ok(plan)
}

/// Copies the disks of a snapshot of `vm`, of which `known` is remembered. The caller holds the VM's lock.
///
/// # Errors
/// [`Error::NoSuchSnapshot`], [`Error::Ambiguous`], [`Error::Refused`] before the first step; then [`Error::Step`] or
/// [`Error::Interrupted`], and what was made is removed.
pub async fn copy(
    vm: &Name,
    known: &History,
    request: &CopyRequest,
    tie: &Tie,
    interrupt: &Interrupt,
) -> Result<CopyPlan, Error> {
    let plan = plan_copy(vm, known, request)?;
    let made_dir = make_dir(&plan.dir).map_err(|source| step_error(STEP, source, Fate::Untouched))?;
    let mut made = Vec::new();
    if let Err(source) = copy_all(&plan, tie, interrupt, &mut made).await {
        return Err(step_error(STEP, source, undo(&plan.dir, made_dir, &made)));
    }
    Ok(plan)
}

fn make_dir(dir: &Path) -> Result<bool, StepError> {
    if dir.is_dir() {
        return Ok(false);
    }
    fs::create_dir(dir).map_err(HostError::io("make the directory", dir))?;
    files::sync_dir(files::parent(dir))?;
    Ok(true)
}

async fn copy_all(
    plan: &CopyPlan,
    tie: &Tie,
    interrupt: &Interrupt,
    made: &mut Vec<PathBuf>,
) -> Result<(), StepError> {
    for disk in &plan.disks {
        let part = partial(&disk.to);
        files::remove_durably(&part)?;
        made.push(part.clone());
        host::fault::point("copy.begun")?;
        let words = ["convert", "-f", disk.format.driver(), "-O", "qcow2"].map(AsRef::as_ref);
        let paths = [disk.from.as_os_str(), part.as_os_str()];
        tokio::select! {
            copied = qemu_img::run_tied(tie, words.into_iter().chain(paths)) => copied?,
            () = interrupt.wait() => interrupt.check()?,
        }
        host::fault::point("copy.converted")?;
        publish::finish(&disk.to, MODE)?;
        made.push(disk.to.clone());
        host::fault::point("copy.renamed")?;
    }
    for (from, to) in &plan.files {
        let part = partial(to);
        made.push(part.clone());
        fs::copy(from, &part).map_err(HostError::io("copy", from))?;
        publish::finish(to, MODE)?;
        made.push(to.clone());
    }
    Ok(())
}

fn undo(dir: &Path, made_dir: bool, made: &[PathBuf]) -> Fate {
    let mut left: Vec<String> = made
        .iter()
        .filter_map(|path| files::remove_durably(path).err())
        .map(|fault| fault.to_string())
        .collect();
    if made_dir && let Err(fault) = fs::remove_dir(dir) {
        left.push(format!("{} ({fault})", dir.display()));
    }
    if left.is_empty() { Fate::Undone } else { Fate::PartlyUndone(left) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_disks_become_names_of_files_one_for_each() {
        let mut taken = BTreeSet::new();
        let names = ["va", "a/b", "a_b", "#block12", "..", "va"]
            .map(|name| file_name(&DiskName::new(name), &mut taken));
        assert_eq!(names, ["va", "a_b", "a_b-2", "_block12", "disk", "va-2"]);
    }
}
