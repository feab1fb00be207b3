//! `snapctl guest`

use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use agent_client::{Agent, FreezeStatus, Guard, GuardError, GuardRequest, printable};
use anyhow::Context as _;
use model::{ByteSize, Name};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use snapshot::Interrupt;
use tokio::process::Child;
use vm::{State, observe, open_agent, open_monitor};

use crate::args::{Call, Guest, GuestFreeze};
use crate::commands::create::{interrupted, watch_signals};
use crate::commands::vm::print_reply;
use crate::context::{Context, command};
use crate::failure::MayBeFrozen;
use crate::{output, times};

/// How long a trim may take: it walks every file system.
const TRIM_LIMIT: Duration = Duration::from_secs(600);
/// How long a command may take to end when it is asked to.
const TERM_LIMIT: Duration = Duration::from_secs(10);

pub async fn run(context: &Context, command: Guest) -> anyhow::Result<ExitCode> {
    match command {
        Guest::Info(args) => info(context, &args.vm).await,
        Guest::Fsinfo(args) => fsinfo(context, &args.vm).await,
        Guest::Network(args) => network(context, &args.vm).await,
        Guest::Freeze(args) => freeze(context, &args).await,
        Guest::Thaw(args) => thaw(context, &args.vm).await,
        Guest::Status(args) => status(context, &args.vm).await,
        Guest::Trim(args) => trim(context, &args.vm).await,
        Guest::Call(args) => call(context, &args).await,
    }
}

/// The agent, under the VM's lock.
struct Connected {
    agent: Agent,
    _lock: host::lock::FileLock,
}

async fn connect(context: &Context, vm: &Name) -> anyhow::Result<Connected> {
    let definition = context.definition(vm)?;
    let lock = vm::lock(&context.paths, vm, context.wait).await?;
    // QEMU knows at once whether anybody in the guest listens. Where it cannot be asked, the agent may
    // still answer.
    let chardevs = match open_monitor(vm, &definition, None, context.timeout).await {
        Ok(qmp) => observe(vm, &definition, &qmp).await?.chardevs,
        Err(fault @ vm::Error::NotRunning { .. }) => return Err(fault.into()),
        Err(_) => Vec::new(),
    };
    let agent = open_agent(vm, &definition, &chardevs, context.wait, context.timeout).await?;
    Ok(Connected { agent, _lock: lock })
}

async fn info(context: &Context, vm: &Name) -> anyhow::Result<ExitCode> {
    let Connected { agent, _lock } = connect(context, vm).await?;
    let info = agent.info().await?;
    let os = agent.os().await.unwrap_or_default();
    let hostname = agent.hostname().await.ok();
    let time = agent.time().await.ok();
    if context.json {
        let content = json!({ "vm": vm, "agent": info, "os": os, "hostname": hostname, "time_ns": time });
        output::document("snapctl.guest/1", &content)?;
        return Ok(ExitCode::SUCCESS);
    }
    let off: Vec<&str> =
        info.commands.iter().filter(|(_, on)| !**on).map(|(name, _)| name.as_str()).collect();
    let clock = time.and_then(|ns| jiff::Timestamp::from_nanosecond(ns.into()).ok());
    let mut facts = vec![
        ("agent", format!("version {}, {} commands", info.version, info.commands.len() - off.len())),
        ("switched off", off.join(", ")),
        ("system", os.pretty_name.or(os.id).map(|name| printable(&name, 200)).unwrap_or_default()),
        ("kernel", os.kernel_release.map(|name| printable(&name, 200)).unwrap_or_default()),
        ("host name", hostname.map(|name| printable(&name, 255)).unwrap_or_default()),
        ("clock", clock.map(times::local).unwrap_or_default()),
    ];
    facts.retain(|(_, value)| !value.is_empty());
    output::facts(&facts)?;
    Ok(ExitCode::SUCCESS)
}

