//! What deleting, flattening and recovering have in common: they merge layers, and show how far that is.

use std::cell::RefCell;
use std::io::{self, IsTerminal};

use model::{ByteSize, Name};
use serde_json::json;
use snapshot::{Interrupt, Limits, MergePlan, MergeRequest, Progress, Watch, plan_merge};
use vm::State;

use super::create::{interrupted, watch_signals};
use crate::args::ProgressStyle;
use crate::context::{Context, Reached};
use crate::line::Line;
use crate::output;

/// Decides what would be done, and prints it.
pub async fn dry_run(context: &Context, begun: &Begun, request: &MergeRequest) -> anyhow::Result<()> {
    let plan = plan_merge(&begun.reached.target(context), &begun.state, request).await?;
    let steps = plan.steps();
    if context.json {
        let content = json!({ "plan": plan, "steps": steps, "copied": plan.copied() });
        return output::document("snapctl.plan/1", &content);
    }
    if steps.is_empty() {
        output::line(&format!("{}: nothing would be done", plan.vm))?;
    } else {
        output::line(&format!("{}: this would be done, and copy at most {}:", plan.vm, plan.copied()))?;
        output::steps(&steps)?;
    }
    tell_staying(context, &plan);
    Ok(())
}

/// Merges, and shows how far that is.
pub async fn merge(
    context: &Context,
    begun: &Begun,
    request: &MergeRequest,
    limits: Limits,
    style: ProgressStyle,
) -> anyhow::Result<MergePlan> {
    let Begun { interrupt, state, reached } = begun;
    let show = Show::new(context, style);
    let target = reached.target(context);
    let merged = snapshot::merge(&target, state, request, limits, &context.tools(), &show, interrupt).await;
    show.clear();
    let plan = merged?;
    tell_staying(context, &plan);
    Ok(plan)
}

/// What a command that changes layers begins with.
pub struct Begun {
    pub interrupt: Interrupt,
    pub state: State,
    pub reached: Reached,
}

/// Reaches the VM with what was interrupted settled; a signal ends the wait for it.
pub async fn begin(context: &Context, vm: &Name) -> anyhow::Result<Begun> {
    let interrupt = Interrupt::default();
    let signalled = watch_signals(&interrupt.flag())?;
    context.definition(vm)?;
    let state = State::open(&context.paths)?;
    let (reached, _) = tokio::select! {
        reached = context.reach(vm, &state, context.wait) => reached?,
        signal = signalled => return Err(interrupted(signal.unwrap_or(0))),
    };
    Ok(Begun { interrupt, state, reached })
}

fn tell_staying(context: &Context, plan: &MergePlan) {
    for layer in &plan.staying {
        context.note(&format!(
            "note: {} is not needed by any snapshot, and stays for now: {}",
            layer.path.display(),
            layer.reason
        ));
    }
}

/// Shows how far the jobs are.
struct Show {
    style: ProgressStyle,
    quiet: bool,
    drawn: RefCell<Drawn>,
}

#[derive(Default)]
struct Drawn {
    disks: Vec<(String, u64, u64)>,
    line: Line,
}

impl Show {
    fn new(context: &Context, style: ProgressStyle) -> Self {
        let style = match style {
            ProgressStyle::Auto if !io::stderr().is_terminal() || context.quiet => ProgressStyle::Off,
            other => other,
        };
        Self { style, quiet: context.quiet || context.json, drawn: RefCell::default() }
    }

    /// Takes the line away.
    fn clear(&self) {
        self.drawn.borrow_mut().line.clear();
    }

    fn redraw(&self) {
        let Drawn { disks, line } = &mut *self.drawn.borrow_mut();
        let of_disk = |(name, done, total): &(String, u64, u64)| {
            let percent = done.saturating_mul(100).checked_div(*total).unwrap_or(0);
            format!("{name} {percent}% of {}", ByteSize(*total))
        };
        let begun = disks.iter().filter(|(_, _, total)| *total > 0);
        line.show(|| begun.map(of_disk).collect::<Vec<_>>().join("  "));
    }
}

impl Watch for Show {
    fn planned(&self, plan: &MergePlan) {
        self.drawn.borrow_mut().disks = plan.disks.iter().map(|disk| (disk.disk.to_string(), 0, 0)).collect();
        if self.style == ProgressStyle::Json {
            output::note(
                &json!({ "progress": "planned", "plan": plan, "copied": plan.copied() }).to_string(),
            );
        } else if !self.quiet && plan.copied().0 > 0 {
            output::note(&format!("{}: copying at most {}", plan.vm, plan.copied()));
        }
    }

    fn progress(&self, progress: &Progress) {
        match (self.style, progress) {
            (ProgressStyle::Json, progress) => {
                if let Ok(line) = serde_json::to_string(progress) {
                    output::note(&line);
                }
            }
            (_, Progress::NoRoom { dir, .. }) => {
                self.clear();
                output::note(&format!(
                    "warning: no room is left in {}; the merge waits for some, and nothing is lost",
                    dir.display()
                ));
            }
            (ProgressStyle::Auto, Progress::Copied { disk, done, total }) => {
                if let Some(shown) = self.drawn.borrow_mut().disks.get_mut(*disk) {
                    (shown.1, shown.2) = (done.0, total.0);
                }
                self.redraw();
            }
            (ProgressStyle::Off, Progress::Copied { .. }) => {}
        }
    }
}
