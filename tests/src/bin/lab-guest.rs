//! The program that runs inside a lab guest: writes records, dirties the page cache, runs commands.
//!
//! `lab-guest CONTROL PROGRESS MOUNT...` is told what to do in lines on CONTROL (a virtio-serial port),
//! `ID COMMAND [ARGS]`, and answers `ID ok [TEXT]` or `ID err TEXT`. After each synced record it
//! writes `DISK SEQ TIME_NS` to PROGRESS, where DISK is the last component of its MOUNT.
//!
//! | command | does |
//! | --- | --- |
//! | `ping` | answers |
//! | `start [PER_SECOND]` | starts the writers, one for each MOUNT; 0 means as fast as they can |
//! | `stop` | stops the writers and the dirtier; answers when the last of them has stopped |
//! | `wait SEQ` | answers when every disk has synced SEQ |
//! | `dirty DISK MIB MIB_PER_SECOND` | dirties a file of MIB again and again, without any sync |
//! | `stalls` | longest time that one write stood still, in µs, since the last `stalls` |
//! | `exec COMMAND` | runs a shell command; answers `STATUS OUTPUT` |

#[path = "../lab/record.rs"]
#[allow(dead_code, reason = "the guest writes records, the host reads them")]
mod record;

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use record::{RECORD_SIZE, Record};

/// How much the dirtier writes at once: small enough that a stall is one write's.
const DIRTY_CHUNK: usize = 64 << 10;
/// A control line is a short command.
const LINE_LIMIT: u64 = 64 << 10;

fn main() -> io::Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(control), Some(progress)) = (args.next(), args.next()) else {
        return Err(io::Error::other("usage: lab-guest CONTROL PROGRESS MOUNT..."));
    };
    let port = OpenOptions::new().read(true).write(true).open(control)?;
    let guest = Arc::new(Guest::new(args.collect(), OpenOptions::new().write(true).open(progress)?));
    for disk in 0..guest.mounts.len() {
        spawn_writer(&guest, disk)?;
    }
    serve(&guest, &port)
}

/// What the threads share.
struct Guest {
    mounts: Vec<PathBuf>,
    /// For each mount, the highest synced sequence number.
    synced: Vec<AtomicU64>,
    progress: Mutex<File>,
    orders: Mutex<Orders>,
    changed: Condvar,
    write_stall: Stall,
    dirty_stall: Stall,
}

/// What the threads are asked to do, and how many are at it.
#[derive(Default)]
struct Orders {
    writing: bool,
    per_second: u32,
    /// Counts `dirty` and `stop`; a dirtier of an older number ends.
    dirty_turn: u64,
    busy: usize,
    failed: Option<String>,
}

/// The longest and the total time of one kind of write.
#[derive(Default)]
struct Stall {
    longest_us: AtomicU64,
    count: AtomicU64,
}

impl Stall {
    fn note(&self, since: Instant) {
        self.longest_us.fetch_max(since.elapsed().as_micros() as u64, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    fn take(&self) -> (u64, u64) {
        (self.longest_us.swap(0, Ordering::Relaxed), self.count.swap(0, Ordering::Relaxed))
    }
}

impl Guest {
    fn new(mounts: Vec<PathBuf>, progress: File) -> Self {
        Self {
            synced: mounts.iter().map(|_| AtomicU64::new(0)).collect(),
            mounts,
            progress: Mutex::new(progress),
            orders: Mutex::default(),
            changed: Condvar::new(),
            write_stall: Stall::default(),
            dirty_stall: Stall::default(),
        }
    }

    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Orders)) {
        change(&mut self.orders());
        self.changed.notify_all();
    }

    fn wait_until(&self, mut done: impl FnMut(&Orders) -> bool) -> MutexGuard<'_, Orders> {
        let guard = self.changed.wait_while(self.orders(), |orders| !done(orders));
        guard.unwrap_or_else(PoisonError::into_inner)
    }

    fn name(&self, disk: usize) -> String {
        self.mounts[disk].file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Tells the host, then those who wait inside.
    fn report(&self, disk: usize, record: &Record) -> io::Result<()> {
        let line = format!("{} {} {}\n", self.name(disk), record.seq, record.time_ns);
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes())?;
        self.synced[disk].store(record.seq, Ordering::SeqCst);
        self.change(|_| ());
        Ok(())
    }
}

fn spawn_writer(guest: &Arc<Guest>, disk: usize) -> io::Result<()> {
    let guest = Arc::clone(guest);
    std::thread::Builder::new().name(format!("writer{disk}")).spawn(move || {
        loop {
            let per_second = {
                let mut orders = guest.wait_until(|orders| orders.writing);
                orders.busy += 1;
                orders.per_second
            };
            let result = write_records(&guest, disk, per_second);
            guest.change(|orders| {
                orders.busy -= 1;
                if let Err(error) = result {
                    orders.failed = Some(format!("{}: {error}", guest.name(disk)));
                    orders.writing = false;
                }
            });
        }
    })?;
    Ok(())
}

/// Appends records until told to stop; goes on after the last whole record that is there.
fn write_records(guest: &Guest, disk: usize, per_second: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(guest.mounts[disk].join("records"))?;
    let mut seq = file.metadata()?.len() / RECORD_SIZE as u64;
    file.set_len(seq * RECORD_SIZE as u64)?;
    let pause = Duration::from_secs(1).checked_div(per_second).unwrap_or_default();
    let mut due = Instant::now();
    while guest.orders().writing {
        seq += 1;
        let synced = guest.synced.iter().map(|seq| seq.load(Ordering::SeqCst)).collect();
        let record = Record { disk: disk as u32, seq, time_ns: now_ns(), synced };
        let since = Instant::now();
        file.write_all(&record.encode())?;
        file.sync_data()?;
        guest.write_stall.note(since);
        guest.report(disk, &record)?;
        due = pace(due + pause);
    }
    Ok(())
}

