//! What of the guest's disk is in an image, and where: its L1 and L2 tables, read by somebody who does not trust them.
//!
//! One L2 table is held at a time, and no table is longer than a cluster (2 MiB). An image can claim more tables than
//! it has room for, so what is read of them all is bounded by a budget. What QEMU would call a corruption is a fault
//! here.
//!
//! Source: QEMU docs/interop/qcow2.txt "Cluster mapping", "Extended L2 Entries"; block/qcow2.h
//! `qcow2_get_subcluster_type`, block/qcow2-cluster.c `qcow2_get_host_offset`.

use std::path::Path;

use model::ByteSize;

use super::{Fault, Header, Qcow2Error, ReadAt, read_from};

/// Bits 9 to 55 of an entry of either table.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Subclusters of a cluster with an extended entry.
const SUBCLUSTERS: u32 = 32;
/// A compressed cluster's length counts these.
const COMPRESSED_SECTOR: u64 = 512;
/// Entries of the L1 table that are read at once.
const L1_PIECE: u64 = 8192;

/// What a stretch of the guest's disk is in one image; other images below it are another question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It is in the image, or in its external data file, from this byte on.
    Data {
        /// The byte.
        offset: u64,
    },
    /// It is in the image, compressed.
    Compressed,
    /// It reads as zeroes, whatever is below.
    Zero,
    /// It is not in the image: it reads as what is below, or as zeroes where nothing is.
    Unallocated,
}

/// A stretch of the guest's disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts.
    pub start: u64,
    /// How long it is; never 0.
    pub length: u64,
    /// What it is.
    pub kind: Kind,
}

/// Walks over the whole disk of a guest, in order, without a gap; neighbours of one kind come as one.
///
/// It ends at its first fault.
#[derive(Debug)]
pub struct Map<'a, F: ?Sized> {
    tables: Tables<'a, F>,
    size: u64,
    /// Where the next cluster, or subcluster, starts.
    at: u64,
    pending: Option<Extent>,
    failed: bool,
}

/// Where the tables are, and the pieces of them that are held.
#[derive(Debug)]
struct Tables<'a, F: ?Sized> {
    file: &'a F,
    path: &'a Path,
    shape: Shape,
    l1_offset: u64,
    l1_entries: u64,
    l1: Vec<u8>,
    l1_first: u64,
    l2: Vec<u8>,
    l2_index: Option<u64>,
    budget: u64,
}

/// What of the header decides how entries are read.
#[derive(Clone, Copy, Debug)]
struct Shape {
    cluster_bits: u32,
    extended: bool,
    zero_flag: bool,
    data_file: bool,
}

/// Extents that the caller asks for one after the other.
pub type Extents = Result<Extent, Qcow2Error>;

impl<'a, F: ReadAt + ?Sized> Map<'a, F> {
    /// The map of the image's active state. At most `budget` bytes of L2 tables are read: an image has no more of
    /// them than it has bytes.
    pub fn new(file: &'a F, header: &Header, path: &'a Path, budget: u64) -> Self {
        let (offset, entries) = (header.l1_offset, header.l1_entries);
        Self::of(file, header, path, budget, (offset, entries.into()), header.virtual_size)
    }

    /// A part of [`Map::new`].
    pub fn between(file: &'a F, header: &Header, path: &'a Path, budget: u64, start: u64, end: u64) -> Self {
        let map = Self::new(file, header, path, budget);
        Self { at: start, size: end.min(map.size), ..map }
    }

    /// The map of a state that is kept inside the image; see [`super::InternalSnapshot`].
    pub fn of_snapshot(
        file: &'a F,
        header: &Header,
        path: &'a Path,
        budget: u64,
        snapshot: &super::InternalSnapshot,
    ) -> Self {
        let l1 = (snapshot.l1_offset, snapshot.l1_entries.into());
        Self::of(file, header, path, budget, l1, snapshot.virtual_size.unwrap_or(header.virtual_size))
    }

