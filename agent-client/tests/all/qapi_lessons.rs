//! What `qapi` 0.15 got wrong, and that we do not. See docs/decisions/0001.
//!
//! Where its types show the fault by themselves, the test shows that first: should a later version mend it,
//! the decision can be looked at again.

use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;
use std::time::Duration;

use agent_client::{Agent, CloseReason, Error, Qmp, QueryStatus};
use serde_json::{Value, json};

use crate::peer::{GREETING, Step, answer, echo, play, send};

const HANG: Duration = Duration::from_secs(60);
/// A limit that is meant to expire.
const SHORT: Duration = Duration::from_millis(300);

struct Stage {
    dir: tempfile::TempDir,
    peer: JoinHandle<Result<(), String>>,
}

impl Stage {
    fn new(steps: Vec<Step>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        Self { dir, peer: std::thread::spawn(move || play(&listener, steps)) }
    }

    async fn qmp(&self) -> Qmp {
        Qmp::connect(&self.dir.path().join("socket"), HANG, HANG).await.unwrap()
    }

    async fn agent(&self) -> Agent {
        Agent::connect(&self.dir.path().join("socket"), HANG, HANG).await.unwrap()
    }

    fn end(self) {
        self.peer.join().unwrap().unwrap();
    }
}

#[tokio::test]
async fn an_expired_timeout_and_then_another_command() {
    let late = "{\"return\": \"late\", \"id\": 2}\n";
    let stage = Stage::new(vec![
        Step::Greet,
        Step::Expect("query-name"),
        Step::Expect("query-status"),
        send(late),
        answer("\"mine\""),
    ]);
    let qmp = stage.qmp().await;
    assert!(tokio::time::timeout(SHORT, qmp.execute_raw("query-name", Value::Null)).await.is_err());
    assert_eq!(qmp.execute_raw("query-status", Value::Null).await.unwrap().get(), "\"mine\"");
    drop(qmp);
    stage.end();
}

#[tokio::test]
async fn an_unknown_event_and_an_unknown_value_in_a_known_one() {
    let unknown =
        r#"{"event": "BLOCK_WARPED", "data": {"x": 1}, "timestamp": {"seconds": 1, "microseconds": 2}}"#;
    let value = r#"{"event": "JOB_STATUS_CHANGE", "data": {"id": "j", "status": "elsewhere"}, "timestamp": {"seconds": 1, "microseconds": 2}}"#;
    for event in [unknown, value] {
        assert!(serde_json::from_str::<qapi_qmp::Event>(event).is_err(), "{event}");
    }
    let stage = Stage::new(vec![
        Step::Greet,
        Step::Expect("query-status"),
        send(&format!("{unknown}\n{value}\n")),
        answer("5"),
    ]);
    let qmp = stage.qmp().await;
    let mut events = qmp.events();
    assert_eq!(qmp.execute_raw("query-status", Value::Null).await.unwrap().get(), "5");
    assert_eq!(events.recv().await.unwrap().name, "BLOCK_WARPED");
    assert_eq!(events.recv().await.unwrap().data, json!({ "id": "j", "status": "elsewhere" }));
    drop(qmp);
    stage.end();
}

#[tokio::test]
async fn an_unknown_value_in_a_reply() {
    let status = r#"{"running": true, "status": "dreaming", "singlestep": false}"#;
    assert!(serde_json::from_str::<qapi_qmp::StatusInfo>(status).is_err());
    let stage = Stage::new(vec![Step::Greet, Step::Expect("query-status"), answer(status)]);
    let qmp = stage.qmp().await;
    assert_eq!(qmp.execute(&QueryStatus {}).await.unwrap().status, "dreaming");
    drop(qmp);
    stage.end();
}

#[tokio::test]
async fn a_line_has_a_limit() {
    let line = Step::CutOff(vec![b'x'; 4096], 50_000);
    let stage = Stage::new(vec![Step::Synced, Step::Expect("guest-info"), line]);
    let agent = stage.agent().await;
    let fault = agent.info().await.unwrap_err();
    assert!(matches!(fault, Error::Closed { reason: CloseReason::Limit(_), .. }), "{fault}");
    drop(agent);
    stage.end();
}

#[tokio::test]
async fn a_sync_with_its_sentinel() {
    let stale = send("e\": [{\"half\": \"of somebody else's");
    let stage = Stage::new(vec![
        stale,
        Step::ExpectSync,
        echo(),
        Step::Expect("guest-ping"),
        send("{\"return\": {}}\n"),
    ]);
    let agent = stage.agent().await;
    assert_eq!(agent.call("guest-ping", Value::Null).await.unwrap().get(), "{}");
    drop(agent);
    stage.end();
}

#[tokio::test]
async fn several_commands_under_way_where_the_greeting_offers_oob() {
    let capabilities: qapi_qmp::QapiCapabilities = serde_json::from_str(GREETING).unwrap();
    assert!(!capabilities.supports_oob(), "it was offered, and it is not seen");
    let stage = Stage::new(vec![Step::Greet, Step::Reversed(3)]);
    let qmp = stage.qmp().await;
    let (a, b, c) = tokio::join!(
        qmp.execute_raw("a", Value::Null),
        qmp.execute_raw("b", Value::Null),
        qmp.execute_raw("c", Value::Null)
    );
    assert_eq!([a, b, c].map(|reply| reply.unwrap().get().to_owned()), ["\"a\"", "\"b\"", "\"c\""]);
    drop(qmp);
    stage.end();
}

#[tokio::test]
async fn a_descriptor_goes_with_its_command() {
    use std::io::{Seek, Write};
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"within").unwrap();
    file.rewind().unwrap();
    let stage = Stage::new(vec![Step::Greet, Step::Descriptors("getfd", 1)]);
    let qmp = stage.qmp().await;
    let reply = qmp.execute_with_fds("getfd", json!({ "fdname": "x" }), vec![file.into()]).await.unwrap();
    assert_eq!(reply.get(), "\"within;\"");
    drop(qmp);
    stage.end();
}

#[tokio::test]
async fn a_command_whose_name_is_known_only_at_run_time() {
    let stage = Stage::new(vec![Step::Greet, Step::Expect("x-made-up-just-now"), answer("{}")]);
    let qmp = stage.qmp().await;
    let name = ["x", "made", "up", "just", "now"].join("-");
    qmp.execute_raw(&name, json!({ "with": ["arguments"] })).await.unwrap();
    drop(qmp);
    stage.end();
}
