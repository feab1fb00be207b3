//! Running the built `snapctl` as a user would, with state of its own.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::process::{Child, Command};

use super::{Guest, Netns, Place, built_program, cache_dir};

/// Longer than any limit that snapctl keeps by itself.
const PATIENCE: Duration = Duration::from_secs(120);

/// What one run came to.
#[derive(Debug, Clone)]
#[must_use = "a run may have failed"]
pub struct Run {
    /// As a person would type it.
    pub line: String,
    /// The exit code; 128 + the signal's number where one ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Wall time.
    pub took: Duration,
}

impl Run {
    /// The one JSON document on standard output.
    ///
    /// # Errors
    /// When it is not one JSON document.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("{self:#?}"))
    }

    /// The run, if it exited with `code`.
    ///
    /// # Errors
    /// When it did not; the message holds all that it said.
    pub fn expect_code(&self, code: i32) -> Result<&Self> {
        if self.code != code {
            bail!("exit code {} where {code} was expected: {self:#?}", self.code);
        }
        Ok(self)
    }

    /// The run, if it exited with 0.
    ///
    /// # Errors
    /// Those of [`Run::expect_code`].
    pub fn ok(&self) -> Result<&Self> {
        self.expect_code(0)
    }
}

/// A `snapctl` with a private `--root`, removed on drop.
#[derive(Debug)]
pub struct Cli {
    program: PathBuf,
    root: PathBuf,
    _place: Place,
    env: Vec<(String, String)>,
    netns: Option<String>,
}

impl Cli {
    /// The built binary, with an empty state.
    ///
    /// # Errors
    /// When it is not built.
    pub fn new() -> Result<Self> {
        let place = Place::new(&cache_dir()?.join("run"))?;
        let root = place.dir().join("root");
        std::fs::create_dir(&root)?;
        Ok(Self { program: built_program("snapctl")?, root, _place: place, env: Vec::new(), netns: None })
    }

    /// The built binary with `guest` registered as `name`.
    ///
    /// # Errors
    /// When it is not built, or `vm add` fails.
    pub async fn with_vm(name: &str, guest: &Guest) -> Result<Self> {
        let cli = Self::new()?;
        let (qmp, agent) = (guest.qmp(), guest.agent());
        let args = ["vm", "add", name, "--qmp"].map(OsStr::new);
        let args = args.into_iter().chain([qmp.as_os_str(), OsStr::new("--agent"), agent.as_os_str()]);
        cli.run(args).await?.ok()?;
        Ok(cli)
    }

    /// The same state, with one more environment variable, such as `SNAPCTL_FAULT`.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same, in a network namespace.
    pub fn inside(self, netns: &Netns) -> Self {
        Self { netns: Some(netns.name().to_owned()), ..self }
    }

    /// The directory given as `--root`.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Runs `snapctl --root ROOT ARGS` to its end.
    ///
    /// # Errors
    /// When it cannot be started, or hangs for two minutes (it is killed then).
    pub async fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Run> {
        self.run_with(args, &[]).await
    }

    /// Runs it with more environment variables, for this run only.
    ///
    /// # Errors
    /// Those of [`Cli::run`].
    pub async fn run_with<S: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
        env: &[(&str, &str)],
    ) -> Result<Run> {
        let args: Vec<S> = args.into_iter().collect();
        let words = args.iter().map(|arg| arg.as_ref().to_string_lossy());
        let line = ["snapctl".into()].into_iter().chain(words).collect::<Vec<_>>().join(" ");
        let mut command = self.command(&args);
        command.envs(env.iter().copied());
        let since = Instant::now();
        let output = tokio::time::timeout(PATIENCE, command.output()).await;
        let output = output.with_context(|| format!("`{line}` hangs"))??;
        let took = since.elapsed();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let code = exit_code(output.status);
        Ok(Run { line, code, stdout: text(output.stdout), stderr: text(output.stderr), took })
    }

    /// Starts it and returns the child, killed on drop, with both streams piped.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn<S: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
        env: &[(&str, &str)],
    ) -> Result<Child> {
        let args: Vec<S> = args.into_iter().collect();
        Ok(self.command(&args).envs(env.iter().copied()).spawn()?)
    }

    fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = match &self.netns {
            Some(netns) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", netns]).arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        command.arg("--root").arg(&self.root).args(args);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if ["SNAPCTL_", "XDG_", "LC_"].iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(name.as_ref());
            }
        }
        command.env("HOME", &self.root).env("LANG", "C.UTF-8").env("NO_COLOR", "1");
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }
}

fn exit_code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
