//! `lvm`: a volume group, each volume a logical volume that has all of its room from the start.

use std::path::Path;

use model::{ByteSize, Name};
use serde::{Deserialize, Serialize};
use toml::Table;

use super::lvm_tools::{self, AS_DRAFT, bytes, lvs, program};
use super::{
    Capabilities, Changed, Draft, Kind, Pool, PoolError, Request, Usage, Volume, VolumeFormat, Wanted,
    wrong_place,
};

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
    pool: Name,
    options: Options,
}

fn define(request: &Request<'_>) -> Result<Table, PoolError> {
    let options: Options = super::options(request.pool, request.options.clone())?;
    let vg = lvm_tools::expect_vg(request.pool, &options.vg, "")?;
    super::table(request.pool, &Options { uuid: vg.vg_uuid, ..options })
}

fn open(pool: &Name, options: Table) -> Result<Box<dyn Pool>, PoolError> {
    Ok(Box::new(Lvm { pool: pool.clone(), options: super::options(pool, options)? }))
}

impl Lvm {
    fn group(&self) -> Result<lvm_tools::Vg, PoolError> {
        lvm_tools::expect_vg(&self.pool, &self.options.vg, &self.options.uuid)
    }

    fn vg(&self) -> &str {
        &self.options.vg
    }

    fn require(&self, needed: ByteSize) -> Result<(), PoolError> {
        let available = bytes(&self.group()?.vg_free);
        if needed <= available {
            return Ok(());
        }
        Err(PoolError::Full { pool: self.pool.clone(), needed, available })
    }
}

impl Pool for Lvm {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn location(&self) -> String {
        format!("volume group {}", self.vg())
    }

    fn root(&self) -> Option<&Path> {
        None
    }

    fn capabilities(&self) -> Result<Capabilities, PoolError> {
        Ok(Capabilities {
            thin: false,
            snapshot: false,
            clone: false,
            resize: true,
            reflink: false,
            formats: vec![VolumeFormat::Raw],
            remote: false,
        })
    }

    fn ready(&self) -> Result<(), PoolError> {
        self.group()?;
        match lvs(self.vg())?.iter().find(|lv| lv.has(lvm_tools::OURS) && !lv.is_active()) {
            None => Ok(()),
            Some(lv) => {
                let why = format!("logical volume {} is not active", lv.full(self.vg()));
                Err(PoolError::NotStarted { pool: self.pool.clone(), why })
            }
        }
    }

    fn start(&self) -> Result<Changed, PoolError> {
        self.group()?;
        let changed = lvm_tools::activate(self.vg(), &lvs(self.vg())?)?;
        Ok(if changed { Changed::Changed } else { Changed::AlreadySo })
    }

    fn stop(&self) -> Result<Changed, PoolError> {
        self.group()?;
        let changed = lvm_tools::deactivate(&self.pool, self.vg(), &lvs(self.vg())?)?;
        Ok(if changed { Changed::Changed } else { Changed::AlreadySo })
    }

    fn usage(&self) -> Result<Usage, PoolError> {
        let vg = self.group()?;
        let (capacity, available) = (bytes(&vg.vg_size), bytes(&vg.vg_free));
        let allocated = ByteSize(capacity.0.saturating_sub(available.0));
        Ok(Usage { capacity, allocated, available, thin: None })
    }

    fn volumes(&self) -> Result<Vec<Volume>, PoolError> {
        self.ready()?;
        let thick = |lv: &lvm_tools::Lv| lv.pool_lv.is_empty() && !lv.lv_path.is_empty();
        Ok(lvs(self.vg())?.iter().filter(|lv| thick(lv)).filter_map(lvm_tools::Lv::volume).collect())
    }

    fn allocate(&self, wanted: &Wanted) -> Result<Draft, PoolError> {
        self.ready()?;
        lvm_tools::check_format(&self.pool, wanted.format)?;
        lvm_tools::check_name(&self.pool, &wanted.name, &lvs(self.vg())?)?;
        self.require(wanted.size)?;
        let size = format!("{}b", wanted.size.0.max(1));
        let name = wanted.name.as_str();
        // Signatures of what was there before would be taken for the new volume's own.
        let lvcreate = program("lvcreate").args(["-q", "-y", "-W", "y", "-Z", "y", "-L", &size, "-n", name]);
        lvcreate.args(AS_DRAFT).arg(self.vg()).run()?;
        let made = lvs(self.vg())?.into_iter().find(|lv| lv.lv_name == name).and_then(|lv| lv.draft());
        made.ok_or_else(|| {
            wrong_place(&self.pool, format!("{}/{name} was made, and is not there", self.vg()))
        })
    }

    fn share(&self, from: &Volume, _name: &Name) -> Result<Draft, PoolError> {
        let what = format!("share the data of {}", from.name);
        Err(PoolError::Unsupported { pool: self.pool.clone(), kind: KIND.name, what })
    }

    fn publish(&self, draft: &Draft) -> Result<(), PoolError> {
        lvm_tools::publish(self.vg(), draft)
    }

    fn discard(&self, draft: &Draft) -> Result<(), PoolError> {
        lvm_tools::discard(self.vg(), draft)
    }

    fn drafts(&self) -> Result<Vec<Draft>, PoolError> {
        let thick = |lv: &lvm_tools::Lv| lv.pool_lv.is_empty();
        Ok(lvs(self.vg())?.iter().filter(|lv| thick(lv)).filter_map(lvm_tools::Lv::draft).collect())
    }

    fn resize(&self, volume: &Volume, size: ByteSize) -> Result<(), PoolError> {
        self.require(ByteSize(size.0.saturating_sub(volume.virtual_size.0)))?;
        lvm_tools::resize(self.vg(), volume, size)
    }

    fn remove(&self, volume: &Volume) -> Result<(), PoolError> {
        lvm_tools::remove(self.vg(), volume)
    }

    fn forget(&self) -> Result<(), PoolError> {
        // The tags say who made the volumes, which stays true.
        Ok(())
    }
}
