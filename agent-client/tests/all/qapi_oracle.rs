//! Our commands and replies beside the types that `qapi-qmp` and `qapi-qga` generate from QEMU's schema.
//!
//! What they say of QEMU 9.1 is what we send, and what a real QEMU answers is read alike by both. Where they
//! refuse what a newer QEMU says, `qapi_lessons` shows that we do not.

use std::fmt::Debug;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use agent_client::{
    Agent, BlockCommit, BlockJobSetSpeed, BlockStream, BlockdevAdd, BlockdevCreate, BlockdevDel,
    BlockdevMirror, CloseFd, Cont, FreezeStatus, HumanMonitorCommand, JobCancel, JobComplete, JobDismiss,
    JobFinalize, JobResume, Migrate, MigrateCancel, MigrateContinue, MigrateSetCapabilities,
    MigrateSetParameters, Qmp, QomGet, QomList, QueryBlock, QueryBlockGraph, QueryBlockJobs, QueryChardev,
    QueryFdsets, QueryJobs, QueryMemorySizeSummary, QueryMigrate, QueryMigrateCapabilities,
    QueryMigrateParameters, QueryName, QueryNamedBlockNodes, QueryStatus, QueryTpm, RemoveFd, SetAction,
    SnapshotDelete, SnapshotLoad, SnapshotSave, Stop, SystemReset, Transaction, decode,
};
use qapi_qga as qga;
use qapi_qmp as theirs;
use qapi_spec::Command;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::peer::{Step, play, send};
use crate::real_qemu::{Qemu, add_image, arguments};

const HANG: Duration = Duration::from_secs(60);

/// The generated types read `"backing": null`, which means none, as if it were not there, which means the
/// one in the image's header.
fn without_nulls(arguments: &Value) -> Value {
    let mut arguments = arguments.clone();
    if let Some(members) = arguments.as_object_mut() {
        members.retain(|_, value| !value.is_null());
    }
    arguments
}

/// Our name and arguments are what the generated command has, and it reads nothing into them or out of them.
fn same_command<Ours: Command, Theirs: Command + DeserializeOwned>() {
    assert_eq!(Ours::NAME, Theirs::NAME);
    let all = arguments();
    let mut same = all.iter().filter(|(name, _)| *name == Ours::NAME).peekable();
    assert!(same.peek().is_some(), "{} is not in the list of typed commands", Ours::NAME);
    for (name, arguments) in same {
        let read: Theirs =
            serde_json::from_value(arguments.clone()).unwrap_or_else(|f| panic!("{name}: {f}"));
        assert_eq!(serde_json::to_value(&read).unwrap(), without_nulls(arguments), "{name}");
    }
}

#[test]
fn commands_are_the_generated_ones() {
    same_command::<QueryStatus, theirs::query_status>();
    same_command::<QueryName, theirs::query_name>();
    same_command::<QueryBlock, theirs::query_block>();
    same_command::<QueryNamedBlockNodes, theirs::query_named_block_nodes>();
    same_command::<QueryBlockGraph, theirs::x_debug_query_block_graph>();
    same_command::<QueryJobs, theirs::query_jobs>();
    same_command::<QueryBlockJobs, theirs::query_block_jobs>();
    same_command::<QueryMigrate, theirs::query_migrate>();
    same_command::<SnapshotSave, theirs::snapshot_save>();
    same_command::<SnapshotLoad, theirs::snapshot_load>();
    same_command::<SnapshotDelete, theirs::snapshot_delete>();
    same_command::<QueryFdsets, theirs::query_fdsets>();
    same_command::<RemoveFd, theirs::remove_fd>();
    same_command::<CloseFd, theirs::closefd>();
    same_command::<QueryTpm, theirs::query_tpm>();
    same_command::<Migrate, theirs::migrate>();
    same_command::<MigrateCancel, theirs::migrate_cancel>();
    same_command::<MigrateContinue, theirs::migrate_continue>();
    same_command::<QueryMigrateCapabilities, theirs::query_migrate_capabilities>();
    same_command::<MigrateSetCapabilities, theirs::migrate_set_capabilities>();
    same_command::<QueryMigrateParameters, theirs::query_migrate_parameters>();
    same_command::<MigrateSetParameters, theirs::migrate_set_parameters>();
    same_command::<QueryMemorySizeSummary, theirs::query_memory_size_summary>();
    same_command::<QomGet, theirs::qom_get>();
    same_command::<QomList, theirs::qom_list>();
    same_command::<QueryChardev, theirs::query_chardev>();
    same_command::<BlockdevCreate, theirs::blockdev_create>();
    same_command::<JobDismiss, theirs::job_dismiss>();
    same_command::<JobCancel, theirs::job_cancel>();
    same_command::<JobComplete, theirs::job_complete>();
    same_command::<JobFinalize, theirs::job_finalize>();
    same_command::<JobResume, theirs::job_resume>();
    same_command::<BlockJobSetSpeed, theirs::block_job_set_speed>();
    same_command::<BlockCommit, theirs::block_commit>();
    same_command::<BlockStream, theirs::block_stream>();
    same_command::<BlockdevMirror, theirs::blockdev_mirror>();
    same_command::<SystemReset, theirs::system_reset>();
    same_command::<SetAction, theirs::set_action>();
    same_command::<Stop, theirs::stop>();
    same_command::<Cont, theirs::cont>();
    same_command::<HumanMonitorCommand, theirs::human_monitor_command>();
    same_command::<BlockdevDel, theirs::blockdev_del>();
    same_command::<BlockdevAdd, theirs::blockdev_add>();
    same_command::<Transaction, theirs::transaction>();
}

