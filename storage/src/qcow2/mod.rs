//! A qcow2 image, read by somebody who does not trust it: its header here, its map in [`map`], what else it holds in [`inside`].
//!
//! Of the header only the first cluster is read (at most 2 MiB), of all tables bounded parts. Nothing is ever written, no file that a header names is opened, and no number from a header
//! sizes an allocation before it was compared with a limit. The limits are QEMU's own, so that what is
//! refused here is refused there.
//!
//! A header that is ambiguous (two backing formats, a NUL inside a name) is refused, since QEMU and other
//! readers would disagree about it.
//!
//! Source: QEMU docs/interop/qcow2.txt; block/qcow2.c `qcow2_do_open`, block/qcow2.h for the limits.

pub mod inside;
pub mod map;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use model::ByteSize;

pub use inside::InternalSnapshot;

/// The first four bytes of every qcow2 image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Longest backing file name in bytes (docs/interop/qcow2.txt, `backing_file_size`).
pub const BACKING_NAME_MAX: u64 = 1023;

/// Smallest and largest `cluster_bits`: 512 bytes to 2 MiB (block/qcow2.h `MIN_CLUSTER_BITS`).
const CLUSTER_BITS: (u64, u64) = (9, 21);

/// Bytes of a version 2 header, and of the shortest version 3 header.
const V2_LENGTH: u64 = 72;
const V3_LENGTH: u64 = 104;

/// Largest L1 table in bytes (block/qcow2.h `QCOW_MAX_L1_SIZE`).
const L1_MAX: u64 = 32 << 20;

/// Largest refcount table in bytes (block/qcow2.h `QCOW_MAX_REFTABLE_SIZE`).
const REFTABLE_MAX: u64 = 8 << 20;

/// Most internal snapshots (block/qcow2.h `QCOW_MAX_SNAPSHOTS`).
const SNAPSHOTS_MAX: u64 = 65536;

/// Largest `refcount_order`: 64-bit refcounts.
const REFCOUNT_ORDER_MAX: u64 = 6;

/// Largest virtual size: what a signed 64-bit offset can name (`BDRV_MAX_LENGTH` is a little below).
const SIZE_MAX: u64 = i64::MAX as u64;

/// Longest name of a backing format, with QEMU's terminating NUL (`BlockDriverState.backing_format`).
const FORMAT_NAME_MAX: u64 = 15;

/// Most header extensions that are looked at; QEMU writes six at most.
const EXTENSIONS_MAX: usize = 64;

/// Bytes of L2 tables that [`is_pristine`] reads before it gives up and says no.
const L2_READ_MAX: u64 = 64 << 20;

/// Header extensions by their type.
mod extension {
    pub const END: u32 = 0;
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    pub const BITMAPS: u32 = 0x2385_2875;
    pub const ENCRYPTION: u32 = 0x0537_be77;
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// An image could not be read as qcow2.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// The file could not be opened or read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The header does not hold what a qcow2 header holds.
    #[error("{} is not a sound qcow2 image: {fault}", path.display())]
    Header {
        /// The image.
        path: PathBuf,
        /// What is wrong, and where.
        fault: Fault,
    },
}

