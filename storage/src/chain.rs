//! Chains of image files: walking one down from its active layer, and judging what is found.
//!
//! What an image says about its backing file is a claim of whoever could write to the image, the guest
//! included if a raw disk was ever taken for qcow2. So the format of every layer is explicit (the caller
//! gives the active layer's, each header must give the next one's), nothing is ever probed, a name that is
//! not a plain file is refused, and so is a file outside of the active layer's directory unless the
//! [`ChainPolicy`] allows it by name.
//!
//! [`Chain::open`] refuses at the first thing that is wrong; [`check`] goes as far as it can and reports
//! everything.
//!
//! Source: QEMU docs/interop/qcow2.txt; block.c `path_has_protocol`, `path_combine` for how names resolve.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use host::Error as HostError;
use jiff::{SignedDuration, Timestamp};
use model::{ByteSize, ImageFormat};
use serde::Serialize;

use crate::file::{self, Inode};
use crate::qcow2::{Header, MAGIC, Qcow2Error, ReadAt};

/// Most layers that are walked. QEMU needs memory and descriptors for each of them when it starts.
pub const DEPTH_MAX: usize = 256;

/// Most directory entries that [`overlays_of`] looks at.
pub const SCAN_MAX: usize = 100_000;

/// An overlay file is made before the point in time, and the guest writes to the base in between. So much
/// later than the overlay's birth the base's last change may lie.
const PREPARATION: SignedDuration = SignedDuration::from_secs(60);

/// File times are taken from the kernel's coarse clock, and some file systems keep whole seconds.
const CLOCK_STEP: SignedDuration = SignedDuration::from_secs(2);

/// A chain cannot be followed to its base, or must not be.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A layer cannot be looked at.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A layer's header has a fault.
    #[error(transparent)]
    Header(#[from] Qcow2Error),
    /// A file is not there.
    #[error("{} does not exist{}", path.display(), named_by(overlay.as_deref()))]
    Missing {
        /// The file.
        path: PathBuf,
        /// The overlay that names it; none for the active layer.
        overlay: Option<PathBuf>,
    },
    /// A header names a backing file without its format.
    #[error("{} names {} as its backing file, but not its format", path.display(), backing.display())]
    FormatMissing {
        /// The overlay.
        path: PathBuf,
        /// The backing file's name as it stands there.
        backing: PathBuf,
    },
    /// A header names a backing format that is neither raw nor qcow2.
    #[error("{} names {} as its backing file, of format {format}; raw and qcow2 are handled",
        path.display(), backing.display())]
    FormatUnsupported {
        /// The overlay.
        path: PathBuf,
        /// The backing file's name as it stands there.
        backing: PathBuf,
        /// The format's name as it stands there.
        format: String,
    },
    /// A header names something else than a file as its backing file.
    #[error("{} names {backing:?} as its backing file, which QEMU takes for a protocol, not for a file",
        path.display())]
    NotAFile {
        /// The overlay.
        path: PathBuf,
        /// The name as it stands there.
        backing: String,
    },
    /// A backing file is neither in the active layer's directory nor allowed by name.
    #[error("{} names {} as its backing file, which is neither below {} nor allowed by name",
        path.display(), backing.display(), directory.display())]
    Outside {
        /// The overlay.
        path: PathBuf,
        /// The backing file, resolved.
        backing: PathBuf,
        /// The active layer's directory.
        directory: PathBuf,
    },
    /// A layer is below itself.
    #[error("{} names {} as its backing file, which is above it in the same chain", path.display(), backing.display())]
    Loop {
        /// The overlay.
        path: PathBuf,
        /// The file that occurs twice.
        backing: PathBuf,
    },
    /// There are more layers than anything sensible has.
    #[error("the chain goes on below {}, its layer {DEPTH_MAX}; deeper chains are not followed", path.display())]
    TooDeep {
        /// The last layer looked at.
        path: PathBuf,
    },
    /// A layer keeps the guest's data in another file.
    #[error("{} keeps the guest's data in an external data file ({}), which is not handled",
        path.display(), name.display())]
    DataFile {
        /// The layer.
        path: PathBuf,
        /// The data file's name as it stands in the header, empty where there is none.
        name: PathBuf,
    },
    /// A layer uses features that are not known here.
    #[error("{} needs features that are not known here (incompatible bits {bits:?})", path.display())]
    UnknownFeatures {
        /// The layer.
        path: PathBuf,
        /// Numbers of the bits.
        bits: Vec<u32>,
    },
}

