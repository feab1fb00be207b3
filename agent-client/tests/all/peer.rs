//! A peer that follows a script, over a unix socket: a monitor or an agent, as rude as the script says.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags};
use serde_json::Value;

/// A step that takes this long hangs.
const HANG: Duration = Duration::from_secs(60);
/// Between two bytes of a peer that sends slowly.
const TRICKLE: Duration = Duration::from_micros(200);

pub const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;

/// One thing that the peer does or demands. In what it sends, `$id` stands for the newest command's id and
/// `$sync` for the newest sync's value.
pub enum Step {
    /// Greets, and takes `qmp_capabilities`.
    Greet,
    /// Demands the next command by its name.
    Expect(&'static str),
    /// Demands several commands, and answers them in reverse order in one write, each with its id.
    Reversed(usize),
    /// Demands a command with these many descriptors, and returns what can be read from them as a string.
    Descriptors(&'static str, usize),
    /// Demands half a command that is taken back by 0xFF.
    Aborted,
    /// Demands 0xFF and `guest-sync-delimited`.
    ExpectSync,
    /// The same, and answers it.
    Synced,
    /// Sends bytes at once.
    Send(Vec<u8>),
    /// Sends bytes one by one.
    Trickle(Vec<u8>),
    /// Sends the same bytes so many times.
    Flood(Vec<u8>, usize),
    /// The same, but demands that the client hangs up before the end.
    CutOff(Vec<u8>, usize),
    /// Reads nothing and says nothing until the client hangs up.
    Stall,
    /// Hangs up.
    Close,
}

/// Sends text.
pub fn send(text: &str) -> Step {
    Step::Send(text.as_bytes().to_vec())
}

/// Sends a reply to the newest QMP command.
pub fn answer(value: &str) -> Step {
    Step::Send(format!("{{\"return\": {value}, \"id\": $id}}\r\n").into_bytes())
}

/// Sends the sentinel and the newest sync's echo.
pub fn echo() -> Step {
    Step::Send(b"\xff{\"return\": $sync}\n".to_vec())
}

/// Plays `steps` to the first client of `listener`, and then waits until it hangs up.
pub fn play(listener: &UnixListener, steps: Vec<Step>) -> Result<(), String> {
    let (stream, _) = listener.accept().map_err(|fault| fault.to_string())?;
    stream.set_read_timeout(Some(HANG)).map_err(|fault| fault.to_string())?;
    stream.set_write_timeout(Some(HANG)).map_err(|fault| fault.to_string())?;
    let mut peer = Peer::new(stream);
    for (number, step) in steps.into_iter().enumerate() {
        let end = matches!(step, Step::Close);
        peer.play(step).map_err(|fault| format!("the peer's step {number}: {fault}"))?;
        if end {
            return Ok(());
        }
    }
    peer.drain().map_err(|fault| format!("after the peer's last step: {fault}"))
}

struct Peer {
    stream: UnixStream,
    buffer: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// 0xFF bytes since the last command.
    sentinels: usize,
    id: String,
    sync: String,
}

impl Peer {
    fn new(stream: UnixStream) -> Self {
        let (id, sync) = ("null".to_owned(), "null".to_owned());
        Self { stream, buffer: Vec::new(), fds: Vec::new(), sentinels: 0, id, sync }
    }

    fn play(&mut self, step: Step) -> io::Result<()> {
        match step {
            Step::Greet => {
                self.send(format!("{GREETING}\r\n").as_bytes())?;
                self.expect("qmp_capabilities")?;
                self.send(b"{\"return\": {}, \"id\": $id}\r\n")
            }
            Step::Expect(name) => self.expect(name).map(drop),
            Step::Reversed(count) => {
                let commands = (0..count).map(|_| self.next()).collect::<io::Result<Vec<_>>>()?;
                let answer = |c: &Value| format!("{{\"return\": {}, \"id\": {}}}\n", c["execute"], c["id"]);
                let all: String = commands.iter().rev().map(answer).collect();
                self.send(all.as_bytes())
            }
            Step::Descriptors(name, count) => {
                self.expect(name)?;
                let mut said = String::new();
                for fd in std::mem::take(&mut self.fds) {
                    io::Read::read_to_string(&mut std::fs::File::from(fd), &mut said)?;
                    said.push(';');
                }
                demand(said.matches(';').count() == count, "another number of descriptors", &said)?;
                self.send(format!("{{\"return\": {said:?}, \"id\": $id}}\n").as_bytes())
            }
            Step::Aborted => loop {
                if let Some(at) = self.buffer.iter().position(|byte| *byte == 0xff) {
                    let half: Vec<u8> = self.buffer.drain(..=at).collect();
                    let half = String::from_utf8_lossy(&half[..at]).into_owned();
                    let half = half.trim_start();
                    demand(half.starts_with("{\"execute\""), "no command was begun", half)?;
                    demand(!half.ends_with('\n'), "the command is whole", half)?;
                    return self.complain();
                }
                self.fill()?;
            },
            Step::ExpectSync => self.expect_sync(),
            Step::Synced => {
                self.expect_sync()?;
                self.send(b"\xff{\"return\": $sync}\n")
            }
            Step::Send(bytes) => self.send(&bytes),
            Step::Trickle(bytes) => {
                let bytes = self.filled_in(&bytes);
                bytes.iter().try_for_each(|byte| {
                    std::thread::sleep(TRICKLE);
                    self.write(&[*byte])
                })
            }
            Step::Flood(unit, times) => self.flood(&unit, times),
            Step::CutOff(unit, times) => match self.flood(&unit, times) {
                Ok(()) => Err(io::Error::other("the client took all of it")),
                Err(fault) if is_hang_up(&fault) => Ok(()),
                Err(fault) => Err(fault),
            },
            Step::Stall => loop {
                // Peeking leaves what the client wrote where it is, so that the socket stays full.
                let poll = rustix::event::PollFlags::HUP;
                let mut fds = [rustix::event::PollFd::new(&self.stream, poll)];
                rustix::event::poll(&mut fds, None)?;
                if fds[0].revents().contains(poll) {
                    return Ok(());
                }
            },
            Step::Close => Ok(()),
        }
    }

    fn flood(&mut self, unit: &[u8], times: usize) -> io::Result<()> {
        let unit = self.filled_in(unit);
        let at_once = (1_usize << 20).div_ceil(unit.len()).min(times);
        let block = unit.repeat(at_once);
        for _ in 0..times / at_once {
            self.write(&block)?;
        }
        self.write(&unit.repeat(times % at_once))
    }

    /// Takes a whole command, as QEMU's parser would: 0xFF ends what was begun, and is complained about.
    fn next(&mut self) -> io::Result<Value> {
        loop {
            if let Some(at) = self.buffer.iter().position(|byte| matches!(byte, 0xff | b'\n')) {
                let mut line: Vec<u8> = self.buffer.drain(..=at).collect();
                if line.pop() == Some(0xff) {
                    self.sentinels += 1;
                    self.complain()?;
                } else if !line.is_empty() {
                    let command: Value = serde_json::from_slice(&line)?;
                    self.id = command.get("id").map_or("null".into(), Value::to_string);
                    return Ok(command);
                }
                continue;
            }
            self.fill()?;
        }
    }

    fn expect(&mut self, name: &str) -> io::Result<Value> {
        let command = self.next()?;
        demand(command["execute"] == name, &format!("this is not {name}"), &command.to_string())?;
        Ok(command)
    }

    fn expect_sync(&mut self) -> io::Result<()> {
        self.sentinels = 0;
        let command = self.expect("guest-sync-delimited")?;
        demand(self.sentinels > 0, "no 0xFF came before", &command.to_string())?;
        self.sync = command["arguments"]["id"].to_string();
        demand(self.sync.parse::<u64>().is_ok(), "no number to echo", &command.to_string())
    }

    fn complain(&mut self) -> io::Result<()> {
        self.send(
            b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error, stray '\\ufffd'\"}}\n",
        )
    }

    fn filled_in(&self, bytes: &[u8]) -> Vec<u8> {
        let with = |bytes: &[u8], from: &[u8], to: &str| -> Vec<u8> {
            let mut out = Vec::with_capacity(bytes.len());
            let mut rest = bytes;
            while let Some(at) = rest.windows(from.len()).position(|window| window == from) {
                out.extend_from_slice(&rest[..at]);
                out.extend_from_slice(to.as_bytes());
                rest = &rest[at + from.len()..];
            }
            out.extend_from_slice(rest);
            out
        };
        with(&with(bytes, b"$id", &self.id), b"$sync", &self.sync)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let bytes = self.filled_in(bytes);
        self.write(&bytes)
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let sent = rustix::net::send(&self.stream, bytes, SendFlags::NOSIGNAL)?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut chunk = vec![0; 64 << 10];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [io::IoSliceMut::new(&mut chunk)];
        let got = rustix::net::recvmsg(&self.stream, into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        demand(!got.flags.contains(ReturnFlags::CTRUNC), "descriptors were lost", "")?;
        if got.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.buffer.extend_from_slice(&chunk[..got.bytes]);
        Ok(())
    }

    /// Waits until the client hangs up.
    fn drain(&mut self) -> io::Result<()> {
        loop {
            match self.fill() {
                Ok(()) => self.buffer.clear(),
                Err(fault) if is_hang_up(&fault) => return Ok(()),
                Err(fault) => return Err(fault),
            }
        }
    }
}

fn is_hang_up(fault: &io::Error) -> bool {
    matches!(
        fault.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

fn demand(holds: bool, otherwise: &str, seen: &str) -> io::Result<()> {
    if holds {
        return Ok(());
    }
    Err(io::Error::other(format!("{otherwise}: {}", agent_client::printable(seen, 300))))
}
