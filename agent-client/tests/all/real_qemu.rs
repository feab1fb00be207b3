//! The client against a real QEMU without a guest.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agent_client::{
    BitmapOfNode, BlockCommit, BlockJobSetSpeed, BlockStream, BlockdevAdd, BlockdevCreate, BlockdevDel,
    BlockdevMirror, CloseFd, Cont, Error, HumanMonitorCommand, JobCancel, JobComplete, JobDismiss,
    JobFinalize, JobResume, Migrate, MigrateCancel, MigrateContinue, MigrateSetCapabilities,
    MigrateSetParameters, MigrationCapability, Qmp, QomGet, QomList, QueryBlock, QueryBlockGraph,
    QueryBlockJobs, QueryChardev, QueryFdsets, QueryJobs, QueryMemorySizeSummary, QueryMigrate,
    QueryMigrateCapabilities, QueryMigrateParameters, QueryName, QueryNamedBlockNodes, QueryStatus, QueryTpm,
    RemoveFd, Schema, SetAction, SnapshotDelete, SnapshotLoad, SnapshotSave, Stop, SystemReset, Transaction,
    TransactionAction, holder,
};
use qapi_spec::Command as QmpCommand;
use serde_json::{Value, json};

const HANG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(300);

/// A running QEMU with an empty machine, which is killed when it goes out of scope.
pub struct Qemu {
    child: Child,
    pub dir: tempfile::TempDir,
}