    fn of(
        file: &'a F,
        header: &Header,
        path: &'a Path,
        budget: u64,
        (l1_offset, l1_entries): (u64, u64),
        size: ByteSize,
    ) -> Self {
        let shape = Shape {
            cluster_bits: header.cluster_bits,
            extended: header.incompatible.extended_l2(),
            zero_flag: header.version >= 3,
            data_file: header.incompatible.external_data(),
        };
        let tables = Tables {
            file,
            path,
            shape,
            l1_offset,
            l1_entries,
            l1: Vec::new(),
            l1_first: 0,
            l2: Vec::new(),
            l2_index: None,
            budget,
        };
        Self { tables, size: size.0, at: 0, pending: None, failed: false }
    }

    /// What comes next, from `self.at` on: as much as one table tells at once.
    fn step(&mut self) -> Result<Option<Extent>, Qcow2Error> {
        if self.at >= self.size {
            return Ok(None);
        }
        let (length, kind) = self.tables.look(self.at)?;
        let length = length.min(self.size - self.at);
        let extent = Extent { start: self.at, length, kind };
        self.at += length;
        Ok(Some(extent))
    }
}

impl<F: ReadAt + ?Sized> Iterator for Map<'_, F> {
    type Item = Extents;

    fn next(&mut self) -> Option<Extents> {
        if self.failed {
            return None;
        }
        loop {
            match (self.step(), self.pending) {
                (Err(fault), _) => {
                    self.failed = true;
                    return Some(Err(fault));
                }
                (Ok(None), pending) => {
                    self.pending = None;
                    return pending.map(Ok);
                }
                (Ok(next), None) => self.pending = next,
                (Ok(Some(next)), Some(before)) => match join(before, next) {
                    Some(joined) => self.pending = Some(joined),
                    None => {
                        self.pending = Some(next);
                        return Some(Ok(before));
                    }
                },
            }
        }
    }
}

/// Two neighbours as one, if they are of one kind; data only if it goes on in the image too.
fn join(before: Extent, next: Extent) -> Option<Extent> {
    let goes_on = match (before.kind, next.kind) {
        (Kind::Data { offset }, Kind::Data { offset: further }) => {
            offset.checked_add(before.length) == Some(further)
        }
        (one, other) => one == other,
    };
    goes_on.then(|| Extent { length: before.length + next.length, ..before })
}

impl Shape {
    const fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    const fn entry_size(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Bytes of the guest's disk that one L2 table maps.
    const fn mapped_by_l2(self) -> u64 {
        self.cluster() / self.entry_size() * self.cluster()
    }
}

impl<F: ReadAt + ?Sized> Tables<'_, F> {
    /// What is at the guest's byte `at`, and for how long at least it stays that.
    fn look(&mut self, at: u64) -> Result<(u64, Kind), Qcow2Error> {
        let shape = self.shape;
        let index = at / shape.mapped_by_l2();
        let within = at % shape.mapped_by_l2();
        if self.l2_index != Some(index) {
            let Some(offset) = self.l2_offset(index)? else {
                return Ok((self.unmapped_from(index)? - within, Kind::Unallocated));
            };
            self.read_l2(index, offset)?;
        }
        let entry = within / shape.cluster();
        let place = usize::try_from(entry * shape.entry_size()).unwrap_or(usize::MAX);
        let word = |place: usize| self.l2.get(place..place + 8).map_or(0, super::entry);
        let value = word(place);
        let in_cluster = at % shape.cluster();
        if value == 0 && !shape.extended {
            return Ok((self.empty_run(place) - in_cluster, Kind::Unallocated));
        }
        if shape.extended && value & COMPRESSED == 0 {
            return self.subclusters(at, value, word(place + 8));
        }
        let kind = self.cluster_kind(at - in_cluster, value)?;
        let kind = match kind {
            Kind::Data { offset } => Kind::Data { offset: offset + in_cluster },
            other => other,
        };
        Ok((shape.cluster() - in_cluster, kind))
    }

