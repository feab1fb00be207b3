//! Carrying out what was decided.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::files::{self, parent};
use host::program::{Program, ProgramError, percent_listener};
use host::tied::Tie;
use host::watch::{Pace, Watch};
use model::ByteSize;
use rustix::fs::{FallocateFlags, fallocate};
use serde::Deserialize;

use super::copier::{self, Job, for_each_data, write_zeroes};
use super::source::Source;
use super::{Action, Here, Preallocation, Transfer, VolumePlan, WipeMethod};
use crate::overlay::{Ownership, backing_name, prepare_as};
use crate::pool::{Draft, Place, PoolError, Volume, VolumeFormat, Wanted};
use crate::publish::partial;
use crate::{chain, reflink, seal};

/// What a file that is exported may be done with, by its owner alone.
const MODE: u32 = 0o600;
/// The name of the key's object on a command line of qemu-img's.
const KEY: &str = "key0";
/// How often the time that a key's derivation takes is measured before that fails.
const KEY_TIMINGS: usize = 20;

/// How much is put into it, and who looks on.
#[derive(Clone, Debug)]
pub struct Effort {
    /// How a program is started that ends with this one.
    pub tie: Tie,
    /// Whether it is to end, and how far it is.
    pub watch: Watch,
    /// At most so many bytes a second.
    pub bandwidth: Option<ByteSize>,
}

/// Does it. The caller holds the pool's lock. Returns the volume, unless it is gone or a file was made.
///
/// # Errors
/// [`PoolError`]; what was made is removed then, but for a resize and a wipe, which can be repeated.
pub fn carry_out(here: Here<'_>, plan: &VolumePlan, effort: &Effort) -> Result<Option<Volume>, PoolError> {
    match &plan.action {
        Action::Create { name, format, size, backing, .. } => {
            let wanted = Wanted { name: name.clone(), format: *format, size: *size };
            let draft = here.pool.allocate(&wanted)?;
            finish(here, &draft, |draft| {
                host::fault::point("volume.allocated")?;
                write_image(draft, plan, effort)?;
                backing.as_ref().map_or(Ok(()), |below| seal::seal(below.place.path()).map(drop))?;
                Ok(())
            })
        }
        Action::Clone { from, name, .. } => {
            let draft = here.pool.share(from, name)?;
            finish(here, &draft, |_| host::fault::point("volume.allocated").map_err(PoolError::from))
        }
        Action::Fill { from, name, format, transfer } => {
            let size = virtual_size(from)?;
            let length = if *transfer == Transfer::Copy { length(&from.path)? } else { size };
            let draft = here.pool.allocate(&Wanted { name: name.clone(), format: *format, size })?;
            finish(here, &draft, |draft| {
                host::fault::point("volume.allocated")?;
                match transfer {
                    Transfer::Copy => copy(&from.path, &draft.place, draft.zeroed, length, effort),
                    Transfer::Convert => convert(from, draft, size, effort),
                }
            })
        }
        Action::Export { from, to, format, transfer } => {
            export(from, to, *format, *transfer, effort).map(|()| None)
        }
        Action::Resize { volume, size } => resize(here, volume, *size).map(Some),
        Action::Wipe { volume, method } => {
            wipe(volume, *method, effort)?;
            here.volume(&volume.name).map(Some)
        }
        Action::Delete { volume, unseal } => {
            here.pool.remove(volume)?;
            if let Some(base) = unseal {
                seal::unseal(base, MODE)?;
            }
            Ok(None)
        }
    }
}

/// Fills the draft and gives it its name; removes it if either fails.
fn finish(
    here: Here<'_>,
    draft: &Draft,
    fill: impl FnOnce(&Draft) -> Result<(), PoolError>,
) -> Result<Option<Volume>, PoolError> {
    let made = fill(draft).and_then(|()| {
        host::fault::point("volume.filled")?;
        here.pool.publish(draft)
    });
    if let Err(fault) = made {
        if let Err(left) = here.pool.discard(draft) {
            tracing::warn!("a draft of {} is left, and removed by the next command: {left}", draft.name);
        }
        return Err(fault);
    }
    host::fault::point("volume.published")?;
    here.volume(&draft.name).map(Some)
}

