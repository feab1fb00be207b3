//! From an error to an exit code, a message and a hint. Only this file knows the codes.

use std::fmt;
use std::process::ExitCode;

use agent_client::GuardError;
use host::program::ProgramError;
use model::Name;
use net::NetError;
use serde_json::json;
use snapshot::{Error, Fate, Refusal, StepError};
use storage::PoolError;
use storage::overlay::OverlayError;

use crate::output;

/// Exit codes, as the design promises them to scripts.
pub mod code {
    /// Failed; nothing was changed, or all of it was undone.
    pub const FAILED: u8 = 1;
    /// The command line or a definition is wrong.
    pub const USAGE: u8 = 2;
    /// Done, with warnings that a person should read.
    pub const WARNINGS: u8 = 3;
    /// The guest could not be quiesced; nothing was taken.
    pub const NOT_QUIESCED: u8 = 4;
    /// The thaw is unconfirmed.
    pub const THAW_UNCONFIRMED: u8 = 5;
    /// No such VM, snapshot, disk.
    pub const NOT_FOUND: u8 = 6;
    /// Refused as unsafe.
    pub const REFUSED: u8 = 7;
    /// Failed part-way.
    pub const PART_WAY: u8 = 8;
    /// VM or socket not reachable.
    pub const UNREACHABLE: u8 = 9;
    /// Somebody holds the lock.
    pub const BUSY: u8 = 11;
    /// Verification found damage.
    pub const DAMAGE: u8 = 13;
}

/// An error as the user meets it.
struct Told {
    code: u8,
    hint: Option<String>,
}

/// Says of an error that the guest may still be frozen; goes around the error as its context.
#[derive(Debug)]
pub struct MayBeFrozen {
    /// The VM.
    pub vm: Name,
    /// The guard's process, which keeps trying to thaw and has the agent's socket; 0 if there is none.
    pub guard: u32,
}

impl fmt::Display for MayBeFrozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} may still be frozen", self.vm)
    }
}

/// Tells the user what failed, on stderr or as a JSON document, and gives the exit code.
pub fn tell(fault: &anyhow::Error, json: bool, quiet: bool) -> ExitCode {
    if output::is_broken_pipe(fault) {
        return ExitCode::from(code::FAILED);
    }
    let told = sort(fault);
    let message = message(fault);
    if json {
        let error = json!({ "exit_code": told.code, "message": message, "hint": told.hint });
        let _ = output::document("snapctl.error/1", &json!({ "error": error }));
    }
    output::note(&format!("snapctl: {message}"));
    if let Some(hint) = told.hint.filter(|_| !quiet) {
        output::note(&format!("hint: {hint}"));
    }
    ExitCode::from(told.code)
}

/// An error about one of several VMs, for a document that tells of all.
pub fn as_json(vm: &Name, fault: &anyhow::Error) -> serde_json::Value {
    let told = sort(fault);
    json!({ "vm": vm, "exit_code": told.code, "message": message(fault), "hint": told.hint })
}

/// The chain of causes, each said once: the house's own errors hold their causes' texts already.
fn message(fault: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in fault.chain() {
        let text = cause.to_string();
        if !said.contains(&text) {
            said.push_str(if said.is_empty() { "" } else { ": " });
            said.push_str(&text);
        }
        if cause.is::<Error>() || cause.is::<vm::Error>() {
            break;
        }
    }
    said
}

/// Tells what is wrong with the command line, in clap's words; help and version are no faults.
pub fn tell_usage(fault: &clap::Error) -> ExitCode {
    let wrong = fault.use_stderr();
    if wrong && std::env::args_os().any(|argument| argument == "--json") {
        let text = fault.to_string();
        let error = json!({ "exit_code": code::USAGE, "message": text.trim_end(), "hint": null });
        let _ = output::document("snapctl.error/1", &json!({ "error": error }));
    }
    // Nobody is left to be told if the stream is gone.
    let _ = fault.print();
    ExitCode::from(if wrong { code::USAGE } else { 0 })
}

