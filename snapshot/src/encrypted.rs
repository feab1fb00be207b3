//! Layers that are encrypted: their keys are in QEMU, so that only a QEMU that has them can work on them.

use std::path::Path;

use model::{History, ImageFormat, Name};
use serde_json::{Value, json};
use storage::chain::{Chain, ChainError, Layer};
use storage::qcow2::{Encryption, Header};
use vm::Machine;

use crate::overlays::{driver, encrypt};
use crate::plan::Refusal;
use crate::view::policy;

/// Whether the header of a layer says that it is encrypted. One that cannot be read is refused elsewhere.
pub(crate) fn is_encrypted(path: &Path, format: ImageFormat) -> bool {
    format == ImageFormat::Qcow2
        && Header::open(path).is_ok_and(|header| header.encryption != Encryption::None)
}

/// Refuses what would be done to an encrypted layer without QEMU.
pub(crate) fn refuse_offline<'a>(
    vm: &Name,
    layers: impl IntoIterator<Item = (&'a Path, ImageFormat)>,
) -> Result<(), Refusal> {
    match layers.into_iter().find(|(path, format)| is_encrypted(path, *format)) {
        Some((path, _)) => Err(Refusal::EncryptedOffline { vm: vm.clone(), path: path.to_owned() }),
        None => Ok(()),
    }
}

/// What `-blockdev` is to be given, in JSON, so that QEMU opens the active layer at `path` with all that it stands on.
///
/// # Errors
/// [`ChainError`] if the chain cannot be followed.
pub fn blockdev(
    machine: Option<&Machine>,
    known: &History,
    path: &Path,
    format: ImageFormat,
) -> Result<Value, ChainError> {
    let chain = Chain::open(path, format, &policy(known))?;
    let in_chain = |path: &Path| chain.layers().any(|layer| layer.path == path);
    let disks = machine.map(|machine| machine.disks.as_slice()).unwrap_or_default();
    let running = disks.iter().filter_map(|disk| disk.layer()).find(|layer| in_chain(&layer.path));
    let recorded =
        || known.layers().rev().find(|(_, layer)| in_chain(&layer.path) && layer.key_secret.is_some());
    let secret = running.and_then(|layer| layer.options.key_secret.clone());
    let secret = secret.or_else(|| recorded()?.1.key_secret.clone()).unwrap_or_default();
    Ok(open_options(chain.layers(), &secret).unwrap_or(Value::Null))
}

/// How QEMU opens a chain, base first, whose encrypted layers have one key.
///
/// Source: qapi/block-core.json, BlockdevOptionsQcow2.
pub(crate) fn open_options<'a>(
    layers: impl IntoIterator<Item = &'a Layer>,
    key_secret: &str,
) -> Option<Value> {
    layers.into_iter().fold(None, |below: Option<Value>, layer| {
        let file = json!({ "driver": driver(&layer.path), "filename": layer.path });
        let mut node = json!({ "driver": layer.format.driver(), "file": file });
        if is_encrypted(&layer.path, layer.format) {
            node["encrypt"] = encrypt(key_secret);
        }
        if layer.format == ImageFormat::Qcow2 {
            node["backing"] = below.unwrap_or(Value::Null);
        }
        Some(node)
    })
}
