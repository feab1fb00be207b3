//! `snapctl volume`

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use host::watch::Watch;
use model::{ByteSize, Name};
use serde_json::{Value, json};
use storage::PoolError;
use storage::map::Stretch;
use storage::pool::Volume;
use storage::qcow2::Qcow2Error;
use storage::qcow2::map::Kind;
use storage::volume::{
    Action, CloneMethod, Effort, NewVolume, Preallocation, VolumePlan, WipeMethod, carry_out,
};
use vm::pools::{OpenPool, refuse_claimed};

use super::create::watch_signals;
use crate::args::{self, CloneBy, Copying, OneVolume, Preallocate, ProgressStyle, WipeBy};
use crate::context::Context;
use crate::line::Line;
use crate::output;

/// How often the progress is looked at.
const LOOK: Duration = Duration::from_millis(100);

pub async fn run(context: &Context, command: args::Volume) -> anyhow::Result<ExitCode> {
    match command {
        args::Volume::Create(args) => create(context, &args).await,
        args::Volume::List(args) => list(context, args.pool.as_ref()),
        args::Volume::Show(args) if args.map => map(context, &args.volume),
        args::Volume::Show(args) => show(context, &args.volume),
        args::Volume::Resize(args) => resize(context, &args).await,
        args::Volume::Clone(args) => clone(context, &args).await,
        args::Volume::Convert(args) => convert(context, &args).await,
        args::Volume::Copy(args) => copy(context, &args).await,
        args::Volume::Import(args) => import(context, &args).await,
        args::Volume::Export(args) => export(context, &args).await,
        args::Volume::Wipe(args) => wipe(context, &args).await,
        args::Volume::Delete(args) => delete(context, &args).await,
    }
}

async fn create(context: &Context, args: &args::VolumeCreate) -> anyhow::Result<ExitCode> {
    let pool = context.pool(&args.pool).await?;
    let wanted = NewVolume {
        size: args.size,
        format: args.format,
        preallocation: match args.preallocation {
            Preallocate::Off => Preallocation::Off,
            Preallocate::Metadata => Preallocation::Metadata,
            Preallocate::Falloc => Preallocation::Falloc,
            Preallocate::Full => Preallocation::Full,
        },
        backing: args.backing.clone(),
        key: args.key_file.as_ref().map(std::path::absolute).transpose()?,
    };
    let plan = pool.here().create(&args.volume, &wanted).map_err(vm::Error::from)?;
    refuse_claimed_base(context, &plan)?;
    perform(context, pool, vec![plan], &args.copying).await
}

/// What a VM or a snapshot stands on is not for others to stand on: it may be merged into.
fn refuse_claimed_base(context: &Context, plan: &VolumePlan) -> Result<(), vm::Error> {
    match &plan.action {
        Action::Create { backing: Some(below), .. } => refuse_claimed(&context.paths, below.place.path()),
        _ => Ok(()),
    }
}

async fn clone(context: &Context, args: &args::VolumeClone) -> anyhow::Result<ExitCode> {
    let pool = context.pool(&args.volume.pool).await?;
    let method = match args.method {
        CloneBy::Auto => None,
        CloneBy::Reflink => Some(CloneMethod::Reflink),
        CloneBy::Thin => Some(CloneMethod::Thin),
        CloneBy::Backing => Some(CloneMethod::Backing),
        CloneBy::Copy => Some(CloneMethod::Copy),
    };
    let plan = pool.here().clone_of(&args.volume.volume, &args.new, method).map_err(vm::Error::from)?;
    refuse_claimed_base(context, &plan)?;
    perform(context, pool, vec![plan], &args.copying).await
}

async fn convert(context: &Context, args: &args::VolumeConvert) -> anyhow::Result<ExitCode> {
    let pool = context.pool(&args.volume.pool).await?;
    let plan = pool.here().convert(&args.volume.volume, &args.new, args.format).map_err(vm::Error::from)?;
    perform(context, pool, vec![plan], &args.copying).await
}

async fn copy(context: &Context, args: &args::VolumeCopy) -> anyhow::Result<ExitCode> {
    let name = args.new.as_ref().unwrap_or(&args.volume.volume);
    let to = context.pool(&args.to).await?;
    // The other pool is read only, and its lock would have to be taken in an order.
    let from = OpenPool::look(&context.paths, &args.volume.pool)?;
    let plan =
        to.here().copy(from.here(), &args.volume.volume, name, args.format).map_err(vm::Error::from)?;
    perform(context, to, vec![plan], &args.copying).await
}