/// Which files a chain may be made of, and what is known of their history.
#[derive(Clone, Debug, Default)]
pub struct ChainPolicy {
    /// Directories (with all that is below them) and single files in which layers may lie, besides the
    /// active layer's own directory.
    pub allowed: Vec<PathBuf>,
    /// When a layer was last changed rightfully: when the point in time was made that froze it, or when a
    /// commit into it ended. Keyed by real path. Where it is not known, the birth of the overlay counts.
    pub last_changes: BTreeMap<PathBuf, Timestamp>,
}

/// One file of a chain, as it was when it was looked at.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its real, absolute path.
    pub path: PathBuf,
    /// Its format, as the caller or the overlay above it says.
    pub format: ImageFormat,
    /// The size that a guest sees; for raw the size of the file or device.
    pub virtual_size: ByteSize,
    /// What it takes on its file system (`st_blocks`); 0 for a block device.
    pub allocated: ByteSize,
    /// The layer below, if there is one.
    pub backing: Option<Backing>,
    /// When its data last changed.
    pub mtime: Timestamp,
    /// When the file was made, where the file system keeps that.
    pub born: Option<Timestamp>,
    /// Which file it is.
    pub inode: Inode,
    /// Its permission bits, 0 to 0o7777.
    pub mode: u32,
    /// The qcow2 header; none for raw.
    pub header: Option<Header>,
}

/// What a layer says about the one below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name as it stands in the header.
    pub name: PathBuf,
    /// The real, absolute path that it leads to.
    pub path: PathBuf,
    /// Its format, as the header says.
    pub format: ImageFormat,
}

/// A whole chain: base first, active layer last, at least one layer.
#[derive(Clone, Debug)]
pub struct Chain {
    below: Vec<Layer>,
    active: Layer,
}

/// How much a [`Finding`] matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Info,
    /// A person should look.
    Warning,
    /// The next start of the VM fails, or reads wrong data.
    Error,
}

/// Something that [`check`] has to say about a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// The layer that it is about.
    pub path: PathBuf,
    /// Its kind, for programs: kebab-case, never renamed.
    pub code: &'static str,
    /// The facts.
    pub message: String,
    /// What to do.
    pub advice: &'static str,
}

/// What [`overlays_of`] found in a directory.
#[derive(Debug, Default)]
pub struct Overlays {
    /// Images that name the base as their backing file, sorted.
    pub found: Vec<PathBuf>,
    /// Files of which it cannot be told, with the reason. Whoever wants to remove or change the base has
    /// to take each for an overlay of it.
    pub doubtful: Vec<(PathBuf, ChainError)>,
}

impl Chain {
    /// Follows the chain from its active layer down to its base.
    ///
    /// Reads headers only and takes no lock; for a running VM ask QEMU too.
    ///
    /// # Errors
    /// [`ChainError`] at the first layer that is missing, unsound, of no explicit format, or not allowed.
    pub fn open(active: &Path, format: ImageFormat, policy: &ChainPolicy) -> Result<Self, ChainError> {
        let mut walk = Walk::new(active, format, policy);
        let mut layers = Vec::new();
        while let Some(layer) = walk.next_layer()? {
            layers.push(layer);
        }
        let mut layers = layers.into_iter();
        let missing = || ChainError::Missing { path: active.to_owned(), overlay: None };
        let active = layers.next().ok_or_else(missing)?;
        Ok(Self { below: layers.rev().collect(), active })
    }

    /// The layers, base first, active layer last.
    pub fn layers(&self) -> impl DoubleEndedIterator<Item = &Layer> {
        self.below.iter().chain(std::iter::once(&self.active))
    }

    /// The layer that takes the guest's writes.
    pub fn active(&self) -> &Layer {
        &self.active
    }

    /// The lowest layer: the active one itself where there is no other.
    pub fn base(&self) -> &Layer {
        self.below.first().unwrap_or(&self.active)
    }

    /// The layer that is this file.
    pub fn find(&self, inode: Inode) -> Option<&Layer> {
        self.layers().find(|layer| layer.inode == inode)
    }
}

