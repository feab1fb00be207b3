//! DHCP and DNS: one dnsmasq process for a network, with a configuration of its own, on its bridge only.
//!
//! Source: dnsmasq(8); the lease file is described in its man page's NOTES and in src/lease.c.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use host::Error as HostError;
use host::files;
use host::program::Program;
use model::Name;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::part::{Places, Seen};
use crate::{MacAddress, NetError};

/// How long it may take to end before it is killed.
const PATIENCE: Duration = Duration::from_secs(3);
const POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
const RETRY: Duration = Duration::from_millis(20);
/// Most that is read of a file of leases.
const LEASES_MAX: u64 = 16 << 20;

/// The server of a network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dnsmasq {
    /// The network.
    pub network: Name,
    /// Its configuration, but for the files that are named by [`Places`].
    pub config: Vec<String>,
}

/// An address that a guest was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lease {
    /// When it ends, in seconds since 1970; none if never.
    pub until: Option<u64>,
    /// The guest's NIC; none for IPv6, where the lease is told by an identifier.
    pub mac: Option<MacAddress>,
    /// The address.
    pub address: IpAddr,
    /// What the guest calls itself.
    pub name: Option<String>,
}

impl Dnsmasq {
    fn config_file(&self, places: &Places) -> PathBuf {
        places.of(&self.network).join("dnsmasq.conf")
    }

    fn pid_file(&self, places: &Places) -> PathBuf {
        places.of(&self.network).join("dnsmasq.pid")
    }

    fn text(&self, places: &Places) -> String {
        let mut lines = vec![format!("# network {}, written by snapctl at each start", self.network)];
        lines.extend(self.config.iter().cloned());
        lines.push(format!("pid-file={}", self.pid_file(places).display()));
        lines.push(format!("dhcp-leasefile={}", places.leases(&self.network).display()));
        lines.join("\n") + "\n"
    }

    pub(crate) fn observe(&self, places: &Places) -> Result<Seen, NetError> {
        let file = self.config_file(places);
        let text = fs::read_to_string(&file).unwrap_or_default();
        Ok(match self.process(places) {
            None => Seen::Missing,
            Some(_) if text != self.text(places) => {
                Seen::Differs(format!("{} is not what it was started with", file.display()))
            }
            Some(_) => Seen::There,
        })
    }

    /// Starts it; one that runs with another configuration is started anew.
    pub(crate) fn make(&self, places: &Places) -> Result<(), NetError> {
        self.end(places)?;
        let (file, leases) = (self.config_file(places), places.leases(&self.network));
        // It reads its files as root and goes on as a user who may not.
        for path in [&file, &leases] {
            files::make_private_dir(files::parent(path))?;
        }
        fs::write(&file, self.text(places)).map_err(HostError::io("write", &file))?;
        let until = Instant::now() + PATIENCE;
        loop {
            match Program::new("dnsmasq").arg(argument(&file)).run() {
                // One that somebody has just killed gives its sockets back in a moment.
                Err(fault)
                    if fault.to_string().contains("Address already in use") && Instant::now() < until =>
                {
                    std::thread::sleep(RETRY);
                }
                done => return Ok(done.map(drop)?),
            }
        }
    }

    /// The undo of [`Dnsmasq::make`]; leases stay.
    pub(crate) fn unmake(&self, places: &Places) -> Result<(), NetError> {
        self.end(places)?;
        for file in [self.config_file(places), self.pid_file(places)] {
            files::remove_durably(&file)?;
        }
        let dir = places.of(&self.network);
        match fs::remove_dir(&dir) {
            Err(fault) if fault.kind() != std::io::ErrorKind::NotFound => {
                Err(HostError::io("remove", &dir)(fault).into())
            }
            _ => Ok(()),
        }
    }

    /// Ends it, however it is known: one whose pid file was not written yet is found by its command line.
    fn end(&self, places: &Places) -> Result<(), NetError> {
        let file = self.config_file(places);
        let until = Instant::now() + PATIENCE;
        while let Some(pid) = running(&argument(&file)) {
            let signal = if Instant::now() < until { Signal::TERM } else { Signal::KILL };
            let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
            if !is_it(pid, &argument(&file)) {
                continue;
            }
            let _ = pidfd_send_signal(&handle, signal);
            // Readable once it has ended: its sockets are closed then, which an empty command line does not tell.
            let _ = poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&POLL));
        }
        Ok(())
    }

    fn process(&self, places: &Places) -> Option<Pid> {
        let text = fs::read_to_string(self.pid_file(places)).ok()?;
        let pid = Pid::from_raw(text.trim().parse().ok()?)?;
        is_it(pid, &argument(&self.config_file(places))).then_some(pid)
    }
}

/// By which its process is known.
fn argument(config: &Path) -> String {
    format!("--conf-file={}", config.display())
}

fn is_it(pid: Pid, argument: &str) -> bool {
    let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0);
    let program = words.next().unwrap_or_default();
    program.ends_with(b"dnsmasq") && words.any(|word| word == argument.as_bytes())
}

fn running(argument: &str) -> Option<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    pids.find(|pid| is_it(*pid, argument))
}

/// The leases of a network, those that ended left out; `now` is in seconds since 1970.
///
/// # Errors
/// [`NetError::Host`]. A file that is not there holds none; a line that cannot be understood is none.
pub fn leases(file: &Path, now: u64) -> Result<Vec<Lease>, NetError> {
    let bytes = match files::read_bounded(file, LEASES_MAX) {
        Ok(bytes) => bytes,
        Err(fault) if fault.kind() == Some(std::io::ErrorKind::NotFound) => return Ok(Vec::new()),
        Err(fault) => return Err(fault.into()),
    };
    let text = String::from_utf8_lossy(&bytes);
    let leases = text.lines().filter_map(lease);
    Ok(leases.filter(|lease| lease.until.is_none_or(|until| until > now)).collect())
}

fn lease(line: &str) -> Option<Lease> {
    let mut words = line.split(' ');
    let until: u64 = words.next()?.parse().ok()?;
    let mac = words.next()?.parse().ok();
    let address = words.next()?.parse().ok()?;
    // What a guest calls itself goes to a terminal.
    let plain =
        |name: &&str| !name.is_empty() && *name != "*" && name.bytes().all(|byte| byte.is_ascii_graphic());
    let name = words.next().filter(plain).map(str::to_owned);
    Some(Lease { until: Some(until).filter(|until| *until > 0), mac, address, name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_read_and_what_cannot_be_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("leases");
        let text = "1700000100 52:54:00:00:00:01 10.99.1.100 vm1 01:52:54:00:00:00:01\n\
            0 52:54:00:00:00:02 10.99.1.101 * *\n\
            1600000000 52:54:00:00:00:03 10.99.1.102 old *\n\
            duid 00:01:00:01:2e\n\
            1700000100 11259375 fd00:99:1::100 vm1 00:01\n\
            rubbish\n1700000100 52:54:00:00:00:04 10.99.1.103 a\u{1b}[2Jb *\n";
        fs::write(&file, text).unwrap();
        let found = leases(&file, 1_700_000_000).unwrap();
        let addresses: Vec<String> = found.iter().map(|lease| lease.address.to_string()).collect();
        assert_eq!(addresses, ["10.99.1.100", "10.99.1.101", "fd00:99:1::100", "10.99.1.103"]);
        assert_eq!(found[0].name.as_deref(), Some("vm1"));
        assert_eq!(found[1].until, None);
        assert_eq!(found[2].mac, None);
        assert_eq!(found[3].name, None, "no escape sequences");
        assert!(leases(&dir.path().join("none"), 0).unwrap().is_empty());
    }
}