/// Writes a new, empty image into a draft.
fn write_image(draft: &Draft, plan: &VolumePlan, effort: &Effort) -> Result<(), PoolError> {
    let Action::Create { format, size, preallocation, backing, key, .. } = &plan.action else {
        return Ok(());
    };
    let path = draft.place.path();
    if *format == VolumeFormat::Raw {
        return preallocate_raw(draft, *size, *preallocation, effort);
    }
    let mut options = Vec::new();
    match format {
        VolumeFormat::Qcow2 => options.push("compat=1.1".to_owned()),
        _ => options.push("subformat=monolithicSparse".to_owned()),
    }
    let mut program = Program::new("qemu-img").watched(&effort.tie, &effort.watch);
    program = program.args(["create", "-q", "-f", format.driver()]);
    if let Some(key) = key {
        // A comma in a value is written twice (QEMU's option syntax).
        let file = key.display().to_string().replace(',', ",,");
        program = program.args(["--object", &format!("secret,id={KEY},file={file}")]);
        options.push(format!("encrypt.format=luks,encrypt.key-secret={KEY}"));
    }
    let word = match preallocation {
        Preallocation::Off => "off",
        Preallocation::Metadata => "metadata",
        Preallocation::Falloc => "falloc",
        Preallocation::Full => "full",
    };
    if *preallocation != Preallocation::Off {
        options.push(format!("preallocation={word}"));
    }
    program = program.args(["-o", &options.join(",")]);
    if let Some((below, driver)) = backing.as_ref().map(|below| (below, below.format.driver())) {
        // It is named as the finished volume will find it: by file name where both lie in one directory.
        let name = backing_name(below.place.path(), &final_path(draft));
        program = program.arg("-b").arg(name).args(["-F", driver]);
    }
    // What stands below was looked at, and lies elsewhere as seen from a draft in a directory of its own.
    create_image(&program.arg("-u").arg(path).arg(size.0.to_string()))?;
    verify(path, *format, *size)
}

/// Runs qemu-img, which times the derivation of a key and gives up where the kernel's clock shows no time for it: a
/// matter of chance on a fast machine (`qcrypto_pbkdf2_count_iters` in QEMU's
/// crypto/pbkdf.c).
fn create_image(program: &Program) -> Result<(), ProgramError> {
    let by_chance = |fault: &ProgramError| fault.to_string().contains("accurate CPU usage");
    for _ in 1..KEY_TIMINGS {
        match program.clone().run() {
            Err(fault) if by_chance(&fault) => tracing::debug!("once more: {fault}"),
            done => return done.map(drop),
        }
    }
    program.clone().run().map(drop)
}

/// Where a draft in a file will be. A draft is in the same directory, or in one beside it.
fn final_path(draft: &Draft) -> PathBuf {
    let path = draft.place.path();
    let file = format!("{}.{}", draft.name, draft.format);
    if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
        return parent(path).join(file);
    }
    parent(parent(path)).join(draft.name.as_str()).join(file)
}

fn preallocate_raw(
    draft: &Draft,
    size: ByteSize,
    preallocation: Preallocation,
    effort: &Effort,
) -> Result<(), PoolError> {
    let path = draft.place.path();
    let file = File::options().write(true).open(path).map_err(HostError::io("open", path))?;
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc if !draft.place.is_device() => {
            fallocate(&file, FallocateFlags::empty(), 0, size.0)
                .map_err(|errno| HostError::io("reserve room for", path)(errno.into()))?;
            Ok(())
        }
        Preallocation::Falloc | Preallocation::Full => {
            effort.watch.begin(size.0);
            overwrite(&file, path, 0, size.0, effort)?;
            file.sync_all().map_err(HostError::io("sync", path))?;
            Ok(())
        }
    }
}