fn sort(fault: &anyhow::Error) -> Told {
    if let Some(MayBeFrozen { vm, guard }) = fault.downcast_ref() {
        return Told { code: code::THAW_UNCONFIRMED, hint: Some(thaw_hint(vm, *guard)) };
    }
    if let Some(fault) = fault.downcast_ref::<Error>() {
        return snapshot_error(fault);
    }
    if let Some(fault) = fault.downcast_ref::<vm::Error>() {
        return vm_error(fault);
    }
    if let Some(fault) = fault.downcast_ref::<agent_client::Error>() {
        return Told { code: conversation(fault), hint: None };
    }
    if fault.downcast_ref::<GuardError>().is_some() {
        return Told { code: code::NOT_QUIESCED, hint: None };
    }
    Told { code: code::FAILED, hint: None }
}

fn snapshot_error(fault: &Error) -> Told {
    let told = |code, hint: &str| Told { code, hint: Some(hint.to_owned()).filter(|hint| !hint.is_empty()) };
    match fault {
        Error::Vm(fault) => vm_error(fault),
        Error::Refused(refusal) => refused(refusal),
        Error::Step { fate: fate @ Fate::PartlyUndone(_), .. } => told(
            after(fate, code::FAILED),
            "'snapctl recover' undoes the rest as soon as nothing is in its way",
        ),
        Error::Step {
            fate,
            source:
                source @ (StepError::OtherFile(_) | StepError::InUse { .. } | StepError::MaybeInUse { .. }),
            ..
        } => told(after(fate, code::REFUSED), step_hint(source)),
        Error::Step { fate, source, .. } => told(after(fate, code::FAILED), step_hint(source)),
        Error::NotQuiesced { vm, fate, .. } => told(
            after(fate, code::NOT_QUIESCED),
            &format!(
                "'snapctl doctor {vm}' looks at its agent; --quiesce=try takes a crash-consistent snapshot where the guest cannot be frozen"
            ),
        ),
        Error::ThawUnconfirmed { vm, source, .. } => {
            let guard = match source {
                GuardError::ThawUnconfirmed { guard, .. } => *guard,
                _ => 0,
            };
            told(code::THAW_UNCONFIRMED, &thaw_hint(vm, guard))
        }
        Error::Interrupted { signal, fate } => {
            told(after(fate, u8::try_from(128 + signal).unwrap_or(code::FAILED)), "")
        }
        Error::NoSuchSnapshot { known, vm, .. } if known.is_empty() => {
            told(code::NOT_FOUND, &format!("{vm} has no snapshots yet; 'snapctl create {vm}' takes one"))
        }
        Error::NoSuchSnapshot { known, .. } => told(code::NOT_FOUND, &format!("there are: {}", names(known))),
        Error::Ambiguous { matches, .. } => {
            told(code::USAGE, &format!("write more of one of: {}", names(matches)))
        }
        Error::Unsettled { vm, .. } => {
            told(code::PART_WAY, &format!("remove what is in the way, then run 'snapctl recover {vm}'"))
        }
    }
}

/// What to do about a guest that may be frozen: `guard` is the process that still tries to thaw it, or 0.
fn thaw_hint(vm: &Name, guard: u32) -> String {
    match guard {
        0 => format!("'snapctl guest thaw {vm}' tries again and says when it is done"),
        // It serves one client, and that is the guard until its thaw is answered.
        _ => format!(
            "'snapctl guest thaw {vm} --wait 300' waits for the agent's socket and says when it is done"
        ),
    }
}

/// A failure that left something behind is always told by the same code.
fn after(fate: &Fate, clean: u8) -> u8 {
    match fate {
        Fate::Untouched | Fate::Undone => clean,
        Fate::PartlyUndone(_) | Fate::Interrupted(_) => code::PART_WAY,
    }
}

fn step_hint(source: &StepError) -> &'static str {
    match source {
        StepError::State(vm::Error::Pool(PoolError::OverThreshold { .. })) => {
            "extend the thin pool, or delete snapshots"
        }
        StepError::Space(_) => "make room on that file system, or move disks to another one",
        StepError::InUse { .. } => "end that process, or register the VM that it is",
        StepError::OtherFile(_) => {
            "QEMU writes to the file that it opened: find it with 'ls -l /proc/PID/fd', and put it back in its place"
        }
        StepError::Host(fault) | StepError::Overlay(OverlayError::Host(fault)) if is_denied(fault) => {
            "run snapctl as root, or as the user who owns the images"
        }
        _ => "",
    }
}

