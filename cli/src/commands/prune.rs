//! `snapctl prune`

use std::process::ExitCode;

use jiff::tz::TimeZone;
use serde_json::json;
use snapshot::{MergePlan, MergeRequest, Verdict, judge, plan_merge};

use super::merging;
use crate::args::Prune;
use crate::context::Context;
use crate::{output, times};

pub async fn run(context: &Context, args: &Prune) -> anyhow::Result<ExitCode> {
    let begun = merging::begin(context, &args.vm).await?;
    let history = begun.state.history(Some(&args.vm))?;
    let verdicts = judge(history.visible(), &args.keep.rules(), &TimeZone::system());
    let going = verdicts.iter().filter(|verdict| !verdict.stays()).map(|verdict| verdict.id.to_string());
    let request = MergeRequest::Delete(going.collect());
    if !context.json {
        table(&verdicts)?;
    }
    let plan = match args.merging.dry_run {
        true => plan_merge(&begun.reached.target(context), &begun.state, &request).await?,
        false => {
            let (limits, style) = (args.merging.limits(), args.merging.progress);
            merging::merge(context, &begun, &request, limits, style).await?
        }
    };
    if context.json {
        let (pruned, copied) = (!args.merging.dry_run, plan.copied());
        let content =
            json!({ "vm": args.vm, "pruned": pruned, "snapshots": verdicts, "plan": plan, "copied": copied });
        output::document("snapctl.prune/1", &content)?;
    } else {
        output::line(&summary(&plan, &verdicts, args.merging.dry_run))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(verdicts: &[Verdict]) -> anyhow::Result<()> {
    if verdicts.is_empty() {
        return Ok(());
    }
    let row = |verdict: &Verdict| {
        let fate = if verdict.stays() { "keep" } else { "delete" };
        let name = verdict.name.to_string();
        vec![fate.to_owned(), name, times::local(verdict.created), verdict.kept_for.join(", ")]
    };
    output::table(&["", "name", "created", "kept for"], &[], verdicts.iter().map(row).collect())
}

fn summary(plan: &MergePlan, verdicts: &[Verdict], dry_run: bool) -> String {
    let (going, staying) = (plan.snapshots.len(), verdicts.iter().filter(|verdict| verdict.stays()).count());
    let vm = &plan.vm;
    match (going, dry_run) {
        (0, _) => format!("{vm}: nothing to prune, {staying} kept"),
        (_, true) => {
            format!(
                "{vm}: {going} would be deleted, {staying} kept; at most {} would be copied",
                plan.copied()
            )
        }
        (_, false) => {
            let removed: usize = plan.merges().map(|merge| merge.removed().len()).sum();
            format!("{vm}: {going} deleted, {staying} kept; {removed} layers removed")
        }
    }
}