/// Asks a real QEMU, and reads the reply in both ways.
async fn both<Ours: Command, Theirs: Command>(qmp: &Qmp, ours: &Ours) -> (Ours::Ok, Theirs::Ok)
where
    Ours::Ok: Debug,
{
    let reply = qmp.execute_raw(Ours::NAME, serde_json::to_value(ours).unwrap()).await.unwrap();
    let theirs = serde_json::from_str(reply.get()).unwrap_or_else(|fault| panic!("{}: {fault}", Ours::NAME));
    (decode(Ours::NAME, &reply).unwrap(), theirs)
}

/// An enumeration of theirs as the text that we keep.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).unwrap().as_str().unwrap().to_owned()
}

#[tokio::test]
async fn replies_of_a_real_qemu_are_read_alike() {
    let qemu = Qemu::start();
    let qmp = qemu.connect().await;
    add_image(&qemu, &qmp, "base").await;
    add_image(&qemu, &qmp, "top").await;
    let bitmap = json!({ "node": "base", "name": "b0", "persistent": true });
    qmp.execute_raw("block-dirty-bitmap-add", bitmap).await.unwrap();
    qmp.execute_raw("blockdev-snapshot", json!({ "node": "base", "overlay": "top" })).await.unwrap();
    let stream = json!({ "device": "top", "job-id": "s", "auto-finalize": false, "auto-dismiss": false });
    qmp.execute_raw("block-stream", stream).await.unwrap();

    let (ours, generated) = both::<_, theirs::query_status>(&qmp, &QueryStatus {}).await;
    assert_eq!((ours.running, ours.status), (generated.running, word(&generated.status)));
    let (ours, generated) = both::<_, theirs::query_name>(&qmp, &QueryName {}).await;
    assert_eq!(ours.name, generated.name);
    let (ours, generated) = both::<_, theirs::query_block>(&qmp, &QueryBlock {}).await;
    assert_eq!(ours.len(), generated.len());
    let (ours, generated) = both::<_, theirs::query_migrate>(&qmp, &QueryMigrate {}).await;
    assert_eq!(ours.status, generated.status.map(|status| word(&status)));

    let flat = QueryNamedBlockNodes { flat: true };
    let (ours, generated) = both::<_, theirs::query_named_block_nodes>(&qmp, &flat).await;
    // Two files, two images, and a filter that the stream job put in.
    assert!(ours.len() >= 4 && ours.len() == generated.len());
    for (ours, theirs) in ours.iter().zip(&generated) {
        assert_eq!((&ours.node_name, &ours.drv, &ours.file), (&theirs.node_name, &theirs.drv, &theirs.file));
        assert_eq!((ours.ro, ours.encrypted), (theirs.ro, theirs.encrypted));
        assert_eq!((ours.cache.direct, ours.cache.no_flush), (theirs.cache.direct, theirs.cache.no_flush));
        let names = |theirs: &theirs::BlockDirtyInfo| theirs.name.clone();
        let theirs_names = theirs.dirty_bitmaps.iter().flatten().map(names).collect::<Vec<_>>();
        assert_eq!(ours.dirty_bitmaps.iter().map(|b| b.name.clone()).collect::<Vec<_>>(), theirs_names);
        let (ours, theirs) = (&ours.image, serde_json::to_value(&theirs.image).unwrap());
        assert_eq!(ours.filename, theirs["filename"]);
        assert_eq!(ours.format, theirs["format"]);
        assert_eq!(ours.virtual_size, theirs["virtual-size"]);
        assert_eq!(ours.backing_filename.as_deref(), theirs["backing-filename"].as_str());
    }
    assert!(ours.iter().any(|node| node.dirty_bitmaps.iter().any(|b| b.name.as_deref() == Some("b0"))));

    let (ours, generated) = both::<_, theirs::x_debug_query_block_graph>(&qmp, &QueryBlockGraph {}).await;
    let nodes: Vec<_> = ours.nodes.iter().map(|n| (n.id, n.kind.clone(), n.name.clone())).collect();
    let same: Vec<_> = generated.nodes.iter().map(|n| (n.id, word(&n.type_), n.name.clone())).collect();
    assert!(nodes == same && !nodes.is_empty());
    let edges: Vec<_> = ours.edges.iter().map(|e| (e.parent, e.child, e.name.clone())).collect();
    let same: Vec<_> = generated.edges.iter().map(|e| (e.parent, e.child, e.name.clone())).collect();
    assert!(edges == same && !edges.is_empty());

    let (ours, generated) = both::<_, theirs::query_jobs>(&qmp, &QueryJobs {}).await;
    let facts: Vec<_> = ours.iter().map(|j| (j.id.clone(), j.kind.clone(), j.status.clone())).collect();
    let same: Vec<_> = generated.iter().map(|j| (j.id.clone(), word(&j.type_), word(&j.status))).collect();
    assert_eq!(facts, same);
    assert_eq!((facts.len(), facts[0].1.as_str()), (1, "stream"));
    let (ours, generated) = both::<_, theirs::query_block_jobs>(&qmp, &QueryBlockJobs {}).await;
    assert_eq!(
        (ours.len(), generated.len(), ours[0].device.as_str(), ours[0].kind.as_str()),
        (1, 1, "s", "stream")
    );

    let (ours, generated) = both::<_, theirs::query_chardev>(&qmp, &QueryChardev {}).await;
    let facts: Vec<_> = ours.iter().map(|c| (&c.label, &c.filename, c.frontend_open)).collect();
    let same: Vec<_> = generated.iter().map(|c| (&c.label, &c.filename, c.frontend_open)).collect();
    assert!(facts == same && facts.len() == 2, "{facts:?}");
}

