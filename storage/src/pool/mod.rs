//! Pools: the places where volumes live, each kind in a file of its own.
//!
//! A kind is one file here and one line in [`KINDS`]. What a pool can do is data ([`Capabilities`]), found out from
//! the place itself; whoever plans chooses by it.
//!
//! A volume comes into being in three steps: [`Pool::allocate`] (or [`Pool::share`]) gives a [`Draft`], somebody
//! fills it, and [`Pool::publish`] gives it its name. A draft is marked as one in the storage itself, so that what a
//! killed process left is found there ([`Pool::drafts`]) and needs no journal.

mod btrfs;
mod dir;
mod disk;
mod error;
mod files;
mod fs;
mod lvm;
mod lvm_thin;
mod lvm_tools;
mod mark;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use model::{ByteSize, ImageFormat, Name};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::Table;

pub use error::PoolError;
pub(crate) use error::refuse_open;

/// Every kind of pool.
pub const KINDS: &[Kind] = &[dir::KIND, fs::KIND, btrfs::KIND, disk::KIND, lvm::KIND, lvm_thin::KIND];

/// A pool, or why there is none.
pub type Opened = Result<Box<dyn Pool>, PoolError>;

/// One kind of pool.
#[derive(Clone, Copy)]
pub struct Kind {
    /// Its name.
    pub name: &'static str,
    /// What it is, for `--help` and for people.
    pub about: &'static str,
    /// The options that a user can give, as they are called on the command line.
    pub options: &'static [&'static str],
    /// Programs of the host that it calls.
    pub programs: &'static [&'static str],
    /// Looks at the place that the user names, marks it where that is how it is known again, and completes the options.
    pub define: fn(&Request<'_>) -> Result<Table, PoolError>,
    /// The pool of a definition. Touches nothing.
    pub open: fn(&Name, Table) -> Opened,
}

/// What a user asks for when a pool is defined.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The pool's name.
    pub pool: &'a Name,
    /// The options as given; paths are absolute.
    pub options: Table,
    /// Where pools that have to be mounted are mounted unless the user says otherwise.
    pub mounts: &'a Path,
    /// Whether an empty place may be prepared: a partition table on a blank disk.
    pub initialize: bool,
}

/// A pool's definition: `pools/NAME.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PoolDefinition {
    /// The name of its [`Kind`].
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it is started with the host.
    #[serde(default)]
    pub autostart: bool,
    /// What the kind needs.
    #[serde(flatten)]
    pub options: Table,
}

/// What a pool can do, found out from the pool itself, not only from its kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// A new volume takes space only where it is written to.
    pub thin: bool,
    /// The pool can take a point in time of a volume by itself.
    pub snapshot: bool,
    /// A writable copy of a volume shares its data with it.
    pub clone: bool,
    /// A volume can change its size.
    pub resize: bool,
    /// Files in the pool can share extents (`FICLONE`).
    pub reflink: bool,
    /// Formats that a volume can have; the first is used where the user names none.
    pub formats: Vec<VolumeFormat>,
    /// The volumes are on another machine: a lock on this one does not keep others out.
    pub remote: bool,
}

/// The format of a volume, or of an image that becomes one. Never probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeFormat {
    /// Bytes as the guest sees them.
    Raw,
    /// QEMU's own.
    Qcow2,
    /// VMware's.
    Vmdk,
    /// Hyper-V's; imported and exported only.
    Vhdx,
    /// VirtualBox'; imported and exported only.
    Vdi,
}

/// The text is the name of no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no format (raw, qcow2, vmdk, vhdx, vdi)")]
pub struct ParseVolumeFormatError(pub String);

/// Where a volume's bytes are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "kind", content = "path", rename_all = "lowercase")]
pub enum Place {
    /// In a file.
    File(PathBuf),
    /// On a block device.
    Device(PathBuf),
}

/// One volume as it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// Its name in the pool.
    pub name: Name,
    /// Its format, told by the pool (a file's ending, raw on a device), not by the content.
    pub format: VolumeFormat,
    /// Where its bytes are.
    pub place: Place,
    /// What a guest sees.
    pub virtual_size: ByteSize,
    /// What it takes in the pool.
    pub allocated: ByteSize,
    /// What it stands on, as its own header says.
    pub backing: Option<PathBuf>,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// The volume that it was cloned from, where the pool knows (LVM's origin).
    pub origin: Option<String>,
    /// Somebody else made it, in a place that is not the pool's alone.
    pub foreign: bool,
    /// Why it cannot be used.
    pub fault: Option<String>,
}

