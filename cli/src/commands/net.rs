//! `snapctl net`

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use jiff::Timestamp;
use model::Name;
use net::lifecycle::{self, Record, Started};
use net::network::NetworkDefinition;
use net::part::Host;
use net::{IfName, PortRequest};
use serde_json::{Value, json};
use toml::Table;
use vm::networks::{self, KnownNetwork};
use vm::{Added, Registry, read_definition};

use super::create::watch_signals;
use crate::args::{Net, NetAutostart, NetDefine, NetPlug, NetStart, NetStop, NetUnplug, OneNet};
use crate::context::Context;
use crate::failure;
use crate::output;

pub async fn run(context: &Context, command: Net) -> anyhow::Result<ExitCode> {
    match command {
        Net::Define(args) => define(context, &args).await,
        Net::List => list(context).await,
        Net::Show(args) => show(context, &args.network).await,
        Net::Start(args) => start(context, &args).await,
        Net::Stop(args) => stop(context, &args).await,
        Net::Autostart(args) => autostart(context, &args).await,
        Net::Remove(args) => remove(context, &args).await,
        Net::Leases(args) => leases(context, &args),
        Net::Plug(args) => plug(context, &args).await,
        Net::Unplug(args) => unplug(context, &args).await,
    }
}

async fn define(context: &Context, args: &NetDefine) -> anyhow::Result<ExitCode> {
    let (kind, options, autostart) = wanted(args)?;
    let (paths, name) = (&context.paths, &args.network);
    let _lock = networks::lock(paths, context.wait).await?;
    let host = host_to_change(context)?;
    let definition = networks::complete(paths, &host, name, &kind, options, autostart).await?;
    let summary = definition.open(name).map_err(vm::Error::from)?.summary();
    if args.transient {
        if let Ok(KnownNetwork { persistent: true, .. }) = networks::known(paths, name) {
            let file = Registry::<NetworkDefinition>::new(paths).file(name);
            return Err(vm::Error::NetworkNameTaken { name: name.clone(), file }.into());
        }
        let others = networks::claims(paths, name)?;
        let started = lifecycle::start(&host, name, &definition, &others, true).await;
        return tell_started(context, name, &started.map_err(vm::Error::from)?);
    }
    let added = networks::define(paths, name, &definition)?;
    if context.json {
        let content = json!({ "network": name, "new": added == Added::New, "definition": definition });
        output::document("snapctl.net-define/1", &content)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&match added {
        Added::New => format!("network {name} is defined: {kind} {summary}"),
        Added::AlreadySo => format!("network {name} was defined so already: {kind} {summary}"),
    })?;
    if Record::load(&host.places, name).map_err(vm::Error::from)?.is_none() {
        context.note(&format!("'snapctl net start {name}' starts it"));
    }
    Ok(ExitCode::SUCCESS)
}

/// The host, for whoever changes something: a signal that asks to end is heard between two steps.
fn host_to_change(context: &Context) -> anyhow::Result<Host> {
    let host = networks::host(&context.paths)?;
    watch_signals(&host.watch.flag())?;
    Ok(host)
}

