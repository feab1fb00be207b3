//! `snapctl recover`

use std::collections::BTreeSet;
use std::process::ExitCode;

use model::Name;
use serde_json::json;
use snapshot::{Limits, MergeRequest, Recovered};
use vm::State;

use super::merging;
use crate::args::{ProgressStyle, Recover};
use crate::context::Context;
use crate::failure::code;
use crate::{failure, output};

pub async fn run(context: &Context, args: &Recover) -> anyhow::Result<ExitCode> {
    let vms: Vec<Name> = match &args.vm {
        Some(vm) => vec![vm.clone()],
        None => {
            let state = State::open_existing(&context.paths)?;
            let interrupted = state.pending(None)?.into_iter().map(|operation| operation.vm);
            let unmerged = state.history(None)?.snapshots.into_iter().filter(|s| s.deleted.is_some());
            let vms: BTreeSet<Name> = interrupted.chain(unmerged.map(|snapshot| snapshot.vm)).collect();
            vms.into_iter().collect()
        }
    };
    let networks = match &args.vm {
        Some(_) => Vec::new(),
        None => super::net::recover(context).await?,
    };
    let mut settled = Vec::new();
    let mut failed = Vec::new();
    for vm in vms {
        match recover(context, &vm).await {
            Ok(outcomes) => settled.extend(outcomes),
            // One VM that cannot be settled is no reason to leave the others.
            Err(fault) => failed.push((vm, fault)),
        }
    }
    if context.json {
        let failed: Vec<_> = failed.iter().map(|(vm, fault)| failure::as_json(vm, fault)).collect();
        output::document(
            "snapctl.recover/1",
            &json!({ "recovered": settled, "networks": networks, "failed": failed }),
        )?;
    } else if settled.is_empty() && failed.is_empty() && networks.is_empty() {
        output::line("nothing was interrupted")?;
    }
    for name in &networks {
        context.note(&format!("recovered: what was interrupted on network {name} is taken away"));
    }
    // The first one's code; all of them are told.
    let codes: Vec<ExitCode> =
        failed.iter().map(|(_, fault)| failure::tell(fault, false, context.quiet)).collect();
    let frozen = settled.iter().any(|outcome| matches!(outcome, Recovered::MayBeFrozen { .. }));
    let otherwise = if frozen { ExitCode::from(code::THAW_UNCONFIRMED) } else { ExitCode::SUCCESS };
    Ok(codes.into_iter().next().unwrap_or(otherwise))
}

async fn recover(context: &Context, vm: &Name) -> anyhow::Result<Vec<Recovered>> {
    context.definition(vm).map_err(|unknown| not_registered(context, vm, unknown))?;
    let settled = context.settle(vm, context.wait).await?;
    merge_rest(context, vm).await?;
    Ok(settled)
}

/// What was interrupted on a VM that was unregistered since can be settled once its sockets are known again.
fn not_registered(context: &Context, vm: &Name, unknown: vm::Error) -> anyhow::Error {
    let pending = State::open_existing(&context.paths).and_then(|state| state.pending(Some(vm)));
    match pending.unwrap_or_default().first() {
        None => unknown.into(),
        Some(operation) => anyhow::Error::new(unknown).context(format!(
            "operation {} on {vm} ({}) was interrupted, and {vm} is not registered any more; register it again with 'snapctl vm add'",
            operation.id, operation.kind
        )),
    }
}

/// Merges what interrupted deletions left; a command that only looks does not do that, since it takes long.
async fn merge_rest(context: &Context, vm: &Name) -> anyhow::Result<()> {
    let history = State::open_existing(&context.paths)?.history(Some(vm))?;
    if history.snapshots.iter().all(|snapshot| snapshot.deleted.is_none()) {
        return Ok(());
    }
    let begun = merging::begin(context, vm).await?;
    let (limits, style) = (Limits::default(), ProgressStyle::Auto);
    let plan = merging::merge(context, &begun, &MergeRequest::Collect, limits, style).await?;
    if !plan.disks.is_empty() {
        let removed: usize = plan.merges().map(|merge| merge.removed().len()).sum();
        context.note(&format!(
            "recovered: {removed} layers of deleted snapshots of {vm} are merged and removed now"
        ));
    }
    Ok(())
}
