//! Reading a layer without mounting it: its records, and whether its file system is clean.

use std::fs::{self, File};
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::disk::qemu_img;
use super::record::{BadRecord, RECORD_SIZE, Record};
use super::run::{outcome, output, program};

/// What a layer's file system looks like to the next who mounts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsState {
    /// Whether mounting it replays the journal: the feature `needs_recovery` of the superblock.
    pub needs_recovery: bool,
    /// Whether `e2fsck -fn` finds nothing to correct.
    pub fsck_clean: bool,
    /// What `e2fsck` said.
    pub fsck_says: String,
}

/// A private raw copy of what a guest would see on a layer and those below it.
///
/// The layer may be open in a QEMU; a frozen one does not change, an active one may come out torn.
#[derive(Debug)]
pub struct Layer {
    raw: PathBuf,
    dir: TempDir,
}

impl Layer {
    /// Copies the chain that ends in `image`, of QEMU's `format`, into a directory beside it.
    ///
    /// # Errors
    /// When `qemu-img` cannot read it.
    pub fn copy(image: &Path, format: &str) -> Result<Self> {
        let beside = image.parent().context("no parent")?;
        let dir = tempfile::Builder::new().prefix("layer").tempdir_in(beside)?;
        let raw = dir.path().join("raw");
        output(qemu_img()?.args(["convert", "-U", "-f", format, "-O", "raw"]).arg(image).arg(&raw))?;
        Ok(Self { raw, dir })
    }

    /// Looks at the file system, as it is.
    ///
    /// # Errors
    /// When there is no ext4 file system.
    pub fn fs_state(&self) -> Result<FsState> {
        let mut dumpe2fs = Command::new(program("dumpe2fs")?);
        let head = output(dumpe2fs.arg("-h").arg(&self.raw).env("LC_ALL", "C"))?;
        let features = head.lines().find_map(|line| line.strip_prefix("Filesystem features:"));
        let features = features.context("dumpe2fs shows no features")?;
        let mut e2fsck = Command::new(program("e2fsck")?);
        let (fsck_clean, said, warned) = outcome(e2fsck.arg("-fn").arg(&self.raw).env("LC_ALL", "C"))?;
        let needs_recovery = features.split_whitespace().any(|word| word == "needs_recovery");
        Ok(FsState { needs_recovery, fsck_clean, fsck_says: said + &warned })
    }

    /// Reads the writer's records, after replaying the journal in this copy as a mount would.
    ///
    /// In order; a half-written last one, which no one was told of, is left out. None if the writer
    /// has not run on this disk.
    ///
    /// # Errors
    /// When a record is damaged, or the sequence has a gap.
    pub fn records(&self) -> Result<Vec<Record>> {
        if self.fs_state()?.needs_recovery {
            let mut e2fsck = Command::new(program("e2fsck")?);
            // 1 means that errors were corrected: here, that the journal was replayed.
            let (_, said, warned) = outcome(e2fsck.args(["-y", "-E", "journal_only"]).arg(&self.raw))?;
            if self.fs_state()?.needs_recovery {
                bail!("the journal cannot be replayed: {said}{warned}");
            }
        }
        let out = self.dir.path().join("records");
        let mut debugfs = Command::new(program("debugfs")?);
        debugfs.arg("-R").arg(format!("dump /records {}", out.display())).arg(&self.raw);
        output(&mut debugfs)?;
        match File::open(&out) {
            Ok(file) => {
                let records = parse(&mut BufReader::new(file));
                fs::remove_file(&out)?;
                records
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Reads the records of the chain that ends in `image`: see [`Layer::records`].
///
/// # Errors
/// Those of [`Layer::copy`] and [`Layer::records`].
pub fn read_records(image: &Path, format: &str) -> Result<Vec<Record>> {
    Layer::copy(image, format)?.records().with_context(|| image.display().to_string())
}

/// Looks at the file system of the chain that ends in `image`: see [`Layer::fs_state`].
///
/// # Errors
/// Those of [`Layer::copy`] and [`Layer::fs_state`].
pub fn fs_state(image: &Path, format: &str) -> Result<FsState> {
    Layer::copy(image, format)?.fs_state().with_context(|| image.display().to_string())
}

/// Checks that the disks of one point in time belong together; `disks` in the guest's mount order.
///
/// No record may know of a sequence number on another disk as synced that the other disk lacks.
///
/// # Errors
/// The first record that knows too much.
pub fn check_same_instant(disks: &[Vec<Record>]) -> Result<()> {
    let last: Vec<u64> = disks.iter().map(|records| records.last().map_or(0, |r| r.seq)).collect();
    for record in disks.iter().flatten() {
        for (other, (&known, &there)) in record.synced.iter().zip(&last).enumerate() {
            if known > there {
                bail!(
                    "record {} of disk {} was written after {known} was synced on disk {other}, which ends at {there}",
                    record.seq,
                    record.disk
                );
            }
        }
    }
    Ok(())
}

fn parse(file: &mut impl Read) -> Result<Vec<Record>> {
    let mut records: Vec<Record> = Vec::new();
    let mut bytes = [0; RECORD_SIZE];
    while read_whole(file, &mut bytes)? {
        let expected = records.last().map_or(1, |last| last.seq + 1);
        match Record::decode(&bytes) {
            Ok(record) if record.seq == expected => records.push(record),
            Ok(record) => bail!("record {} where {expected} was expected", record.seq),
            // The file's size may reach the disk before its last page does; nothing may follow then.
            Err(BadRecord::Magic) if bytes == [0; RECORD_SIZE] && !read_whole(file, &mut bytes)? => break,
            Err(bad) => bail!("record {expected} is damaged: {bad:?}"),
        }
    }
    Ok(records)
}

/// Fills `bytes`; false at the end of the file, where less than a record is left.
fn read_whole(file: &mut impl Read, bytes: &mut [u8; RECORD_SIZE]) -> Result<bool> {
    match file.read_exact(bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(disk: u32, seq: u64, synced: &[u64]) -> Record {
        Record { disk, seq, time_ns: 0, synced: synced.to_vec() }
    }

    #[test]
    fn a_gap_and_a_damaged_record_are_seen() {
        let file =
            |seqs: &[u64]| seqs.iter().flat_map(|&seq| record(0, seq, &[0]).encode()).collect::<Vec<_>>();
        assert_eq!(parse(&mut file(&[1, 2, 3]).as_slice()).unwrap().len(), 3);
        assert!(parse(&mut file(&[1, 3]).as_slice()).is_err());
        let mut damaged = file(&[1, 2, 3]);
        damaged[RECORD_SIZE + 100] ^= 1;
        assert!(parse(&mut damaged.as_slice()).is_err());
        let mut torn = file(&[1, 2]);
        torn.truncate(RECORD_SIZE + 9);
        assert_eq!(parse(&mut torn.as_slice()).unwrap().len(), 1);
    }

    #[test]
    fn a_disk_that_lacks_what_another_knew_as_synced_is_not_of_the_same_instant() {
        let first = vec![record(0, 1, &[0, 0]), record(0, 2, &[1, 3])];
        let behind = vec![record(1, 1, &[1, 0]), record(1, 2, &[1, 1])];
        assert!(check_same_instant(&[first.clone(), behind.clone()]).is_err());
        let mut level = behind;
        level.push(record(1, 3, &[1, 2]));
        assert!(check_same_instant(&[first, level]).is_ok());
    }
}
