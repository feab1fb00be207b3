//! Looking into frozen layers: whether each still is what it was when it was sealed, and whether its tables are sound.
//!
//! A layer's content is hashed without the VM's lock, since that may take hours; what came out is judged, and kept,
//! under the lock, and only if the layer was not merged into meanwhile.

use std::path::{Path, PathBuf};
use std::time::Duration;

use model::{ByteSize, Compared, Fingerprint, History, ImageFormat, MemoryRecord, Name, SnapshotRecord};
use serde::Deserialize;
use storage::chain::{Finding, Severity};
use storage::{compress, fingerprint};
use vm::{Paths, State};

use crate::encrypted::is_encrypted;
use crate::error::{Error, Fate, StepError};
use crate::qemu_img;
use crate::view::DiskView;

/// `qemu-img check` found errors; it found clusters that nothing uses. Source: qemu-img(1), "check".
const CHECK_ERRORS: i32 = 2;
const CHECK_LEAKS: i32 = 3;
/// It cannot check this format.
const CHECK_UNSUPPORTED: i32 = 63;

/// Who is told how far the reading is.
pub trait WatchReading {
    /// So many bytes of the layer are read.
    fn progress(&self, path: &Path, done: ByteSize, size: ByteSize);
}

/// A frozen layer that is to be looked into.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Frozen {
    path: PathBuf,
    format: ImageFormat,
}

/// What `qemu-img check` prints. Source: qapi/block-core.json, ImageCheck.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ImageCheck {
    #[serde(default)]
    corruptions: u64,
    #[serde(default)]
    check_errors: u64,
    #[serde(default)]
    leaks: u64,
}

/// Looks into every frozen layer of a VM: `views` are what [`crate::disk_views`] gives for it.
///
/// What is read for the first time is remembered.
///
/// # Errors
/// [`Error::Vm`] if the VM's lock or the catalogue is not to be had; [`Error::Step`] if `qemu-img` cannot be run.
/// A layer that cannot be read is a finding.
pub async fn check_deep(
    paths: &Paths,
    vm: &Name,
    wait: Option<Duration>,
    views: &[DiskView],
    watch: &dyn WatchReading,
) -> Result<Vec<Finding>, Error> {
    let mut findings = Vec::new();
    for layer in frozen(views) {
        let known = State::open_existing(paths)?.history(Some(vm))?;
        let remembered = known.fingerprint(&layer.path).cloned();
        let checked = check_image(&layer).await;
        findings.extend(checked.map_err(|source| failed("checking an image", source))?);
        let size = std::fs::metadata(&layer.path).map_or(0, |found| found.len());
        let read = read(&layer, |done| watch.progress(&layer.path, done, ByteSize(size)));
        let found = match read {
            Ok(found) => found,
            Err(why) => {
                findings.push(unreadable(&layer.path, &why));
                continue;
            }
        };
        let _lock = vm::lock(paths, vm, wait).await?;
        let state = State::open(paths)?;
        let known = state.history(Some(vm))?;
        if known.fingerprint(&layer.path) == remembered.as_ref() {
            findings.extend(judge(&layer.path, &known, remembered.as_ref(), &found));
            keep(&state, vm, &layer.path, remembered.as_ref(), &found)?;
        }
    }
    findings.extend(damaged_memory(paths, vm)?);
    Ok(findings)
}

/// Memory that cannot be read to its end.
fn damaged_memory(paths: &Paths, vm: &Name) -> Result<Vec<Finding>, Error> {
    let known = State::open_existing(paths)?.history(Some(vm))?;
    let saved = known.visible().filter_map(|snapshot| Some((snapshot, snapshot.memory.as_ref()?)));
    let damaged = |(snapshot, memory): (&SnapshotRecord, &MemoryRecord)| {
        // One that is not there is found without looking so deep.
        let fault = memory.path.exists().then(|| compress::verify(&memory.path).err())??;
        Some(Finding {
            severity: Severity::Error,
            path: memory.path.clone(),
            code: "damaged-memory",
            message: format!("the memory of snapshot {} cannot be read: {fault}", snapshot.name),
            advice: "the snapshot's disks are judged by themselves: a guest that starts from them boots",
        })
    };
    Ok(saved.filter_map(damaged).collect())
}

/// Every layer below the active ones, and every layer of a branch, each once.
fn frozen(views: &[DiskView]) -> Vec<Frozen> {
    let mut frozen: Vec<Frozen> = Vec::new();
    for layer in views.iter().flat_map(DiskView::all_layers).filter(|layer| !layer.active) {
        let layer = Frozen { path: layer.path.clone(), format: layer.format };
        if !frozen.contains(&layer) {
            frozen.push(layer);
        }
    }
    frozen
}

