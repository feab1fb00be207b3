//! `lvm`: a volume group, each volume a logical volume that has all of its room from the start.

use std::path::Path;

use model::{ByteSize, Name};
use serde::{Deserialize, Serialize};
use toml::Table;

use super::lvm_tools::{self, AS_DRAFT, Group, Lv, Vg, program};
use super::{Capabilities, Changed, Draft, Kind, Opened, Pool, PoolError, Request, Usage, Volume, Wanted};

pub(super) const KIND: Kind = Kind {
    name: "lvm",
    about: "a volume group of LVM, each volume a logical volume",
    options: &["vg"],
    programs: lvm_tools::PROGRAMS,
    define,
    open,
};

/// A volume group that is known again by its UUID.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Options {
    vg: String,
    #[serde(default)]
    uuid: String,
}

#[derive(Debug)]
struct Lvm {
    group: Group,
}

fn define(request: &Request<'_>) -> Result<Table, PoolError> {
    let options: Options = super::options(&KIND, request.pool, request.options.clone())?;
    let uuid = Group::new(request.pool, &options.vg, "").look()?.uuid.clone();
    super::table(request.pool, &Options { uuid, ..options })
}

fn open(pool: &Name, options: Table) -> Opened {
    let Options { vg, uuid } = super::options(&KIND, pool, options)?;
    Ok(Box::new(Lvm { group: Group::new(pool, &vg, &uuid) }))
}

impl Lvm {
    fn require(&self, needed: ByteSize) -> Result<(), PoolError> {
        let available = self.group.look()?.free;
        if needed <= available {
            return Ok(());
        }
        Err(PoolError::Full { pool: self.group.pool.clone(), needed, available })
    }
}

/// Those that are no part of a thin pool, and none themselves.
fn thick(vg: &Vg) -> Vec<&Lv> {
    let is_thick = |lv: &&Lv| lv.pool_lv.is_empty() && lv.lv_metadata_size.is_empty();
    vg.lvs.iter().filter(is_thick).collect()
}

impl Pool for Lvm {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn location(&self) -> String {
        self.group.name.clone()
    }

    fn root(&self) -> Option<&Path> {
        None
    }

    fn capabilities(&self) -> Result<Capabilities, PoolError> {
        Ok(Capabilities::of_devices(false))
    }

    fn ready(&self) -> Result<(), PoolError> {
        let vg = self.group.look()?;
        match thick(&vg).into_iter().find(|lv| lv.has(lvm_tools::OURS) && !lv.is_active()) {
            None => Ok(()),
            Some(lv) => {
                let why = format!("logical volume {} is not active", self.group.full(&lv.lv_name));
                Err(PoolError::NotStarted { pool: self.group.pool.clone(), why })
            }
        }
    }

    fn start(&self) -> Result<Changed, PoolError> {
        let changed = self.group.activate(&thick(&*self.group.look()?))?;
        Ok(if changed { Changed::Changed } else { Changed::AlreadySo })
    }

    fn stop(&self) -> Result<Changed, PoolError> {
        let changed = self.group.deactivate(&thick(&*self.group.look()?))?;
        Ok(if changed { Changed::Changed } else { Changed::AlreadySo })
    }

    fn usage(&self) -> Result<Usage, PoolError> {
        let vg = self.group.look()?;
        let allocated = ByteSize(vg.size.0.saturating_sub(vg.free.0));
        Ok(Usage { capacity: vg.size, allocated, available: vg.free, thin: None })
    }

    fn volumes(&self) -> Result<Vec<Volume>, PoolError> {
        self.ready()?;
        Ok(thick(&*self.group.look()?).into_iter().filter_map(Lv::volume).collect())
    }

    fn allocate(&self, wanted: &Wanted) -> Result<Draft, PoolError> {
        self.ready()?;
        lvm_tools::check_format(&self.group.pool, wanted.format)?;
        self.group.check_name(&wanted.name)?;
        self.require(wanted.size)?;
        let size = format!("{}b", wanted.size.0.max(1));
        let name = wanted.name.as_str();
        // Signatures of what was there before would be taken for the new volume's own.
        let lvcreate = program("lvcreate").args(["-q", "-y", "-W", "y", "-Z", "y", "-L", &size, "-n", name]);
        self.group.change(lvcreate.args(AS_DRAFT).arg(&self.group.name))?;
        Ok(lvm_tools::draft_of(wanted.name.clone(), &self.group.name, false))
    }

    fn share(&self, from: &Volume, _name: &Name) -> Result<Draft, PoolError> {
        let what = format!("share the data of {}", from.name);
        Err(PoolError::Unsupported { pool: self.group.pool.clone(), kind: KIND.name, what })
    }

    fn publish(&self, draft: &Draft) -> Result<(), PoolError> {
        self.group.publish(draft)
    }

    fn discard(&self, draft: &Draft) -> Result<(), PoolError> {
        self.group.discard(draft)
    }

    fn drafts(&self) -> Result<Vec<Draft>, PoolError> {
        let vg = self.group.look()?;
        Ok(thick(&vg).into_iter().filter_map(|lv| lv.draft(&self.group.name)).collect())
    }

    fn resize(&self, volume: &Volume, size: ByteSize) -> Result<(), PoolError> {
        self.require(ByteSize(size.0.saturating_sub(volume.virtual_size.0)))?;
        self.group.resize(volume, size)
    }

    fn remove(&self, volume: &Volume) -> Result<(), PoolError> {
        self.group.remove(volume)
    }

    fn forget(&self) -> Result<(), PoolError> {
        // The tags say who made the volumes, which stays true.
        Ok(())
    }
}
