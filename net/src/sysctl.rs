//! Forwarding: switched on for the interfaces that a network needs, and put back when no network needs it any more.
//!
//! IPv4 is forwarded where it comes in, interface by interface. IPv6 has one switch for the whole host; a host that
//! forwards no longer listens to router advertisements, unless it is told to.
//!
//! Source: Documentation/networking/ip-sysctl.rst of Linux.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::files;
use model::Name;
use serde::{Deserialize, Serialize};

use crate::part::Seen;
use crate::{IfName, NetError};

const ROOT: &str = "/proc/sys/net";
const FORWARD_V6: &str = "ipv6/conf/all/forwarding";
/// Most that a ledger can be long.
const LEDGER_MAX: u64 = 8 << 20;

/// The interfaces that forward for a network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forwarding {
    /// The network.
    pub network: Name,
    /// The network's own bridge.
    pub bridge: IfName,
    /// Interfaces that lead out.
    pub uplinks: Vec<IfName>,
    /// Whether it has IPv4.
    pub v4: bool,
    /// Whether it has IPv6.
    pub v6: bool,
}

/// What was changed, by whom, and what it was: a file, since it has to outlive the command and not the host.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Ledger {
    entries: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    was: String,
    set: String,
    users: BTreeSet<Name>,
    /// Others that change with it, and what they were.
    #[serde(default)]
    beside: BTreeMap<String, String>,
}

impl Forwarding {
    /// What has to have which value, in the order in which it is set.
    fn settings(&self) -> Vec<(String, &'static str)> {
        let links = || std::iter::once(&self.bridge).chain(&self.uplinks);
        let mut settings = Vec::new();
        if self.v4 {
            settings.extend(links().map(|link| (format!("ipv4/conf/{link}/forwarding"), "1")));
        }
        if self.v6 {
            // Before forwarding is switched on, or the routes that were learnt from advertisements are lost.
            let learns =
                |link: &&IfName| read(&format!("ipv6/conf/{link}/accept_ra")).is_ok_and(|v| v != "0");
            let learning = self.uplinks.iter().filter(learns);
            settings.extend(learning.map(|link| (format!("ipv6/conf/{link}/accept_ra"), "2")));
            settings.push((FORWARD_V6.to_owned(), "1"));
        }
        settings
    }

    pub(crate) fn observe(&self) -> Result<Seen, NetError> {
        for (key, wanted) in self.settings() {
            match read(&key) {
                Ok(value) if value == wanted => {}
                Ok(value) => return Ok(Seen::Differs(format!("net/{key} is {value}"))),
                Err(fault) if fault.kind() == Some(ErrorKind::NotFound) => return Ok(Seen::Missing),
                Err(fault) => return Err(fault.into()),
            }
        }
        Ok(Seen::There)
    }

    /// Sets what has to be set, and notes first what it was.
    pub(crate) fn make(&self, ledger: &Path) -> Result<(), NetError> {
        let mut noted = load(ledger)?;
        for (key, wanted) in self.settings() {
            let was = read(&key)?;
            let entry = noted.entries.entry(key.clone());
            let entry = entry.or_insert_with(|| {
                let beside = if key == FORWARD_V6 { forwarding_beside() } else { BTreeMap::new() };
                Entry { was, set: wanted.to_owned(), users: BTreeSet::new(), beside }
            });
            entry.users.insert(self.network.clone());
        }
        save(ledger, &noted)?;
        for (key, wanted) in self.settings() {
            if read(&key)? != wanted {
                write(&key, wanted)?;
            }
        }
        Ok(())
    }

    /// The undo of [`Forwarding::make`]: what no other network needs is as it was, unless somebody else changed it.
    pub(crate) fn unmake(&self, ledger: &Path) -> Result<(), NetError> {
        let mut noted = load(ledger)?;
        let mut unused = Vec::new();
        for (key, entry) in &mut noted.entries {
            if entry.users.remove(&self.network) && entry.users.is_empty() {
                unused.push(key.clone());
            }
        }
        // The IPv6 switch before what was set ahead of it.
        unused.sort_by_key(|key| key != FORWARD_V6);
        for key in &unused {
            let Some(entry) = noted.entries.remove(key) else { continue };
            put_back(key, &entry)?;
        }
        save(ledger, &noted)
    }
}

