//! What else a qcow2 image can hold: snapshots inside it, and dirty bitmaps.
//!
//! Source: QEMU docs/interop/qcow2.txt "Snapshots", "Bitmaps extension"; the limits are those of block/qcow2.h and
//! block/qcow2-bitmap.c.

use std::path::Path;

use jiff::Timestamp;
use model::ByteSize;

use super::map::read_part;
use super::{Bytes, Fault, Header, Qcow2Error, ReadAt, Span, in_range};

/// Largest snapshot table, and largest entry of it but for its names (`QCOW_MAX_SNAPSHOTS_SIZE`,
/// `QCOW_MAX_SNAPSHOT_EXTRA_DATA`).
const SNAPSHOTS_SIZE_MAX: u64 = 64 << 20;
const SNAPSHOT_EXTRA_MAX: u64 = 1024;
const SNAPSHOT_FIXED: u64 = 40;
/// Largest L1 table of a snapshot, in entries (`QCOW_MAX_L1_SIZE`).
const L1_ENTRIES_MAX: u64 = (32 << 20) / 8;
/// Largest bitmap directory (`QCOW2_MAX_BITMAP_DIRECTORY_SIZE`), most bitmaps, longest name.
const DIRECTORY_MAX: u64 = 64 << 20;
const BITMAPS_MAX: u64 = 65_535;
const BITMAP_NAME_MAX: u64 = 1023;
const BITMAP_FIXED: u64 = 24;
/// Largest table of one bitmap, in entries (`BME_MAX_TABLE_SIZE`).
const BITMAP_TABLE_MAX: u64 = 0x800_0000;
/// A bit of a bitmap stands for 2 to the power of this bytes (`BME_MIN_GRANULARITY_BITS`, …).
const GRANULARITY: (u64, u64) = (9, 31);
/// More pieces than this are not worth their memory.
const SPANS_MAX: usize = 1 << 20;
const IN_USE: u32 = 1;
const AUTO: u32 = 2;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// A state of the guest's disk that is kept inside the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternalSnapshot {
    /// QEMU's number for it, as text.
    pub id: String,
    /// Its name; control characters are `?`.
    pub name: String,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// How much of the guest's memory is kept with it.
    pub memory: ByteSize,
    /// The size that the guest saw then; none in old images.
    pub virtual_size: Option<ByteSize>,
    /// Where its L1 table starts.
    pub l1_offset: u64,
    /// Entries in its L1 table.
    pub l1_entries: u32,
}

/// A dirty bitmap as the image's directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name; control characters are `?`.
    pub name: String,
    /// A bit stands for 2 to the power of this bytes.
    pub granularity_bits: u32,
    /// It was not stored when the image was closed: what it says is not to be believed.
    pub in_use: bool,
    /// QEMU goes on with it whenever it opens the image.
    pub auto: bool,
    /// Where its table starts.
    pub table_offset: u64,
    /// Entries in its table.
    pub table_entries: u32,
}

/// Lists the snapshots inside an image.
///
/// # Errors
/// [`Qcow2Error`] if the table is cut off, or an entry is outside of what QEMU accepts.
pub fn snapshots(
    file: &(impl ReadAt + ?Sized),
    header: &Header,
    path: &Path,
) -> Result<Vec<InternalSnapshot>, Qcow2Error> {
    let faulty = |fault| Qcow2Error::Header { path: path.to_owned(), fault };
    let mut found = Vec::new();
    let mut at = header.snapshots_offset;
    for _ in 0..header.internal_snapshots {
        let bytes = read_part(file, path, "the snapshot table", at, SNAPSHOT_FIXED)?;
        let fixed = Bytes(&bytes);
        let read = |n: u64| fixed.u32("a snapshot", n).map(u64::from);
        let sizes = (|| {
            let names = read(12)?;
            let (id, name) = (names >> 16, names & 0xffff);
            let extra = read(36)?;
            in_range("extra_data_size of a snapshot", at + 36, extra, 0, SNAPSHOT_EXTRA_MAX)?;
            Ok((id, name, extra))
        })();
        let (id_size, name_size, extra) = sizes.map_err(faulty)?;
        let length = extra + id_size + name_size;
        let rest = read_part(file, path, "the snapshot table", at + SNAPSHOT_FIXED, length)?;
        found.push(snapshot(fixed, &rest, extra, id_size, header, at).map_err(faulty)?);
        at += (SNAPSHOT_FIXED + length).next_multiple_of(8);
        let size = at - header.snapshots_offset;
        in_range("size of the snapshot table", 64, size, 0, SNAPSHOTS_SIZE_MAX).map_err(faulty)?;
    }
    Ok(found)
}

