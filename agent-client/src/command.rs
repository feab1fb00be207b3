//! The QMP commands that snapctl uses, with replies that tolerate newer QEMUs.
//!
//! A command is any `qapi_spec::Command`, so the generated ones of `qapi-qmp` fit [`crate::Qmp::execute`]
//! too. The ones here differ in their replies: a value that a newer QEMU added to an enumeration is
//! text here, where the generated types fail the whole reply. `qapi_oracle` in the tests compares the
//! arguments with the generated types.

use qapi_spec::{Command, Empty};
use serde::{Deserialize, Serialize};
use serde_json::Value;

macro_rules! command {
    ($(#[$doc:meta])* $name:ident => $wire:literal -> $reply:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Serialize)]
        pub struct $name {}
        command!(@ $name, $wire, $reply);
    };
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty),+ $(,)? } => $wire:literal -> $reply:ty) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),+ }
        command!(@ $name, $wire, $reply);
    };
    (@ $name:ident, $wire:literal, $reply:ty) => {
        impl Command for $name {
            type Ok = $reply;
            const NAME: &'static str = $wire;
            const ALLOW_OOB: bool = false;
        }
    };
}

command!(
    /// Asks whether the guest runs. Source: qapi/run-state.json.
    QueryStatus => "query-status" -> RunState
);
command!(
    /// Asks for QEMU's own name of the VM. Source: qapi/misc.json.
    QueryName => "query-name" -> VmName
);
command!(
    /// Lists the drives that the guest or the user sees. Source: qapi/block-core.json.
    QueryBlock => "query-block" -> Vec<BlockInfo>
);
command!(
    /// Lists the nodes of the block graph. Source: qapi/block-core.json.
    QueryNamedBlockNodes {
        /// Leave out what is below each node.
        flat: bool,
    } => "query-named-block-nodes" -> Vec<BlockNode>
);
command!(
    /// Gives the edges of the block graph, which no stable command does before QEMU 10.1.
    /// Source: qapi/block-core.json, XDbgBlockGraph.
    QueryBlockGraph => "x-debug-query-block-graph" -> BlockGraph
);
command!(
    /// Lists the jobs. Source: qapi/job.json.
    QueryJobs => "query-jobs" -> Vec<JobInfo>
);
command!(
    /// Lists block jobs with the devices that they hold. Source: qapi/block-core.json.
    QueryBlockJobs => "query-block-jobs" -> Vec<BlockJobInfo>
);
command!(
    /// Asks how a migration goes. Source: qapi/migration.json.
    QueryMigrate => "query-migrate" -> MigrationInfo
);
command!(
    /// Starts a migration: what it writes can be kept in a file. Source: qapi/migration.json.
    Migrate {
        /// Where to: `fd:NAME`, `file:/dev/fdset/N`.
        uri: String,
    } => "migrate" -> Empty
);
command!(
    /// Breaks a migration off. Source: qapi/migration.json.
    MigrateCancel => "migrate_cancel" -> Empty
);
command!(
    /// Lets a migration go on that waits. Source: qapi/migration.json.
    MigrateContinue {
        /// MigrationStatus in which it waits.
        state: String,
    } => "migrate-continue" -> Empty
);
command!(
    /// Tells how migrations are done. Source: qapi/migration.json.
    QueryMigrateCapabilities => "query-migrate-capabilities" -> Vec<MigrationCapability>
);
command!(
    /// Sets how migrations are done. Source: qapi/migration.json.
    MigrateSetCapabilities {
        /// Those that are set; others stay.
        capabilities: Vec<MigrationCapability>,
    } => "migrate-set-capabilities" -> Empty
);
command!(
    /// Tells the limits of migrations. Source: qapi/migration.json.
    QueryMigrateParameters => "query-migrate-parameters" -> MigrationParameters
);
command!(
    /// Sets the limits of migrations. Source: qapi/migration.json.
    MigrateSetParameters {
        /// Bytes a second.
        max_bandwidth: u64,
    } => "migrate-set-parameters" -> Empty
);
command!(
    /// Tells how much memory the guest has. Source: qapi/machine.json.
    QueryMemorySizeSummary => "query-memory-size-summary" -> MemorySize
);
command!(
    /// Gives a property of an object. Source: qapi/qom.json.
    QomGet {
        /// The object.
        path: String,
        /// The property.
        property: String,
    } => "qom-get" -> Value
);
command!(
    /// Lists the properties of an object. Source: qapi/qom.json.
    QomList {
        /// The object.
        path: String,
    } => "qom-list" -> Vec<ObjectProperty>
);
command!(
    /// Lists the sets of descriptors that QEMU was given. Source: qapi/misc.json.
    QueryFdsets => "query-fdsets" -> Vec<FdsetInfo>
);
command!(
    /// Closes a set of descriptors, once nothing uses it. Source: qapi/misc.json.
    RemoveFd {
        /// The set.
        fdset_id: u64,
    } => "remove-fd" -> Empty
);
command!(
    /// Closes a descriptor that `getfd` gave and nothing took. Source: qapi/misc.json.
    CloseFd {
        /// Its name.
        fdname: String,
    } => "closefd" -> Empty
);
command!(
    /// Lists TPMs. Source: qapi/tpm.json.
    QueryTpm => "query-tpm" -> Vec<TpmInfo>
);
command!(
    /// Saves memory and disks inside qcow2 images. A job does it. Source: qapi/migration.json.
    SnapshotSave {
        /// The job's name.
        job_id: String,
        /// The snapshot's name inside the images.
        tag: String,
        /// The node that gets the memory.
        vmstate: String,
        /// The nodes.
        devices: Vec<String>,
    } => "snapshot-save" -> Empty
);
command!(
    /// Goes back to what was saved. A job does it. Source: qapi/migration.json.
    SnapshotLoad {
        /// The job's name.
        job_id: String,
        /// The snapshot's name inside the images.
        tag: String,
        /// The node that has the memory.
        vmstate: String,
        /// The nodes.
        devices: Vec<String>,
    } => "snapshot-load" -> Empty
);
command!(
    /// Deletes what was saved. A job does it. Source: qapi/migration.json.
    SnapshotDelete {
        /// The job's name.
        job_id: String,
        /// The snapshot's name inside the images.
        tag: String,
        /// The nodes.
        devices: Vec<String>,
    } => "snapshot-delete" -> Empty
);
command!(
    /// Lists character devices with their sockets. Source: qapi/char.json.
    QueryChardev => "query-chardev" -> Vec<ChardevInfo>
);
command!(
    /// Formats an image through a node. A job does it. Source: qapi/block-core.json.
    BlockdevCreate {
        /// The job's name.
        job_id: String,
        /// BlockdevCreateOptions.
        options: Value,
    } => "blockdev-create" -> Empty
);
command!(
    /// Copies what layers hold down into the lowest of them. A job does it. Source: qapi/block-core.json.
    BlockCommit {
        /// The job's name.
        job_id: String,
        /// The disk's topmost node.
        device: String,
        /// The highest of the layers; the active one if there is none.
        #[serde(skip_serializing_if = "Option::is_none")]
        top_node: Option<String>,
        /// The lowest of the layers, which takes the place of the highest.
        base_node: String,
        /// How the header of the layer above the highest names the lowest. Not for the active layer.
        #[serde(skip_serializing_if = "Option::is_none")]
        backing_file: Option<String>,
        /// Bytes a second; 0 means no limit.
        speed: u64,
        /// BlockdevOnError: what is done where a read or a write fails.
        on_error: String,
        /// Whether the graph changes as soon as everything is copied, or when `job-finalize` comes.
        auto_finalize: bool,
        /// Whether the job is forgotten as soon as it ended.
        auto_dismiss: bool,
    } => "block-commit" -> Empty
);
command!(
    /// Copies what lower layers hold up into a node. A job does it. Source: qapi/block-core.json.
    BlockStream {
        /// The job's name.
        job_id: String,
        /// The node that is filled.
        device: String,
        /// The node on which it stands afterwards; on none if there is none.
        #[serde(skip_serializing_if = "Option::is_none")]
        base_node: Option<String>,
        /// How its header names that.
        #[serde(skip_serializing_if = "Option::is_none")]
        backing_file: Option<String>,
        /// Bytes a second; 0 means no limit.
        speed: u64,
        /// BlockdevOnError: what is done where a read or a write fails.
        on_error: String,
        /// As for [`BlockCommit`].
        auto_finalize: bool,
        /// As for [`BlockCommit`].
        auto_dismiss: bool,
    } => "block-stream" -> Empty
);
command!(
    /// Copies a disk to another node, and lets that take its place. A job does it. Source: qapi/block-core.json.
    BlockdevMirror {
        /// The job's name.
        job_id: String,
        /// The disk's topmost node.
        device: String,
        /// The node that takes its place.
        target: String,
        /// The node whose place it takes, if that is not `device`.
        #[serde(skip_serializing_if = "Option::is_none")]
        replaces: Option<String>,
        /// MirrorSyncMode: what is copied beside new writes.
        sync: String,
        /// Whether the job is forgotten as soon as it ended.
        auto_dismiss: bool,
    } => "blockdev-mirror" -> Empty
);
command!(
    /// Resets the guest, as its reset button would. Source: qapi/machine.json.
    SystemReset => "system_reset" -> Empty
);
command!(
    /// Sets what QEMU does where its guest resets. Source: qapi/run-state.json.
    SetAction {
        /// RebootAction: `reset` or `shutdown`.
        reboot: String,
    } => "set-action" -> Empty
);
command!(
    /// Sets how much a block job may copy. Source: qapi/block-core.json.
    BlockJobSetSpeed {
        /// The job's name.
        device: String,
        /// Bytes a second; 0 means no limit.
        speed: u64,
    } => "block-job-set-speed" -> Empty
);
command!(
    /// Breaks a job off. Source: qapi/job.json.
    JobCancel {
        /// The job's name.
        id: String,
    } => "job-cancel" -> Empty
);
command!(
    /// Lets a job that is ready end: a commit of the active layer then pivots. Source: qapi/job.json.
    JobComplete {
        /// The job's name.
        id: String,
    } => "job-complete" -> Empty
);
command!(
    /// Lets a pending job change the graph. Source: qapi/job.json.
    JobFinalize {
        /// The job's name.
        id: String,
    } => "job-finalize" -> Empty
);
command!(
    /// Lets a paused job go on. Source: qapi/job.json.
    JobResume {
        /// The job's name.
        id: String,
    } => "job-resume" -> Empty
);
command!(
    /// Lets the guest stand still; every node is drained and flushed. Source: qapi/misc.json.
    Stop => "stop" -> Empty
);
command!(
    /// Lets the guest go on. Source: qapi/misc.json.
    Cont => "cont" -> Empty
);
command!(
    /// Runs a command of the human monitor, and gives what it prints. Source: qapi/misc.json.
    HumanMonitorCommand {
        /// The command.
        command_line: String,
    } => "human-monitor-command" -> String
);
command!(
    /// Ends a concluded job's memory. Source: qapi/job.json.
    JobDismiss {
        /// The job's name.
        id: String,
    } => "job-dismiss" -> Empty
);
command!(
    /// Removes a node that nothing uses. Source: qapi/block-core.json.
    BlockdevDel {
        /// The node.
        node_name: String,
    } => "blockdev-del" -> Empty
);
command!(
    /// Does several things at once, or none. Source: qapi/transaction.json.
    Transaction {
        /// What is done, in this order.
        actions: Vec<TransactionAction>,
    } => "transaction" -> Empty
);