/// What is wrong in a header. Offsets are bytes from the start of the image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The first four bytes are others.
    #[error("it begins with {}, a qcow2 image begins with {}", found.escape_ascii(), MAGIC.escape_ascii())]
    Magic {
        /// The bytes found.
        found: [u8; 4],
    },
    /// A version that nobody has defined yet, or the obsolete first one.
    #[error("its version is {0}; versions 2 and 3 are known")]
    Version(u32),
    /// The image ends before a part that its header says it has.
    #[error("it is cut off: {part} takes bytes {from} to {to}, and the image ends at {end}")]
    CutOff {
        /// The part.
        part: &'static str,
        /// Where the part starts.
        from: u64,
        /// Where it would end.
        to: u64,
        /// Where the image ends, or as much of it as may be read.
        end: u64,
    },
    /// A number is outside of what it may be.
    #[error("{field} at byte {at} is {value}; {least} to {most} is possible")]
    OutOfRange {
        /// The field's name in docs/interop/qcow2.txt.
        field: &'static str,
        /// Where it stands.
        at: u64,
        /// What it holds.
        value: u64,
        /// The smallest possible value.
        least: u64,
        /// The largest possible value.
        most: u64,
    },
    /// A table does not start on a cluster boundary.
    #[error("{field} at byte {at} is {value}, which is not a multiple of the cluster size {cluster}")]
    Misaligned {
        /// The field's name in docs/interop/qcow2.txt.
        field: &'static str,
        /// Where it stands.
        at: u64,
        /// What it holds.
        value: u64,
        /// The cluster size in bytes.
        cluster: u64,
    },
    /// A name is not text that every reader takes for the same name.
    #[error("{field} at byte {at} is not a name: it holds {bytes:?}")]
    NotAName {
        /// Which name.
        field: &'static str,
        /// Where it stands.
        at: u64,
        /// The name's first bytes, escaped.
        bytes: String,
    },
    /// A header extension that may occur once occurs twice.
    #[error("the header extension {name} occurs twice, the second time at byte {at}")]
    Twice {
        /// Which extension.
        name: &'static str,
        /// Where it occurs again.
        at: u64,
    },
    /// An entry of an L2 table that QEMU would take for a corruption.
    #[error("the entry {value:#x} for the guest's byte {guest} is unsound: {why}")]
    BadEntry {
        /// The guest's byte that it maps.
        guest: u64,
        /// The entry.
        value: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// More L2 tables than the image has room for.
    #[error("it has more L2 tables than it has room for")]
    TooManyTables,
    /// More header extensions than any writer makes.
    #[error("it has more than {EXTENSIONS_MAX} header extensions")]
    TooManyExtensions,
}

/// What a qcow2 header says. It is all claims: none of the tables was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The cluster size is 2 to the power of this; 9 to 21.
    pub cluster_bits: u32,
    /// The size that the guest sees.
    pub virtual_size: ByteSize,
    /// The backing file's name as it stands there: not resolved, not trusted.
    pub backing_file: Option<OsString>,
    /// The name of the backing file's format, if the header gives one.
    pub backing_format: Option<String>,
    /// The name of the file that holds the guest's data in place of this one.
    pub data_file: Option<OsString>,
    /// How the guest's data is encrypted.
    pub encryption: Encryption,
    /// How clusters are compressed where they are.
    pub compression: Compression,
    /// Entries in the L1 table.
    pub l1_entries: u32,
    /// Where the L1 table starts.
    pub l1_offset: u64,
    /// Where the refcount table starts.
    pub refcount_table_offset: u64,
    /// Clusters in the refcount table.
    pub refcount_table_clusters: u32,
    /// Refcounts have 2 to the power of this bits; 4 in version 2.
    pub refcount_order: u32,
    /// Internal snapshots.
    pub internal_snapshots: u32,
    /// Where the table of internal snapshots starts.
    pub snapshots_offset: u64,
    /// Features that a reader must know.
    pub incompatible: Incompatible,
    /// Features that a reader may ignore.
    pub compatible: Compatible,
    /// Features that a writer clears when it does not know them.
    pub autoclear: Autoclear,
    /// Persistent dirty bitmaps, if the header says that it has any. They count only while
    /// [`Autoclear::bitmaps`] is set.
    pub bitmaps: Option<u32>,
    /// Where the directory of dirty bitmaps is, if the header says that it has any.
    pub bitmap_directory: Option<Span>,
    /// Where the LUKS header is, if the header says so.
    pub luks_header: Option<Span>,
    /// Types of header extensions that are not known here, in file order.
    pub unknown_extensions: Vec<u32>,
}

/// A part of the image, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
}

/// How the guest's data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Not at all.
    None,
    /// QEMU's own old way, which is not safe any more.
    Aes,
    /// With a LUKS header inside the image.
    Luks,
}

/// How clusters are compressed where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Deflate, as QEMU has always done.
    Zlib,
    /// Zstandard (QEMU 5.1 and later).
    Zstd,
    /// One that is not known here.
    Other(u8),
}

