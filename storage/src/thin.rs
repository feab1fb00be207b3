//! Thin volumes of LVM as copies of each other: made and removed by LVM, compared by what its metadata says.
//!
//! Source: lvmthin(7); thin_delta(8); Linux Documentation/admin-guide/device-mapper/thin-provisioning.rst for
//! `reserve_metadata_snap`.

use std::path::{Path, PathBuf};

use host::program::{Program, ProgramError};
use serde::Deserialize;

use crate::PoolError;

/// The tag of every volume that snapctl has made.
pub(crate) const OURS: &str = "snapctl";
/// The tag of a snapshot's copy, which is no volume by itself.
pub(crate) const POINT: &str = "snapctl-point";

/// A thin logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThinVolume {
    /// Its volume group.
    pub vg: String,
    /// Its name.
    pub lv: String,
    /// The thin pool that it is in.
    pub pool: String,
    /// Its stable path, `/dev/mapper/VG-LV`.
    pub path: PathBuf,
    /// Its number in the pool's metadata.
    pub id: u64,
    tags: String,
}

/// What differs between two thin volumes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
    /// Whether there is anything in the newer one; it reads as zeroes otherwise.
    pub data: bool,
}

#[derive(Deserialize)]
struct Printed {
    report: Vec<Rows>,
}

#[derive(Deserialize)]
struct Rows {
    lv: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    vg_name: String,
    lv_name: String,
    pool_lv: String,
    thin_id: String,
    lv_tags: String,
    lv_dm_path: String,
}

const FIELDS: &str = "vg_name,lv_name,pool_lv,thin_id,lv_tags,lv_dm_path";

fn lvm(name: &str) -> Program {
    Program::new(name).env("LVM_SUPPRESS_FD_WARNINGS", "1")
}

impl ThinVolume {
    /// The thin volume that the device at `path` is; none if it is something else.
    ///
    /// # Errors
    /// [`PoolError`] if LVM is there and cannot be asked.
    pub fn of(path: &Path) -> Result<Option<Self>, PoolError> {
        let lvs = lvm("lvs").args(["--reportformat", "json", "-o", FIELDS]).arg(path);
        let printed = match lvs.outcome() {
            Ok((status, printed)) if status.success() => printed,
            // No logical volume, or no LVM at all.
            Ok(_) | Err(ProgramError::Missing { .. }) => return Ok(None),
            Err(fault) => return Err(fault.into()),
        };
        let fault =
            |fault: serde_json::Error| PoolError::Unreadable { program: "lvs", fault: fault.to_string() };
        let printed: Printed = serde_json::from_slice(&printed.stdout).map_err(fault)?;
        let row = printed.report.into_iter().flat_map(|rows| rows.lv).next();
        Ok(row.filter(|row| !row.pool_lv.is_empty()).and_then(|row| {
            Some(Self {
                id: row.thin_id.trim().parse().ok()?,
                path: PathBuf::from(row.lv_dm_path),
                vg: row.vg_name,
                lv: row.lv_name,
                pool: row.pool_lv,
                tags: row.lv_tags,
            })
        }))
    }

    /// Where a volume of the same group that is called `lv` is.
    pub fn beside(&self, lv: &str) -> PathBuf {
        // Device-mapper joins the two names by a hyphen, and doubles those inside them.
        let part = |text: &str| text.replace('-', "--");
        PathBuf::from(format!("/dev/mapper/{}-{}", part(&self.vg), part(lv)))
    }

    /// Makes the copy `lv`: to be kept, then nothing can write to it, or to be gone on with.
    ///
    /// # Errors
    /// [`PoolError::Program`].
    pub fn copy(&self, lv: &str, kept: bool) -> Result<(), PoolError> {
        let (permission, tag) = if kept { ("r", POINT) } else { ("rw", OURS) };
        let origin = format!("{}/{}", self.vg, self.lv);
        // Active, so that it can be looked at; LVM would skip that for a snapshot.
        let made = lvm("lvcreate").args(["-q", "-y", "-s", "-k", "n", "-a", "y", "-p", permission]);
        made.args(["--addtag", OURS, "--addtag", tag, "-n", lv, &origin]).run()?;
        Ok(())
    }