impl Qemu {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new("qemu-system-x86_64")
            .args(["-name", "oracle", "-machine", "none", "-nodefaults", "-display", "none", "-S"])
            .args(["-qmp", "unix:qmp,server=on,wait=off"])
            .args(["-chardev", "socket,id=qga,path=qga,server=on,wait=off"])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 cannot be started; on Debian: apt-get install qemu-system-x86");
        Self { child, dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub async fn connect(&self) -> Qmp {
        connect(&self.socket()).await
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects as soon as QEMU listens.
async fn connect(socket: &Path) -> Qmp {
    let all = async {
        loop {
            match Qmp::connect(socket, HANG, HANG).await {
                Ok(qmp) => return qmp,
                Err(Error::Connect { .. }) => tokio::task::yield_now().await,
                Err(fault) => panic!("{fault}"),
            }
        }
    };
    tokio::time::timeout(HANG, all).await.expect("QEMU does not listen")
}

/// Makes a qcow2 file of 1 MiB and opens it as `node`, with `backing: null` for an overlay.
pub async fn add_image(qemu: &Qemu, qmp: &Qmp, node: &str) {
    let file = qemu.path(&format!("{node}.qcow2"));
    std::fs::File::create(&file).unwrap();
    let protocol = json!({ "driver": "file", "filename": file, "node-name": format!("{node}-file") });
    qmp.execute(&BlockdevAdd(protocol)).await.unwrap();
    let options = json!({ "driver": "qcow2", "file": format!("{node}-file"), "size": 1 << 20 });
    qmp.execute(&BlockdevCreate { job_id: "create".into(), options }).await.unwrap();
    let concluded = async {
        loop {
            let jobs = qmp.execute(&QueryJobs {}).await.unwrap();
            if jobs.iter().any(|job| job.id == "create" && job.status == "concluded") {
                assert_eq!((jobs[0].kind.as_str(), &jobs[0].error), ("create", &None));
                return;
            }
        }
    };
    tokio::time::timeout(HANG, concluded).await.unwrap();
    qmp.execute(&JobDismiss { id: "create".into() }).await.unwrap();
    let format =
        json!({ "driver": "qcow2", "file": format!("{node}-file"), "node-name": node, "backing": null });
    qmp.execute(&BlockdevAdd(format)).await.unwrap();
}

fn commit(top: Option<&str>) -> BlockCommit {
    BlockCommit {
        job_id: "j".into(),
        device: "d".into(),
        top_node: top.map(str::to_owned),
        base_node: "a".into(),
        backing_file: top.map(|_| "a.qcow2".into()),
        speed: 0,
        on_error: "enospc".into(),
        auto_finalize: false,
        auto_dismiss: false,
    }
}

fn mirror(replaces: Option<&str>) -> BlockdevMirror {
    BlockdevMirror {
        job_id: "j".into(),
        device: "d".into(),
        target: "t".into(),
        replaces: replaces.map(str::to_owned),
        sync: "none".into(),
        auto_dismiss: false,
    }
}

fn stream(base: Option<&str>) -> BlockStream {
    BlockStream {
        job_id: "j".into(),
        device: "d".into(),
        base_node: base.map(str::to_owned),
        backing_file: base.map(|base| format!("{base}.qcow2")),
        speed: 1 << 20,
        on_error: "enospc".into(),
        auto_finalize: false,
        auto_dismiss: false,
    }
}

fn background(state: bool) -> MigrationCapability {
    MigrationCapability { capability: "background-snapshot".into(), state }
}

/// A bitmap moves from one node to another.
fn carry(from: &str, to: &str) -> Transaction {
    let (name, node) = ("daily".to_owned(), to.to_owned());
    let (granularity, persistent, disabled) = (65536, true, false);
    let add = TransactionAction::BlockDirtyBitmapAdd { node, name, granularity, persistent, disabled };
    let bitmaps = vec![BitmapOfNode { node: from.into(), name: "daily".into() }];
    let merge = TransactionAction::BlockDirtyBitmapMerge { node: to.into(), target: "daily".into(), bitmaps };
    let remove = TransactionAction::BlockDirtyBitmapRemove { node: from.into(), name: "daily".into() };
    Transaction { actions: vec![add, merge, remove] }
}

fn switch(pairs: &[(&str, &str)]) -> Transaction {
    let action = |(node, overlay): &(&str, &str)| TransactionAction::BlockdevSnapshot {
        node: (*node).to_owned(),
        overlay: (*overlay).to_owned(),
    };
    Transaction { actions: pairs.iter().map(action).collect() }
}

/// The node below each node, for `backing` edges, by name.
async fn backing(qmp: &Qmp) -> Vec<(String, String)> {
    let graph = qmp.execute(&QueryBlockGraph {}).await.unwrap();
    let name = |id: u64| graph.nodes.iter().find(|node| node.id == id).unwrap().name.clone();
    let edges = graph.edges.iter().filter(|edge| edge.name == "backing");
    let mut edges: Vec<_> = edges.map(|edge| (name(edge.parent), name(edge.child))).collect();
    edges.sort();
    edges
}

#[tokio::test]
async fn it_greets_and_answers() {
    let qemu = Qemu::start();
    let qmp = qemu.connect().await;
    assert!(qmp.version().qemu.major >= 7, "{:?}", qmp.version());
    assert_eq!(qmp.peer_pid(), Some(qemu.child.id()));
    assert_eq!(qmp.execute(&QueryName {}).await.unwrap().name.as_deref(), Some("oracle"));
    let status = qmp.execute(&QueryStatus {}).await.unwrap();
    assert!(!status.running && status.status == "prelaunch", "{status:?}");
    assert!(qmp.execute(&QueryBlock {}).await.unwrap().is_empty());
    assert!(qmp.execute(&QueryBlockJobs {}).await.unwrap().is_empty());
    assert!(!qmp.execute(&QueryMigrate {}).await.unwrap().is_active());
    let chardevs = qmp.execute(&QueryChardev {}).await.unwrap();
    let agent = chardevs.iter().find(|chardev| chardev.label == "qga").unwrap();
    assert!(agent.filename.starts_with("disconnected:unix:") && !agent.frontend_open, "{agent:?}");
    let fault = qmp.execute_raw("x-no-such-command", Value::Null).await.unwrap_err();
    assert!(
        matches!(&fault, Error::Refused { refusal, .. } if refusal.class == "CommandNotFound"),
        "{fault}"
    );
    let fault = qmp.execute(&BlockdevDel { node_name: "none".into() }).await.unwrap_err();
    assert!(fault.is_refusal(), "{fault}");
}

/// A client that holds the monitor until it is killed. It is started by the test below.
#[test]
#[ignore = "the process that holds a monitor for the test here"]
fn client() {
    let socket = PathBuf::from(std::env::var_os("HELD_MONITOR").unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let _qmp = connect(&socket).await;
        std::future::pending::<()>().await;
    });
}

#[tokio::test]
async fn g9_q1_a_second_client_is_told_who_holds_the_monitor() {
    let qemu = Qemu::start();
    drop(qemu.connect().await);
    let mut client = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "real_qemu::client"])
        .env("HELD_MONITOR", qemu.socket())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let held = async {
        while !holder::holders(&qemu.socket()).list.iter().any(|holder| holder.pid == client.id()) {
            tokio::task::yield_now().await;
        }
    };
    let held = tokio::time::timeout(HANG, held).await;
    let is_held = holder::is_held(&qemu.socket());
    let second = Qmp::connect(&qemu.socket(), SHORT, HANG).await;
    client.kill().unwrap();
    client.wait().unwrap();
    held.expect("the client that holds the monitor is not named");
    assert_eq!(is_held, Some(true));
    assert!(matches!(second, Err(Error::NoGreeting { .. })), "{second:?}");
    // Free again, and this process does not hold it against itself.
    let qmp = qemu.connect().await;
    let holders = holder::holders(&qemu.socket());
    assert!(holders.list.is_empty() && holders.certain, "{holders:?}");
    qmp.execute(&QueryStatus {}).await.unwrap();
}

