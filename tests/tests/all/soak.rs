//! The whole life of a chain, at random: a guest that never stops writing is snapshotted, reverted, merged, flattened and
//! pruned, and the tool is killed at random instants. Not one synced record may be lost.
//!
//! `cargo xtask soak` runs it for as long as one likes, from another seed each time; among the other tests it is short, and
//! its choices are the same ones. The seed is printed: the same one makes the same choices, though not at the same instants.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::lab::{self, DiskSpec, Guest, Progress, Qemu};

use crate::support::Scene;

/// How long it lasts among the other tests.
const SHORT: Duration = Duration::from_secs(20);
/// What it chooses then.
const SEED: u64 = 457_099_898;
/// A kill comes at most so late, and most commands have ended by then; or one time in four at most as late as the second.
const LATEST_KILL_MS: [u64; 2] = [400, 2000];
/// Of ten commands, so many are killed.
const KILLED_OF_TEN: u64 = 4;
/// More snapshots than that are never kept.
const MOST_SNAPSHOTS: usize = 12;

/// SplitMix64. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        let index = self.below(u64::try_from(of.len()).ok()?.max(1));
        of.get(usize::try_from(index).ok()?)
    }
}

/// What the soak knows.
struct Soak {
    scene: Scene,
    dice: Dice,
    /// What was synced when each snapshot was begun, by its name.
    before: BTreeMap<String, Progress>,
    taken: u32,
    /// Commands, kills, and how often each verb ran.
    done: BTreeMap<String, u32>,
}

impl Soak {
    async fn begin(qemu: Qemu, seed: u64) -> Result<Self> {
        let disks = [DiskSpec::new("va").iothread(), DiskSpec::new("sb").raw().scsi().drive()];
        let scene = Scene::boot(Guest::spec().disks(disks).qemu(qemu)).await?;
        Ok(Self { scene, dice: Dice(seed), before: BTreeMap::new(), taken: 0, done: BTreeMap::new() })
    }

    /// What is done next, as a command line.
    fn choose(&mut self, names: &[String]) -> String {
        let some = |dice: &mut Dice| dice.pick(names).cloned();
        let choice = if names.len() >= MOST_SNAPSHOTS { 10 } else { self.dice.below(16) };
        match (choice, some(&mut self.dice)) {
            (8..=10, Some(first)) => match some(&mut self.dice).filter(|other| *other != first) {
                Some(second) => format!("delete vm1 {first} {second}"),
                None => format!("delete vm1 {first}"),
            },
            (11, Some(_)) => "flatten vm1".to_owned(),
            (12, Some(name)) => format!("revert vm1 {name}"),
            (13, Some(name)) => format!("revert vm1 {name} --discard"),
            (14, Some(_)) => format!("prune vm1 --keep-last {}", 1 + self.dice.below(4)),
            (15, _) => "recover vm1".to_owned(),
            (at, _) => {
                self.taken += 1;
                let quiesce = if at % 2 == 0 { "--quiesce=try" } else { "" };
                format!("create vm1 --name s{} {quiesce}", self.taken)
            }
        }
    }

    async fn step(&mut self) -> Result<String> {
        let names = self.scene.names().await?;
        let line = self.choose(&names);
        let before = self.scene.guest.progress()?;
        let active = self.scene.active_layers().await?;
        let killed = self.run(&line).await.with_context(|| line.clone())?;
        let verb = line.split(' ').next().unwrap_or_default().to_owned();
        *self.done.entry(verb.clone()).or_default() += 1;
        *self.done.entry("killed".into()).or_default() += u32::from(killed);
        if killed {
            self.scene.run("recover vm1 --wait 60").await?.ok()?;
        }
        // What is new holds what was synced before the command.
        for name in self.scene.names().await? {
            self.before.entry(name).or_insert_with(|| before.clone());
        }
        if verb == "revert" {
            // The guest was reset, or was not: both go on from what is on their disks.
            self.scene.back_up().await?;
            let target = line.split(' ').nth(2).context("a revert to nothing")?;
            let is_there = killed && self.scene.active_layers().await? == active;
            ensure!(is_there || self.stands_on(target).await?, "after {line}, killed: {killed}: elsewhere");
        }
        self.scene.assert_sound().await.with_context(|| format!("after {line}, killed: {killed}"))?;
        let names = self.scene.names().await?;
        if let Some(name) = self.dice.pick(&names).cloned() {
            self.assert_whole(&name).await.with_context(|| format!("after {line}, killed: {killed}"))?;
        }
        Ok(line)
    }

