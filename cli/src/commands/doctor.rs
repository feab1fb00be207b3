//! `snapctl doctor`

use std::path::Path;
use std::process::ExitCode;

use model::Name;
use serde::Serialize;
use serde_json::json;
use vm::{FEATURES, open_agent, open_monitor, require_features};

use crate::args::Doctor;
use crate::commands::vm::open_to_all;
use crate::context::Context;
use crate::failure::code;
use crate::output;

/// How one thing was found.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Good,
    Note,
    Bad,
}

#[derive(Serialize)]
struct Found {
    verdict: Verdict,
    what: String,
    detail: String,
}

pub async fn run(context: &Context, args: &Doctor) -> anyhow::Result<ExitCode> {
    let mut found = vec![kernel(), programs("qemu-system-x86_64"), programs("qemu-img"), state(context)];
    if args.vm.is_none() {
        pools(context, &mut found)?;
        networks(context, &mut found).await?;
    }
    let vms = match &args.vm {
        Some(vm) => {
            context.definition(vm)?;
            vec![vm.clone()]
        }
        None => context.registry().names()?,
    };
    for vm in &vms {
        examine(context, vm, &mut found).await;
    }
    let worst = found.iter().map(|found| found.verdict).max().unwrap_or(Verdict::Good);
    if context.json {
        output::document("snapctl.doctor/1", &json!({ "found": found }))?;
    } else {
        for Found { verdict, what, detail } in &found {
            let mark = match verdict {
                Verdict::Good => "ok  ",
                Verdict::Note => "note",
                Verdict::Bad => "BAD ",
            };
            output::line(&format!("{mark}  {what}: {detail}"))?;
        }
    }
    Ok(if worst == Verdict::Bad { ExitCode::from(code::WARNINGS) } else { ExitCode::SUCCESS })
}

fn good(what: impl Into<String>, detail: impl Into<String>) -> Found {
    Found { verdict: Verdict::Good, what: what.into(), detail: detail.into() }
}

fn note(what: impl Into<String>, detail: impl Into<String>) -> Found {
    Found { verdict: Verdict::Note, what: what.into(), detail: detail.into() }
}

fn bad(what: impl Into<String>, detail: impl Into<String>) -> Found {
    Found { verdict: Verdict::Bad, what: what.into(), detail: detail.into() }
}

fn kernel() -> Found {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kvm = Path::new("/dev/kvm").exists();
    good("kernel", format!("{}, {}", release.trim(), if kvm { "/dev/kvm is there" } else { "no /dev/kvm" }))
}

/// A program and its version. snapctl itself needs only a running QEMU, so a missing one is no fault.
fn programs(name: &str) -> Found {
    let asked = std::process::Command::new(name).arg("--version").output();
    match asked {
        Ok(answer) => {
            let text = String::from_utf8_lossy(&answer.stdout);
            good(name, agent_client::printable(text.lines().next().unwrap_or_default(), 120))
        }
        Err(_) => note(name, "not installed; snapshots of running VMs need none, other work may"),
    }
}

/// What each kind of pool lacks here, and whether the pools that are defined are ready.
fn pools(context: &Context, found: &mut Vec<Found>) -> anyhow::Result<()> {
    for kind in storage::pool::KINDS {
        let lacks = |program: &&&str| !host::program::is_installed(program);
        let missing: Vec<&str> = kind.programs.iter().filter(lacks).copied().collect();
        let what = format!("pools of kind {}", kind.name);
        found.push(match missing.as_slice() {
            [] => good(what, format!("can be had: {}", kind.about)),
            missing => note(what, format!("need {}, which are not installed", missing.join(", "))),
        });
    }
    for name in context.pools().names()? {
        let what = format!("pool {name}");
        let opened = match vm::pools::OpenPool::look(&context.paths, &name) {
            Ok(opened) => opened,
            Err(fault) => {
                found.push(bad(what, fault.to_string()));
                continue;
            }
        };
        found.push(match opened.pool.ready() {
            Ok(()) => good(what, format!("ready on {}", opened.pool.location())),
            Err(fault) if opened.definition.autostart => bad(what, fault.to_string()),
            Err(fault) => note(what, fault.to_string()),
        });
    }
    Ok(())
}

/// What each kind of network lacks here, and whether what is started is as it was made.
async fn networks(context: &Context, found: &mut Vec<Found>) -> anyhow::Result<()> {
    for kind in net::network::KINDS {
        let what = format!("networks of kind {}", kind.name);
        let missing = net::network::missing(kind);
        found.push(match missing.as_slice() {
            [] => good(what, format!("can be had: {}", kind.about)),
            missing => note(what, format!("need {}", missing.join(", "))),
        });
    }
    let host = vm::networks::host(&context.paths)?;
    for name in vm::networks::names(&context.paths)? {
        let what = format!("network {name}");
        let known = match vm::networks::known(&context.paths, &name) {
            Ok(known) => known,
            Err(fault) => {
                found.push(bad(what, fault.to_string()));
                continue;
            }
        };
        let Some(record) = known.record else {
            let stopped = "is not started".to_owned();
            found.push(if known.definition.autostart { bad(what, stopped) } else { note(what, stopped) });
            continue;
        };
        found.push(match record.drift(&host).await {
            _ if record.is_interrupted() => bad(what, "was interrupted; run 'snapctl recover'"),
            Ok(drift) if drift.is_empty() => good(what, "started, and as it was made"),
            Ok(drift) => bad(what, format!("{}; 'snapctl net start {name}' mends it", drift.join("; "))),
            Err(fault) => bad(what, fault.to_string()),
        });
    }
    Ok(())
}

