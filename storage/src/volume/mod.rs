//! Making, copying, converting and removing volumes.
//!
//! Each verb has a function here that looks at the pool and decides ([`VolumePlan`], which touches nothing and can be
//! shown), and [`carry_out`] does it. What is written to is a draft until it is whole, so that a failure and a
//! signal leave nothing, and SIGKILL leaves a draft that the next command removes.

pub mod copier;
mod ova;
mod run;
mod source;

use std::path::{Path, PathBuf};

use host::files::parent;
use model::{ByteSize, Name, PlannedStep};
use serde::Serialize;

use crate::chain::{Chain, ChainPolicy, overlays_of};
use crate::pool::{self, Capabilities, Place, Pool, PoolError, Volume, VolumeFormat};
use crate::{refuse_open, seal, space};

pub use ova::is_ova;
pub use run::{Effort, carry_out};
pub use source::Source;

/// Sectors of this size are what every guest can address.
const SECTOR: u64 = 512;
/// Room beside what is written: tables, directories.
const SPARE: u64 = 1 << 20;

/// How much of a new volume takes room at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The tables of a qcow2 image.
    Metadata,
    /// All of it, reserved.
    Falloc,
    /// All of it, written.
    Full,
}

/// How a clone comes into being.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CloneMethod {
    /// Both files share extents.
    Reflink,
    /// Both thin volumes share blocks.
    Thin,
    /// The clone is an overlay; what it stands on is frozen from then on.
    Backing,
    /// All data is copied, holes are not.
    Copy,
}

/// How a volume's former content is made unreadable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WipeMethod {
    /// Zeroes are written over what was there.
    Zero,
    /// The blocks are given back.
    Discard,
}

/// How bytes get from one image into another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transfer {
    /// As they are.
    Copy,
    /// Read and written by `qemu-img convert`.
    Convert,
}

/// Everything that [`carry_out`] will do, decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VolumePlan {
    /// The pool.
    pub pool: Name,
    /// What is done.
    #[serde(flatten)]
    pub action: Action,
}

/// What is done to a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "action", rename_all = "lowercase")]
pub enum Action {
    /// A new one.
    Create {
        /// Its name.
        name: Name,
        /// Its format.
        format: VolumeFormat,
        /// What a guest sees.
        size: ByteSize,
        /// How much of it takes room at once.
        preallocation: Preallocation,
        /// What it stands on.
        backing: Option<Volume>,
        /// The file that holds the passphrase, for LUKS.
        key: Option<PathBuf>,
    },
    /// One that begins as another is.
    Clone {
        /// The other.
        from: Volume,
        /// Its name.
        name: Name,
        /// How.
        method: CloneMethod,
    },
    /// One that is made of an image: of another volume, or of a file from elsewhere.
    Fill {
        /// The image.
        from: Source,
        /// Its name.
        name: Name,
        /// Its format.
        format: VolumeFormat,
        /// How.
        transfer: Transfer,
    },
    /// A file made of a volume.
    Export {
        /// The volume.
        from: Source,
        /// The file.
        to: PathBuf,
        /// Its format.
        format: VolumeFormat,
        /// How.
        transfer: Transfer,
    },
    /// Another size.
    Resize {
        /// The volume.
        volume: Volume,
        /// The size.
        size: ByteSize,
    },
    /// The content is made unreadable; size and format stay.
    Wipe {
        /// The volume.
        volume: Volume,
        /// How.
        method: WipeMethod,
    },
    /// It is removed.
    Delete {
        /// The volume.
        volume: Volume,
        /// What it stood on, if nothing else does: it can be written to again.
        unseal: Option<PathBuf>,
    },
}

/// What a user asks of a new volume.
#[derive(Clone, Debug, Default)]
pub struct NewVolume {
    /// Its size; that of what it stands on if none is given.
    pub size: Option<ByteSize>,
    /// Its format; the pool's first if none is given.
    pub format: Option<VolumeFormat>,
    /// How much of it takes room at once.
    pub preallocation: Preallocation,
    /// The volume of the same pool that it stands on.
    pub backing: Option<Name>,
    /// The file that holds the passphrase, for LUKS.
    pub key: Option<PathBuf>,
}

