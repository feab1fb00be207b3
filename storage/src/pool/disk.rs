//! `disk`: a whole disk with a GPT, each volume a partition.
//!
//! A volume is a partition of a type of its own (so that nobody else's is ever touched) whose GPT name is the
//! volume's name; a draft's name has a `~` before it.
//!
//! Source: UEFI Specification, "GUID Partition Table (GPT) Disk Layout"; sfdisk(8), partx(8).

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::program::Program;
use model::{ByteSize, Name};
use serde::{Deserialize, Serialize};
use toml::Table;

use super::{
    Capabilities, Changed, Draft, Kind, Opened, Place, Pool, PoolError, Request, Usage, Volume, VolumeFormat,
    Wanted, wrong_place,
};

pub(super) const KIND: Kind = Kind {
    name: "disk",
    about: "a whole disk with a GPT, each volume a partition",
    options: &["device"],
    programs: &["sfdisk", "partx", "blkid"],
    define,
    open,
};

/// The type of a volume's partition, snapctl's own.
const TYPE: &str = "5EAF0F3E-2C5B-4B0C-9D5E-736E61706374";
/// Partitions begin and end on such a boundary, as every tool does it.
const ALIGNMENT: u64 = 1 << 20;
/// Longest name of a partition, in UTF-16 units; one is for the draft's mark.
const NAME_MAX: usize = 36;
const DRAFT: char = '~';

/// A disk that is known again by its GPT's GUID.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Options {
    device: PathBuf,
    #[serde(default)]
    guid: String,
}

#[derive(Debug)]
struct Disk {
    pool: Name,
    options: Options,
}

#[derive(Deserialize)]
struct Printed {
    partitiontable: PartitionTable,
}

/// What sfdisk prints; numbers are sectors.
#[derive(Clone, Debug, Deserialize)]
struct PartitionTable {
    label: String,
    id: String,
    firstlba: Option<u64>,
    lastlba: Option<u64>,
    sectorsize: Option<u64>,
    #[serde(default)]
    partitions: Vec<Partition>,
}

#[derive(Clone, Debug, Deserialize)]
struct Partition {
    node: PathBuf,
    start: u64,
    size: u64,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    name: String,
}

fn define(request: &Request<'_>) -> Result<Table, PoolError> {
    let options: Options = super::options(&KIND, request.pool, request.options.clone())?;
    super::require_absolute(request.pool, &options.device)?;
    let pool = Disk { pool: request.pool.clone(), options };
    let device = pool.device()?;
    let found = match read_table(device)? {
        Some(found) => found,
        None if request.initialize => {
            initialize(request.pool, device)?;
            pool.table()?
        }
        None => {
            let why =
                format!("{} has no GPT; --initialize writes one on a disk that is blank", device.display());
            return Err(wrong_place(request.pool, why));
        }
    };
    super::table(request.pool, &Options { guid: found.id, ..pool.options })
}

fn open(pool: &Name, options: Table) -> Opened {
    Ok(Box::new(Disk { pool: pool.clone(), options: super::options(&KIND, pool, options)? }))
}

/// Writes an empty GPT, where blkid(8) knows nothing of what is there.
fn initialize(pool: &Name, device: &Path) -> Result<(), PoolError> {
    let (status, printed) = Program::new("blkid").arg("-p").arg(device).outcome()?;
    if status.code() != Some(2) {
        let what = String::from_utf8_lossy(&printed.stdout).trim().to_owned();
        return Err(wrong_place(pool, format!("{} is not blank: {what}", device.display())));
    }
    sfdisk(device, &[], &[], b"label: gpt\n")
}

/// The partition table; none if there is no GPT.
fn read_table(device: &Path) -> Result<Option<PartitionTable>, PoolError> {
    let (status, printed) = Program::new("sfdisk").arg("--json").arg(device).outcome()?;
    if !status.success() {
        return Ok(None);
    }
    let fault =
        |fault: serde_json::Error| PoolError::Unreadable { program: "sfdisk", fault: fault.to_string() };
    let printed: Printed = serde_json::from_slice(&printed.stdout).map_err(fault)?;
    Ok(Some(printed.partitiontable).filter(|table| table.label == "gpt"))
}