/// Looks at a chain from its active layer down, and reports whatever a person should know about it.
///
/// Nothing found means: every layer is there, sound, of explicit format and in its place, no layer changed
/// after an overlay was put on it, and QEMU marked none as corrupt. The guest's data was not read. Findings
/// come in the chain's order, active layer first.
///
/// `base-newer` is found where a layer's data changed later than it rightfully did
/// ([`ChainPolicy::last_changes`]), or where that is not known, more than 60 seconds later than the file of
/// the overlay above was born; where the file system does not tell that either, the finding is `age-unknown`.
pub fn check(active: &Path, format: ImageFormat, policy: &ChainPolicy) -> Vec<Finding> {
    let mut walk = Walk::new(active, format, policy);
    let mut findings = Vec::new();
    let mut above: Option<Layer> = None;
    loop {
        match walk.next_layer() {
            Ok(None) => return findings,
            Err(error) => {
                findings.push(Finding::of_error(&error));
                return findings;
            }
            Ok(Some(layer)) => {
                findings.extend(judge_alone(&layer, above.is_none()));
                match &above {
                    None => findings.extend(judge_link(active, &layer)),
                    Some(above) => findings.extend(judge_pair(&layer, above, policy)),
                }
                above = Some(layer);
            }
        }
    }
}

/// Finds the images in `dir` that name `base` as their backing file, by looking at every regular file there
/// whatever its name. Symlinks are not followed and directories not entered.
///
/// A file counts by its first four bytes, so that a raw disk into which a guest wrote a qcow2 header can
/// appear: too many overlays are safe, one too few is not. An image that cannot be read is doubtful.
///
/// # Errors
/// [`ChainError::Host`] if the directory cannot be listed, or holds more than [`SCAN_MAX`] entries.
pub fn overlays_of(dir: &Path, base: &Path) -> Result<Overlays, ChainError> {
    let target = Target::of(base);
    let mut overlays = Overlays::default();
    for (count, entry) in fs::read_dir(dir).map_err(HostError::io("list", dir))?.enumerate() {
        if count == SCAN_MAX {
            let fault = io::Error::other(format!("it has more than {SCAN_MAX} entries"));
            return Err(HostError::io("search", dir)(fault).into());
        }
        let entry = entry.map_err(HostError::io("list", dir))?;
        // A file that is removed meanwhile is no overlay any more.
        if !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        match names(&entry.path(), &target) {
            Ok(true) => overlays.found.push(entry.path()),
            Ok(false) => {}
            Err(ChainError::Host(e)) if e.kind() == Some(io::ErrorKind::NotFound) => {}
            Err(error) => overlays.doubtful.push((entry.path(), error)),
        }
    }
    overlays.found.sort();
    overlays.doubtful.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(overlays)
}

/// Whether QEMU takes a backing file name for something else than a path: `json:…`, `nbd://…`, `host:file`.
///
/// Source: QEMU block.c `path_has_protocol`: a colon before the first slash.
pub fn is_protocol(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    bytes.iter().find(|byte| matches!(byte, b':' | b'/')) == Some(&b':')
}

impl ChainError {
    /// The finding's code, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Host(_) => "layer-unreadable",
            Self::Header(Qcow2Error::Host(_)) => "layer-unreadable",
            Self::Header(Qcow2Error::Header { .. }) => "header-unsound",
            Self::Missing { .. } => "layer-missing",
            Self::FormatMissing { .. } => "backing-format-missing",
            Self::FormatUnsupported { .. } => "backing-format-unsupported",
            Self::NotAFile { .. } => "backing-not-a-file",
            Self::Outside { .. } => "backing-outside",
            Self::Loop { .. } => "chain-loop",
            Self::TooDeep { .. } => "chain-too-deep",
            Self::DataFile { .. } => "data-file",
            Self::UnknownFeatures { .. } => "features-unknown",
        }
    }

    /// The layer that is at fault: where one names another, the one that names.
    pub fn path(&self) -> &Path {
        match self {
            Self::Host(error) | Self::Header(Qcow2Error::Host(error)) => error.path(),
            Self::Header(Qcow2Error::Header { path, .. })
            | Self::Missing { path, .. }
            | Self::FormatMissing { path, .. }
            | Self::FormatUnsupported { path, .. }
            | Self::NotAFile { path, .. }
            | Self::Outside { path, .. }
            | Self::Loop { path, .. }
            | Self::TooDeep { path }
            | Self::DataFile { path, .. }
            | Self::UnknownFeatures { path, .. } => path,
        }
    }

    /// What a person can do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Host(_) | Self::Header(Qcow2Error::Host(_)) => {
                "let the user who runs snapctl read it, or bring back the storage that it lies on"
            }
            Self::Header(Qcow2Error::Header { .. }) => {
                "make sure that its format is what it was said to be; if it is, restore this layer from a backup"
            }
            Self::Missing { .. } => "put the file back where it was, or restore the disk from a backup",
            Self::FormatMissing { .. } => {
                "while the VM is off: qemu-img rebase -u -b NAME -F FORMAT, with the format that you know it has"
            }
            Self::FormatUnsupported { .. } => {
                "convert the backing file to qcow2 while the VM is off, and rebase onto it"
            }
            Self::NotAFile { .. } => {
                "while the VM is off: qemu-img rebase -u -b PATH -F FORMAT, if you know which file it is; \
                 otherwise do not open the image"
            }
            Self::Outside { .. } => {
                "allow that directory by name if you trust it; an image from elsewhere may name any file of the host"
            }
            Self::Loop { .. } | Self::TooDeep { .. } => {
                "do not start the VM from it; restore the disk from a backup"
            }
            Self::DataFile { .. } => "convert the image into one without a data file while the VM is off",
            Self::UnknownFeatures { .. } => {
                "use a snapctl that knows them, or convert the image with the QEMU that made it"
            }
        }
    }
}

