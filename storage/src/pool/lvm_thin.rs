//! `lvm-thin`: a thin pool of LVM, in which a volume takes room as it is written to, and clones share it.
//!
//! A thin pool that runs full stops every VM in it, and one whose metadata runs full may not be repaired. So it
//! refuses new volumes and snapshots from a threshold on, long before LVM would fail.

use std::path::Path;

use model::{ByteSize, Name};
use serde::{Deserialize, Serialize};
use toml::Table;

use super::lvm_tools::{self, AS_DRAFT, Group, Lv, Vg, bytes, percent, program};
use super::{
    Capabilities, Changed, Draft, Kind, Opened, Pool, PoolError, Request, ThinUsage, Usage, Volume, Wanted,
    wrong_place,
};

pub(super) const KIND: Kind = Kind {
    name: "lvm-thin",
    about: "a thin pool of LVM, each volume a thin logical volume",
    options: &["vg", "thin-pool", "data-limit", "metadata-limit"],
    programs: &[
        "vgs",
        "lvs",
        "lvcreate",
        "lvremove",
        "lvchange",
        "lvextend",
        "lvreduce",
        "dmsetup",
        "thin_delta",
        "thin_check",
    ],
    define,
    open,
};

/// Full to this percentage, it takes no more volumes and snapshots. Metadata that runs out is worse than data.
const DATA_LIMIT: f64 = 90.0;
const METADATA_LIMIT: f64 = 80.0;

/// A thin pool in a volume group that is known again by its UUID.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Options {
    vg: String,
    thin_pool: String,
    #[serde(default)]
    uuid: String,
    /// In percent.
    #[serde(default = "data_limit")]
    data_limit: f64,
    /// In percent.
    #[serde(default = "metadata_limit")]
    metadata_limit: f64,
}

const fn data_limit() -> f64 {
    DATA_LIMIT
}

const fn metadata_limit() -> f64 {
    METADATA_LIMIT
}

#[derive(Debug)]
struct LvmThin {
    group: Group,
    options: Options,
}

fn define(request: &Request<'_>) -> Result<Table, PoolError> {
    let options: Options = super::options(&KIND, request.pool, request.options.clone())?;
    let group = Group::new(request.pool, &options.vg, "");
    let vg = group.look()?;
    let pool = LvmThin { group, options: Options { uuid: vg.uuid.clone(), ..options } };
    pool.thin_pool(&vg)?;
    super::table(request.pool, &pool.options)
}

fn open(pool: &Name, options: Table) -> Opened {
    let options: Options = super::options(&KIND, pool, options)?;
    for limit in [options.data_limit, options.metadata_limit] {
        if !(1.0..=100.0).contains(&limit) {
            return Err(super::bad(pool, format!("{limit} is no percentage of a threshold; write 1 to 100")));
        }
    }
    let group = Group::new(pool, &options.vg, &options.uuid);
    Ok(Box::new(LvmThin { group, options }))
}

impl LvmThin {
    fn thin_pool<'a>(&self, vg: &'a Vg) -> Result<&'a Lv, PoolError> {
        let name = &self.options.thin_pool;
        let found = vg.lvs.iter().find(|lv| lv.lv_name == *name);
        let is_pool = |lv: &&Lv| !lv.lv_metadata_size.is_empty() && lv.pool_lv.is_empty();
        found.filter(is_pool).ok_or_else(|| {
            let what = if found.is_some() { "is no thin pool" } else { "is not there" };
            wrong_place(&self.group.pool, format!("logical volume {} {what}", self.group.full(name)))
        })
    }

    fn mine<'a>(&self, vg: &'a Vg) -> Vec<&'a Lv> {
        vg.lvs.iter().filter(|lv| lv.pool_lv == self.options.thin_pool).collect()
    }

    /// Refuses what would bring a pool to its end that is near it.
    fn require_thresholds(&self) -> Result<(), PoolError> {
        let usage = self.usage_of(self.thin_pool(&*self.group.look()?)?);
        let sides = [
            ("data", usage.data_percent, usage.data_limit),
            ("metadata", usage.metadata_percent, usage.metadata_limit),
        ];
        match sides.into_iter().find(|(_, used, limit)| used >= limit) {
            Some((what, used, limit)) => {
                Err(PoolError::OverThreshold { pool: self.group.pool.clone(), what, used, limit })
            }
            None => Ok(()),
        }
    }

    fn usage_of(&self, pool: &Lv) -> ThinUsage {
        ThinUsage {
            data_percent: percent(&pool.data_percent),
            metadata_percent: percent(&pool.metadata_percent),
            metadata_size: bytes(&pool.lv_metadata_size),
            data_limit: self.options.data_limit,
            metadata_limit: self.options.metadata_limit,
        }
    }

    fn make(&self, name: &Name, arguments: &[&str], zeroed: bool) -> Result<Draft, PoolError> {
        self.ready()?;
        self.group.check_name(name)?;
        self.require_thresholds()?;
        let lvcreate = program("lvcreate").args(["-q", "-y", "-n", name.as_str()]).args(AS_DRAFT);
        self.group.change(lvcreate.args(arguments))?;
        Ok(lvm_tools::draft_of(name.clone(), &self.group.name, zeroed))
    }
}