/// Defines a set of feature bits with the names of docs/interop/qcow2.txt.
macro_rules! features {
    ($(#[$doc:meta])* $name:ident { $($(#[$bit_doc:meta])* $method:ident = $bit:literal $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name(pub u64);

        impl $name {
            const KNOWN: &'static [(u32, &'static str)] = &[$(($bit, $text)),+];

            $($(#[$bit_doc])*
            pub const fn $method(self) -> bool {
                self.0 & (1 << $bit) != 0
            })+

            /// The numbers of the bits that are set and have no name here, ascending.
            pub fn unknown(self) -> Vec<u32> {
                let named = |bit: &u32| Self::KNOWN.iter().any(|(known, _)| known == bit);
                (0..64).filter(|bit| self.0 & (1 << bit) != 0 && !named(bit)).collect()
            }
        }

        impl fmt::Display for $name {
            /// The names of the set bits, with commas; unknown ones as `bit N`; `none` for no bit.
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let known = Self::KNOWN.iter().filter(|(bit, _)| self.0 & (1 << bit) != 0);
                let mut names: Vec<String> = known.map(|(_, name)| (*name).to_owned()).collect();
                names.extend(self.unknown().iter().map(|bit| format!("bit {bit}")));
                f.pad(&if names.is_empty() { "none".to_owned() } else { names.join(", ") })
            }
        }
    };
}

features! {
    /// Features that a reader must know, or not open the image.
    Incompatible {
        /// The image was not closed: its refcounts may be wrong, its guest data is right.
        dirty = 0 "dirty",
        /// QEMU found its tables damaged and will not write to it.
        corrupt = 1 "corrupt",
        /// The guest's data is in another file.
        external_data = 2 "external data file",
        /// The compression type is not zlib.
        compression = 3 "compression type",
        /// L2 entries have 16 bytes, with a bitmap of subclusters.
        extended_l2 = 4 "extended L2 entries",
    }
}

features! {
    /// Features that a reader may ignore.
    Compatible {
        /// Refcounts are brought up to date only when the image is closed.
        lazy_refcounts = 0 "lazy refcounts",
    }
}

features! {
    /// Features whose bit a writer that does not know them clears.
    Autoclear {
        /// The dirty bitmaps are consistent with the image.
        bitmaps = 0 "bitmaps",
        /// The external data file is by itself a raw image of the guest's data.
        raw_external_data = 1 "raw external data",
    }
}

/// Something that can be read at an offset: an image file, or its bytes in a test.
pub trait ReadAt {
    /// Reads into `buffer` from `offset`; fewer bytes only at the end. Returns how many.
    ///
    /// # Errors
    /// What the system said.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match FileExt::read_at(self, &mut buffer[done..], offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..)).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}

impl Header {
    /// Reads the header of the image at `path`, which must be a regular file or a block device itself,
    /// not a symlink to one.
    ///
    /// No lock is taken. In an image that a QEMU has open, the backing name, the formats and the sizes
    /// change only when QEMU is told to change them.
    ///
    /// # Errors
    /// [`Qcow2Error::Header`] if it is no qcow2 image or one with a fault; [`Qcow2Error::Host`] if it
    /// cannot be read.
    pub fn open(path: &Path) -> Result<Self, Qcow2Error> {
        Self::read(&crate::file::open(path)?.file, path)
    }

    /// As [`Header::open`], from a file that is open already; `path` is for messages.
    ///
    /// # Errors
    /// As [`Header::open`].
    pub fn read(file: &(impl ReadAt + ?Sized), path: &Path) -> Result<Self, Qcow2Error> {
        let mut bytes = vec![0; 4096];
        read_into(file, &mut bytes, path)?;
        // A cluster is 64 KiB as a rule, and what is used of the first one a few hundred bytes.
        let result = match Self::parse(&bytes) {
            Err(Fault::CutOff { .. }) if bytes.len() == 4096 => {
                bytes.resize(1 << CLUSTER_BITS.1, 0);
                read_into(file, &mut bytes, path)?;
                Self::parse(&bytes)
            }
            result => result,
        };
        result.map_err(|fault| Qcow2Error::Header { path: path.to_owned(), fault })
    }

