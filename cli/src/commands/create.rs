//! `snapctl create`

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use model::{CopyMethod, PlannedStep, PlatformKind, SnapshotRecord};
use serde::Serialize;
use serde_json::json;
use snapshot::{CreatePlan, CreateRequest, Created, Interrupt, create_aside, plan_aside, plan_create};
use tokio::signal::unix::{SignalKind, signal};
use vm::State;

use super::inside;
use crate::args::{Create, Method};
use crate::context::Context;
use crate::failure::code;
use crate::{output, times};

pub async fn run(context: &Context, args: &Create) -> anyhow::Result<ExitCode> {
    let interrupt = Interrupt::default();
    let signalled = watch_signals(&interrupt.flag())?;
    context.definition(&args.vm)?;
    let state = State::open(&context.paths)?;
    // Until the plan is journalled nothing is made, so a signal may simply end the wait.
    let session = tokio::select! {
        session = context.session(&args.vm, &state) => session?,
        signal = signalled => return Err(interrupted(signal.unwrap_or(0))),
    };
    let request = request(args)?;
    let wish = match args.method {
        Method::Internal => {
            return inside::create(context, args.dry_run, &session, &state, &request, &interrupt).await;
        }
        Method::Overlay => None,
        Method::Auto => Some(None),
        Method::Reflink => Some(Some(CopyMethod::Reflink)),
        Method::Thin => Some(Some(CopyMethod::Thin)),
    };
    let mut reason = None;
    if let Some(wish) = wish {
        match plan_aside(&session, &state, &request, wish).await? {
            Ok(plan) if args.dry_run => {
                print_plan(context, &plan.create, &plan, &plan.steps())?;
                return Ok(ExitCode::SUCCESS);
            }
            Ok(plan) => {
                let created = create_aside(&session, &state, &plan, &context.guards(), &interrupt).await?;
                return report(context, &created);
            }
            Err(why) => reason = Some(why),
        }
    }
    if args.dry_run {
        let plan = plan_create(&session, &state, &request).await?;
        print_plan(context, &plan, &plan, &plan.steps())?;
        if let Some(why) = reason {
            context.note(&format!("note: on overlays, since {why}"));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let created = snapshot::create(&session, &state, &request, &context.guards(), &interrupt).await?;
    let code = report(context, &created)?;
    if let Some(why) = reason {
        context.note(&format!("note: on overlays, since {why}"));
    }
    Ok(code)
}

/// Prints what was taken; the exit code tells whether somebody has to look.
pub fn report(context: &Context, created: &Created) -> anyhow::Result<ExitCode> {
    if let Err(fault) = print_created(context, created) {
        // A failure here must not read as one of the snapshot.
        let name = &created.record.name;
        output::note(&format!(
            "warning: snapshot {name} was taken, and its report could not be written: {fault}"
        ));
        return Ok(ExitCode::from(code::WARNINGS));
    }
    Ok(exit_code(created))
}

fn request(args: &Create) -> anyhow::Result<CreateRequest> {
    // A link may lead elsewhere tomorrow.
    let real = |dir: &PathBuf| dir.canonicalize().or_else(|_| std::path::absolute(dir));
    let overlay_dir = args.overlay_dir.as_ref().map(real).transpose()?;
    Ok(CreateRequest {
        name: args.name.clone(),
        description: args.description.clone(),
        labels: args.labels(),
        quiesce: args.quiesce(),
        mountpoints: args.mountpoints.clone(),
        disks: args.disks.clone(),
        max_freeze: args.max_freeze,
        sync_first: args.sync_first,
        memory: args.memory,
        overlay_dir,
    })
}

/// A point stands whatever the warnings are, and nothing is left to recover: the user has to look, no more.
fn exit_code(created: &Created) -> ExitCode {
    if created.warnings.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(code::WARNINGS) }
}

fn print_created(context: &Context, created: &Created) -> anyhow::Result<()> {
    let Created { record, skipped, warnings, .. } = created;
    if context.json {
        let content = json!({ "snapshot": record, "skipped": skipped, "warnings": warnings });
        return output::document("snapctl.create/1", &content);
    }
    output::line(&summary(record))?;
    for skip in skipped {
        context.note(&format!("note: {} is left out: {}", skip.disk, skip.reason));
    }
    if let Some(why) = &created.reason {
        context.note(&format!("note: the guest stood still meanwhile: {why}"));
    }
    for warning in warnings {
        output::note(&format!("warning: {warning}"));
    }
    Ok(())
}

fn summary(record: &SnapshotRecord) -> String {
    let inside = record.internal.as_ref().map_or(0, |internal| internal.disks.len());
    let disks = match record.disks.len() + inside {
        1 => "1 disk".to_owned(),
        count => format!("{count} disks"),
    };
    let freeze = record.freeze.as_ref().map_or_else(String::new, |freeze| {
        let plural = if freeze.filesystems == 1 { "" } else { "s" };
        format!(", {} file system{plural} frozen for {}", freeze.filesystems, times::seconds(freeze.window))
    });
    let inside = if inside > 0 { ", inside the images, with the memory" } else { "" };
    let memory = record.memory.as_ref().map_or_else(String::new, |memory| {
        let paused = times::seconds(memory.pause.unwrap_or_default());
        format!(
            ", with {} of memory ({}, the guest stood still for {paused})",
            memory.size,
            memory.method.as_str()
        )
    });
    let mut aside: Vec<&str> =
        record.disks.iter().filter_map(|disk| disk.copied).map(CopyMethod::as_str).collect();
    aside.dedup();
    let aside = match aside.as_slice() {
        [] => String::new(),
        some => format!(", copied by {}", some.join(" and ")),
    };
    let platform = platform(record).into_iter().map(|kind| format!(", with its {kind}")).collect::<String>();
    format!(
        "{}: snapshot {} of {disks}, {}-consistent{freeze}{aside}{platform}{memory}{inside}",
        record.vm,
        record.name,
        record.consistency.as_str()
    )
}

/// What was copied beside the disks.
pub fn platform(record: &SnapshotRecord) -> Vec<&'static str> {
    let mut kinds: Vec<&str> = record.platform.iter().map(|file| describe_kind(file.kind)).collect();
    kinds.dedup();
    kinds
}

