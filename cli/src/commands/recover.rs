//! `snapctl recover`

use std::process::ExitCode;

use model::Name;
use serde_json::json;
use vm::State;

use crate::args::Recover;
use crate::context::Context;
use crate::output;

pub async fn run(context: &Context, args: &Recover) -> anyhow::Result<ExitCode> {
    let vms: Vec<Name> = match &args.vm {
        Some(vm) => vec![vm.clone()],
        None => {
            let pending = State::open_existing(&context.paths)?.pending(None)?;
            let mut vms: Vec<Name> = pending.into_iter().map(|operation| operation.vm).collect();
            vms.dedup();
            vms
        }
    };
    let mut settled = Vec::new();
    for vm in &vms {
        context.definition(vm)?;
        settled.extend(context.settle(vm).await?);
    }
    if context.json {
        output::document("snapctl.recover/1", &json!({ "recovered": settled }))?;
    } else if settled.is_empty() {
        output::line("nothing was interrupted")?;
    }
    Ok(ExitCode::SUCCESS)
}
