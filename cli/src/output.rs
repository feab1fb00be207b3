//! What goes to stdout: one JSON document, or text for people.

use std::io::{self, Write};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use model::PlannedStep;
use serde::Serialize;
use serde_json::{Value, json};

/// Prints one JSON document with its schema's name.
///
/// # Errors
/// If stdout cannot be written.
pub fn document(schema: &str, content: &impl Serialize) -> anyhow::Result<()> {
    let mut document = json!({ "schema": schema });
    match serde_json::to_value(content)? {
        Value::Object(members) => {
            if let Some(object) = document.as_object_mut() {
                object.extend(members);
            }
        }
        other => document["items"] = other,
    }
    line(&document.to_string())
}

/// Prints one line.
///
/// # Errors
/// If stdout cannot be written.
pub fn line(text: &str) -> anyhow::Result<()> {
    writeln!(io::stdout().lock(), "{text}")?;
    Ok(())
}

/// Prints a table with a heading; columns named in `right` are aligned to the right.
///
/// # Errors
/// If stdout cannot be written.
pub fn table(heading: &[&str], right: &[&str], rows: Vec<Vec<String>>) -> anyhow::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(heading.iter().map(|name| name.to_uppercase()));
    table.add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        // Columns stand two spaces apart, and the first one at the edge.
        column.set_padding((0, 2));
        if heading.get(index).is_some_and(|name| right.contains(name)) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let text = table.to_string();
    text.lines().try_for_each(|row| line(row.trim_end()))
}

/// Prints facts as aligned `name  value` lines.
///
/// # Errors
/// If stdout cannot be written.
pub fn facts(facts: &[(&str, String)]) -> anyhow::Result<()> {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    facts.iter().try_for_each(|(name, value)| line(format!("{name:width$}  {value}").trim_end()))
}

/// Prints a plan: as one document, or its steps below `headline`.
///
/// # Errors
/// If stdout cannot be written.
pub fn plan(
    as_json: bool,
    headline: &str,
    plan: &impl Serialize,
    planned: &[PlannedStep],
) -> anyhow::Result<()> {
    if as_json {
        return document("snapctl.plan/1", &json!({ "plan": plan, "steps": planned }));
    }
    line(headline)?;
    steps(planned)
}

/// Prints the steps of a plan with their undo, numbered.
///
/// # Errors
/// If stdout cannot be written.
pub fn steps(steps: &[PlannedStep]) -> anyhow::Result<()> {
    for (index, PlannedStep { step, undo }) in steps.iter().enumerate() {
        line(&format!("{:3}. {step}", index + 1))?;
        if let Some(undo) = undo {
            line(&format!("       undo: {undo}"))?;
        }
    }
    Ok(())
}

/// Says something on stderr that is not the result.
pub fn note(text: &str) {
    // Nobody is left to be told if stderr is gone.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Shows on stderr what the rooms below say of their work: nothing, commands, or whole conversations.
pub fn talk(verbosity: u8) {
    use tracing_subscriber::filter::LevelFilter;

    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
}

/// Whether an error is a reader who went away (`snapctl list | head -1`).
pub fn is_broken_pipe(fault: &anyhow::Error) -> bool {
    fault.downcast_ref::<io::Error>().is_some_and(|fault| fault.kind() == io::ErrorKind::BrokenPipe)
}