/// A pool with its name, as every verb needs it.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    /// The name.
    pub name: &'a Name,
    /// The pool.
    pub pool: &'a dyn Pool,
}

impl<'a> Here<'a> {
    /// The volume of this name, which is sound.
    ///
    /// # Errors
    /// [`PoolError::NoSuchVolume`]; [`PoolError::Broken`] with its fault.
    pub fn volume(&self, name: &Name) -> Result<Volume, PoolError> {
        let volume = pool::find(self.pool, self.name, name)?;
        match volume.fault.clone() {
            None => Ok(volume),
            Some(fault) => Err(PoolError::Broken { pool: self.name.clone(), volume: name.clone(), fault }),
        }
    }

    /// The chain of a volume that is raw or qcow2, judged.
    ///
    /// # Errors
    /// [`PoolError::Chain`]; [`PoolError::Contradiction`] for another format.
    pub fn chain(&self, volume: &Volume) -> Result<Chain, PoolError> {
        let format = volume.format.image().ok_or_else(|| {
            PoolError::Contradiction(format!(
                "volume {} is {}, of which no map is read",
                volume.name, volume.format
            ))
        })?;
        let allowed = self.pool.root().map(Path::to_owned).into_iter().collect();
        Ok(Chain::open(volume.place.path(), format, &ChainPolicy { allowed, ..ChainPolicy::default() })?)
    }

    /// The image of a volume, judged, which nobody writes to.
    fn still(&self, name: &Name) -> Result<(Volume, Source), PoolError> {
        let volume = self.volume(name)?;
        let path = volume.place.path();
        let source = Source::look(path, volume.format, self.pool.root())?;
        // What is sealed is read by whoever stands on it, and written by nobody.
        if !seal::state(path)?.is_sealed() {
            refuse_open(name, path)?;
        }
        Ok((volume, source))
    }

    fn plan(&self, action: Action) -> VolumePlan {
        VolumePlan { pool: self.name.clone(), action }
    }

    fn format(&self, wanted: Option<VolumeFormat>) -> Result<VolumeFormat, PoolError> {
        let formats = self.pool.capabilities()?.formats;
        match (wanted, formats.first()) {
            (Some(wanted), _) if formats.contains(&wanted) => Ok(wanted),
            (None, Some(first)) => Ok(*first),
            (wanted, _) => {
                let names: Vec<&str> = formats.iter().map(|format| format.driver()).collect();
                let wanted = wanted.map_or("nothing", VolumeFormat::driver);
                let what =
                    format!("pool {} has volumes of format {}, not {wanted}", self.name, names.join(", "));
                Err(PoolError::Contradiction(what))
            }
        }
    }

    fn refuse_taken(&self, name: &Name) -> Result<(), PoolError> {
        if self.pool.volumes()?.iter().any(|volume| volume.name == *name) {
            return Err(PoolError::VolumeExists { pool: self.name.clone(), volume: name.clone() });
        }
        Ok(())
    }

    /// Decides how a new volume is made.
    ///
    /// # Errors
    /// [`PoolError::Contradiction`] for what does not go together; [`PoolError::VolumeExists`];
    /// [`PoolError::NoSuchVolume`] and what is wrong with the backing volume.
    pub fn create(&self, name: &Name, wanted: &NewVolume) -> Result<VolumePlan, PoolError> {
        let format = self.format(wanted.format)?;
        let no = |what: &str| Err(PoolError::Contradiction(what.to_owned()));
        if format != VolumeFormat::Qcow2 {
            if wanted.backing.is_some() {
                return no("only a qcow2 volume stands on another one: add --format qcow2");
            }
            if wanted.key.is_some() {
                return no("only qcow2 volumes are encrypted here: add --format qcow2");
            }
            if wanted.preallocation == Preallocation::Metadata {
                return no("only a qcow2 volume has tables that could be preallocated");
            }
            if format == VolumeFormat::Vmdk && wanted.preallocation != Preallocation::Off {
                return no("a vmdk volume is not preallocated");
            }
        }
        self.refuse_taken(name)?;
        let backing = match &wanted.backing {
            None => None,
            Some(_) if wanted.preallocation != Preallocation::Off => {
                return no("an overlay is not preallocated: what it has not is read from below");
            }
            Some(below) => Some(self.base(below)?),
        };
        let size = match (wanted.size, &backing) {
            (Some(size), _) => size,
            (None, Some(below)) => below.virtual_size,
            (None, None) => return no("a new volume needs a size, for example 20G"),
        };
        let size = sectors(size)?;
        if let Some(below) = backing.as_ref().filter(|below| below.virtual_size > size) {
            return Err(PoolError::WouldShrink {
                volume: below.name.clone(),
                now: below.virtual_size,
                wanted: size,
            });
        }
        if matches!(wanted.preallocation, Preallocation::Falloc | Preallocation::Full) {
            self.require(size)?;
        }
        let (preallocation, key) = (wanted.preallocation, wanted.key.clone());
        Ok(self.plan(Action::Create { name: name.clone(), format, size, preallocation, backing, key }))
    }

