//! Copying the bytes of an image: holes stay holes, zeroes become holes, several threads at once.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use host::Error as HostError;
use host::watch::{Pace, Watch};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::PoolError;
use crate::qcow2::ReadAt;

/// Bytes read at once. Larger buffers leave the processor's cache.
const PIECE: u64 = 1 << 20;
/// Zeroes of this size and on such a boundary become holes; a smaller hole saves no block.
const GRAIN: usize = 64 << 10;
/// Threads that copy at most. The kernel's copy to and from its cache is what takes the time, so that more threads than
/// processors only get in each other's way.
const THREADS_MAX: usize = 4;

/// What is copied, and how.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// A file or a device.
    pub from: &'a Path,
    /// A file or a device, which is there.
    pub to: &'a Path,
    /// So many bytes.
    pub length: u64,
    /// Whether the target reads as zeroes already.
    pub zeroed: bool,
}

/// A stretch of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stretch {
    Data { offset: u64, length: u64 },
    Hole { offset: u64, length: u64 },
}

/// Copies, and syncs nothing: whoever publishes the target does.
///
/// # Errors
/// [`PoolError::Host`]; [`PoolError::Interrupted`].
pub fn copy(job: Job<'_>, pace: &Pace, watch: &Watch) -> Result<(), PoolError> {
    let source = File::open(job.from).map_err(HostError::io("open", job.from))?;
    let target = File::options().write(true).open(job.to).map_err(HostError::io("open", job.to))?;
    watch.begin(job.length);
    let walk = Mutex::new(Walk { at: 0, end: job.length, data_until: 0, source: &source });
    let copied = Mutex::new(0);
    let worker = Worker { job, source: &source, target: &target, walk: &walk, copied: &copied, pace, watch };
    let count = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let results: Vec<Result<(), PoolError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(|| worker.run())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(Ok(()))).collect()
    });
    results.into_iter().collect()
}

/// Walks over the stretches of a file.
struct Walk<'a> {
    at: u64,
    end: u64,
    data_until: u64,
    source: &'a File,
}

impl Walk<'_> {
    /// The next stretch, data at most [`PIECE`] long; none at the end.
    fn next(&mut self) -> io::Result<Option<Stretch>> {
        if self.at >= self.end {
            return Ok(None);
        }
        let offset = self.at;
        if offset >= self.data_until {
            let data = match seek(self.source, SeekFrom::Data(offset)) {
                Ok(data) => data,
                // Nothing but a hole from here on.
                Err(Errno::NXIO) => self.end,
                // A device, or a file system that does not tell.
                Err(_) => offset,
            };
            if data > offset {
                self.at = data.min(self.end);
                return Ok(Some(Stretch::Hole { offset, length: self.at - offset }));
            }
            let hole = seek(self.source, SeekFrom::Hole(offset)).unwrap_or(self.end);
            self.data_until = if hole > offset { hole.min(self.end) } else { self.end };
        }
        // Pieces end on boundaries, whatever an extent begins with.
        let boundary = (offset / PIECE + 1) * PIECE;
        self.at = boundary.min(self.data_until);
        Ok(Some(Stretch::Data { offset, length: self.at - offset }))
    }
}

/// What each thread has.
struct Worker<'a> {
    job: Job<'a>,
    source: &'a File,
    target: &'a File,
    walk: &'a Mutex<Walk<'a>>,
    copied: &'a Mutex<u64>,
    pace: &'a Pace,
    watch: &'a Watch,
}

impl Worker<'_> {
    fn run(&self) -> Result<(), PoolError> {
        let mut buffer = vec![0; usize::try_from(PIECE).unwrap_or(0)];
        loop {
            let next = self.walk.lock().unwrap_or_else(PoisonError::into_inner).next();
            let length = match next.map_err(HostError::io("look for data in", self.job.from))? {
                None => return Ok(()),
                Some(Stretch::Hole { offset, length }) => {
                    self.zero(offset, length)?;
                    length
                }
                Some(Stretch::Data { offset, length }) => {
                    self.pace.keep(self.count(length), self.watch)?;
                    self.piece(&mut buffer[..usize::try_from(length).unwrap_or(0)], offset)?;
                    length
                }
            };
            self.watch.add(length);
        }
    }

    /// Bytes of data that were begun before this stretch.
    fn count(&self, length: u64) -> u64 {
        let mut copied = self.copied.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *copied;
        *copied += length;
        before
    }

    fn piece(&self, buffer: &mut [u8], offset: u64) -> Result<(), PoolError> {
        let read = self.source.read_at_all(buffer, offset).map_err(HostError::io("read", self.job.from))?;
        // Cut off meanwhile: what is behind the end reads as zeroes.
        buffer[read..].fill(0);
        for (start, length, is_zero) in runs(buffer) {
            let at = offset + start as u64;
            if is_zero {
                self.zero(at, length as u64)?;
            } else {
                let bytes = &buffer[start..start + length];
                self.target.write_all_at(bytes, at).map_err(HostError::io("write", self.job.to))?;
                self.write_back(at, length as u64);
            }
        }
        Ok(())
    }

    /// Lets the kernel begin to write it to the device now: the sync at the end waits for all that is left.
    ///
    /// Source: posix_fadvise(2); mm/fadvise.c, `POSIX_FADV_DONTNEED` begins the write-back of dirty pages.
    fn write_back(&self, offset: u64, length: u64) {
        let length = std::num::NonZeroU64::new(length);
        // Advice: where it is not taken nothing is lost.
        let _ = rustix::fs::fadvise(self.target, offset, length, rustix::fs::Advice::DontNeed);
    }

    fn zero(&self, offset: u64, length: u64) -> Result<(), PoolError> {
        if self.job.zeroed {
            return Ok(());
        }
        write_zeroes(self.target, self.job.to, offset, length)
    }
}

