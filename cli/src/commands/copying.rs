//! `snapctl revert --to-new DIR`

use std::path::Path;
use std::process::ExitCode;

use serde_json::json;
use snapshot::{CopyRequest, Interrupt, plan_copy};
use vm::State;

use super::create::{interrupted, watch_signals};
use crate::args::Revert;
use crate::context::Context;
use crate::output;

/// Copies the snapshot, and leaves the VM alone.
pub async fn run(context: &Context, args: &Revert, dir: &Path) -> anyhow::Result<ExitCode> {
    let interrupt = Interrupt::default();
    let signalled = watch_signals(&interrupt.flag())?;
    context.definition(&args.vm)?;
    context.settle_or_tell(&args.vm, context.wait).await;
    let _lock = tokio::select! {
        lock = vm::lock(&context.paths, &args.vm, context.wait) => lock?,
        signal = signalled => return Err(interrupted(signal.unwrap_or(0))),
    };
    let known = State::open_existing(&context.paths)?.history(Some(&args.vm))?;
    let dir = std::path::absolute(dir)?;
    let request = CopyRequest { snapshot: args.snapshot.clone(), disks: args.disks.clone(), dir };
    if args.dry_run {
        let plan = plan_copy(&args.vm, &known, &request)?;
        let headline = format!("{}: snapshot {} would be copied like this:", plan.vm, plan.snapshot.name);
        output::plan(context.json, &headline, &plan, &plan.steps())?;
        return Ok(ExitCode::SUCCESS);
    }
    let plan = snapshot::copy(&args.vm, &known, &request, &context.tools().tie, &interrupt).await?;
    if context.json {
        output::document("snapctl.copy/1", &json!({ "plan": plan }))?;
    } else {
        let (vm, name, dir) = (&plan.vm, &plan.snapshot.name, plan.dir.display());
        output::line(&format!("{vm}: snapshot {name} is copied into {dir}; the VM is as it was"))?;
        for disk in &plan.disks {
            output::line(&format!("  {}: {}", disk.disk, disk.to.display()))?;
        }
        for (_, to) in &plan.files {
            output::line(&format!("  {}", to.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