fn snapshot(
    fixed: Bytes<'_>,
    rest: &[u8],
    extra: u64,
    id_size: u64,
    header: &Header,
    at: u64,
) -> Result<InternalSnapshot, Fault> {
    let rest = Bytes(rest);
    let l1_offset = fixed.u64("a snapshot", 0)?;
    let l1_entries = fixed.u32("a snapshot", 8)?;
    in_range("l1_size of a snapshot", at + 8, l1_entries.into(), 0, L1_ENTRIES_MAX)?;
    let cluster = header.cluster_size();
    if !l1_offset.is_multiple_of(cluster) {
        return Err(Fault::Misaligned {
            field: "l1_table_offset of a snapshot",
            at,
            value: l1_offset,
            cluster,
        });
    }
    in_range("l1_table_offset of a snapshot", at, l1_offset, 0, i64::MAX as u64 - (64 << 20))?;
    let (seconds, nanos) = (fixed.u32("a snapshot", 16)?, fixed.u32("a snapshot", 20)?);
    let small: u64 = fixed.u32("a snapshot", 32)?.into();
    let memory = if extra >= 8 { rest.u64("a snapshot", 0)? } else { small };
    let virtual_size = if extra >= 16 { Some(rest.u64("a snapshot", 8)?) } else { None };
    if let Some(size) = virtual_size {
        in_range("disk_size of a snapshot", at, size, 0, i64::MAX as u64)?;
    }
    let name_size = rest.0.len() as u64 - extra - id_size;
    Ok(InternalSnapshot {
        id: text(rest.slice("a snapshot's id", extra, id_size)?),
        name: text(rest.slice("a snapshot's name", extra + id_size, name_size)?),
        created: Timestamp::new(seconds.into(), i32::try_from(nanos).unwrap_or(0)).ok(),
        memory: ByteSize(memory),
        virtual_size: virtual_size.map(ByteSize),
        l1_offset,
        l1_entries,
    })
}

/// Lists the dirty bitmaps in an image. None where the header says that they are not to be believed
/// ([`super::Autoclear::bitmaps`]).
///
/// # Errors
/// [`Qcow2Error`] if the directory is cut off, or an entry is outside of what QEMU accepts.
pub fn bitmaps(
    file: &(impl ReadAt + ?Sized),
    header: &Header,
    path: &Path,
) -> Result<Vec<Bitmap>, Qcow2Error> {
    let (Some(count), Some(directory)) = (header.bitmaps, header.bitmap_directory) else {
        return Ok(Vec::new());
    };
    if !header.autoclear.bitmaps() {
        return Ok(Vec::new());
    }
    let faulty = |fault| Qcow2Error::Header { path: path.to_owned(), fault };
    let Span { offset, length } = directory;
    let limits = in_range("nb_bitmaps", offset, count.into(), 0, BITMAPS_MAX)
        .and_then(|()| in_range("bitmap_directory_size", offset, length, 0, DIRECTORY_MAX))
        .and_then(|()| {
            in_range("bitmap_directory_offset", offset, offset, 0, i64::MAX as u64 - DIRECTORY_MAX)
        });
    limits.map_err(faulty)?;
    let bytes = read_part(file, path, "the bitmap directory", offset, length)?;
    let bytes = Bytes(&bytes);
    let mut found = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let (bitmap, size) = bitmap(bytes, at, header.cluster_size()).map_err(faulty)?;
        found.push(bitmap);
        at += size;
    }
    Ok(found)
}

