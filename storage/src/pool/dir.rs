//! `dir`: a directory that is there, on whatever file system.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::files::{parent, sync_dir};
use model::Name;
use serde::{Deserialize, Serialize};
use toml::Table;

use super::files::{FilePool, Files, Layout};
use super::mark::{self, Marked};
use super::{Kind, Opened, PoolError, Request, wrong_place};

/// Others may pass through to a volume that is theirs, and not look around.
const DIR_MODE: u32 = 0o711;

pub(super) const KIND: Kind = Kind {
    name: "dir",
    about: "a directory, on whatever file system",
    options: &["path"],
    programs: &["qemu-img"],
    define,
    open,
};

/// A directory that is known again by its mark.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Dir {
    path: PathBuf,
    #[serde(default)]
    id: String,
}

fn define(request: &Request<'_>) -> Result<Table, PoolError> {
    let dir: Dir = super::options(&KIND, request.pool, request.options.clone())?;
    make_dir(request.pool, &dir.path)?;
    let id = mark::adopt(&dir.path)?;
    super::table(request.pool, &Dir { id, ..dir })
}

fn open(pool: &Name, options: Table) -> Opened {
    let Dir { path, id } = super::options(&KIND, pool, options)?;
    let files = Files { pool: pool.clone(), root: path, layout: Layout::Flat };
    Ok(Box::new(FilePool::new(files, Marked { kind: KIND.name, id })?))
}

/// Makes `path`, but not its parents: where these are missing, so is what should be mounted there.
pub(super) fn make_dir(pool: &Name, path: &Path) -> Result<(), PoolError> {
    super::require_absolute(pool, path)?;
    if path.is_dir() {
        return Ok(());
    }
    if !parent(path).is_dir() {
        let why = format!("neither {} nor the directory above it is there", path.display());
        return Err(wrong_place(pool, why));
    }
    fs::DirBuilder::new().mode(DIR_MODE).create(path).map_err(HostError::io("make the directory", path))?;
    Ok(sync_dir(parent(path))?)
}
