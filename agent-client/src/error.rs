//! What can go wrong between snapctl and a monitor or an agent.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::frame::LimitExceeded;

/// A conversation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket could not be connected: absent, refused, or not permitted.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What `connect(2)` said.
        source: io::Error,
    },
    /// The connection was accepted, and then nothing came: another client holds the socket, or QEMU
    /// hangs. QEMU serves one client at a time and lets the others wait without a word.
    #[error("{} gave no greeting within {after:?}", path.display())]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        after: Duration,
    },
    /// What answers on the socket does not speak QMP.
    #[error("{} does not speak QMP: it began with {excerpt}", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// The start of what it said, escaped.
        excerpt: Excerpt,
    },
    /// No reply came in time. The command may still be carried out.
    #[error("no reply to {command} within {after:?}; it may still be carried out")]
    Timeout {
        /// The command's name.
        command: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The connection ended before the reply. The command may or may not have been carried out.
    #[error("the connection ended before the reply to {command}: {reason}")]
    Closed {
        /// The command's name.
        command: String,
        /// Why it ended.
        reason: CloseReason,
    },
    /// The peer refused the command.
    #[error("{command} was refused: {}", refusal.desc)]
    Refused {
        /// The command's name.
        command: String,
        /// What the peer said.
        refusal: Refusal,
    },
    /// The reply is JSON, but not of the promised shape.
    #[error("the reply to {command} is not what the protocol promises ({detail}): {excerpt}")]
    Unexpected {
        /// The command's name.
        command: String,
        /// What did not fit.
        detail: String,
        /// The start of the reply, escaped.
        excerpt: Excerpt,
    },
    /// This peer has no such command, or it was switched off there.
    #[error("{command} is not available: {why}")]
    Unavailable {
        /// The command's name.
        command: String,
        /// Absent or disabled, and what has it.
        why: String,
    },
    /// The arguments could not be written as JSON.
    #[error("the arguments of {command} cannot be written as JSON: {source}")]
    Encode {
        /// The command's name.
        command: String,
        /// What serde says.
        source: serde_json::Error,
    },
    /// Something local failed: a socket option, a process that could not be started.
    #[error("{what}: {source}")]
    Local {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// Whether the peer itself said no, so that the connection is sound.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Unavailable { .. })
    }
}

/// Why a connection ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CloseReason {
    /// The peer closed it.
    #[error("the other side closed it")]
    Eof,
    /// The peer went past its limits.
    #[error("{0}")]
    Limit(#[from] LimitExceeded),
    /// The peer sent something that is not the protocol.
    #[error("it sent what is not JSON of this protocol: {0}")]
    Malformed(Excerpt),
    /// Reading or writing failed.
    #[error("{0}")]
    Io(Arc<io::Error>),
    /// This side closed it.
    #[error("it was closed here")]
    Local,
}

/// An error reply of the peer.
///
/// Source: docs/interop/qmp-spec.rst, "Error".
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Refusal {
    /// QAPI error class, `GenericError` for nearly all.
    #[serde(default, deserialize_with = "escaped")]
    pub class: String,
    /// The peer's sentence, for people.
    #[serde(default, deserialize_with = "escaped")]
    pub desc: String,
}

/// Reads text that may be shown. For `deserialize_with`.
pub(crate) fn escaped<'de, D: serde::Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = <String as serde::Deserialize>::deserialize(from)?;
    Ok(printable(&text, 1000))
}

/// The start of what a peer sent, fit for a terminal: at most 120 characters, control characters escaped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excerpt(String);

impl Excerpt {
    /// Takes the start of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self::take(bytes, 120)
    }

    /// Takes more than fits in a message, for people who follow a conversation: 4000 characters.
    pub fn long(bytes: &[u8]) -> Self {
        Self::take(bytes, 4000)
    }

    fn take(bytes: &[u8], characters: usize) -> Self {
        // No character has more than four bytes.
        let start = &bytes[..bytes.len().min(characters * 4)];
        Self(printable(&String::from_utf8_lossy(start), characters))
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.0)
    }
}

/// Makes text of a guest or of QEMU fit for a terminal: control characters escaped, at most `max` characters.
pub fn printable(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for (at, c) in text.chars().enumerate() {
        if at == max {
            out.push('…');
            break;
        }
        if c.is_control() || steers(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Bidirectional controls can make a line read as another one, and so can line ends that are no control
/// characters. Source: Unicode standard annex 9, section 2.
fn steers(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p7_text_of_a_guest_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n", 20), "a\\u{1b}[2Jb\\n");
        assert_eq!(printable("abcdef", 3), "abc…");
        assert_eq!(printable("\u{202e}txt", 9), "\\u{202e}txt");
        assert_eq!(printable("\u{61c}\u{200f}\u{2028}", 9), "\\u{61c}\\u{200f}\\u{2028}");
        assert_eq!(Excerpt::of(&[0xff, b'x', 0]).to_string(), "`\u{fffd}x\\u{0}`");
    }
}