/// What a new volume is to be.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its name.
    pub name: Name,
    /// Its format.
    pub format: VolumeFormat,
    /// What a guest sees; a device has at least as much.
    pub size: ByteSize,
}

/// A volume that is being made, and has no name yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    /// The name that it will have.
    pub name: Name,
    /// Its format.
    pub format: VolumeFormat,
    /// Where its bytes are now.
    pub place: Place,
    /// Whether all of it reads as zeroes, so that nobody has to write them.
    pub zeroed: bool,
}

/// How full a pool is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Usage {
    /// Its size.
    pub capacity: ByteSize,
    /// What is taken, by whatever.
    pub allocated: ByteSize,
    /// What can still be taken.
    pub available: ByteSize,
    /// What only a thin pool has.
    pub thin: Option<ThinUsage>,
}

/// How full a thin pool is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ThinUsage {
    /// Its data, in percent.
    pub data_percent: f64,
    /// Its metadata, in percent.
    pub metadata_percent: f64,
    /// The size of the metadata.
    pub metadata_size: ByteSize,
    /// From this on it refuses new volumes and snapshots.
    pub data_limit: f64,
    /// Likewise.
    pub metadata_limit: f64,
}

/// What starting or stopping a pool did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// It is so now.
    Changed,
    /// It was so before.
    AlreadySo,
    /// There is nothing to start or stop.
    Nothing,
}

/// A place for volumes. The caller holds the pool's lock for everything that changes it.
///
/// Every call but [`Pool::start`], [`Pool::stop`] and [`Pool::forget`] expects a pool that is ready, and tells
/// [`PoolError::NotStarted`] or [`PoolError::WrongPlace`] otherwise: nothing is ever written into an empty mount point.
pub trait Pool: fmt::Debug + Send + Sync {
    /// The name of its kind.
    fn kind(&self) -> &'static str;

    /// Where it is, for people.
    fn location(&self) -> String;

    /// The directory below which its images and all that they name lie; none where volumes are devices.
    fn root(&self) -> Option<&Path>;

    /// What it can do.
    ///
    /// # Errors
    /// [`PoolError`] if the place does not answer.
    fn capabilities(&self) -> Result<Capabilities, PoolError>;

    /// Whether it can be used now: whether the place is there, and is the one it was defined on.
    ///
    /// # Errors
    /// [`PoolError::NotStarted`], [`PoolError::WrongPlace`], with what is missing.
    fn ready(&self) -> Result<(), PoolError>;

    /// Makes it ready: mounts, activates. Starting twice is one start.
    ///
    /// # Errors
    /// [`PoolError::WrongPlace`] if the place is not the one it was defined on; then it is as it was.
    fn start(&self) -> Result<Changed, PoolError>;

    /// The undo of [`Pool::start`].
    ///
    /// # Errors
    /// [`PoolError::PoolInUse`] if a process has a volume open.
    fn stop(&self) -> Result<Changed, PoolError>;

    /// How full it is.
    ///
    /// # Errors
    /// [`PoolError`].
    fn usage(&self) -> Result<Usage, PoolError>;

    /// Whether it takes new volumes and snapshots, as far as that hangs on thresholds.
    ///
    /// # Errors
    /// [`PoolError::OverThreshold`].
    fn require_room(&self) -> Result<(), PoolError> {
        Ok(())
    }

    /// Its volumes, by name. Drafts and overlays of snapshots are none.
    ///
    /// # Errors
    /// [`PoolError`] if they cannot be listed; a volume that is broken is listed with its fault.
    fn volumes(&self) -> Result<Vec<Volume>, PoolError>;

    /// A place for a new volume: an empty file, or a device of that size.
    ///
    /// # Errors
    /// [`PoolError::VolumeExists`], [`PoolError::BadName`], [`PoolError::Full`], [`PoolError::OverThreshold`],
    /// [`PoolError::Unsupported`] for a format. Nothing is left behind.
    fn allocate(&self, wanted: &Wanted) -> Result<Draft, PoolError>;

    /// A draft that shares all data with `from`, a volume that nobody writes to in that moment.
    ///
    /// # Errors
    /// As [`Pool::allocate`]; [`PoolError::Unsupported`] if [`Capabilities::clone`] is not set.
    fn share(&self, from: &Volume, name: &Name) -> Result<Draft, PoolError>;