    /// A volume that others may stand on.
    fn base(&self, name: &Name) -> Result<Volume, PoolError> {
        let (volume, source) = self.still(name)?;
        if volume.format.image().is_none() {
            let what =
                format!("volume {name} is {}, and only raw and qcow2 volumes are stood on", volume.format);
            return Err(PoolError::Contradiction(what));
        }
        source.refuse_disguise()?;
        Ok(volume)
    }

    /// Decides how a clone is made; the best that the pool can do if `method` is none.
    ///
    /// # Errors
    /// [`PoolError::InUse`]; [`PoolError::Unsupported`] for a method; as [`Here::create`].
    pub fn clone_of(
        &self,
        from: &Name,
        name: &Name,
        method: Option<CloneMethod>,
    ) -> Result<VolumePlan, PoolError> {
        let (volume, source) = self.still(from)?;
        self.refuse_taken(name)?;
        let can = self.pool.capabilities()?;
        let sealed = seal::state(volume.place.path())?.is_sealed();
        let method = method.unwrap_or_else(|| best_clone(&can, &volume, sealed));
        let unsupported = |what: &str| {
            Err(PoolError::Unsupported { pool: self.name.clone(), kind: self.pool.kind(), what: what.into() })
        };
        match method {
            CloneMethod::Reflink if !can.reflink => return unsupported("share extents between files"),
            CloneMethod::Thin if !(can.clone && volume.place.is_device()) => {
                return unsupported("make thin clones");
            }
            CloneMethod::Backing if !can.formats.contains(&VolumeFormat::Qcow2) => {
                return unsupported("hold qcow2 volumes, which alone stand on others");
            }
            CloneMethod::Backing => {
                return self.create(
                    name,
                    &NewVolume {
                        backing: Some(from.clone()),
                        format: Some(VolumeFormat::Qcow2),
                        ..NewVolume::default()
                    },
                );
            }
            CloneMethod::Copy => return self.fill(source, name, volume.format),
            CloneMethod::Reflink | CloneMethod::Thin => {}
        }
        Ok(self.plan(Action::Clone { from: volume, name: name.clone(), method }))
    }

    /// Decides how a volume is made of another one of this pool, in another format.
    ///
    /// # Errors
    /// As [`Here::clone_of`].
    pub fn convert(&self, from: &Name, name: &Name, format: VolumeFormat) -> Result<VolumePlan, PoolError> {
        let (_, source) = self.still(from)?;
        self.fill(source, name, self.format(Some(format))?)
    }

    /// Decides how a volume is made of one of another pool. Its format is kept where this pool can hold it.
    ///
    /// # Errors
    /// As [`Here::clone_of`].
    pub fn copy(
        &self,
        there: Here<'_>,
        from: &Name,
        name: &Name,
        format: Option<VolumeFormat>,
    ) -> Result<VolumePlan, PoolError> {
        let (volume, source) = there.still(from)?;
        let formats = self.pool.capabilities()?.formats;
        let kept = Some(volume.format).filter(|format| formats.contains(format));
        self.fill(source, name, self.format(format.or(kept))?)
    }

