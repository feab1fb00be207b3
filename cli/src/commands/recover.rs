//! `snapctl recover`

use std::collections::BTreeSet;
use std::process::ExitCode;

use model::Name;
use serde_json::json;
use snapshot::Recovered;
use vm::State;

use crate::args::Recover;
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
    context.settle(vm, context.wait).await
}