/// Changes the table on the disk; the kernel is told by partx(8), one partition at a time, since it re-reads no
/// table of which a partition is in use.
fn sfdisk(device: &Path, verb: &[&str], operands: &[&str], input: &[u8]) -> Result<(), PoolError> {
    let quiet = ["--quiet", "--no-reread", "--no-tell-kernel", "--force"];
    let program = Program::new("sfdisk").args(quiet).args(verb).arg(device).args(operands);
    program.input(input.to_vec()).run()?;
    Ok(())
}

fn partx(device: &Path, verb: &str, number: u64) -> Result<(), PoolError> {
    Program::new("partx").args([verb, "--nr", &number.to_string()]).arg(device).run()?;
    Ok(())
}

impl PartitionTable {
    fn sector(&self) -> u64 {
        self.sectorsize.unwrap_or(512).max(1)
    }

    /// Where partitions may lie: first sector, and the one behind the last.
    fn bounds(&self) -> (u64, u64) {
        let first = self.firstlba.unwrap_or(2048);
        (first, self.lastlba.map_or(first, |last| last + 1))
    }

    /// Free room on boundaries, in sectors: start and length, in the disk's order.
    fn gaps(&self) -> Vec<(u64, u64)> {
        let step = (ALIGNMENT / self.sector()).max(1);
        let (first, end) = self.bounds();
        let mut taken: Vec<(u64, u64)> =
            self.partitions.iter().map(|part| (part.start, part.start.saturating_add(part.size))).collect();
        taken.sort_unstable();
        taken.push((end, end));
        let mut gaps = Vec::new();
        let mut at = first;
        for (start, behind) in taken {
            let from = at.next_multiple_of(step);
            let length = start.saturating_sub(from) / step * step;
            if length > 0 {
                gaps.push((from, length));
            }
            at = at.max(behind);
        }
        gaps
    }

    /// Sectors that a volume of so many bytes takes.
    fn sectors(&self, size: ByteSize) -> u64 {
        size.0.max(1).div_ceil(ALIGNMENT).saturating_mul((ALIGNMENT / self.sector()).max(1))
    }

    fn bytes(&self, sectors: u64) -> ByteSize {
        ByteSize(sectors.saturating_mul(self.sector()))
    }
}

impl Partition {
    /// Its number, as it stands at the end of its node's name.
    fn number(&self) -> Option<u64> {
        let node = self.node.to_str()?;
        let digits = node.len() - node.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        node[node.len() - digits..].parse().ok()
    }

    fn is_ours(&self) -> bool {
        self.kind.eq_ignore_ascii_case(TYPE)
    }

    fn draft(&self) -> Option<Draft> {
        let name = self.name.strip_prefix(DRAFT)?.parse().ok()?;
        self.is_ours().then(|| Draft {
            name,
            format: VolumeFormat::Raw,
            place: Place::Device(self.node.clone()),
            zeroed: false,
        })
    }
}

impl Disk {
    fn device(&self) -> Result<&Path, PoolError> {
        let path = self.options.device.as_path();
        let metadata = fs::metadata(path).map_err(HostError::io("look at", path))?;
        if metadata.file_type().is_block_device() {
            return Ok(path);
        }
        Err(wrong_place(&self.pool, format!("{} is no block device", path.display())))
    }

    fn table(&self) -> Result<PartitionTable, PoolError> {
        let device = self.device()?;
        let wrong = |why: String| wrong_place(&self.pool, format!("{} {why}", device.display()));
        let table = read_table(device)?.ok_or_else(|| wrong("has no GPT".into()))?;
        let guid = &self.options.guid;
        if guid.is_empty() || table.id.eq_ignore_ascii_case(guid) {
            return Ok(table);
        }
        Err(wrong(format!("has the GPT {}, and the pool was defined on {guid}", table.id)))
    }

    fn find<'a>(&self, table: &'a PartitionTable, name: &str) -> Option<&'a Partition> {
        table.partitions.iter().find(|part| part.is_ours() && part.name == name)
    }

    /// Removes a partition of ours from the table and from the kernel.
    fn take_away(&self, name: &str) -> Result<(), PoolError> {
        let table = self.table()?;
        let Some(part) = self.find(&table, name) else { return Ok(()) };
        let Some(number) = part.number() else { return Ok(()) };
        let device = self.device()?;
        // The kernel first: it refuses while somebody has it open.
        if part.node.exists() {
            partx(device, "--delete", number)?;
        }
        sfdisk(device, &["--delete"], &[&number.to_string()], b"")
    }
}

