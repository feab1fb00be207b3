//! Running a program of the host to its end: argv only, bounded output, a time limit, and no survivor.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::tied::Tie;
use crate::watch::{Interrupted, Watch};

/// Most of what a program prints that is kept.
const OUTPUT_MAX: u64 = 64 << 20;
/// Most of what it says on stderr that is kept, and shown.
const SAID_MAX: usize = 64 << 10;
const SAID_SHOWN: usize = 600;
/// How long a program may take that only asks the kernel for something.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// How often a signal to this program is looked for.
const LOOK: Duration = Duration::from_millis(100);

/// A program with its arguments.
#[derive(Clone)]
pub struct Program {
    name: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(&'static str, &'static str)>,
    tie: Option<Tie>,
    timeout: Option<Duration>,
    watch: Watch,
    listener: Option<Listener>,
    input: Option<Vec<u8>>,
}

type Listener = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// What a program that succeeded has printed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Printed {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
}

/// A program could not be run, or failed.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// There is no such program.
    #[error("{program} is not installed, or not in PATH")]
    Missing {
        /// Its name.
        program: String,
    },
    /// It could not be started or waited for.
    #[error("cannot run {program}: {source}")]
    Io {
        /// Its name.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// It failed.
    #[error("`{line}` failed ({status}): {said}")]
    Failed {
        /// The command line.
        line: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said, cut and without control characters.
        said: String,
    },
    /// It took too long, and was killed.
    #[error("`{line}` was ended after {} s without a result", limit.as_secs())]
    TimedOut {
        /// The command line.
        line: String,
        /// How long it may take.
        limit: Duration,
    },
    /// A signal to this program asked to end; the other one was killed.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// Where programs of the system administrator live that a plain user's PATH leaves out.
const SYSTEM_DIRS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Whether there is a program of this name in PATH, or in a directory for programs of the system.
pub fn is_installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(SYSTEM_DIRS.iter().map(Into::into));
    dirs.map(|dir| dir.join(name)).any(|file| file.is_file())
}

impl Program {
    /// The program `name`, looked for in PATH.
    pub fn new(name: impl AsRef<OsStr>) -> Self {
        Self {
            name: name.as_ref().to_owned(),
            arguments: Vec::new(),
            // Their texts are read, by us and by whoever gets an error.
            environment: vec![("LC_ALL", "C.UTF-8")],
            tie: None,
            timeout: Some(DEFAULT_TIMEOUT),
            watch: Watch::default(),
            listener: None,
            input: None,
        }
    }

    /// One more argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// More arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// One more variable of its environment.
    pub fn env(mut self, name: &'static str, value: &'static str) -> Self {
        self.environment.push((name, value));
        self
    }

    /// What it reads on its standard input; nothing otherwise.
    pub fn input(mut self, bytes: Vec<u8>) -> Self {
        self.input = Some(bytes);
        self
    }

    /// It may take as long as it likes, ends with this process however that ends, and with a signal in `watch`.
    pub fn watched(mut self, tie: &Tie, watch: &Watch) -> Self {
        (self.tie, self.timeout, self.watch) = (Some(tie.clone()), None, watch.clone());
        self
    }

    /// Hands over what it prints as it comes, too.
    pub fn listen(mut self, listener: impl Fn(&[u8]) + Send + Sync + 'static) -> Self {
        self.listener = Some(Arc::new(listener));
        self
    }

    /// Runs it, and expects it to succeed.
    ///
    /// # Errors
    /// [`ProgramError`]; it does not run any more then.
    pub fn run(self) -> Result<Printed, ProgramError> {
        let (status, printed) = self.outcome()?;
        if status.success() {
            return Ok(printed);
        }
        let said = if printed.stderr.trim().is_empty() {
            String::from_utf8_lossy(&printed.stdout).into_owned()
        } else {
            printed.stderr
        };
        Err(ProgramError::Failed { line: self.to_string(), status, said: shown(&said) })
    }

    /// Runs it, and tells how it ended.
    ///
    /// # Errors
    /// [`ProgramError`], but for a program that fails by itself.
    pub fn outcome(&self) -> Result<(ExitStatus, Printed), ProgramError> {
        tracing::debug!("running {self}");
        let program = self.name.to_string_lossy().into_owned();
        let mut child = match self.command().spawn() {
            Ok(child) => child,
            Err(fault) if fault.kind() == io::ErrorKind::NotFound => {
                return Err(ProgramError::Missing { program });
            }
            Err(source) => return Err(ProgramError::Io { program, source }),
        };
        let writer = self.feed(&mut child);
        let stdout = child.stdout.take().map(|pipe| collect(pipe, OUTPUT_MAX, self.listener.clone()));
        let stderr = child.stderr.take().map(|pipe| collect(pipe, SAID_MAX as u64, None));
        let ended = self.wait(&mut child, &program);
        if ended.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        drop(writer.map(JoinHandle::join));
        let bytes =
            |pipe: Option<JoinHandle<Vec<u8>>>| pipe.and_then(|pipe| pipe.join().ok()).unwrap_or_default();
        let printed =
            Printed { stdout: bytes(stdout), stderr: String::from_utf8_lossy(&bytes(stderr)).into_owned() };
        let status = ended?;
        // The tie says so: it could not become the program.
        if self.tie.is_some() && status.code() == Some(1) && printed.stderr.ends_with("(os error 2)\n") {
            return Err(ProgramError::Missing { program });
        }
        Ok((status, printed))
    }

