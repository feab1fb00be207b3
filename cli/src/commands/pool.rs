//! `snapctl pool`

use std::path::Path;
use std::process::ExitCode;

use model::{ByteSize, Name};
use serde_json::{Value, json};
use storage::pool::{Changed, Kind, PoolDefinition, Request, Usage, Volume};
use toml::Table;
use vm::pools::{self, OpenPool};
use vm::{Added, read_definition};

use crate::args::{OnePool, Pool, PoolAutostart, PoolDefine, PoolStart};
use crate::context::Context;
use crate::failure;
use crate::output;

pub async fn run(context: &Context, command: Pool) -> anyhow::Result<ExitCode> {
    match command {
        Pool::Define(args) => define(context, args).await,
        Pool::List => list(context),
        Pool::Show(args) => show(context, &args.pool),
        Pool::Start(args) => start(context, &args).await,
        Pool::Stop(args) => stop(context, &args).await,
        Pool::Autostart(args) => autostart(context, &args).await,
        Pool::Refresh(args) => refresh(context, &args).await,
        Pool::Remove(args) => remove(context, &args).await,
    }
}

async fn define(context: &Context, args: PoolDefine) -> anyhow::Result<ExitCode> {
    let (kind, options, autostart) = wanted(&args)?;
    let kind = Kind::named(&kind).map_err(vm::Error::from)?;
    let _lock = pools::lock(&context.paths, &args.pool, context.wait).await?;
    let mounts = context.paths.mounts();
    let request = Request { pool: &args.pool, options, mounts: &mounts, initialize: args.initialize };
    let (definition, added) = pools::define(&context.paths, kind, &request, autostart)?;
    let pool = definition.open(&args.pool).map_err(vm::Error::from)?;
    let ready = pool.ready().err().map(|fault| fault.to_string());
    if context.json {
        let content = json!({
            "pool": args.pool, "new": added == Added::New, "definition": definition, "ready": ready.is_none(),
        });
        output::document("snapctl.pool-define/1", &content)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (name, place) = (&args.pool, pool.location());
    output::line(&match added {
        Added::New => format!("pool {name} is defined: {} {place}", kind.name),
        Added::AlreadySo => format!("pool {name} was defined so already: {} {place}", kind.name),
    })?;
    if let Some(why) = ready {
        context.note(&format!("note: {why}; 'snapctl pool start {name}' starts it"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Kind, options and autostart, from the command line or from a file.
fn wanted(args: &PoolDefine) -> anyhow::Result<(String, Table, bool)> {
    let mut options = Table::new();
    let mut autostart = args.autostart;
    let mut kind = args.kind.clone().unwrap_or_default();
    if let Some(file) = &args.file {
        let definition: PoolDefinition = read_definition(file)?;
        (kind, options) = (definition.kind, definition.options);
        autostart |= definition.autostart;
    }
    let paths = [("path", &args.path), ("source", &args.source), ("device", &args.device)];
    for (key, path) in paths.into_iter().filter_map(|(key, path)| Some((key, path.as_ref()?))) {
        let absolute = std::path::absolute(path)?;
        options.insert(key.into(), absolute.display().to_string().into());
    }
    let texts = [("vg", &args.vg), ("thin-pool", &args.thin_pool)];
    options.extend(texts.into_iter().filter_map(|(key, text)| Some((key.to_owned(), text.clone()?.into()))));
    let limits = [("data-limit", args.data_limit), ("metadata-limit", args.metadata_limit)];
    options.extend(limits.into_iter().filter_map(|(key, limit)| Some((key.to_owned(), limit?.into()))));
    Ok((kind, options, autostart))
}

/// What can be told of a pool now.
struct Seen {
    definition: Option<PoolDefinition>,
    location: String,
    /// Why it cannot be used.
    fault: Option<String>,
    usage: Option<Usage>,
    volumes: Vec<Volume>,
}

fn look(context: &Context, name: &Name) -> Seen {
    let opened = match OpenPool::look(&context.paths, name) {
        Ok(opened) => opened,
        Err(fault) => {
            let fault = Some(fault.to_string());
            return Seen {
                definition: None,
                location: String::new(),
                fault,
                usage: None,
                volumes: Vec::new(),
            };
        }
    };
    let location = opened.pool.location();
    let seen = opened.pool.ready().and_then(|()| Ok((opened.pool.usage()?, opened.pool.volumes()?)));
    let (usage, volumes, fault) = match seen {
        Ok((usage, volumes)) => (Some(usage), volumes, None),
        Err(fault) => (None, Vec::new(), Some(fault.to_string())),
    };
    Seen { definition: Some(opened.definition), location, fault, usage, volumes }
}

impl Seen {
    fn kind(&self) -> &str {
        self.definition.as_ref().map_or("", |definition| &definition.kind)
    }

    fn autostart(&self) -> bool {
        self.definition.as_ref().is_some_and(|definition| definition.autostart)
    }

    fn state(&self) -> &'static str {
        match (&self.definition, &self.fault) {
            (None, _) => "broken",
            (_, None) => "ready",
            (_, Some(_)) => "not ready",
        }
    }

    /// What guests may come to write, of all volumes together.
    fn promised(&self) -> ByteSize {
        ByteSize(self.volumes.iter().map(|volume| volume.virtual_size.0).fold(0, u64::saturating_add))
    }

    /// How much more that is than there is room for: 1.5 means half as much again.
    fn commitment(&self) -> Option<f64> {
        let capacity = self.usage.as_ref()?.capacity.0;
        (capacity > 0).then(|| self.promised().0 as f64 / capacity as f64)
    }

    fn document(&self, name: &Name) -> Value {
        json!({
            "pool": name, "type": self.kind(), "location": self.location, "state": self.state(), "fault": self.fault,
            "autostart": self.autostart(), "usage": self.usage, "volumes": self.volumes.len(),
            "promised": self.promised(), "commitment": self.commitment(), "definition": self.definition,
        })
    }
}

fn list(context: &Context) -> anyhow::Result<ExitCode> {
    let names = context.pools().names()?;
    let seen: Vec<(Name, Seen)> =
        names.into_iter().map(|name| (name.clone(), look(context, &name))).collect();
    if context.json {
        let pools: Vec<Value> = seen.iter().map(|(name, seen)| seen.document(name)).collect();
        output::document("snapctl.pools/1", &json!({ "pools": pools }))?;
    } else if seen.is_empty() {
        context.note("no pool is defined; 'snapctl pool define p1 dir --path DIR' defines one");
    } else {
        let size = |of: fn(&Usage) -> ByteSize, seen: &Seen| {
            seen.usage.as_ref().map_or_else(|| "-".to_owned(), |usage| of(usage).to_string())
        };
        let row = |(name, seen): &(Name, Seen)| {
            vec![
                name.to_string(),
                seen.kind().to_owned(),
                seen.state().to_owned(),
                if seen.autostart() { "yes" } else { "no" }.to_owned(),
                seen.volumes.len().to_string(),
                size(|usage| usage.capacity, seen),
                size(|usage| usage.available, seen),
                seen.location.clone(),
            ]
        };
        let heading = ["name", "type", "state", "autostart", "volumes", "capacity", "available", "location"];
        output::table(&heading, &["volumes", "capacity", "available"], seen.iter().map(row).collect())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(context: &Context, name: &Name) -> anyhow::Result<ExitCode> {
    let opened = OpenPool::look(&context.paths, name)?;
    let seen = look(context, name);
    let can = seen.usage.as_ref().and_then(|_| opened.pool.capabilities().ok());
    if context.json {
        let mut document = seen.document(name);
        document["capabilities"] = json!(can);
        output::document("snapctl.pool/1", &document)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut facts = vec![
        ("pool", name.to_string()),
        ("type", seen.kind().to_owned()),
        ("location", seen.location.clone()),
        ("state", seen.fault.as_ref().map_or_else(|| "ready".to_owned(), |why| format!("not ready: {why}"))),
        ("autostart", if seen.autostart() { "yes" } else { "no" }.to_owned()),
    ];
    if let Some(usage) = &seen.usage {
        facts.push(("capacity", usage.capacity.to_string()));
        facts.push(("allocated", usage.allocated.to_string()));
        facts.push(("available", usage.available.to_string()));
        let promised = format!("{} in {} volumes", seen.promised(), seen.volumes.len());
        let over =
            seen.commitment().map_or_else(String::new, |times| format!(" ({times:.2} × the capacity)"));
        facts.push(("promised", promised + &over));
        if let Some(thin) = &usage.thin {
            let of =
                |used: f64, limit: f64| format!("{used:.1} % full, refuses new volumes from {limit} % on");
            facts.push(("thin data", of(thin.data_percent, thin.data_limit)));
            let metadata = of(thin.metadata_percent, thin.metadata_limit);
            facts.push(("thin metadata", format!("{metadata} ({})", thin.metadata_size)));
        }
    }
    if let Some(can) = can {
        let able = [
            ("thin volumes", can.thin),
            ("snapshots", can.snapshot),
            ("clones", can.clone),
            ("resize", can.resize),
            ("reflink", can.reflink),
        ];
        let able: Vec<&str> = able.into_iter().filter_map(|(what, can)| can.then_some(what)).collect();
        facts.push(("can", able.join(", ")));
        facts.push(("formats", can.formats.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")));
    }
    output::facts(&facts)?;
    Ok(ExitCode::SUCCESS)
}

async fn start(context: &Context, args: &PoolStart) -> anyhow::Result<ExitCode> {
    let Some(name) = &args.pool else { return start_all(context).await };
    let changed = start_one(context, name).await?;
    tell(context, name, changed, ["is started", "is started already", "needs no start"])?;
    Ok(ExitCode::SUCCESS)
}

async fn start_one(context: &Context, name: &Name) -> Result<Changed, vm::Error> {
    let opened = OpenPool::locked(&context.paths, name, context.wait).await?;
    let changed = opened.pool.start()?;
    // Observed, not expected.
    opened.pool.ready()?;
    Ok(changed)
}

/// Every pool that is to be started with the host. One that does not start keeps no other from it.
async fn start_all(context: &Context) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    let mut items = Vec::new();
    for name in context.pools().names()? {
        match context.pools().load(&name) {
            Ok(definition) if !definition.autostart => continue,
            _ => {}
        }
        match start_one(context, &name).await {
            Ok(changed) => {
                items.push(json!({ "pool": name, "changed": changed == Changed::Changed, "error": null }));
                if !context.json {
                    tell(context, &name, changed, ["is started", "is started already", "needs no start"])?;
                }
            }
            Err(fault) => {
                items.push(json!({ "pool": name, "changed": false, "error": fault.to_string() }));
                output::note(&format!("warning: {fault}"));
                code = ExitCode::from(failure::code::WARNINGS);
            }
        }
    }
    if context.json {
        output::document("snapctl.pool-start/1", &json!({ "pools": items }))?;
    }
    Ok(code)
}

async fn stop(context: &Context, args: &OnePool) -> anyhow::Result<ExitCode> {
    let opened = OpenPool::locked(&context.paths, &args.pool, context.wait).await?;
    let changed = opened.pool.stop().map_err(vm::Error::from)?;
    tell(
        context,
        &args.pool,
        changed,
        ["is stopped", "is stopped already", "has nothing that could be stopped"],
    )?;
    Ok(ExitCode::SUCCESS)
}

fn tell(context: &Context, name: &Name, changed: Changed, texts: [&str; 3]) -> anyhow::Result<()> {
    if context.json {
        let content = json!({ "pool": name, "changed": changed == Changed::Changed });
        return output::document("snapctl.pool-state/1", &content);
    }
    let text = match changed {
        Changed::Changed => texts[0],
        Changed::AlreadySo => texts[1],
        Changed::Nothing => texts[2],
    };
    output::line(&format!("pool {name} {text}"))
}

async fn autostart(context: &Context, args: &PoolAutostart) -> anyhow::Result<ExitCode> {
    let opened = OpenPool::locked(&context.paths, &args.pool, context.wait).await?;
    let wanted = !args.off;
    let changed = opened.definition.autostart != wanted;
    if changed {
        let definition = PoolDefinition { autostart: wanted, ..opened.definition.clone() };
        context.pools().replace(&args.pool, &definition)?;
    }
    if context.json {
        let content = json!({ "pool": args.pool, "autostart": wanted, "changed": changed });
        output::document("snapctl.pool-autostart/1", &content)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (name, already) = (&args.pool, if changed { "" } else { " already" });
    output::line(&match wanted {
        true => format!("pool {name} is started with the host{already}"),
        false => format!("pool {name} is not started with the host{already}"),
    })?;
    if wanted && !Path::new("/run/systemd/system").is_dir() {
        context.note("note: there is no systemd here: let the host run 'snapctl pool start --autostart' when it starts");
    }
    Ok(ExitCode::SUCCESS)
}

async fn refresh(context: &Context, args: &OnePool) -> anyhow::Result<ExitCode> {
    let opened = context.pool(&args.pool).await?;
    let volumes = opened.pool.volumes().map_err(vm::Error::from)?;
    let broken: Vec<&Volume> = volumes.iter().filter(|volume| volume.fault.is_some()).collect();
    if context.json {
        output::document("snapctl.pool-refresh/1", &json!({ "pool": args.pool, "volumes": volumes }))?;
    } else {
        output::line(&format!("pool {}: {} volumes", args.pool, volumes.len()))?;
    }
    for volume in &broken {
        let fault = volume.fault.as_deref().unwrap_or_default();
        output::note(&format!("warning: volume {} cannot be used: {fault}", volume.name));
    }
    Ok(if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(failure::code::WARNINGS) })
}

async fn remove(context: &Context, args: &OnePool) -> anyhow::Result<ExitCode> {
    let lock = pools::lock(&context.paths, &args.pool, context.wait).await?;
    match OpenPool::look(&context.paths, &args.pool) {
        // The mark goes while it can; a place that is not there keeps it.
        Ok(opened) if opened.pool.ready().is_ok() => opened.pool.forget().map_err(vm::Error::from)?,
        Ok(_) => {}
        // One that cannot be read can still be removed.
        Err(vm::Error::BadDefinition { .. } | vm::Error::Pool(_)) => {}
        Err(fault) => return Err(fault.into()),
    }
    context.pools().remove(&args.pool)?;
    drop(lock);
    if context.json {
        output::document("snapctl.pool-remove/1", &json!({ "pool": args.pool }))?;
    } else {
        output::line(&format!("pool {} is no longer defined; its volumes stay as they are", args.pool))?;
    }
    Ok(ExitCode::SUCCESS)
}
