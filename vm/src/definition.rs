//! Definitions: `vms/NAME.toml`, `pools/NAME.toml`, `networks/NAME.toml`, text that a person edits and git keeps.

use std::collections::BTreeMap;
use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use host::files;
use model::Name;
use net::network::NetworkDefinition;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use storage::pool::PoolDefinition;

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

/// What can be defined in a file of its own.
pub trait Definition: Serialize + DeserializeOwned + PartialEq {
    /// Where the definitions of this kind are.
    fn dir(paths: &Paths) -> PathBuf;

    /// What is wrong with it, beside its form.
    fn fault(&self) -> Option<String>;

    /// The error that none has this name.
    fn missing(name: &Name, known: Vec<Name>) -> Error;

    /// The error that another one has this name.
    fn taken(name: &Name, file: PathBuf) -> Error;
}

impl Definition for VmDefinition {
    fn dir(paths: &Paths) -> PathBuf {
        paths.vms()
    }

    fn fault(&self) -> Option<String> {
        let relative = self.sockets().find(|socket| !socket.is_absolute())?;
        Some(format!("{} is not an absolute path", relative.display()))
    }

    fn missing(name: &Name, known: Vec<Name>) -> Error {
        Error::NoSuchVm { name: name.clone(), known }
    }

    fn taken(name: &Name, file: PathBuf) -> Error {
        Error::NameTaken { name: name.clone(), file }
    }
}

impl Definition for PoolDefinition {
    fn dir(paths: &Paths) -> PathBuf {
        paths.pools()
    }

    fn fault(&self) -> Option<String> {
        storage::pool::Kind::named(&self.kind).err().map(|fault| fault.to_string())
    }

    fn missing(name: &Name, known: Vec<Name>) -> Error {
        Error::NoSuchPool { name: name.clone(), known }
    }

    fn taken(name: &Name, file: PathBuf) -> Error {
        Error::PoolNameTaken { name: name.clone(), file }
    }
}

impl Definition for NetworkDefinition {
    fn dir(paths: &Paths) -> PathBuf {
        paths.networks()
    }

    fn fault(&self) -> Option<String> {
        net::network::Kind::named(&self.kind).err().map(|fault| fault.to_string())
    }

    fn missing(name: &Name, known: Vec<Name>) -> Error {
        Error::NoSuchNetwork { name: name.clone(), known }
    }

    fn taken(name: &Name, file: PathBuf) -> Error {
        Error::NetworkNameTaken { name: name.clone(), file }
    }
}

/// What registering did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// The definition is new.
    New,
    /// The same definition was there already.
    AlreadySo,
}

/// The definitions of one kind.
#[derive(Clone, Debug)]
pub struct Registry<D> {
    dir: PathBuf,
    kind: PhantomData<fn() -> D>,
}

impl<D: Definition> Registry<D> {
    /// The definitions of `paths`.
    pub fn new(paths: &Paths) -> Self {
        Self { dir: D::dir(paths), kind: PhantomData }
    }

    /// Where the definition of `name` is or would be.
    pub fn file(&self, name: &Name) -> PathBuf {
        self.dir.join(format!("{name}.toml"))
    }

    /// Reads the definition of `name`.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`] and its like, with the names that there are; [`Error::BadDefinition`].
    pub fn load(&self, name: &Name) -> Result<D, Error> {
        let file = self.file(name);
        match files::read_bounded(&file, MAX_DEFINITION) {
            Ok(bytes) => parse(&file, &bytes),
            Err(fault) if fault.kind() == Some(io::ErrorKind::NotFound) => {
                Err(D::missing(name, self.names().unwrap_or_default()))
            }
            Err(fault) => Err(fault.into()),
        }
    }

    /// The names of all that is defined, in order.
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

    /// Adds a definition. The same once more is a success that says so.
    ///
    /// # Errors
    /// [`Error::NameTaken`] and its like if the name has another definition.
    pub fn add(&self, name: &Name, definition: &D) -> Result<Added, Error> {
        let file = self.file(name);
        let text = self.text(name, definition)?;
        files::make_private_dir(&self.dir)?;
        match files::create_durably(&file, text.as_bytes(), 0o644) {
            Ok(()) => Ok(Added::New),
            Err(fault) if fault.kind() == Some(io::ErrorKind::AlreadyExists) => {
                if self.load(name)? == *definition { Ok(Added::AlreadySo) } else { Err(D::taken(name, file)) }
            }
            Err(fault) => Err(fault.into()),
        }
    }

    /// Puts another definition in the place of one that is there.
    ///
    /// # Errors
    /// [`Error::BadDefinition`]; [`Error::Host`].
    pub fn replace(&self, name: &Name, definition: &D) -> Result<(), Error> {
        Ok(files::write_durably(&self.file(name), self.text(name, definition)?.as_bytes(), 0o644)?)
    }

    fn text(&self, name: &Name, definition: &D) -> Result<String, Error> {
        toml::to_string(definition)
            .map_err(|fault| Error::BadDefinition { file: self.file(name), fault: fault.to_string() })
    }

    /// Removes a definition. What it was about stays.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`] and its like.
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

fn parse<D: Definition>(file: &Path, bytes: &[u8]) -> Result<D, Error> {
    let bad = |fault: String| Error::BadDefinition { file: file.to_owned(), fault };
    let text = std::str::from_utf8(bytes).map_err(|fault| bad(fault.to_string()))?;
    let definition: D = toml::from_str(text).map_err(|fault| bad(describe(text, &fault)))?;
    definition.fault().map_or(Ok(definition), |fault| Err(bad(fault)))
}

/// Reads a definition that is somewhere else.
///
/// # Errors
/// [`Error::BadDefinition`]; [`Error::Host`].
pub fn read_definition<D: Definition>(file: &Path) -> Result<D, Error> {
    parse(file, &files::read_bounded(file, MAX_DEFINITION)?)
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

    fn registry() -> (tempfile::TempDir, Registry<VmDefinition>) {
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
