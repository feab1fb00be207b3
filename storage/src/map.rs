//! What a guest reads, and from which layer of a chain: the maps of all layers, one through the other.
//!
//! Source: qemu-img(1) "map", whose output this is compared with in the tests.

use std::fs::File;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use model::ImageFormat;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::chain::Chain;
use crate::file;
use crate::qcow2::map::{Extent, Kind, Map};
use crate::qcow2::{Header, Qcow2Error};

/// Tables may be so much larger than the room that the file takes; a sparse file can hold empty ones.
const BUDGET_SLACK: u64 = 1 << 30;

/// A stretch of the guest's disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Where it starts.
    pub start: u64,
    /// How long it is; never 0.
    pub length: u64,
    /// What it is. Never [`Kind::Unallocated`]: what no layer has reads as zeroes.
    pub kind: Kind,
    /// In which layer it is: 0 for the active one, 1 for what that stands on.
    pub depth: usize,
}

/// One layer, open.
struct Layer {
    path: PathBuf,
    file: File,
    size: u64,
    header: Option<Header>,
    budget: u64,
}

/// Hands over what a guest reads through `chain`, in order and without a gap, neighbours of one kind as one.
///
/// # Errors
/// [`Qcow2Error`] at the first fault; what `take` says.
pub fn of_chain<E: From<Qcow2Error>>(
    chain: &Chain,
    take: &mut dyn FnMut(Stretch) -> Result<(), E>,
) -> Result<(), E> {
    let layers: Result<Vec<Layer>, Qcow2Error> =
        chain.layers().rev().map(|layer| Layer::open(&layer.path, layer.format)).collect();
    let layers = layers?;
    let size = chain.active().virtual_size.0;
    let mut joined = Joined { pending: None, take };
    walk(&layers, 0, 0, size, &mut joined)?;
    joined.end()
}

impl Layer {
    fn open(path: &Path, format: ImageFormat) -> Result<Self, Qcow2Error> {
        let mut opened = file::open(path)?;
        let header = match format {
            ImageFormat::Qcow2 => Some(Header::read(&opened.file, path)?),
            ImageFormat::Raw => None,
        };
        let length = opened.size(path)?;
        let room = if opened.metadata.is_file() { crate::allocated(&opened.metadata).0 } else { length };
        let size = header.as_ref().map_or(length, |header| header.virtual_size.0);
        let budget = room.saturating_add(BUDGET_SLACK);
        Ok(Self { path: path.to_owned(), file: opened.file, size, header, budget })
    }

    /// Its own extents between two of the guest's bytes.
    fn extents(&self, start: u64, end: u64) -> Box<dyn Iterator<Item = Result<Extent, Qcow2Error>> + '_> {
        match &self.header {
            Some(header) => Box::new(Map::between(&self.file, header, &self.path, self.budget, start, end)),
            None => Box::new(RawMap { layer: self, at: start, end }),
        }
    }
}

/// The extents of a raw file: its file system tells where it has holes.
struct RawMap<'a> {
    layer: &'a Layer,
    at: u64,
    end: u64,
}

impl RawMap<'_> {
    fn step(&self) -> Result<Extent, HostError> {
        let (file, at, end) = (&self.layer.file, self.at, self.end);
        let failed = |errno: Errno| HostError::io("look for data in", &self.layer.path)(errno.into());
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => end,
            // A device, or a file system that does not tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(errno) => return Err(failed(errno)),
        };
        if data > at {
            return Ok(Extent { start: at, length: data.min(end) - at, kind: Kind::Zero });
        }
        let hole = seek(file, SeekFrom::Hole(at)).unwrap_or(end).min(end);
        let length = if hole > at { hole - at } else { end - at };
        Ok(Extent { start: at, length, kind: Kind::Data { offset: at } })
    }
}

impl Iterator for RawMap<'_> {
    type Item = Result<Extent, Qcow2Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let step = self.step().map_err(Qcow2Error::from);
        self.at = step.as_ref().map_or(self.end, |extent| extent.start + extent.length);
        Some(step)
    }
}

/// What is between two bytes, in the layers from `depth` on.
fn walk<E: From<Qcow2Error>>(
    layers: &[Layer],
    depth: usize,
    start: u64,
    end: u64,
    joined: &mut Joined<'_, E>,
) -> Result<(), E> {
    let zero = |start: u64, end: u64| Stretch { start, length: end - start, kind: Kind::Zero, depth };
    let Some(layer) = layers.get(depth) else { return joined.add(zero(start, end)) };
    // A layer can be shorter than what stands on it.
    let own_end = layer.size.clamp(start, end);
    for extent in layer.extents(start, own_end) {
        let Extent { start, length, kind } = extent?;
        match kind {
            Kind::Unallocated => walk(layers, depth + 1, start, start + length, joined)?,
            kind => joined.add(Stretch { start, length, kind, depth })?,
        }
    }
    if own_end < end { joined.add(zero(own_end, end)) } else { Ok(()) }
}

/// Hands stretches on when it is known where they end.
struct Joined<'a, E> {
    pending: Option<Stretch>,
    take: &'a mut dyn FnMut(Stretch) -> Result<(), E>,
}

impl<E> Joined<'_, E> {
    fn add(&mut self, next: Stretch) -> Result<(), E> {
        let Some(before) = self.pending else {
            self.pending = Some(next);
            return Ok(());
        };
        let goes_on = match (before.kind, next.kind) {
            (Kind::Data { offset }, Kind::Data { offset: further }) => {
                before.depth == next.depth && offset + before.length == further
            }
            // Where zeroes come from makes no difference to anybody.
            (Kind::Zero, Kind::Zero) => true,
            (Kind::Compressed, Kind::Compressed) => before.depth == next.depth,
            _ => false,
        };
        if goes_on {
            self.pending = Some(Stretch { length: before.length + next.length, ..before });
            return Ok(());
        }
        self.pending = Some(next);
        (self.take)(before)
    }

    fn end(self) -> Result<(), E> {
        self.pending.map_or(Ok(()), self.take)
    }
}
