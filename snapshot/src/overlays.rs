//! Making a snapshot's overlays ready, and taking them back.
//!
//! QEMU itself formats an overlay (`blockdev-create`) in an empty file that was made here with its base's
//! owner and mode: so its features are ones that this QEMU can read, no program has to be started for each
//! disk, and QEMU needs no right to make files.

use std::path::Path;
use std::time::Duration;

use agent_client::{
    BlockdevAdd, BlockdevCreate, BlockdevDel, JobDismiss, JobInfo, Qmp, QueryJobs, QueryNamedBlockNodes,
};
use host::files::parent;
use model::{ByteSize, ImageFormat};
use serde_json::json;
use storage::overlay::{self, Expected, OverlayError, RemovedOverlay};
use storage::qcow2::Encryption;
use storage::{Inode, space};
use tokio::time::{Instant, timeout};

use crate::aside;
use crate::error::StepError;
use crate::jobs::CONCLUDED;
use crate::plan::DiskPlan;

/// Overlays have clusters of 64 KiB, QEMU's default.
const CLUSTER_BITS: u32 = 16;
/// Room that has to be free for each overlay: its metadata, and some writes of the guest.
const ROOM: ByteSize = ByteSize(32 << 20);
/// How long to wait for an event before a job is looked at again.
const JOB_POLL: Duration = Duration::from_millis(5);
/// How long formatting the overlays, or breaking that off, may take: some metadata is written.
const JOB_LIMIT: Duration = Duration::from_secs(30);

/// How long QEMU may take for the key of one encrypted overlay: it makes that slow on purpose.
const KEY_LIMIT: Duration = Duration::from_secs(30);

/// How often an overlay is formatted at most. An attempt that fails takes some 20 ms, and most may fail.
const ATTEMPTS: u32 = 200;
/// QEMU measures how fast it makes keys, and fails where the system counted no time for what it tried. Source: crypto/pbkdf.c.
const PASSES: &str = "Unable to get accurate CPU usage";

type Events = tokio::sync::broadcast::Receiver<agent_client::Event>;

/// Makes sure that each overlay has room, all of those in one directory together.
pub(crate) fn require_room(disks: &[DiskPlan]) -> Result<(), StepError> {
    let dir_of = |disk: &DiskPlan| parent(&disk.overlay).to_owned();
    for disk in disks {
        let dir = dir_of(disk);
        let here = disks.iter().filter(|other| dir_of(other) == dir).count();
        let room = ROOM.0.saturating_mul(u64::try_from(here).unwrap_or(u64::MAX));
        space::require(&dir, ByteSize(room))?;
    }
    Ok(())
}

/// Makes the empty files. On an error, those that were made are in `made`.
pub(crate) fn make_files(disks: &[DiskPlan], made: &mut Vec<Inode>) -> Result<(), OverlayError> {
    for disk in disks {
        made.push(overlay::prepare(&disk.overlay, &disk.base)?.inode);
    }
    Ok(())
}

/// With what an overlay is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// With nothing below: a transaction puts it above a node that is there.
    Null,
    /// With the chain that its header names.
    Chain,
}

/// Lets QEMU format and open the overlays, all at once.
pub(crate) async fn open(qmp: &Qmp, disks: &[DiskPlan], backing: Backing) -> Result<(), StepError> {
    let mut events = qmp.events();
    for disk in disks {
        qmp.execute(&BlockdevAdd(protocol(disk, "file"))).await?;
        qmp.execute(&BlockdevCreate { job_id: job(disk), options: format_options(disk) }).await?;
    }
    wait_for_jobs(qmp, disks, &mut events).await?;
    for disk in disks {
        let mut format = format(disk, ImageFormat::Qcow2);
        match (backing, &disk.backing) {
            (Backing::Null, _) => format["backing"] = serde_json::Value::Null,
            (Backing::Chain, Some(chain)) => format["backing"] = chain.clone(),
            (Backing::Chain, None) => {}
        }
        qmp.execute(&BlockdevAdd(format)).await?;
    }
    Ok(())
}

/// Lets QEMU open layers that are there already: copies that disks go on in.
pub(crate) async fn open_renewed<'a>(
    qmp: &Qmp,
    disks: impl IntoIterator<Item = &'a DiskPlan>,
) -> Result<(), StepError> {
    for disk in disks {
        qmp.execute(&BlockdevAdd(protocol(disk, driver(&disk.overlay)))).await?;
        qmp.execute(&BlockdevAdd(format(disk, disk.format))).await?;
    }
    Ok(())
}