    /// Runs a command, and perhaps kills it. Returns whether it did.
    async fn run(&mut self, line: &str) -> Result<bool> {
        if self.dice.below(10) >= KILLED_OF_TEN {
            let run = self.scene.run(line).await?;
            // 3: a guest that could not be quiesced just then.
            ensure!(run.code == 0 || run.code == 3, "{run:?}");
            return Ok(false);
        }
        let latest = LATEST_KILL_MS[usize::from(self.dice.below(4) == 0)];
        let instant = Duration::from_millis(self.dice.below(latest));
        let mut child = self.scene.cli.spawn(line.split_whitespace(), &[])?;
        tokio::time::sleep(instant).await;
        child.start_kill()?;
        // It may have ended before that: then it has to have ended well.
        let ended = child.wait_with_output().await?;
        ensure!(ended.status.code().is_none_or(|code| code == 0 || code == 3), "{ended:?}");
        Ok(ended.status.signal().is_some())
    }

    /// Whether every disk goes on from the snapshot.
    async fn stands_on(&self, snapshot: &str) -> Result<bool> {
        let tree = self.scene.run("tree vm1 --json").await?.ok()?.json()?;
        let disks = tree["disks"].as_array().context("disks")?.iter();
        let chains = disks.filter_map(|disk| disk["layers"].as_array()).filter(|layers| !layers.is_empty());
        let below = chains.map(|layers| layers.iter().rev().nth(1).map(|layer| &layer["snapshot"]));
        Ok(below.into_iter().all(|holds| holds.is_some_and(|name| name == snapshot)))
    }

    async fn assert_whole(&self, name: &str) -> Result<()> {
        let snapshot = self.scene.snapshot(name).await?.with_context(|| format!("there is no {name}"))?;
        self.scene.assert_whole(&snapshot, &self.before[name]).with_context(|| format!("snapshot {name}"))
    }

    /// Ends the guest as a power cut would, and looks at everything.
    async fn end(self) -> Result<BTreeMap<String, u32>> {
        for name in self.scene.names().await? {
            self.assert_whole(&name).await?;
        }
        let Self { scene, done, .. } = self;
        scene.assert_nothing_lost().await?;
        Ok(done)
    }
}

async fn soak_on(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seconds = number("SNAPCTL_SOAK_SECONDS").map_or(SHORT, Duration::from_secs);
    let seed = number("SNAPCTL_SOAK_SEED").unwrap_or(SEED);
    eprintln!("soak on {qemu:?}: SNAPCTL_SOAK_SEED={seed}");
    let mut soak = Soak::begin(qemu, seed).await?;
    let begun = Instant::now();
    let mut steps = 0_u32;
    while begun.elapsed() < seconds {
        steps += 1;
        let line = soak.step().await.with_context(|| format!("step {steps}, seed {seed}"))?;
        if begun.elapsed().as_secs() / 60 != (begun.elapsed().as_secs().saturating_sub(2)) / 60 {
            eprintln!("{:?}: step {steps}, {line}", begun.elapsed());
        }
    }
    let done = soak.end().await.with_context(|| format!("at the end, seed {seed}"))?;
    eprintln!("soak on {qemu:?}: {steps} steps in {:?}, seed {seed}: {done:?}", begun.elapsed());
    Ok(())
}

#[tokio::test]
async fn a_life_of_snapshots_loses_nothing() -> Result<()> {
    soak_on(Qemu::Distro).await
}

#[tokio::test]
async fn a_life_of_snapshots_loses_nothing_on_the_newer_qemu() -> Result<()> {
    soak_on(Qemu::Backports).await
}
