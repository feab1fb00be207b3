//! `snapctl delete` and `snapctl flatten`

use std::process::ExitCode;

use model::Name;
use serde_json::json;
use snapshot::{MergePlan, MergeRequest};

use super::merging;
use crate::args::{Delete, Flatten, Merging};
use crate::context::Context;
use crate::output;

pub async fn delete(context: &Context, args: &Delete) -> anyhow::Result<ExitCode> {
    let request = MergeRequest::Delete(args.snapshots.clone());
    run(context, &args.vm, &request, &args.merging, "snapctl.delete/1").await
}

pub async fn flatten(context: &Context, args: &Flatten) -> anyhow::Result<ExitCode> {
    let request = MergeRequest::Flatten(args.disks.clone());
    run(context, &args.vm, &request, &args.merging, "snapctl.flatten/1").await
}

async fn run(
    context: &Context,
    vm: &Name,
    request: &MergeRequest,
    merging: &Merging,
    schema: &str,
) -> anyhow::Result<ExitCode> {
    let begun = merging::begin(context, vm).await?;
    if merging.dry_run {
        merging::dry_run(context, &begun, request).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let plan = merging::merge(context, &begun, request, merging.limits(), merging.progress).await?;
    match context.json {
        true => output::document(schema, &json!({ "plan": plan, "copied": plan.copied() }))?,
        false => output::line(&summary(&plan))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn summary(plan: &MergePlan) -> String {
    let vm = &plan.vm;
    let names: Vec<&str> = plan.snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
    let removed: usize = plan.merges().map(|merge| merge.removed().len()).sum();
    let layers = match removed {
        1 => "1 layer removed".to_owned(),
        count => format!("{count} layers removed"),
    };
    match names.as_slice() {
        [] if plan.disks.is_empty() => format!("{vm}: already so"),
        [] => format!("{vm}: {} flattened, {layers}", disks(plan)),
        [one] => format!("{vm}: snapshot {one} deleted, {layers}"),
        several => format!("{vm}: snapshots {} deleted, {layers}", several.join(", ")),
    }
}

fn disks(plan: &MergePlan) -> String {
    plan.disks.iter().map(|disk| disk.disk.to_string()).collect::<Vec<_>>().join(", ")
}