/// Writes zeroes, really.
fn overwrite(file: &File, path: &Path, offset: u64, length: u64, effort: &Effort) -> Result<(), PoolError> {
    const PIECE: u64 = 1 << 20;
    let zeroes = vec![0; usize::try_from(PIECE).unwrap_or(0)];
    let pace = Pace::new(effort.bandwidth.map(|size| size.0));
    let mut done = 0;
    while done < length {
        pace.keep(done, &effort.watch)?;
        let piece = usize::try_from(PIECE.min(length - done)).unwrap_or(0);
        std::os::unix::fs::FileExt::write_all_at(file, &zeroes[..piece], offset + done)
            .map_err(HostError::io("write", path))?;
        done += piece as u64;
        effort.watch.add(piece as u64);
    }
    Ok(())
}

fn copy(
    from: &Path,
    place: &Place,
    zeroed: bool,
    length: ByteSize,
    effort: &Effort,
) -> Result<(), PoolError> {
    let to = place.path();
    // On one file system that can share extents nothing needs to be copied at all.
    if !place.is_device() && reflink::clone_onto(from, to).is_ok() {
        return Ok(());
    }
    if let Place::File(path) = place {
        let file = File::options().write(true).open(path).map_err(HostError::io("open", path))?;
        file.set_len(length.0).map_err(HostError::io("set the size of", path))?;
    }
    let job = Job { from, to, length: length.0, zeroed };
    copier::copy(job, &Pace::new(effort.bandwidth.map(|size| size.0)), &effort.watch)
}

fn convert(from: &Source, draft: &Draft, size: ByteSize, effort: &Effort) -> Result<(), PoolError> {
    let to = draft.place.path();
    let mut arguments: Vec<String> = Vec::new();
    if draft.place.is_device() || draft.format == VolumeFormat::Raw {
        arguments.push("-n".into());
    }
    if draft.zeroed && draft.format == VolumeFormat::Raw {
        arguments.push("--target-is-zero".into());
    }
    qemu_img_convert(from, to, draft.format, size, &arguments, effort)?;
    match draft.format {
        // A device may be larger than what was asked for.
        VolumeFormat::Raw => Ok(()),
        format => verify(to, format, size),
    }
}

fn qemu_img_convert(
    from: &Source,
    to: &Path,
    format: VolumeFormat,
    size: ByteSize,
    arguments: &[String],
    effort: &Effort,
) -> Result<(), PoolError> {
    effort.watch.begin(size.0);
    let mut program = Program::new("qemu-img").watched(&effort.tie, &effort.watch);
    program = program.args(["convert", "-p", "-W", "-m", "8", "-O", format.driver()]).args(arguments);
    if let Some(limit) = effort.bandwidth {
        program = program.args(["-r", &limit.0.to_string()]);
    }
    program = program.listen(percent_listener(&effort.watch, size.0));
    program.arg(from.qemu()).arg(to).run()?;
    Ok(())
}

fn export(
    from: &Source,
    to: &Path,
    format: VolumeFormat,
    transfer: Transfer,
    effort: &Effort,
) -> Result<(), PoolError> {
    let part = partial(to);
    files::remove_durably(&part)?;
    let owner = Ownership { mode: MODE, ..Ownership::of(parent(to))? };
    let own = Ownership {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        ..owner
    };
    prepare_as(&part, parent(to), own)
        .map_err(|fault| HostError::io("make", &part)(std::io::Error::other(fault.to_string())))?;
    let place = Place::File(part.clone());
    let size = virtual_size(from)?;
    let written = match transfer {
        Transfer::Copy => {
            length(&from.path).and_then(|length| copy(&from.path, &place, true, length, effort))
        }
        Transfer::Convert => qemu_img_convert(from, &part, format, size, &[], effort),
    };
    let finished = written.and_then(|()| Ok(crate::publish::finish(to, MODE)?));
    if finished.is_err() {
        // The first error says more.
        let _ = files::remove_durably(&part);
    }
    finished
}