/// Every typed command with arguments as snapctl gives them.
pub fn arguments() -> Vec<(&'static str, Value)> {
    fn of<C: QmpCommand>(command: &C) -> (&'static str, Value) {
        (C::NAME, serde_json::to_value(command).unwrap())
    }
    vec![
        of(&QueryStatus {}),
        of(&QueryName {}),
        of(&QueryBlock {}),
        of(&QueryNamedBlockNodes { flat: true }),
        of(&QueryBlockGraph {}),
        of(&QueryJobs {}),
        of(&QueryBlockJobs {}),
        of(&QueryMigrate {}),
        of(&QueryChardev {}),
        of(&BlockdevCreate {
            job_id: "snapctl-1".into(),
            options: json!({ "driver": "qcow2", "file": "f", "size": 1 << 30, "cluster-size": 65536,
                "backing-file": "base.qcow2", "backing-fmt": "qcow2" }),
        }),
        of(&JobDismiss { id: "snapctl-1".into() }),
        of(&JobCancel { id: "j".into() }),
        of(&JobComplete { id: "j".into() }),
        of(&JobFinalize { id: "j".into() }),
        of(&JobResume { id: "j".into() }),
        of(&BlockJobSetSpeed { device: "j".into(), speed: 1 << 20 }),
        of(&mirror(None)),
        of(&mirror(Some("f"))),
        of(&SystemReset {}),
        of(&SetAction { reboot: "reset".into() }),
        of(&Stop {}),
        of(&Cont {}),
        of(&HumanMonitorCommand { command_line: "qemu-io n flush".into() }),
        of(&commit(None)),
        of(&commit(Some("c"))),
        of(&stream(None)),
        of(&stream(Some("a"))),
        of(&BlockdevDel { node_name: "n".into() }),
        of(&BlockdevAdd(json!({ "driver": "qcow2", "node-name": "n", "backing": null, "discard": "unmap",
            "cache": { "direct": true, "no-flush": false }, "read-only": false,
            "file": { "driver": "file", "filename": "/srv/a.qcow2", "node-name": "n-f" } }))),
        of(&switch(&[("a", "b"), ("c", "d")])),
        of(&carry("a", "b")),
        of(&SnapshotSave {
            job_id: "j".into(),
            tag: "t".into(),
            vmstate: "n".into(),
            devices: vec!["n".into()],
        }),
        of(&SnapshotLoad {
            job_id: "j".into(),
            tag: "t".into(),
            vmstate: "n".into(),
            devices: vec!["n".into()],
        }),
        of(&SnapshotDelete { job_id: "j".into(), tag: "t".into(), devices: vec!["n".into()] }),
        of(&QueryFdsets {}),
        of(&RemoveFd { fdset_id: 1 }),
        of(&CloseFd { fdname: "memory".into() }),
        of(&QueryTpm {}),
        of(&Migrate { uri: "fd:memory".into() }),
        of(&MigrateCancel {}),
        of(&MigrateContinue { state: "pre-switchover".into() }),
        of(&QueryMigrateCapabilities {}),
        of(&MigrateSetCapabilities { capabilities: vec![background(true)] }),
        of(&QueryMigrateParameters {}),
        of(&MigrateSetParameters { max_bandwidth: 1 << 50 }),
        of(&QueryMemorySizeSummary {}),
        of(&QomGet { path: "/machine".into(), property: "type".into() }),
        of(&QomList { path: "/machine/peripheral".into() }),
    ]
}

