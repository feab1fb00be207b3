//! Overlay files: made before the point in time, durable before the guest writes to them, and removed only
//! when they are surely ours.
//!
//! The order: [`prepare`] makes the empty file with its base's owner and mode, QEMU or qemu-img writes the
//! image into it (naming it by [`backing_name`]), [`verify_header`] reads back what they wrote, and
//! [`make_durable`] brings file and name to the device. The undo of each step is [`remove_if_ours`].
//!
//! Names are neutral: `vda.qcow2` gets `vda.1a2b3c4d.qcow2`, whose own overlay is `vda.5e6f7081.qcow2`. The
//! digits are the operation's, never a time: a file named after a time does not hold that time's data.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::files;
use model::{ByteSize, ImageFormat, OperationId};
use rustix::fs::{Gid, OFlags, Uid};

use crate::file::Inode;
use crate::qcow2::{Encryption, Header, Qcow2Error};

/// Longest file name that Linux takes, in bytes (`NAME_MAX`, linux/limits.h).
const NAME_MAX: usize = 255;

/// Endings of image names that are not part of the disk's name.
const ENDINGS: [&[u8]; 5] = [b".qcow2", b".raw", b".img", b".qcow", b".disk"];

/// An overlay could not be made, or is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The file could not be made, read, synced or removed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The name is taken. Nothing was changed.
    #[error("{} exists already; it was left as it is", path.display())]
    Exists {
        /// The overlay's path.
        path: PathBuf,
    },
    /// The file cannot be given to its base's owner. It was removed again.
    #[error("{} cannot be given to uid {uid}, gid {gid}, who own {}; run snapctl as root or as that user ({source})",
        path.display(), like.display())]
    Owner {
        /// The overlay's path.
        path: PathBuf,
        /// The base.
        like: PathBuf,
        /// The base's owner.
        uid: u32,
        /// The base's group.
        gid: u32,
        /// What `fchown(2)` said.
        source: io::Error,
    },
    /// The header that was written cannot be read back.
    #[error(transparent)]
    Header(#[from] Qcow2Error),
    /// The header that was written is not the one that was asked for.
    #[error("{} has {field} {found}; {expected} was asked for. It was not used", path.display())]
    Mismatch {
        /// The overlay's path.
        path: PathBuf,
        /// What differs.
        field: &'static str,
        /// What was asked for.
        expected: String,
        /// What the file says.
        found: String,
    },
}

/// Who owns a new overlay and who may read and write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Permission bits; nothing but read and write bits.
    pub mode: u32,
}

/// A new, empty file that waits for its image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreparedFile {
    /// Its path, as it was given.
    pub path: PathBuf,
    /// Which file it is. Record it: [`remove_if_ours`] wants it.
    pub inode: Inode,
    /// Its owner and mode, read back from the file.
    pub ownership: Ownership,
}

/// What [`remove_if_ours`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemovedOverlay {
    /// It was ours and is gone now, durably.
    Removed,
    /// There was no such file.
    AlreadyGone,
    /// The name belongs to another file now, which was left alone.
    NotOurs(Inode),
}

/// What an overlay's header has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The backing file's name, byte for byte as it should stand in the header.
    pub backing: PathBuf,
    /// The backing file's format.
    pub backing_format: ImageFormat,
    /// The size that the guest sees.
    pub virtual_size: ByteSize,
    /// The cluster size is 2 to the power of this; 16 for ours.
    pub cluster_bits: u32,
    /// How its data is encrypted.
    pub encryption: Encryption,
}

impl Ownership {
    /// What an overlay of the file or device `like` should have: its owner and group, and its read and
    /// write bits.
    ///
    /// Of a sealed layer the mode lacks the write bits; set [`Ownership::mode`] to what it was before.
    ///
    /// # Errors
    /// [`HostError`] if `like` cannot be looked at.
    pub fn of(like: &Path) -> Result<Self, HostError> {
        fs::metadata(like)
            .map(|metadata| Self::from_metadata(&metadata))
            .map_err(HostError::io("look at", like))
    }

    fn from_metadata(metadata: &fs::Metadata) -> Self {
        Self { uid: metadata.uid(), gid: metadata.gid(), mode: metadata.mode() & 0o666 }
    }
}

/// Makes the empty file `path` with the owner, group and read and write bits of `like`.
///
/// # Errors
/// [`OverlayError::Exists`] if anything has that name, be it a dangling symlink; [`OverlayError::Owner`] if
/// this user may not give the file away; [`OverlayError::Host`] otherwise. Nothing is left behind.
pub fn prepare(path: &Path, like: &Path) -> Result<PreparedFile, OverlayError> {
    prepare_as(path, like, Ownership::of(like)?)
}

