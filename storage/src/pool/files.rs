//! Volumes that are files below a directory; what `dir`, `fs` and `btrfs` have in common.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::files;
use host::program::Program;
use model::{ByteSize, Name};

use super::{Capabilities, Changed, Draft, Place, Pool, PoolError, Usage, Volume, VolumeFormat, Wanted};
use crate::overlay::{Ownership, is_overlay_name, prepare_as};
use crate::qcow2::{Encryption, Header};
use crate::{allocated, filesystem, reflink, seal, space, vmdk};

/// What a new volume may be done with, by its owner alone.
const MODE: u32 = 0o600;
/// The ending of a draft.
const PART: &str = ".part";
/// Formats that a volume in a file can have.
const FORMATS: [VolumeFormat; 3] = [VolumeFormat::Qcow2, VolumeFormat::Raw, VolumeFormat::Vmdk];

/// How files lie below the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// `NAME.FORMAT`.
    Flat,
    /// `NAME/NAME.FORMAT`, where `NAME` is a btrfs subvolume.
    Subvolumes,
}

/// What one kind of pool does beside keeping files in a directory.
pub(super) trait FilePlace: std::fmt::Debug + Send + Sync {
    /// See [`Pool::kind`].
    fn kind(&self) -> &'static str;
    /// See [`Pool::location`].
    fn location(&self, files: &Files) -> String {
        files.root.display().to_string()
    }
    /// See [`Pool::ready`].
    fn ready(&self, files: &Files) -> Result<(), PoolError>;
    /// See [`Pool::start`].
    fn start(&self, files: &Files) -> Result<Changed, PoolError>;
    /// See [`Pool::stop`].
    fn stop(&self, files: &Files) -> Result<Changed, PoolError>;
    /// See [`Pool::forget`].
    fn forget(&self, files: &Files) -> Result<(), PoolError>;
}

/// A pool whose volumes are files.
#[derive(Debug)]
pub(super) struct FilePool<P> {
    files: Files,
    place: P,
}

impl<P: FilePlace> FilePool<P> {
    /// The pool of `files` in `place`.
    ///
    /// # Errors
    /// [`PoolError::BadDefinition`] if the directory is not absolute.
    pub fn new(files: Files, place: P) -> Result<Self, PoolError> {
        super::require_absolute(&files.pool, &files.root)?;
        Ok(Self { files, place })
    }

    fn files(&self) -> Result<&Files, PoolError> {
        self.place.ready(&self.files).map(|()| &self.files)
    }
}

impl<P: FilePlace> Pool for FilePool<P> {
    fn kind(&self) -> &'static str {
        self.place.kind()
    }

    fn location(&self) -> String {
        self.place.location(&self.files)
    }

    fn root(&self) -> Option<&Path> {
        Some(&self.files.root)
    }

    fn capabilities(&self) -> Result<Capabilities, PoolError> {
        self.files()?.capabilities()
    }

    fn ready(&self) -> Result<(), PoolError> {
        self.place.ready(&self.files)
    }

    fn start(&self) -> Result<Changed, PoolError> {
        self.place.start(&self.files)
    }

    fn stop(&self) -> Result<Changed, PoolError> {
        self.place.stop(&self.files)
    }

    fn usage(&self) -> Result<Usage, PoolError> {
        self.files()?.usage()
    }

    fn volumes(&self) -> Result<Vec<Volume>, PoolError> {
        self.files()?.volumes()
    }

    fn allocate(&self, wanted: &Wanted) -> Result<Draft, PoolError> {
        self.files()?.allocate(wanted)
    }

    fn share(&self, from: &Volume, name: &Name) -> Result<Draft, PoolError> {
        self.files()?.share(from, name)
    }

    fn publish(&self, draft: &Draft) -> Result<(), PoolError> {
        self.files()?.publish(draft)
    }

    fn discard(&self, draft: &Draft) -> Result<(), PoolError> {
        self.files()?.discard(draft)
    }

    fn drafts(&self) -> Result<Vec<Draft>, PoolError> {
        self.files()?.drafts()
    }

    fn resize(&self, volume: &Volume, size: ByteSize) -> Result<(), PoolError> {
        self.files()?.resize(volume, size)
    }

    fn remove(&self, volume: &Volume) -> Result<(), PoolError> {
        self.files()?.remove(volume)
    }

    fn forget(&self) -> Result<(), PoolError> {
        self.place.forget(&self.files)
    }
}

