//! `snapctl disk`

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use model::ImageFormat;
use serde_json::json;
use snapshot::DiskView;
use vm::State;

use crate::args::{Disk, DiskPath, OneVm};
use crate::commands::vm::look;
use crate::context::Context;
use crate::output;

pub async fn run(context: &Context, command: Disk) -> anyhow::Result<ExitCode> {
    match command {
        Disk::List(args) => list(context, &args).await,
        Disk::Path(args) => path(context, &args).await,
    }
}

async fn list(context: &Context, args: &OneVm) -> anyhow::Result<ExitCode> {
    context.definition(&args.vm)?;
    context.settle_or_tell(&args.vm, context.patience()).await;
    let seen = look(context, &args.vm).await?;
    let views = snapshot::disk_views(seen.machine.as_ref(), &seen.known);
    if context.json {
        output::document("snapctl.disks/1", &json!({ "vm": args.vm, "disks": views }))?;
    } else if views.is_empty() {
        context.note("no disks are known; snapctl sees them while the VM runs");
    } else {
        let rows = views.iter().map(row).collect();
        output::table(&["disk", "size", "format", "layers", "active layer"], &["size", "layers"], rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(view: &DiskView) -> Vec<String> {
    let name = view.disk.to_string();
    match (view.active(), &view.fault, &view.left_out) {
        (Some(active), ..) => vec![
            name,
            active.virtual_size.to_string(),
            active.format.to_string(),
            view.layers.len().to_string(),
            active.path.display().to_string(),
        ],
        (None, fault, left_out) => {
            let why = fault.clone().or_else(|| left_out.clone()).unwrap_or_default();
            vec![name, String::new(), String::new(), String::new(), format!("({why})")]
        }
    }
}

async fn path(context: &Context, args: &DiskPath) -> anyhow::Result<ExitCode> {
    context.definition(&args.vm)?;
    // Start scripts rely on it: a path that may change yet is worse than none.
    context.settle(&args.vm, context.patience()).await?;
    let seen = look(context, &args.vm).await?;
    let views = snapshot::disk_views(seen.machine.as_ref(), &seen.known);
    let named: Vec<&DiskView> = views.iter().filter(|view| view.names.contains(&args.disk)).collect();
    if named.len() > 1 {
        let disks = named.iter().map(|view| view.disk.to_string()).collect();
        return Err(vm::Error::AmbiguousDisk { vm: args.vm.clone(), name: args.disk.clone(), disks }.into());
    }
    let found = named.first().copied();
    if let (None, None, Some(image)) = (&found, &seen.machine, &args.or) {
        return first_path(context, args, image);
    }
    let found = found.ok_or_else(|| vm::Error::NoSuchDisk {
        vm: args.vm.clone(),
        name: args.disk.clone(),
        known: views.iter().map(|view| view.disk.to_string()).collect(),
    })?;
    let Some(active) = found.active() else {
        let why = found.fault.clone().or_else(|| found.left_out.clone()).unwrap_or_default();
        anyhow::bail!("disk {} of {} has no active layer that snapctl knows: {why}", found.disk, args.vm);
    };
    let (path, format) = match &found.went_on_in {
        None => (&active.path, active.format),
        Some(next) => {
            let stale = active.path.display();
            output::note(&format!("warning: {} runs on {stale}, which a snapshot holds; stop it", args.vm));
            (next, seen.known.head(next).map_or(ImageFormat::Qcow2, |head| head.format))
        }
    };
    let blockdev = snapshot::blockdev(seen.machine.as_ref(), &seen.known, path, format)?;
    if context.json {
        let content = json!({
            "vm": args.vm, "disk": found.disk, "path": path, "format": format, "runs_on": active.path,
            "blockdev": blockdev,
        });
        output::document("snapctl.path/1", &content)?;
    } else if args.blockdev {
        output::line(&blockdev.to_string())?;
    } else {
        output::line(&path.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The way for a VM's first start: nothing is known of the disk by its name. Its image is still looked up, so
/// that one which snapshots hold is never printed.
fn first_path(context: &Context, args: &DiskPath, image: &Path) -> anyhow::Result<ExitCode> {
    let image = image.canonicalize().with_context(|| format!("--or {}", image.display()))?;
    let known = State::open_existing(&context.paths)?.history(None)?;
    let path = snapshot::went_on_in(&known, &image);
    if context.json {
        let format = known.head(path).map(|head| head.format);
        let content =
            json!({ "vm": args.vm, "disk": args.disk, "path": path, "format": format, "runs_on": null });
        output::document("snapctl.path/1", &content)?;
    } else {
        output::line(&path.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}