fn describe_kind(kind: PlatformKind) -> &'static str {
    match kind {
        PlatformKind::Nvram => "firmware variables",
        PlatformKind::Tpm => "TPM state",
    }
}

/// Prints `document`, a plan that has `plan` in it.
fn print_plan(
    context: &Context,
    plan: &CreatePlan,
    document: &impl Serialize,
    steps: &[PlannedStep],
) -> anyhow::Result<()> {
    let headline = format!("{}: snapshot {} would be taken like this:", plan.vm, plan.name);
    output::plan(context.json, &headline, document, steps)?;
    if !context.json {
        for skip in &plan.skipped {
            context.note(&format!("note: {} is left out: {}", skip.disk, skip.reason));
        }
    }
    Ok(())
}

/// Notes a signal that asks to end, in `flag` at once; the returned channel wakes whoever can end while
/// it waits.
pub fn watch_signals(flag: &Arc<AtomicUsize>) -> anyhow::Result<tokio::sync::oneshot::Receiver<i32>> {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    for number in kinds.map(|kind| kind.as_raw_value()) {
        signal_hook::flag::register_usize(number, Arc::clone(flag), usize::try_from(number)?)?;
    }
    let [mut int, mut term, mut hup] = [signal(kinds[0])?, signal(kinds[1])?, signal(kinds[2])?];
    let (tell, told) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let kind = tokio::select! {
            _ = int.recv() => kinds[0],
            _ = term.recv() => kinds[1],
            _ = hup.recv() => kinds[2],
        };
        // Nobody waits for it any more: the steps look at the flag.
        let _ = tell.send(kind.as_raw_value());
    });
    Ok(told)
}

/// The error of a command that a signal ended before it made anything.
pub fn interrupted(signal: i32) -> anyhow::Error {
    snapshot::Error::Interrupted { signal, fate: snapshot::Fate::Untouched }.into()
}