/// Kind, options and autostart, from the command line or from a file.
fn wanted(args: &NetDefine) -> anyhow::Result<(String, Table, bool)> {
    let mut options = Table::new();
    let mut autostart = args.autostart;
    let mut kind = args.kind.clone().unwrap_or_default();
    if let Some(file) = &args.file {
        let definition: NetworkDefinition = read_definition(file)?;
        (kind, options) = (definition.kind, definition.options);
        autostart |= definition.autostart;
    }
    let texts = [
        ("subnet", &args.subnet),
        ("subnet6", &args.subnet6),
        ("domain", &args.domain),
        ("uplink", &args.uplink),
        ("bridge", &args.bridge),
        ("mac", &args.mac),
        ("mode", &args.mode),
        ("local", &args.local),
        ("group", &args.group),
    ];
    options.extend(texts.into_iter().filter_map(|(key, text)| Some((key.to_owned(), text.clone()?.into()))));
    let numbers = [
        ("mtu", args.mtu.map(i64::from)),
        ("vlan", args.vlan.map(i64::from)),
        ("vni", args.vni.map(i64::from)),
        ("port", args.port.map(i64::from)),
    ];
    options.extend(numbers.into_iter().filter_map(|(key, number)| Some((key.to_owned(), number?.into()))));
    let flags = [("stp", args.stp), ("no-dhcp", args.no_dhcp)];
    options
        .extend(flags.into_iter().filter(|(_, given)| *given).map(|(key, _)| (key.to_owned(), true.into())));
    let lists = [("dhcp", &args.dhcp), ("host", &args.host), ("peer", &args.peer)];
    let given = lists.into_iter().filter(|(_, items)| !items.is_empty());
    options.extend(given.map(|(key, items)| (key.to_owned(), items.clone().into())));
    if !args.name.is_empty() {
        let mut names = Table::new();
        for text in &args.name {
            let (name, address) = text.split_once('=').context("--name is NAME=ADDRESS")?;
            names.insert(name.to_owned(), address.into());
        }
        options.insert("name".into(), names.into());
    }
    Ok((kind, options, autostart))
}

/// What can be told of a network now.
struct Seen {
    known: Option<KnownNetwork>,
    summary: String,
    /// Why it cannot be used.
    fault: Option<String>,
    /// What is not as it was made.
    drift: Vec<String>,
}

async fn look(context: &Context, host: &Host, name: &Name) -> Seen {
    let known = match networks::known(&context.paths, name) {
        Ok(known) => known,
        Err(fault) => {
            return Seen {
                known: None,
                summary: String::new(),
                fault: Some(fault.to_string()),
                drift: Vec::new(),
            };
        }
    };
    let (summary, mut fault) = match known.definition.open(name) {
        Ok(network) => (network.summary(), None),
        Err(fault) => (String::new(), Some(fault.to_string())),
    };
    let mut drift = Vec::new();
    if let Some(record) = &known.record {
        match record.drift(host).await {
            Ok(found) => drift = found,
            Err(unseen) => fault = Some(unseen.to_string()),
        }
    }
    Seen { known: Some(known), summary, fault, drift }
}

impl Seen {
    fn record(&self) -> Option<&Record> {
        self.known.as_ref()?.record.as_ref()
    }

    fn kind(&self) -> &str {
        self.known.as_ref().map_or("", |known| &known.definition.kind)
    }

    fn autostart(&self) -> bool {
        self.known.as_ref().is_some_and(|known| known.persistent && known.definition.autostart)
    }

    fn persistent(&self) -> bool {
        self.known.as_ref().is_some_and(|known| known.persistent)
    }

    fn state(&self) -> &'static str {
        match (&self.fault, self.record()) {
            (Some(_), _) => "broken",
            (None, None) => "stopped",
            (None, Some(record)) if record.is_interrupted() => "interrupted",
            (None, Some(_)) if !self.drift.is_empty() => "changed",
            (None, Some(_)) => "started",
        }
    }

    fn document(&self, name: &Name) -> Value {
        let parts = self
            .record()
            .map(|record| record.parts.iter().map(|made| made.part.to_string()).collect::<Vec<_>>());
        json!({
            "network": name, "type": self.kind(), "summary": self.summary, "state": self.state(), "fault": self.fault,
            "autostart": self.autostart(), "persistent": self.persistent(), "drift": self.drift, "parts": parts,
            "ports": self.record().map(ports), "definition": self.known.as_ref().map(|known| &known.definition),
        })
    }
}

fn ports(record: &Record) -> Vec<Value> {
    let port = |(name, port): (&IfName, &lifecycle::Port)| json!({ "port": name, "plugged": port.plugged, "request": port.request });
    record.ports.iter().map(port).collect()
}

