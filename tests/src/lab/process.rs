//! A child that cannot outlive its test: killed on drop, and by the kernel when the test is killed.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::watch;

use super::run::program;

type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// A running child in a process group of its own.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    pidfd: OwnedFd,
    ended: watch::Receiver<bool>,
}

impl Process {
    /// Starts `command` so that it dies with this process; what it prints goes to `log`.
    pub(super) fn spawn(command: &Command, log: &Path) -> Result<Self> {
        let mut guarded = Command::new(program("setpriv")?);
        guarded.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            guarded.env(name, value.unwrap_or_default());
        }
        let log = File::create(log)?;
        // A group of its own: Ctrl-C is for us, who then end it in order.
        guarded.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = spawn_from_lasting_thread(guarded)?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let ended = watch_end(pidfd.try_clone()?);
        Ok(Self { child, pidfd, ended })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal; a process that has ended already is no error.
    pub(super) fn signal(&self, signal: Signal) {
        // The pidfd names this process and no other, so failing means that it is gone.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Waits until it has ended.
    pub(super) async fn ended(&self) -> Result<()> {
        self.ended.clone().wait_for(|ended| *ended).await?;
        Ok(())
    }

    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        // Reaped, so that nothing of it is left when the next step begins.
        let _ = self.child.wait();
    }
}

/// A thread that tells when the process behind `pidfd` has ended, and ends with it.
fn watch_end(pidfd: OwnedFd) -> watch::Receiver<bool> {
    let (tell, ended) = watch::channel(false);
    std::thread::spawn(move || {
        // EINTR is the one way to fail, and no handler is installed that returns.
        while poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None) == Err(Errno::INTR) {}
        tell.send_replace(true);
    });
    ended
}

/// The kernel sends the death signal when the *thread* ends that made the child (prctl(2)), so all
/// children are made by one thread that lasts as long as the process.
fn spawn_from_lasting_thread(command: Command) -> Result<Child> {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in inbox {
                // Nobody waits for the reply if the asker has gone; the child is dropped with it.
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (reply, answer) = mpsc::channel();
    let shown = format!("{:?}", command.get_program());
    spawner.lock().unwrap_or_else(PoisonError::into_inner).send((command, reply))?;
    answer.recv()?.with_context(|| shown)
}
