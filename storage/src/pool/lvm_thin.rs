//! `lvm-thin`: a thin pool of LVM, in which a volume takes room as it is written to, and clones share it.
//!
//! A thin pool that runs full stops every VM in it, and one whose metadata runs full may not be repaired. So it
//! refuses new volumes and snapshots from a threshold on, long before LVM would fail.

use std::path::Path;

use model::{ByteSize, Name};
use serde::{Deserialize, Serialize};
use toml::Table;

use super::lvm_tools::{self, AS_DRAFT, Lv, bytes, lvs, percent, program};
use super::{
    Capabilities, Changed, Draft, Kind, Pool, PoolError, Request, ThinUsage, Usage, Volume, VolumeFormat,
    Wanted, wrong_place,
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
    pool: Name,
    options: Options,
}

fn define(request: &Request<'_>) -> Result<Table, PoolError> {
    let options: Options = super::options(request.pool, request.options.clone())?;
    let vg = lvm_tools::expect_vg(request.pool, &options.vg, "")?;
    let pool = LvmThin { pool: request.pool.clone(), options: Options { uuid: vg.vg_uuid, ..options } };
    pool.thin_pool(&lvs(&pool.options.vg)?)?;
    super::table(request.pool, &pool.options)
}

fn open(pool: &Name, options: Table) -> Result<Box<dyn Pool>, PoolError> {
    let options: Options = super::options(pool, options)?;
    for limit in [options.data_limit, options.metadata_limit] {
        if !(1.0..=100.0).contains(&limit) {
            return Err(super::bad(pool, format!("{limit} is no percentage of a threshold; write 1 to 100")));
        }
    }
    Ok(Box::new(LvmThin { pool: pool.clone(), options }))
}

impl LvmThin {
    fn vg(&self) -> &str {
        &self.options.vg
    }

    /// Every logical volume, of the group that the pool was defined on.
    fn all(&self) -> Result<Vec<Lv>, PoolError> {
        lvm_tools::expect_vg(&self.pool, self.vg(), &self.options.uuid)?;
        lvs(self.vg())
    }