/// As [`prepare`], with an ownership that is not quite that of `like`.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_as(path: &Path, like: &Path, wanted: Ownership) -> Result<PreparedFile, OverlayError> {
    let file = create(path)?;
    let made = file.metadata().map_err(HostError::io("look at", path))?;
    let result = own(&file, path, like, wanted, Ownership::from_metadata(&made));
    if result.is_err() {
        // The first error says more; a file that stays is found by the journal.
        if let Err(error) = remove_if_ours(path, Inode::of(&made)) {
            tracing::warn!(path = %path.display(), %error, "an empty overlay is left behind");
        }
    }
    let ownership = result?;
    Ok(PreparedFile { path: path.to_owned(), inode: Inode::of(&made), ownership })
}

/// Waits until the overlay's data and its name are on the device.
///
/// # Errors
/// [`HostError`] if either did not get there.
pub fn make_durable(path: &Path) -> Result<(), HostError> {
    files::sync_file(path)?;
    files::sync_dir(files::parent(path))
}

/// Removes `path` if it still is the file `inode`, and syncs its directory.
///
/// Inode numbers are used again: for a file that may have been removed long ago, compare its header too.
///
/// # Errors
/// [`HostError`] if it cannot be looked at or removed.
pub fn remove_if_ours(path: &Path, inode: Inode) -> Result<RemovedOverlay, HostError> {
    let found = match fs::symlink_metadata(path) {
        Ok(metadata) => Inode::of(&metadata),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(RemovedOverlay::AlreadyGone),
        Err(e) => return Err(HostError::io("look at", path)(e)),
    };
    if found != inode {
        return Ok(RemovedOverlay::NotOurs(found));
    }
    Ok(match files::remove_durably(path)? {
        files::Removal::Removed => RemovedOverlay::Removed,
        files::Removal::AlreadyGone => RemovedOverlay::AlreadyGone,
    })
}

/// Reads the overlay's header back and compares it with what was asked for.
///
/// It must be version 3, without a data file, internal snapshots or incompatible features, and
/// its backing file's name must lead to a file that is there.
///
/// # Errors
/// [`OverlayError::Mismatch`] at the first difference; [`OverlayError::Header`] if there is no sound header.
pub fn verify_header(path: &Path, expected: &Expected) -> Result<Header, OverlayError> {
    let header = Header::open(path)?;
    let backing = header.backing_file.clone().unwrap_or_default();
    let format = header.backing_format.clone().unwrap_or_default();
    let same = |field, expected: String, found: String| {
        let path = path.to_owned();
        if expected == found { Ok(()) } else { Err(OverlayError::Mismatch { path, field, expected, found }) }
    };
    same("a backing file name of", shown(expected.backing.as_os_str()), shown(&backing))?;
    same("a backing format of", expected.backing_format.to_string(), format)?;
    same("a virtual size of", expected.virtual_size.0.to_string(), header.virtual_size.0.to_string())?;
    same("cluster_bits", expected.cluster_bits.to_string(), header.cluster_bits.to_string())?;
    same("version", "3".to_owned(), header.version.to_string())?;
    same("incompatible features", "none".to_owned(), header.incompatible.to_string())?;
    same("internal snapshots", "0".to_owned(), header.internal_snapshots.to_string())?;
    same("encryption", format!("{:?}", expected.encryption), format!("{:?}", header.encryption))?;
    let base = files::parent(path).join(backing);
    fs::metadata(&base).map_err(HostError::io("find the backing file", &base))?;
    Ok(header)
}

/// Names of the overlays of `bases` (each beside its base), all different, in the same order.
///
/// Two bases whose names differ in their ending only get `vda.1a2b3c4d.qcow2` and `vda.1a2b3c4d-1.qcow2`.
/// Whether a name is taken on disk is not looked at: [`prepare`] says so.
pub fn overlay_paths(bases: &[&Path], operation: OperationId) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = Vec::with_capacity(bases.len());
    for base in bases {
        let dir = files::parent(base);
        let mut nth = 0;
        let mut path = dir.join(overlay_name(base, operation, nth));
        while paths.contains(&path) {
            nth += 1;
            path = dir.join(overlay_name(base, operation, nth));
        }
        paths.push(path);
    }
    paths
}