#[tokio::test]
async fn a_generated_command_runs_as_it_is() {
    let qemu = Qemu::start();
    let qmp = qemu.connect().await;
    let version = qmp.execute(&theirs::query_version {}).await.unwrap();
    assert_eq!(version.qemu.major, i64::from(qmp.version().qemu.major));
    let kvm = qmp.execute(&theirs::query_kvm {}).await.unwrap();
    assert!(kvm.present || !kvm.enabled);
}

/// A reply as the generated types write it, so with every member that they have.
fn reply<C: Command>(value: &Value) -> Step
where
    C::Ok: Serialize,
{
    let read: C::Ok = serde_json::from_value(value.clone()).unwrap_or_else(|f| panic!("{}: {f}", C::NAME));
    send(&format!("{{\"return\": {}}}\n", serde_json::to_string(&read).unwrap()))
}

fn take<C: Command>() -> Step {
    Step::Expect(C::NAME)
}

#[tokio::test]
async fn agent_commands_are_the_generated_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qga");
    let listener = UnixListener::bind(&path).unwrap();
    let name = |name: &str| json!({ "name": name, "enabled": true, "success-response": true });
    let info = json!({ "version": "7.2", "supported_commands": [
        name(qga::guest_fsfreeze_freeze::NAME), name(qga::guest_fsfreeze_freeze_list::NAME),
        name(qga::guest_exec::NAME), name(qga::guest_exec_status::NAME)] });
    let disk = json!({ "pci-controller": { "domain": 0, "bus": 0, "slot": 4, "function": 0 },
        "bus-type": "virtio", "bus": 0, "target": 0, "unit": 0, "dev": "/dev/vda1" });
    let fs = json!([{ "name": "vda1", "mountpoint": "/", "type": "ext4", "used-bytes": 1, "total-bytes": 2, "disk": [disk] }]);
    let interfaces = json!([{ "name": "eth0", "hardware-address": "52:54:00:00:00:01",
        "ip-addresses": [{ "ip-address": "10.0.0.2", "ip-address-type": "ipv4", "prefix": 24 }] }]);
    let os = json!({ "id": "debian", "pretty-name": "Debian", "kernel-release": "6.1" });
    let trim =
        json!({ "paths": [{ "path": "/", "trimmed": 5, "minimum": 0 }, { "path": "/x", "error": "no" }] });
    let steps = vec![
        Step::Synced,
        take::<qga::guest_info>(),
        reply::<qga::guest_info>(&info),
        take::<qga::guest_fsfreeze_freeze>(),
        reply::<qga::guest_fsfreeze_freeze>(&json!(2)),
        take::<qga::guest_fsfreeze_freeze_list>(),
        reply::<qga::guest_fsfreeze_freeze_list>(&json!(1)),
        take::<qga::guest_fsfreeze_status>(),
        reply::<qga::guest_fsfreeze_status>(&json!("frozen")),
        take::<qga::guest_fsfreeze_thaw>(),
        reply::<qga::guest_fsfreeze_thaw>(&json!(3)),
        take::<qga::guest_get_fsinfo>(),
        reply::<qga::guest_get_fsinfo>(&fs),
        take::<qga::guest_network_get_interfaces>(),
        reply::<qga::guest_network_get_interfaces>(&interfaces),
        take::<qga::guest_get_osinfo>(),
        reply::<qga::guest_get_osinfo>(&os),
        take::<qga::guest_get_host_name>(),
        reply::<qga::guest_get_host_name>(&json!({ "host-name": "vm1" })),
        take::<qga::guest_get_time>(),
        reply::<qga::guest_get_time>(&json!(1_700_000_000_000_000_000_i64)),
        take::<qga::guest_fstrim>(),
        reply::<qga::guest_fstrim>(&trim),
        take::<qga::guest_exec>(),
        reply::<qga::guest_exec>(&json!({ "pid": 7 })),
        take::<qga::guest_exec_status>(),
        reply::<qga::guest_exec_status>(&json!({ "exited": true, "exitcode": 0 })),
    ];
    let peer = std::thread::spawn(move || play(&listener, steps));
    let agent = Agent::connect(&path, HANG, HANG).await.unwrap();
    assert_eq!(agent.info().await.unwrap().commands.len(), 4);
    assert_eq!(agent.freeze(&[]).await.unwrap(), 2);
    assert_eq!(agent.freeze(&["/srv".into()]).await.unwrap(), 1);
    assert_eq!(agent.freeze_status().await.unwrap(), FreezeStatus::Frozen);
    assert_eq!(agent.thaw().await.unwrap(), 3);
    let fs = &agent.filesystems().await.unwrap()[0];
    assert_eq!((fs.name.as_str(), fs.mountpoint.as_str(), fs.kind.as_str()), ("vda1", "/", "ext4"));
    assert_eq!((fs.used_bytes, fs.total_bytes), (Some(1), Some(2)));
    let interface = &agent.interfaces().await.unwrap()[0];
    assert_eq!(interface.mac.as_deref(), Some("52:54:00:00:00:01"));
    assert_eq!((interface.addresses[0].address.as_str(), interface.addresses[0].prefix), ("10.0.0.2", 24));
    let os = agent.os().await.unwrap();
    assert_eq!((os.id.as_deref(), os.kernel_release.as_deref()), (Some("debian"), Some("6.1")));
    assert_eq!(agent.hostname().await.unwrap(), "vm1");
    assert_eq!(agent.time().await.unwrap(), 1_700_000_000_000_000_000);
    let trimmed = agent.trim(HANG).await.unwrap();
    assert_eq!((trimmed[0].trimmed, trimmed[1].error.as_deref()), (Some(5), Some("no")));
    assert!(agent.sync_disks(HANG).await.unwrap());
    drop(agent);
    peer.join().unwrap().unwrap();
}

#[test]
fn agent_arguments_are_the_generated_ones() {
    let list: qga::guest_fsfreeze_freeze_list =
        serde_json::from_value(json!({ "mountpoints": ["/srv"] })).unwrap();
    assert_eq!(list.mountpoints.unwrap(), ["/srv"]);
    let sync: qga::guest_sync_delimited = serde_json::from_value(json!({ "id": (1_u64 << 53) - 1 })).unwrap();
    assert_eq!((sync.id, qga::guest_sync_delimited::NAME), ((1 << 53) - 1, "guest-sync-delimited"));
    let exec: qga::guest_exec = serde_json::from_value(json!({ "path": "sync" })).unwrap();
    assert_eq!(serde_json::to_value(exec).unwrap(), json!({ "path": "sync" }));
}
