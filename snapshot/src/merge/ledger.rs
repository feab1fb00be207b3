//! What the journal knows of merges that are under way, and what the catalogue makes of those that are done.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use model::{History, ImageFormat, Name};
use serde::{Deserialize, Serialize};
use storage::Inode;
use vm::Operation;

use super::forest::Merge;
use crate::create::fingerprint_of;

/// A merge that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InFlight {
    pub merge: Merge,
    /// The name of QEMU's job for it.
    pub job: String,
    pub stage: Stage,
}

/// How far it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stage", rename_all = "kebab-case")]
pub(super) enum Stage {
    /// The job may run, and may be done: the headers and QEMU tell.
    Begun,
    /// The commit of an active layer is done: where QEMU does not run any more, no header tells that.
    Pivoted,
    /// It is in the catalogue; these files are to be removed.
    Merged { remove: Vec<(PathBuf, Inode)> },
}

/// The journal entry of one operation, with the catalogue that it changes. Each change is one commit.
pub(super) struct Ledger<'a> {
    operation: Operation<'a>,
    vm: Name,
    pages: RefCell<Pages>,
}

struct Pages {
    history: History,
    in_flight: Vec<InFlight>,
}

impl<'a> Ledger<'a> {
    /// `history` is that of `vm` alone.
    pub fn new(operation: Operation<'a>, vm: &Name, history: History, in_flight: Vec<InFlight>) -> Self {
        Self { operation, vm: vm.clone(), pages: RefCell::new(Pages { history, in_flight }) }
    }

    /// Commits the history as it is; the first thing that an operation does.
    pub fn open(&self) -> Result<(), vm::Error> {
        self.write("merge.deleted")
    }

    /// Drops deleted snapshots of which nothing is left to be merged.
    pub fn drop_empty(&self) -> Result<(), vm::Error> {
        self.pages.borrow_mut().history.drop_empty();
        self.write("merge.deleted")
    }

    /// What is remembered of the VM now.
    pub fn history(&self) -> History {
        self.pages.borrow().history.clone()
    }

    /// The merge with this job, as the journal has it.
    pub fn in_flight(&self, job: &str) -> Option<InFlight> {
        self.pages.borrow().in_flight.iter().find(|other| other.job == job).cloned()
    }

    /// The merge is begun after this.
    pub fn begin(&self, in_flight: InFlight) -> Result<(), vm::Error> {
        self.pages.borrow_mut().in_flight.push(in_flight);
        self.write("merge.begun")
    }

    /// The guest writes to the survivor after this.
    pub fn pivoted(&self, job: &str) -> Result<(), vm::Error> {
        self.stage(job, &Stage::Pivoted);
        self.write("merge.pivoted")
    }

    /// The merge is done and durable; its files are removed after this.
    pub fn merged(&self, job: &str, merge: &Merge, remove: Vec<(PathBuf, Inode)>) -> Result<(), vm::Error> {
        self.stage(job, &Stage::Merged { remove });
        {
            let history = &mut self.pages.borrow_mut().history;
            enter(history, merge);
            note_changes(history, merge);
        }
        self.write("merge.entered")
    }

    /// The merge is not done, and is not tried again now. Something may have been copied.
    pub fn broken_off(&self, job: &str, merge: &Merge) -> Result<(), vm::Error> {
        note_changes(&mut self.pages.borrow_mut().history, merge);
        self.over(job, merge)
    }

    /// Nothing of the merge is left to be done. What it wrote to and snapshots hold is sealed again.
    pub fn over(&self, job: &str, merge: &Merge) -> Result<(), vm::Error> {
        renew_fingerprints(&mut self.pages.borrow_mut().history, merge);
        self.pages.borrow_mut().in_flight.retain(|other| other.job != job);
        self.write("merge.over")
    }

    /// Ends the operation, if nothing of it is under way.
    pub fn close(self) -> Result<(), vm::Error> {
        let Pages { history, in_flight } = self.pages.into_inner();
        match in_flight.is_empty() {
            true => self.operation.finish(&self.vm, &history),
            false => Ok(()),
        }
    }

    fn stage(&self, job: &str, stage: &Stage) {
        for other in self.pages.borrow_mut().in_flight.iter_mut().filter(|other| other.job == job) {
            other.stage = stage.clone();
        }
    }

    fn write(&self, step: &str) -> Result<(), vm::Error> {
        let pages = self.pages.borrow();
        self.operation.rewrite(step, &pages.in_flight, &self.vm, &pages.history)
    }
}

/// Makes the history what it is once the merge is done.
pub(super) fn enter(history: &mut History, merge: &Merge) {
    match merge {
        Merge::Commit { base, gone, .. } => {
            let was = sealed(history, base);
            let (format, mode) = was.unwrap_or((ImageFormat::Qcow2, None));
            // What passes down went to the deleted snapshots that held the lower ones; the top's stays.
            let (top, passing) =
                gone.split_last().map_or((None, [].as_slice()), |(top, rest)| (Some(top), rest));
            for path in std::iter::once(base).chain(passing) {
                history.forget_deleted(path);
            }
            for path in passing.iter().chain(top) {
                history.replace(path, base, format, mode);
            }
        }
        Merge::Stream { into, gone, keep: false, .. } => {
            for path in gone {
                history.forget_deleted(path);
            }
            for path in gone {
                history.replace(path, into, ImageFormat::Qcow2, None);
            }
        }
        Merge::Stream { into, .. } => {
            for head in history.heads.iter_mut().filter(|head| head.path == *into) {
                head.parent = None;
            }
        }
        Merge::Remove { path, .. } => {
            let next = history.layers().rfind(|(_, layer)| layer.path == *path);
            let next = next.map(|(_, layer)| layer.overlay.clone());
            history.forget_deleted(path);
            if let Some(next) = next {
                history.replace(path, &next, ImageFormat::Qcow2, None);
            }
        }
    }
}

/// Frozen layers that a merge wrote to: `snapctl check` has to know that this was right.
fn note_changes(history: &mut History, merge: &Merge) {
    let now = Timestamp::now();
    merge.written().for_each(|path| history.note_change(path, now));
}

fn renew_fingerprints(history: &mut History, merge: &Merge) {
    for path in merge.written() {
        let format = sealed(history, path).map(|(format, _)| format);
        let is_frozen = history.head(path).is_none();
        let taken = format.filter(|_| is_frozen).and_then(|format| fingerprint_of(path, format));
        if let Some(fingerprint) = taken {
            history.note_fingerprint(path, &fingerprint);
        }
    }
}

/// The format of a frozen layer, and its mode from before it was sealed.
pub(super) fn sealed(history: &History, path: &Path) -> Option<(ImageFormat, Option<u32>)> {
    history
        .layers()
        .rfind(|(_, layer)| layer.path == path)
        .map(|(_, layer)| (layer.format, layer.sealed_mode))
}