/// A directory of volumes. It is there; that is asked before.
#[derive(Clone, Debug)]
pub(super) struct Files {
    pub pool: Name,
    pub root: PathBuf,
    pub layout: Layout,
}

impl Files {
    pub fn capabilities(&self) -> Result<Capabilities, PoolError> {
        let found = filesystem::of(&self.root)?;
        let reflink = found.reflink && reflink::is_possible(&self.root)?;
        Ok(Capabilities {
            thin: true,
            snapshot: reflink,
            clone: reflink,
            resize: true,
            reflink,
            formats: FORMATS.to_vec(),
            remote: found.shared,
        })
    }

    pub fn usage(&self) -> Result<Usage, PoolError> {
        let space = space::of(&self.root)?;
        let allocated = ByteSize(space.total.0.saturating_sub(space.available.0));
        Ok(Usage { capacity: space.total, allocated, available: space.available, thin: None })
    }

    pub fn volumes(&self) -> Result<Vec<Volume>, PoolError> {
        let mut volumes: Vec<Volume> =
            self.images()?.into_iter().filter_map(|(name, format, path)| look(name, format, &path)).collect();
        volumes.sort_by(|a, b| (&a.name, a.format).cmp(&(&b.name, b.format)));
        // Two files of one name would be one volume with two contents.
        let twice: Vec<Name> = volumes
            .windows(2)
            .filter(|pair| pair[0].name == pair[1].name)
            .map(|pair| pair[0].name.clone())
            .collect();
        for volume in volumes.iter_mut().filter(|volume| twice.contains(&volume.name)) {
            volume.fault = Some("several files have this name, with different endings".into());
        }
        Ok(volumes)
    }

    pub fn allocate(&self, wanted: &Wanted) -> Result<Draft, PoolError> {
        if !FORMATS.contains(&wanted.format) {
            let why = format!("volumes here are {}", FORMATS.map(VolumeFormat::driver).join(", "));
            return Err(PoolError::Contradiction(format!(
                "pool {}: {why}; not {}",
                self.pool, wanted.format
            )));
        }
        if is_overlay_name(Path::new(wanted.name.as_str())) {
            return Err(self.bad_name(&wanted.name, "the layers of snapshots are named like that".into()));
        }
        self.refuse_taken(&wanted.name)?;
        let draft = self.draft(&wanted.name, wanted.format);
        self.discard(&draft)?;
        if self.layout == Layout::Subvolumes {
            btrfs("create", files::parent(draft.place.path()))?;
        }
        let made = self.make(&draft, wanted);
        if made.is_err() {
            self.discard(&draft)?;
        }
        made.map(|()| draft)
    }

    fn make(&self, draft: &Draft, wanted: &Wanted) -> Result<(), PoolError> {
        let path = draft.place.path();
        let owner = Ownership { mode: MODE, ..Ownership::of(&self.root)? };
        prepare_as(path, &self.root, owner).map_err(|fault| match fault {
            crate::overlay::OverlayError::Host(fault) => PoolError::Host(fault),
            other => PoolError::Host(HostError::io("make", path)(io::Error::other(other.to_string()))),
        })?;
        if wanted.format == VolumeFormat::Raw {
            let file = File::options().write(true).open(path).map_err(HostError::io("open", path))?;
            file.set_len(wanted.size.0).map_err(HostError::io("set the size of", path))?;
        }
        Ok(())
    }

    pub fn share(&self, from: &Volume, name: &Name) -> Result<Draft, PoolError> {
        let draft = self.allocate(&Wanted { name: name.clone(), format: from.format, size: ByteSize(0) })?;
        match reflink::clone_onto(from.place.path(), draft.place.path()) {
            Ok(()) => Ok(Draft { zeroed: false, ..draft }),
            Err(fault) => {
                self.discard(&draft)?;
                Err(fault.into())
            }
        }
    }

    pub fn publish(&self, draft: &Draft) -> Result<(), PoolError> {
        let from = draft.place.path();
        files::sync_file(from)?;
        let to = self.path(&draft.name, draft.format);
        match self.layout {
            Layout::Flat => files::rename_new_durably(from, &to)?,
            Layout::Subvolumes => {
                files::sync_dir(files::parent(from))?;
                files::rename_new_durably(files::parent(from), files::parent(&to))?;
            }
        }
        Ok(())
    }