fn refused(refusal: &Refusal) -> Told {
    let told = |code, hint: String| Told { code, hint: Some(hint) };
    match refusal {
        Refusal::NameTaken { .. } => told(code::REFUSED, "choose another --name, or leave it out".into()),
        Refusal::TooManyLabels(_) => Told { code: code::USAGE, hint: None },
        Refusal::Disk(fault) => vm_error(fault),
        Refusal::NoDisk { .. } => Told { code: code::REFUSED, hint: None },
        Refusal::DiskSkipped { .. } => told(code::REFUSED, "leave it out of --disk".into()),
        Refusal::DiskUnfit { others, .. } if others.is_empty() => Told { code: code::REFUSED, hint: None },
        Refusal::DiskUnfit { others, .. } => {
            let flags: Vec<String> = others.iter().map(|disk| format!("--disk {disk}")).collect();
            told(code::REFUSED, format!("to snapshot the others: {}", flags.join(" ")))
        }
        Refusal::BitmapBusy { .. } => told(
            code::REFUSED,
            "wait until the backup that uses it has ended, or end it, and run this again".into(),
        ),
        Refusal::JobActive { vm, .. } => told(
            code::REFUSED,
            format!("wait until it has ended; 'snapctl vm call {vm} query-jobs' shows it"),
        ),
        Refusal::MigrationActive { vm, .. } => told(
            code::REFUSED,
            format!("wait until it has ended; 'snapctl vm call {vm} query-migrate' shows it"),
        ),
        Refusal::StaleLayer { active, disk, .. } => told(
            code::REFUSED,
            format!(
                "stop the VM at once: every write spoils the snapshot. Start disk {disk} from {}",
                active.display()
            ),
        ),
        Refusal::CopyExists { .. } => told(
            code::REFUSED,
            "nothing is overwritten: choose another directory, or move that file away".into(),
        ),
        Refusal::EncryptedOffline { vm, .. } => told(
            code::REFUSED,
            format!("start {vm} from the layers that 'snapctl disk path' tells, and run this again"),
        ),
        Refusal::NotInternal { .. } => {
            told(code::REFUSED, "leave --method out: overlays work on every format".into())
        }
        Refusal::CopyOfInternal { .. } => told(
            code::REFUSED,
            "stop the VM, and use 'qemu-img convert -l snapshot.name=TAG'; 'snapctl show' tells the tag".into(),
        ),
        Refusal::InternalOfSome => told(code::USAGE, "leave --disk out, or --method".into()),
        Refusal::InternalBelow { .. } => told(
            code::REFUSED,
            "delete the snapshots that were taken on overlays since, so that the image is the active layer again".into(),
        ),
        Refusal::HoldsInternal { .. } => told(
            code::REFUSED,
            "delete those first; 'qemu-img snapshot -l' lists them, and 'snapctl list' those that snapctl made".into(),
        ),
        Refusal::NotAside { .. } => {
            told(code::REFUSED, "leave --method out: overlays work on every file system".into())
        }
        Refusal::NoOverlayDir { .. } => Told { code: code::USAGE, hint: None },
        Refusal::AsideMemory => told(code::USAGE, "leave --memory out, or --method".into()),
        Refusal::FrozenMemory => told(code::USAGE, "leave --quiesce and --mountpoint out".into()),
        Refusal::MemoryOfPaused { vm, .. } => {
            told(code::REFUSED, format!("let it go on ('snapctl vm call {vm} cont'), or leave --memory out"))
        }
        Refusal::NoLiveMemory { .. } => told(
            code::REFUSED,
            "--memory=stop saves it while the guest stands still; --memory takes the better of both".into(),
        ),
        Refusal::Paused { vm, .. } => told(
            code::NOT_QUIESCED,
            format!(
                "without --quiesce a paused VM can be snapshotted; 'snapctl vm call {vm} cont' lets it run"
            ),
        ),
        Refusal::Protected { vm, snapshot } => {
            told(code::REFUSED, format!("'snapctl unprotect {vm} {snapshot}' lets go of it"))
        }
        Refusal::NotInSnapshot { vm, snapshot, .. } => {
            told(code::NOT_FOUND, format!("'snapctl show {vm} {snapshot}' lists what it holds"))
        }
        Refusal::NothingToRevert { vm, snapshot } => told(
            code::REFUSED,
            format!("'snapctl show {vm} {snapshot}' lists its disks; revert --to-new DIR copies them"),
        ),
        Refusal::Resized { .. } => told(code::REFUSED, "stop the VM; then it can be reverted".into()),
        Refusal::Chain(fault) => told(code::REFUSED, fault.advice().to_owned()),
        Refusal::ChainDiffers { .. } => told(
            code::REFUSED,
            "'snapctl check' and 'snapctl vm call VM query-block' show both; was a header changed by another tool?"
                .into(),
        ),
        Refusal::NoRoom(_) => {
            told(code::FAILED, "make room on that file system, or move disks to another one".into())
        }
        Refusal::ChainTooLong { .. } => told(code::REFUSED, "delete or merge older snapshots first".into()),
    }
}

