//! `snapctl check`

use std::process::ExitCode;

use serde_json::json;
use storage::chain::{Finding, Severity};

use crate::args::OneVm;
use crate::commands::vm::look;
use crate::context::Context;
use crate::failure::code;
use crate::output;

pub async fn run(context: &Context, args: &OneVm) -> anyhow::Result<ExitCode> {
    context.definition(&args.vm)?;
    context.settle_or_tell(&args.vm, context.patience()).await;
    let seen = look(context, &args.vm).await?;
    let views = snapshot::disk_views(seen.machine.as_ref(), &seen.known);
    let findings = snapshot::check_chains(seen.machine.as_ref(), &seen.known, &views);
    let layers: usize = views.iter().map(|view| view.all_layers().count()).sum();
    if context.json {
        let content = json!({ "vm": args.vm, "layers": layers, "findings": findings });
        output::document("snapctl.check/1", &content)?;
        return Ok(exit_code(&findings));
    }
    for finding in &findings {
        let severity = match finding.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Info => "info",
        };
        output::line(&format!(
            "{severity}: {}: {} [{}]",
            finding.path.display(),
            finding.message,
            finding.code
        ))?;
        output::line(&format!("  {}", finding.advice))?;
    }
    if views.is_empty() {
        let why =
            if seen.machine.is_some() { "it has no disks" } else { "it does not run and has no snapshots" };
        output::line(&format!("{}: nothing to check: {why}", args.vm))?;
        return Ok(exit_code(&findings));
    }
    let disks = views.iter().filter(|view| view.left_out.is_none()).count();
    let verdict = match findings.iter().map(|finding| finding.severity).max() {
        None | Some(Severity::Info) => "whole",
        Some(Severity::Warning) => "whole, with warnings",
        Some(Severity::Error) => "damaged",
    };
    output::line(&format!("{}: {disks} disks, {layers} layers: {verdict}", args.vm))?;
    Ok(exit_code(&findings))
}

fn exit_code(findings: &[Finding]) -> ExitCode {
    match findings.iter().map(|finding| finding.severity).max() {
        None | Some(Severity::Info) => ExitCode::SUCCESS,
        Some(Severity::Warning) => ExitCode::from(code::WARNINGS),
        Some(Severity::Error) => ExitCode::from(code::DAMAGE),
    }
}
