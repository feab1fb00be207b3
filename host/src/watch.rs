//! What a long piece of work asks and tells while it goes on: whether it is to end, and how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Shared between the thread that works and the one that shows and listens.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    signal: Arc<AtomicUsize>,
    done: Arc<AtomicU64>,
    total: Arc<AtomicU64>,
}

/// A signal asks to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted by signal {0}")]
pub struct Interrupted(
    /// The signal's number.
    pub i32,
);

impl Watch {
    /// Where a signal handler puts the signal's number.
    pub fn flag(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.signal)
    }

    /// Whether the work may go on.
    ///
    /// # Errors
    /// [`Interrupted`] if a signal asks to end.
    pub fn check(&self) -> Result<(), Interrupted> {
        match self.signal.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => Err(Interrupted(i32::try_from(signal).unwrap_or(i32::MAX))),
        }
    }

    /// Begins a piece of `total` bytes.
    pub fn begin(&self, total: u64) {
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// So many bytes more are done.
    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes of all are done.
    pub fn set(&self, bytes: u64) {
        self.done.store(bytes, Ordering::Relaxed);
    }

    /// Bytes done, and of how many; none while it is not known.
    pub fn progress(&self) -> Option<(u64, u64)> {
        let (done, total) = (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
        (total > 0).then(|| (done.min(total), total))
    }
}

/// Lets work go on at so many bytes a second at most, counted from its begin.
#[derive(Clone, Debug)]
pub struct Pace {
    began: Instant,
    bytes_per_second: Option<u64>,
}

/// Longest sleep at once, so that a signal is heard.
const NAP: Duration = Duration::from_millis(100);

impl Pace {
    /// Begins now; without a limit nothing is held back.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { began: Instant::now(), bytes_per_second }
    }

    /// Waits until `done` bytes are not too many.
    ///
    /// # Errors
    /// [`Interrupted`] if a signal asks to end meanwhile.
    pub fn keep(&self, done: u64, watch: &Watch) -> Result<(), Interrupted> {
        let Some(limit) = self.bytes_per_second.filter(|limit| *limit > 0) else { return watch.check() };
        let due = self.began + Duration::from_secs_f64(done as f64 / limit as f64);
        loop {
            watch.check()?;
            match due.checked_duration_since(Instant::now()) {
                None => return Ok(()),
                Some(rest) => std::thread::sleep(rest.min(NAP)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_seen_and_ends_a_wait() {
        let watch = Watch::default();
        let pace = Pace::new(Some(1));
        assert_eq!(watch.check().and_then(|()| pace.keep(0, &watch)), Ok(()));
        watch.flag().store(15, Ordering::Relaxed);
        assert_eq!(pace.keep(3600, &watch), Err(Interrupted(15)));
    }

    #[test]
    fn progress_is_known_from_its_begin_and_never_more_than_all() {
        let watch = Watch::default();
        assert_eq!(watch.progress(), None);
        watch.begin(10);
        watch.add(4);
        assert_eq!(watch.progress(), Some((4, 10)));
        watch.add(40);
        assert_eq!(watch.progress(), Some((10, 10)));
    }
}