/// Reads the headers back and makes the files durable: once the guest writes to them, they have to be
/// there after a power cut.
pub(crate) fn verify(disks: &[DiskPlan]) -> Result<(), StepError> {
    for disk in disks {
        let expected = Expected {
            backing: overlay::backing_name(&disk.base, &disk.overlay),
            backing_format: disk.format,
            virtual_size: disk.virtual_size,
            cluster_bits: CLUSTER_BITS,
            encryption: if disk.options.key_secret.is_some() { Encryption::Luks } else { Encryption::None },
        };
        overlay::verify_header(&disk.overlay, &expected)?;
        overlay::make_durable(&disk.overlay)?;
    }
    Ok(())
}

/// Closes what QEMU has open of the plan, if it has. Returns what could not be closed.
pub(crate) async fn close(qmp: &Qmp, disks: &[DiskPlan]) -> Vec<String> {
    if let Err(fault) = end_jobs(qmp, disks).await {
        return vec![format!("the overlays, which QEMU formats ({fault})")];
    }
    let mut left = Vec::new();
    let nodes = match qmp.execute(&QueryNamedBlockNodes { flat: true }).await {
        Ok(nodes) => nodes,
        Err(fault) => return vec![format!("the nodes of its overlays ({fault})")],
    };
    let is_there = |name: &str| nodes.iter().any(|node| node.node_name.as_deref() == Some(name));
    for node in disks.iter().rev().flat_map(|disk| [&disk.overlay_node, &disk.file_node]) {
        if is_there(node)
            && let Err(fault) = qmp.execute(&BlockdevDel { node_name: node.clone() }).await
        {
            left.push(format!("node {node} ({fault})"));
        }
    }
    left
}

/// Removes the overlays' files that were made by this operation. Returns what could not be removed.
pub(crate) fn remove_files(disks: &[DiskPlan], made: &[Inode]) -> Vec<String> {
    remove(disks, |index, _| made.get(index).copied())
}

/// As [`remove_files`], for an operation that died: it may have made empty files and not come to note them.
pub(crate) fn remove_noted_or_empty(disks: &[DiskPlan], noted: &[Inode]) -> Vec<String> {
    remove(disks, |index, disk| noted.get(index).copied().or_else(|| empty_file(&disk.overlay)))
}

fn remove(disks: &[DiskPlan], ours: impl Fn(usize, &DiskPlan) -> Option<Inode>) -> Vec<String> {
    let mut left = Vec::new();
    for (index, disk) in disks.iter().enumerate().rev() {
        if aside::is_device(&disk.overlay) {
            left.extend(aside::remove_device(&disk.overlay).err().map(|fault| fault.to_string()));
            continue;
        }
        let Some(inode) = ours(index, disk) else { continue };
        match overlay::remove_if_ours(&disk.overlay, inode) {
            Ok(RemovedOverlay::Removed | RemovedOverlay::AlreadyGone) => {}
            Ok(RemovedOverlay::NotOurs(_)) => {
                left.push(format!("{} (replaced by somebody)", disk.overlay.display()));
            }
            Err(fault) => left.push(fault.to_string()),
        }
    }
    left
}

fn empty_file(path: &Path) -> Option<Inode> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    (metadata.is_file() && metadata.len() == 0).then(|| Inode::of(&metadata))
}

/// QEMU's driver for a layer's file or device.
pub(crate) fn driver(path: &Path) -> &'static str {
    if aside::is_device(path) { "host_device" } else { "file" }
}

fn protocol(disk: &DiskPlan, driver: &str) -> serde_json::Value {
    json!({
        "driver": driver,
        "node-name": disk.file_node,
        "filename": disk.overlay,
        "discard": "unmap",
        "cache": cache(disk),
    })
}

fn format(disk: &DiskPlan, format: ImageFormat) -> serde_json::Value {
    let mut options = json!({
        "driver": format,
        "node-name": disk.overlay_node,
        "file": disk.file_node,
        "discard": "unmap",
        "detect-zeroes": disk.options.detect_zeroes,
        "cache": cache(disk),
    });
    if let Some(secret) = &disk.options.key_secret {
        options["encrypt"] = encrypt(secret);
    }
    options
}

