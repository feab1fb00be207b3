//! Named points at which a test makes the tool die, stop, hang or fail.
//!
//! `SNAPCTL_FAULT=create.frozen=kill,create.sealed=error` arms points; `SNAPCTL_FAULT=list:FILE` writes the
//! name of each point reached to FILE, one a line, so that a test can visit them all. Without the variable
//! a point costs one load and one comparison.
//!
//! | action | what happens at the point |
//! | --- | --- |
//! | `kill` | SIGKILL to this process, as the kernel's OOM killer would |
//! | `stop` | SIGSTOP; after SIGCONT it goes on as if nothing had been |
//! | `error` | the point returns [`Fault::Armed`] |
//! | `hang:MS` | the thread sleeps so many milliseconds, then goes on |

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use crate::Error;

/// The variable that arms points.
pub const VARIABLE: &str = "SNAPCTL_FAULT";

/// A point that was told to fail, or that could not do as it was told.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The point's action is `error`.
    #[error("the fault point {0} was told to fail ({VARIABLE})")]
    Armed(String),
    /// The variable cannot be understood. Going on would make a test of nothing.
    #[error("{VARIABLE} holds {0:?}; write NAME=kill, NAME=stop, NAME=error, NAME=hang:MS or list:FILE")]
    Malformed(String),
    /// The list of points cannot be written.
    #[error(transparent)]
    List(#[from] Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Stop,
    Fail,
    Hang(Duration),
}

#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Off,
    List(PathBuf),
    Armed(BTreeMap<String, Action>),
    Malformed(String),
}

/// Does what [`VARIABLE`] says about the point `name`: nothing, as a rule.
///
/// The variable is read once in a process's life.
///
/// # Errors
/// [`Fault`] if the point was told to fail, if the variable cannot be understood (then at every point), or
/// if the list cannot be written.
pub fn point(name: &str) -> Result<(), Fault> {
    static PLAN: OnceLock<Plan> = OnceLock::new();
    let plan = PLAN.get_or_init(|| match std::env::var_os(VARIABLE) {
        None => Plan::Off,
        Some(text) => {
            text.to_str().map_or_else(|| Plan::Malformed(text.to_string_lossy().into_owned()), parse)
        }
    });
    match plan {
        Plan::Off => Ok(()),
        plan => reach(plan, name),
    }
}

fn parse(text: &str) -> Plan {
    if text.is_empty() {
        return Plan::Off;
    }
    if let Some(file) = text.strip_prefix("list:") {
        return Plan::List(file.into());
    }
    let actions: Option<_> = text.split(',').map(parse_one).collect();
    actions.map_or_else(|| Plan::Malformed(text.to_owned()), Plan::Armed)
}

fn parse_one(text: &str) -> Option<(String, Action)> {
    let (name, action) = text.split_once('=')?;
    let action = match action {
        "kill" => Action::Kill,
        "stop" => Action::Stop,
        "error" => Action::Fail,
        _ => Action::Hang(Duration::from_millis(action.strip_prefix("hang:")?.parse().ok()?)),
    };
    (!name.is_empty()).then(|| (name.to_owned(), action))
}

#[cold]
fn reach(plan: &Plan, name: &str) -> Result<(), Fault> {
    match plan {
        Plan::Off => Ok(()),
        Plan::Malformed(text) => Err(Fault::Malformed(text.clone())),
        Plan::List(file) => append(file, name),
        Plan::Armed(actions) => actions.get(name).map_or(Ok(()), |action| act(*action, name)),
    }
}

/// One write of one line, so that the lines of several processes do not mix.
fn append(path: &PathBuf, name: &str) -> Result<(), Fault> {
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(Error::io("open the list of fault points", path))?;
    let line = format!("{name}\n");
    Ok(file.write_all(line.as_bytes()).map_err(Error::io("write the list of fault points", path))?)
}