fn net_error(fault: &NetError) -> Told {
    let told = |code, hint: &str| Told { code, hint: Some(hint.to_owned()).filter(|hint| !hint.is_empty()) };
    match fault {
        NetError::Host(fault) if is_denied(fault) => told(code::FAILED, "run snapctl as root"),
        NetError::NoPrivilege { .. } => {
            told(code::REFUSED, "run snapctl as root: networks take CAP_NET_ADMIN")
        }
        NetError::Program(ProgramError::Missing { .. }) => {
            told(code::FAILED, "install it; 'snapctl doctor' tells what each kind of network needs")
        }
        NetError::Host(_)
        | NetError::Program(_)
        | NetError::Fault(_)
        | NetError::Netlink { .. }
        | NetError::NotAsMade { .. } => told(code::FAILED, ""),
        NetError::Interrupted(signal) => told(u8::try_from(128 + signal.0).unwrap_or(code::FAILED), ""),
        NetError::NoSuchKind { .. } => {
            let kinds: Vec<&str> = net::network::KINDS.iter().map(|kind| kind.name).collect();
            told(code::USAGE, &format!("the kinds are: {}", kinds.join(", ")))
        }
        NetError::BadDefinition { .. } => {
            told(code::USAGE, "'snapctl net define --help' tells which options each kind has")
        }
        NetError::SubnetTaken { .. } | NetError::NoFreeSubnet { .. } => {
            told(code::REFUSED, "choose a free one with --subnet; without --subnet snapctl chooses one")
        }
        NetError::NoInterface { .. } => told(code::REFUSED, "'ip link' lists the interfaces that there are"),
        NetError::InterfaceTaken { .. } | NetError::MacTaken { .. } => told(code::REFUSED, "choose another"),
        NetError::Refused { .. } => told(code::REFUSED, ""),
        NetError::NotStarted { network } => {
            told(code::REFUSED, &format!("'snapctl net start {network}' starts it"))
        }
        NetError::NoSuchPort { network, .. } => {
            told(code::NOT_FOUND, &format!("'snapctl net show {network}' lists its ports"))
        }
        NetError::BadRecord { .. } => told(
            code::REFUSED,
            "move it away if the network is to be started anew; what it names then stays on the host",
        ),
        NetError::PartlyUndone { .. } | NetError::PartlyStopped { .. } => {
            told(code::PART_WAY, "'snapctl recover' tries again")
        }
    }
}