fn job(disk: &DiskPlan) -> String {
    format!("{}c", disk.overlay_node)
}

fn cache(disk: &DiskPlan) -> serde_json::Value {
    json!({ "direct": disk.options.direct, "no-flush": disk.options.no_flush })
}

/// Source: qapi/block-core.json, BlockdevCreateOptionsQcow2.
fn format_options(disk: &DiskPlan) -> serde_json::Value {
    let mut options = json!({
        "driver": "qcow2",
        "file": disk.file_node,
        "size": disk.virtual_size,
        "cluster-size": 1_u64 << CLUSTER_BITS,
        "backing-file": overlay::backing_name(&disk.base, &disk.overlay),
        "backing-fmt": disk.format,
    });
    if let Some(secret) = &disk.options.key_secret {
        options["encrypt"] = encrypt(secret);
    }
    options
}

/// Source: qapi/block-core.json, BlockdevQcow2Encryption and QCryptoBlockCreateOptions.
pub(crate) fn encrypt(key_secret: &str) -> serde_json::Value {
    json!({ "format": "luks", "key-secret": key_secret })
}

/// Breaks off the plan's jobs that still run, and forgets them all.
async fn end_jobs(qmp: &Qmp, disks: &[DiskPlan]) -> Result<(), StepError> {
    let mut events = qmp.events();
    for running in jobs_of(qmp, disks).await?.iter().filter(|job| job.status != CONCLUDED) {
        match qmp.execute_raw("job-cancel", json!({ "id": running.id })).await {
            // It may have ended meanwhile; whether it has is looked at below.
            Err(fault) if !fault.is_refusal() => return Err(fault.into()),
            _ => {}
        }
    }
    for ended in concluded_jobs(qmp, disks, &mut events).await? {
        qmp.execute(&JobDismiss { id: ended.id }).await?;
    }
    Ok(())
}

/// Waits until every overlay is formatted, and lets QEMU forget the jobs. One that failed for a reason that passes is tried
/// again.
async fn wait_for_jobs(qmp: &Qmp, disks: &[DiskPlan], events: &mut Events) -> Result<(), StepError> {
    for attempt in 1.. {
        let mut again = Vec::new();
        for ended in concluded_jobs(qmp, disks, events).await? {
            match ended.error {
                Some(error) if attempt < ATTEMPTS && error.contains(PASSES) => again.push(ended.id.clone()),
                Some(error) => return Err(StepError::Job { job: ended.id, error }),
                None => {}
            }
            qmp.execute(&JobDismiss { id: ended.id }).await?;
        }
        for disk in disks.iter().filter(|disk| again.contains(&job(disk))) {
            qmp.execute(&BlockdevCreate { job_id: job(disk), options: format_options(disk) }).await?;
        }
        if again.is_empty() {
            break;
        }
    }
    Ok(())
}

/// Waits until none of the plan's jobs runs, and returns those that QEMU remembers.
async fn concluded_jobs(
    qmp: &Qmp,
    disks: &[DiskPlan],
    events: &mut Events,
) -> Result<Vec<JobInfo>, StepError> {
    let encrypted = disks.iter().filter(|disk| disk.options.key_secret.is_some()).count();
    let limit = JOB_LIMIT + KEY_LIMIT.saturating_mul(u32::try_from(encrypted).unwrap_or(u32::MAX));
    let deadline = Instant::now() + limit;
    loop {
        let jobs = jobs_of(qmp, disks).await?;
        let Some(running) = jobs.iter().find(|job| job.status != CONCLUDED) else { return Ok(jobs) };
        if Instant::now() >= deadline {
            return Err(StepError::JobSlow { job: running.id.clone(), after: limit });
        }
        // An event only wakes up early; what counts is what `query-jobs` says.
        let _ = timeout(JOB_POLL, events.recv()).await;
    }
}

async fn jobs_of(qmp: &Qmp, disks: &[DiskPlan]) -> Result<Vec<JobInfo>, StepError> {
    let mut jobs = qmp.execute(&QueryJobs {}).await?;
    jobs.retain(|known| disks.iter().any(|disk| known.id == job(disk)));
    Ok(jobs)
}
