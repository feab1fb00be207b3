//! Overlays for the bare client, and going back to one layer after each round.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tests::lab::{Guest, RawQmp};

/// Makes and opens one overlay for each disk, as snapctl would, and returns the transaction's text.
pub async fn prepare(guest: &Guest, qmp: &mut RawQmp) -> Result<String> {
    let mut actions = Vec::new();
    for (index, disk) in guest.disks().iter().enumerate() {
        let file = guest.dir().join(format!("bare-{index}.qcow2"));
        std::fs::File::create_new(&file)?;
        let (node, proto, job) = (format!("o{index}"), format!("o{index}f"), format!("j{index}"));
        qmp.call("blockdev-add", json!({"driver": "file", "node-name": proto, "filename": file})).await?;
        let options = json!({
            "driver": "qcow2", "file": proto, "size": disk.spec.size,
            "backing-file": disk.path, "backing-fmt": disk.spec.format.driver(),
        });
        qmp.call("blockdev-create", json!({"job-id": job, "options": options})).await?;
        wait_for(qmp, &job, "concluded").await?;
        qmp.call("job-dismiss", json!({"id": job})).await?;
        let overlay = json!({"driver": "qcow2", "node-name": node, "file": proto, "backing": null});
        qmp.call("blockdev-add", overlay).await?;
        let base = disk.node().context("the benchmark's disks have node-names")?;
        actions.push(json!({"type": "blockdev-snapshot", "data": {"node": base, "overlay": node}}));
    }
    Ok(json!({"execute": "transaction", "arguments": {"actions": actions}}).to_string())
}

/// Commits every overlay into its base and removes it, so that each round starts from one layer.
pub async fn collapse(guest: &Guest, qmp: &mut RawQmp) -> Result<()> {
    let blocks = qmp.call("query-block", json!({})).await?;
    let tops: Vec<&str> =
        values(&blocks).iter().filter_map(|block| block["inserted"]["node-name"].as_str()).collect();
    for (index, disk) in guest.disks().iter().enumerate() {
        let base = disk.node().context("the benchmark's disks have node-names")?;
        if tops.contains(&base.as_str()) {
            continue;
        }
        unseal(&disk.path)?;
        let top = top_of(&blocks, disk.id()).with_context(|| format!("no drive {}", disk.id()))?;
        let job = format!("c{index}");
        let arguments = json!({"job-id": job, "device": top, "base-node": base, "auto-dismiss": false});
        qmp.call("block-commit", arguments).await?;
        wait_for(qmp, &job, "ready").await?;
        qmp.call("job-complete", json!({"id": job})).await?;
        wait_for(qmp, &job, "concluded").await?;
        qmp.call("job-dismiss", json!({"id": job})).await?;
    }
    let nodes = qmp.call("query-named-block-nodes", json!({"flat": true})).await?;
    let files = overlays(&nodes);
    let mut names: Vec<&str> = values(&nodes).iter().filter_map(|node| node["node-name"].as_str()).collect();
    // Format nodes before the protocol nodes below them.
    names.sort_by_key(|name| name.ends_with('f'));
    for name in names.iter().filter(|name| is_overlay(name)) {
        qmp.call("blockdev-del", json!({"node-name": name})).await?;
    }
    files.iter().try_for_each(|file| std::fs::remove_file(file).with_context(|| file.display().to_string()))
}

/// Waits until a job has a status.
async fn wait_for(qmp: &mut RawQmp, job: &str, wanted: &str) -> Result<()> {
    loop {
        let jobs = qmp.call("query-jobs", json!({})).await?;
        let Some(found) = values(&jobs).iter().find(|found| found["id"] == job) else {
            bail!("job {job} is gone before it was {wanted}");
        };
        ensure!(found["error"].is_null(), "{found}");
        if found["status"] == wanted {
            return Ok(());
        }
        let _ = qmp.event("JOB_STATUS_CHANGE", Duration::from_millis(20)).await;
    }
}

fn top_of(blocks: &Value, id: &str) -> Option<String> {
    let of =
        |block: &&Value| block["qdev"].as_str().is_some_and(|qdev| qdev.split('/').any(|part| part == id));
    Some(values(blocks).iter().find(of)?["inserted"]["node-name"].as_str()?.to_owned())
}

/// The files of the overlays' protocol nodes.
fn overlays(nodes: &Value) -> Vec<PathBuf> {
    let of_file = |node: &&Value| node["drv"] == "file" && node["node-name"].as_str().is_some_and(is_overlay);
    values(nodes).iter().filter(of_file).filter_map(|node| node["file"].as_str().map(PathBuf::from)).collect()
}

/// snapctl's overlays are `s12345678-0`, the bare client's `o0`; the guest's own nodes are neither.
fn is_overlay(name: &str) -> bool {
    let number = |rest: &str| rest.trim_end_matches('f').parse::<u32>().is_ok();
    let ours = |rest: &str| rest.split_once('-').is_some_and(|(tag, index)| tag.len() == 8 && number(index));
    name.strip_prefix('s').is_some_and(ours) || name.strip_prefix('o').is_some_and(number)
}

fn unseal(path: &Path) -> Result<()> {
    // Fails where the file system has no such attribute, and then there is none to take away.
    let _ = Command::new("chattr").arg("-i").arg(path).output()?;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))?)
}

fn values(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}
