//! What the fuzzer does with its bytes, shared with the property tests in `agent-client/tests/all`.

use std::time::Duration;

use agent_client::{Connection, Error, Limits, Matching};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Never reached: the peer closes, and that ends every command.
const HANG: Duration = Duration::from_secs(60);

/// A peer that says the bytes and closes. The first byte chooses a monitor or an agent, and in what pieces
/// the bytes arrive.
///
/// Every command must come to an end, and every error must be fit for a terminal.
pub fn conversation(bytes: &[u8]) {
    let Some((how, said)) = bytes.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(converse(*how, said));
}

async fn converse(how: u8, said: &[u8]) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let monitor = how & 1 == 0;
    // Small enough that the limits are met too.
    let limits = Limits { message: 1000, depth: 20, values: 100 };
    let connection = Connection::over(ours, limits, if monitor { Matching::Id } else { Matching::Order });
    let mut events = connection.events();
    let peer = async {
        let (mut from, mut to) = theirs.into_split();
        for piece in said.chunks(1 + usize::from(how >> 1)) {
            // A client that has had enough closes first.
            if to.write_all(piece).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(to);
        let _ = from.read_to_end(&mut Vec::new()).await;
    };
    let client = async move {
        let call = |name| connection.call(name, None::<Value>, Vec::new(), HANG);
        if monitor {
            let (first, second) = tokio::join!(call("first"), call("second"));
            [first, second].into_iter().for_each(fit_for_a_terminal);
        } else {
            // A sync whose value the peer knows, and then a command.
            let synced = connection.sync(7, HANG).await;
            let reply = call("first").await;
            assert!(synced.is_ok() || reply.is_err(), "a reply behind a sync that failed");
            fit_for_a_terminal(reply);
        }
        while let Ok(event) = events.try_recv() {
            assert!(event.name.len() + event.data.to_string().len() <= 20_000);
        }
        drop(connection);
    };
    tokio::join!(peer, client);
}

fn fit_for_a_terminal<T>(reply: Result<T, Error>) {
    if let Err(fault) = reply {
        let text = fault.to_string();
        assert!(!text.contains(char::is_control), "{text:?}");
        assert!(!matches!(fault, Error::Timeout { .. }), "the peer has closed, and nobody saw it");
    }
}
