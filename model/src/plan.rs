//! How a plan is shown.

use serde::Serialize;

/// One line of a printed plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlannedStep {
    /// What is done.
    pub step: String,
    /// What takes it back; none once the point is made.
    pub undo: Option<String>,
}
