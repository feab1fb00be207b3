//! `snapctl revert`

use std::process::ExitCode;

use serde_json::json;
use snapshot::{RevertPlan, RevertRequest, Reverted, find_snapshot, plan_revert};

use super::merging::{self, Begun};
use super::{copying, inside, memory};
use crate::args::Revert;
use crate::context::Context;
use crate::failure::code;
use crate::output;

pub async fn run(context: &Context, args: &Revert) -> anyhow::Result<ExitCode> {
    match &args.to_new {
        Some(dir) => copying::run(context, args, dir).await,
        None => revert(context, args).await,
    }
}

async fn revert(context: &Context, args: &Revert) -> anyhow::Result<ExitCode> {
    let Begun { interrupt, state, reached } = merging::begin(context, &args.vm).await?;
    let request =
        RevertRequest { snapshot: args.snapshot.clone(), disks: args.disks.clone(), discard: args.discard };
    let target = reached.target(context);
    let known = state.history(Some(&args.vm))?;
    let snapshot = find_snapshot(&args.vm, &known, &args.snapshot)?;
    if let Some(internal) = &snapshot.internal {
        return inside::revert(context, args.dry_run, &target, &state, snapshot, internal, &request).await;
    }
    if args.dry_run {
        print_plan(context, &plan_revert(&target, &state, &request).await?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let reverted = snapshot::revert(&target, &state, &request, &context.tools(), &interrupt).await?;
    print(context, &reverted)?;
    Ok(if reverted.warnings.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(code::WARNINGS) })
}

fn print(context: &Context, reverted: &Reverted) -> anyhow::Result<()> {
    let Reverted { plan, warnings } = reverted;
    if context.json {
        return output::document("snapctl.revert/1", &json!({ "plan": plan, "warnings": warnings }));
    }
    let guest = if plan.runs { ", and its guest starts again" } else { "" };
    output::line(&format!("{}: went back to snapshot {}{guest}", plan.vm, plan.snapshot.name))?;
    context.note(&given_up(plan));
    tell_staying(context, plan);
    for file in plan.platform.iter().filter(|_| plan.is_online()) {
        context.note(&format!(
            "note: {} stays as it is while the VM runs; stop the VM and run this again to go back with it too",
            file.live.display()
        ));
    }
    if let Some(memory) = &plan.memory {
        memory::tell(context, plan, memory);
    }
    for warning in warnings {
        output::note(&format!("warning: {warning}"));
    }
    Ok(())
}

/// What came after the snapshot, and where it is now.
fn given_up(plan: &RevertPlan) -> String {
    let disks: Vec<String> =
        plan.disks.iter().map(|disk| format!("{} ({})", disk.new.disk, disk.old_allocated)).collect();
    let what = format!("what was written last on {}", disks.join(", "));
    match &plan.branch {
        Some(branch) => format!("note: {what} is snapshot {} now", branch.name),
        None => format!("note: {what} is thrown away"),
    }
}

fn tell_staying(context: &Context, plan: &RevertPlan) {
    for disk in &plan.staying {
        context.note(&format!("note: {disk} stays as it is"));
    }
}

fn print_plan(context: &Context, plan: &RevertPlan) -> anyhow::Result<()> {
    let headline = format!("{}: it would go back to snapshot {} like this:", plan.vm, plan.snapshot.name);
    output::plan(context.json, &headline, plan, &plan.steps())?;
    if !context.json {
        context.note(&given_up(plan).replace(" is ", " would be "));
        tell_staying(context, plan);
    }
    Ok(())
}
