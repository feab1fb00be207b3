//! What every command needs: where things are, and how patient the user is.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use host::lock::FileLock;
use host::tied::Tie;
use model::Name;
use snapshot::{GuardProgram, Guards, Recovered, SettledMerge, Target, Tools};
use storage::pool::PoolDefinition;
use vm::pools::OpenPool;
use vm::{Paths, Registry, Session, State, VmDefinition};

use crate::args::Global;
use crate::{GUARD_ARGUMENT, RESUME_GUARD_ARGUMENT, TIED_ARGUMENT, output};

/// The global options, made use of.
pub struct Context {
    /// Where things are.
    pub paths: Paths,
    /// Print JSON.
    pub json: bool,
    /// Say less.
    pub quiet: bool,
    /// How long a command of QEMU's may take.
    pub timeout: Duration,
    /// How long to wait for others.
    pub wait: Option<Duration>,
}

impl Context {
    /// Takes the global options.
    ///
    /// # Errors
    /// If it cannot be told where this user's files are.
    pub fn new(global: &Global) -> anyhow::Result<Self> {
        let uid = rustix::process::geteuid();
        let paths = match &global.root {
            Some(root) => Some(Paths::under(&std::path::absolute(root).context("--root")?)),
            None if uid.is_root() => Some(Paths::system()),
            None => Paths::user(|name| std::env::var_os(name).map(PathBuf::from), uid.as_raw()),
        };
        let paths = paths.context("neither HOME nor XDG_CONFIG_HOME is set; use --root DIR")?;
        let Global { json, quiet, timeout, wait, .. } = *global;
        Ok(Self { paths, json, quiet, timeout, wait })
    }

    /// The definitions.
    pub fn registry(&self) -> Registry<VmDefinition> {
        Registry::new(&self.paths)
    }

    /// The definition of a VM.
    ///
    /// # Errors
    /// As [`Registry::load`].
    pub fn definition(&self, vm: &Name) -> Result<VmDefinition, vm::Error> {
        self.registry().load(vm)
    }

    /// The VM under its lock, with what was interrupted settled.
    ///
    /// # Errors
    /// As [`Session::open`] and [`snapshot::recover`].
    pub async fn session(&self, vm: &Name, state: &State) -> anyhow::Result<Session> {
        let session = Session::open(&self.paths, vm, self.wait, self.timeout).await?;
        let settled = snapshot::recover(&session, state).await?;
        self.tell_recovered(&settled);
        Ok(session)
    }

    /// The VM under its lock, running or not, with what was interrupted settled. Waits at most `wait` for somebody
    /// who works on the VM right now.
    ///
    /// # Errors
    /// As [`Context::session`], but for a VM that does not run; [`snapshot::recover_stopped`].
    pub async fn reach(
        &self,
        vm: &Name,
        state: &State,
        wait: Option<Duration>,
    ) -> anyhow::Result<(Reached, Vec<Recovered>)> {
        let lock = vm::lock(&self.paths, vm, wait).await?;
        let (reached, settled) = match Session::with_lock(&self.paths, vm, lock, wait, self.timeout).await {
            Ok(session) => {
                let settled = snapshot::recover(&session, state).await?;
                (Reached::Running(Box::new(session)), settled)
            }
            Err((vm::Error::NotRunning { .. }, lock)) => {
                let settled = snapshot::recover_stopped(vm, state).await?;
                (Reached::Stopped { vm: vm.clone(), _lock: lock }, settled)
            }
            Err((fault, _)) => return Err(fault.into()),
        };
        self.tell_recovered(&settled);
        Ok((reached, settled))
    }

    /// Settles what was interrupted on `vm`, if anything was.
    ///
    /// # Errors
    /// As [`Context::reach`].
    pub async fn settle(&self, vm: &Name, wait: Option<Duration>) -> anyhow::Result<Vec<Recovered>> {
        if State::open_existing(&self.paths)?.pending(Some(vm))?.is_empty() {
            return Ok(Vec::new());
        }
        Ok(self.reach(vm, &State::open(&self.paths)?, wait).await?.1)
    }

