//! What `lvm` and `lvm-thin` have in common: LVM's own programs, their reports as JSON, and the tags by which
//! snapctl knows its volumes among others of a volume group.
//!
//! Source: lvmreport(7), lvs(8), lvcreate(8); tags: lvm(8) "Tags".

use std::path::PathBuf;

use host::program::Program;
use model::{ByteSize, Name};
use serde::Deserialize;

use super::{Draft, Place, PoolError, Volume, VolumeFormat, wrong_place};
use crate::refuse_open;

/// Programs that the kinds call.
pub(super) const PROGRAMS: &[&str] =
    &["vgs", "lvs", "lvcreate", "lvremove", "lvchange", "lvextend", "lvreduce"];

/// The tag of every volume that snapctl has made.
pub(super) const OURS: &str = "snapctl";
/// The tag of one that is not finished.
const DRAFT: &str = "snapctl-draft";
/// The tag of a snapshot's copy, which is no volume by itself.
pub(super) const POINT: &str = "snapctl-point";

/// Names that LVM keeps for itself, or that would be taken for an internal volume.
///
/// Source: lvm(8), "Valid names".
const RESERVED_PREFIXES: [&str; 2] = ["snapshot", "pvmove"];
const RESERVED_PARTS: [&str; 13] = [
    "_cdata", "_cmeta", "_corig", "_cpool", "_cvol", "_mimage", "_mlog", "_pmspare", "_rimage", "_rmeta",
    "_tdata", "_tmeta", "_vorigin",
];

/// One logical volume in a report.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Lv {
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

const LV_FIELDS: &str = "lv_name,lv_size,lv_path,lv_tags,lv_active,lv_device_open,pool_lv,origin,data_percent,metadata_percent,lv_metadata_size";

/// One volume group in a report.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Vg {
    pub vg_name: String,
    pub vg_uuid: String,
    pub vg_size: String,
    pub vg_free: String,
}

#[derive(Deserialize)]
struct Report<T> {
    report: Vec<T>,
}

#[derive(Deserialize)]
struct LvReport {
    lv: Vec<Lv>,
}

#[derive(Deserialize)]
struct VgReport {
    vg: Vec<Vg>,
}

/// One of LVM's programs; it does not mind our open files.
pub(super) fn program(name: &str) -> Program {
    Program::new(name).env("LVM_SUPPRESS_FD_WARNINGS", "1")
}