    /// Decides how volumes are made of a file from elsewhere: one, or one for each disk of an OVA.
    ///
    /// A format that the user did not name is told by the file's ending.
    ///
    /// # Errors
    /// [`PoolError::FormatUnknown`]; [`PoolError::LooksOther`]; what is wrong with the image; as [`Here::create`].
    pub fn import(
        &self,
        file: &Path,
        name: &Name,
        from: Option<VolumeFormat>,
        to: Option<VolumeFormat>,
    ) -> Result<Vec<VolumePlan>, PoolError> {
        let to = self.format(to)?;
        if from.is_none() && is_ova(file) {
            let disks = ova::disks(file)?;
            let several = disks.len() > 1;
            let numbered = disks.into_iter().enumerate().map(|(index, disk)| {
                let name = if several { numbered(self.name, name, index + 1)? } else { name.clone() };
                self.fill(disk, &name, to)
            });
            return numbered.collect();
        }
        let told = from.or_else(|| VolumeFormat::of_file(file));
        let format = told.ok_or_else(|| PoolError::FormatUnknown { path: file.to_owned() })?;
        let source = Source::look(file, format, None)?;
        if from.is_none() {
            source.refuse_disguise()?;
        }
        refuse_open(name, file)?;
        self.fill(source, name, to).map(|plan| vec![plan])
    }

    fn fill(&self, from: Source, name: &Name, format: VolumeFormat) -> Result<VolumePlan, PoolError> {
        self.refuse_taken(name)?;
        let transfer = transfer(&from, format)?;
        let device = !self.pool.capabilities()?.thin;
        self.require(match from.size {
            Some(size) if device => size,
            _ => ByteSize(from.allocated.0.saturating_add(SPARE)),
        })?;
        Ok(self.plan(Action::Fill { from, name: name.clone(), format, transfer }))
    }

    /// Decides how a file is made of a volume. Its format is told by its ending unless the user names one.
    ///
    /// # Errors
    /// [`PoolError::TargetExists`]; [`PoolError::FormatUnknown`]; as [`Here::clone_of`].
    pub fn export(
        &self,
        from: &Name,
        to: &Path,
        format: Option<VolumeFormat>,
    ) -> Result<VolumePlan, PoolError> {
        let (_, source) = self.still(from)?;
        if std::fs::symlink_metadata(to).is_ok() {
            return Err(PoolError::TargetExists { path: to.to_owned() });
        }
        let format = format.or_else(|| VolumeFormat::of_file(to));
        let format = format.ok_or_else(|| PoolError::FormatUnknown { path: to.to_owned() })?;
        let transfer = transfer(&source, format)?;
        space::require(parent(to), source.allocated)?;
        Ok(self.plan(Action::Export { from: source, to: to.to_owned(), format, transfer }))
    }

    /// Decides whether a volume can have another size.
    ///
    /// # Errors
    /// [`PoolError::WouldShrink`] unless `shrink`; [`PoolError::InUse`]; [`PoolError::HasOverlays`].
    pub fn resize(&self, name: &Name, size: ByteSize, shrink: bool) -> Result<VolumePlan, PoolError> {
        let volume = self.changeable(name)?;
        if volume.format == VolumeFormat::Vmdk {
            let what = "change the size of a vmdk volume".to_owned();
            return Err(PoolError::Unsupported { pool: self.name.clone(), kind: self.pool.kind(), what });
        }
        let size = sectors(size)?;
        if size < volume.virtual_size && !shrink {
            return Err(PoolError::WouldShrink {
                volume: name.clone(),
                now: volume.virtual_size,
                wanted: size,
            });
        }
        Ok(self.plan(Action::Resize { volume, size }))
    }

    /// Decides how a volume's content is made unreadable.
    ///
    /// # Errors
    /// As [`Here::resize`].
    pub fn wipe(&self, name: &Name, method: WipeMethod) -> Result<VolumePlan, PoolError> {
        let volume = self.changeable(name)?;
        if volume.backing.is_some() || volume.encrypted {
            let what = format!("volume {name} is an overlay, or encrypted: delete it, and make a new one");
            return Err(PoolError::Contradiction(what));
        }
        Ok(self.plan(Action::Wipe { volume, method }))
    }