    /// As [`Context::settle`], for commands that only look: what cannot be settled now is told, and they go
    /// on. `wait` is how long they wait for somebody who works on the VM.
    pub async fn settle_or_tell(&self, vm: &Name, wait: Option<Duration>) {
        if let Err(fault) = self.settle(vm, wait).await {
            match fault.downcast_ref() {
                // What is under way there is not interrupted.
                Some(vm::Error::Busy { .. }) => self.note(&format!("note: {fault}")),
                _ => output::note(&format!("warning: {fault}")),
            }
        }
    }

    /// How long a command that only looks waits for one that works: that takes moments.
    pub fn patience(&self) -> Option<Duration> {
        self.wait.or(Some(self.timeout))
    }

    /// How this program becomes the thaw guard.
    pub fn guards(&self) -> Guards {
        // The running executable, also if an upgrade has replaced its file meanwhile.
        let thaw = GuardProgram { program: "/proc/self/exe".into(), arguments: vec![GUARD_ARGUMENT.into()] };
        Guards { thaw, resume: self.tools().guard }
    }

    /// How this program becomes what must not depend on its life.
    pub fn tools(&self) -> Tools {
        let itself = "/proc/self/exe";
        Tools {
            guard: GuardProgram { program: itself.into(), arguments: vec![RESUME_GUARD_ARGUMENT.into()] },
            tie: Tie { program: itself.into(), argument: TIED_ARGUMENT.into() },
        }
    }

    /// The definitions of pools.
    pub fn pools(&self) -> Registry<PoolDefinition> {
        Registry::new(&self.paths)
    }

    /// A pool under its lock, for whoever changes something in it.
    ///
    /// # Errors
    /// As [`OpenPool::change`].
    pub async fn pool(&self, name: &Name) -> Result<OpenPool, vm::Error> {
        let (pool, swept) = OpenPool::change(&self.paths, name, self.wait).await?;
        for volume in swept {
            self.note(&format!(
                "recovered: volume {volume} of {name} was never finished, and is removed now"
            ));
        }
        Ok(pool)
    }

    /// Says something on stderr, unless the user wants less.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            output::note(text);
        }
    }

    fn tell_recovered(&self, settled: &[Recovered]) {
        for outcome in settled {
            self.note(&match outcome {
                Recovered::Finished { snapshot } => {
                    format!(
                        "recovered: snapshot {} of {} was interrupted and is finished now",
                        snapshot.name, snapshot.vm
                    )
                }
                Recovered::Undone { name } => {
                    format!("recovered: snapshot {name} was interrupted and is undone now")
                }
                Recovered::Thawed { vm } => format!("recovered: {vm} may have been frozen, and is not now"),
                Recovered::MayBeFrozen { vm, why } => {
                    output::note(&format!("warning: {vm} may be frozen, and cannot be thawed: {why}"));
                    continue;
                }
                Recovered::Reverted { vm, snapshot, done } => {
                    let now = if *done { "finished" } else { "undone" };
                    format!("recovered: the revert of {vm} to {snapshot} was interrupted and is {now} now")
                }
                Recovered::Merged(merge) => merged(merge),
            });
        }
    }
}

/// A VM under its lock.
#[derive(Debug)]
pub enum Reached {
    /// Its QEMU runs.
    Running(Box<Session>),
    /// It does not.
    Stopped {
        /// The VM.
        vm: Name,
        _lock: FileLock,
    },
}

impl Reached {
    /// The same, for the room that works on its layers.
    pub fn target<'a>(&'a self, context: &'a Context) -> Target<'a> {
        match self {
            Self::Running(session) => Target::Running(session),
            Self::Stopped { vm, .. } => {
                Target::Stopped { vm, paths: &context.paths, timeout: context.timeout }
            }
        }
    }
}

fn merged(merge: &SettledMerge) -> String {
    let names: Vec<&str> = merge.deleted.iter().map(Name::as_str).collect();
    let what = match names.as_slice() {
        [] => "a merge of layers".to_owned(),
        names => format!("the deletion of {}", names.join(", ")),
    };
    format!("recovered: {what} was interrupted; what is left of it can be merged now")
}

/// Another program to start beside this one, with its own process group; for `guest freeze -- COMMAND`.
pub fn command(line: &[std::ffi::OsString]) -> Option<std::process::Command> {
    let (program, arguments) = line.split_first()?;
    let mut command = std::process::Command::new(program);
    // Ctrl-C at the terminal reaches this program alone, which thaws before it asks the other to end.
    command.args(arguments).process_group(0);
    Some(command)
}