    fn command(&self) -> Command {
        let mut command = match &self.tie {
            None => Command::new(&self.name),
            Some(tie) => {
                let mut command = crate::tied::command(&tie.program, &tie.argument);
                command.arg(&self.name);
                command
            }
        };
        command.args(&self.arguments).envs(self.environment.iter().copied());
        let stdin = if self.input.is_some() { Stdio::piped() } else { Stdio::null() };
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn feed(&self, child: &mut Child) -> Option<JoinHandle<()>> {
        let (mut pipe, bytes) = child.stdin.take().zip(self.input.clone())?;
        // A program that does not want it says so by its exit code.
        Some(std::thread::spawn(move || drop(io::Write::write_all(&mut pipe, &bytes))))
    }

    fn wait(&self, child: &mut Child, program: &str) -> Result<ExitStatus, ProgramError> {
        let failed = |source| ProgramError::Io { program: program.to_owned(), source };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let handle = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let began = Instant::now();
        loop {
            if let Some(status) = child.try_wait().map_err(failed)? {
                return Ok(status);
            }
            self.watch.check()?;
            if let Some(limit) = self.timeout.filter(|limit| began.elapsed() > *limit) {
                return Err(ProgramError::TimedOut { line: self.to_string(), limit });
            }
            match &handle {
                Some(handle) => {
                    let look = rustix::event::Timespec { tv_sec: 0, tv_nsec: LOOK.subsec_nanos().into() };
                    let _ = poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&look));
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

impl fmt::Display for Program {
    /// The command line, for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = std::iter::once(&self.name).chain(&self.arguments);
        let words: Vec<String> = words.map(|word| shown(&word.to_string_lossy())).collect();
        f.write_str(&words.join(" "))
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Program({self})")
    }
}

/// Reads a pipe to its end, so that nobody waits for a reader, and keeps its first bytes.
fn collect(
    mut pipe: impl Read + Send + 'static,
    most: u64,
    listener: Option<Listener>,
) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        let mut piece = [0; 8192];
        while let Ok(count @ 1..) = pipe.read(&mut piece) {
            let room = usize::try_from(most).unwrap_or(usize::MAX).saturating_sub(kept.len());
            kept.extend_from_slice(&piece[..count.min(room)]);
            if let Some(listener) = &listener {
                listener(&piece[..count]);
            }
        }
        kept
    })
}

/// Text for a message: on one line, without control characters, not too long.
fn shown(text: &str) -> String {
    let line = text.trim().replace('\n', "; ");
    let clean = line.chars().map(|c| if c.is_control() { '?' } else { c });
    clean.take(SAID_SHOWN).collect()
}

/// The last whole number of percent that a program printed, as `(12.34/100%)`; for [`Program::listen`].
///
/// Source: QEMU util/qemu-progress.c.
pub fn percent_listener(watch: &Watch, total: u64) -> impl Fn(&[u8]) + Send + Sync + 'static {
    let watch = watch.clone();
    let text = Mutex::new(String::new());
    move |bytes| {
        let mut text = text.lock().unwrap_or_else(PoisonError::into_inner);
        text.push_str(&String::from_utf8_lossy(bytes));
        let Some((before, rest)) = text.rsplit_once("/100%") else { return };
        let rest = rest.to_owned();
        if let Some(percent) =
            before.rsplit_once('(').and_then(|(_, number)| number.trim().parse::<f64>().ok())
        {
            watch.set((total as f64 * percent / 100.0) as u64);
        }
        *text = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_prints_fails_and_is_missing() {
        let printed =
            Program::new("sh").args(["-c", "cat; echo err >&2"]).input(b"in".to_vec()).run().unwrap();
        assert_eq!((printed.stdout.as_slice(), printed.stderr.as_str()), (&b"in"[..], "err\n"));
        let fault = Program::new("sh").args(["-c", "echo no >&2; exit 3"]).run().unwrap_err();
        assert_eq!(fault.to_string(), "`sh -c echo no >&2; exit 3` failed (exit status: 3): no");
        let fault = Program::new("no-such-program").run().unwrap_err();
        assert!(matches!(fault, ProgramError::Missing { .. }), "{fault}");
    }

    #[test]
    fn a_signal_ends_it() {
        let watch = Watch::default();
        watch.flag().store(2, std::sync::atomic::Ordering::Relaxed);
        let mut program = Program::new("sleep").arg("600");
        program.watch = watch;
        let fault = program.run().unwrap_err();
        assert!(matches!(fault, ProgramError::Interrupted(Interrupted(2))), "{fault}");
    }

    #[test]
    fn percents_are_read_as_qemu_img_prints_them() {
        let watch = Watch::default();
        watch.begin(1000);
        let listen = percent_listener(&watch, 1000);
        listen(b"    (0.00/100%)\r    (12.5");
        assert_eq!(watch.progress(), Some((0, 1000)));
        listen(b"0/100%)\r");
        assert_eq!(watch.progress(), Some((125, 1000)));
    }
}