    /// Gives a draft its name, durably. From here on it is a volume.
    ///
    /// # Errors
    /// [`PoolError`]; then it is still a draft.
    fn publish(&self, draft: &Draft) -> Result<(), PoolError>;

    /// The undo of [`Pool::allocate`] and [`Pool::share`].
    ///
    /// # Errors
    /// [`PoolError`].
    fn discard(&self, draft: &Draft) -> Result<(), PoolError>;

    /// Drafts that there are. Under the pool's lock these are what killed processes left.
    ///
    /// # Errors
    /// [`PoolError`].
    fn drafts(&self) -> Result<Vec<Draft>, PoolError>;

    /// Gives a raw volume's place another size; the caller has asked whether it may shrink.
    ///
    /// # Errors
    /// [`PoolError::Full`], [`PoolError::OverThreshold`], [`PoolError::Unsupported`].
    fn resize(&self, volume: &Volume, size: ByteSize) -> Result<(), PoolError>;

    /// Removes a volume. The caller has asked whether anybody uses it.
    ///
    /// # Errors
    /// [`PoolError::Foreign`]; [`PoolError`].
    fn remove(&self, volume: &Volume) -> Result<(), PoolError>;

    /// Takes away the marks that [`Kind::define`] left. Volumes stay.
    ///
    /// # Errors
    /// [`PoolError`].
    fn forget(&self) -> Result<(), PoolError>;
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kind({})", self.name)
    }
}

impl Kind {
    /// The kind of this name.
    ///
    /// # Errors
    /// [`PoolError::NoSuchKind`].
    pub fn named(text: &str) -> Result<&'static Self, PoolError> {
        let found = KINDS.iter().find(|kind| kind.name == text);
        found.ok_or_else(|| PoolError::NoSuchKind { text: text.to_owned() })
    }
}

impl Capabilities {
    /// What volumes on devices of this host can do; whether copies share blocks is what differs.
    fn of_devices(shared: bool) -> Self {
        let formats = vec![VolumeFormat::Raw];
        Self {
            thin: shared,
            snapshot: shared,
            clone: shared,
            resize: true,
            reflink: false,
            formats,
            remote: false,
        }
    }
}

impl PoolDefinition {
    /// Makes a definition of what the user asks for; see [`Kind::define`].
    ///
    /// # Errors
    /// [`PoolError::BadDefinition`], [`PoolError::WrongPlace`], [`PoolError`].
    pub fn new(kind: &Kind, request: &Request<'_>, autostart: bool) -> Result<Self, PoolError> {
        Ok(Self { kind: kind.name.to_owned(), autostart, options: (kind.define)(request)? })
    }

    /// The pool.
    ///
    /// # Errors
    /// [`PoolError::NoSuchKind`], [`PoolError::BadDefinition`].
    pub fn open(&self, name: &Name) -> Result<Box<dyn Pool>, PoolError> {
        (Kind::named(&self.kind)?.open)(name, self.options.clone())
    }
}

impl Place {
    /// Its path on this host.
    pub fn path(&self) -> &Path {
        match self {
            Self::File(path) | Self::Device(path) => path,
        }
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        matches!(self, Self::Device(_))
    }
}

impl VolumeFormat {
    /// Every format.
    pub const ALL: [Self; 5] = [Self::Raw, Self::Qcow2, Self::Vmdk, Self::Vhdx, Self::Vdi];

    /// The name of QEMU's block driver for it, which is the ending of its files too.
    pub const fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
        }
    }

    /// The same for those who know the formats of running VMs only.
    pub const fn image(self) -> Option<ImageFormat> {
        match self {
            Self::Raw => Some(ImageFormat::Raw),
            Self::Qcow2 => Some(ImageFormat::Qcow2),
            Self::Vmdk | Self::Vhdx | Self::Vdi => None,
        }
    }

    /// The format that a file's ending tells; `img` means raw.
    pub fn of_file(path: &Path) -> Option<Self> {
        let ending = path.extension()?.to_str()?.to_ascii_lowercase();
        if ending == "img" { Some(Self::Raw) } else { ending.parse().ok() }
    }
}

impl FromStr for VolumeFormat {
    type Err = ParseVolumeFormatError;

    fn from_str(text: &str) -> Result<Self, ParseVolumeFormatError> {
        let found = Self::ALL.into_iter().find(|format| format.driver() == text);
        found.ok_or_else(|| ParseVolumeFormatError(text.to_owned()))
    }
}

impl fmt::Display for VolumeFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.driver())
    }
}