/// The volume group that has this name, if there is one.
pub(super) fn vg(name: &str) -> Result<Option<Vg>, PoolError> {
    let fields = "vg_name,vg_uuid,vg_size,vg_free";
    let vgs =
        program("vgs").args(["--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields]).run()?;
    let report: Report<VgReport> = read("vgs", &vgs.stdout)?;
    Ok(report.report.into_iter().flat_map(|report| report.vg).find(|vg| vg.vg_name == name))
}

/// The volume group of a pool, if it is the one that the pool was defined on.
pub(super) fn expect_vg(pool: &Name, name: &str, uuid: &str) -> Result<Vg, PoolError> {
    match vg(name)? {
        Some(vg) if uuid.is_empty() || vg.vg_uuid == uuid => Ok(vg),
        Some(vg) => {
            let why = format!(
                "volume group {name} has the UUID {}, and the pool was defined on {uuid}",
                vg.vg_uuid
            );
            Err(wrong_place(pool, why))
        }
        None => Err(wrong_place(pool, format!("there is no volume group {name}"))),
    }
}

/// The logical volumes of a volume group.
pub(super) fn lvs(vg: &str) -> Result<Vec<Lv>, PoolError> {
    let lvs = program("lvs").args(["--reportformat", "json", "--units", "b", "--nosuffix", "-o", LV_FIELDS]);
    let report: Report<LvReport> = read("lvs", &lvs.arg(vg).run()?.stdout)?;
    Ok(report.report.into_iter().flat_map(|report| report.lv).collect())
}

fn read<T: for<'de> Deserialize<'de>>(program: &'static str, bytes: &[u8]) -> Result<T, PoolError> {
    serde_json::from_slice(bytes).map_err(|fault| PoolError::Unreadable { program, fault: fault.to_string() })
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

    /// `VG/LV`, as the programs take it.
    pub fn full(&self, vg: &str) -> String {
        format!("{vg}/{}", self.lv_name)
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

    pub fn draft(&self) -> Option<Draft> {
        let name: Name = self.lv_name.parse().ok()?;
        self.has(DRAFT).then(|| draft_of(name, &self.lv_path, false))
    }
}

pub(super) fn draft_of(name: Name, path: &str, zeroed: bool) -> Draft {
    Draft { name, format: VolumeFormat::Raw, place: Place::Device(PathBuf::from(path)), zeroed }
}

/// Arguments that mark a new logical volume as a draft.
pub(super) const AS_DRAFT: [&str; 4] = ["--addtag", OURS, "--addtag", DRAFT];

/// Refuses a name that LVM would refuse, or that is taken.
pub(super) fn check_name(pool: &Name, name: &Name, lvs: &[Lv]) -> Result<(), PoolError> {
    let text = name.as_str();
    let reserved = RESERVED_PREFIXES.iter().any(|prefix| text.starts_with(prefix))
        || RESERVED_PARTS.iter().any(|part| text.contains(part));
    if reserved {
        let why = "LVM keeps such names for itself".to_owned();
        return Err(PoolError::BadName { pool: pool.clone(), volume: name.clone(), why });
    }
    if lvs.iter().any(|lv| lv.lv_name == text) {
        return Err(PoolError::VolumeExists { pool: pool.clone(), volume: name.clone() });
    }
    Ok(())
}

/// Refuses formats other than raw: on a device there is no ending that would tell another one.
pub(super) fn check_format(pool: &Name, format: VolumeFormat) -> Result<(), PoolError> {
    if format == VolumeFormat::Raw {
        return Ok(());
    }
    Err(PoolError::Contradiction(format!("pool {pool}: volumes on devices are raw, not {format}")))
}

/// Takes the draft's mark off.
pub(super) fn publish(vg: &str, draft: &Draft) -> Result<(), PoolError> {
    let full = format!("{vg}/{}", draft.name);
    program("lvchange").args(["-q", "--deltag", DRAFT, &full]).run()?;
    Ok(())
}

/// Removes a draft; one that is not there is none.
pub(super) fn discard(vg: &str, draft: &Draft) -> Result<(), PoolError> {
    let is_there = |lv: &Lv| lv.lv_name == draft.name.as_str() && lv.has(DRAFT);
    if lvs(vg)?.iter().any(is_there) {
        program("lvremove").args(["-q", "-y", &format!("{vg}/{}", draft.name)]).run()?;
    }
    Ok(())
}

/// Removes a volume that is ours.
pub(super) fn remove(vg: &str, volume: &Volume) -> Result<(), PoolError> {
    refuse_foreign(vg, volume)?;
    program("lvremove").args(["-q", "-y", &format!("{vg}/{}", volume.name)]).run()?;
    Ok(())
}

/// Gives a volume another size.
pub(super) fn resize(vg: &str, volume: &Volume, size: ByteSize) -> Result<(), PoolError> {
    refuse_foreign(vg, volume)?;
    let full = format!("{vg}/{}", volume.name);
    let size_text = format!("{}b", size.0);
    let verb = if size > volume.virtual_size { "lvextend" } else { "lvreduce" };
    // What is inside is a guest's, so that LVM is not to resize a file system.
    program(verb).args(["-q", "-y", "-L", &size_text, &full]).run()?;
    Ok(())
}

fn refuse_foreign(vg: &str, volume: &Volume) -> Result<(), PoolError> {
    if !volume.foreign {
        return Ok(());
    }
    let adopt = format!("lvchange --addtag {OURS} {vg}/{}", volume.name);
    Err(PoolError::Foreign { path: volume.place.path().to_owned(), adopt })
}

/// Activates what is ours and is not active; says whether anything was.
pub(super) fn activate(vg: &str, lvs: &[Lv]) -> Result<bool, PoolError> {
    let sleeping: Vec<String> =
        lvs.iter().filter(|lv| lv.has(OURS) && !lv.is_active()).map(|lv| lv.full(vg)).collect();
    if sleeping.is_empty() {
        return Ok(false);
    }
    program("lvchange").args(["-q", "-y", "-ay", "-K"]).args(&sleeping).run()?;
    Ok(true)
}

/// Deactivates what is ours, unless somebody uses it; says whether anything was active.
pub(super) fn deactivate(pool: &Name, vg: &str, lvs: &[Lv]) -> Result<bool, PoolError> {
    let active: Vec<&Lv> = lvs.iter().filter(|lv| lv.has(OURS) && lv.is_active()).collect();
    for lv in &active {
        let in_use = |by| PoolError::PoolInUse { pool: pool.clone(), by };
        if let (Ok(name), true) = (lv.lv_name.parse(), !lv.lv_path.is_empty()) {
            refuse_open(&name, std::path::Path::new(&lv.lv_path))
                .map_err(|fault| in_use(fault.to_string()))?;
        }
        if lv.lv_device_open == "open" {
            return Err(in_use(format!("the kernel has {} open; is it mounted?", lv.full(vg))));
        }
    }
    if active.is_empty() {
        return Ok(false);
    }
    let names: Vec<String> = active.iter().map(|lv| lv.full(vg)).collect();
    program("lvchange").args(["-q", "-y", "-an"]).args(&names).run()?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LVS: &str = r#"{"report":[{"lv":[
        {"lv_name":"pool0","lv_size":"419430400","lv_path":"","lv_tags":"","lv_active":"active","lv_device_open":"",
         "pool_lv":"","origin":"","data_percent":"2.50","metadata_percent":"11.04","lv_metadata_size":"8388608"},
        {"lv_name":"vm1","lv_size":"1073741824","lv_path":"/dev/vg/vm1","lv_tags":"snapctl,other","lv_active":"active",
         "lv_device_open":"open","pool_lv":"pool0","origin":"base","data_percent":"25.00","metadata_percent":"",
         "lv_metadata_size":""},
        {"lv_name":"vm2","lv_size":"1073741824","lv_path":"/dev/vg/vm2","lv_tags":"snapctl,snapctl-draft","lv_active":"",
         "lv_device_open":"","pool_lv":"pool0","origin":"","data_percent":"","metadata_percent":"","lv_metadata_size":""}
    ]}]}"#;

    fn lvs() -> Vec<Lv> {
        let report: Report<LvReport> = read("lvs", LVS.as_bytes()).unwrap();
        report.report.into_iter().flat_map(|report| report.lv).collect()
    }

    #[test]
    fn a_report_is_read() {
        let lvs = lvs();
        let volume = lvs[1].volume().unwrap();
        assert_eq!((volume.virtual_size, volume.allocated), (ByteSize(1 << 30), ByteSize(1 << 28)));
        assert_eq!((volume.foreign, volume.origin.as_deref()), (false, Some("base")));
        assert!(lvs[0].volume().unwrap().foreign);
        assert!(lvs[2].volume().is_none());
        assert_eq!(lvs[2].draft().unwrap().name.as_str(), "vm2");
        assert_eq!(percent(&lvs[0].metadata_percent), 11.04);
        assert!(matches!(read::<Report<LvReport>>("lvs", b"{}"), Err(PoolError::Unreadable { .. })));
    }

    #[test]
    fn names_that_lvm_keeps_for_itself_are_refused() {
        let pool: Name = "p".parse().unwrap();
        let check = |name: &str| check_name(&pool, &name.parse().unwrap(), &lvs());
        for name in ["snapshot1", "a_tdata", "x_mlog1"] {
            assert!(matches!(check(name), Err(PoolError::BadName { .. })), "{name}");
        }
        assert!(matches!(check("vm1"), Err(PoolError::VolumeExists { .. })));
        assert!(check("vm3").is_ok());
    }
}