/// Adds a node. Source: qapi/block-core.json, BlockdevOptions.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct BlockdevAdd(pub Value);

impl Command for BlockdevAdd {
    type Ok = Empty;
    const NAME: &'static str = "blockdev-add";
    const ALLOW_OOB: bool = false;
}

/// One action of a [`Transaction`].
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum TransactionAction {
    /// Makes `overlay`, opened with `backing: null`, the active layer above `node`.
    BlockdevSnapshot {
        /// The active layer until now: a node-name or a device.
        node: String,
        /// The node that takes its place.
        overlay: String,
    },
    /// Adds a dirty bitmap. Source: qapi/block-core.json, BlockDirtyBitmapAdd.
    BlockDirtyBitmapAdd {
        /// The node.
        node: String,
        /// The bitmap.
        name: String,
        /// Bytes for each bit.
        granularity: u32,
        /// Whether it is kept in the image when QEMU ends.
        persistent: bool,
        /// Whether it does not record writes.
        disabled: bool,
    },
    /// Adds to a dirty bitmap what others hold. Source: qapi/block-core.json, BlockDirtyBitmapMerge.
    BlockDirtyBitmapMerge {
        /// The node of the bitmap that is added to.
        node: String,
        /// That bitmap.
        target: String,
        /// The others.
        bitmaps: Vec<BitmapOfNode>,
    },
    /// Removes a dirty bitmap. Source: qapi/block-core.json, BlockDirtyBitmap.
    BlockDirtyBitmapRemove {
        /// The node.
        node: String,
        /// The bitmap.
        name: String,
    },
}