    /// Reads the header from an image's first bytes: its whole first cluster, or as much as there is.
    ///
    /// # Errors
    /// [`Fault`] as soon as something is found that QEMU would refuse, or that is ambiguous.
    pub fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let bytes = Bytes(bytes);
        let magic = bytes.array::<4>("the magic number", 0)?;
        if magic != MAGIC {
            return Err(Fault::Magic { found: magic });
        }
        let fixed = Fixed::parse(bytes)?;
        let end = fixed.extensions_end();
        let extensions = Extensions::parse(bytes, fixed.header_length, end)?;
        Ok(Self {
            version: fixed.version,
            cluster_bits: fixed.cluster_bits,
            virtual_size: ByteSize(fixed.size),
            backing_file: fixed.backing_name(bytes)?,
            backing_format: extensions.backing_format,
            data_file: extensions.data_file,
            encryption: fixed.encryption,
            compression: fixed.compression,
            l1_entries: fixed.l1_entries,
            l1_offset: fixed.l1_offset,
            refcount_table_offset: fixed.refcount_table_offset,
            refcount_table_clusters: fixed.refcount_table_clusters,
            refcount_order: fixed.refcount_order,
            internal_snapshots: fixed.snapshots,
            snapshots_offset: fixed.snapshots_offset,
            incompatible: fixed.incompatible,
            compatible: fixed.compatible,
            autoclear: fixed.autoclear,
            bitmaps: extensions.bitmaps,
            bitmap_directory: extensions.bitmap_directory,
            luks_header: extensions.luks_header,
            unknown_extensions: extensions.unknown,
        })
    }

    /// The cluster size in bytes.
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }
}

/// Whether an image holds nothing of its own: no guest cluster, no zeroed cluster, no internal snapshot,
/// no saved memory. What a guest reads through it is then all its backing file's.
///
/// Ask only about an image that no process has open: QEMU keeps tables in memory for a while. *False* is
/// also the answer on any doubt: an image marked corrupt, one with features that are not known here, or one
/// whose (empty) L2 tables take more than 64 MiB.
///
/// # Errors
/// [`Qcow2Error::Header`] if the header has a fault or a table lies beyond the end of the image;
/// [`Qcow2Error::Host`] if it cannot be read.
///
/// Source: docs/interop/qcow2.txt "Cluster mapping": an entry is unallocated if all of its bits are zero.
pub fn is_pristine(file: &(impl ReadAt + ?Sized), path: &Path) -> Result<bool, Qcow2Error> {
    let header = Header::read(file, path)?;
    let doubtful = header.incompatible.corrupt() || !header.incompatible.unknown().is_empty();
    if doubtful || header.internal_snapshots > 0 {
        return Ok(false);
    }
    Tables { file, path, header: &header, l2_left: L2_READ_MAX }.all_empty()
}

/// The mapping tables of an image, read piece by piece.
struct Tables<'a, F: ?Sized> {
    file: &'a F,
    path: &'a Path,
    header: &'a Header,
    l2_left: u64,
}

impl<F: ReadAt + ?Sized> Tables<'_, F> {
    fn all_empty(mut self) -> Result<bool, Qcow2Error> {
        let length = u64::from(self.header.l1_entries) * 8;
        let mut at = 0;
        while at < length {
            let piece = self.piece("the L1 table", self.header.l1_offset + at, length - at)?;
            for entry in piece.chunks_exact(8).map(entry) {
                if !self.l2_is_empty(entry)? {
                    return Ok(false);
                }
            }
            at += piece.len() as u64;
        }
        Ok(true)
    }

    fn l2_is_empty(&mut self, l1_entry: u64) -> Result<bool, Qcow2Error> {
        // Bits 9 to 55 (docs/interop/qcow2.txt "L1 table entry").
        let offset = l1_entry & 0x00ff_ffff_ffff_fe00;
        if offset == 0 {
            return Ok(l1_entry == 0);
        }
        let length = self.header.cluster_size();
        let Some(left) = self.l2_left.checked_sub(length) else { return Ok(false) };
        self.l2_left = left;
        let mut at = 0;
        while at < length {
            let piece = self.piece("an L2 table", offset + at, length - at)?;
            if piece.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += piece.len() as u64;
        }
        Ok(true)
    }

    /// The next bytes of a part of the image: at least one, at most 64 KiB, a multiple of 8.
    fn piece(&self, part: &'static str, from: u64, length: u64) -> Result<Vec<u8>, Qcow2Error> {
        let length = length.min(64 << 10);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        let have = bytes.len();
        read_from(self.file, &mut bytes, from, self.path)?;
        if bytes.len() == have {
            return Ok(bytes);
        }
        let end = from.saturating_add(bytes.len() as u64);
        let fault = Fault::CutOff { part, from, to: from.saturating_add(length), end };
        Err(Qcow2Error::Header { path: self.path.to_owned(), fault })
    }
}