fn pool_error(fault: &PoolError) -> Told {
    let told = |code, hint: &str| Told { code, hint: Some(hint.to_owned()).filter(|hint| !hint.is_empty()) };
    match fault {
        PoolError::Host(fault) if is_denied(fault) => {
            told(code::FAILED, "run snapctl as root, or as the user who owns the pool")
        }
        PoolError::Host(_)
        | PoolError::Fault(_)
        | PoolError::Program(_)
        | PoolError::Unreadable { .. }
        | PoolError::Differs { .. } => told(code::FAILED, ""),
        PoolError::Interrupted(signal) => told(u8::try_from(128 + signal.0).unwrap_or(code::FAILED), ""),
        PoolError::NoSuchKind { .. } => {
            let kinds: Vec<&str> = storage::pool::KINDS.iter().map(|kind| kind.name).collect();
            told(code::USAGE, &format!("the kinds are: {}", kinds.join(", ")))
        }
        PoolError::BadDefinition { .. } => {
            told(code::USAGE, "'snapctl pool define --help' tells which options each kind has")
        }
        PoolError::BadName { .. } | PoolError::Contradiction(_) => told(code::USAGE, ""),
        PoolError::Broken { .. } => {
            told(code::REFUSED, "nothing was opened by QEMU; 'snapctl volume delete' removes it")
        }
        PoolError::WrongPlace { .. } => {
            told(code::REFUSED, "mount or connect what the pool was defined on; nothing was written")
        }
        PoolError::NotStarted { pool, .. } => {
            told(code::REFUSED, &format!("'snapctl pool start {pool}' starts it"))
        }
        PoolError::NoSuchVolume { known, .. } if known.is_empty() => {
            told(code::NOT_FOUND, "the pool is empty")
        }
        PoolError::NoSuchVolume { known, .. } => {
            told(code::NOT_FOUND, &format!("there are: {}", names(known)))
        }
        PoolError::VolumeExists { .. } => {
            told(code::REFUSED, "choose another name, or delete that volume first")
        }
        PoolError::Unsupported { pool, .. } => {
            told(code::REFUSED, &format!("'snapctl pool show {pool}' tells what it can do"))
        }
        PoolError::InUse { .. } => told(
            code::REFUSED,
            "stop the VM or end that process; of a running VM take a snapshot, and use that",
        ),
        PoolError::PoolInUse { .. } => told(code::REFUSED, "stop the VM or end that process"),
        PoolError::Foreign { adopt, .. } => told(code::REFUSED, &format!("'{adopt}' makes it snapctl's")),
        PoolError::HasOverlays { .. } => told(code::REFUSED, "delete or convert those first"),
        PoolError::Chain(fault) => told(code::REFUSED, fault.advice()),
        PoolError::Qcow2(_) | PoolError::Vmdk(_) => {
            told(code::REFUSED, "nothing was opened by QEMU; get the image from where it came from again")
        }
        PoolError::Aes { .. } => {
            told(code::REFUSED, "let the QEMU that made it convert it to LUKS or to no encryption")
        }
        PoolError::LooksOther { looks, .. } => told(
            code::REFUSED,
            &format!("--from {looks} imports it as what it looks like, --from raw takes it as it is"),
        ),
        PoolError::FormatUnknown { .. } => {
            told(code::USAGE, "name it: --from FORMAT, or --format FORMAT of an export")
        }
        PoolError::Space(_) | PoolError::Full { .. } => {
            told(code::FAILED, "make room, or use another pool; nothing was changed")
        }
        PoolError::OverThreshold { pool, .. } => told(
            code::REFUSED,
            &format!(
                "extend it (lvextend), or delete volumes; 'snapctl pool show {pool}' tells how full it is"
            ),
        ),
        PoolError::WouldShrink { .. } => told(code::REFUSED, "--shrink does it; shrink what is inside first"),
        PoolError::TargetExists { .. } => told(code::REFUSED, "nothing is overwritten: choose another name"),
    }
}

