//! What `lvm` and `lvm-thin` have in common: LVM's own programs, their reports as JSON, and the tags by which
//! snapctl knows its volumes among others of a volume group.
//!
//! Source: lvmreport(7), lvs(8), lvcreate(8); tags: lvm(8) "Tags".

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use host::program::Program;
use model::{ByteSize, Name};
use serde::Deserialize;

pub(super) use crate::thin::OURS;
use crate::thin::POINT;

use super::{Draft, Place, PoolError, Volume, VolumeFormat, wrong_place};

/// Programs that the kinds call.
pub(super) const PROGRAMS: &[&str] = &["vgs", "lvcreate", "lvremove", "lvchange", "lvextend", "lvreduce"];

/// The tag of one that is not finished.
const DRAFT: &str = "snapctl-draft";

/// Names that LVM keeps for itself, or that would be taken for an internal volume.
///
/// Source: lvm(8), "Valid names".
const RESERVED_PREFIXES: [&str; 2] = ["snapshot", "pvmove"];
const RESERVED_PARTS: [&str; 13] = [
    "_cdata", "_cmeta", "_corig", "_cpool", "_cvol", "_mimage", "_mlog", "_pmspare", "_rimage", "_rmeta",
    "_tdata", "_tmeta", "_vorigin",
];

/// One line of a report: a logical volume and its group, or a group without any.
#[derive(Clone, Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct Lv {
    vg_name: String,
    vg_uuid: String,
    vg_size: String,
    vg_free: String,
    pub lv_name: String,
    pub lv_size: String,
    pub lv_path: String,
    pub lv_tags: String,
    pub lv_active: String,
    pub lv_device_open: String,
    pub pool_lv: String,
    pub origin: String,
    pub data_percent: String,
    pub metadata_percent: String,
    pub lv_metadata_size: String,
}

const GROUP_FIELDS: &str = "vg_name,vg_uuid,vg_size,vg_free";
const FIELDS: &str = "vg_name,vg_uuid,vg_size,vg_free,lv_name,lv_size,lv_path,lv_tags,lv_active,lv_device_open,\
                      pool_lv,origin,data_percent,metadata_percent,lv_metadata_size";

/// A volume group as it was when it was looked at.
#[derive(Clone, Debug)]
pub(super) struct Vg {
    pub uuid: String,
    pub size: ByteSize,
    pub free: ByteSize,
    pub lvs: Vec<Lv>,
}

#[derive(Deserialize)]
struct Report {
    report: Vec<Rows>,
}

#[derive(Deserialize)]
struct Rows {
    vg: Vec<Lv>,
}

/// A volume group that a pool is in. LVM takes its time to tell, so that what it told is kept until something changes.
#[derive(Debug)]
pub(super) struct Group {
    pub pool: Name,
    pub name: String,
    pub uuid: String,
    seen: Mutex<Option<Arc<Vg>>>,
}

/// One of LVM's programs; it does not mind our open files.
pub(super) fn program(name: &str) -> Program {
    Program::new(name).env("LVM_SUPPRESS_FD_WARNINGS", "1")
}

impl Group {
    /// The group of this name; of this UUID too, unless that is empty.
    pub fn new(pool: &Name, name: &str, uuid: &str) -> Self {
        Self { pool: pool.clone(), name: name.to_owned(), uuid: uuid.to_owned(), seen: Mutex::default() }
    }