    fn thin_pool<'a>(&self, all: &'a [Lv]) -> Result<&'a Lv, PoolError> {
        let name = &self.options.thin_pool;
        let found = all.iter().find(|lv| lv.lv_name == *name);
        let is_pool = |lv: &&Lv| !lv.lv_metadata_size.is_empty() && lv.pool_lv.is_empty();
        found.filter(is_pool).ok_or_else(|| {
            let what = if found.is_some() { "is no thin pool" } else { "is not there" };
            wrong_place(&self.pool, format!("logical volume {}/{name} {what}", self.vg()))
        })
    }

    fn mine(&self, all: Vec<Lv>) -> Vec<Lv> {
        all.into_iter().filter(|lv| lv.pool_lv == self.options.thin_pool).collect()
    }

    /// Refuses what would bring a pool to its end that is near it.
    fn require_room(&self, all: &[Lv]) -> Result<(), PoolError> {
        let usage = self.usage_of(self.thin_pool(all)?);
        let sides = [
            ("data", usage.data_percent, usage.data_limit),
            ("metadata", usage.metadata_percent, usage.metadata_limit),
        ];
        match sides.into_iter().find(|(_, used, limit)| used >= limit) {
            Some((what, used, limit)) => {
                Err(PoolError::OverThreshold { pool: self.pool.clone(), what, used, limit })
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
        let all = self.all()?;
        lvm_tools::check_name(&self.pool, name, &all)?;
        self.require_room(&all)?;
        let lvcreate = program("lvcreate").args(["-q", "-y", "-n", name.as_str()]).args(AS_DRAFT);
        lvcreate.args(arguments).run()?;
        Ok(lvm_tools::draft_of(name.clone(), &format!("/dev/{}/{name}", self.vg()), zeroed))
    }
}

impl Pool for LvmThin {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn location(&self) -> String {
        format!("thin pool {}/{}", self.vg(), self.options.thin_pool)
    }

    fn root(&self) -> Option<&Path> {
        None
    }

    fn capabilities(&self) -> Result<Capabilities, PoolError> {
        Ok(Capabilities {
            thin: true,
            snapshot: true,
            clone: true,
            resize: true,
            reflink: false,
            formats: vec![VolumeFormat::Raw],
            remote: false,
        })
    }

    fn ready(&self) -> Result<(), PoolError> {
        let all = self.all()?;
        let not_started = |why: String| Err(PoolError::NotStarted { pool: self.pool.clone(), why });
        let pool = self.thin_pool(&all)?;
        if !pool.is_active() {
            return not_started(format!("thin pool {} is not active", pool.full(self.vg())));
        }
        match self.mine(all).into_iter().find(|lv| lv.has(lvm_tools::OURS) && !lv.is_active()) {
            Some(lv) => not_started(format!("logical volume {} is not active", lv.full(self.vg()))),
            None => Ok(()),
        }
    }

    fn start(&self) -> Result<Changed, PoolError> {
        let all = self.all()?;
        let pool = self.thin_pool(&all)?;
        let mut changed = false;
        if !pool.is_active() {
            program("lvchange").args(["-q", "-y", "-ay", &pool.full(self.vg())]).run()?;
            changed = true;
        }
        changed |= lvm_tools::activate(self.vg(), &self.mine(all))?;
        Ok(if changed { Changed::Changed } else { Changed::AlreadySo })
    }

    fn stop(&self) -> Result<Changed, PoolError> {
        let all = self.all()?;
        let pool = self.thin_pool(&all)?.full(self.vg());
        let was_active = self.thin_pool(&all)?.is_active();
        let mine = self.mine(all);
        let mut changed = lvm_tools::deactivate(&self.pool, self.vg(), &mine)?;
        // Others' volumes in it keep it.
        if was_active && !mine.iter().any(|lv| lv.is_active() && !lv.has(lvm_tools::OURS)) {
            program("lvchange").args(["-q", "-y", "-an", &pool]).run()?;
            changed = true;
        }
        Ok(if changed { Changed::Changed } else { Changed::AlreadySo })
    }

    fn usage(&self) -> Result<Usage, PoolError> {
        let all = self.all()?;
        let pool = self.thin_pool(&all)?;
        let thin = self.usage_of(pool);
        let capacity = bytes(&pool.lv_size);
        let allocated = ByteSize((capacity.0 as f64 * thin.data_percent / 100.0) as u64);
        let available = ByteSize(capacity.0.saturating_sub(allocated.0));
        Ok(Usage { capacity, allocated, available, thin: Some(thin) })
    }

    fn volumes(&self) -> Result<Vec<Volume>, PoolError> {
        self.ready()?;
        Ok(self.mine(self.all()?).iter().filter_map(Lv::volume).collect())
    }

    fn allocate(&self, wanted: &Wanted) -> Result<Draft, PoolError> {
        self.ready()?;
        lvm_tools::check_format(&self.pool, wanted.format)?;
        let size = format!("{}b", wanted.size.0.max(1));
        self.make(&wanted.name, &["-V", &size, "--thinpool", &self.options.thin_pool, self.vg()], true)
    }

    fn share(&self, from: &Volume, name: &Name) -> Result<Draft, PoolError> {
        self.ready()?;
        let origin = format!("{}/{}", self.vg(), from.name);
        self.make(name, &["-s", "-k", "n", "-a", "y", &origin], false)
    }

    fn publish(&self, draft: &Draft) -> Result<(), PoolError> {
        lvm_tools::publish(self.vg(), draft)
    }

    fn discard(&self, draft: &Draft) -> Result<(), PoolError> {
        lvm_tools::discard(self.vg(), draft)
    }

    fn drafts(&self) -> Result<Vec<Draft>, PoolError> {
        Ok(self.mine(self.all()?).iter().filter_map(Lv::draft).collect())
    }

    fn resize(&self, volume: &Volume, size: ByteSize) -> Result<(), PoolError> {
        if size > volume.virtual_size {
            self.require_room(&self.all()?)?;
        }
        lvm_tools::resize(self.vg(), volume, size)
    }

    fn remove(&self, volume: &Volume) -> Result<(), PoolError> {
        lvm_tools::remove(self.vg(), volume)
    }

    fn forget(&self) -> Result<(), PoolError> {
        Ok(())
    }
}
