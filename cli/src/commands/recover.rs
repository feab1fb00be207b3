//! `snapctl recover`

use std::collections::BTreeSet;
use std::process::ExitCode;

use model::Name;
use serde_json::json;
use snapshot::{Interrupt, Limits, MergeRequest, Recovered};
use vm::State;

use super::create::watch_signals;
use super::merging;
use crate::args::{ProgressStyle, Recover};
use crate::context::Context;
use crate::output;

pub async fn run(context: &Context, args: &Recover) -> anyhow::Result<ExitCode> {
    let vms: Vec<Name> = match &args.vm {
        Some(vm) => vec![vm.clone()],
        None => {
            let pending = State::open_existing(&context.paths)?.pending(None)?;
            let vms: BTreeSet<Name> = pending.into_iter().map(|operation| operation.vm).collect();
            vms.into_iter().collect()
        }
    };
    let mut settled = Vec::new();
    let mut failed = None;
    for vm in &vms {
        match recover(context, vm).await {
            Ok(outcomes) => settled.extend(outcomes),
            // One VM that cannot be settled is no reason to leave the others.
            Err(fault) => {
                if let Some(earlier) = failed.replace(fault) {
                    context.note(&format!("snapctl: {earlier}"));
                }
            }
        }
    }
    if let Some(fault) = failed {
        return Err(fault);
    }
    if context.json {
        output::document("snapctl.recover/1", &json!({ "recovered": settled }))?;
    } else if settled.is_empty() {
        output::line("nothing was interrupted")?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn recover(context: &Context, vm: &Name) -> anyhow::Result<Vec<Recovered>> {
    context.definition(vm)?;
    let settled = context.settle(vm, context.wait).await?;
    merge_rest(context, vm).await?;
    Ok(settled)
}

/// Merges what interrupted deletions left; a command that only looks does not do that, since it takes long.
async fn merge_rest(context: &Context, vm: &Name) -> anyhow::Result<()> {
    let history = State::open_existing(&context.paths)?.history(Some(vm))?;
    if history.snapshots.iter().all(|snapshot| snapshot.deleted.is_none()) {
        return Ok(());
    }
    let interrupt = Interrupt::default();
    let signalled = watch_signals(&interrupt)?;
    let state = State::open(&context.paths)?;
    let reached = merging::reach(context, vm, &state, signalled).await?;
    let (limits, style) = (Limits::default(), ProgressStyle::Auto);
    let plan =
        merging::merge(context, &state, &reached, &MergeRequest::Collect, limits, style, &interrupt).await?;
    if !plan.disks.is_empty() {
        let removed: usize = plan.merges().map(|merge| merge.removed().len()).sum();
        context.note(&format!(
            "recovered: {removed} layers of deleted snapshots of {vm} are merged and removed now"
        ));
    }
    Ok(())
}