fn state(context: &Context) -> Found {
    let paths = &context.paths;
    let place = paths.state.display().to_string();
    match vm::State::open_existing(paths).and_then(|state| Ok((state.history(None)?, state.pending(None)?))) {
        Ok((snapshots, pending)) if pending.is_empty() => {
            good("catalogue", format!("{place}, {} snapshots", snapshots.visible().count()))
        }
        Ok((_, pending)) => {
            bad("catalogue", format!("{} interrupted operations; run 'snapctl recover'", pending.len()))
        }
        Err(fault) => bad("catalogue", fault.to_string()),
    }
}

async fn examine(context: &Context, vm: &Name, found: &mut Vec<Found>) {
    let definition = match context.definition(vm) {
        Ok(definition) => definition,
        Err(fault) => return found.push(bad(vm.as_str(), fault.to_string())),
    };
    for socket in definition.sockets() {
        if vm::is_open_to_all(socket) {
            found.push(bad(vm.as_str(), open_to_all(socket)));
        }
    }
    // The monitor and the agent serve one client each, so that looking takes its turn.
    let _lock = match vm::lock(&context.paths, vm, context.patience()).await {
        Ok(lock) => lock,
        Err(fault @ vm::Error::Busy { .. }) => return found.push(note(vm.as_str(), fault.to_string())),
        Err(fault) => return found.push(bad(vm.as_str(), fault.to_string())),
    };
    let qmp = match open_monitor(vm, &definition, context.wait, context.timeout).await {
        Ok(qmp) => qmp,
        Err(fault @ vm::Error::NotRunning { .. }) => return found.push(note(vm.as_str(), fault.to_string())),
        Err(fault) => return found.push(bad(vm.as_str(), fault.to_string())),
    };
    match require_features(vm, &qmp, &context.paths, &FEATURES).await {
        Ok(()) => found
            .push(good(vm.as_str(), format!("QEMU {}, everything that snapshots need", qmp.version().qemu))),
        Err(fault) => found.push(bad(vm.as_str(), fault.to_string())),
    }
    let machine = match vm::observe(vm, &definition, &qmp).await {
        Ok(machine) => machine,
        Err(fault) => return found.push(bad(vm.as_str(), fault.to_string())),
    };
    for disk in &machine.disks {
        let what = format!("{vm} disk {}", disk.name);
        found.push(match &disk.content {
            vm::disks::Content::Layer(layer) => image(&what, &layer.path),
            vm::disks::Content::Skipped(skip) => {
                good(what, format!("left out of snapshots: {}", skip.as_str()))
            }
            vm::disks::Content::Unfit(why) => bad(what, format!("cannot be snapshotted: {why}")),
        });
    }
    let what = format!("{vm} guest agent");
    found.push(match open_agent(vm, &definition, &machine.chardevs, context.wait, context.timeout).await {
        Ok(agent) => match agent.require("guest-fsfreeze-freeze").await {
            Ok(()) => good(what, "answers, and can freeze"),
            Err(fault) => bad(what, fault.to_string()),
        },
        Err(fault) => note(what, fault.to_string()),
    });
    let known = vm::State::open_existing(&context.paths).and_then(|state| state.history(Some(vm)));
    let known = known.unwrap_or_default();
    let views = snapshot::disk_views(Some(&machine), &known);
    for finding in snapshot::check_chains(Some(&machine), &known, &views) {
        found.push(bad(format!("{vm} chain"), format!("{}: {}", finding.path.display(), finding.message)));
    }
}

/// What the file system below an image can do.
fn image(what: &str, path: &Path) -> Found {
    let dir = host::files::parent(path);
    let asked = storage::space::of(dir).and_then(|space| Ok((space, storage::filesystem::of(dir)?)));
    let (space, system) = match asked {
        Ok(asked) => asked,
        Err(fault) => return bad(what, fault.to_string()),
    };
    let mut abilities = vec![format!("{} with {} free", system.name, space.available)];
    abilities.push(
        if system.immutable {
            "frozen layers become immutable"
        } else {
            "frozen layers lose their write bits only"
        }
        .into(),
    );
    abilities.extend(system.reflink.then(|| "copies share extents".to_owned()));
    let detail = format!("{}: {}", path.display(), abilities.join(", "));
    if system.shared {
        note(what, format!("{detail}; other hosts may write to it"))
    } else {
        good(what, detail)
    }
}