fn resize(here: Here<'_>, volume: &Volume, size: ByteSize) -> Result<Volume, PoolError> {
    let path = volume.place.path();
    match volume.format {
        VolumeFormat::Raw => here.pool.resize(volume, size)?,
        format => {
            let mut program = Program::new("qemu-img").args(["resize", "-q", "-f", format.driver()]);
            if size < volume.virtual_size {
                program = program.arg("--shrink");
            }
            program.arg(path).arg(size.0.to_string()).run()?;
            files::sync_file(path)?;
        }
    }
    let now = here.volume(&volume.name)?;
    if now.virtual_size < size {
        let what = format!("it has {}, and {size} were asked for", now.virtual_size);
        return Err(PoolError::Differs { path: path.to_owned(), what });
    }
    Ok(now)
}

fn wipe(volume: &Volume, method: WipeMethod, effort: &Effort) -> Result<(), PoolError> {
    let path = volume.place.path();
    let file = File::options().read(true).write(true).open(path).map_err(HostError::io("open", path))?;
    let length = length(path)?.0;
    effort.watch.begin(length);
    if method == WipeMethod::Zero {
        for_each_data(path, &file, length, &effort.watch, |offset, length| {
            overwrite(&file, path, offset, length, effort)
        })?;
        file.sync_all().map_err(HostError::io("sync", path))?;
    }
    // Then the blocks are given back: a sparse volume stays one.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let given_back = length == 0 || fallocate(&file, punch, 0, length).is_ok();
    if !given_back && method == WipeMethod::Discard {
        write_zeroes(&file, path, 0, length)?;
    }
    file.sync_all().map_err(HostError::io("sync", path))?;
    if volume.format != VolumeFormat::Raw {
        // What holds tables begins anew.
        let program = Program::new("qemu-img").watched(&effort.tie, &effort.watch);
        let program = program.args(["create", "-q", "-f", volume.format.driver()]);
        program.arg(path).arg(volume.virtual_size.0.to_string()).run()?;
        files::sync_file(path)?;
    }
    Ok(())
}

/// Bytes of a file or a device.
fn length(path: &Path) -> Result<ByteSize, PoolError> {
    Ok(ByteSize(crate::file::open(path)?.size(path)?))
}

#[derive(Deserialize)]
struct Info {
    #[serde(rename = "virtual-size")]
    virtual_size: u64,
    #[serde(rename = "backing-filename")]
    backing: Option<String>,
}

/// The size that a guest sees; for formats that are not read here QEMU is asked.
fn virtual_size(from: &Source) -> Result<ByteSize, PoolError> {
    if let Some(size) = from.size {
        return Ok(size);
    }
    let info = Program::new("qemu-img").args(["info", "--output=json"]).arg(from.qemu()).run()?;
    let info: Info = serde_json::from_slice(&info.stdout)
        .map_err(|fault| PoolError::Unreadable { program: "qemu-img", fault: fault.to_string() })?;
    match info.backing {
        None => Ok(ByteSize(info.virtual_size)),
        Some(name) => {
            let (path, backing) = (from.path.clone(), name.chars().filter(|c| !c.is_control()).collect());
            Err(chain::ChainError::NotAFile { path, backing }.into())
        }
    }
}

/// Reads back what was written.
fn verify(path: &Path, format: VolumeFormat, size: ByteSize) -> Result<(), PoolError> {
    let metadata = std::fs::metadata(path).map_err(HostError::io("look at", path))?;
    let found = match format {
        VolumeFormat::Qcow2 => crate::qcow2::Header::open(path)?.virtual_size,
        VolumeFormat::Vmdk => crate::vmdk::read(path)?.capacity,
        _ => ByteSize(metadata.size()),
    };
    if found.0 >= size.0 {
        return Ok(());
    }
    Err(PoolError::Differs { path: path.to_owned(), what: format!("it has {found} in place of {size}") })
}
