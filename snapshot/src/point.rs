//! The point in time: freeze, one transaction, thaw.

use std::path::PathBuf;
use std::time::Duration;

use agent_client::{
    Agent, Frozen, Guard, GuardError, GuardRequest, OsInfo, Prepared, Qmp, Thawed, Transaction,
    TransactionAction, monotonic_ns,
};
use jiff::Timestamp;
use model::{Consistency, FreezeReport};

use crate::aside::Copier;
use crate::bitmaps::BitmapPlan;
use crate::create::{Interrupt, Warning};
use crate::error::StepError;
use crate::memory::Memory;
use crate::plan::{CreatePlan, DiskPlan, FreezePlan};

/// How long the guest may write out its dirty pages before the freeze.
const SYNC_FIRST_LIMIT: Duration = Duration::from_secs(30);

/// How to start the thaw guard: this program, and the arguments that make it call
/// [`agent_client::guard_main`].
#[derive(Clone, Debug)]
pub struct GuardProgram {
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// A point that was made.
#[derive(Debug)]
pub(crate) struct Point {
    pub consistency: Consistency,
    pub freeze: Option<FreezeReport>,
    /// The thaw is not confirmed. The point stands all the same.
    pub frozen_still: Option<GuardError>,
    /// The memory of the same instant, if it was asked for.
    pub memory: Option<Memory>,
    /// When it was made, if that was some time ago.
    pub made_at: Option<Timestamp>,
}

impl Point {
    /// A point of which nothing more is known.
    pub fn crash() -> Self {
        Self {
            consistency: Consistency::Crash,
            freeze: None,
            frozen_still: None,
            memory: None,
            made_at: None,
        }
    }
}

/// Why no point was made.
#[derive(Debug)]
pub(crate) enum NoPoint {
    /// The guest was not quiesced, and that was required. It is thawed.
    NotQuiesced(String),
    /// The guest may be frozen.
    FrozenStill(GuardError),
    /// QEMU refused the transaction, or something before it failed.
    Failed(StepError),
    /// The connection ended after the transaction was sent: it may have happened. With the thaw's failure,
    /// if that failed too.
    Unknown(StepError, Option<GuardError>),
}

/// A guest that was asked whether it can be frozen.
#[derive(Debug)]
pub(crate) struct Quiescer {
    pub agent: Agent,
    pub os: OsInfo,
}

/// What makes the point, at one instant for all disks.
pub(crate) enum Switch<'a> {
    /// Every disk goes on in its overlay.
    Overlays { qmp: &'a Qmp, plan: &'a CreatePlan },
    /// Every disk is copied beside its active layer.
    Copies(&'a Copier<'a>),
}

/// A point that only has to be fired.
enum Ready<'a> {
    Overlays(Prepared),
    Copies(&'a Copier<'a>),
}

impl Switch<'_> {
    /// Does all that can be done before. What is dropped does not happen.
    async fn ready(&self) -> Result<Ready<'_>, NoPoint> {
        match self {
            // QEMU has the whole transaction but its last byte before the guest stops.
            Self::Overlays { qmp, plan } => {
                let prepared = qmp.prepare(&transaction(plan)).await;
                prepared.map(Ready::Overlays).map_err(|fault| NoPoint::Failed(fault.into()))
            }
            Self::Copies(copier) => Ok(Ready::Copies(copier)),
        }
    }
}

impl Ready<'_> {
    async fn fire(self) -> Result<(), NoPoint> {
        match self {
            Self::Overlays(prepared) => prepared.fire().await.map(drop).map_err(sort),
            Self::Copies(copier) => copier.make().await,
        }
    }
}

/// Makes the point without a freeze.
pub(crate) async fn take(switch: &Switch<'_>) -> Result<Point, NoPoint> {
    match switch {
        Switch::Overlays { qmp, plan } => drop(qmp.execute(&transaction(plan)).await.map_err(sort)?),
        Switch::Copies(copier) => copier.make().await?,
    }
    Ok(Point::crash())
}

/// Lets the guest write out its dirty pages, which it then need not do while it stands still.
pub(crate) async fn sync_first(quiescer: &Quiescer, interrupt: &Interrupt) {
    // A guest that cannot do it is frozen all the same.
    tokio::select! {
        _ = quiescer.agent.sync_disks(SYNC_FIRST_LIMIT) => {}
        () = interrupt.wait() => {}
    }
}