#[tokio::test]
async fn t20_every_typed_command_fits_the_schema() {
    let qemu = Qemu::start();
    let qmp = qemu.connect().await;
    let schema = Schema::parse(&qmp.schema_text().await.unwrap()).unwrap();
    for (name, arguments) in arguments() {
        assert_eq!(schema.validate(name, &arguments), Ok(()), "{name} {arguments}");
    }
    for name in ["add-fd", "getfd", "query-qmp-schema"] {
        assert!(schema.has_command(name), "{name}");
    }
    assert!(schema.has_event("JOB_STATUS_CHANGE") && schema.has_argument("add-fd", "fdset-id"));
    let wrong = [
        ("blockdev-del", json!({ "node": "n" })),
        ("transaction", json!({ "actions": [{ "type": "blockdev-snapshot", "data": { "node": "a" } }] })),
        ("transaction", json!({ "actions": [{ "type": "warp", "data": {} }] })),
        ("blockdev-add", json!({ "driver": "qcow2", "file": 5 })),
        ("x-none", Value::Null),
    ];
    for (name, arguments) in wrong {
        assert!(schema.validate(name, &arguments).is_err(), "{name} {arguments}");
    }
}

#[tokio::test]
async fn a_real_descriptor_arrives() {
    let qemu = Qemu::start();
    let qmp = qemu.connect().await;
    let path = qemu.path("data");
    std::fs::write(&path, [7; 4096]).unwrap();
    // QEMU takes a descriptor of just the access that the node asks for.
    let file = std::fs::File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let arguments = json!({ "fdset-id": 5, "opaque": "from the test" });
    let added = qmp.execute_with_fds("add-fd", arguments, vec![file.into()]).await.unwrap();
    assert!(added.get().contains("\"fdset-id\": 5"), "{added}");
    let node = json!({ "driver": "file", "node-name": "n", "filename": "/dev/fdset/5", "read-only": true });
    qmp.execute(&BlockdevAdd(node)).await.unwrap();
    let nodes = qmp.execute(&QueryNamedBlockNodes { flat: true }).await.unwrap();
    assert_eq!((nodes.len(), nodes[0].image.virtual_size), (1, 4096));
    // Without a descriptor QEMU says so, and a wrong count never reaches it.
    let fault = qmp.execute_with_fds("getfd", json!({ "fdname": "x" }), Vec::new()).await.unwrap_err();
    assert!(fault.is_refusal(), "{fault}");
    let many: Vec<_> = (0..17).map(|_| tempfile::tempfile().unwrap().into()).collect();
    let fault = qmp.execute_with_fds("getfd", json!({ "fdname": "x" }), many).await.unwrap_err();
    assert!(matches!(fault, Error::Local { .. }), "{fault}");
    qmp.execute(&QueryStatus {}).await.unwrap();
}

#[tokio::test]
async fn q3_a_prepared_transaction_is_forgotten_or_fired() {
    let qemu = Qemu::start();
    let qmp = qemu.connect().await;
    for node in ["a", "b", "a1", "b1"] {
        add_image(&qemu, &qmp, node).await;
    }
    let both = switch(&[("a", "a1"), ("b", "b1")]);
    for _ in 0..3 {
        drop(qmp.prepare(&both).await.unwrap());
        assert_eq!(backing(&qmp).await, []);
    }
    // All or none: the second action is wrong.
    let fault = qmp.prepare(&switch(&[("a", "a1"), ("b", "none")])).await.unwrap().fire().await.unwrap_err();
    assert!(fault.is_refusal(), "{fault}");
    assert_eq!(backing(&qmp).await, []);

    qmp.prepare(&both).await.unwrap().fire().await.unwrap();
    let pair = |over: &str, base: &str| (over.to_owned(), base.to_owned());
    assert_eq!(backing(&qmp).await, [pair("a1", "a"), pair("b1", "b")]);
    let fault = qmp.execute(&BlockdevDel { node_name: "a".into() }).await.unwrap_err();
    assert!(fault.is_refusal(), "a base in use cannot go: {fault}");
    qmp.execute(&BlockdevDel { node_name: "a1".into() }).await.unwrap();
    assert_eq!(backing(&qmp).await, [pair("b1", "b")]);
}

#[tokio::test]
async fn q2_qemu_dies_in_mid_conversation() {
    let mut qemu = Qemu::start();
    let qmp = qemu.connect().await;
    let prepared = qmp.prepare(&QueryStatus {}).await.unwrap();
    qemu.child.kill().unwrap();
    qemu.child.wait().unwrap();
    let fault = prepared.fire().await.unwrap_err();
    assert!(matches!(fault, Error::Closed { .. }), "{fault}");
    let fault = Qmp::connect(&qemu.socket(), HANG, HANG).await.unwrap_err();
    assert!(matches!(fault, Error::Connect { .. }), "{fault}");
}
