//! Programs that must not outlive the process that started them.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

/// What makes an executable call [`main`].
#[derive(Clone, Debug)]
pub struct Tie {
    /// The executable.
    pub program: String,
    /// Its first argument.
    pub argument: String,
}

/// What a process puts before a program's name and arguments, to start it through [`main`].
///
/// `itself` is an executable whose `main` calls [`main`] when its first argument is `argument`.
pub fn command(itself: &str, argument: &str) -> Command {
    let mut command = Command::new(itself);
    command.arg(argument).arg(getpid().as_raw_nonzero().to_string());
    command
}

/// Becomes the program that `arguments` name, which gets SIGTERM when its parent ends, however that ends.
///
/// `arguments` are the parent's process id, the program and its arguments.
///
/// Source: prctl(2), `PR_SET_PDEATHSIG`: it is kept across execve(2).
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let fault = become_it(arguments);
    // The parent reads this.
    let _ = writeln!(io::stderr(), "{fault}");
    ExitCode::FAILURE
}

fn become_it(arguments: impl IntoIterator<Item = OsString>) -> io::Error {
    let mut arguments = arguments.into_iter();
    let parent = arguments.next().and_then(|pid| pid.to_str()?.parse().ok()).and_then(Pid::from_raw);
    let Some(program) = arguments.next() else { return io::ErrorKind::InvalidInput.into() };
    if let Err(errno) = set_parent_process_death_signal(Some(Signal::TERM)) {
        return errno.into();
    }
    // It may have ended before that.
    if parent.is_none() || getppid() != parent {
        return io::Error::other("the process that started this one has ended");
    }
    let fault = Command::new(&program).args(arguments).exec();
    io::Error::new(fault.kind(), format!("{}: {fault}", program.display()))
}