    pub fn discard(&self, draft: &Draft) -> Result<(), PoolError> {
        let path = draft.place.path();
        match self.layout {
            Layout::Flat => drop(files::remove_durably(path)?),
            Layout::Subvolumes => remove_subvolume(files::parent(path))?,
        }
        Ok(())
    }

    pub fn drafts(&self) -> Result<Vec<Draft>, PoolError> {
        let of = |name: String| {
            let stem = name.strip_prefix('.')?.strip_suffix(PART)?.to_owned();
            match self.layout {
                Layout::Flat => {
                    let format = VolumeFormat::of_file(Path::new(&stem))?;
                    let name = stem.strip_suffix(&format!(".{format}"))?.parse().ok()?;
                    Some(self.draft(&name, format))
                }
                // Which format it was to have plays no part in taking it away.
                Layout::Subvolumes => Some(self.draft(&stem.parse().ok()?, VolumeFormat::Raw)),
            }
        };
        Ok(self.entries(&self.root)?.into_iter().filter_map(of).collect())
    }

    pub fn resize(&self, volume: &Volume, size: ByteSize) -> Result<(), PoolError> {
        let path = volume.place.path();
        let file = File::options().write(true).open(path).map_err(HostError::io("open", path))?;
        file.set_len(size.0).map_err(HostError::io("set the size of", path))?;
        file.sync_all().map_err(HostError::io("sync", path))?;
        Ok(())
    }

    pub fn remove(&self, volume: &Volume) -> Result<(), PoolError> {
        let path = volume.place.path();
        seal::unseal(path, MODE)?;
        match self.layout {
            Layout::Flat => drop(files::remove_durably(path)?),
            Layout::Subvolumes => {
                files::remove_durably(path)?;
                remove_subvolume(files::parent(path))?;
            }
        }
        Ok(())
    }

    fn bad_name(&self, name: &Name, why: String) -> PoolError {
        PoolError::BadName { pool: self.pool.clone(), volume: name.clone(), why }
    }

    fn refuse_taken(&self, name: &Name) -> Result<(), PoolError> {
        let images = self.images()?;
        if images.iter().any(|(taken, ..)| taken == name) {
            return Err(PoolError::VolumeExists { pool: self.pool.clone(), volume: name.clone() });
        }
        Ok(())
    }

    /// Every file that is named like a volume, overlays of snapshots included.
    fn images(&self) -> Result<Vec<(Name, VolumeFormat, PathBuf)>, PoolError> {
        let mut images = Vec::new();
        let mut add = |dir: &Path, file: String| {
            let path = dir.join(&file);
            let format = VolumeFormat::of_file(&path).filter(|format| FORMATS.contains(format));
            let name = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
            if let (Some(name), Some(format)) = (name, format)
                && fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_file())
            {
                images.push((name, format, path));
            }
        };
        for entry in self.entries(&self.root)? {
            let dir = self.root.join(&entry);
            match self.layout {
                Layout::Flat => add(&self.root, entry),
                Layout::Subvolumes if !entry.starts_with('.') && dir.is_dir() => {
                    let mine =
                        |file: &String| Path::new(file).file_stem().is_some_and(|stem| *stem == *entry);
                    self.entries(&dir)?.into_iter().filter(mine).for_each(|file| add(&dir, file));
                }
                Layout::Subvolumes => {}
            }
        }
        Ok(images)
    }

    fn entries(&self, dir: &Path) -> Result<Vec<String>, PoolError> {
        let entries = fs::read_dir(dir).map_err(HostError::io("list", dir))?;
        Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
    }

    fn path(&self, name: &Name, format: VolumeFormat) -> PathBuf {
        match self.layout {
            Layout::Flat => self.root.join(format!("{name}.{format}")),
            Layout::Subvolumes => self.root.join(name.as_str()).join(format!("{name}.{format}")),
        }
    }

    fn draft(&self, name: &Name, format: VolumeFormat) -> Draft {
        let path = match self.layout {
            Layout::Flat => self.root.join(format!(".{name}.{format}{PART}")),
            Layout::Subvolumes => self.root.join(format!(".{name}{PART}")).join(format!("{name}.{format}")),
        };
        Draft { name: name.clone(), format, place: Place::File(path), zeroed: true }
    }
}

