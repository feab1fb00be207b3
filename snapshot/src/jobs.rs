//! QEMU's jobs, and its nodes: what every operation does with them.

use std::time::Duration;

use agent_client::{BlockdevDel, JobCancel, JobDismiss, JobInfo, Qmp, QueryJobs};
use tokio::time::{Instant, sleep};

use crate::error::StepError;

/// The status of a job that ended and was not dismissed. Source: qapi/job.json, JobStatus.
pub(crate) const CONCLUDED: &str = "concluded";
/// How long a change of the graph, or breaking off, may take: requests that are under way end first.
pub(crate) const CHANGE_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at a job of which nothing more than that is awaited.
const POLL: Duration = Duration::from_millis(2);

/// Runs a command that answers with nothing.
pub(crate) async fn tell<C>(qmp: &Qmp, command: &C) -> Result<(), StepError>
where
    C: qapi_spec::Command<Ok = qapi_spec::Empty>,
{
    qmp.execute(command).await?;
    Ok(())
}

/// The job, if QEMU knows it.
pub(crate) async fn find(qmp: &Qmp, id: &str) -> Result<Option<JobInfo>, StepError> {
    Ok(qmp.execute(&QueryJobs {}).await?.into_iter().find(|job| job.id == id))
}

/// Waits until the job is concluded, or has `status`, or is gone.
///
/// # Errors
/// [`StepError::JobSlow`] after `limit`.
pub(crate) async fn wait_for(
    qmp: &Qmp,
    id: &str,
    status: &str,
    limit: Duration,
) -> Result<Option<JobInfo>, StepError> {
    let deadline = Instant::now() + limit;
    loop {
        match find(qmp, id).await? {
            Some(job) if job.status != CONCLUDED && job.status != status => {}
            found => return Ok(found),
        }
        if Instant::now() >= deadline {
            return Err(StepError::JobSlow { job: id.to_owned(), after: limit });
        }
        sleep(POLL).await;
    }
}

/// Breaks the job off if it runs, and forgets it. One that has changed the graph already stays done.
pub(crate) async fn end(qmp: &Qmp, id: &str) -> Result<(), StepError> {
    let Some(job) = find(qmp, id).await? else { return Ok(()) };
    if job.status != CONCLUDED {
        // It may have ended meanwhile; whether it has is looked at below.
        tell_if_willing(qmp, &JobCancel { id: id.to_owned() }).await?;
    }
    match wait_for(qmp, id, CONCLUDED, CHANGE_LIMIT).await? {
        Some(_) => tell(qmp, &JobDismiss { id: id.to_owned() }).await,
        None => Ok(()),
    }
}

/// Closes nodes, the uppermost first. One that QEMU opened by itself goes with the one above it, and one that
/// something uses stays open: whoever needs its file closed looks.
pub(crate) async fn close_nodes(qmp: &Qmp, nodes: impl IntoIterator<Item = String>) -> Result<(), StepError> {
    for node_name in nodes {
        tell_if_willing(qmp, &BlockdevDel { node_name }).await?;
    }
    Ok(())
}

/// As [`tell`], where a refusal is an answer too.
async fn tell_if_willing<C>(qmp: &Qmp, command: &C) -> Result<(), StepError>
where
    C: qapi_spec::Command<Ok = qapi_spec::Empty>,
{
    match qmp.execute(command).await {
        Err(fault) if !fault.is_refusal() => Err(fault.into()),
        _ => Ok(()),
    }
}
