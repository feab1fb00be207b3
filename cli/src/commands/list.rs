//! `snapctl list`

use std::process::ExitCode;

use model::{History, Name, SnapshotRecord};
use serde_json::json;
use vm::State;

use crate::args::List;
use crate::context::Context;
use crate::{output, times};

pub async fn run(context: &Context, args: &List) -> anyhow::Result<ExitCode> {
    let state = State::open_existing(&context.paths)?;
    let history = match &args.vm {
        Some(vm) => look(context, vm).await?,
        None => state.history(None)?,
    };
    let snapshots: Vec<&SnapshotRecord> = history.visible().collect();
    for pending in state.pending(None)?.iter().filter(|_| args.vm.is_none()) {
        let (kind, vm) = (&pending.kind, &pending.vm);
        context
            .note(&format!("note: an interrupted {kind} of {vm} waits; 'snapctl recover {vm}' settles it"));
    }
    if context.json {
        output::document("snapctl.snapshots/1", &json!({ "snapshots": snapshots }))?;
    } else if snapshots.is_empty() {
        context.note("no snapshots");
    } else {
        let rows = snapshots.into_iter().map(row).collect();
        output::table(&["vm", "name", "created", "consistency", "disks", "description"], &["disks"], rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What the catalogue knows of `vm`, with what was interrupted settled if nobody works there. It may be of a VM
/// that is not registered any more.
pub async fn look(context: &Context, vm: &Name) -> anyhow::Result<History> {
    if let Err(unknown) = context.definition(vm) {
        let known = State::open_existing(&context.paths)?.history(Some(vm))?;
        return if known.snapshots.is_empty() { Err(unknown.into()) } else { Ok(known) };
    }
    context.settle_or_tell(vm, context.wait).await;
    Ok(State::open_existing(&context.paths)?.history(Some(vm))?)
}

/// How many disks it holds.
fn disks(snapshot: &SnapshotRecord) -> usize {
    snapshot.disks.len() + snapshot.internal.as_ref().map_or(0, |internal| internal.disks.len())
}

/// Whether it holds the memory, and where.
fn memory(snapshot: &SnapshotRecord) -> &'static str {
    match (&snapshot.memory, &snapshot.internal) {
        (Some(_), _) => ", memory",
        (None, Some(_)) => ", memory, inside",
        (None, None) => "",
    }
}

fn row(snapshot: &SnapshotRecord) -> Vec<String> {
    vec![
        snapshot.vm.to_string(),
        snapshot.name.to_string() + if snapshot.protected { " (protected)" } else { "" },
        times::local(snapshot.created),
        snapshot.consistency.as_str().to_owned() + memory(snapshot),
        disks(snapshot).to_string(),
        snapshot.description.as_deref().map(|text| agent_client::printable(text, 60)).unwrap_or_default(),
    ]
}
