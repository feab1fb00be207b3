//! `snapctl revert`

use std::path::Path;
use std::process::ExitCode;

use model::{MemoryLayout, MemoryRecord, SnapshotRecord};
use serde_json::json;
use snapshot::{
    CopyRequest, Interrupt, RevertPlan, RevertRequest, Reverted, Target, find_snapshot, plan_copy,
    plan_revert, plan_revert_internal, revert_internal,
};
use vm::State;

use super::create::{interrupted, watch_signals};
use super::merging::{self, Begun};
use crate::args::Revert;
use crate::context::Context;
use crate::failure::code;
use crate::output;

pub async fn run(context: &Context, args: &Revert) -> anyhow::Result<ExitCode> {
    match &args.to_new {
        Some(dir) => copy(context, args, dir).await,
        None => revert(context, args).await,
    }
}

/// Copies the snapshot, and leaves the VM alone.
async fn copy(context: &Context, args: &Revert, dir: &Path) -> anyhow::Result<ExitCode> {
    let interrupt = Interrupt::default();
    let signalled = watch_signals(&interrupt)?;
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
        let steps = plan.steps();
        if context.json {
            output::document("snapctl.plan/1", &json!({ "plan": plan, "steps": steps }))?;
        } else {
            output::line(&format!(
                "{}: snapshot {} would be copied like this:",
                plan.vm, plan.snapshot.name
            ))?;
            output::steps(&steps)?;
        }
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

async fn revert(context: &Context, args: &Revert) -> anyhow::Result<ExitCode> {
    let Begun { interrupt, state, reached } = merging::begin(context, &args.vm).await?;
    let request =
        RevertRequest { snapshot: args.snapshot.clone(), disks: args.disks.clone(), discard: args.discard };
    let target = reached.target(context);
    let known = state.history(Some(&args.vm))?;
    let snapshot = find_snapshot(&args.vm, &known, &args.snapshot)?;
    if snapshot.internal.is_some() {
        return revert_inside(context, args, &target, &state, snapshot).await;
    }
    if args.dry_run {
        print_plan(context, &plan_revert(&target, &state, &request).await?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let reverted = snapshot::revert(&target, &state, &request, &context.tools(), &interrupt).await?;
    print(context, &reverted)?;
    Ok(if reverted.warnings.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(code::WARNINGS) })
}

/// Goes back inside the images.
async fn revert_inside(
    context: &Context,
    args: &Revert,
    target: &Target<'_>,
    state: &State,
    snapshot: &SnapshotRecord,
) -> anyhow::Result<ExitCode> {
    if args.dry_run {
        let plan = plan_revert_internal(target, state, snapshot, args.discard).await?;
        let steps = plan.steps();
        if context.json {
            output::document("snapctl.plan/1", &json!({ "plan": plan, "steps": steps }))?;
        } else {
            let (vm, name) = (&plan.vm, &plan.snapshot.name);
            output::line(&format!("{vm}: it would go back to snapshot {name} like this:"))?;
            output::steps(&steps)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let plan = revert_internal(target, state, snapshot, args.discard).await?;
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
        tell_memory(context, plan, memory);
    }
    for warning in warnings {
        output::note(&format!("warning: {warning}"));
    }
    Ok(())
}

/// How to go on with the memory: it fits the disks as long as nothing has written to them since.
fn tell_memory(context: &Context, plan: &RevertPlan, memory: &MemoryRecord) {
    if plan.is_online() {
        let (vm, name) = (&plan.vm, &plan.snapshot.name);
        context.note(&format!(
            "note: its memory was not loaded, and does not fit any more; to go on with it, stop the VM and run \
             'snapctl revert {vm} {name}' again"
        ));
        return;
    }
    let MemoryRecord { qemu, machine, .. } = memory;
    context.note(&format!(
        "note: to go on with its memory too, start QEMU {qemu} or later with -machine {machine}, the same devices, the disks \
         that 'snapctl disk path' tells, and: {}\n\
         note: when it is loaded, 'snapctl vm call {} cont' lets the guest go on",
        incoming(memory),
        plan.vm
    ));
}

/// What QEMU is to be given to load the memory.
fn incoming(memory: &MemoryRecord) -> String {
    let path = quoted(&memory.path);
    match memory.layout {
        MemoryLayout::Stream => format!("-incoming {}", quoted(Path::new(&format!("exec:zstd -dcq {path}")))),
        MemoryLayout::MappedRam => {
            let raw = memory.path.with_extension("");
            let file = quoted(Path::new(&format!("file:{}", raw.display())));
            let raw = quoted(&raw);
            format!("-global migration.mapped-ram=on -incoming {file}, behind: zstd -dqo {raw} {path}")
        }
    }
}

/// A word as a shell reads it.
fn quoted(word: &Path) -> String {
    let word = word.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:=@".contains(c);
    if word.chars().all(is_plain) { word } else { format!("'{}'", word.replace('\'', "'\\''")) }
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
