//! One record of the guest's writer: what a test reads back from a layer.
//!
//! Shared with the `lab-guest` program, which is compiled from this same file, so it uses the standard
//! library only.

/// Bytes of one record: a page, so that a write is never split.
pub const RECORD_SIZE: usize = 4096;
/// How many disks one record can speak of.
pub const MAX_DISKS: usize = 32;

const MAGIC: [u8; 8] = *b"LABREC01";
const OTHERS_AT: usize = 32;
const FILL_AT: usize = OTHERS_AT + 8 * MAX_DISKS;
const SUM_AT: usize = RECORD_SIZE - 8;

/// What the writer knew when it wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Position of the disk among the guest's mounted disks, from 0.
    pub disk: u32,
    /// Sequence number on this disk, from 1, without gaps.
    pub seq: u64,
    /// The guest's CLOCK_REALTIME in nanoseconds.
    pub time_ns: u64,
    /// For each disk, the highest sequence number that was synced when this record was written.
    ///
    /// A layer that holds this record must be accompanied by layers that hold at least these.
    pub synced: Vec<u64>,
}

/// Why 4096 bytes are not a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadRecord {
    /// The first bytes are not the magic number.
    Magic,
    /// The checksum does not match the content.
    Checksum,
    /// The number of disks is larger than [`MAX_DISKS`].
    Disks,
}

impl Record {
    /// Returns the record's bytes on disk: little endian, filled with a pattern of its sequence number.
    pub fn encode(&self) -> [u8; RECORD_SIZE] {
        let mut bytes = [0_u8; RECORD_SIZE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.disk.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.synced.len() as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.seq.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.time_ns.to_le_bytes());
        for (slot, seq) in bytes[OTHERS_AT..FILL_AT].chunks_exact_mut(8).zip(&self.synced) {
            slot.copy_from_slice(&seq.to_le_bytes());
        }
        for (i, byte) in bytes[FILL_AT..SUM_AT].iter_mut().enumerate() {
            *byte = (self.seq as usize).wrapping_mul(31).wrapping_add(i) as u8;
        }
        let sum = fnv1a(&bytes[..SUM_AT]);
        bytes[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads one record.
    ///
    /// # Errors
    /// [`BadRecord`] for anything that [`Record::encode`] did not make.
    pub fn decode(bytes: &[u8; RECORD_SIZE]) -> Result<Self, BadRecord> {
        if bytes[..8] != MAGIC {
            return Err(BadRecord::Magic);
        }
        if fnv1a(&bytes[..SUM_AT]) != u64_at(bytes, SUM_AT) {
            return Err(BadRecord::Checksum);
        }
        let disks = u32_at(bytes, 12) as usize;
        if disks > MAX_DISKS {
            return Err(BadRecord::Disks);
        }
        Ok(Self {
            disk: u32_at(bytes, 8),
            seq: u64_at(bytes, 16),
            time_ns: u64_at(bytes, 24),
            synced: (0..disks).map(|i| u64_at(bytes, OTHERS_AT + 8 * i)).collect(),
        })
    }
}

/// 64-bit FNV-1a: enough to see torn and misplaced writes, not meant against malice.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

fn u32_at(bytes: &[u8; RECORD_SIZE], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8; RECORD_SIZE], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_the_round_trip_and_one_flipped_bit_does_not() {
        let record = Record { disk: 3, seq: 77, time_ns: 123_456, synced: vec![70, 71, 72, 76] };
        let mut bytes = record.encode();
        assert_eq!(Record::decode(&bytes), Ok(record));
        bytes[2000] ^= 1;
        assert_eq!(Record::decode(&bytes), Err(BadRecord::Checksum));
        bytes[0] = 0;
        assert_eq!(Record::decode(&bytes), Err(BadRecord::Magic));
    }
}
