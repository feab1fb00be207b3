//! Overlay files: made like their base, verified, and removed only when they are ours.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use model::ImageFormat::Qcow2;
use model::{ByteSize, OperationId};
use rustix::thread::CapabilitySet;
use storage::overlay::{
    Expected, OverlayError, Ownership, RemovedOverlay, backing_name, make_durable, overlay_name,
    overlay_paths, prepare, prepare_as, remove_if_ours, verify_header,
};

use crate::support::{Images, without};

const OPERATION: OperationId = OperationId::from_bits(0x1a2b_3c4d_5e6f_7081);

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn an_overlay_has_its_bases_owner_and_mode_and_no_more() {
    let images = Images::new();
    let base = images.create("base", &[], "1M");
    for (bits, expected) in [(0o600, 0o600), (0o644, 0o644), (0o660, 0o660), (0o4755, 0o644), (0o640, 0o640)]
    {
        fs::set_permissions(&base, Permissions::from_mode(bits)).unwrap();
        let path = images.path(&format!("overlay-{bits:o}"));
        let made = prepare(&path, &base).unwrap();
        assert_eq!(mode(&path), expected, "of {bits:o}");
        assert_eq!(made.ownership, Ownership::of(&base).unwrap());
        let found = fs::metadata(&path).unwrap();
        assert_eq!((made.inode.dev, made.inode.ino), (found.dev(), found.ino()));
        assert_eq!(found.len(), 0);
    }
}

#[test]
fn an_overlay_of_a_sealed_layer_can_be_written_again() {
    let images = Images::new();
    let base = images.create("base", &[], "1M");
    fs::set_permissions(&base, Permissions::from_mode(0o440)).unwrap();
    let wanted = Ownership { mode: 0o660, ..Ownership::of(&base).unwrap() };
    let made = prepare_as(&images.path("overlay"), &base, wanted).unwrap();
    assert_eq!(made.ownership.mode, 0o660);
}

#[test]
fn another_users_base_gets_an_overlay_of_that_user_or_none() {
    let images = Images::new();
    if !rustix::process::geteuid().is_root() {
        // /etc/passwd is root's, who this is not.
        let path = images.path("overlay");
        let error = prepare(&path, Path::new("/etc/passwd")).unwrap_err();
        assert!(matches!(error, OverlayError::Owner { uid: 0, gid: 0, .. }), "{error}");
        assert!(!path.exists());
        return;
    }
    let base = images.create("base", &[], "1M");
    std::os::unix::fs::chown(&base, Some(12345), Some(23456)).unwrap();
    let path = images.path("overlay");
    let made = prepare(&path, &base).unwrap();
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.uid(), found.gid(), made.ownership.uid), (12345, 23456, 12345));

    let path = images.path("refused");
    let error = without(CapabilitySet::CHOWN, || prepare(&path, &base).unwrap_err());
    assert!(matches!(error, OverlayError::Owner { uid: 12345, gid: 23456, .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("cannot be given to uid 12345, gid 23456") && text.contains("run snapctl as"),
        "{text}"
    );
    assert!(!path.exists(), "nothing is left behind");
}

#[test]
fn a_taken_name_is_left_alone() {
    let images = Images::new();
    let base = images.create("base", &[], "1M");
    let taken = images.path("taken");
    fs::write(&taken, b"somebody's").unwrap();
    symlink("nowhere", images.path("dangling")).unwrap();
    for path in [taken.clone(), images.path("dangling"), images.dir().to_owned()] {
        let error = prepare(&path, &base).unwrap_err();
        assert!(matches!(error, OverlayError::Exists { .. }), "{error}");
    }
    assert_eq!(fs::read(&taken).unwrap(), b"somebody's");
    assert!(!images.path("nowhere").exists());
    let error = prepare(&images.path("no/where"), &base).unwrap_err().to_string();
    assert!(error.starts_with("cannot create the overlay"), "{error}");
}

#[test]
fn only_our_own_file_is_removed() {
    let images = Images::new();
    let base = images.create("base", &[], "1M");
    let path = images.path("overlay");
    let ours = prepare(&path, &base).unwrap();
    make_durable(&path).unwrap();
    // Somebody puts another file in its place; ours still exists, so that its number is not used again.
    fs::rename(&path, images.path("moved")).unwrap();
    fs::write(&path, b"theirs").unwrap();
    let RemovedOverlay::NotOurs(found) = remove_if_ours(&path, ours.inode).unwrap() else { panic!() };
    assert_ne!(found, ours.inode);
    assert_eq!(fs::read(&path).unwrap(), b"theirs");
    // A link that leads to ours is not ours.
    fs::remove_file(&path).unwrap();
    symlink("moved", &path).unwrap();
    assert!(matches!(remove_if_ours(&path, ours.inode).unwrap(), RemovedOverlay::NotOurs(_)));
    let moved = images.path("moved");
    assert_eq!(remove_if_ours(&moved, ours.inode).unwrap(), RemovedOverlay::Removed);
    assert_eq!(remove_if_ours(&moved, ours.inode).unwrap(), RemovedOverlay::AlreadyGone);
}

#[test]
fn q6_qemu_img_keeps_the_prepared_file_and_its_header_is_verified() {
    let images = Images::new();
    let base = images.create("vda.qcow2", &[], "10M");
    fs::set_permissions(&base, Permissions::from_mode(0o640)).unwrap();
    let path = overlay_paths(&[&base], OPERATION).remove(0);
    let made = prepare(&path, &base).unwrap();
    let backing = backing_name(&base, &path);
    let (name, backing_text) = (path.file_name().unwrap().to_str().unwrap(), backing.to_str().unwrap());
    images.qemu_img(&["create", "-q", "-f", "qcow2", "-b", backing_text, "-F", "qcow2", name, "10M"]);
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.ino(), mode(&path)), (made.inode.ino, 0o640));

    let expected = Expected {
        backing,
        backing_format: Qcow2,
        virtual_size: ByteSize(10 << 20),
        cluster_bits: 16,
        encryption: storage::qcow2::Encryption::None,
    };
    verify_header(&path, &expected).unwrap();

    let refused = |expected: Expected| match verify_header(&path, &expected).unwrap_err() {
        OverlayError::Mismatch { field, .. } => field,
        other => panic!("{other}"),
    };
    let base = || expected.clone();
    assert_eq!(refused(Expected { backing: "other".into(), ..base() }), "a backing file name of");
    assert_eq!(
        refused(Expected { backing_format: model::ImageFormat::Raw, ..base() }),
        "a backing format of"
    );
    assert_eq!(refused(Expected { virtual_size: ByteSize(1), ..base() }), "a virtual size of");
    assert_eq!(refused(Expected { cluster_bits: 12, ..base() }), "cluster_bits");
    let text = verify_header(&path, &Expected { backing: "other".into(), ..base() }).unwrap_err().to_string();
    assert!(
        text.ends_with("has a backing file name of \"vda.qcow2\"; \"other\" was asked for. It was not used")
    );

    images.patch(name, 79, &[1]);
    assert_eq!(refused(base()), "incompatible features");
    images.patch(name, 79, &[0]);
    fs::rename(images.path("vda.qcow2"), images.path("gone")).unwrap();
    let text = verify_header(&path, &expected).unwrap_err().to_string();
    assert!(text.starts_with("cannot find the backing file"), "{text}");
    images.create("none", &[], "10M");
    let text = verify_header(&images.path("none"), &expected).unwrap_err().to_string();
    assert!(text.contains("a backing file name of none"), "{text}");
    fs::write(&path, b"").unwrap();
    assert!(matches!(verify_header(&path, &expected), Err(OverlayError::Header(_))));
}

