//! `snapctl vm`, and looking at a VM for other commands.

use std::path::Path;
use std::process::ExitCode;

use agent_client::discover;
use agent_client::printable;
use host::lock::FileLock;
use model::{History, Name};
use serde_json::{Value, json};
use vm::{Added, Machine, State, VmDefinition, observe, open_agent, open_monitor};

use crate::args::{Call, OneVm, Vm, VmAdd, VmRemove};
use crate::context::Context;
use crate::output;

/// What can be seen of a VM without changing anything.
pub struct Seen {
    /// As QEMU shows it; none if it does not run.
    pub machine: Option<Machine>,
    /// Its snapshots.
    pub known: History,
}

/// Looks at a VM. One that does not run is seen through the catalogue alone.
///
/// # Errors
/// As [`open_monitor`], but for a VM that does not run.
pub async fn look(context: &Context, vm: &Name) -> anyhow::Result<Seen> {
    // Printing may take as long as a reader likes: the lock is not held for that.
    look_locked(context, vm).await.map(|(seen, _lock)| seen)
}

/// What to say of a socket that every user may connect to.
pub fn open_to_all(socket: &Path) -> String {
    format!(
        "every user of this host can connect to {}, and do what QEMU can; put it into a directory of mode 0700",
        socket.display()
    )
}

/// As [`look`], with the VM's lock for whoever looks further.
async fn look_locked(context: &Context, vm: &Name) -> anyhow::Result<(Seen, Option<FileLock>)> {
    let definition = context.definition(vm)?;
    // The monitor serves one client at a time, so that looking takes its turn too. Where no lock can be written
    // (a full or read-only file system) the monitor itself keeps others out.
    let lock = match vm::lock(&context.paths, vm, context.patience()).await {
        Ok(lock) => Some(lock),
        Err(vm::Error::Host(fault)) => {
            tracing::debug!("looking at {vm} without its lock: {fault}");
            None
        }
        Err(fault) => return Err(fault.into()),
    };
    let known = State::open_existing(&context.paths)?.history(Some(vm))?;
    let machine = match open_monitor(vm, &definition, context.wait, context.timeout).await {
        Ok(qmp) => Some(observe(vm, &definition, &qmp).await?),
        Err(vm::Error::NotRunning { .. }) => None,
        Err(fault) => return Err(fault.into()),
    };
    Ok((Seen { machine, known }, lock))
}

pub async fn run(context: &Context, command: Vm) -> anyhow::Result<ExitCode> {
    match command {
        Vm::Add(args) => add(context, &args).await,
        Vm::Discover => discover_vms(context),
        Vm::List => list(context).await,
        Vm::Show(args) => show(context, &args).await,
        Vm::Remove(args) => remove(context, &args).await,
        Vm::Call(args) => call(context, &args).await,
    }
}

async fn add(context: &Context, args: &VmAdd) -> anyhow::Result<ExitCode> {
    let definition = VmDefinition {
        qmp: std::path::absolute(&args.qmp)?,
        agent: args.agent.as_ref().map(std::path::absolute).transpose()?,
        disks: Default::default(),
    };
    let version = match args.offline {
        true => None,
        false => {
            let opened = open_monitor(&args.vm, &definition, context.wait, context.timeout).await;
            let qmp = opened.inspect_err(|fault| {
                if matches!(fault, vm::Error::NotRunning { .. }) {
                    context.note("note: --offline registers it though it does not run now");
                }
            })?;
            Some(qmp.version().qemu.to_string())
        }
    };
    let added = context.registry().add(&args.vm, &definition)?;
    if context.json {
        let content =
            json!({ "vm": args.vm, "new": added == Added::New, "qemu": version, "definition": definition });
        output::document("snapctl.vm-add/1", &content)?;
        return Ok(ExitCode::SUCCESS);
    }
    let runs = version.map_or_else(String::new, |version| format!(" (QEMU {version})"));
    output::line(&match added {
        Added::New => {
            format!("{} is registered{runs}: {}", args.vm, context.registry().file(&args.vm).display())
        }
        Added::AlreadySo => format!("{} was registered so already{runs}", args.vm),
    })?;
    for socket in definition.sockets() {
        if vm::is_open_to_all(socket) {
            output::note(&format!("warning: {}", open_to_all(socket)));
        }
    }
    if definition.agent.is_none() {
        context.note("note: without --agent its snapshots cannot be quiesced");
    }
    Ok(ExitCode::SUCCESS)
}