/// A thin pool of LVM that nobody has defined, with the thresholds that count then.
///
/// # Errors
/// [`PoolError::BadName`] if the names are none.
pub fn thin(vg: &str, thin_pool: &str) -> Opened {
    let text = format!("{vg}-{thin_pool}");
    let fault = |fault: model::ParseNameError| PoolError::Contradiction(fault.to_string());
    let name: Name = text.parse().map_err(fault)?;
    let options = [("vg".to_owned(), vg.into()), ("thin-pool".to_owned(), thin_pool.into())];
    (lvm_thin::KIND.open)(&name, options.into_iter().collect())
}

/// The volume of this name.
///
/// # Errors
/// [`PoolError::NoSuchVolume`] with the names that there are.
pub fn find(pool: &dyn Pool, name: &Name, volume: &Name) -> Result<Volume, PoolError> {
    let mut volumes = pool.volumes()?;
    match volumes.iter().position(|found| found.name == *volume) {
        Some(at) => Ok(volumes.swap_remove(at)),
        None => Err(PoolError::NoSuchVolume {
            pool: name.clone(),
            volume: volume.clone(),
            known: volumes.into_iter().map(|volume| volume.name).collect(),
        }),
    }
}

/// Removes what killed processes left, under the pool's lock. Returns the names that those volumes would have had.
///
/// # Errors
/// [`PoolError`].
pub fn sweep(pool: &dyn Pool) -> Result<Vec<Name>, PoolError> {
    let drafts = pool.drafts()?;
    drafts.into_iter().map(|draft| pool.discard(&draft).map(|()| draft.name)).collect()
}

/// A definition's options as the type that a kind reads them with.
fn options<T: DeserializeOwned>(kind: &Kind, pool: &Name, options: Table) -> Result<T, PoolError> {
    options.try_into().map_err(|fault: toml::de::Error| {
        let takes: Vec<String> = kind.options.iter().map(|option| format!("--{option}")).collect();
        let fault = fault.message().split(", expected").next().unwrap_or_default().replace("field", "option");
        bad(pool, format!("{fault}; a pool of kind {} takes {}", kind.name, takes.join(", ")))
    })
}

fn require_absolute(pool: &Name, path: &Path) -> Result<(), PoolError> {
    if path.is_absolute() {
        Ok(())
    } else {
        Err(bad(pool, format!("{} is not an absolute path", path.display())))
    }
}

fn bad(pool: &Name, fault: impl Into<String>) -> PoolError {
    PoolError::BadDefinition { pool: pool.clone(), fault: fault.into() }
}

fn wrong_place(pool: &Name, why: impl Into<String>) -> PoolError {
    PoolError::WrongPlace { pool: pool.clone(), why: why.into() }
}

/// The options of a completed definition.
fn table(pool: &Name, options: &impl Serialize) -> Result<Table, PoolError> {
    Table::try_from(options).map_err(|fault| bad(pool, fault.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_name_of_its_own_and_is_found_by_it() {
        for kind in KINDS {
            assert_eq!(Kind::named(kind.name).unwrap().name, kind.name);
            assert!(!kind.about.is_empty());
        }
        assert!(matches!(Kind::named("lvmthin"), Err(PoolError::NoSuchKind { .. })));
        let mut names: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
        names.dedup();
        assert_eq!(names.len(), KINDS.len());
    }

    #[test]
    fn a_definition_is_read_as_it_is_written_and_a_typo_is_told() {
        let text = "type = \"dir\"\nautostart = true\nid = \"ab\"\npath = \"/srv/p1\"\n";
        let definition: PoolDefinition = toml::from_str(text).unwrap();
        assert_eq!(toml::to_string(&definition).unwrap(), text);
        let name: Name = "p1".parse().unwrap();
        assert_eq!(definition.open(&name).unwrap().location(), "/srv/p1");
        let typo: PoolDefinition = toml::from_str("type = \"dir\"\npaht = \"/srv/p1\"").unwrap();
        let fault = typo.open(&name).unwrap_err();
        assert!(fault.to_string().contains("paht"), "{fault}");
    }

    #[test]
    fn an_ending_tells_a_format_and_nothing_else_does() {
        let of = |name: &str| VolumeFormat::of_file(Path::new(name));
        assert_eq!(of("/a/b.QCOW2"), Some(VolumeFormat::Qcow2));
        assert_eq!(of("b.img"), Some(VolumeFormat::Raw));
        assert_eq!((of("b"), of("b.iso"), of(".raw")), (None, None, None));
    }
}