/// Sleeps until `due`; returns it, or now when it has passed, so that lost time is not made up for.
fn pace(due: Instant) -> Instant {
    let now = Instant::now();
    match due.checked_duration_since(now) {
        Some(rest) => {
            std::thread::sleep(rest);
            due
        }
        None => now,
    }
}

fn spawn_dirtier(guest: &Arc<Guest>, mount: &Path, mib: u64, per_second: u64) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).write(true).truncate(false).open(mount.join("dirty"))?;
    let turn = {
        let mut orders = guest.orders();
        orders.dirty_turn += 1;
        orders.busy += 1;
        orders.dirty_turn
    };
    let guest = Arc::clone(guest);
    std::thread::Builder::new().name("dirtier".to_owned()).spawn(move || {
        let result = dirty(&guest, &mut file, turn, mib << 20, per_second << 20);
        guest.change(|orders| {
            orders.busy -= 1;
            if let Err(error) = result {
                orders.failed = Some(format!("dirty: {error}"));
            }
        });
    })?;
    Ok(())
}

fn dirty(guest: &Guest, file: &mut File, turn: u64, size: u64, per_second: u64) -> io::Result<()> {
    let pause = Duration::from_secs_f64(DIRTY_CHUNK as f64 / per_second.max(1) as f64);
    let mut chunk = vec![0_u8; DIRTY_CHUNK];
    let (mut at, mut due) = (0_u64, Instant::now());
    while guest.orders().dirty_turn == turn {
        chunk[..8].copy_from_slice(&now_ns().to_le_bytes());
        file.seek(SeekFrom::Start(at))?;
        let since = Instant::now();
        file.write_all(&chunk)?;
        guest.dirty_stall.note(since);
        at = (at + DIRTY_CHUNK as u64) % size.max(DIRTY_CHUNK as u64);
        due = pace(due + pause);
    }
    Ok(())
}

/// Reads commands and answers each from its own thread, so that one that hangs on a frozen file
/// system does not silence the rest.
fn serve(guest: &Arc<Guest>, port: &File) -> io::Result<()> {
    let replies = Arc::new(Mutex::new(port.try_clone()?));
    let mut lines = BufReader::new(port);
    loop {
        let mut line = String::new();
        if lines.by_ref().take(LINE_LIMIT).read_line(&mut line)? == 0 {
            // The host side is not connected: the port reads as ended until somebody comes.
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        let (guest, replies) = (Arc::clone(guest), Arc::clone(&replies));
        std::thread::spawn(move || {
            let Some((id, command)) = line.trim_end().split_once(' ') else { return };
            let reply = match obey(&guest, command) {
                Ok(text) => format!("{id} ok {}\n", text.escape_default()),
                Err(error) => format!("{id} err {}\n", error.to_string().escape_default()),
            };
            let mut port = replies.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody to tell when the host has gone; the next command comes on the same port.
            let _ = port.write_all(reply.as_bytes());
        });
    }
}

fn obey(guest: &Arc<Guest>, command: &str) -> io::Result<String> {
    let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
    match verb {
        "ping" => Ok("pong".to_owned()),
        "start" => start(guest, number(rest).unwrap_or(0) as u32),
        "stop" => stop(guest),
        "wait" => wait(guest, number(rest)?),
        "dirty" => start_dirtier(guest, rest),
        "stalls" => Ok(stalls(guest)),
        "exec" => exec(rest),
        _ => Err(io::Error::other(format!("no command {verb:?}"))),
    }
}

fn start(guest: &Guest, per_second: u32) -> io::Result<String> {
    guest.change(|orders| {
        orders.writing = true;
        orders.per_second = per_second;
        orders.failed = None;
    });
    Ok(String::new())
}

fn stop(guest: &Guest) -> io::Result<String> {
    guest.change(|orders| {
        orders.writing = false;
        orders.dirty_turn += 1;
    });
    failure(&guest.wait_until(|orders| orders.busy == 0))
}

fn wait(guest: &Guest, seq: u64) -> io::Result<String> {
    let there = || guest.synced.iter().all(|synced| synced.load(Ordering::SeqCst) >= seq);
    failure(&guest.wait_until(|orders| there() || orders.failed.is_some()))
}

fn failure(orders: &Orders) -> io::Result<String> {
    orders.failed.as_ref().map_or(Ok(String::new()), |failed| Err(io::Error::other(failed.clone())))
}

fn start_dirtier(guest: &Arc<Guest>, args: &str) -> io::Result<String> {
    let [disk, mib, per_second] = args.split(' ').collect::<Vec<_>>()[..] else {
        return Err(io::Error::other("dirty DISK MIB MIB_PER_SECOND"));
    };
    let mount = guest.mounts.iter().find(|mount| mount.ends_with(disk));
    let mount = mount.ok_or_else(|| io::Error::other(format!("no disk {disk:?}")))?;
    spawn_dirtier(guest, mount, number(mib)?, number(per_second)?)?;
    Ok(String::new())
}

fn stalls(guest: &Guest) -> String {
    let ((write_us, writes), (dirty_us, dirties)) = (guest.write_stall.take(), guest.dirty_stall.take());
    format!("write_us={write_us} writes={writes} dirty_us={dirty_us} dirties={dirties}")
}

fn exec(command: &str) -> io::Result<String> {
    let output = Command::new("/bin/sh").arg("-c").arg(command).output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok(format!("{} {}", output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text)))
}

fn number(text: &str) -> io::Result<u64> {
    text.trim().parse().map_err(|_| io::Error::other(format!("not a number: {text:?}")))
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}
