//! Seals that hold, as far as this host can, and say how far that is.

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::thread::CapabilitySet;
use storage::seal::{Immutable, SealState, Unsealed, WriteBits, is_sealed, seal, state, unseal};

use crate::support::{Images, without};

/// A file that can be removed again, however its test ends.
struct Layer(PathBuf);

impl Layer {
    fn new(images: &Images) -> Self {
        let path = images.create("layer", &[], "1M");
        fs::set_permissions(&path, Permissions::from_mode(0o660)).unwrap();
        Self(path)
    }

    fn mode(&self) -> u32 {
        fs::metadata(&self.0).unwrap().mode() & 0o7777
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        let _ = unseal(&self.0, 0o600);
    }
}

fn open_for_writing(path: &Path) -> io::Result<fs::File> {
    OpenOptions::new().write(true).open(path)
}

#[test]
fn a_seal_holds_until_it_is_taken_off() {
    let images = Images::new();
    let layer = Layer::new(&images);
    assert!(!is_sealed(&layer.0).unwrap());

    let first = seal(&layer.0).unwrap();
    assert_eq!((first.previous_mode, first.write_bits), (0o660, WriteBits::Removed));
    assert_eq!(first.sealed_mode(), Some(0o660));
    assert_eq!(layer.mode(), 0o440);
    let immutable = first.immutable == Immutable::Set;
    assert_eq!(state(&layer.0).unwrap(), SealState { no_write_bits: true, immutable });
    assert!(is_sealed(&layer.0).unwrap());
    // Root passes over modes, and nobody over the attribute.
    let root = rustix::process::geteuid().is_root();
    assert_eq!(open_for_writing(&layer.0).is_err(), immutable || !root);
    assert_eq!(fs::rename(&layer.0, images.path("elsewhere")).is_err(), immutable);
    if !immutable {
        fs::rename(images.path("elsewhere"), &layer.0).unwrap();
    }
    // It can still be read, by QEMU too.
    images.info("layer");

    let again = seal(&layer.0).unwrap();
    assert_eq!((again.write_bits, again.sealed_mode()), (WriteBits::AlreadyGone, None));
    assert_eq!(again.immutable == Immutable::AlreadySet, immutable);

    assert_eq!(unseal(&layer.0, 0o660).unwrap(), Unsealed::Unsealed);
    assert_eq!(unseal(&layer.0, 0o660).unwrap(), Unsealed::AlreadySo);
    assert_eq!((layer.mode(), is_sealed(&layer.0).unwrap()), (0o660, false));
    open_for_writing(&layer.0).unwrap();
}

#[test]
fn without_the_right_to_it_the_mode_alone_is_the_seal() {
    let images = Images::new();
    let layer = Layer::new(&images);
    let sealed = without(CapabilitySet::LINUX_IMMUTABLE, || seal(&layer.0).unwrap());
    assert_eq!(sealed.write_bits, WriteBits::Removed);
    // A file system without the attribute says so before anybody's rights are asked for.
    assert!(matches!(sealed.immutable, Immutable::NotPermitted | Immutable::Unsupported), "{sealed:?}");
    let now = state(&layer.0).unwrap();
    assert_eq!(now, SealState { no_write_bits: true, immutable: false });
    assert!(is_sealed(&layer.0).unwrap());
    assert_eq!(
        without(CapabilitySet::LINUX_IMMUTABLE, || unseal(&layer.0, 0o660).unwrap()),
        Unsealed::Unsealed
    );
}

#[test]
fn another_users_file_is_said_to_be_unsealed() {
    // Without these capabilities, root is a user like any other, and not the owner of this file.
    let lost = CapabilitySet::FOWNER | CapabilitySet::LINUX_IMMUTABLE;
    let images = Images::new();
    let layer = Layer::new(&images);
    let path = if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&layer.0, Some(12345), None).unwrap();
        layer.0.clone()
    } else {
        // Root's, who this is not; readable, with a write bit.
        PathBuf::from("/etc/passwd")
    };
    let mode = fs::metadata(&path).unwrap().mode();
    let sealed = without(lost, || seal(&path).unwrap());
    assert_eq!((sealed.write_bits, sealed.sealed_mode()), (WriteBits::NotPermitted, None));
    assert!(!is_sealed(&path).unwrap());
    assert_eq!(fs::metadata(&path).unwrap().mode(), mode);
}

#[test]
fn a_block_device_is_left_alone_and_anything_else_refused() {
    let images = Images::new();
    for (path, reason) in [("/dev/null", "neither"), ("/nonexistent", "No such file")] {
        let text = seal(Path::new(path)).unwrap_err().to_string();
        assert!(text.starts_with(&format!("cannot open {path}")) && text.contains(reason), "{text}");
    }
    std::os::unix::fs::symlink("layer", images.path("link")).unwrap();
    assert!(seal(&images.path("link")).unwrap_err().to_string().contains("symbolic link"));

    let devices = fs::read_dir("/sys/class/block").unwrap().map(|entry| entry.unwrap().file_name());
    let devices = devices.map(|name| Path::new("/dev").join(name));
    let readable = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device()) && fs::File::open(path).is_ok()
    };
    let Some(device) = devices.into_iter().find(readable) else {
        assert!(!rustix::process::geteuid().is_root(), "root can read some block device");
        eprintln!("not tested: this user can read no block device");
        return;
    };
    let before = fs::metadata(&device).unwrap().mode();
    let sealed = seal(&device).unwrap();
    assert_eq!((sealed.write_bits, sealed.immutable), (WriteBits::BlockDevice, Immutable::Unsupported));
    assert_eq!(sealed.sealed_mode(), None);
    assert!(!is_sealed(&device).unwrap());
    assert_eq!(unseal(&device, 0o600).unwrap(), Unsealed::AlreadySo);
    assert_eq!(fs::metadata(&device).unwrap().mode(), before);
}
