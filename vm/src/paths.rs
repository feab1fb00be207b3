//! Where snapctl keeps things.

use std::path::{Path, PathBuf};

use model::Name;
use serde::{Deserialize, Serialize};

/// The three places of one installation.
///
/// | | root | another user | `--root DIR` |
/// | --- | --- | --- | --- |
/// | config | `/etc/snapctl` | `$XDG_CONFIG_HOME/snapctl` | `DIR/etc/snapctl` |
/// | state | `/var/lib/snapctl` | `$XDG_STATE_HOME/snapctl` | `DIR/var/lib/snapctl` |
/// | run | `/run/snapctl` | `$XDG_RUNTIME_DIR/snapctl` | `DIR/run/snapctl` |
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paths {
    /// Definitions: text that people and configuration tools write.
    pub config: PathBuf,
    /// The catalogue and the journal.
    pub state: PathBuf,
    /// Locks and caches that a reboot may take away.
    pub run: PathBuf,
}

impl Paths {
    /// The places of the whole system.
    pub fn system() -> Self {
        Self::under(Path::new("/"))
    }

    /// The same places below `root`.
    pub fn under(root: &Path) -> Self {
        Self {
            config: root.join("etc/snapctl"),
            state: root.join("var/lib/snapctl"),
            run: root.join("run/snapctl"),
        }
    }

    /// The places of a user who is not root. `variable` looks up an environment variable, `uid` is the
    /// user's number.
    ///
    /// Returns none if neither the XDG variables nor `HOME` say where they are.
    ///
    /// Source: XDG Base Directory Specification.
    pub fn user(variable: impl Fn(&str) -> Option<PathBuf>, uid: u32) -> Option<Self> {
        let home = variable("HOME");
        let base = |name: &str, fallback: &str| {
            let set = variable(name).filter(|path| path.is_absolute());
            set.or_else(|| home.as_ref().map(|home| home.join(fallback)))
        };
        let state = base("XDG_STATE_HOME", ".local/state")?.join("snapctl");
        let run = variable("XDG_RUNTIME_DIR").filter(|path| path.is_absolute());
        let run =
            run.or_else(|| Some(PathBuf::from(format!("/run/user/{uid}"))).filter(|path| path.is_dir()));
        Some(Self {
            config: base("XDG_CONFIG_HOME", ".config")?.join("snapctl"),
            // Without a runtime directory locks live beside the state: they must live somewhere.
            run: run.map_or_else(|| state.join("run"), |run| run.join("snapctl")),
            state,
        })
    }

    /// The directory of VM definitions.
    pub fn vms(&self) -> PathBuf {
        self.config.join("vms")
    }

    /// The directory of pool definitions.
    pub fn pools(&self) -> PathBuf {
        self.config.join("pools")
    }

    /// The directory of network definitions.
    pub fn networks(&self) -> PathBuf {
        self.config.join("networks")
    }

    /// The one lock of all networks.
    pub fn networks_lock(&self) -> PathBuf {
        self.run.join("locks").join("networks.lock")
    }

    /// Where pools are mounted that have no place of their own: beside the state, which is private, since a QEMU of
    /// another user has to get at its volumes.
    pub fn mounts(&self) -> PathBuf {
        self.state.with_file_name("snapctl-pools")
    }

    /// The lock of one pool.
    pub fn pool_lock(&self, pool: &Name) -> PathBuf {
        self.run.join("locks").join(format!("pool-{pool}.lock"))
    }

    /// The catalogue and the journal.
    pub fn database(&self) -> PathBuf {
        self.state.join("state.db")
    }

    /// The lock of one VM.
    pub fn vm_lock(&self, vm: &Name) -> PathBuf {
        self.run.join("locks").join(format!("vm-{vm}.lock"))
    }

    /// What running QEMUs said they can do.
    pub fn schemas(&self) -> PathBuf {
        self.run.join("schemas")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_the_design() {
        assert_eq!(Paths::system().database(), Path::new("/var/lib/snapctl/state.db"));
        let under = Paths::under(Path::new("/t"));
        assert_eq!(under.vms(), Path::new("/t/etc/snapctl/vms"));
        assert_eq!(under.vm_lock(&"a".parse().unwrap()), Path::new("/t/run/snapctl/locks/vm-a.lock"));
    }

    #[test]
    fn a_user_gets_xdg_places() {
        let vars = |name: &str| match name {
            "HOME" => Some("/home/u".into()),
            "XDG_RUNTIME_DIR" => Some("/run/user/7".into()),
            "XDG_STATE_HOME" => Some("relative/is/ignored".into()),
            _ => None,
        };
        let paths = Paths::user(vars, 7).unwrap();
        assert_eq!(paths.config, Path::new("/home/u/.config/snapctl"));
        assert_eq!(paths.state, Path::new("/home/u/.local/state/snapctl"));
        assert_eq!(paths.run, Path::new("/run/user/7/snapctl"));
        assert_eq!(Paths::user(|_| None, 7), None);
    }
}