/// Reading as far as there is something.
trait ReadAtAll {
    fn read_at_all(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
}

impl ReadAtAll for File {
    fn read_at_all(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        ReadAt::read_at(self, buffer, offset)
    }
}

/// Lets a part of a file or device read as zeroes, without writing them where the system can do that.
///
/// # Errors
/// [`PoolError::Host`].
///
/// Source: fallocate(2), `FALLOC_FL_ZERO_RANGE`, which block devices know too.
pub fn write_zeroes(target: &File, path: &Path, offset: u64, length: u64) -> Result<(), PoolError> {
    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    if fallocate(target, flags, offset, length).is_ok() {
        return Ok(());
    }
    let zeroes = vec![0; usize::try_from(length.min(PIECE)).unwrap_or(0)];
    let mut at = offset;
    while at < offset + length {
        let piece = usize::try_from((offset + length - at).min(PIECE)).unwrap_or(0);
        target.write_all_at(&zeroes[..piece], at).map_err(HostError::io("write", path))?;
        at += piece as u64;
    }
    Ok(())
}

/// The runs of grains that are all zero, or are not: start, length, whether it is zero.
fn runs(buffer: &[u8]) -> Vec<(usize, usize, bool)> {
    let mut runs: Vec<(usize, usize, bool)> = Vec::new();
    for (index, grain) in buffer.chunks(GRAIN).enumerate() {
        let zero = is_zero(grain);
        match runs.last_mut() {
            Some((_, length, last)) if *last == zero => *length += grain.len(),
            _ => runs.push((index * GRAIN, grain.len(), zero)),
        }
    }
    runs
}

/// Compares the bytes with themselves, one further on: that is one `memcmp`.
fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && rest == &bytes[..bytes.len() - 1],
    }
}

/// Reads a file through, piece by piece, and hands each with its offset on; holes are left out.
///
/// # Errors
/// [`PoolError::Host`], [`PoolError::Interrupted`], and what `take` says.
pub fn for_each_data(
    path: &Path,
    file: &File,
    length: u64,
    watch: &Watch,
    mut take: impl FnMut(u64, u64) -> Result<(), PoolError>,
) -> Result<(), PoolError> {
    let mut walk = Walk { at: 0, end: length, data_until: 0, source: file };
    while let Some(stretch) = walk.next().map_err(HostError::io("look for data in", path))? {
        watch.check()?;
        if let Stretch::Data { offset, length } = stretch {
            take(offset, length)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    fn copied(source: &[(u64, u8, usize)], length: u64, before: Option<u8>) -> (Vec<u8>, Vec<u8>, u64) {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(length).unwrap();
        for (offset, byte, count) in source {
            file.write_all_at(&vec![*byte; *count], *offset).unwrap();
        }
        file.set_len(length).unwrap();
        let target = File::create(&to).unwrap();
        target.set_len(length).unwrap();
        if let Some(byte) = before {
            target.write_all_at(&vec![byte; length as usize], 0).unwrap();
        }
        let job = Job { from: &from, to: &to, length, zeroed: before.is_none() };
        copy(job, &Pace::new(None), &Watch::default()).unwrap();
        let blocks = std::fs::metadata(&to).unwrap().blocks() * 512;
        (std::fs::read(from).unwrap(), std::fs::read(to).unwrap(), blocks)
    }

    #[test]
    fn zeroes_that_were_written_become_holes() {
        let (from, to, blocks) = copied(&[(0, 7, 10), (1 << 20, 0, 8 << 20)], 16 << 20, None);
        assert!(from == to);
        assert!(blocks <= 128 << 10, "{blocks}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_copy_is_the_same_whatever_was_there_before(
            stretches in prop::collection::vec((0u64..3 << 20, any::<u8>(), 1usize..200_000), 0..6),
            length in 1u64..3 << 20,
            before in prop::option::of(1u8..),
        ) {
            let (from, to, _) = copied(&stretches, length, before);
            prop_assert!(from == to);
        }
    }

    #[test]
    fn a_signal_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::write(&from, vec![1; 4 << 20]).unwrap();
        File::create(&to).unwrap();
        let watch = Watch::default();
        watch.flag().store(15, std::sync::atomic::Ordering::Relaxed);
        let job = Job { from: &from, to: &to, length: 4 << 20, zeroed: true };
        assert!(matches!(copy(job, &Pace::new(Some(1)), &watch), Err(PoolError::Interrupted(_))));
    }
}