/// A dirty bitmap, wherever it is. Source: qapi/block-core.json, BlockDirtyBitmapOrStr.
#[derive(Clone, Debug, Serialize)]
pub struct BitmapOfNode {
    /// The node.
    pub node: String,
    /// The bitmap.
    pub name: String,
}

/// Whether the guest runs.
#[derive(Clone, Debug, Deserialize)]
pub struct RunState {
    /// Whether the vCPUs run.
    pub running: bool,
    /// RunState, for example `running`, `paused`, `inmigrate`.
    pub status: String,
}

/// QEMU's `-name`.
#[derive(Clone, Debug, Deserialize)]
pub struct VmName {
    /// Absent where QEMU was started without.
    pub name: Option<String>,
}

/// A drive.
#[derive(Clone, Debug, Deserialize)]
pub struct BlockInfo {
    /// The `-drive` id, empty for a drive made of `-blockdev` and `-device`.
    #[serde(default)]
    pub device: String,
    /// The device's QOM path or id.
    pub qdev: Option<String>,
    /// Whether the medium can be taken out.
    #[serde(default)]
    pub removable: bool,
    /// The medium, if there is one.
    pub inserted: Option<BlockNode>,
}

/// A node of the block graph.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockNode {
    /// Its name; QEMU generates one (`#block123`) where the user gave none.
    pub node_name: Option<String>,
    /// Its block driver.
    pub drv: String,
    /// The file name that the node was opened with, as QEMU puts it together.
    #[serde(default)]
    pub file: String,
    /// Whether it is read-only.
    #[serde(default)]
    pub ro: bool,
    /// What it does with writes of zeroes: `off`, `on` or `unmap`.
    #[serde(default = "off", rename = "detect_zeroes")]
    pub detect_zeroes: String,
    /// Whether its content is encrypted.
    #[serde(default)]
    pub encrypted: bool,
    /// Dirty bitmaps on it.
    #[serde(default)]
    pub dirty_bitmaps: Vec<DirtyBitmap>,
    /// How the host's page cache is used.
    #[serde(default)]
    pub cache: CacheInfo,
    /// What it says of its image.
    pub image: ImageInfo,
}

