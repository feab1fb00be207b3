//! `snapctl show`

use std::process::ExitCode;

use model::{History, MemoryRecord, SnapshotRecord};
use serde_json::json;
use snapshot::find_snapshot;

use crate::args::Show;
use crate::commands::list::look;
use crate::context::Context;
use crate::{output, times};

pub async fn run(context: &Context, args: &Show) -> anyhow::Result<ExitCode> {
    let known = look(context, &args.vm).await?;
    let snapshot = find_snapshot(&args.vm, &known, &args.snapshot)?;
    if context.json {
        output::document("snapctl.snapshot/1", &json!({ "snapshot": snapshot }))?;
    } else {
        print(snapshot, &known)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print(snapshot: &SnapshotRecord, known: &History) -> anyhow::Result<()> {
    let freeze = snapshot.freeze.as_ref().map_or_else(
        || "none".to_owned(),
        |freeze| {
            let [window, freezing, switching, thawing] =
                [freeze.window, freeze.freezing, freeze.switching, freeze.thawing].map(times::seconds);
            let count = freeze.filesystems;
            let on = match freeze.mountpoints.as_slice() {
                [] => String::new(),
                some => agent_client::printable(&format!(" (of {})", some.join(", ")), 500),
            };
            format!("{count} file systems{on} for {window} (freezing {freezing}, switching {switching}, thawing {thawing})")
        },
    );
    let memory = snapshot.memory.as_ref().map_or_else(
        || if snapshot.internal.is_some() { "inside the first image" } else { "none" }.to_owned(),
        |memory| {
            let MemoryRecord { path, size, ram, method, qemu, machine, .. } = memory;
            let (path, method) = (path.display(), method.as_str());
            let paused = memory.pause.map_or_else(String::new, |pause| {
                format!(", the guest stood still for {}", times::seconds(pause))
            });
            format!("{path} ({size} of {ram}, saved {method} by QEMU {qemu} on {machine}{paused})")
        },
    );
    let parent = known.visible_parent(snapshot);
    let mut facts = vec![
        ("vm", snapshot.vm.to_string()),
        ("name", snapshot.name.to_string()),
        ("id", snapshot.id.to_string()),
        ("created", times::local(snapshot.created)),
        ("consistency", snapshot.consistency.as_str().to_owned()),
        ("freeze", freeze),
        ("memory", memory),
        ("parent", parent.map_or_else(|| "none".to_owned(), |parent| parent.name.to_string())),
    ];
    if snapshot.protected {
        facts.push(("protected", "yes; delete and prune leave it alone".to_owned()));
    }
    if let Some(text) = &snapshot.description {
        facts.push(("description", agent_client::printable(text, 1000)));
    }
    for (key, value) in &snapshot.labels {
        facts.push(("label", agent_client::printable(&format!("{key}={value}"), 200)));
    }
    if let Some(internal) = &snapshot.internal {
        let images = internal.disks.iter();
        facts.extend(images.map(|disk| {
            let (path, size) = (disk.path.display(), disk.virtual_size);
            ("disk", format!("{}: inside {path} ({size}), as {}", disk.disk, internal.tag))
        }));
    }
    for file in &snapshot.platform {
        facts.push((file.kind.as_str(), format!("{} as of {}", file.copy.display(), file.live.display())));
    }
    for layer in &snapshot.disks {
        let (path, format, size) = (layer.path.display(), layer.format, layer.virtual_size);
        facts.push(("disk", format!("{}: {path} ({format}, {size})", layer.disk)));
    }
    output::facts(&facts)
}