/// The name of `base`'s overlay made by `operation`: `STEM.DIGITS.qcow2`, or `STEM.DIGITS-NTH.qcow2` where
/// `nth` is not 0.
///
/// STEM is the base's file name without an image ending and without the digits of an earlier overlay, so
/// that names do not grow; cut where the name would have more than 255 bytes. A colon becomes `_`, since
/// QEMU takes what is before it for a protocol.
pub fn overlay_name(base: &Path, operation: OperationId, nth: u32) -> OsString {
    let digits = operation.tag();
    let rest = if nth == 0 { format!(".{digits}.qcow2") } else { format!(".{digits}-{nth}.qcow2") };
    let stem = stem(base.file_name().unwrap_or_default());
    let mut name: Vec<u8> = cut(stem, NAME_MAX - rest.len()).to_vec();
    name.iter_mut().filter(|byte| **byte == b':').for_each(|byte| *byte = b'_');
    name.extend_from_slice(rest.as_bytes());
    OsString::from_vec(name)
}

/// What the layers of a disk are named after, whose active layer or logical volume is called `name`.
pub fn disk_part(name: &str) -> String {
    String::from_utf8_lossy(stem(OsStr::new(name))).into_owned()
}

/// Whether a file is named as a layer or copy that a snapshot made.
pub fn is_overlay_name(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_bytes();
    let plain = ENDINGS.iter().find_map(|ending| name.strip_suffix(*ending)).unwrap_or(name);
    stem(OsStr::from_bytes(name)) != plain
}

/// How the header of `overlay` should name its backing file `base`: by file name where both are in one
/// directory (so that the directory can be moved), by the given path otherwise.
///
/// Both paths should be real and absolute. A file name with a colon gets `./` before it, since QEMU would
/// take it for a protocol.
pub fn backing_name(base: &Path, overlay: &Path) -> PathBuf {
    match base.file_name() {
        Some(name) if base.parent() == overlay.parent() => {
            if crate::chain::is_protocol(name) {
                Path::new(".").join(name)
            } else {
                name.into()
            }
        }
        _ => base.to_owned(),
    }
}

fn create(path: &Path) -> Result<File, OverlayError> {
    // Narrow until it has its owner.
    let flags = OFlags::NOFOLLOW.bits().cast_signed();
    let file = File::options().write(true).create_new(true).mode(0o600).custom_flags(flags).open(path);
    file.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => OverlayError::Exists { path: path.to_owned() },
        _ => HostError::io("create the overlay", path)(error).into(),
    })
}

/// Gives the new file its owner, then its mode: the other way round would open it to the wrong group.
fn own(
    file: &File,
    path: &Path,
    like: &Path,
    wanted: Ownership,
    has: Ownership,
) -> Result<Ownership, OverlayError> {
    let Ownership { uid, gid, mode } = wanted;
    if (uid, gid) != (has.uid, has.gid) {
        let owner = (uid != has.uid).then(|| Uid::from_raw(uid));
        let group = (gid != has.gid).then(|| Gid::from_raw(gid));
        rustix::fs::fchown(file, owner, group).map_err(|errno| OverlayError::Owner {
            path: path.to_owned(),
            like: like.to_owned(),
            uid,
            gid,
            source: errno.into(),
        })?;
    }
    file.set_permissions(Permissions::from_mode(mode & 0o666))
        .map_err(HostError::io("set the mode of", path))?;
    let made = file.metadata().map_err(HostError::io("look at", path))?;
    Ok(Ownership::from_metadata(&made))
}

fn shown(name: &OsStr) -> String {
    if name.is_empty() { "none".to_owned() } else { format!("{:?}", name.to_string_lossy()) }
}

/// The disk's part of an image's file name.
fn stem(name: &OsStr) -> &[u8] {
    let name = name.as_bytes();
    let without = ENDINGS.iter().find_map(|ending| name.strip_suffix(*ending)).unwrap_or(name);
    let stem = match without.iter().rposition(|byte| *byte == b'.') {
        Some(dot) if is_ours(&without[dot + 1..]) => &without[..dot],
        _ => without,
    };
    if stem.is_empty() { b"disk" } else { stem }
}

/// Whether it is the middle part of a name that [`overlay_name`] makes.
fn is_ours(middle: &[u8]) -> bool {
    let (digits, nth) = middle.split_at(middle.len().min(OperationId::TAG_DIGITS));
    let lower_hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    let numbered = |nth: &[u8]| {
        nth.split_first()
            .is_some_and(|(dash, n)| *dash == b'-' && !n.is_empty() && n.iter().all(u8::is_ascii_digit))
    };
    digits.len() == OperationId::TAG_DIGITS
        && digits.iter().all(lower_hex)
        && (nth.is_empty() || numbered(nth))
}

/// At most `most` bytes, and no half of a UTF-8 character at the end.
fn cut(bytes: &[u8], most: usize) -> &[u8] {
    let mut end = bytes.len().min(most);
    while end > 0 && end < bytes.len() && bytes[end] & 0b1100_0000 == 0b1000_0000 {
        end -= 1;
    }
    &bytes[..end]
}
