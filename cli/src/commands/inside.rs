//! `snapctl create --method internal`, and `snapctl revert` to what that made.

use std::process::ExitCode;

use model::{InternalRecord, SnapshotRecord};
use serde_json::json;
use snapshot::{
    CreateRequest, Interrupt, RevertRequest, Target, create_internal, plan_internal, plan_revert_internal,
    revert_internal,
};
use vm::{Session, State};

use super::create::report;
use crate::context::Context;
use crate::output;

/// Saves disks and memory inside the images.
pub async fn create(
    context: &Context,
    dry_run: bool,
    session: &Session,
    state: &State,
    request: &CreateRequest,
    interrupt: &Interrupt,
) -> anyhow::Result<ExitCode> {
    if dry_run {
        let plan = plan_internal(session, state, request).await?;
        let SnapshotRecord { vm, name, .. } = &plan.record;
        let headline = format!("{vm}: snapshot {name} would be taken like this:");
        output::plan(context.json, &headline, &plan, &plan.steps())?;
        return Ok(ExitCode::SUCCESS);
    }
    report(context, &create_internal(session, state, request, interrupt).await?)
}

/// Goes back inside the images.
pub async fn revert(
    context: &Context,
    dry_run: bool,
    target: &Target<'_>,
    state: &State,
    snapshot: &SnapshotRecord,
    internal: &InternalRecord,
    request: &RevertRequest,
) -> anyhow::Result<ExitCode> {
    if dry_run {
        let plan = plan_revert_internal(target, state, snapshot, internal, request).await?;
        let headline = format!("{}: it would go back to snapshot {} like this:", plan.vm, plan.snapshot.name);
        output::plan(context.json, &headline, &plan, &plan.steps())?;
        return Ok(ExitCode::SUCCESS);
    }
    let plan = revert_internal(target, state, snapshot, internal, request).await?;
    if context.json {
        output::document("snapctl.revert/1", &json!({ "plan": plan, "warnings": [] }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let guest = if plan.online { ", and its guest goes on from there" } else { "" };
    output::line(&format!("{}: went back to snapshot {}{guest}", plan.vm, plan.snapshot.name))?;
    match &plan.branch {
        Some(branch) => context.note(&format!("note: what was there is snapshot {} now", branch.name)),
        None => context.note("note: what was there is thrown away"),
    }
    if !plan.online {
        context.note(&format!(
            "note: to go on with its memory too, start QEMU with -loadvm {}",
            plan.internal.tag
        ));
    }
    Ok(ExitCode::SUCCESS)
}
