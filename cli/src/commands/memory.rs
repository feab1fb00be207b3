//! How a VM goes on with memory that was saved: its QEMU is started by others.

use std::path::Path;

use model::{MemoryLayout, MemoryRecord};
use snapshot::RevertPlan;

use crate::context::Context;

/// How to go on with the memory: it fits the disks as long as nothing has written to them since.
pub fn tell(context: &Context, plan: &RevertPlan, memory: &MemoryRecord) {
    if plan.is_online() {
        let (vm, name) = (&plan.vm, &plan.snapshot.name);
        context.note(&format!(
            "note: its memory was not loaded, and does not fit any more; to go on with it, stop the VM and run \
             'snapctl revert {vm} {name}' again"
        ));
        return;
    }
    let MemoryRecord { qemu, machine, .. } = memory;
    context.note(&format!(
        "note: to go on with its memory too, start QEMU {qemu} or later with -machine {machine}, the same devices, the disks \
         that 'snapctl disk path' tells, and: {}\n\
         note: when it is loaded, 'snapctl vm call {} cont' lets the guest go on",
        incoming(memory),
        plan.vm
    ));
}

/// What QEMU is to be given to load the memory.
fn incoming(memory: &MemoryRecord) -> String {
    let path = quoted(&memory.path);
    match memory.layout {
        MemoryLayout::Stream => format!("-incoming {}", quoted(Path::new(&format!("exec:zstd -dcq {path}")))),
        MemoryLayout::MappedRam => {
            let raw = memory.path.with_extension("");
            let file = quoted(Path::new(&format!("file:{}", raw.display())));
            let raw = quoted(&raw);
            format!("-global migration.mapped-ram=on -incoming {file}, behind: zstd -dqo {raw} {path}")
        }
    }
}

/// A word as a shell reads it.
fn quoted(word: &Path) -> String {
    let word = word.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:=@".contains(c);
    if word.chars().all(is_plain) { word } else { format!("'{}'", word.replace('\'', "'\\''")) }
}