async fn import(context: &Context, args: &args::VolumeImport) -> anyhow::Result<ExitCode> {
    let pool = context.pool(&args.pool).await?;
    let file = std::path::absolute(&args.file)?;
    let plans = pool.here().import(&file, &args.volume, args.from, args.format).map_err(vm::Error::from)?;
    perform(context, pool, plans, &args.copying).await
}

async fn export(context: &Context, args: &args::VolumeExport) -> anyhow::Result<ExitCode> {
    let pool = context.pool(&args.volume.pool).await?;
    let file = std::path::absolute(&args.file)?;
    let plan = pool.here().export(&args.volume.volume, &file, args.format).map_err(vm::Error::from)?;
    perform(context, pool, vec![plan], &args.copying).await
}

async fn resize(context: &Context, args: &args::VolumeResize) -> anyhow::Result<ExitCode> {
    let pool = context.pool(&args.volume.pool).await?;
    let plan = pool.here().resize(&args.volume.volume, args.size, args.shrink).map_err(vm::Error::from)?;
    if let Action::Resize { volume, .. } = &plan.action {
        refuse_claimed(&context.paths, volume.place.path())?;
    }
    let copying = Copying { dry_run: args.dry_run, bandwidth: None, progress: ProgressStyle::Off };
    perform(context, pool, vec![plan], &copying).await
}

async fn wipe(context: &Context, args: &args::VolumeWipe) -> anyhow::Result<ExitCode> {
    let pool = context.pool(&args.volume.pool).await?;
    let method = match args.method {
        WipeBy::Zero => WipeMethod::Zero,
        WipeBy::Discard => WipeMethod::Discard,
    };
    let plan = pool.here().wipe(&args.volume.volume, method).map_err(vm::Error::from)?;
    if let Action::Wipe { volume, .. } = &plan.action {
        refuse_claimed(&context.paths, volume.place.path())?;
    }
    perform(context, pool, vec![plan], &args.copying).await
}

async fn delete(context: &Context, args: &args::VolumeDelete) -> anyhow::Result<ExitCode> {
    let pool = context.pool(&args.pool).await?;
    let mut plans = Vec::new();
    for name in &args.volumes {
        let mut plan = pool.here().delete(name).map_err(vm::Error::from)?;
        if let Action::Delete { volume, unseal } = &mut plan.action {
            refuse_claimed(&context.paths, volume.place.path())?;
            // One that snapshots hold stays sealed.
            *unseal = unseal.take().filter(|base| refuse_claimed(&context.paths, base).is_ok());
        }
        plans.push(plan);
    }
    let copying = Copying { dry_run: args.dry_run, bandwidth: None, progress: ProgressStyle::Off };
    perform(context, pool, plans, &copying).await
}

/// Shows the plans, or carries them out and tells of each.
async fn perform(
    context: &Context,
    pool: OpenPool,
    plans: Vec<VolumePlan>,
    copying: &Copying,
) -> anyhow::Result<ExitCode> {
    if copying.dry_run {
        let steps: Vec<_> = plans.iter().flat_map(VolumePlan::steps).collect();
        let headline = format!("pool {}: this would be done:", pool.name);
        output::plan(context.json, &headline, &json!({ "plans": plans }), &steps)?;
        return Ok(ExitCode::SUCCESS);
    }
    let watch = Watch::default();
    // The work looks at the flag; nothing else here waits.
    let _signalled = watch_signals(&watch.flag())?;
    let effort = Effort { tie: context.tools().tie, watch: watch.clone(), bandwidth: copying.bandwidth };
    let work = tokio::task::spawn_blocking(move || {
        let done = plans.into_iter().map(|plan| {
            let made = carry_out(pool.here(), &plan, &effort)?;
            Ok((plan, made))
        });
        done.collect::<Result<Vec<(VolumePlan, Option<Volume>)>, PoolError>>()
    });
    let done = show_progress(context, work, &watch, copying.progress).await?.map_err(vm::Error::from)?;
    if context.json {
        let items: Vec<Value> =
            done.iter().map(|(plan, volume)| json!({ "plan": plan, "volume": volume })).collect();
        output::document("snapctl.volume-done/1", &json!({ "done": items }))?;
        return Ok(ExitCode::SUCCESS);
    }
    done.iter().try_for_each(|(plan, volume)| output::line(&told(plan, volume.as_ref())))?;
    Ok(ExitCode::SUCCESS)
}