#[test]
fn names_are_neutral_and_do_not_grow() {
    for (base, name) in [
        ("vda.qcow2", "vda.1a2b3c4d.qcow2"),
        ("/srv/vda.1a2b3c4d.qcow2", "vda.1a2b3c4d.qcow2"),
        ("vda.deadbeef-12.qcow2", "vda.1a2b3c4d.qcow2"),
        ("vda.raw", "vda.1a2b3c4d.qcow2"),
        ("vda.img", "vda.1a2b3c4d.qcow2"),
        ("/dev/vg0/lv-root", "lv-root.1a2b3c4d.qcow2"),
        ("vm.example.com", "vm.example.com.1a2b3c4d.qcow2"),
        // Not ours: seven digits, capitals, no number, no dot.
        ("vda.1a2b3c4.qcow2", "vda.1a2b3c4.1a2b3c4d.qcow2"),
        ("vda.1A2B3C4D.qcow2", "vda.1A2B3C4D.1a2b3c4d.qcow2"),
        ("vda.1a2b3c4d-.qcow2", "vda.1a2b3c4d-.1a2b3c4d.qcow2"),
        ("1a2b3c4d.qcow2", "1a2b3c4d.1a2b3c4d.qcow2"),
        (".qcow2", "disk.1a2b3c4d.qcow2"),
        (".1a2b3c4d.qcow2", "disk.1a2b3c4d.qcow2"),
        ("a:b.qcow2", "a_b.1a2b3c4d.qcow2"),
    ] {
        assert_eq!(overlay_name(Path::new(base), OPERATION, 0).to_str(), Some(name), "{base}");
    }
    assert_eq!(overlay_name(Path::new("vda"), OPERATION, 3).to_str(), Some("vda.1a2b3c4d-3.qcow2"));
}

#[test]
fn the_longest_names_are_cut_at_a_character_and_stay_so() {
    let images = Images::new();
    let base = images.path(&format!("x{}", "ü".repeat(127)));
    fs::write(&base, b"").unwrap();
    let mut path = base.clone();
    for _ in 0..3 {
        path = images.path(overlay_name(&path, OPERATION, 0).to_str().expect("no half characters"));
        assert_eq!(path.file_name().unwrap().len(), 254);
    }
    prepare(&path, &base).unwrap();
}

#[test]
fn bases_of_one_stem_get_different_overlays() {
    let bases = ["/a/disk.raw", "/a/disk.qcow2", "/b/disk.raw", "/a/disk.img"].map(Path::new);
    let paths = overlay_paths(&bases, OPERATION);
    let expected = [
        "/a/disk.1a2b3c4d.qcow2",
        "/a/disk.1a2b3c4d-1.qcow2",
        "/b/disk.1a2b3c4d.qcow2",
        "/a/disk.1a2b3c4d-2.qcow2",
    ];
    assert_eq!(paths, expected.map(Path::new));
}

#[test]
fn a_backing_name_is_relative_in_one_directory_and_never_a_protocol() {
    let name = |base: &str, overlay: &str| backing_name(Path::new(base), Path::new(overlay));
    assert_eq!(name("/a/base", "/a/top"), Path::new("base"));
    assert_eq!(name("/a/base", "/b/top"), Path::new("/a/base"));
    assert_eq!(name("/a/b:c", "/a/top").as_os_str(), "./b:c");
    // QEMU agrees that it is a file.
    let images = Images::new();
    images.create("./b:c", &[], "1M");
    images.overlay("top", name("/a/b:c", "/a/top").to_str().unwrap());
    images.qemu_img(&["info", "-f", "qcow2", "--backing-chain", "top"]);
}
