//! Cuts a byte stream into JSON messages, within bounds.
//!
//! QMP and the guest agent send one JSON object a line (QEMU docs/interop/qmp-spec.rst, "General
//! Definitions"); a monitor in pretty mode spreads one over several. So a message ends where its
//! outermost bracket closes. What does not begin with one is no message of either protocol (the rest of
//! a reply, a boot loader's greeting); it ends with its line, whatever brackets and quotes are in it.
//! Length, depth and the number of values are checked while bytes arrive: neither an endless line nor a
//! million brackets is ever held or parsed, and a short text of many small values cannot become a
//! hundred times its size in memory.

/// The agent's sentinel: everything before it belonged to somebody else.
///
/// Source: qga/qapi-schema.json, `guest-sync-delimited`.
pub const SENTINEL: u8 = 0xFF;

/// What one peer may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest message in bytes.
    pub message: usize,
    /// Deepest nesting of arrays and objects.
    pub depth: usize,
    /// Most values in one message, counted by the brackets, colons and commas that introduce them.
    pub values: usize,
}

impl Limits {
    /// For a QMP monitor: QEMU's own parser stops at 64 MiB and 2^21 tokens too.
    ///
    /// Source: QEMU qobject/json-streamer.c, `MAX_TOKEN_SIZE`, `MAX_TOKEN_COUNT`.
    pub const QMP: Self = Self { message: 64 << 20, depth: 128, values: 1 << 21 };
    /// For a guest agent, whose every byte the guest decides. Four thousand file systems have some 2^18 values.
    pub const AGENT: Self = Self { message: 16 << 20, depth: 128, values: 1 << 18 };
}

/// One piece of the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// One whole message: JSON if the peer keeps the protocol, any bytes if not. Never empty.
    Message(Vec<u8>),
    /// A sentinel; whatever came before it and was not yet a whole message is gone.
    Sentinel,
}

/// The peer went past its [`Limits`]. The stream cannot be followed any further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitExceeded {
    /// A message did not end in time.
    #[error("it sent a message of more than {0} bytes")]
    Message(usize),
    /// A message is nested too deeply.
    #[error("it sent JSON nested more than {0} levels deep")]
    Depth(usize),
    /// A message has too many parts.
    #[error("it sent a message of more than {0} values")]
    Values(usize),
}

/// Collects bytes and gives back frames.
#[derive(Debug)]
pub struct Framer {
    limits: Limits,
    message: Vec<u8>,
    depth: usize,
    values: usize,
    in_string: bool,
    escaped: bool,
    /// In a line that is no message.
    garbage: bool,
}