/// Makes the point inside a freeze. `step` is called at every boundary.
pub(crate) async fn take_frozen(
    switch: &Switch<'_>,
    freeze: &FreezePlan,
    quiescer: Quiescer,
    guard: &GuardProgram,
    warnings: &mut Vec<Warning>,
    step: &dyn Fn(&str) -> Result<(), StepError>,
) -> Result<Point, NoPoint> {
    let windows = quiescer.os.is_windows();
    let guard = match start_guard(quiescer.agent, guard, freeze).await {
        Ok(guard) => guard,
        Err(fault) => return not_frozen(switch, freeze, fault.to_string(), warnings).await,
    };
    step("create.guarded").map_err(NoPoint::Failed)?;
    let ready = switch.ready().await?;
    let (guard, frozen) = match hold(guard, freeze, step).await? {
        Held::Frozen(guard, frozen) => (guard, frozen),
        Held::Not(reason) => {
            drop(ready);
            return not_frozen(switch, freeze, reason, warnings).await;
        }
    };
    let fired_ns = monotonic_ns();
    let switched = ready.fire().await;
    let made_ns = monotonic_ns();
    let held = guard.holds();
    let stepped = step("create.switched");
    let thawed = guard.thaw().await;
    if let Err(fault) = switched {
        return Err(not_switched(fault, thawed.err()));
    }
    if let Err(fault) = stepped {
        return Err(NoPoint::Unknown(fault, thawed.err()));
    }
    let mut point = judge(frozen, held, thawed, (fired_ns, made_ns), windows, warnings);
    if let Some(report) = &mut point.freeze {
        report.mountpoints.clone_from(&freeze.mountpoints);
    }
    Ok(point)
}

/// What came of freezing.
enum Held {
    Frozen(Box<Guard>, Frozen),
    /// The guest is thawed, and why it was not frozen.
    Not(String),
}

/// Freezes, and makes sure that something is frozen and still is after the boundary.
async fn hold(
    mut guard: Guard,
    freeze: &FreezePlan,
    step: &dyn Fn(&str) -> Result<(), StepError>,
) -> Result<Held, NoPoint> {
    let frozen = match guard.freeze().await {
        Ok(frozen) => frozen,
        Err(GuardError::NotFrozen { reason }) => return Ok(Held::Not(reason)),
        Err(fault) => return Err(NoPoint::FrozenStill(fault)),
    };
    let stepped = step("create.frozen");
    if frozen.filesystems > 0 && stepped.is_ok() && guard.holds() {
        return Ok(Held::Frozen(Box::new(guard), frozen));
    }
    // Whatever else is wrong: a guest that may stay frozen comes first.
    guard.thaw().await.map_err(NoPoint::FrozenStill)?;
    stepped.map_err(NoPoint::Failed)?;
    Ok(Held::Not(match frozen.filesystems {
        0 => nothing_frozen(freeze),
        _ => format!("the freeze was over after {} s, before the point could be made", freeze.limit),
    }))
}

/// The transaction did not succeed, and perhaps the guest did not thaw either.
fn not_switched(fault: NoPoint, unthawed: Option<GuardError>) -> NoPoint {
    match (fault, unthawed) {
        (NoPoint::Failed(_), Some(unthawed @ GuardError::ThawUnconfirmed { .. })) => {
            NoPoint::FrozenStill(unthawed)
        }
        (NoPoint::Unknown(fault, _), unthawed) => NoPoint::Unknown(fault, unthawed),
        (no_point, _) => no_point,
    }
}

/// Whether what was frozen stayed so until the point was made.
fn judge(
    frozen: Frozen,
    held: bool,
    thawed: Result<Thawed, GuardError>,
    (fired_ns, made_ns): (u64, u64),
    windows: bool,
    warnings: &mut Vec<Warning>,
) -> Point {
    let good = if windows { Consistency::Application } else { Consistency::Filesystem };
    let seconds = |from: u64, until: u64| Duration::from_nanos(until.saturating_sub(from)).as_secs_f64();
    let report = |thaw_sent: u64, thawed: u64| {
        Some(FreezeReport {
            filesystems: frozen.filesystems,
            mountpoints: Vec::new(),
            window: seconds(frozen.sent_ns, thawed),
            freezing: seconds(frozen.sent_ns, frozen.confirmed_ns),
            switching: seconds(fired_ns, made_ns),
            thawing: seconds(thaw_sent, thawed),
        })
    };
    match thawed {
        Ok(thawed) => {
            let broken = if thawed.sent_ns < made_ns {
                Some("the thaw guard thawed before the point was made")
            } else if thawed.filesystems.is_some_and(|count| count < frozen.filesystems) {
                Some("the guest thawed some of its file systems by itself")
            } else {
                None
            };
            if let Some(why) = broken {
                warnings.push(Warning::FreezeBroken { why: why.into() });
            }
            let consistency = if broken.is_some() { Consistency::Crash } else { good };
            Point { consistency, freeze: report(thawed.sent_ns, thawed.confirmed_ns), ..Point::crash() }
        }
        Err(fault) => {
            let consistency = if held { good } else { Consistency::Crash };
            let freeze = report(made_ns, monotonic_ns());
            Point { consistency, freeze, frozen_still: Some(fault), ..Point::crash() }
        }
    }
}