impl Pool for LvmThin {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn location(&self) -> String {
        self.group.full(&self.options.thin_pool)
    }

    fn root(&self) -> Option<&Path> {
        None
    }

    fn capabilities(&self) -> Result<Capabilities, PoolError> {
        Ok(Capabilities::of_devices(true))
    }

    fn ready(&self) -> Result<(), PoolError> {
        let vg = self.group.look()?;
        let not_started = |why: String| Err(PoolError::NotStarted { pool: self.group.pool.clone(), why });
        let pool = self.thin_pool(&vg)?;
        if !pool.is_active() {
            return not_started(format!("thin pool {} is not active", self.location()));
        }
        match self.mine(&vg).into_iter().find(|lv| lv.has(lvm_tools::OURS) && !lv.is_active()) {
            Some(lv) => not_started(format!("logical volume {} is not active", self.group.full(&lv.lv_name))),
            None => Ok(()),
        }
    }

    fn start(&self) -> Result<Changed, PoolError> {
        let vg = self.group.look()?;
        let mut changed = false;
        if !self.thin_pool(&vg)?.is_active() {
            self.group.change(program("lvchange").args(["-q", "-y", "-ay", &self.location()]))?;
            changed = true;
        }
        changed |= self.group.activate(&self.mine(&vg))?;
        Ok(if changed { Changed::Changed } else { Changed::AlreadySo })
    }

    fn stop(&self) -> Result<Changed, PoolError> {
        let vg = self.group.look()?;
        let was_active = self.thin_pool(&vg)?.is_active();
        let mine = self.mine(&vg);
        let mut changed = self.group.deactivate(&mine)?;
        // Others' volumes in it keep it.
        if was_active && !mine.iter().any(|lv| lv.is_active() && !lv.has(lvm_tools::OURS)) {
            self.group.change(program("lvchange").args(["-q", "-y", "-an", &self.location()]))?;
            changed = true;
        }
        Ok(if changed { Changed::Changed } else { Changed::AlreadySo })
    }

    fn require_room(&self) -> Result<(), PoolError> {
        self.require_thresholds()
    }

    fn usage(&self) -> Result<Usage, PoolError> {
        let vg = self.group.look()?;
        let pool = self.thin_pool(&vg)?;
        let thin = self.usage_of(pool);
        let capacity = bytes(&pool.lv_size);
        let allocated = ByteSize((capacity.0 as f64 * thin.data_percent / 100.0) as u64);
        let available = ByteSize(capacity.0.saturating_sub(allocated.0));
        Ok(Usage { capacity, allocated, available, thin: Some(thin) })
    }

    fn volumes(&self) -> Result<Vec<Volume>, PoolError> {
        self.ready()?;
        Ok(self.mine(&*self.group.look()?).into_iter().filter_map(Lv::volume).collect())
    }

    fn allocate(&self, wanted: &Wanted) -> Result<Draft, PoolError> {
        lvm_tools::check_format(&self.group.pool, wanted.format)?;
        let size = format!("{}b", wanted.size.0.max(1));
        self.make(&wanted.name, &["-V", &size, "--thinpool", &self.options.thin_pool, &self.group.name], true)
    }

    fn share(&self, from: &Volume, name: &Name) -> Result<Draft, PoolError> {
        self.make(name, &["-s", "-k", "n", "-a", "y", &self.group.full(from.name.as_str())], false)
    }

    fn publish(&self, draft: &Draft) -> Result<(), PoolError> {
        self.group.publish(draft)
    }

    fn discard(&self, draft: &Draft) -> Result<(), PoolError> {
        self.group.discard(draft)
    }

    fn drafts(&self) -> Result<Vec<Draft>, PoolError> {
        let vg = self.group.look()?;
        Ok(self.mine(&vg).into_iter().filter_map(|lv| lv.draft(&self.group.name)).collect())
    }

    fn resize(&self, volume: &Volume, size: ByteSize) -> Result<(), PoolError> {
        if size > volume.virtual_size {
            self.require_thresholds()?;
        }
        self.group.resize(volume, size)
    }

    fn remove(&self, volume: &Volume) -> Result<(), PoolError> {
        self.group.remove(volume)
    }

    fn forget(&self) -> Result<(), PoolError> {
        Ok(())
    }
}