fn entry(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Fills `bytes` from the start of the image and cuts it to what there was.
fn read_into(file: &(impl ReadAt + ?Sized), bytes: &mut Vec<u8>, path: &Path) -> Result<(), HostError> {
    read_from(file, bytes, 0, path)
}

fn read_from(
    file: &(impl ReadAt + ?Sized),
    bytes: &mut Vec<u8>,
    from: u64,
    path: &Path,
) -> Result<(), HostError> {
    let count = file.read_at(bytes, from).map_err(HostError::io("read", path))?;
    bytes.truncate(count);
    Ok(())
}

/// Big-endian numbers at offsets, with a fault where the bytes end.
#[derive(Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn slice(self, part: &'static str, from: u64, length: u64) -> Result<&'a [u8], Fault> {
        let to = from.saturating_add(length);
        let range = usize::try_from(from).ok().zip(usize::try_from(to).ok());
        let bytes = range.and_then(|(from, to)| self.0.get(from..to));
        bytes.ok_or(Fault::CutOff { part, from, to, end: self.0.len() as u64 })
    }

    fn array<const N: usize>(self, part: &'static str, from: u64) -> Result<[u8; N], Fault> {
        let cut_off = Fault::CutOff { part, from, to: from + N as u64, end: self.0.len() as u64 };
        self.slice(part, from, N as u64)?.try_into().map_err(|_| cut_off)
    }

    fn u32(self, part: &'static str, from: u64) -> Result<u32, Fault> {
        self.array(part, from).map(u32::from_be_bytes)
    }

    fn u64(self, part: &'static str, from: u64) -> Result<u64, Fault> {
        self.array(part, from).map(u64::from_be_bytes)
    }
}

/// The fields at fixed places, checked.
struct Fixed {
    version: u32,
    cluster_bits: u32,
    header_length: u64,
    size: u64,
    backing_offset: u64,
    backing_length: u64,
    encryption: Encryption,
    compression: Compression,
    l1_entries: u32,
    l1_offset: u64,
    refcount_table_offset: u64,
    refcount_table_clusters: u32,
    refcount_order: u32,
    snapshots: u32,
    snapshots_offset: u64,
    incompatible: Incompatible,
    compatible: Compatible,
    autoclear: Autoclear,
}

impl Fixed {
    fn parse(bytes: Bytes<'_>) -> Result<Self, Fault> {
        let version = bytes.u32("version", 4)?;
        if version != 2 && version != 3 {
            return Err(Fault::Version(version));
        }
        let extended = version == 3;
        let cluster_bits = bytes.u32("cluster_bits", 20)?;
        in_range("cluster_bits", 20, cluster_bits.into(), CLUSTER_BITS.0, CLUSTER_BITS.1)?;
        // What version 2 has no field for has the value that version 3 gives to an upgraded image.
        let field = |name, at| if extended { bytes.u64(name, at) } else { Ok(0) };
        let fixed = Self {
            version,
            cluster_bits,
            header_length: if extended { bytes.u32("header_length", 100)?.into() } else { V2_LENGTH },
            size: bytes.u64("size", 24)?,
            backing_offset: bytes.u64("backing_file_offset", 8)?,
            backing_length: bytes.u32("backing_file_size", 16)?.into(),
            encryption: encryption(bytes.u32("crypt_method", 32)?)?,
            compression: Compression::Zlib,
            l1_entries: bytes.u32("l1_size", 36)?,
            l1_offset: bytes.u64("l1_table_offset", 40)?,
            refcount_table_offset: bytes.u64("refcount_table_offset", 48)?,
            refcount_table_clusters: bytes.u32("refcount_table_clusters", 56)?,
            refcount_order: if extended { bytes.u32("refcount_order", 96)? } else { 4 },
            snapshots: bytes.u32("nb_snapshots", 60)?,
            snapshots_offset: bytes.u64("snapshots_offset", 64)?,
            incompatible: Incompatible(field("incompatible_features", 72)?),
            compatible: Compatible(field("compatible_features", 80)?),
            autoclear: Autoclear(field("autoclear_features", 88)?),
        };
        fixed.check_lengths()?;
        fixed.check_tables()?;
        fixed.check_backing()?;
        Ok(Self { compression: fixed.compression(bytes)?, ..fixed })
    }

