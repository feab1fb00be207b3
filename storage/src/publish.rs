//! Files that are there whole or not at all: written under another name, durable, and then given their own.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::files;

use crate::overlay::{OverlayError, Ownership, prepare_as};

/// The mode of a file that is being written.
const UNFINISHED: u32 = 0o600;

/// The name under which a file is written that is to be called `path`.
pub fn partial(path: &Path) -> PathBuf {
    files::append(path, ".part")
}

/// Lets `to` be what `write` writes, with the owner of `like`. What an attempt left that was broken off is replaced.
///
/// # Errors
/// [`OverlayError`]; a file that was there stays then.
pub fn replace(
    to: &Path,
    like: &Path,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), OverlayError> {
    let part = partial(to);
    files::remove_durably(&part)?;
    prepare_as(&part, like, Ownership { mode: UNFINISHED, ..Ownership::of(like)? })?;
    let opened = File::options().write(true).open(&part);
    let written = opened.and_then(|mut file| write(&mut file)).map_err(HostError::io("write", &part));
    let finished = written.and_then(|()| finish(to, mode));
    if finished.is_err() {
        // The first error says more.
        let _ = files::remove_durably(&part);
    }
    Ok(finished?)
}

/// Gives the file at [`partial`] its mode and its name, once it is durable.
///
/// # Errors
/// [`HostError`].
pub fn finish(to: &Path, mode: u32) -> Result<(), HostError> {
    let part = partial(to);
    fs::set_permissions(&part, Permissions::from_mode(mode))
        .map_err(HostError::io("set the mode of", &part))?;
    files::sync_file(&part)?;
    files::rename_durably(&part, to)
}