fn vm_error(fault: &vm::Error) -> Told {
    use vm::Error;

    let told = |code, hint: String| Told { code, hint: Some(hint) };
    match fault {
        Error::NoSuchVm { name, known } if known.is_empty() => told(
            code::NOT_FOUND,
            format!("no VM is registered yet: 'snapctl vm add {name} --qmp PATH --agent PATH' registers one, 'snapctl vm discover' finds running ones"),
        ),
        Error::NoSuchVm { known, .. } => told(code::NOT_FOUND, format!("registered are: {}", names(known))),
        Error::NoSuchDisk { known, .. } if known.is_empty() => told(
            code::NOT_FOUND,
            "no disks are known of a VM that does not run and has no snapshots; start it first".into(),
        ),
        Error::NoSuchDisk { known, .. } => told(code::NOT_FOUND, format!("its disks are: {}", known.join(", "))),
        Error::AmbiguousDisk { disks, .. } => told(
            code::USAGE,
            format!("each goes by a name of its own: {}; aliases are in the VM's definition", disks.join(", ")),
        ),
        Error::NoSuchPool { name, known } if known.is_empty() => told(
            code::NOT_FOUND,
            format!("no pool is defined yet: 'snapctl pool define {name} dir --path DIR' defines one"),
        ),
        Error::NoSuchPool { known, .. } => told(code::NOT_FOUND, format!("defined are: {}", names(known))),
        Error::PoolNameTaken { name, .. } => {
            told(code::REFUSED, format!("'snapctl pool remove {name}' first, or choose another name"))
        }
        Error::SamePlace { other, .. } => told(code::REFUSED, format!("use pool {other}, or another place")),
        Error::PoolBusy { .. } => told(code::BUSY, "--wait SECONDS waits for it".into()),
        Error::Claimed { .. } => told(
            code::REFUSED,
            "delete the VM's snapshots, and remove the VM ('snapctl vm remove'), or leave the volume to it".into(),
        ),
        Error::Pool(fault) => pool_error(fault),
        Error::NoSuchNetwork { name, known } if known.is_empty() => told(
            code::NOT_FOUND,
            format!("no network is defined; 'snapctl net define {name} nat' defines one"),
        ),
        Error::NoSuchNetwork { known, .. } => told(code::NOT_FOUND, format!("there are: {}", names(known))),
        Error::NetworkNameTaken { name, .. } => {
            told(code::REFUSED, format!("choose another name, edit that file, or 'snapctl net remove {name}' first"))
        }
        Error::NetworkStarted { name } => told(code::REFUSED, format!("'snapctl net stop {name}' stops it")),
        Error::NetworksBusy { .. } => told(code::BUSY, "--wait SECONDS waits for it".into()),
        Error::Net(fault) => net_error(fault),
        Error::NoSuchOperation(_) => Told { code: code::NOT_FOUND, hint: None },
        Error::NameTaken { name, .. } => {
            told(code::REFUSED, format!("'snapctl vm remove {name}' first, or choose another name"))
        }
        Error::SnapshotNameTaken { .. } => told(code::REFUSED, "choose another --name".into()),
        Error::HasSnapshots { .. } => told(code::REFUSED, "--keep-snapshots forgets the VM and keeps them".into()),
        Error::BadDefinition { .. } => Told { code: code::USAGE, hint: None },
        Error::NotRunning { .. } => {
            told(code::UNREACHABLE, "start the VM, or correct its sockets; 'snapctl vm discover' lists running QEMUs".into())
        }
        Error::NoPermission { .. } => told(code::UNREACHABLE, "run snapctl as root, or as the user who runs QEMU".into()),
        Error::SocketHeld { .. } => told(
            code::UNREACHABLE,
            "QEMU serves one client on a socket; end that client, use --wait, or give QEMU a second monitor socket for snapctl".into(),
        ),
        Error::ConcludedStream { vm, job } => told(
            code::REFUSED,
            format!("whoever started it has to dismiss it: snapctl vm call {vm} job-dismiss '{{\"id\": \"{job}\"}}'"),
        ),
        Error::NoAgent { .. } => told(
            code::UNREACHABLE,
            "install and start qemu-guest-agent in the guest, and give QEMU its port (org.qemu.guest_agent.0)".into(),
        ),
        Error::Conversation { source: agent_client::Error::NoGreeting { .. } | agent_client::Error::NotQmp { .. }, .. } => told(
            code::UNREACHABLE,
            "is it QEMU's monitor in control mode (-qmp, or -mon mode=control)? A human monitor or the agent's socket does not do".into(),
        ),
        Error::Conversation { source, .. } => Told { code: conversation(source), hint: None },
        Error::Busy { .. } => told(code::BUSY, "--wait SECONDS waits for it".into()),
        Error::MissingFeature { .. } | Error::NewerState { .. } | Error::State { .. } | Error::BadRecord { .. } => {
            Told { code: code::FAILED, hint: None }
        }
        Error::Host(fault) => host_error(fault),
    }
}

fn host_error(fault: &host::Error) -> Told {
    let hint = "run snapctl as root, or use --root DIR for an installation of your own";
    Told { code: code::FAILED, hint: is_denied(fault).then(|| hint.to_owned()) }
}

fn is_denied(fault: &host::Error) -> bool {
    fault.kind() == Some(std::io::ErrorKind::PermissionDenied)
}

fn conversation(fault: &agent_client::Error) -> u8 {
    if fault.is_refusal() { code::FAILED } else { code::UNREACHABLE }
}

fn names(names: &[Name]) -> String {
    names.iter().map(Name::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let cause = || std::io::Error::other("the disk is gone");
        let whole: anyhow::Error = vm::Error::from(host::Error::io("read", "/x".as_ref())(cause())).into();
        assert_eq!(message(&whole).matches("the disk is gone").count(), 1);
        let outer = Err::<(), _>(cause()).context("--root").unwrap_err();
        assert_eq!(message(&outer), "--root: the disk is gone");
    }
}