/// The way down: where the next layer is, and where it has been.
struct Walk<'a> {
    policy: &'a ChainPolicy,
    /// The active layer's directory, once that is known.
    directory: PathBuf,
    next: Option<Result<Step, ChainError>>,
    seen: Vec<Inode>,
}

struct Step {
    path: PathBuf,
    format: ImageFormat,
    overlay: Option<PathBuf>,
}

impl<'a> Walk<'a> {
    fn new(active: &Path, format: ImageFormat, policy: &'a ChainPolicy) -> Self {
        let step = Step { path: active.to_owned(), format, overlay: None };
        Self { policy, directory: PathBuf::new(), next: Some(Ok(step)), seen: Vec::new() }
    }

    /// The next layer down, or none below the base. After an error there is no next layer.
    fn next_layer(&mut self) -> Result<Option<Layer>, ChainError> {
        let Some(step) = self.next.take().transpose()? else { return Ok(None) };
        let path = self.resolve(&step)?;
        let mut layer = look_at(&path, step.format)?;
        if self.seen.contains(&layer.inode) {
            return Err(ChainError::Loop {
                path: step.overlay.unwrap_or_else(|| path.clone()),
                backing: path,
            });
        }
        if self.seen.len() == DEPTH_MAX {
            return Err(ChainError::TooDeep { path: step.overlay.unwrap_or(path) });
        }
        self.seen.push(layer.inode);
        // A fault in what the layer says about the next one is no reason not to see this one.
        self.next = follow(&mut layer).transpose();
        Ok(Some(layer))
    }

    fn resolve(&mut self, step: &Step) -> Result<PathBuf, ChainError> {
        let real = file::real_path(&step.path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                ChainError::Missing { path: step.path.clone(), overlay: step.overlay.clone() }
            }
            _ => HostError::io("resolve", &step.path)(error).into(),
        })?;
        let Some(overlay) = &step.overlay else {
            self.directory = host::files::parent(&real).to_owned();
            return Ok(real);
        };
        if self.allows(&real) {
            return Ok(real);
        }
        Err(ChainError::Outside { path: overlay.clone(), backing: real, directory: self.directory.clone() })
    }

    fn allows(&self, real: &Path) -> bool {
        let allowed = self.policy.allowed.iter().filter_map(|allowed| fs::canonicalize(allowed).ok());
        real.starts_with(&self.directory) || allowed.into_iter().any(|allowed| real.starts_with(allowed))
    }
}

/// Reads from the layer's header where the chain goes on.
fn follow(layer: &mut Layer) -> Result<Option<Step>, ChainError> {
    let Some(header) = &layer.header else { return Ok(None) };
    refuse_unhandled(&layer.path, header)?;
    let Some((name, format)) = backing_of(&layer.path, header)? else { return Ok(None) };
    let path = host::files::parent(&layer.path).join(&name);
    layer.backing = Some(Backing { name, path: file::real_path(&path).unwrap_or(path.clone()), format });
    Ok(Some(Step { path, format, overlay: Some(layer.path.clone()) }))
}