    const fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn check_lengths(&self) -> Result<(), Fault> {
        let least = if self.version == 3 { V3_LENGTH } else { V2_LENGTH };
        in_range("header_length", 100, self.header_length, least, self.cluster())?;
        in_range("refcount_order", 96, self.refcount_order.into(), 0, REFCOUNT_ORDER_MAX)?;
        in_range("size", 24, self.size, 0, SIZE_MAX)?;
        // 32 subclusters of at least 512 bytes.
        let least_bits = if self.incompatible.extended_l2() { 14 } else { CLUSTER_BITS.0 };
        in_range("cluster_bits", 20, self.cluster_bits.into(), least_bits, CLUSTER_BITS.1)
    }

    fn check_tables(&self) -> Result<(), Fault> {
        let l2_entry = if self.incompatible.extended_l2() { 16 } else { 8 };
        let mapped_by_l2 = self.cluster() / l2_entry * self.cluster();
        let needed = self.size.div_ceil(mapped_by_l2);
        in_range("l1_size", 36, self.l1_entries.into(), needed, L1_MAX / 8)?;
        self.table("l1_table_offset", 40, self.l1_offset)?;
        let clusters = u64::from(self.refcount_table_clusters);
        in_range("refcount_table_clusters", 56, clusters, 1, REFTABLE_MAX >> self.cluster_bits)?;
        self.table("refcount_table_offset", 48, self.refcount_table_offset)?;
        in_range("nb_snapshots", 60, self.snapshots.into(), 0, SNAPSHOTS_MAX)?;
        self.table("snapshots_offset", 64, self.snapshots_offset)
    }

    fn table(&self, field: &'static str, at: u64, value: u64) -> Result<(), Fault> {
        // No table is longer than 64 MiB, so that its end is an offset too.
        in_range(field, at, value, 0, SIZE_MAX - (64 << 20))?;
        let cluster = self.cluster();
        let aligned = value.is_multiple_of(cluster);
        if aligned { Ok(()) } else { Err(Fault::Misaligned { field, at, value, cluster }) }
    }

    fn check_backing(&self) -> Result<(), Fault> {
        if self.backing_offset == 0 {
            return Ok(());
        }
        in_range("backing_file_offset", 8, self.backing_offset, self.header_length, self.cluster())?;
        let most = BACKING_NAME_MAX.min(self.cluster() - self.backing_offset);
        in_range("backing_file_size", 16, self.backing_length, 0, most)
    }

    fn compression(&self, bytes: Bytes<'_>) -> Result<Compression, Fault> {
        let kind =
            if self.header_length > V3_LENGTH { bytes.array::<1>("compression_type", 104)?[0] } else { 0 };
        // The bit is set for everything but zlib, so that an old reader does not take zstd for zlib.
        let (least, most) = if self.incompatible.compression() { (1, 255) } else { (0, 0) };
        in_range("compression_type", 104, kind.into(), least, most)?;
        Ok(match kind {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            other => Compression::Other(other),
        })
    }

    /// Header extensions end where the backing file name starts, or with the first cluster.
    const fn extensions_end(&self) -> u64 {
        if self.backing_offset == 0 { self.cluster() } else { self.backing_offset }
    }

    fn backing_name(&self, bytes: Bytes<'_>) -> Result<Option<OsString>, Fault> {
        // QEMU takes an empty name for none.
        if self.backing_offset == 0 || self.backing_length == 0 {
            return Ok(None);
        }
        let name = bytes.slice("the backing file name", self.backing_offset, self.backing_length)?;
        file_name("the backing file name", self.backing_offset, name).map(Some)
    }
}