/// What can be seen of a volume without trusting it; none if it is a layer of a snapshot's, or gone meanwhile.
fn look(name: Name, format: VolumeFormat, path: &Path) -> Option<Volume> {
    if is_overlay_name(path) {
        return None;
    }
    let metadata = fs::symlink_metadata(path).ok()?;
    let mut volume = Volume {
        name,
        format,
        place: Place::File(path.to_owned()),
        virtual_size: ByteSize(metadata.size()),
        allocated: allocated(&metadata),
        backing: None,
        encrypted: false,
        origin: None,
        foreign: false,
        fault: None,
    };
    match format {
        VolumeFormat::Qcow2 => match Header::open(path) {
            Ok(header) => {
                volume.virtual_size = header.virtual_size;
                volume.encrypted = header.encryption != Encryption::None;
                volume.backing = header.backing_file.map(PathBuf::from);
            }
            Err(fault) => volume.fault = Some(fault.to_string()),
        },
        VolumeFormat::Vmdk => match vmdk::read(path) {
            Ok(found) => volume.virtual_size = found.capacity,
            Err(fault) => volume.fault = Some(fault.to_string()),
        },
        VolumeFormat::Raw | VolumeFormat::Vhdx | VolumeFormat::Vdi => {}
    }
    Some(volume)
}

/// `btrfs subvolume create|delete DIR`.
pub(super) fn btrfs(verb: &str, dir: &Path) -> Result<(), PoolError> {
    Program::new("btrfs").args(["subvolume", verb]).arg(dir).run()?;
    Ok(())
}

/// Removes a volume's subvolume, with what snapshots left in it; one that is not there is none.
fn remove_subvolume(dir: &Path) -> Result<(), PoolError> {
    if dir.is_dir() {
        btrfs("delete", dir)?;
        files::sync_dir(files::parent(dir))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> (tempfile::TempDir, Files) {
        let dir = tempfile::tempdir().unwrap();
        let files = Files { pool: "p1".parse().unwrap(), root: dir.path().to_owned(), layout: Layout::Flat };
        (dir, files)
    }

    fn wanted(name: &str, format: VolumeFormat) -> Wanted {
        Wanted { name: name.parse().unwrap(), format, size: ByteSize(1 << 20) }
    }

    #[test]
    fn a_volume_is_a_draft_until_it_is_published_and_gone_when_removed() {
        let (_dir, files) = pool();
        let draft = files.allocate(&wanted("v1", VolumeFormat::Raw)).unwrap();
        assert_eq!(files.volumes().unwrap(), []);
        assert_eq!(files.drafts().unwrap(), std::slice::from_ref(&draft));
        files.publish(&draft).unwrap();
        let volumes = files.volumes().unwrap();
        assert_eq!(volumes.len(), 1);
        assert_eq!((volumes[0].virtual_size, volumes[0].allocated), (ByteSize(1 << 20), ByteSize(0)));
        assert_eq!(files.drafts().unwrap(), []);
        let fault = files.allocate(&wanted("v1", VolumeFormat::Qcow2)).unwrap_err();
        assert!(matches!(fault, PoolError::VolumeExists { .. }), "{fault}");
        files.remove(&volumes[0]).unwrap();
        assert_eq!(files.volumes().unwrap(), []);
        assert_eq!(fs::read_dir(&files.root).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn what_a_killed_process_left_gives_way() {
        let (_dir, files) = pool();
        let left = files.allocate(&wanted("v1", VolumeFormat::Raw)).unwrap();
        let again = files.allocate(&wanted("v1", VolumeFormat::Raw)).unwrap();
        assert_eq!(left, again);
        files.discard(&again).unwrap();
        assert_eq!(fs::read_dir(&files.root).unwrap().count(), 0);
    }

    #[test]
    fn other_files_are_no_volumes_and_broken_ones_say_so() {
        let (dir, files) = pool();
        for name in ["notes.txt", "lost+found", ".hidden.raw", "-x.raw"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link.raw")).unwrap();
        assert_eq!(files.volumes().unwrap(), []);
        fs::write(dir.path().join("b.qcow2"), "not qcow2").unwrap();
        fs::write(dir.path().join("t.raw"), "x").unwrap();
        fs::write(dir.path().join("t.img"), "x").unwrap();
        let volumes = files.volumes().unwrap();
        assert_eq!(volumes.iter().filter(|volume| volume.fault.is_some()).count(), 3, "{volumes:#?}");
    }
}
