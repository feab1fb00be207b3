//! What a recipe needs of QEMU, and which QEMU has it.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use agent_client::{Qmp, Schema};
use host::files;
use model::Name;

use crate::{Error, Paths};

/// Largest schema that is read back from the cache, in bytes; QEMU 10 sends some 220 KiB.
const MAX_SCHEMA: u64 = 8 << 20;

/// A command, or one argument of it, that a recipe needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// The QMP command.
    pub command: &'static str,
    /// An argument of it, if that is what matters.
    pub argument: Option<&'static str>,
    /// The first QEMU that has it.
    pub since: &'static str,
}

const fn command(command: &'static str, since: &'static str) -> Feature {
    Feature { command, argument: None, since }
}

/// What taking a snapshot with overlays needs.
///
/// Source: the "Since" lines of qapi/block-core.json, job.json, transaction.json.
pub const FEATURES: [Feature; 7] = [
    command("transaction", "1.1"),
    command("blockdev-snapshot", "2.5"),
    command("blockdev-add", "2.9"),
    command("blockdev-del", "2.9"),
    command("blockdev-create", "3.0"),
    command("job-dismiss", "3.0"),
    command("x-debug-query-block-graph", "4.0"),
];

/// Makes sure that the QEMU behind `qmp` has all of `features`.
///
/// What a QEMU answered is kept below `paths.run`, by its version and its executable: asking costs it
/// several milliseconds in the loop that serves the guest's devices too.
///
/// # Errors
/// [`Error::MissingFeature`] for the first that is missing; [`Error::Conversation`].
pub async fn require_features(
    vm: &Name,
    qmp: &Qmp,
    paths: &Paths,
    features: &[Feature],
) -> Result<(), Error> {
    let schema = schema(vm, qmp, paths).await?;
    let has = |feature: &&Feature| match feature.argument {
        Some(argument) => schema.has_argument(feature.command, argument),
        None => schema.has_command(feature.command),
    };
    match features.iter().find(|feature| !has(feature)) {
        None => Ok(()),
        Some(missing) => Err(Error::MissingFeature {
            vm: vm.clone(),
            running: qmp.version().qemu.to_string(),
            feature: match missing.argument {
                Some(argument) => format!("{argument} in {}", missing.command),
                None => missing.command.to_owned(),
            },
            since: missing.since.to_owned(),
        }),
    }
}

async fn schema(vm: &Name, qmp: &Qmp, paths: &Paths) -> Result<Schema, Error> {
    let cache = cache_file(qmp, paths);
    let kept = cache.as_deref().and_then(|file| files::read_bounded(file, MAX_SCHEMA).ok());
    // A cache that cannot be read or understood is as good as none.
    let kept = kept.and_then(|bytes| Schema::parse(std::str::from_utf8(&bytes).ok()?).ok());
    if let Some(schema) = kept {
        return Ok(schema);
    }
    let text = qmp.schema_text().await.map_err(Error::conversation(vm))?;
    let schema = Schema::parse(&text).map_err(Error::conversation(vm))?;
    if let Some(file) = cache {
        let kept = files::make_private_dir(&paths.schemas())
            .and_then(|_| files::write_durably(&file, text.as_bytes(), 0o600));
        // It only saves time: a file system that is full or read-only is no reason to fail.
        if let Err(fault) = kept {
            tracing::debug!("QEMU's schema is not kept: {fault}");
        }
    }
    Ok(schema)
}

/// Names the executable that runs: its version, and its file's identity and time.
fn cache_file(qmp: &Qmp, paths: &Paths) -> Option<PathBuf> {
    let exe = std::fs::metadata(format!("/proc/{}/exe", qmp.peer_pid()?)).ok()?;
    let name = format!("{}-{:x}-{:x}-{:x}.json", qmp.version().qemu, exe.dev(), exe.ino(), exe.mtime());
    Some(paths.schemas().join(name))
}