    /// What is there now.
    ///
    /// # Errors
    /// [`PoolError::WrongPlace`] if it is not the group that the pool was defined on.
    pub fn look(&self) -> Result<Arc<Vg>, PoolError> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(vg) = &*seen {
            return Ok(Arc::clone(vg));
        }
        let vg = Arc::new(self.ask()?);
        *seen = Some(Arc::clone(&vg));
        Ok(vg)
    }

    fn ask(&self) -> Result<Vg, PoolError> {
        let name = &self.name;
        let rows = |fields: &str| -> Result<Vec<Lv>, PoolError> {
            let report = ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields];
            let rows = read(&program("vgs").args(report).run()?.stdout)?;
            Ok(rows.into_iter().filter(|row| row.vg_name == *name).collect())
        };
        let mut lvs = rows(FIELDS)?;
        if lvs.is_empty() {
            // With fields of volumes, a group that has none has no row.
            lvs = rows(GROUP_FIELDS)?;
        }
        let Some(first) = lvs.first() else {
            return Err(wrong_place(&self.pool, format!("there is no volume group {name}")));
        };
        if !self.uuid.is_empty() && first.vg_uuid != self.uuid {
            let (found, wanted) = (&first.vg_uuid, &self.uuid);
            let why =
                format!("volume group {name} has the UUID {found}, and the pool was defined on {wanted}");
            return Err(wrong_place(&self.pool, why));
        }
        let (uuid, size, free) = (first.vg_uuid.clone(), bytes(&first.vg_size), bytes(&first.vg_free));
        Ok(Vg { uuid, size, free, lvs: lvs.into_iter().filter(|lv| !lv.lv_name.is_empty()).collect() })
    }

    /// Runs one of LVM's programs that changes something.
    ///
    /// # Errors
    /// [`PoolError::Program`].
    pub fn change(&self, program: Program) -> Result<(), PoolError> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = None;
        program.run()?;
        Ok(())
    }

    /// `VG/LV`, as the programs take it.
    pub fn full(&self, lv: &str) -> String {
        format!("{}/{lv}", self.name)
    }

    /// Refuses a name that LVM would refuse, or that is taken.
    pub fn check_name(&self, name: &Name) -> Result<(), PoolError> {
        let text = name.as_str();
        let reserved = RESERVED_PREFIXES.iter().any(|prefix| text.starts_with(prefix))
            || RESERVED_PARTS.iter().any(|part| text.contains(part));
        if reserved {
            let why = "LVM keeps such names for itself".to_owned();
            return Err(PoolError::BadName { pool: self.pool.clone(), volume: name.clone(), why });
        }
        if self.look()?.lvs.iter().any(|lv| lv.lv_name == text) {
            return Err(PoolError::VolumeExists { pool: self.pool.clone(), volume: name.clone() });
        }
        Ok(())
    }

    /// Takes the draft's mark off.
    pub fn publish(&self, draft: &Draft) -> Result<(), PoolError> {
        let full = self.full(draft.name.as_str());
        self.change(program("lvchange").args(["-q", "--deltag", DRAFT, &full]))
    }

    /// Removes a draft; one that is not there is none.
    pub fn discard(&self, draft: &Draft) -> Result<(), PoolError> {
        let is_there = |lv: &Lv| lv.lv_name == draft.name.as_str() && lv.has(DRAFT);
        if self.look()?.lvs.iter().any(is_there) {
            let full = self.full(draft.name.as_str());
            self.change(program("lvremove").args(["-q", "-y", &full]))?;
        }
        Ok(())
    }

    /// Removes a volume that is ours.
    pub fn remove(&self, volume: &Volume) -> Result<(), PoolError> {
        self.refuse_foreign(volume)?;
        self.change(program("lvremove").args(["-q", "-y", &self.full(volume.name.as_str())]))
    }

    /// Gives a volume another size. What is inside is a guest's, so that LVM resizes no file system.
    pub fn resize(&self, volume: &Volume, size: ByteSize) -> Result<(), PoolError> {
        self.refuse_foreign(volume)?;
        if size == volume.virtual_size {
            return Ok(());
        }
        let verb = if size > volume.virtual_size { "lvextend" } else { "lvreduce" };
        let (full, size) = (self.full(volume.name.as_str()), format!("{}b", size.0));
        self.change(program(verb).args(["-q", "-y", "-L", &size, &full]))
    }

    fn refuse_foreign(&self, volume: &Volume) -> Result<(), PoolError> {
        if !volume.foreign {
            return Ok(());
        }
        let adopt = format!("lvchange --addtag {OURS} {}", self.full(volume.name.as_str()));
        Err(PoolError::Foreign { path: volume.place.path().to_owned(), adopt })
    }

    /// Activates those that are ours and not active; says whether there were any.
    pub fn activate(&self, lvs: &[&Lv]) -> Result<bool, PoolError> {
        let sleeping = lvs.iter().filter(|lv| lv.has(OURS) && !lv.is_active());
        let sleeping: Vec<String> = sleeping.map(|lv| self.full(&lv.lv_name)).collect();
        if sleeping.is_empty() {
            return Ok(false);
        }
        self.change(program("lvchange").args(["-q", "-y", "-ay", "-K"]).args(&sleeping))?;
        Ok(true)
    }

    /// Deactivates those that are ours, unless somebody uses one; says whether any was active.
    pub fn deactivate(&self, lvs: &[&Lv]) -> Result<bool, PoolError> {
        let active: Vec<&&Lv> = lvs.iter().filter(|lv| lv.has(OURS) && lv.is_active()).collect();
        for lv in &active {
            let in_use = |by| PoolError::PoolInUse { pool: self.pool.clone(), by };
            let path = Path::new(&lv.lv_path);
            if let Some(by) = host::open_files::user_of(path)?.describe(path.display()) {
                return Err(in_use(by));
            }
            if lv.lv_device_open == "open" {
                return Err(in_use(format!("the kernel has {} open; is it mounted?", path.display())));
            }
        }
        if active.is_empty() {
            return Ok(false);
        }
        let names: Vec<String> = active.iter().map(|lv| self.full(&lv.lv_name)).collect();
        self.change(program("lvchange").args(["-q", "-y", "-an"]).args(&names))?;
        Ok(true)
    }
}