impl Pool for Disk {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn location(&self) -> String {
        self.options.device.display().to_string()
    }

    fn root(&self) -> Option<&Path> {
        None
    }

    fn capabilities(&self) -> Result<Capabilities, PoolError> {
        Ok(Capabilities::of_devices(false))
    }

    fn ready(&self) -> Result<(), PoolError> {
        let table = self.table()?;
        match table.partitions.iter().find(|part| part.is_ours() && !part.node.exists()) {
            None => Ok(()),
            Some(part) => {
                let why = format!("the kernel does not know partition {}", part.node.display());
                Err(PoolError::NotStarted { pool: self.pool.clone(), why })
            }
        }
    }

    fn start(&self) -> Result<Changed, PoolError> {
        let table = self.table()?;
        let mut changed = Changed::AlreadySo;
        for part in table.partitions.iter().filter(|part| part.is_ours() && !part.node.exists()) {
            if let Some(number) = part.number() {
                partx(self.device()?, "--add", number)?;
                changed = Changed::Changed;
            }
        }
        Ok(changed)
    }

    fn stop(&self) -> Result<Changed, PoolError> {
        Ok(Changed::Nothing)
    }

    fn usage(&self) -> Result<Usage, PoolError> {
        let table = self.table()?;
        let (first, end) = table.bounds();
        let capacity = table.bytes(end - first);
        let available = table.bytes(table.gaps().iter().map(|(_, length)| length).sum());
        let allocated = ByteSize(capacity.0.saturating_sub(available.0));
        Ok(Usage { capacity, allocated, available, thin: None })
    }

    fn volumes(&self) -> Result<Vec<Volume>, PoolError> {
        let table = self.table()?;
        let volume = |part: &Partition| {
            let size = table.bytes(part.size);
            let fault = (!part.node.exists()).then(|| "the kernel does not know the partition".to_owned());
            Some(Volume {
                name: part.name.parse().ok()?,
                format: VolumeFormat::Raw,
                place: Place::Device(part.node.clone()),
                virtual_size: size,
                allocated: size,
                backing: None,
                encrypted: false,
                origin: None,
                foreign: false,
                fault,
            })
        };
        Ok(table.partitions.iter().filter(|part| part.is_ours()).filter_map(volume).collect())
    }

    fn allocate(&self, wanted: &Wanted) -> Result<Draft, PoolError> {
        self.ready()?;
        super::lvm_tools::check_format(&self.pool, wanted.format)?;
        let name = wanted.name.as_str();
        if name.len() >= NAME_MAX {
            let why = format!("a partition's name has at most {} characters", NAME_MAX - 1);
            return Err(PoolError::BadName { pool: self.pool.clone(), volume: wanted.name.clone(), why });
        }
        let table = self.table()?;
        if self.find(&table, name).is_some() {
            return Err(PoolError::VolumeExists { pool: self.pool.clone(), volume: wanted.name.clone() });
        }
        let draft_name = format!("{DRAFT}{name}");
        self.take_away(&draft_name)?;
        let table = self.table()?;
        let needed = table.sectors(wanted.size);
        // The smallest gap that is large enough, so that large ones stay.
        let gap = table
            .gaps()
            .into_iter()
            .filter(|(_, length)| *length >= needed)
            .min_by_key(|(_, length)| *length);
        let Some((start, _)) = gap else {
            let largest = table.gaps().into_iter().map(|(_, length)| length).max().unwrap_or(0);
            let (needed, available) = (table.bytes(needed), table.bytes(largest));
            return Err(PoolError::Full { pool: self.pool.clone(), needed, available });
        };
        let line = format!("start={start}, size={needed}, type={TYPE}, name=\"{draft_name}\"\n");
        let device = self.device()?;
        sfdisk(device, &["--append"], &[], line.as_bytes())?;
        let table = self.table()?;
        let made = self.find(&table, &draft_name);
        let (Some(draft), Some(number)) = (made.and_then(Partition::draft), made.and_then(Partition::number))
        else {
            return Err(wrong_place(
                &self.pool,
                format!("the new partition of {} is not there", device.display()),
            ));
        };
        if let Err(fault) = partx(device, "--add", number) {
            self.take_away(&draft_name)?;
            return Err(fault);
        }
        Ok(draft)
    }