/// What the header extensions say.
#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<OsString>,
    bitmaps: Option<u32>,
    bitmap_directory: Option<Span>,
    luks_header: Option<Span>,
    unknown: Vec<u32>,
}

impl Extensions {
    fn parse(bytes: Bytes<'_>, from: u64, end: u64) -> Result<Self, Fault> {
        let mut found = Self::default();
        let mut at = from;
        for _ in 0..EXTENSIONS_MAX {
            if at >= end {
                return Ok(found);
            }
            let kind = bytes.u32("a header extension", at)?;
            if kind == extension::END {
                return Ok(found);
            }
            let length = u64::from(bytes.u32("a header extension", at + 4)?);
            in_range("length of a header extension", at + 4, length, 0, end.saturating_sub(at + 8))?;
            let data = bytes.slice("a header extension", at + 8, length)?;
            found.take(kind, at, data)?;
            at += 8 + length.next_multiple_of(8);
        }
        Err(Fault::TooManyExtensions)
    }

    fn take(&mut self, kind: u32, at: u64, data: &[u8]) -> Result<(), Fault> {
        let length =
            |least, most| in_range("length of a header extension", at + 4, data.len() as u64, least, most);
        let body = at + 8;
        match kind {
            extension::BACKING_FORMAT => {
                length(0, FORMAT_NAME_MAX)?;
                once("backing file format", &mut self.backing_format, format_name(body, data)?, at)
            }
            extension::DATA_FILE => {
                length(1, 4096)?;
                let name = file_name("the external data file's name", body, data)?;
                once("external data file", &mut self.data_file, name, at)
            }
            extension::BITMAPS => {
                length(24, 24)?;
                let length = Bytes(data).u64("bitmap_directory_size", 8)?;
                let offset = Bytes(data).u64("bitmap_directory_offset", 16)?;
                self.bitmap_directory = Some(Span { offset, length });
                once("bitmaps", &mut self.bitmaps, Bytes(data).u32("nb_bitmaps", 0)?, at)
            }
            extension::ENCRYPTION => {
                length(16, 16)?;
                let offset = Bytes(data).u64("offset of the encryption header", 0)?;
                let length = Bytes(data).u64("length of the encryption header", 8)?;
                once("encryption header", &mut self.luks_header, Span { offset, length }, at)
            }
            extension::FEATURE_NAMES => Ok(()),
            unknown => {
                self.unknown.push(unknown);
                Ok(())
            }
        }
    }
}

fn once<T>(name: &'static str, place: &mut Option<T>, value: T, at: u64) -> Result<(), Fault> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(Fault::Twice { name, at }),
    }
}

fn in_range(field: &'static str, at: u64, value: u64, least: u64, most: u64) -> Result<(), Fault> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(Fault::OutOfRange { field, at, value, least, most })
    }
}

fn encryption(method: u32) -> Result<Encryption, Fault> {
    match method {
        0 => Ok(Encryption::None),
        1 => Ok(Encryption::Aes),
        2 => Ok(Encryption::Luks),
        other => {
            Err(Fault::OutOfRange { field: "crypt_method", at: 32, value: other.into(), least: 0, most: 2 })
        }
    }
}

/// QEMU reads names as C strings: at a NUL, its name and ours would differ.
fn file_name(field: &'static str, at: u64, bytes: &[u8]) -> Result<OsString, Fault> {
    if bytes.contains(&0) {
        Err(not_a_name(field, at, bytes))
    } else {
        Ok(OsString::from_vec(bytes.to_vec()))
    }
}

fn format_name(at: u64, bytes: &[u8]) -> Result<String, Fault> {
    let sound = bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b));
    match std::str::from_utf8(bytes) {
        Ok(name) if sound && !name.is_empty() => Ok(name.to_owned()),
        _ => Err(not_a_name("the backing file format", at, bytes)),
    }
}

fn not_a_name(field: &'static str, at: u64, bytes: &[u8]) -> Fault {
    let start = &bytes[..bytes.len().min(64)];
    Fault::NotAName {
        field,
        at,
        bytes: OsStr::from_bytes(start).to_string_lossy().escape_debug().to_string(),
    }
}