/// One entry of the directory, and its length.
fn bitmap(bytes: Bytes<'_>, at: u64, cluster: u64) -> Result<(Bitmap, u64), Fault> {
    let part = "a bitmap's directory entry";
    let table_offset = bytes.u64(part, at)?;
    if !table_offset.is_multiple_of(cluster) {
        return Err(Fault::Misaligned { field: "bitmap_table_offset", at, value: table_offset, cluster });
    }
    in_range("bitmap_table_offset", at, table_offset, 0, i64::MAX as u64 - BITMAP_TABLE_MAX * 8)?;
    let table_entries = bytes.u32(part, at + 8)?;
    in_range("bitmap_table_size", at + 8, table_entries.into(), 0, BITMAP_TABLE_MAX)?;
    let flags = bytes.u32(part, at + 12)?;
    let [kind, granularity, name_high, name_low] = bytes.array::<4>(part, at + 16)?;
    in_range("type of a bitmap", at + 16, kind.into(), 1, 1)?;
    in_range("granularity_bits", at + 17, granularity.into(), GRANULARITY.0, GRANULARITY.1)?;
    let name_size = u64::from(u16::from_be_bytes([name_high, name_low]));
    in_range("name_size of a bitmap", at + 18, name_size, 1, BITMAP_NAME_MAX)?;
    let extra = u64::from(bytes.u32(part, at + 20)?);
    in_range("extra_data_size of a bitmap", at + 20, extra, 0, DIRECTORY_MAX)?;
    let name = text(bytes.slice("a bitmap's name", at + BITMAP_FIXED + extra, name_size)?);
    let bitmap = Bitmap {
        name,
        granularity_bits: granularity.into(),
        in_use: flags & IN_USE != 0,
        auto: flags & AUTO != 0,
        table_offset,
        table_entries,
    };
    Ok((bitmap, (BITMAP_FIXED + extra + name_size).next_multiple_of(8)))
}

/// The stretches of the guest's disk that a bitmap marks, in order, neighbours as one. What is marked in too many
/// pieces is marked with what lies between.
///
/// At most `budget` bytes of bits are read: an image has no more of them than it has bytes.
///
/// # Errors
/// [`Qcow2Error`] if its table or a part of it is cut off, or points between clusters.
pub fn dirty(
    file: &(impl ReadAt + ?Sized),
    header: &Header,
    path: &Path,
    bitmap: &Bitmap,
    budget: u64,
) -> Result<Vec<Span>, Qcow2Error> {
    let mut budget = budget;
    let cluster = header.cluster_size();
    let granularity = 1_u64 << bitmap.granularity_bits;
    let size = header.virtual_size.0;
    // The bits of the whole disk: a table cannot need more clusters than these take.
    let needed = size.div_ceil(granularity).div_ceil(8).div_ceil(cluster);
    let entries = u64::from(bitmap.table_entries).min(needed);
    let mut marked = Marked { spans: Vec::new(), granularity, size };
    let mut index = 0;
    while index < entries {
        let count = (entries - index).min(8192);
        let table = read_part(file, path, "a bitmap's table", bitmap.table_offset + index * 8, count * 8)?;
        for (entry, nth) in table.chunks_exact(8).map(super::entry).zip(index..) {
            let first = nth * cluster * 8;
            let offset = entry & OFFSET_MASK;
            if offset == 0 {
                if entry & 1 != 0 {
                    marked.add(first, cluster * 8);
                }
                continue;
            }
            if !offset.is_multiple_of(cluster) {
                let at = bitmap.table_offset + nth * 8;
                let fault =
                    Fault::Misaligned { field: "an entry of a bitmap's table", at, value: offset, cluster };
                return Err(Qcow2Error::Header { path: path.to_owned(), fault });
            }
            budget = budget
                .checked_sub(cluster)
                .ok_or_else(|| Qcow2Error::Header { path: path.to_owned(), fault: Fault::TooManyTables })?;
            let bits = read_part(file, path, "a part of a bitmap", offset, cluster)?;
            marked.add_bits(first, &bits);
        }
        index += count;
    }
    Ok(marked.spans)
}

/// Marked stretches as they come.
struct Marked {
    spans: Vec<Span>,
    granularity: u64,
    size: u64,
}

impl Marked {
    /// Bits from `first` on, least significant first in each byte.
    fn add_bits(&mut self, first: u64, bytes: &[u8]) {
        for (byte, index) in bytes.iter().zip(0_u64..) {
            match *byte {
                0 => {}
                0xff => self.add(first + index * 8, 8),
                byte => (0..8)
                    .filter(|bit| byte >> bit & 1 != 0)
                    .for_each(|bit| self.add(first + index * 8 + bit, 1)),
            }
        }
    }

    fn add(&mut self, bit: u64, count: u64) {
        let offset = bit.saturating_mul(self.granularity);
        let end = bit.saturating_add(count).saturating_mul(self.granularity).min(self.size);
        if offset >= end {
            return;
        }
        let pieces = self.spans.len();
        match self.spans.last_mut() {
            Some(last) if last.offset + last.length == offset || pieces >= SPANS_MAX => {
                last.length = end - last.offset;
            }
            _ => self.spans.push(Span { offset, length: end - offset }),
        }
    }
}

/// A name that can be printed.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