fn off() -> String {
    "off".to_owned()
}

/// How a node uses the host's page cache.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CacheInfo {
    /// Past the page cache (`O_DIRECT`).
    #[serde(default)]
    pub direct: bool,
    /// Flush requests of the guest are ignored.
    #[serde(default)]
    pub no_flush: bool,
}

/// A dirty bitmap; its name is absent where a job made it. Source: qapi/block-core.json, BlockDirtyInfo.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct DirtyBitmap {
    /// The bitmap's name.
    pub name: Option<String>,
    /// Bytes for each bit.
    #[serde(default)]
    pub granularity: u32,
    /// Whether it records writes.
    #[serde(default)]
    pub recording: bool,
    /// Whether something uses it.
    #[serde(default)]
    pub busy: bool,
    /// Whether it is kept in the image when QEMU ends.
    #[serde(default)]
    pub persistent: bool,
    /// Whether QEMU did not keep it when it ended before, so that nobody knows what it should hold.
    #[serde(default)]
    pub inconsistent: bool,
}

/// An image as QEMU has it open.
///
/// What it says of a backing file is left out on purpose: the graph tells that.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The file name that the image was opened with.
    #[serde(default)]
    pub filename: String,
    /// Its format.
    pub format: String,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// The backing file as the image's header names it.
    pub backing_filename: Option<String>,
    /// The same, made absolute by QEMU.
    pub full_backing_filename: Option<String>,
    /// The backing format in the header.
    pub backing_filename_format: Option<String>,
    /// Snapshots inside it.
    #[serde(default)]
    pub snapshots: Vec<InternalSnapshot>,
    /// What only images of its format have.
    pub format_specific: Option<FormatSpecific>,
}

/// A snapshot inside an image. Source: qapi/block-core.json, SnapshotInfo.
#[derive(Clone, Debug, Deserialize)]
pub struct InternalSnapshot {
    /// Its name.
    pub name: String,
}

/// What only images of one format have. Source: qapi/block-core.json, ImageInfoSpecific.
#[derive(Clone, Debug, Deserialize)]
pub struct FormatSpecific {
    /// An object whose shape is the format's affair.
    #[serde(default)]
    pub data: Value,
}

impl ImageInfo {
    /// How a qcow2 image is encrypted: `luks` or `aes`.
    pub fn encryption(&self) -> Option<&str> {
        self.format_specific.as_ref()?.data.get("encrypt")?.get("format")?.as_str()
    }
}

/// The block graph as nodes and edges.
#[derive(Clone, Debug, Deserialize)]
pub struct BlockGraph {
    /// Nodes, devices and jobs.
    pub nodes: Vec<GraphNode>,
    /// Who uses whom.
    pub edges: Vec<GraphEdge>,
}