fn act(action: Action, name: &str) -> Result<(), Fault> {
    match action {
        Action::Fail => return Err(Fault::Armed(name.to_owned())),
        Action::Hang(time) => std::thread::sleep(time),
        Action::Kill => signal(Signal::KILL, Duration::MAX),
        Action::Stop => signal(Signal::STOP, Duration::from_millis(20)),
    }
    Ok(())
}

/// Signals this process and gives the signal time to arrive: another of its threads may take it, and this
/// one must not get past its point meanwhile.
fn signal(signal: Signal, arrival: Duration) {
    // A process may always signal itself (kill(2)).
    let _ = kill_process(getpid(), signal);
    std::thread::sleep(arrival);
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, Stdio};

    use super::*;

    const CHILD: &str = "HOST_FAULT_TEST_CHILD";

    /// Runs this test binary again with [`VARIABLE`] set; `test` then plays its child's role.
    fn child(test: &str, plan: &str) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("fault::tests::{test}"), "--nocapture"])
            .envs([(CHILD, "1"), (VARIABLE, plan)])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn is_child() -> bool {
        std::env::var_os(CHILD).is_some()
    }

    #[test]
    fn kill_ends_the_process_at_the_point_and_not_before() {
        if is_child() {
            point("other").unwrap();
            println!("before");
            point("here").unwrap();
            println!("after");
            return;
        }
        let output = child("kill_ends_the_process_at_the_point_and_not_before", "here=kill")
            .wait_with_output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.signal(), Some(Signal::KILL.as_raw()));
        assert!(text.contains("before") && !text.contains("after"), "{text}");
    }

    #[test]
    fn stop_holds_the_process_until_it_is_continued() {
        if is_child() {
            println!("before");
            point("here").unwrap();
            println!("after");
            return;
        }
        let mut child = child("stop_holds_the_process_until_it_is_continued", "here=stop");
        let pid = rustix::process::Pid::from_child(&child);
        let options = rustix::process::WaitOptions::UNTRACED;
        let (_, status) = rustix::process::waitpid(Some(pid), options).unwrap().unwrap();
        assert!(status.stopped(), "{status:?}");
        kill_process(pid, Signal::CONT).unwrap();
        let lines: Vec<_> =
            BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap).collect();
        assert!(lines.iter().any(|line| line.contains("after")), "{lines:?}");
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn list_names_each_point_reached_in_order() {
        if is_child() {
            for name in ["create.planned", "create.frozen", "create.frozen"] {
                point(name).unwrap();
            }
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("points");
        let plan = format!("list:{}", file.display());
        assert!(child("list_names_each_point_reached_in_order", &plan).wait().unwrap().success());
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(text, "create.planned\ncreate.frozen\ncreate.frozen\n");
    }

    #[test]
    fn without_the_variable_nothing_happens() {
        assert!(std::env::var_os(VARIABLE).is_none(), "{VARIABLE} is set for the tests themselves");
        point("anything").unwrap();
    }

    #[test]
    fn error_and_hang_are_the_named_points_alone() {
        let plan = parse("a=error,b=hang:1");
        assert!(matches!(reach(&plan, "a"), Err(Fault::Armed(name)) if name == "a"));
        let begun = std::time::Instant::now();
        reach(&plan, "b").unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(1));
        reach(&plan, "c").unwrap();
    }

    #[test]
    fn what_cannot_be_understood_fails_at_every_point() {
        for text in ["a", "a=", "=kill", "a=die", "a=hang:", "a=hang:x", "a=kill,", "a=kill;b=kill"] {
            let plan = parse(text);
            assert_eq!(plan, Plan::Malformed(text.to_owned()));
            assert!(reach(&plan, "z").unwrap_err().to_string().contains("NAME=kill"));
        }
        assert_eq!(parse(""), Plan::Off);
    }

    #[test]
    fn a_list_that_cannot_be_written_is_an_error() {
        let error = reach(&parse("list:/nonexistent/points"), "a").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/points"), "{error}");
    }
}