    /// Decides how a volume is removed. One that is broken can be, too.
    ///
    /// # Errors
    /// [`PoolError::InUse`]; [`PoolError::HasOverlays`].
    pub fn delete(&self, name: &Name) -> Result<VolumePlan, PoolError> {
        let volume = pool::find(self.pool, self.name, name)?;
        let path = volume.place.path();
        self.refuse_overlays(&volume)?;
        refuse_open(name, path)?;
        let base = volume.backing.as_ref().map(|below| parent(path).join(below));
        let unseal = base.filter(|base| {
            let others = overlays_of(parent(base), base).is_ok_and(|overlays| {
                overlays.doubtful.is_empty() && overlays.found.iter().all(|overlay| overlay == path)
            });
            others && seal::state(base).is_ok_and(seal::SealState::is_sealed)
        });
        Ok(self.plan(Action::Delete { volume, unseal }))
    }

    /// A volume that nobody uses, and on which nothing stands.
    fn changeable(&self, name: &Name) -> Result<Volume, PoolError> {
        let volume = self.volume(name)?;
        self.refuse_overlays(&volume)?;
        refuse_open(name, volume.place.path())?;
        Ok(volume)
    }

    fn refuse_overlays(&self, volume: &Volume) -> Result<(), PoolError> {
        let Place::File(path) = &volume.place else { return Ok(()) };
        let overlays = overlays_of(parent(path), path)?;
        let mut overlays: Vec<PathBuf> = overlays.found;
        overlays.retain(|overlay| overlay != path);
        if overlays.is_empty() {
            return Ok(());
        }
        Err(PoolError::HasOverlays { volume: volume.name.clone(), overlays })
    }

    fn require(&self, needed: ByteSize) -> Result<(), PoolError> {
        let available = self.pool.usage()?.available;
        if needed <= available {
            return Ok(());
        }
        Err(PoolError::Full { pool: self.name.clone(), needed, available })
    }
}

impl VolumePlan {
    /// The plan for people.
    pub fn steps(&self) -> Vec<PlannedStep> {
        let pool = &self.pool;
        let (steps, undo): (Vec<String>, Option<String>) = match &self.action {
            Action::Create { name, format, size, backing, .. } => {
                let on = backing.as_ref().map(|below| format!(" on {}", below.name)).unwrap_or_default();
                let mut steps = vec![format!("make a {format} image of {size}{on} in pool {pool}")];
                steps.extend(backing.as_ref().map(|below| format!("seal {} against writing", below.name)));
                steps.push(format!("name it {name}"));
                (steps, Some("remove the image".into()))
            }
            Action::Clone { from, name, method } => {
                let how = method.as_str();
                (
                    vec![format!("clone {} by {how}", from.name), format!("name it {name}")],
                    Some("remove it".into()),
                )
            }
            Action::Fill { from, name, format, transfer } => {
                let (path, how) = (from.path.display(), transfer.as_str());
                let steps = vec![
                    format!(
                        "{how} at most {} from {path} into a {format} image in pool {pool}",
                        from.allocated
                    ),
                    format!("name it {name}"),
                ];
                (steps, Some("remove the image".into()))
            }
            Action::Export { from, to, format, transfer } => {
                let (path, to, how) = (from.path.display(), to.display(), transfer.as_str());
                let undo = Some("remove the file".into());
                (vec![format!("{how} {path} into {to} ({format})")], undo)
            }
            Action::Resize { volume, size } => {
                (vec![format!("change {} from {} to {size}", volume.name, volume.virtual_size)], None)
            }
            Action::Wipe { volume, method } => {
                let how = match method {
                    WipeMethod::Zero => "write zeroes over",
                    WipeMethod::Discard => "give back the blocks of",
                };
                (vec![format!("{how} {}", volume.place.path().display())], None)
            }
            Action::Delete { volume, unseal } => {
                let mut steps = vec![format!("remove {}", volume.place.path().display())];
                steps.extend(
                    unseal.as_ref().map(|base| format!("let {} be written to again", base.display())),
                );
                (steps, None)
            }
        };
        steps.into_iter().map(|step| PlannedStep { step, undo: undo.clone() }).collect()
    }

