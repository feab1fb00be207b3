//! `snapctl protect` and `snapctl unprotect`

use std::process::ExitCode;

use serde_json::json;
use snapshot::find_snapshot;
use vm::State;

use crate::args::Protect;
use crate::context::Context;
use crate::output;

pub async fn run(context: &Context, args: &Protect, protected: bool) -> anyhow::Result<ExitCode> {
    context.definition(&args.vm)?;
    // A deletion that is under way has looked already.
    let _lock = vm::lock(&context.paths, &args.vm, context.patience()).await?;
    let state = State::open(&context.paths)?;
    let known = state.history(Some(&args.vm))?;
    let found: Result<Vec<_>, _> =
        args.snapshots.iter().map(|wanted| find_snapshot(&args.vm, &known, wanted)).collect();
    let mut told = Vec::new();
    for snapshot in found? {
        let is_new = state.protect(&args.vm, snapshot.id, protected)?;
        told.push((snapshot, is_new));
    }
    if context.json {
        let snapshots: Vec<_> = told
            .iter()
            .map(|(snapshot, new)| json!({ "id": snapshot.id, "name": snapshot.name, "new": new }))
            .collect();
        let content = json!({ "vm": args.vm, "protected": protected, "snapshots": snapshots });
        output::document("snapctl.protect/1", &content)?;
        return Ok(ExitCode::SUCCESS);
    }
    for (snapshot, is_new) in told {
        let now = if protected { "protected" } else { "not protected" };
        let before = if is_new { "now" } else { "already" };
        output::line(&format!("{}: snapshot {} is {before} {now}", args.vm, snapshot.name))?;
    }
    Ok(ExitCode::SUCCESS)
}
