//! `btrfs`: a subvolume of a btrfs, in which each volume is a subvolume of its own.
//!
//! So each can have a quota and be sent by itself, while all of them share extents.

use std::path::PathBuf;

use host::files::parent;
use model::Name;
use serde::{Deserialize, Serialize};
use toml::Table;

use super::files::{FilePool, Files, Layout, btrfs};
use super::mark::{self, Marked};
use super::{Kind, Opened, PoolError, Request, wrong_place};
use crate::filesystem;

pub(super) const KIND: Kind = Kind {
    name: "btrfs",
    about: "a subvolume of a btrfs, each volume a subvolume in it",
    options: &["path"],
    programs: &["qemu-img", "btrfs"],
    define,
    open,
};

/// A directory on a btrfs that is known again by its mark.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Btrfs {
    path: PathBuf,
    #[serde(default)]
    id: String,
}

fn define(request: &Request<'_>) -> Result<Table, PoolError> {
    let place: Btrfs = super::options(&KIND, request.pool, request.options.clone())?;
    super::require_absolute(request.pool, &place.path)?;
    let there = place.path.is_dir();
    let asked = if there { place.path.as_path() } else { parent(&place.path) };
    if !asked.is_dir() {
        return Err(wrong_place(request.pool, format!("{} is not there", asked.display())));
    }
    let found = filesystem::of(asked)?.name;
    if found != "btrfs" {
        return Err(wrong_place(request.pool, format!("{} is on {found}, not on btrfs", asked.display())));
    }
    if !there {
        btrfs("create", &place.path)?;
    }
    let id = mark::adopt(&place.path)?;
    super::table(request.pool, &Btrfs { id, ..place })
}

fn open(pool: &Name, options: Table) -> Opened {
    let Btrfs { path, id } = super::options(&KIND, pool, options)?;
    let files = Files { pool: pool.clone(), root: path, layout: Layout::Subvolumes };
    Ok(Box::new(FilePool::new(files, Marked { kind: KIND.name, id })?))
}
