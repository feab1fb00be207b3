//! Talking to the program inside the guest, and to the guest agent for its first sign of life.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// The line protocol of `lab-guest`.
#[derive(Debug)]
pub(super) struct Control {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    last_id: u64,
}

impl Control {
    pub(super) async fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).await.with_context(|| socket.display().to_string())?;
        let (reader, writer) = stream.into_split();
        Ok(Self { reader: BufReader::new(reader), writer, last_id: 0 })
    }

    /// Sends one command and returns the text of its answer; answers to earlier, abandoned ones are skipped.
    pub(super) async fn call(&mut self, command: &str, patience: Duration) -> Result<String> {
        self.last_id += 1;
        let id = self.last_id;
        self.writer.write_all(format!("{id} {command}\n").as_bytes()).await?;
        let answer = tokio::time::timeout(patience, self.answer(id)).await;
        answer.with_context(|| format!("the guest does not answer {command:?} within {patience:?}"))?
    }

    async fn answer(&mut self, id: u64) -> Result<String> {
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line).await? == 0 {
                bail!("the guest's control port was closed");
            }
            let mut words = line.trim_end_matches('\n').splitn(3, ' ');
            if words.next().and_then(|word| word.parse().ok()) != Some(id) {
                continue;
            }
            let (verdict, text) = (words.next(), unescaped(words.next().unwrap_or("")));
            match verdict {
                Some("ok") => return Ok(text),
                _ => bail!("the guest says: {text}"),
            }
        }
    }
}

/// Waits until the agent at `socket` answers a `guest-sync-delimited`.
///
/// Bytes that are sent before the agent has opened its port wait there, so one request is enough.
pub(super) async fn agent_answers(socket: &Path) -> Result<()> {
    let stream = UnixStream::connect(socket).await.with_context(|| socket.display().to_string())?;
    let (mut reader, mut writer) = stream.into_split();
    let request = b"\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":4711}}\n";
    writer.write_all(request).await?;
    let mut seen = Vec::new();
    loop {
        if reader.read_buf(&mut seen).await? == 0 {
            bail!("the agent's socket was closed");
        }
        let delimited = seen.iter().rposition(|&byte| byte == 0xff).map(|at| &seen[at + 1..]);
        if delimited.is_some_and(|reply| reply.ends_with(b"\n") && contains(reply, b"4711")) {
            return Ok(());
        }
    }
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}

/// Undoes `str::escape_default`.
fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, if c == '\\' { chars.next() } else { None }) {
            ('\\', Some('n')) => out.push('\n'),
            ('\\', Some('t')) => out.push('\t'),
            ('\\', Some('r')) => out.push('\r'),
            ('\\', Some('u')) => {
                let code: String = chars.by_ref().skip(1).take_while(|&c| c != '}').collect();
                out.extend(u32::from_str_radix(&code, 16).ok().and_then(char::from_u32));
            }
            ('\\', Some(other)) => out.push(other),
            (c, _) => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_text_comes_back() {
        let text = "a\tb\n'q' \"d\" \\ é \u{7}";
        assert_eq!(unescaped(&text.escape_default().to_string()), text);
    }
}