fn read(bytes: &[u8]) -> Result<Vec<Lv>, PoolError> {
    let fault = |fault: serde_json::Error| PoolError::Unreadable { program: "vgs", fault: fault.to_string() };
    let report: Report = serde_json::from_slice(bytes).map_err(fault)?;
    Ok(report.report.into_iter().flat_map(|rows| rows.vg).collect())
}

/// A number of a report: bytes, or percent. An empty field is 0.
pub(super) fn bytes(text: &str) -> ByteSize {
    ByteSize(text.trim().parse().unwrap_or(0))
}

pub(super) fn percent(text: &str) -> f64 {
    text.trim().parse().unwrap_or(0.0)
}

impl Lv {
    pub fn has(&self, tag: &str) -> bool {
        self.lv_tags.split(',').any(|found| found == tag)
    }

    pub fn is_active(&self) -> bool {
        self.lv_active == "active"
    }

    /// The volume, unless it is a draft, a snapshot's copy, or one of LVM's own.
    pub fn volume(&self) -> Option<Volume> {
        let name: Name = self.lv_name.parse().ok()?;
        if self.has(DRAFT) || self.has(POINT) {
            return None;
        }
        let size = bytes(&self.lv_size);
        let thin = !self.pool_lv.is_empty();
        let used = (size.0 as f64 * percent(&self.data_percent) / 100.0) as u64;
        let inactive =
            (!self.is_active()).then(|| "it is not active; 'lvchange -ay' activates it".to_owned());
        Some(Volume {
            name,
            format: VolumeFormat::Raw,
            place: Place::Device(PathBuf::from(&self.lv_path)),
            virtual_size: size,
            allocated: if thin { ByteSize(used) } else { size },
            backing: None,
            encrypted: false,
            origin: Some(self.origin.clone()).filter(|origin| !origin.is_empty()),
            foreign: !self.has(OURS),
            fault: inactive,
        })
    }

    pub fn draft(&self, vg: &str) -> Option<Draft> {
        let name: Name = self.lv_name.parse().ok()?;
        self.has(DRAFT).then(|| draft_of(name, vg, false))
    }
}