/// Reads all of a layer, and makes sure that it stood still meanwhile.
fn read(layer: &Frozen, progress: impl Fn(ByteSize)) -> Result<Fingerprint, String> {
    let take = || fingerprint::take(&layer.path, layer.format).map_err(|fault| fault.to_string());
    let before = take()?;
    let content = fingerprint::content(&layer.path, |done| {
        progress(done);
        false
    });
    let content = content.map_err(|fault| fault.to_string())?;
    match take()? == before {
        true => Ok(Fingerprint { content, ..before }),
        false => Err("it was written to while it was read".into()),
    }
}

/// Lets `qemu-img` check the tables of a qcow2 image, without the layers below it. It would need the key of an encrypted one,
/// of which only the content is compared.
async fn check_image(layer: &Frozen) -> Result<Option<Finding>, StepError> {
    if layer.format != ImageFormat::Qcow2 || is_encrypted(&layer.path, layer.format) {
        return Ok(None);
    }
    let file = serde_json::json!({ "driver": crate::overlays::driver(&layer.path), "filename": layer.path });
    let image = serde_json::json!({ "driver": "qcow2", "file": file, "backing": null });
    let output = qemu_img::output(["check", "--output=json", &format!("json:{image}")]).await?;
    let found: ImageCheck = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let path = layer.path.clone();
    Ok(match output.status.code() {
        Some(0 | CHECK_UNSUPPORTED) => None,
        Some(CHECK_LEAKS) => Some(Finding {
            severity: Severity::Info,
            path,
            code: "leaked-clusters",
            message: format!("{} of its clusters are used by nothing", found.leaks),
            advice: "they cost room and nothing else; they go when the layer is merged away",
        }),
        Some(CHECK_ERRORS) => Some(Finding {
            severity: Severity::Error,
            path,
            code: "corrupt-image",
            message: format!(
                "qemu-img check finds {} corruptions",
                found.corruptions.saturating_add(found.check_errors)
            ),
            advice: "do not go back to a snapshot that it holds; restore from a backup",
        }),
        _ => Some(Finding {
            severity: Severity::Warning,
            path,
            code: "unchecked-image",
            message: qemu_img::failed(&output).to_string(),
            advice: "run qemu-img check on it by hand",
        }),
    })
}

fn judge(
    path: &Path,
    known: &History,
    remembered: Option<&Fingerprint>,
    found: &Fingerprint,
) -> Option<Finding> {
    let snapshot = known.holder(path).map(|snapshot| snapshot.name.to_string()).unwrap_or_default();
    let finding = |severity, code, message, advice| {
        Some(Finding { severity, path: path.to_owned(), code, message, advice })
    };
    match remembered?.compare(found) {
        Compared::Same => None,
        Compared::SameContent => finding(
            Severity::Info,
            "touched-layer",
            "it was replaced or written to since it was sealed, and holds the same as before".to_owned(),
            "nothing is lost; the file as it is now is remembered",
        ),
        Compared::OtherFile => finding(
            Severity::Warning,
            "replaced-layer",
            format!("it is another file than the one that was sealed when snapshot {snapshot} was made"),
            "size, time and tables are the same, as after a copy that keeps them; its content was not known before",
        ),
        Compared::Changed => finding(
            Severity::Error,
            "changed-layer",
            format!("it was changed since it was sealed: it does not hold snapshot {snapshot} any more"),
            "what stands on it may be damaged too; find out what wrote to it, and restore from a backup",
        ),
    }
}

/// Remembers what is known now, unless it contradicts what was known.
fn keep(
    state: &State,
    vm: &Name,
    path: &Path,
    remembered: Option<&Fingerprint>,
    found: &Fingerprint,
) -> Result<(), Error> {
    let is_new = remembered != Some(found);
    let fits = remembered.is_none_or(|remembered| remembered.compare(found) != Compared::Changed);
    if is_new && fits {
        state.note_fingerprint(vm, path, found)?;
    }
    Ok(())
}

fn unreadable(path: &Path, why: &str) -> Finding {
    Finding {
        severity: Severity::Error,
        path: path.to_owned(),
        code: "unreadable-layer",
        message: why.to_owned(),
        advice: "find out what uses it or what its disk says, and check again",
    }
}

fn failed(step: &str, source: StepError) -> Error {
    crate::create::step_error(step, source, Fate::Untouched)
}
