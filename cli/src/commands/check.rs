//! `snapctl check`

use std::cell::RefCell;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use model::ByteSize;
use serde_json::json;
use snapshot::WatchReading;
use storage::chain::{Finding, Severity};

use crate::args::Check;
use crate::commands::vm::look;
use crate::context::Context;
use crate::failure::code;
use crate::line::Line;
use crate::output;

pub async fn run(context: &Context, args: &Check) -> anyhow::Result<ExitCode> {
    context.definition(&args.vm)?;
    context.settle_or_tell(&args.vm, context.patience()).await;
    let seen = look(context, &args.vm).await?;
    let views = snapshot::disk_views(seen.machine.as_ref(), &seen.known);
    let mut findings = snapshot::check_chains(seen.machine.as_ref(), &seen.known, &views);
    if args.deep {
        let reading = Reading::new(context);
        let deep = snapshot::check_deep(&context.paths, &args.vm, context.patience(), &views, &reading).await;
        reading.line.borrow_mut().clear();
        findings.extend(deep?);
    }
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

/// Shows how far the reading is.
struct Reading {
    shown: bool,
    line: RefCell<Line>,
}

impl Reading {
    fn new(context: &Context) -> Self {
        let shown = io::stderr().is_terminal() && !context.quiet && !context.json;
        Self { shown, line: RefCell::default() }
    }
}

impl WatchReading for Reading {
    fn progress(&self, path: &Path, done: ByteSize, size: ByteSize) {
        if self.shown {
            let percent = done.0.saturating_mul(100).checked_div(size.0).unwrap_or(0);
            self.line.borrow_mut().show(|| format!("{} {percent}% of {size}", path.display()));
        }
    }
}

fn exit_code(findings: &[Finding]) -> ExitCode {
    match findings.iter().map(|finding| finding.severity).max() {
        None | Some(Severity::Info) => ExitCode::SUCCESS,
        Some(Severity::Warning) => ExitCode::from(code::WARNINGS),
        Some(Severity::Error) => ExitCode::from(code::DAMAGE),
    }
}