pub(super) fn draft_of(name: Name, vg: &str, zeroed: bool) -> Draft {
    let place = Place::Device(Path::new("/dev").join(vg).join(name.as_str()));
    Draft { name, format: VolumeFormat::Raw, place, zeroed }
}

/// Arguments that mark a new logical volume as a draft.
pub(super) const AS_DRAFT: [&str; 4] = ["--addtag", OURS, "--addtag", DRAFT];

/// Refuses formats other than raw: on a device there is no ending that would tell another one.
pub(super) fn check_format(pool: &Name, format: VolumeFormat) -> Result<(), PoolError> {
    if format == VolumeFormat::Raw {
        return Ok(());
    }
    Err(PoolError::Contradiction(format!("pool {pool}: volumes on devices are raw, not {format}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LVS: &str = r#"{"report":[{"vg":[
        {"vg_name":"vg","vg_uuid":"u","vg_size":"900","vg_free":"100","lv_name":"pool0","lv_size":"419430400","lv_path":"","lv_tags":"","lv_active":"active","lv_device_open":"",
         "pool_lv":"","origin":"","data_percent":"2.50","metadata_percent":"11.04","lv_metadata_size":"8388608"},
        {"vg_name":"vg","vg_uuid":"u","vg_size":"900","vg_free":"100","lv_name":"vm1","lv_size":"1073741824","lv_path":"/dev/vg/vm1","lv_tags":"snapctl,other","lv_active":"active",
         "lv_device_open":"open","pool_lv":"pool0","origin":"base","data_percent":"25.00","metadata_percent":"",
         "lv_metadata_size":""},
        {"vg_name":"vg","vg_uuid":"u","vg_size":"900","vg_free":"100","lv_name":"vm2","lv_size":"1073741824","lv_path":"/dev/vg/vm2","lv_tags":"snapctl,snapctl-draft","lv_active":"",
         "lv_device_open":"","pool_lv":"pool0","origin":"","data_percent":"","metadata_percent":"","lv_metadata_size":""}
    ]}]}"#;

    fn lvs() -> Vec<Lv> {
        read(LVS.as_bytes()).unwrap()
    }

    #[test]
    fn a_report_is_read() {
        let lvs = lvs();
        let volume = lvs[1].volume().unwrap();
        assert_eq!((volume.virtual_size, volume.allocated), (ByteSize(1 << 30), ByteSize(1 << 28)));
        assert_eq!((volume.foreign, volume.origin.as_deref()), (false, Some("base")));
        assert!(lvs[0].volume().unwrap().foreign);
        assert!(lvs[2].volume().is_none());
        assert_eq!(lvs[2].draft("vg").unwrap().name.as_str(), "vm2");
        assert_eq!(percent(&lvs[0].metadata_percent), 11.04);
        assert!(matches!(read(b"{}"), Err(PoolError::Unreadable { .. })));
        let empty = br#"{"report":[{"vg":[{"vg_name":"vg","vg_uuid":"u","vg_size":"9","vg_free":"9"}]}]}"#;
        assert_eq!(read(empty).unwrap()[0].lv_name, "");
    }

    #[test]
    fn names_that_lvm_keeps_for_itself_are_refused() {
        let pool: Name = "p".parse().unwrap();
        let group = Group::new(&pool, "vg", "u");
        let vg = Vg { uuid: "u".into(), size: ByteSize(900), free: ByteSize(100), lvs: lvs() };
        *group.seen.lock().unwrap() = Some(Arc::new(vg));
        let check = |name: &str| group.check_name(&name.parse().unwrap());
        for name in ["snapshot1", "a_tdata", "x_mlog1"] {
            assert!(matches!(check(name), Err(PoolError::BadName { .. })), "{name}");
        }
        assert!(matches!(check("vm1"), Err(PoolError::VolumeExists { .. })));
        assert!(check("vm3").is_ok());
    }
}
