//! `snapctl revert`

use std::process::ExitCode;

use serde_json::json;
use snapshot::{RevertPlan, RevertRequest, Reverted, plan_revert};

use super::create::describe;
use super::merging::{self, Begun};
use crate::args::Revert;
use crate::context::Context;
use crate::failure::code;
use crate::output;

pub async fn run(context: &Context, args: &Revert) -> anyhow::Result<ExitCode> {
    let Begun { interrupt, state, reached } = merging::begin(context, &args.vm).await?;
    let request =
        RevertRequest { snapshot: args.snapshot.clone(), disks: args.disks.clone(), discard: args.discard };
    let target = reached.target(context);
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
    for warning in warnings {
        output::note(&format!("warning: {}", describe(warning)));
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
    let steps = plan.steps();
    if context.json {
        return output::document("snapctl.plan/1", &json!({ "plan": plan, "steps": steps }));
    }
    output::line(&format!("{}: it would go back to snapshot {} like this:", plan.vm, plan.snapshot.name))?;
    output::steps(&steps)?;
    context.note(&given_up(plan).replace(" is ", " would be "));
    tell_staying(context, plan);
    Ok(())
}