/// Waits for the work, and shows how far it is.
async fn show_progress<T>(
    context: &Context,
    mut work: tokio::task::JoinHandle<T>,
    watch: &Watch,
    style: ProgressStyle,
) -> anyhow::Result<T> {
    let terminal = io::stderr().is_terminal() && !context.quiet;
    let mut line = Line::default();
    let mut told = None;
    let done = loop {
        tokio::select! {
            done = &mut work => break done,
            () = tokio::time::sleep(LOOK) => {}
        }
        let Some((done, total)) = watch.progress() else { continue };
        match style {
            ProgressStyle::Json if told != Some(done) => {
                output::note(&json!({ "progress": "copied", "done": done, "total": total }).to_string());
                told = Some(done);
            }
            ProgressStyle::Auto if terminal => {
                line.show(|| format!("{}% of {}", done.saturating_mul(100) / total, ByteSize(total)));
            }
            _ => {}
        }
    };
    line.clear();
    Ok(done?)
}

fn told(plan: &VolumePlan, volume: Option<&Volume>) -> String {
    let pool = &plan.pool;
    let what = |volume: &Volume| {
        format!("{}, {}, {}", volume.place.path().display(), volume.format, volume.virtual_size)
    };
    match (&plan.action, volume) {
        (Action::Create { .. }, Some(volume)) => {
            format!("{pool}: volume {} is made ({})", volume.name, what(volume))
        }
        (Action::Clone { from, method, .. }, Some(volume)) => {
            format!(
                "{pool}: volume {} is cloned from {} by {} ({})",
                volume.name,
                from.name,
                method.as_str(),
                what(volume)
            )
        }
        (Action::Fill { from, transfer, .. }, Some(volume)) => {
            let how = match transfer {
                storage::volume::Transfer::Copy => "copied",
                storage::volume::Transfer::Convert => "converted",
            };
            format!("{pool}: volume {} is {how} from {} ({})", volume.name, from.path.display(), what(volume))
        }
        (Action::Resize { .. }, Some(volume)) => {
            format!("{pool}: volume {} has {} now", volume.name, volume.virtual_size)
        }
        (Action::Wipe { .. }, Some(volume)) => {
            format!("{pool}: volume {} holds nothing any more", volume.name)
        }
        (Action::Delete { volume, .. }, _) => format!("{pool}: volume {} is removed", volume.name),
        (Action::Export { to, format, .. }, _) => {
            format!("{pool}: exported into {} ({format})", to.display())
        }
        (_, None) => format!("{pool}: done"),
    }
}

