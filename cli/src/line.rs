//! One line on a terminal that is drawn anew in its place, for what takes long.

use std::io::{self, Write};
use std::time::{Duration, Instant};

/// How often it is drawn anew.
const REDRAW: Duration = Duration::from_millis(100);

/// The line, on stderr.
#[derive(Default)]
pub struct Line {
    last: Option<Instant>,
    width: usize,
}

impl Line {
    /// Shows what `text` gives, unless something was shown a moment ago.
    pub fn show(&mut self, text: impl FnOnce() -> String) {
        if self.last.is_some_and(|last| last.elapsed() < REDRAW) {
            return;
        }
        let text = text();
        draw(&text, self.width);
        (self.width, self.last) = (text.chars().count(), Some(Instant::now()));
    }

    /// Takes the line away.
    pub fn clear(&mut self) {
        if self.width > 0 {
            draw("", self.width);
            self.width = 0;
        }
    }
}

/// Draws over a line of `before` characters.
fn draw(line: &str, before: usize) {
    let mut stderr = io::stderr().lock();
    // Nobody looks if stderr is gone.
    let _ = write!(stderr, "\r{line:before$}\r{line}");
    let _ = stderr.flush();
}