impl Framer {
    /// Makes a framer at the start of a stream.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            message: Vec::new(),
            depth: 0,
            values: 0,
            in_string: false,
            escaped: false,
            garbage: false,
        }
    }

    /// Takes the bytes that arrived and appends the frames that they complete to `frames`.
    ///
    /// # Errors
    /// [`LimitExceeded`] as soon as a byte goes past a limit; frames found before it are kept.
    pub fn push(&mut self, bytes: &[u8], frames: &mut Vec<Frame>) -> Result<(), LimitExceeded> {
        for &byte in bytes {
            self.step(byte, frames)?;
        }
        Ok(())
    }

    fn step(&mut self, byte: u8, frames: &mut Vec<Frame>) -> Result<(), LimitExceeded> {
        if byte == SENTINEL {
            self.restart();
            frames.push(Frame::Sentinel);
            return Ok(());
        }
        let between = self.depth == 0 && !self.in_string;
        if between && byte.is_ascii_whitespace() {
            if byte == b'\n' {
                self.finish(frames);
            } else if !self.message.is_empty() {
                self.keep(byte)?;
            }
            return Ok(());
        }
        self.garbage |= self.message.is_empty() && byte != b'{';
        self.keep(byte)?;
        if self.garbage {
            return Ok(());
        }
        if self.in_string {
            self.step_in_string(byte, frames);
            return Ok(());
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => {
                self.count()?;
                self.depth += 1;
                if self.depth > self.limits.depth {
                    return Err(LimitExceeded::Depth(self.limits.depth));
                }
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                if self.depth == 0 {
                    self.finish(frames);
                }
            }
            b',' | b':' => self.count()?,
            _ => {}
        }
        Ok(())
    }

    fn step_in_string(&mut self, byte: u8, frames: &mut Vec<Frame>) {
        match byte {
            // JSON has no raw line end in a string: this line was cut off, the next one is whole.
            b'\n' => self.finish(frames),
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = true,
            b'"' => self.in_string = false,
            _ => {}
        }
    }

    fn count(&mut self) -> Result<(), LimitExceeded> {
        self.values += 1;
        if self.values > self.limits.values {
            return Err(LimitExceeded::Values(self.limits.values));
        }
        Ok(())
    }

    fn keep(&mut self, byte: u8) -> Result<(), LimitExceeded> {
        if self.message.len() >= self.limits.message {
            return Err(LimitExceeded::Message(self.limits.message));
        }
        self.message.push(byte);
        Ok(())
    }

    fn finish(&mut self, frames: &mut Vec<Frame>) {
        let message = std::mem::take(&mut self.message);
        self.restart();
        if !message.is_empty() {
            frames.push(Frame::Message(message));
        }
    }

    fn restart(&mut self) {
        self.message.clear();
        self.depth = 0;
        self.values = 0;
        self.in_string = false;
        self.escaped = false;
        self.garbage = false;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SMALL: Limits = Limits { message: 4096, depth: 128, values: 1000 };

    fn frames_of(bytes: &[u8]) -> Result<Vec<Frame>, LimitExceeded> {
        let mut frames = Vec::new();
        Framer::new(SMALL).push(bytes, &mut frames)?;
        Ok(frames)
    }

    fn message(text: &str) -> Frame {
        Frame::Message(text.as_bytes().to_vec())
    }

    #[test]
    fn lines_pretty_objects_and_garbage_are_cut() {
        let stream = b"{\"return\": {}}\r\n{\n  \"a\": [\"}\\\"\"]\n}\nhello\n\n";
        let expected =
            vec![message("{\"return\": {}}"), message("{\n  \"a\": [\"}\\\"\"]\n}"), message("hello")];
        assert_eq!(frames_of(stream).unwrap(), expected);
    }

    #[test]
    fn a_sentinel_forgets_what_came_before() {
        let stream = b"{\"return\": [1, \"half\xff{\"return\": 5}\n";
        assert_eq!(frames_of(stream).unwrap(), vec![Frame::Sentinel, message("{\"return\": 5}")]);
    }

    #[test]
    fn a_line_cut_inside_a_string_does_not_swallow_the_next() {
        let stream = b"{\"return\": \"cut\n{\"return\": 1}\n";
        assert_eq!(
            frames_of(stream).unwrap(),
            vec![message("{\"return\": \"cut\n"), message("{\"return\": 1}")]
        );
    }

    #[test]
    fn limits_hold_while_bytes_arrive() {
        assert_eq!(frames_of(&[b'x'; 5000]), Err(LimitExceeded::Message(4096)));
        let started = |rest: &[u8]| frames_of(&[b"{", rest].concat());
        assert_eq!(started(&[b'['; 128]), Err(LimitExceeded::Depth(128)));
        assert!(started(&[b'['; 127]).is_ok());
        assert_eq!(started(&b"{},".repeat(600)), Err(LimitExceeded::Values(1000)));
        assert!(started(&[&b"\""[..], &b"{},".repeat(600)].concat()).is_ok());
    }

    #[test]
    fn a_line_that_is_no_object_ends_with_the_line() {
        let stream = b"[[{\"\n\x1b[0mlogin: {\n}}\n{\"return\": 1}\n";
        let expected = ["[[{\"", "\u{1b}[0mlogin: {", "}}", "{\"return\": 1}"].map(message);
        assert_eq!(frames_of(stream).unwrap(), expected);
    }

    proptest! {
        #[test]
        fn cutting_does_not_depend_on_how_bytes_arrive(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0..300usize) {
            let whole = frames_of(&bytes);
            let at = at.min(bytes.len());
            let mut framer = Framer::new(SMALL);
            let mut frames = Vec::new();
            let parts = framer.push(&bytes[..at], &mut frames).and_then(|()| framer.push(&bytes[at..], &mut frames));
            prop_assert_eq!(whole, parts.map(|()| frames));
        }
    }
}
