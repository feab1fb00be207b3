//! VM definitions: `vms/NAME.toml`, text that a person edits and git keeps.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use host::files;
use model::Name;
use serde::{Deserialize, Serialize};

use crate::{Error, Paths};

/// Largest definition that is read, in bytes.
const MAX_DEFINITION: u64 = 1 << 20;

/// A registered VM as its definition says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmDefinition {
    /// QEMU's monitor, a unix socket in `-qmp` mode.
    pub qmp: PathBuf,
    /// The guest agent's channel, a unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<PathBuf>,
    /// The user's names for disks.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: BTreeMap<String, DiskAlias>,
}

impl VmDefinition {
    /// Its sockets.
    pub fn sockets(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.qmp).chain(&self.agent)
    }
}

/// A user's name for a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskAlias {
    /// The disk's qdev id, `-drive` id or node-name.
    pub device: String,
}

/// What registering did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// The definition is new.
    New,
    /// The same definition was there already.
    AlreadySo,
}

/// The definitions in one place.
#[derive(Clone, Debug)]
pub struct Registry {
    dir: PathBuf,
}

impl Registry {
    /// The definitions of `paths`.
    pub fn new(paths: &Paths) -> Self {
        Self { dir: paths.vms() }
    }

    /// Where the definition of `name` is or would be.
    pub fn file(&self, name: &Name) -> PathBuf {
        self.dir.join(format!("{name}.toml"))
    }

    /// Reads the definition of `name`.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`] with the names that there are; [`Error::BadDefinition`].
    pub fn load(&self, name: &Name) -> Result<VmDefinition, Error> {
        let file = self.file(name);
        match files::read_bounded(&file, MAX_DEFINITION) {
            Ok(bytes) => parse(&file, &bytes),
            Err(fault) if fault.kind() == Some(io::ErrorKind::NotFound) => {
                Err(Error::NoSuchVm { name: name.clone(), known: self.names().unwrap_or_default() })
            }
            Err(fault) => Err(fault.into()),
        }
    }

    /// The names of all registered VMs, in order.
    ///
    /// # Errors
    /// [`Error::Host`] if the directory is there and cannot be read.
    pub fn names(&self) -> Result<Vec<Name>, Error> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(fault) if fault.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(fault) => return Err(host::Error::io("read", &self.dir)(fault).into()),
        };
        let mut names: Vec<Name> = entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                name.strip_suffix(".toml")?.parse().ok()
            })
            .collect();
        names.sort();
        Ok(names)
    }

    /// Registers a VM. The same definition once more is a success that says so.
    ///
    /// # Errors
    /// [`Error::NameTaken`] if the name has another definition.
    pub fn add(&self, name: &Name, definition: &VmDefinition) -> Result<Added, Error> {
        let file = self.file(name);
        let text = toml::to_string(definition)
            .map_err(|fault| Error::BadDefinition { file: file.clone(), fault: fault.to_string() })?;
        files::make_private_dir(&self.dir)?;
        match files::create_durably(&file, text.as_bytes(), 0o644) {
            Ok(()) => Ok(Added::New),
            Err(fault) if fault.kind() == Some(io::ErrorKind::AlreadyExists) => {
                if self.load(name)? == *definition {
                    Ok(Added::AlreadySo)
                } else {
                    Err(Error::NameTaken { name: name.clone(), file })
                }
            }
            Err(fault) => Err(fault.into()),
        }
    }

    /// Removes a registration. The VM runs on, and its files stay.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`].
    pub fn remove(&self, name: &Name) -> Result<(), Error> {
        self.load(name).map(drop).or_else(|fault| match fault {
            // A definition that cannot be understood can still be removed.
            Error::BadDefinition { .. } => Ok(()),
            other => Err(other),
        })?;
        files::remove_durably(&self.file(name))?;
        Ok(())
    }
}

fn parse(file: &Path, bytes: &[u8]) -> Result<VmDefinition, Error> {
    let bad = |fault: String| Error::BadDefinition { file: file.to_owned(), fault };
    let text = std::str::from_utf8(bytes).map_err(|fault| bad(fault.to_string()))?;
    let definition: VmDefinition = toml::from_str(text).map_err(|fault| bad(describe(text, &fault)))?;
    let sockets = std::iter::once(&definition.qmp).chain(&definition.agent);
    match sockets.into_iter().find(|socket| !socket.is_absolute()) {
        Some(socket) => Err(bad(format!("{} is not an absolute path", socket.display()))),
        None => Ok(definition),
    }
}

/// What is wrong with a definition, on one line that is fit for a terminal.
fn describe(text: &str, fault: &toml::de::Error) -> String {
    let before = fault.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    format!("line {line}: {}", agent_client::printable(fault.message(), 300))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::new(&Paths::under(dir.path()));
        (dir, registry)
    }

    fn definition(qmp: &str) -> VmDefinition {
        VmDefinition { qmp: qmp.into(), agent: Some("/run/a".into()), disks: BTreeMap::new() }
    }

    #[test]
    fn adding_twice_is_already_so_and_another_is_refused() {
        let (_dir, registry) = registry();
        let name: Name = "vm1".parse().unwrap();
        assert_eq!(registry.add(&name, &definition("/q")).unwrap(), Added::New);
        assert_eq!(registry.add(&name, &definition("/q")).unwrap(), Added::AlreadySo);
        assert!(matches!(registry.add(&name, &definition("/other")), Err(Error::NameTaken { .. })));
        assert_eq!(registry.load(&name).unwrap(), definition("/q"));
        registry.remove(&name).unwrap();
        assert!(matches!(registry.remove(&name), Err(Error::NoSuchVm { .. })));
    }

    #[test]
    fn an_unknown_vm_is_told_with_the_known_ones() {
        let (_dir, registry) = registry();
        registry.add(&"b".parse().unwrap(), &definition("/q")).unwrap();
        registry.add(&"a".parse().unwrap(), &definition("/q")).unwrap();
        let Err(Error::NoSuchVm { known, .. }) = registry.load(&"c".parse().unwrap()) else { panic!() };
        assert_eq!(known.iter().map(Name::as_str).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn a_definition_with_a_typo_or_a_relative_path_is_refused() {
        let (_dir, registry) = registry();
        let name: Name = "vm1".parse().unwrap();
        std::fs::create_dir_all(&registry.dir).unwrap();
        for text in ["qpm = \"/q\"", "qmp = \"q\"", "qmp = \"/q\"\n[disks.data]\ndevise = \"x\"", "qmp = 7"] {
            std::fs::write(registry.file(&name), text).unwrap();
            assert!(matches!(registry.load(&name), Err(Error::BadDefinition { .. })), "{text}");
        }
        std::fs::write(registry.file(&name), "qmp = \"/q\"\n[disks.data]\ndevice = \"virtio1\"").unwrap();
        assert_eq!(registry.load(&name).unwrap().disks["data"].device, "virtio1");
    }
}