fn look_at(path: &Path, format: ImageFormat) -> Result<Layer, ChainError> {
    let mut opened = file::open(path)?;
    let header = match format {
        ImageFormat::Raw => None,
        ImageFormat::Qcow2 => Some(Header::read(&opened.file, path)?),
    };
    let virtual_size = match &header {
        Some(header) => header.virtual_size,
        None => ByteSize(opened.size(path)?),
    };
    let metadata = &opened.metadata;
    let mtime = metadata.modified().map_err(HostError::io("take the time of", path))?;
    Ok(Layer {
        path: path.to_owned(),
        format,
        virtual_size,
        allocated: file::allocated(metadata),
        backing: None,
        mtime: timestamp(mtime, path)?,
        born: metadata.created().ok().and_then(|born| Timestamp::try_from(born).ok()),
        inode: Inode::of(metadata),
        mode: metadata.mode() & 0o7777,
        header,
    })
}

fn timestamp(time: SystemTime, path: &Path) -> Result<Timestamp, HostError> {
    let out_of_range = |e: jiff::Error| io::Error::new(io::ErrorKind::InvalidData, e.to_string());
    Timestamp::try_from(time).map_err(out_of_range).map_err(HostError::io("take the time of", path))
}

fn refuse_unhandled(path: &Path, header: &Header) -> Result<(), ChainError> {
    let bits = header.incompatible.unknown();
    if !bits.is_empty() {
        return Err(ChainError::UnknownFeatures { path: path.to_owned(), bits });
    }
    if header.incompatible.external_data() || header.data_file.is_some() {
        let name = header.data_file.clone().unwrap_or_default().into();
        return Err(ChainError::DataFile { path: path.to_owned(), name });
    }
    Ok(())
}

/// The backing file's name and format as the header of `path` gives them, refused where they are not plain.
fn backing_of(path: &Path, header: &Header) -> Result<Option<(PathBuf, ImageFormat)>, ChainError> {
    let Some(name) = &header.backing_file else { return Ok(None) };
    if is_protocol(name) {
        let backing = name.to_string_lossy().into_owned();
        return Err(ChainError::NotAFile { path: path.to_owned(), backing });
    }
    let (path, backing) = (path.to_owned(), PathBuf::from(name));
    match header.backing_format.as_deref() {
        None => Err(ChainError::FormatMissing { path, backing }),
        Some(format) => match format.parse() {
            Ok(format) => Ok(Some((backing, format))),
            Err(_) => Err(ChainError::FormatUnsupported { path, backing, format: format.to_owned() }),
        },
    }
}

impl Finding {
    fn new(
        severity: Severity,
        path: &Path,
        code: &'static str,
        message: String,
        advice: &'static str,
    ) -> Self {
        Self { severity, path: path.to_owned(), code, message, advice }
    }

    fn of_error(error: &ChainError) -> Self {
        Self {
            severity: Severity::Error,
            path: error.path().to_owned(),
            code: error.code(),
            message: error.to_string(),
            advice: error.advice(),
        }
    }
}

/// What a layer says about itself.
fn judge_alone(layer: &Layer, active: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let path = &layer.path;
    let shown = path.display();
    let incompatible = layer.header.as_ref().map(|header| header.incompatible).unwrap_or_default();
    if incompatible.corrupt() {
        findings.push(Finding::new(
            Severity::Error,
            path,
            "marked-corrupt",
            format!("QEMU marked {shown} as corrupt and will not write to it"),
            "while the VM is off: qemu-img check, then repair a copy, or restore the disk from a backup",
        ));
    }
    if incompatible.dirty() {
        // A running QEMU sets it in the active layer for as long as it runs (lazy refcounts).
        let severity = if active { Severity::Info } else { Severity::Warning };
        findings.push(Finding::new(
            severity,
            path,
            "marked-dirty",
            format!("{shown} was not closed: its refcounts may be wrong, its guest data is right"),
            "nothing while a VM has it open; otherwise qemu-img check -r leaks",
        ));
    }
    if layer.virtual_size.0 == 0 {
        findings.push(Finding::new(
            Severity::Warning,
            path,
            "size-zero",
            format!("{shown} has a virtual size of 0"),
            "make sure that its format is what it was said to be",
        ));
    } else if !layer.virtual_size.0.is_multiple_of(512) {
        findings.push(Finding::new(
            Severity::Warning,
            path,
            "size-odd",
            format!(
                "{shown} has a virtual size of {} bytes, which is no multiple of 512",
                layer.virtual_size.0
            ),
            "make sure that it was not cut off; guests see whole sectors only",
        ));
    }
    findings
}