async fn list(context: &Context) -> anyhow::Result<ExitCode> {
    let host = networks::host(&context.paths)?;
    let mut seen = Vec::new();
    for name in networks::names(&context.paths)? {
        let found = look(context, &host, &name).await;
        seen.push((name, found));
    }
    if context.json {
        let networks: Vec<Value> = seen.iter().map(|(name, seen)| seen.document(name)).collect();
        output::document("snapctl.networks/1", &json!({ "networks": networks }))?;
    } else if seen.is_empty() {
        context.note("no network is defined; 'snapctl net define n1 nat' defines one");
    } else {
        let row = |(name, seen): &(Name, Seen)| {
            vec![
                name.to_string(),
                seen.kind().to_owned(),
                seen.state().to_owned(),
                if seen.autostart() { "yes" } else { "no" }.to_owned(),
                seen.record().map_or_else(|| "-".to_owned(), |record| record.ports.len().to_string()),
                seen.summary.clone(),
            ]
        };
        let heading = ["name", "type", "state", "autostart", "ports", "what"];
        output::table(&heading, &["ports"], seen.iter().map(row).collect())?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn show(context: &Context, name: &Name) -> anyhow::Result<ExitCode> {
    networks::known(&context.paths, name)?;
    let host = networks::host(&context.paths)?;
    let seen = look(context, &host, name).await;
    if context.json {
        output::document("snapctl.net/1", &seen.document(name))?;
        return Ok(ExitCode::SUCCESS);
    }
    let state = match &seen.fault {
        Some(why) => format!("broken: {why}"),
        None => seen.state().to_owned(),
    };
    let persistent = if seen.persistent() { "yes" } else { "no: it is forgotten when it is stopped" };
    let mut facts = vec![
        ("network", name.to_string()),
        ("type", seen.kind().to_owned()),
        ("what", seen.summary.clone()),
        ("state", state),
        ("autostart", if seen.autostart() { "yes" } else { "no" }.to_owned()),
        ("persistent", persistent.to_owned()),
    ];
    if let Some(record) = seen.record() {
        facts.extend(record.parts.iter().map(|made| ("part", made.part.to_string())));
        facts.extend(record.filter.iter().map(|made| ("part", made.part.to_string())));
        facts.extend(record.ports.iter().map(|(port, about)| ("port", describe(port, &about.request))));
    }
    output::facts(&facts)?;
    for drift in &seen.drift {
        output::note(&format!("warning: {drift}"));
    }
    if !seen.drift.is_empty() {
        context.note(&format!("'snapctl net start {name}' mends it"));
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(port: &IfName, request: &PortRequest) -> String {
    let mut words = vec![port.to_string()];
    words.extend(request.mac.map(|mac| mac.to_string()));
    words.extend(request.vlan.map(|vlan| format!("VLAN {vlan}")));
    let range = |(first, last): &(u16, u16)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    if !request.trunk.is_empty() {
        words.push(format!("trunk {}", request.trunk.iter().map(range).collect::<Vec<_>>().join(",")));
    }
    words.extend(request.trust.then(|| "trusted".to_owned()));
    words.extend(request.isolated.then(|| "isolated".to_owned()));
    words.extend(request.in_rate.map(|rate| format!("receives {rate}")));
    words.extend(request.out_rate.map(|rate| format!("sends {rate}")));
    words.extend(request.owner.map(|owner| format!("owner {owner}")));
    words.join(", ")
}

async fn start(context: &Context, args: &NetStart) -> anyhow::Result<ExitCode> {
    let Some(name) = &args.network else { return start_all(context).await };
    if args.dry_run {
        return dry_run(context, name).await;
    }
    let started = start_one(context, name).await?;
    tell_started(context, name, &started)
}

async fn dry_run(context: &Context, name: &Name) -> anyhow::Result<ExitCode> {
    let known = networks::known(&context.paths, name)?;
    let view = networks::host(&context.paths)?.netlink.view().await.map_err(vm::Error::from)?;
    let others = networks::claims(&context.paths, name)?;
    let parts = lifecycle::plan(name, &known.definition, &view, &others).map_err(vm::Error::from)?;
    let parts: Vec<String> = parts.iter().map(ToString::to_string).collect();
    if context.json {
        output::document("snapctl.net-plan/1", &json!({ "network": name, "parts": parts }))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&format!("to start network {name} this would be made:"))?;
    for (number, part) in parts.iter().enumerate() {
        output::line(&format!("{:>3}. {part}", number + 1))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn start_one(context: &Context, name: &Name) -> anyhow::Result<Started> {
    let paths = &context.paths;
    let _lock = networks::lock(paths, context.wait).await?;
    let known = networks::known(paths, name)?;
    let others = networks::claims(paths, name)?;
    let host = host_to_change(context)?;
    let started = lifecycle::start(&host, name, &known.definition, &others, !known.persistent).await;
    Ok(started.map_err(vm::Error::from)?)
}

fn tell_started(context: &Context, name: &Name, started: &Started) -> anyhow::Result<ExitCode> {
    if context.json {
        output::document("snapctl.net-start/1", &started_document(name, started))?;
        return Ok(ExitCode::SUCCESS);
    }
    match started {
        Started::New => output::line(&format!("network {name} is started"))?,
        Started::AlreadySo => output::line(&format!("network {name} is started already"))?,
        Started::Mended(what) => {
            output::line(&format!("network {name} is mended"))?;
            what.iter().for_each(|what| context.note(&format!("mended: {what}")));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn started_document(name: &Name, started: &Started) -> Value {
    let mended = match started {
        Started::Mended(what) => what.as_slice(),
        _ => &[],
    };
    json!({ "network": name, "changed": *started != Started::AlreadySo, "mended": mended, "error": null })
}

/// Every network that is to be started with the host. One that does not start keeps no other from it.
async fn start_all(context: &Context) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    let mut items = Vec::new();
    let registry: Registry<NetworkDefinition> = Registry::new(&context.paths);
    for name in registry.names()? {
        if registry.load(&name).is_ok_and(|definition| !definition.autostart) {
            continue;
        }
        match start_one(context, &name).await {
            Ok(started) if context.json => items.push(started_document(&name, &started)),
            Ok(started) => {
                tell_started(context, &name, &started)?;
            }
            Err(fault) => {
                items.push(
                    json!({ "network": name, "changed": false, "mended": [], "error": fault.to_string() }),
                );
                output::note(&format!("warning: {fault}"));
                code = ExitCode::from(failure::code::WARNINGS);
            }
        }
    }
    if context.json {
        output::document("snapctl.net-starts/1", &json!({ "networks": items }))?;
    }
    Ok(code)
}

async fn stop(context: &Context, args: &NetStop) -> anyhow::Result<ExitCode> {
    let (paths, name) = (&context.paths, &args.network);
    let _lock = networks::lock(paths, context.wait).await?;
    let known = networks::known(paths, name)?;
    let host = host_to_change(context)?;
    let changed = lifecycle::stop(&host, name, args.force).await.map_err(vm::Error::from)?;
    if context.json {
        output::document("snapctl.net-stop/1", &json!({ "network": name, "changed": changed }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let already = if changed { "" } else { " already" };
    let forgotten = if known.persistent { "" } else { ", and forgotten" };
    output::line(&format!("network {name} is stopped{already}{forgotten}"))?;
    Ok(ExitCode::SUCCESS)
}

async fn autostart(context: &Context, args: &NetAutostart) -> anyhow::Result<ExitCode> {
    let name = &args.network;
    let _lock = networks::lock(&context.paths, context.wait).await?;
    let registry: Registry<NetworkDefinition> = Registry::new(&context.paths);
    let definition = registry.load(name)?;
    let wanted = !args.off;
    let changed = definition.autostart != wanted;
    if changed {
        registry.replace(name, &NetworkDefinition { autostart: wanted, ..definition })?;
    }
    if context.json {
        let content = json!({ "network": name, "autostart": wanted, "changed": changed });
        output::document("snapctl.net-autostart/1", &content)?;
        return Ok(ExitCode::SUCCESS);
    }
    let already = if changed { "" } else { " already" };
    output::line(&match wanted {
        true => format!("network {name} is started with the host{already}"),
        false => format!("network {name} is not started with the host{already}"),
    })?;
    if wanted && !Path::new("/run/systemd/system").is_dir() {
        context.note(
            "note: there is no systemd here: let the host run 'snapctl net start --autostart' when it starts",
        );
    }
    Ok(ExitCode::SUCCESS)
}

async fn remove(context: &Context, args: &OneNet) -> anyhow::Result<ExitCode> {
    let _lock = networks::lock(&context.paths, context.wait).await?;
    networks::remove(&context.paths, &args.network)?;
    if context.json {
        output::document("snapctl.net-remove/1", &json!({ "network": args.network }))?;
    } else {
        output::line(&format!("network {} is no longer defined", args.network))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn leases(context: &Context, args: &OneNet) -> anyhow::Result<ExitCode> {
    networks::known(&context.paths, &args.network)?;
    let file = networks::places(&context.paths).leases(&args.network);
    let now = u64::try_from(Timestamp::now().as_second()).unwrap_or(0);
    let leases = net::leases(&file, now).map_err(vm::Error::from)?;
    let until = |lease: &net::Lease| {
        let until = i64::try_from(lease.until?).ok()?;
        Timestamp::from_second(until).ok().map(|until| until.to_string())
    };
    if context.json {
        let leases: Vec<Value> = leases
            .iter()
            .map(|lease| {
                json!({ "mac": lease.mac, "address": lease.address, "name": lease.name, "until": until(lease) })
            })
            .collect();
        output::document("snapctl.net-leases/1", &json!({ "network": args.network, "leases": leases }))?;
    } else if leases.is_empty() {
        context.note(&format!("no guest has an address of network {}", args.network));
    } else {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let row = |lease: &net::Lease| {
            vec![
                or_dash(lease.mac.map(|mac| mac.to_string())),
                lease.address.to_string(),
                or_dash(lease.name.clone()),
                until(lease).unwrap_or_else(|| "never".to_owned()),
            ]
        };
        output::table(&["mac", "address", "name", "until"], &[], leases.iter().map(row).collect())?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn plug(context: &Context, args: &NetPlug) -> anyhow::Result<ExitCode> {
    let (paths, name, port) = (&context.paths, &args.network, &args.port);
    let request = PortRequest {
        mac: args.mac,
        address: args.address.clone(),
        trust: args.trust,
        vlan: args.vlan,
        trunk: args.trunk.clone(),
        isolated: args.isolated,
        multi_queue: args.multi_queue,
        owner: args.owner,
        mtu: args.mtu,
        in_rate: args.in_rate,
        out_rate: args.out_rate,
    };
    let _lock = networks::lock(paths, context.wait).await?;
    networks::known(paths, name)?;
    let host = host_to_change(context)?;
    let new = lifecycle::plug(&host, name, port, &request).await.map_err(vm::Error::from)?;
    if context.json {
        output::document("snapctl.net-plug/1", &json!({ "network": name, "port": port, "changed": new }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let already = if new { "" } else { " already" };
    output::line(&format!("{port} is a port of network {name}{already}"))?;
    Ok(ExitCode::SUCCESS)
}

async fn unplug(context: &Context, args: &NetUnplug) -> anyhow::Result<ExitCode> {
    let (paths, name, port) = (&context.paths, &args.network, &args.port);
    let _lock = networks::lock(paths, context.wait).await?;
    networks::known(paths, name)?;
    let host = host_to_change(context)?;
    lifecycle::unplug(&host, name, port).await.map_err(vm::Error::from)?;
    if context.json {
        output::document("snapctl.net-unplug/1", &json!({ "network": name, "port": port }))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&format!("{port} is no longer a port of network {name}"))?;
    Ok(ExitCode::SUCCESS)
}

/// Settles what killed commands left of every network; tells of which.
pub async fn recover(context: &Context) -> anyhow::Result<Vec<Name>> {
    let paths = &context.paths;
    let interrupted = |name: &Name| {
        let record = Record::load(&networks::places(paths), name);
        record.is_ok_and(|record| record.is_some_and(|record| record.is_interrupted()))
    };
    let names: Vec<Name> = networks::names(paths)?.into_iter().filter(interrupted).collect();
    if names.is_empty() {
        return Ok(names);
    }
    let _lock = networks::lock(paths, context.wait).await?;
    let host = host_to_change(context)?;
    for name in &names {
        lifecycle::settle(&host, name).await.map_err(vm::Error::from)?;
    }
    Ok(names)
}