fn put_back(key: &str, entry: &Entry) -> Result<(), NetError> {
    match read(key) {
        Ok(value) if value == entry.set && value != entry.was => write(key, &entry.was)?,
        Ok(_) => {}
        // An interface that is gone took its settings along.
        Err(fault) if fault.kind() == Some(ErrorKind::NotFound) => return Ok(()),
        Err(fault) => return Err(fault.into()),
    }
    for (key, was) in &entry.beside {
        if read(key).is_ok_and(|value| value != *was) {
            write(key, was)?;
        }
    }
    Ok(())
}

/// What the IPv6 switch of the host changes beside itself: that of every interface.
fn forwarding_beside() -> BTreeMap<String, String> {
    let dirs = fs::read_dir(Path::new(ROOT).join("ipv6/conf")).into_iter().flatten().flatten();
    let keys = dirs.filter_map(|dir| dir.file_name().into_string().ok());
    let keys = keys.filter(|name| name != "all").map(|name| format!("ipv6/conf/{name}/forwarding"));
    keys.filter_map(|key| read(&key).ok().map(|value| (key, value))).collect()
}

fn file(key: &str) -> PathBuf {
    Path::new(ROOT).join(key)
}

fn read(key: &str) -> Result<String, HostError> {
    let file = file(key);
    let text = fs::read_to_string(&file).map_err(HostError::io("read", &file))?;
    Ok(text.trim().to_owned())
}

fn write(key: &str, value: &str) -> Result<(), HostError> {
    let file = file(key);
    fs::write(&file, value).map_err(HostError::io("write", &file))
}

fn load(ledger: &Path) -> Result<Ledger, NetError> {
    let bytes = match files::read_bounded(ledger, LEDGER_MAX) {
        Ok(bytes) => bytes,
        Err(fault) if fault.kind() == Some(ErrorKind::NotFound) => return Ok(Ledger::default()),
        Err(fault) => return Err(fault.into()),
    };
    serde_json::from_slice(&bytes)
        .map_err(|fault| NetError::BadRecord { file: ledger.to_owned(), fault: fault.to_string() })
}

fn save(ledger: &Path, noted: &Ledger) -> Result<(), NetError> {
    if noted.entries.is_empty() {
        files::remove_durably(ledger)?;
        return Ok(());
    }
    let text = serde_json::to_vec_pretty(noted)
        .map_err(|fault| NetError::BadRecord { file: ledger.to_owned(), fault: fault.to_string() })?;
    Ok(files::write_durably(ledger, &text, 0o600)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_of_a_network_is_named() {
        let forwarding = Forwarding {
            network: "n1".parse().unwrap(),
            bridge: "sbr-n1".parse().unwrap(),
            uplinks: vec!["eth0".parse().unwrap()],
            v4: true,
            v6: true,
        };
        let keys: Vec<String> = forwarding.settings().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys[..2], ["ipv4/conf/sbr-n1/forwarding", "ipv4/conf/eth0/forwarding"]);
        assert_eq!(keys.last().unwrap(), FORWARD_V6);
    }

    #[test]
    fn a_ledger_is_read_as_it_was_written_and_gone_when_it_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let users = BTreeSet::from(["n1".parse().unwrap()]);
        let entry = Entry { was: "0".into(), set: "1".into(), users, beside: BTreeMap::new() };
        save(&path, &Ledger { entries: BTreeMap::from([("k".into(), entry)]) }).unwrap();
        assert_eq!(load(&path).unwrap().entries["k"].was, "0");
        save(&path, &Ledger::default()).unwrap();
        assert!(!path.exists());
        fs::write(&path, "{").unwrap();
        assert!(matches!(load(&path), Err(NetError::BadRecord { .. })));
    }
}