async fn fsinfo(context: &Context, vm: &Name) -> anyhow::Result<ExitCode> {
    let Connected { agent, _lock } = connect(context, vm).await?;
    let filesystems = agent.filesystems().await?;
    if context.json {
        output::document("snapctl.guest-fsinfo/1", &json!({ "vm": vm, "filesystems": filesystems }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let size = |bytes: Option<u64>| bytes.map(|bytes| ByteSize(bytes).to_string()).unwrap_or_default();
    let rows = filesystems.iter().map(|fs| {
        let text = |text: &str| printable(text, 200);
        vec![text(&fs.mountpoint), text(&fs.kind), size(fs.used_bytes), size(fs.total_bytes), text(&fs.name)]
    });
    output::table(&["mounted on", "type", "used", "size", "device"], &["used", "size"], rows.collect())?;
    Ok(ExitCode::SUCCESS)
}

async fn network(context: &Context, vm: &Name) -> anyhow::Result<ExitCode> {
    let Connected { agent, _lock } = connect(context, vm).await?;
    let interfaces = agent.interfaces().await?;
    if context.json {
        output::document("snapctl.guest-network/1", &json!({ "vm": vm, "interfaces": interfaces }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = interfaces.iter().map(|interface| {
        let addresses: Vec<String> = interface
            .addresses
            .iter()
            .map(|a| printable(&format!("{}/{}", a.address, a.prefix), 60))
            .collect();
        let mac = interface.mac.as_deref().unwrap_or_default();
        vec![printable(&interface.name, 60), printable(mac, 60), addresses.join(" ")]
    });
    output::table(&["name", "mac", "addresses"], &[], rows.collect())?;
    Ok(ExitCode::SUCCESS)
}

async fn freeze(context: &Context, args: &GuestFreeze) -> anyhow::Result<ExitCode> {
    let Connected { agent, _lock } = connect(context, &args.vm).await?;
    let signalled = watch_signals(&Interrupt::default().flag())?;
    if agent.freeze_status().await? == FreezeStatus::Frozen {
        anyhow::bail!("{} is frozen already; 'snapctl guest thaw {}' ends that", args.vm, args.vm);
    }
    let path = agent.path().to_owned();
    let program = context.guards().thaw;
    let request = GuardRequest {
        program: program.program,
        arguments: program.arguments,
        mountpoints: args.mountpoints.clone(),
        limit: args.max_freeze,
    };
    let mut guard = Guard::start(agent.into_socket().await?, &path, &request).await?;
    let frozen = guard.freeze().await.map_err(|fault| maybe_frozen(&args.vm, fault))?;
    if frozen.filesystems == 0 {
        guard.thaw().await.map_err(|fault| maybe_frozen(&args.vm, fault))?;
        return Err(nothing_froze(args).into());
    }
    let limit = times::seconds(args.max_freeze.as_secs_f64());
    context
        .note(&format!("{}: {} file systems are frozen, for {limit} at most", args.vm, frozen.filesystems));
    let held = hold(context, args, signalled).await;
    // Whatever became of the command, the guest must not wait for its end.
    let thawed = guard.thaw().await;
    let done = settle(held).await;
    let thawed = thawed.map_err(|fault| maybe_frozen(&args.vm, fault))?;
    if !context.json {
        output::line(&format!("{}: {} file systems are thawed", args.vm, frozen.filesystems))?;
    }
    let code = done?;
    if thawed.expired && !args.command.is_empty() {
        anyhow::bail!("the freeze was over before the command was; what it saw may not be consistent");
    }
    if context.json {
        let content = json!({ "vm": args.vm, "filesystems": frozen.filesystems, "expired": thawed.expired });
        output::document("snapctl.guest-freeze/1", &content)?;
    }
    Ok(code)
}

/// The agent said yes and froze nothing: a command that counts on the freeze must not run.
fn nothing_froze(args: &GuestFreeze) -> GuardError {
    let of = match args.mountpoints.as_slice() {
        [] => String::new(),
        some => format!(" of {}", some.join(", ")),
    };
    let not_run = if args.command.is_empty() { "" } else { ", and the command was not run" };
    GuardError::NotFrozen { reason: format!("its agent froze no file system{of}{not_run}") }
}

/// Marks the error of a thaw that nobody has confirmed.
fn maybe_frozen(vm: &Name, fault: GuardError) -> anyhow::Error {
    match fault {
        GuardError::ThawUnconfirmed { guard, .. } => {
            anyhow::Error::new(fault).context(MayBeFrozen { vm: vm.clone(), guard })
        }
        fault => fault.into(),
    }
}

/// How the time of the freeze ended.
enum Held {
    /// The command ended, or without one the limit or a signal came.
    Ended(ExitCode),
    /// A signal came while the command runs.
    Signalled(i32, Child),
}

/// Holds the freeze for as long as the command runs, or until a signal or the limit.
async fn hold(
    context: &Context,
    args: &GuestFreeze,
    signalled: tokio::sync::oneshot::Receiver<i32>,
) -> anyhow::Result<Held> {
    let Some(mut command) = command(&args.command) else {
        tokio::select! {
            _ = signalled => {}
            () = tokio::time::sleep(args.max_freeze) => {}
        }
        return Ok(Held::Ended(ExitCode::SUCCESS));
    };
    if context.json {
        // stdout belongs to the document.
        command.stdout(std::io::stderr());
    }
    let mut child = tokio::process::Command::from(command)
        .spawn()
        .with_context(|| format!("cannot run {:?}", args.command.first().cloned().unwrap_or_default()))?;
    tokio::select! {
        status = child.wait() => {
            let code = status?.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
            Ok(Held::Ended(ExitCode::from(code)))
        }
        signal = signalled => Ok(Held::Signalled(signal.unwrap_or(0), child)),
    }
}

/// Ends a command that still runs, now that the guest is thawed.
async fn settle(held: anyhow::Result<Held>) -> anyhow::Result<ExitCode> {
    match held? {
        Held::Ended(code) => Ok(code),
        Held::Signalled(signal, mut child) => {
            end(&mut child, TERM_LIMIT).await?;
            Err(interrupted(signal))
        }
    }
}

/// Asks the command and what it started to end, waits for it, and kills what does not listen within `limit`.
async fn end(child: &mut Child, limit: Duration) -> anyhow::Result<ExitStatus> {
    // The command leads a group of its own; while it is not waited for, its id is nobody else's.
    let group = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    let tell = |signal| group.map_or(Ok(()), |group| kill_process_group(group, signal));
    tell(Signal::TERM)?;
    if let Ok(status) = tokio::time::timeout(limit, child.wait()).await {
        return Ok(status?);
    }
    tell(Signal::KILL)?;
    Ok(child.wait().await?)
}

async fn thaw(context: &Context, vm: &Name) -> anyhow::Result<ExitCode> {
    let Connected { agent, _lock } = connect(context, vm).await?;
    let filesystems = agent.thaw().await.map_err(|fault| {
        // Nobody else tries: this command was the one that somebody called for that.
        anyhow::Error::new(fault).context(MayBeFrozen { vm: vm.clone(), guard: 0 })
    })?;
    if !State::open_existing(&context.paths)?.pending(Some(vm))?.is_empty() {
        snapshot::forget_frozen(vm, &State::open(&context.paths)?)?;
    }
    if context.json {
        output::document("snapctl.guest-thaw/1", &json!({ "vm": vm, "filesystems": filesystems }))?;
    } else {
        output::line(&match filesystems {
            0 => format!("{vm}: nothing was frozen"),
            count => format!("{vm}: {count} file systems are thawed"),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn status(context: &Context, vm: &Name) -> anyhow::Result<ExitCode> {
    let Connected { agent, _lock } = connect(context, vm).await?;
    let status = agent.freeze_status().await?;
    if context.json {
        output::document("snapctl.guest-status/1", &json!({ "vm": vm, "status": status }))?;
    } else {
        let word = if status == FreezeStatus::Frozen { "frozen" } else { "thawed" };
        output::line(&format!("{vm}: {word}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn trim(context: &Context, vm: &Name) -> anyhow::Result<ExitCode> {
    let Connected { agent, _lock } = connect(context, vm).await?;
    let results = agent.trim(TRIM_LIMIT).await?;
    if context.json {
        output::document("snapctl.guest-trim/1", &json!({ "vm": vm, "filesystems": results }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = results.iter().map(|result| {
        let what = match (&result.error, result.trimmed) {
            (Some(error), _) => printable(error, 200),
            (None, Some(bytes)) => ByteSize(bytes).to_string(),
            (None, None) => String::new(),
        };
        vec![printable(&result.path, 200), what]
    });
    output::table(&["mounted on", "trimmed"], &["trimmed"], rows.collect())?;
    Ok(ExitCode::SUCCESS)
}

async fn call(context: &Context, args: &Call) -> anyhow::Result<ExitCode> {
    let Connected { agent, _lock } = connect(context, &args.vm).await?;
    let arguments = args.arguments.clone().unwrap_or(Value::Null);
    let reply = agent.call_within(&args.command, arguments, context.timeout).await?;
    print_reply(context, reply.get())?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;

    use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

    use super::*;

    fn shell(script: &str) -> Child {
        let line = ["sh", "-c", script].map(Into::into);
        let mut command = tokio::process::Command::from(command(&line).unwrap());
        command.stdout(Stdio::piped()).spawn().unwrap()
    }

    #[tokio::test]
    async fn a_command_is_asked_to_end_with_all_that_it_started() {
        // Both hold the pipe: it ends with the last of them. The inner shell says that it is there, since a
        // fork that has not yet run its program still has the outer one's trap.
        let mut child = shell("trap 'exit 7' TERM; sh -c 'echo ready; exec sleep 60' & wait");
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        lines.read_line(&mut String::new()).await.unwrap();
        assert_eq!(end(&mut child, TERM_LIMIT).await.unwrap().code(), Some(7));
        assert_eq!(lines.read_to_end(&mut Vec::new()).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_command_that_does_not_listen_is_killed() {
        let mut child = shell("trap '' TERM; echo ready; sleep 60; sleep 60");
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        lines.read_line(&mut String::new()).await.unwrap();
        let status = end(&mut child, Duration::from_millis(200)).await.unwrap();
        assert_eq!(status.signal(), Some(Signal::KILL.as_raw()));
        assert_eq!(lines.read_to_end(&mut Vec::new()).await.unwrap(), 0);
    }
}
