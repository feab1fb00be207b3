//! `snapctl tree`

use std::path::Path;
use std::process::ExitCode;

use jiff::Timestamp;
use serde_json::json;
use snapshot::{DiskView, LayerView};

use crate::args::OneVm;
use crate::commands::vm::look;
use crate::context::Context;
use crate::{output, times};

pub async fn run(context: &Context, args: &OneVm) -> anyhow::Result<ExitCode> {
    context.definition(&args.vm)?;
    context.settle_or_tell(&args.vm, context.patience()).await;
    let seen = look(context, &args.vm).await?;
    let views = snapshot::disk_views(seen.machine.as_ref(), &seen.known);
    if context.json {
        output::document(
            "snapctl.tree/1",
            &json!({ "vm": args.vm, "running": seen.machine.is_some(), "disks": views }),
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    let state = if seen.machine.is_some() { "running" } else { "not running" };
    output::line(&format!("{} ({state})", args.vm))?;
    if views.is_empty() {
        context.note("no disks are known; snapctl sees them while the VM runs");
    }
    for (index, view) in views.iter().enumerate() {
        draw(view, index + 1 == views.len())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn draw(view: &DiskView, last: bool) -> anyhow::Result<()> {
    let (branch, stem) = if last { ("└─", "   ") } else { ("├─", "│  ") };
    let about = match (&view.fault, &view.left_out, view.layers.last()) {
        (Some(fault), ..) => format!("broken: {fault}"),
        (None, Some(why), _) => format!("left out: {why}"),
        (None, None, Some(active)) => format!("{}", active.virtual_size),
        (None, None, None) => String::new(),
    };
    output::line(&format!("{branch} {}  {about}", view.disk))?;
    let mut rows = Vec::new();
    for (index, layer) in view.layers.iter().enumerate() {
        let last = index + 1 == view.layers.len() && view.branches.iter().all(|branch| branch.on.is_some());
        rows.push(Row { indent: String::new(), last, layer });
        branches_on(view, Some(&layer.path), if last { "   " } else { "│  " }, &mut rows);
    }
    branches_on(view, None, "", &mut rows);
    print(stem, &rows)
}

/// One line of a drawing.
struct Row<'a> {
    indent: String,
    last: bool,
    layer: &'a LayerView,
}

/// Adds what stands on the layer at `on` beside the chain, with what stands on that in turn.
fn branches_on<'a>(view: &'a DiskView, on: Option<&Path>, indent: &str, rows: &mut Vec<Row<'a>>) {
    let branches: Vec<_> = view.branches.iter().filter(|branch| branch.on.as_deref() == on).collect();
    for (nth, branch) in branches.iter().enumerate() {
        for (index, layer) in branch.layers.iter().enumerate() {
            let last = index + 1 == branch.layers.len() && nth + 1 == branches.len();
            rows.push(Row { indent: indent.to_owned(), last, layer });
            let deeper = format!("{indent}{}", if last { "   " } else { "│  " });
            branches_on(view, Some(&layer.path), &deeper, rows);
        }
    }
}

fn print(stem: &str, rows: &[Row<'_>]) -> anyhow::Result<()> {
    let now = Timestamp::now();
    let twig = |row: &Row<'_>| format!("{}{}", row.indent, if row.last { "└─" } else { "├─" });
    let cells: Vec<[String; 4]> = rows
        .iter()
        .map(|row| {
            let [name, file, size, age] = cells(row.layer, now);
            [format!("{} {name}", twig(row)), file, size, age]
        })
        .collect();
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let [a, b, c] = [width(0), width(1), width(2)];
    cells.iter().try_for_each(|[name, file, size, age]| {
        output::line(format!("{stem}{name:a$}  {file:b$}  {size:>c$}  {age}").trim_end())
    })
}

/// What a layer holds, its file, what it takes, how old it is.
fn cells(layer: &LayerView, now: Timestamp) -> [String; 4] {
    let name = match (&layer.snapshot, layer.active) {
        (Some(name), true) => format!("● STALE ({name})"),
        (Some(name), false) if layer.protected => format!("{name} (protected)"),
        (Some(name), false) => name.to_string(),
        (None, true) => "● active".to_owned(),
        (None, false) => "(no snapshot)".to_owned(),
    };
    let inside: Vec<&str> = layer.inside.iter().map(model::Name::as_str).collect();
    let name = if inside.is_empty() { name } else { format!("{name} (inside: {})", inside.join(", ")) };
    let file = layer.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let age = layer.created.map(|created| times::ago(created, now)).unwrap_or_default();
    let seal = if !layer.active && !layer.sealed { ", not sealed" } else { "" };
    [name, file, layer.allocated.to_string(), format!("{age}{seal}")]
}