    /// The L2 table for `index`; none where the L1 entry is empty.
    fn l2_offset(&mut self, index: u64) -> Result<Option<u64>, Qcow2Error> {
        let entry = self.l1_entry(index)?;
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            return Ok(None);
        }
        self.aligned("an L1 table entry", self.l1_offset + index * 8, offset)?;
        Ok(Some(offset))
    }

    /// Bytes from the start of L1 entry `index` on that no table maps.
    fn unmapped_from(&mut self, index: u64) -> Result<u64, Qcow2Error> {
        if index >= self.l1_entries {
            return Ok(u64::MAX);
        }
        // What is held already is looked at; more would cost a read for a longer stretch.
        let mut end = index + 1;
        let held = self.l1_first + self.l1.len() as u64 / 8;
        while end < held && self.l1_entry(end)? & OFFSET_MASK == 0 {
            end += 1;
        }
        Ok((end - index) * self.shape.mapped_by_l2())
    }

    fn l1_entry(&mut self, index: u64) -> Result<u64, Qcow2Error> {
        if index >= self.l1_entries {
            return Ok(0);
        }
        let held = self.l1_first + self.l1.len() as u64 / 8;
        if !(self.l1_first..held).contains(&index) {
            let count = L1_PIECE.min(self.l1_entries - index);
            self.l1 = self.read("the L1 table", self.l1_offset + index * 8, count * 8)?;
            self.l1_first = index;
        }
        let place = usize::try_from((index - self.l1_first) * 8).unwrap_or(usize::MAX);
        Ok(self.l1.get(place..place + 8).map_or(0, super::entry))
    }

    fn read_l2(&mut self, index: u64, offset: u64) -> Result<(), Qcow2Error> {
        let length = self.shape.cluster();
        self.budget = self.budget.checked_sub(length).ok_or_else(|| self.fault(Fault::TooManyTables))?;
        self.l2 = self.read("an L2 table", offset, length)?;
        self.l2_index = Some(index);
        Ok(())
    }

    /// Bytes of the guest's disk from the entry at `place` on whose entries are all empty.
    fn empty_run(&self, place: usize) -> u64 {
        let rest = self.l2.get(place..).unwrap_or_default();
        // Eight entries at once: most of a table is empty, or most is not.
        let lines = rest.chunks_exact(64).take_while(|line| **line == [0; 64]).count() * 8;
        let entries = rest.get(lines * 8..).unwrap_or_default().chunks_exact(8);
        let count = lines + entries.take_while(|entry| **entry == [0; 8]).count();
        (count as u64).saturating_mul(self.shape.cluster())
    }

    fn cluster_kind(&self, guest: u64, value: u64) -> Result<Kind, Qcow2Error> {
        if value & COMPRESSED != 0 {
            return self.compressed(guest, value);
        }
        let zero = value & ZERO != 0;
        if zero && !self.shape.zero_flag {
            return Err(self.fault(Fault::BadEntry {
                guest,
                value,
                why: "it is marked as zero, which version 2 does not know",
            }));
        }
        if zero {
            return Ok(Kind::Zero);
        }
        Ok(match self.host_offset(guest, value)? {
            None => Kind::Unallocated,
            Some(offset) => Kind::Data { offset },
        })
    }

    /// Where an entry points to; none if it is not allocated.
    fn host_offset(&self, guest: u64, value: u64) -> Result<Option<u64>, Qcow2Error> {
        let offset = value & OFFSET_MASK;
        // In a data file a cluster can be the first.
        if offset == 0 && !(self.shape.data_file && value & COPIED != 0) {
            return Ok(None);
        }
        if !offset.is_multiple_of(self.shape.cluster()) {
            return Err(self.fault(Fault::BadEntry { guest, value, why: "it points between clusters" }));
        }
        if self.shape.data_file && offset != guest {
            return Err(self.fault(Fault::BadEntry {
                guest,
                value,
                why: "it points elsewhere in the data file",
            }));
        }
        Ok(Some(offset))
    }

    fn compressed(&self, guest: u64, value: u64) -> Result<Kind, Qcow2Error> {
        let bad = |why| Err(self.fault(Fault::BadEntry { guest, value, why }));
        if self.shape.data_file {
            return bad("it is compressed, and the data is in another file");
        }
        let split = 62 - (self.shape.cluster_bits - 8);
        let offset = value & ((1 << split) - 1);
        let sectors = (value >> split) & ((1 << (self.shape.cluster_bits - 8)) - 1);
        let end = offset.checked_add((sectors + 1) * COMPRESSED_SECTOR);
        if offset == 0 || end.is_none_or(|end| end > i64::MAX as u64) {
            return bad("it points nowhere");
        }
        Ok(Kind::Compressed)
    }

    /// What is at `at`, in a cluster of 32 parts.
    fn subclusters(&self, at: u64, value: u64, bitmap: u64) -> Result<(u64, Kind), Qcow2Error> {
        let shape = self.shape;
        let size = shape.cluster() / u64::from(SUBCLUSTERS);
        let guest = at - at % shape.cluster();
        let host = self.host_offset(guest, value)?;
        let first = u32::try_from(at % shape.cluster() / size).unwrap_or(0);
        let kind_of = |part: u32| -> Result<Kind, Qcow2Error> {
            let (allocated, zero) = (bitmap >> part & 1 != 0, bitmap >> (part + 32) & 1 != 0);
            match (host, allocated, zero) {
                (_, true, true) => {
                    let why = "a subcluster is allocated and zero at once";
                    Err(self.fault(Fault::BadEntry { guest, value: bitmap, why }))
                }
                (None, true, false) => {
                    let why = "a subcluster is allocated, and its cluster is not";
                    Err(self.fault(Fault::BadEntry { guest, value: bitmap, why }))
                }
                (Some(offset), true, false) => Ok(Kind::Data { offset: offset + u64::from(part) * size }),
                (_, false, true) => Ok(Kind::Zero),
                (_, false, false) => Ok(Kind::Unallocated),
            }
        };
        let kind = kind_of(first)?;
        let mut part = first + 1;
        while part < SUBCLUSTERS && same(kind, kind_of(part)?) {
            part += 1;
        }
        let start = guest + u64::from(first) * size;
        let kind = match kind {
            Kind::Data { offset } => Kind::Data { offset: offset + (at - start) },
            other => other,
        };
        Ok((guest + u64::from(part) * size - at, kind))
    }

    fn aligned(&self, field: &'static str, at: u64, value: u64) -> Result<(), Qcow2Error> {
        let cluster = self.shape.cluster();
        if value.is_multiple_of(cluster) {
            return Ok(());
        }
        Err(self.fault(Fault::Misaligned { field, at, value, cluster }))
    }

    fn read(&self, part: &'static str, from: u64, length: u64) -> Result<Vec<u8>, Qcow2Error> {
        read_part(self.file, self.path, part, from, length)
    }

    fn fault(&self, fault: Fault) -> Qcow2Error {
        Qcow2Error::Header { path: self.path.to_owned(), fault }
    }
}

/// Whether two parts of one cluster are of one kind; within a cluster data goes on where it goes on.
fn same(one: Kind, other: Kind) -> bool {
    std::mem::discriminant(&one) == std::mem::discriminant(&other)
}

/// Exactly so many bytes, of which the caller knows that they are not too many.
pub(super) fn read_part(
    file: &(impl ReadAt + ?Sized),
    path: &Path,
    part: &'static str,
    from: u64,
    length: u64,
) -> Result<Vec<u8>, Qcow2Error> {
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    let wanted = bytes.len();
    read_from(file, &mut bytes, from, path)?;
    if bytes.len() == wanted {
        return Ok(bytes);
    }
    let end = from.saturating_add(bytes.len() as u64);
    let fault = Fault::CutOff { part, from, to: from.saturating_add(length), end };
    Err(Qcow2Error::Header { path: path.to_owned(), fault })
}