fn list(context: &Context, only: Option<&Name>) -> anyhow::Result<ExitCode> {
    let names = match only {
        Some(name) => vec![name.clone()],
        None => context.pools().names()?,
    };
    let mut items = Vec::new();
    let mut rows = Vec::new();
    for name in names {
        let volumes = OpenPool::look(&context.paths, &name).and_then(|opened| {
            opened.pool.ready().and_then(|()| opened.pool.volumes()).map_err(vm::Error::from)
        });
        let volumes = match volumes {
            Ok(volumes) => volumes,
            Err(fault) if only.is_some() => return Err(fault.into()),
            Err(fault) => {
                output::note(&format!("warning: {fault}"));
                continue;
            }
        };
        for volume in volumes {
            rows.push(row(&name, &volume));
            items.push(as_json(&name, &volume));
        }
    }
    if context.json {
        output::document("snapctl.volumes/1", &json!({ "volumes": items }))?;
    } else if rows.is_empty() {
        context.note("no volumes");
    } else {
        let heading = ["pool", "name", "format", "size", "allocated", "path"];
        output::table(&heading, &["size", "allocated"], rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn as_json(pool: &Name, volume: &Volume) -> Value {
    let mut item = json!(volume);
    item["pool"] = json!(pool);
    item["path"] = json!(volume.place.path());
    item
}

fn row(pool: &Name, volume: &Volume) -> Vec<String> {
    let mark = match (&volume.fault, volume.foreign) {
        (Some(_), _) => " (broken)",
        (None, true) => " (not snapctl's)",
        (None, false) => "",
    };
    vec![
        pool.to_string(),
        format!("{}{mark}", volume.name),
        volume.format.to_string() + if volume.encrypted { ", encrypted" } else { "" },
        volume.virtual_size.to_string(),
        volume.allocated.to_string(),
        volume.place.path().display().to_string(),
    ]
}

/// Prints what a guest reads, stretch by stretch, as it is found: a map can have millions of them.
fn map(context: &Context, args: &OneVolume) -> anyhow::Result<ExitCode> {
    let opened = OpenPool::look(&context.paths, &args.pool)?;
    opened.pool.ready().map_err(vm::Error::from)?;
    let found = opened.here().volume(&args.volume).map_err(vm::Error::from)?;
    let chain = opened.here().chain(&found).map_err(vm::Error::from)?;
    let layers: Vec<_> = chain.layers().rev().map(|layer| layer.path.as_path()).collect();
    let mut out = io::BufWriter::with_capacity(64 << 10, io::stdout().lock());
    if context.json {
        let (volume, layers) = (json!(found.name), json!(layers));
        write!(out, "{{\"schema\":\"snapctl.map/1\",\"volume\":{volume},\"layers\":{layers},\"map\":[")?;
    } else {
        writeln!(out, "{:>16} {:>16} {:>5}  {:10}  OFFSET", "START", "LENGTH", "LAYER", "WHAT")?;
    }
    let mut comma = "";
    let written = storage::map::of_chain::<MapFault>(&chain, &mut |stretch| {
        let Stretch { start, length, kind, depth } = stretch;
        let (what, offset) = match kind {
            Kind::Data { offset } => ("data", Some(offset)),
            Kind::Compressed => ("compressed", None),
            Kind::Zero | Kind::Unallocated => ("zero", None),
        };
        if context.json {
            let offset = offset.map_or_else(|| "null".to_owned(), |offset| offset.to_string());
            write!(
                out,
                "{comma}{{\"start\":{start},\"length\":{length},\"layer\":{depth},\"what\":\"{what}\",\"offset\":{offset}}}"
            )?;
            comma = ",";
        } else {
            let offset = offset.map(|offset| offset.to_string()).unwrap_or_default();
            let layer = if what == "zero" { "-".to_owned() } else { depth.to_string() };
            writeln!(out, "{start:>16} {length:>16} {layer:>5}  {what:10}  {offset}")?;
        }
        Ok(())
    });
    match written {
        Ok(()) => {}
        Err(MapFault::Output(fault)) => return Err(fault.into()),
        Err(MapFault::Image(fault)) => return Err(vm::Error::from(PoolError::from(fault)).into()),
    }
    if context.json {
        writeln!(out, "]}}")?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Why a map ends early.
enum MapFault {
    Image(Qcow2Error),
    Output(io::Error),
}

impl From<Qcow2Error> for MapFault {
    fn from(fault: Qcow2Error) -> Self {
        Self::Image(fault)
    }
}

impl From<io::Error> for MapFault {
    fn from(fault: io::Error) -> Self {
        Self::Output(fault)
    }
}

fn show(context: &Context, args: &OneVolume) -> anyhow::Result<ExitCode> {
    let opened = OpenPool::look(&context.paths, &args.pool)?;
    opened.pool.ready().map_err(vm::Error::from)?;
    let found =
        storage::pool::find(opened.pool.as_ref(), &args.pool, &args.volume).map_err(vm::Error::from)?;
    let path = found.place.path();
    let claim = refuse_claimed(&context.paths, path).err().map(|fault| fault.to_string());
    let users = host::open_files::user_of(path).map_err(vm::Error::from)?.describe("it");
    let sealed = storage::seal::state(path).is_ok_and(storage::seal::SealState::is_sealed);
    let sealed = sealed.then(|| "against writing, as others stand on it".to_owned());
    let backing = found.backing.as_ref().map(|below| below.display().to_string());
    if context.json {
        let mut document = as_json(&args.pool, &found);
        document["in_use"] = json!(users);
        document["claim"] = json!(claim);
        document["sealed"] = json!(sealed.is_some());
        output::document("snapctl.volume/1", &document)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut facts = vec![
        ("volume", found.name.to_string()),
        ("pool", args.pool.to_string()),
        ("path", path.display().to_string()),
        ("format", found.format.to_string() + if found.encrypted { ", encrypted" } else { "" }),
        ("size", found.virtual_size.to_string()),
        ("allocated", found.allocated.to_string()),
    ];
    let more = [
        ("stands on", backing),
        ("cloned from", found.origin.clone()),
        ("sealed", sealed),
        ("in use", users),
        ("belongs to", claim),
        ("fault", found.fault.clone()),
    ];
    facts.extend(more.into_iter().filter_map(|(name, value)| Some((name, value?))));
    output::facts(&facts)?;
    Ok(ExitCode::SUCCESS)
}