    /// The name of the volume that it is about.
    pub fn volume(&self) -> Option<&Name> {
        match &self.action {
            Action::Create { name, .. } | Action::Clone { name, .. } | Action::Fill { name, .. } => {
                Some(name)
            }
            Action::Resize { volume, .. } | Action::Wipe { volume, .. } | Action::Delete { volume, .. } => {
                Some(&volume.name)
            }
            Action::Export { .. } => None,
        }
    }
}

impl CloneMethod {
    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reflink => "reflink",
            Self::Thin => "thin",
            Self::Backing => "backing",
            Self::Copy => "copy",
        }
    }
}

impl Transfer {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Convert => "convert",
        }
    }
}

/// What costs least and lets both be written to. An overlay would freeze the original, so it is the choice only where
/// that is frozen already.
fn best_clone(can: &Capabilities, from: &Volume, sealed: bool) -> CloneMethod {
    match &from.place {
        Place::File(_) if can.reflink => CloneMethod::Reflink,
        Place::Device(_) if can.clone => CloneMethod::Thin,
        Place::File(_) if sealed && from.format.image().is_some() => CloneMethod::Backing,
        _ => CloneMethod::Copy,
    }
}

/// An image that stands alone can be copied as it is into one of the same format, with all that is in it.
fn transfer(from: &Source, to: VolumeFormat) -> Result<Transfer, PoolError> {
    let same = from.format == to && matches!(to, VolumeFormat::Raw | VolumeFormat::Qcow2);
    if same && !from.backed && from.part.is_none() {
        return Ok(Transfer::Copy);
    }
    if from.encrypted {
        let what = format!("{} is encrypted, and can be copied as it is only", from.path.display());
        return Err(PoolError::Contradiction(what));
    }
    Ok(Transfer::Convert)
}

fn sectors(size: ByteSize) -> Result<ByteSize, PoolError> {
    let rounded = size.0.checked_next_multiple_of(SECTOR).filter(|size| (1..=i64::MAX as u64).contains(size));
    let fault = || PoolError::Contradiction(format!("{size} is no size that a disk can have"));
    rounded.map(ByteSize).ok_or_else(fault)
}

fn numbered(pool: &Name, name: &Name, number: usize) -> Result<Name, PoolError> {
    let text = format!("{name}-{number}");
    text.parse().map_err(|fault: model::ParseNameError| PoolError::BadName {
        pool: pool.clone(),
        volume: name.clone(),
        why: fault.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(format: VolumeFormat) -> Source {
        Source {
            path: "/x".into(),
            format,
            part: None,
            size: Some(ByteSize(1)),
            allocated: ByteSize(1),
            backed: false,
            encrypted: false,
        }
    }

    #[test]
    fn only_what_stands_alone_is_copied_as_it_is() {
        use VolumeFormat::{Qcow2, Raw, Vdi, Vmdk};
        let how = |from: &Source, to| transfer(from, to).unwrap();
        assert_eq!(how(&source(Qcow2), Qcow2), Transfer::Copy);
        assert_eq!(how(&source(Raw), Raw), Transfer::Copy);
        assert_eq!(how(&Source { backed: true, ..source(Qcow2) }, Qcow2), Transfer::Convert);
        assert_eq!(how(&Source { part: Some((0, 1)), ..source(Raw) }, Raw), Transfer::Convert);
        for (from, to) in [(Vmdk, Vmdk), (Vdi, Qcow2), (Raw, Qcow2)] {
            assert_eq!(how(&source(from), to), Transfer::Convert);
        }
        let secret = Source { encrypted: true, ..source(Qcow2) };
        assert_eq!(how(&secret, Qcow2), Transfer::Copy);
        assert!(transfer(&secret, Raw).is_err(), "it would be ciphertext, or need the key");
    }

    #[test]
    fn sizes_are_whole_sectors() {
        assert_eq!(sectors(ByteSize(1)).unwrap(), ByteSize(512));
        assert_eq!(sectors(ByteSize(1024)).unwrap(), ByteSize(1024));
        assert!(sectors(ByteSize(0)).is_err() && sectors(ByteSize(u64::MAX)).is_err());
    }
}
