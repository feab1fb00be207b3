//! A socket whose queue is full: its owner serves somebody else, and others wait already.

use std::os::unix::net::UnixStream;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::*;

/// A listener with room for one, and the client that takes that room.
fn full(path: &Path) -> (OwnedFd, UnixStream) {
    let listener =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let waiting = UnixStream::connect(path).unwrap();
    (listener, waiting)
}

#[tokio::test]
async fn g9_a_full_queue_is_no_other_error_than_silence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let _full = full(&path);
    let fault = Qmp::connect(&path, SHORT, AMPLE).await.unwrap_err();
    assert!(matches!(fault, Error::NoGreeting { .. }), "{fault}");
    let fault = Agent::connect(&path, SHORT, AMPLE).await.unwrap_err();
    assert!(matches!(fault, Error::Timeout { .. }), "{fault}");
}

#[tokio::test]
async fn g9_who_waits_for_a_full_queue_is_served_in_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let (listener, waiting) = full(&path);
    let peer = std::thread::spawn(move || {
        let listener = UnixListener::from(listener);
        drop(listener.accept().unwrap());
        play(&listener, vec![Step::Greet])
    });
    Qmp::connect(&path, AMPLE, AMPLE).await.unwrap();
    peer.join().unwrap().unwrap();
    drop(waiting);
}