/// A relative backing name is resolved by QEMU beside the name that it was given, be that a symlink.
fn judge_link(given: &Path, active: &Layer) -> Option<Finding> {
    let relative = active.backing.as_ref().is_some_and(|backing| backing.name.is_relative());
    let beside = fs::canonicalize(host::files::parent(given)).ok()?;
    if !relative || Some(beside.as_path()) == active.path.parent() {
        return None;
    }
    Some(Finding::new(
        Severity::Warning,
        &active.path,
        "named-through-link",
        format!(
            "{} leads to {}, whose backing file name is relative: QEMU looks for it in {}",
            given.display(),
            active.path.display(),
            beside.display()
        ),
        "give QEMU the real path",
    ))
}

/// What two neighbours say about each other.
fn judge_pair(base: &Layer, overlay: &Layer, policy: &ChainPolicy) -> Vec<Finding> {
    let mut findings = Vec::new();
    if overlay.virtual_size < base.virtual_size {
        findings.push(Finding::new(
            Severity::Warning,
            &overlay.path,
            "overlay-smaller",
            format!(
                "{} has a virtual size of {}, its backing file {} of {}: the guest does not see the rest",
                overlay.path.display(),
                overlay.virtual_size,
                base.path.display(),
                base.virtual_size
            ),
            "nothing if the disk was made smaller on purpose",
        ));
    }
    findings.extend(judge_age(base, overlay, policy));
    findings
}

fn judge_age(base: &Layer, overlay: &Layer, policy: &ChainPolicy) -> Option<Finding> {
    let path = &base.path;
    let shown = path.display();
    // The times of a device's node say when the host was started.
    if path.starts_with("/dev") {
        return None;
    }
    let (since, slack, severity, what) = match (policy.last_changes.get(path), overlay.born) {
        (Some(known), _) => (*known, CLOCK_STEP, Severity::Error, "its last rightful change"),
        (None, Some(born)) => (born, PREPARATION, Severity::Warning, "the making of its overlay"),
        (None, None) => {
            return Some(Finding::new(
                Severity::Info,
                path,
                "age-unknown",
                format!(
                    "whether {shown} changed after its overlay was made cannot be told on this file system"
                ),
                "nothing",
            ));
        }
    };
    if base.mtime <= since.saturating_add(slack).unwrap_or(since) {
        return None;
    }
    Some(Finding::new(
        severity,
        path,
        "base-newer",
        format!(
            "{shown} was changed at {}, after {what} at {since}: its overlays may read wrong data",
            base.mtime
        ),
        "find out who wrote to it; a VM may have been started on it. Compare it with a backup before you go on",
    ))
}

/// The base that overlays are looked for of. It may be gone, then its name counts alone.
struct Target {
    path: PathBuf,
    inode: Option<Inode>,
}

impl Target {
    fn of(base: &Path) -> Self {
        Self { path: resolved(base), inode: fs::metadata(base).ok().map(|metadata| Inode::of(&metadata)) }
    }
}

/// The real path, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    let parent = fs::canonicalize(host::files::parent(path)).ok();
    let by_parent = || Some(parent?.join(path.file_name()?));
    file::real_path(path).ok().or_else(by_parent).unwrap_or_else(|| path.to_owned())
}

fn names(path: &Path, target: &Target) -> Result<bool, ChainError> {
    let opened = file::open(path)?;
    let mut magic = [0; MAGIC.len()];
    let count = ReadAt::read_at(&opened.file, &mut magic, 0).map_err(HostError::io("read", path))?;
    if count < magic.len() || magic != MAGIC {
        return Ok(false);
    }
    let header = Header::read(&opened.file, path)?;
    let Some(name) = header.backing_file else { return Ok(false) };
    if is_protocol(&name) {
        let backing = name.to_string_lossy().into_owned();
        return Err(ChainError::NotAFile { path: path.to_owned(), backing });
    }
    let backing = host::files::parent(path).join(name);
    let same_file = fs::metadata(&backing).is_ok_and(|metadata| Some(Inode::of(&metadata)) == target.inode);
    Ok(same_file || resolved(&backing) == target.path)
}

fn named_by(overlay: Option<&Path>) -> String {
    overlay.map_or_else(String::new, |overlay| {
        format!(", and {} names it as its backing file", overlay.display())
    })
}