async fn not_frozen(
    switch: &Switch<'_>,
    freeze: &FreezePlan,
    reason: String,
    warnings: &mut Vec<Warning>,
) -> Result<Point, NoPoint> {
    if freeze.required {
        return Err(NoPoint::NotQuiesced(reason));
    }
    warnings.push(Warning::NotQuiesced { why: reason });
    take(switch).await
}

fn nothing_frozen(freeze: &FreezePlan) -> String {
    match freeze.mountpoints.as_slice() {
        [] => "the guest froze no file system: none is mounted that can be frozen".into(),
        some => format!(
            "the guest froze no file system: none that can be frozen is mounted on {}",
            some.join(" or ")
        ),
    }
}

async fn start_guard(agent: Agent, guard: &GuardProgram, freeze: &FreezePlan) -> Result<Guard, GuardError> {
    let path = agent.path().to_owned();
    let start = |source| GuardError::Start { what: "the agent's socket".into(), source };
    let socket = agent.into_socket().await.map_err(start)?;
    let request = GuardRequest {
        program: guard.program.clone(),
        arguments: guard.arguments.clone(),
        mountpoints: freeze.mountpoints.clone(),
        limit: Duration::from_secs_f64(freeze.limit),
    };
    Guard::start(socket, &path, &request).await
}

fn transaction(plan: &CreatePlan) -> Transaction {
    let switch = |disk: &DiskPlan| TransactionAction::BlockdevSnapshot {
        node: disk.node.clone(),
        overlay: disk.overlay_node.clone(),
    };
    let carry = |disk: &DiskPlan| {
        let carry = |bitmap: &BitmapPlan| bitmap.moved(&disk.node, &disk.overlay_node);
        disk.bitmaps.iter().flat_map(carry).collect::<Vec<_>>()
    };
    // First the bitmaps: a base that was switched is read-only.
    Transaction { actions: plan.disks.iter().flat_map(carry).chain(plan.disks.iter().map(switch)).collect() }
}

/// A refusal means that nothing happened; anything else leaves that open.
fn sort(fault: agent_client::Error) -> NoPoint {
    if fault.is_refusal() { NoPoint::Failed(fault.into()) } else { NoPoint::Unknown(fault.into(), None) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROZEN: Frozen = Frozen { filesystems: 2, sent_ns: 1_000_000, confirmed_ns: 3_000_000 };
    /// The transaction was sent at 4 ms and answered at 5 ms.
    const SWITCH: (u64, u64) = (4_000_000, 5_000_000);

    fn judged(filesystems: Option<u64>, sent_ns: u64) -> (Point, usize) {
        let thawed = Thawed { filesystems, sent_ns, confirmed_ns: 9_000_000, expired: false };
        let mut warnings = Vec::new();
        let point = judge(FROZEN, true, Ok(thawed), SWITCH, false, &mut warnings);
        (point, warnings.len())
    }

    #[test]
    fn a_freeze_that_held_is_reported_with_its_parts() {
        let (point, warnings) = judged(Some(2), 6_000_000);
        assert_eq!((point.consistency, warnings), (Consistency::Filesystem, 0));
        let freeze = point.freeze.unwrap();
        let parts = [freeze.window, freeze.freezing, freeze.switching, freeze.thawing];
        assert_eq!(parts, [0.008, 0.002, 0.001, 0.003]);
        let windows = judge(FROZEN, true, Err(GuardError::Gone), SWITCH, true, &mut Vec::new());
        let late = judge(FROZEN, false, Err(GuardError::Gone), SWITCH, true, &mut Vec::new());
        assert_eq!(late.consistency, Consistency::Crash);
        assert_eq!(windows.consistency, Consistency::Application);
        assert!(windows.frozen_still.is_some());
    }

    #[test]
    fn a_thaw_that_was_sent_twice_says_nothing_of_the_freeze() {
        assert_eq!(judged(None, 6_000_000).0.consistency, Consistency::Filesystem);
    }

    #[test]
    fn g4_a_thaw_before_the_point_or_of_too_few_is_no_quiesced_point() {
        let broken = [(Some(2), 4_500_000), (None, 4_500_000), (Some(1), 6_000_000), (Some(0), 6_000_000)];
        for (filesystems, sent_ns) in broken {
            let (point, warnings) = judged(filesystems, sent_ns);
            assert_eq!((point.consistency, warnings), (Consistency::Crash, 1), "{filesystems:?} {sent_ns}");
        }
    }
}