    fn share(&self, from: &Volume, _name: &Name) -> Result<Draft, PoolError> {
        let what = format!("share the data of {}", from.name);
        Err(PoolError::Unsupported { pool: self.pool.clone(), kind: KIND.name, what })
    }

    fn publish(&self, draft: &Draft) -> Result<(), PoolError> {
        let table = self.table()?;
        let number = self.find(&table, &format!("{DRAFT}{}", draft.name)).and_then(Partition::number);
        let Some(number) = number else {
            return Err(wrong_place(&self.pool, format!("the draft of {} is not there", draft.name)));
        };
        let device = self.device()?;
        sfdisk(device, &["--part-label"], &[&number.to_string(), draft.name.as_str()], b"")
    }

    fn discard(&self, draft: &Draft) -> Result<(), PoolError> {
        self.take_away(&format!("{DRAFT}{}", draft.name))
    }

    fn drafts(&self) -> Result<Vec<Draft>, PoolError> {
        Ok(self.table()?.partitions.iter().filter_map(Partition::draft).collect())
    }

    fn resize(&self, volume: &Volume, size: ByteSize) -> Result<(), PoolError> {
        let table = self.table()?;
        let Some(part) = self.find(&table, volume.name.as_str()) else { return Ok(()) };
        let Some(number) = part.number() else { return Ok(()) };
        let needed = table.sectors(size);
        let behind = part.start + part.size;
        let gap =
            table.gaps().into_iter().find(|(start, _)| *start == behind).map_or(0, |(_, length)| length);
        if needed > part.size + gap {
            let (needed, available) = (table.bytes(needed - part.size), table.bytes(gap));
            return Err(PoolError::Full { pool: self.pool.clone(), needed, available });
        }
        let device = self.device()?;
        let line = format!("start={}, size={needed}\n", part.start);
        sfdisk(device, &["-N", &number.to_string()], &[], line.as_bytes())?;
        partx(device, "--update", number)
    }

    fn remove(&self, volume: &Volume) -> Result<(), PoolError> {
        self.take_away(volume.name.as_str())
    }

    fn forget(&self) -> Result<(), PoolError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTED: &str = r#"{"partitiontable":{"label":"gpt","id":"AB-1","device":"/dev/vdb","unit":"sectors",
        "firstlba":34,"lastlba":409566,"sectorsize":512,"partitions":[
        {"node":"/dev/vdb1","start":2048,"size":20480,"type":"5EAF0F3E-2C5B-4B0C-9D5E-736E61706374","uuid":"x","name":"v1"},
        {"node":"/dev/vdb12","start":40960,"size":2048,"type":"0FC63DAF-8483-4772-8E79-3D69D8477DE4","uuid":"y","name":"v2"},
        {"node":"/dev/vdb3","start":43008,"size":2048,"type":"5eaf0f3e-2c5b-4b0c-9d5e-736e61706374","uuid":"z","name":"~v3"}]}}"#;

    fn table() -> PartitionTable {
        serde_json::from_str::<Printed>(PRINTED).unwrap().partitiontable
    }

    #[test]
    fn gaps_lie_between_partitions_on_boundaries() {
        assert_eq!(table().gaps(), [(22528, 18432), (45056, 177 * 2048)]);
        let empty = PartitionTable { partitions: Vec::new(), ..table() };
        assert_eq!(empty.gaps(), [(2048, 407_518 / 2048 * 2048)]);
        assert_eq!(table().sectors(ByteSize(1)), 2048);
        assert_eq!(table().sectors(ByteSize((1 << 20) + 1)), 4096);
    }

    #[test]
    fn partitions_of_others_are_neither_volumes_nor_drafts() {
        let table = table();
        let ours: Vec<bool> = table.partitions.iter().map(Partition::is_ours).collect();
        assert_eq!(ours, [true, false, true]);
        let drafts: Vec<Draft> = table.partitions.iter().filter_map(Partition::draft).collect();
        assert_eq!(drafts.iter().map(|draft| draft.name.as_str()).collect::<Vec<_>>(), ["v3"]);
        assert_eq!(table.partitions[1].number(), Some(12));
    }
}