fn discover_vms(context: &Context) -> anyhow::Result<ExitCode> {
    let found = discover::discover();
    if context.json {
        output::document("snapctl.discover/1", &json!({ "vms": found }))?;
        return Ok(ExitCode::SUCCESS);
    }
    if found.is_empty() {
        context.note("no running QEMU was found (only root sees those of other users)");
    }
    for vm in &found {
        let managed = vm.managed_by.map_or_else(String::new, |by| format!(", managed by {by}"));
        output::line(&format!("# pid {}{managed}, {} drives", vm.pid, vm.disks.len()))?;
        match (vm.qmp.first(), &vm.agent) {
            (None, _) => {
                output::line("#   it has no QMP socket: start it with -qmp unix:PATH,server=on,wait=off")?;
            }
            (Some(qmp), None) => {
                output::line(&format!("snapctl vm add {} --qmp {}", vm.name, qmp.display()))?;
            }
            (Some(qmp), Some(agent)) => {
                let (qmp, agent) = (qmp.display(), agent.display());
                output::line(&format!("snapctl vm add {} --qmp {qmp} --agent {agent}", vm.name))?;
            }
        }
        if vm.managed_by.is_some() {
            output::line(
                "#   another tool keeps this VM's chains in its own books: snapshots behind its back break them",
            )?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(context: &Context) -> anyhow::Result<ExitCode> {
    let state = State::open_existing(&context.paths)?;
    let mut rows = Vec::new();
    let mut items = Vec::new();
    for vm in context.registry().names()? {
        let definition = context.definition(&vm);
        let status = match &definition {
            Ok(definition) => status(context, &vm, definition).await,
            Err(fault) => fault.to_string(),
        };
        let snapshots = state.history(Some(&vm))?.visible().count();
        let definition = definition.ok();
        let qmp =
            definition.as_ref().map(|definition| definition.qmp.display().to_string()).unwrap_or_default();
        items.push(json!({ "vm": vm, "status": status, "snapshots": snapshots, "definition": definition }));
        rows.push(vec![vm.to_string(), status, snapshots.to_string(), qmp]);
    }
    if context.json {
        output::document("snapctl.vms/1", &json!({ "vms": items }))?;
    } else if rows.is_empty() {
        context.note("no VM is registered; 'snapctl vm discover' finds running ones");
    } else {
        output::table(&["name", "status", "snapshots", "qmp"], &["snapshots"], rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn status(context: &Context, vm: &Name, definition: &VmDefinition) -> String {
    // Whoever works on the VM has its monitor; a list does not wait, and must not be in the way either.
    let _lock = match vm::lock(&context.paths, vm, None).await {
        Ok(lock) => lock,
        Err(vm::Error::Busy { .. }) => return "busy".into(),
        Err(fault) => return fault.to_string(),
    };
    match open_monitor(vm, definition, None, context.timeout).await {
        Ok(qmp) => match qmp.execute(&agent_client::QueryStatus {}).await {
            Ok(status) => printable(&status.status, 20),
            Err(_) => "does not answer".into(),
        },
        Err(vm::Error::NotRunning { .. }) => "not running".into(),
        Err(vm::Error::NoPermission { .. }) => "no permission".into(),
        Err(vm::Error::SocketHeld { .. }) => "monitor in use".into(),
        Err(_) => "does not answer".into(),
    }
}

async fn show(context: &Context, args: &OneVm) -> anyhow::Result<ExitCode> {
    let definition = context.definition(&args.vm)?;
    context.settle_or_tell(&args.vm, context.patience()).await;
    let (seen, lock) = look_locked(context, &args.vm).await?;
    let views = snapshot::disk_views(seen.machine.as_ref(), &seen.known);
    let status =
        seen.machine.as_ref().map_or("not running", |machine| machine.status.status.as_str()).to_owned();
    let agent = match &seen.machine {
        Some(machine) => {
            match open_agent(&args.vm, &definition, &machine.chardevs, None, context.timeout).await {
                Ok(agent) => {
                    agent.info().await.map(|info| format!("version {}", info.version)).unwrap_or_default()
                }
                Err(fault) => fault.to_string(),
            }
        }
        None => String::new(),
    };
    drop(lock);
    if context.json {
        let content = json!({
            "vm": args.vm, "status": status, "agent": agent, "definition": definition,
            "snapshots": seen.known.visible().count(), "disks": views,
        });
        output::document("snapctl.vm/1", &content)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut facts = vec![
        ("vm", args.vm.to_string()),
        ("status", status),
        ("qmp", definition.qmp.display().to_string()),
        ("agent", definition.agent.map(|path| path.display().to_string()).unwrap_or_else(|| "none".into())),
        ("guest agent", agent),
        ("snapshots", seen.known.visible().count().to_string()),
    ];
    facts.retain(|(_, value)| !value.is_empty());
    for view in &views {
        let what = match (view.active(), &view.left_out, &view.fault) {
            (Some(active), ..) => {
                format!("{} ({}, {})", active.path.display(), active.format, active.virtual_size)
            }
            (None, left_out, fault) => left_out.clone().or_else(|| fault.clone()).unwrap_or_default(),
        };
        facts.push(("disk", format!("{}: {what}", view.disk)));
    }
    output::facts(&facts)?;
    Ok(ExitCode::SUCCESS)
}

async fn remove(context: &Context, args: &VmRemove) -> anyhow::Result<ExitCode> {
    let registry = context.registry();
    if !registry.file(&args.vm).exists() {
        registry.load(&args.vm)?;
    }
    // Without its sockets nobody could settle it later.
    context.settle(&args.vm, context.wait).await?;
    let _lock = vm::lock(&context.paths, &args.vm, context.wait).await?;
    let count = State::open_existing(&context.paths)?.history(Some(&args.vm))?.visible().count();
    if count > 0 && !args.keep_snapshots {
        return Err(vm::Error::HasSnapshots { vm: args.vm.clone(), count }.into());
    }
    registry.remove(&args.vm)?;
    if context.json {
        output::document("snapctl.vm-remove/1", &json!({ "vm": args.vm, "kept_snapshots": count }))?;
    } else {
        output::line(&format!("{} is no longer registered; it and its files stay as they are", args.vm))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn call(context: &Context, args: &Call) -> anyhow::Result<ExitCode> {
    let definition = context.definition(&args.vm)?;
    let _lock = vm::lock(&context.paths, &args.vm, context.wait).await?;
    let qmp = open_monitor(&args.vm, &definition, context.wait, context.timeout).await?;
    let arguments = args.arguments.clone().unwrap_or(Value::Null);
    let reply = qmp.execute_raw(&args.command, arguments).await?;
    print_reply(context, reply.get())?;
    Ok(ExitCode::SUCCESS)
}

/// Prints a raw reply: for people indented, with `--json` on one line under `return`.
///
/// # Errors
/// If it is no JSON, or stdout cannot be written.
pub fn print_reply(context: &Context, reply: &str) -> anyhow::Result<()> {
    let value: Value = serde_json::from_str(reply)?;
    if context.json {
        output::document("snapctl.call/1", &json!({ "return": value }))
    } else {
        // JSON escapes control characters, so that the guest's text cannot steer the terminal.
        output::line(&serde_json::to_string_pretty(&value)?)
    }
}