    /// Removes it, if snapctl has made it.
    ///
    /// # Errors
    /// [`PoolError::Foreign`]; [`PoolError::Program`].
    pub fn remove(&self) -> Result<(), PoolError> {
        let full = format!("{}/{}", self.vg, self.lv);
        if !self.tags.split(',').any(|tag| tag == OURS) {
            let adopt = format!("lvchange --addtag {OURS} {full}");
            return Err(PoolError::Foreign { path: self.path.clone(), adopt });
        }
        lvm("lvremove").args(["-q", "-y", &full]).run()?;
        Ok(())
    }

    /// What changed from `older` to this one, in order; both are in one pool.
    ///
    /// # Errors
    /// [`PoolError::Program`]; [`PoolError::Unreadable`].
    pub fn changes_since(&self, older: &Self) -> Result<Vec<Change>, PoolError> {
        let metadata = self.beside(&format!("{}_tmeta", self.pool));
        let message = |text: &str| {
            let program =
                Program::new("dmsetup").arg("message").arg(tpool(&self.vg, &self.pool)).args(["0", text]);
            program.run().map(drop)
        };
        // The pool goes on; what is read is its metadata as it is now.
        message("reserve_metadata_snap")?;
        let delta = Program::new("thin_delta").args(["-m", "--thin1", &older.id.to_string()]);
        let printed = delta.args(["--thin2", &self.id.to_string()]).arg(&metadata).run();
        // Its undo, whatever came of it.
        let released = message("release_metadata_snap");
        let printed = printed?;
        released?;
        parse(&String::from_utf8_lossy(&printed.stdout))
    }
}

/// The pool's device, by which dmsetup knows it.
fn tpool(vg: &str, pool: &str) -> String {
    let part = |text: &str| text.replace('-', "--");
    format!("{}-{}-tpool", part(vg), part(pool))
}

/// Reads thin_delta's XML: `<different begin="0" length="2"/>` in blocks, of a size that the first element tells.
fn parse(text: &str) -> Result<Vec<Change>, PoolError> {
    let unreadable = |fault: &str| PoolError::Unreadable { program: "thin_delta", fault: fault.to_owned() };
    let number = |element: &str, name: &str| -> Option<u64> {
        let (_, rest) = element.split_once(&format!("{name}=\""))?;
        rest.split_once('"')?.0.parse().ok()
    };
    let mut block = None;
    let mut changes = Vec::new();
    for element in text.split('<').skip(1) {
        let kind = element.split([' ', '>', '/']).next().unwrap_or_default();
        if kind == "superblock" {
            // In sectors of 512 bytes.
            block = number(element, "data_block_size").and_then(|sectors| sectors.checked_mul(512));
        }
        if !["different", "left_only", "right_only"].contains(&kind) {
            continue;
        }
        let block = block.ok_or_else(|| unreadable("no block size"))?;
        let range = number(element, "begin").zip(number(element, "length"));
        let bytes = range.and_then(|(begin, length)| begin.checked_mul(block).zip(length.checked_mul(block)));
        let (offset, length) = bytes.ok_or_else(|| unreadable("an element without a range"))?;
        changes.push(Change { offset, length, data: kind != "left_only" });
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_thin_delta_prints_is_read() {
        let text = r#"<superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="0">
  <diff left="1" right="2">
    <same begin="0" length="7"/>
    <different begin="7" length="3"/>
    <left_only begin="10" length="1"/>
    <right_only begin="20" length="2"/>
  </diff>
</superblock>"#;
        let change =
            |offset: u64, length: u64, data| Change { offset: offset << 16, length: length << 16, data };
        assert_eq!(parse(text).unwrap(), [change(7, 3, true), change(10, 1, false), change(20, 2, true)]);
        assert_eq!(parse("<superblock data_block_size=\"128\"></superblock>").unwrap(), []);
        assert!(parse("<different begin=\"0\" length=\"1\"/>").is_err());
        assert!(parse("<superblock data_block_size=\"128\"><different begin=\"x\"/>").is_err());
    }

    #[test]
    fn names_of_devices_are_joined_as_device_mapper_does() {
        let volume = ThinVolume {
            vg: "my-vg".into(),
            lv: "v1".into(),
            pool: "p".into(),
            path: PathBuf::new(),
            id: 1,
            tags: String::new(),
        };
        assert_eq!(volume.beside("v1.1a2b3c4d"), Path::new("/dev/mapper/my--vg-v1.1a2b3c4d"));
        assert_eq!(tpool("my-vg", "p0"), "my--vg-p0-tpool");
    }
}