/// A vertex of the block graph.
#[derive(Clone, Debug, Deserialize)]
pub struct GraphNode {
    /// Its number in this reply.
    pub id: u64,
    /// `block-backend`, `block-job` or `block-driver`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The node-name, device name or job id.
    #[serde(default)]
    pub name: String,
}

/// An edge of the block graph.
#[derive(Clone, Debug, Deserialize)]
pub struct GraphEdge {
    /// The user's number.
    pub parent: u64,
    /// The used node's number.
    pub child: u64,
    /// The child's role: `file`, `backing`, `root` and others.
    pub name: String,
}

/// A job of any kind.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its name.
    pub id: String,
    /// JobType, for example `commit`, `create`.
    #[serde(rename = "type")]
    pub kind: String,
    /// JobStatus, for example `running`, `ready`, `concluded`.
    pub status: String,
    /// How far it is; what it means is the job's affair.
    #[serde(default)]
    pub current_progress: i64,
    /// Where that ends. It grows while a guest writes to what is being copied.
    #[serde(default)]
    pub total_progress: i64,
    /// Why it failed, once it is concluded.
    pub error: Option<String>,
}

/// A block job.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockJobInfo {
    /// The job's name.
    pub device: String,
    /// JobType.
    #[serde(rename = "type")]
    pub kind: String,
    /// BlockDeviceIoStatus: `ok`, `nospace` or `failed`.
    #[serde(default)]
    pub io_status: String,
}

/// How a migration goes.
#[derive(Clone, Debug, Deserialize)]
pub struct MigrationInfo {
    /// MigrationStatus; absent where there never was one.
    pub status: Option<String>,
    /// How much memory went.
    #[serde(default)]
    pub ram: MigrationRam,
    /// Why it failed, if QEMU tells.
    #[serde(rename = "error-desc")]
    pub error: Option<String>,
}

/// How much memory a migration has written. Source: qapi/migration.json, MigrationStats.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct MigrationRam {
    /// Pages.
    #[serde(default)]
    pub normal: u64,
    /// Pages of one byte only, zeroes mostly.
    #[serde(default)]
    pub duplicate: u64,
}

/// How migrations are done, in one respect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationCapability {
    /// MigrationCapability, a word of QEMU's.
    pub capability: String,
    /// Whether it is on.
    pub state: bool,
}

/// The limits of migrations.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// Bytes a second.
    pub max_bandwidth: u64,
}

/// How much memory the guest has, in bytes.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemorySize {
    /// From the start.
    pub base_memory: u64,
    /// Plugged in later.
    #[serde(default)]
    pub plugged_memory: u64,
}

/// A property of an object of QEMU's.
#[derive(Clone, Debug, Deserialize)]
pub struct ObjectProperty {
    /// Its name.
    pub name: String,
    /// Its type, for example `child<virtio-blk-pci>`.
    #[serde(rename = "type")]
    pub kind: String,
}

impl MigrationInfo {
    /// Whether a migration holds the VM now.
    ///
    /// Unknown words count as active: a new state of a newer QEMU is no reason to be bold.
    pub fn is_active(&self) -> bool {
        !matches!(self.status.as_deref(), None | Some("none" | "completed" | "failed" | "cancelled"))
    }
}

/// A set of descriptors.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdsetInfo {
    /// Its number.
    pub fdset_id: u64,
    /// What is in it.
    pub fds: Vec<FdsetFd>,
}

/// A descriptor in a set.
#[derive(Clone, Debug, Deserialize)]
pub struct FdsetFd {
    /// What its giver said of it.
    pub opaque: Option<String>,
}

/// A TPM.
#[derive(Clone, Debug, Deserialize)]
pub struct TpmInfo {
    /// Its back end.
    pub options: TpmOptions,
}

/// The back end of a TPM. Source: qapi/tpm.json, TpmTypeOptions.
#[derive(Clone, Debug, Deserialize)]
pub struct TpmOptions {
    /// What it needs.
    #[serde(default)]
    pub data: TpmBackend,
}

/// What the back end of a TPM needs.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct TpmBackend {
    /// The character device that leads to an emulator.
    pub chardev: Option<String>,
}

/// A character device.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChardevInfo {
    /// The chardev's id.
    pub label: String,
    /// Its other end, for example `disconnected:unix:/run/vm1/qga,server=on`.
    #[serde(default)]
    pub filename: String,
    /// Whether the guest has the port open.
    #[serde(default)]
    pub frontend_open: bool,
}
