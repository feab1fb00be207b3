//! Chains: followed to the base, or refused with the reason.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use model::ImageFormat::{Qcow2, Raw};
use model::{ByteSize, ImageFormat};
use storage::chain::{Chain, ChainError, ChainPolicy, Finding, Severity, check, is_protocol, overlays_of};

use crate::support::Images;

const BACKING_FORMAT: u32 = 0xe279_2aca;

/// base.raw ← middle ← top, of 10 MiB each.
fn three_layers() -> Images {
    let images = Images::new();
    fs::File::create(images.path("base.raw")).unwrap().set_len(10 << 20).unwrap();
    images.create("middle", &["-b", "base.raw", "-F", "raw"], "10M");
    images.overlay("top", "middle");
    images
}

fn open(path: &Path, format: ImageFormat) -> Result<Chain, ChainError> {
    Chain::open(path, format, &ChainPolicy::default())
}

fn look(path: &Path) -> Vec<Finding> {
    check(path, Qcow2, &ChainPolicy::default())
}

fn codes(findings: &[Finding]) -> Vec<(Severity, &'static str)> {
    findings.iter().map(|finding| (finding.severity, finding.code)).collect()
}

/// Asserts that `open` refuses and that `check` reports one error of this code about this layer.
fn assert_refused(active: &Path, at_fault: &Path, code: &'static str, text: &str) {
    let error = open(active, Qcow2).unwrap_err();
    assert_eq!((error.code(), error.path()), (code, at_fault), "{error}");
    assert!(error.to_string().contains(text), "{error}");
    let findings = look(active);
    let errors: Vec<_> = findings.iter().filter(|finding| finding.severity == Severity::Error).collect();
    assert_eq!(errors.len(), 1, "{findings:?}");
    assert_eq!((errors[0].code, errors[0].path.as_path()), (code, at_fault));
    assert_eq!(errors[0].message, error.to_string());
    assert!(!errors[0].advice.is_empty());
}

#[test]
fn a_whole_chain_is_base_first_with_what_each_layer_is() {
    let images = three_layers();
    images.qemu_io("top", "write -P 7 0 1M");
    let chain = open(&images.path("top"), Qcow2).unwrap();
    let names: Vec<_> = chain.layers().map(|layer| layer.path.strip_prefix(images.dir()).unwrap()).collect();
    assert_eq!(names, ["base.raw", "middle", "top"].map(Path::new));
    let formats: Vec<_> = chain.layers().map(|layer| layer.format).collect();
    assert_eq!(formats, [Raw, Qcow2, Qcow2]);
    assert!(chain.layers().all(|layer| layer.virtual_size == ByteSize(10 << 20)));
    assert!(chain.active().allocated.0 >= 1 << 20, "{:?}", chain.active().allocated);
    assert_eq!(chain.base().allocated, ByteSize(0), "a hole takes no space");
    let backing = chain.active().backing.as_ref().unwrap();
    assert_eq!((backing.name.as_path(), backing.format), (Path::new("middle"), Qcow2));
    assert_eq!(backing.path, images.path("middle"));
    assert!(chain.base().backing.is_none() && chain.base().header.is_none());
    assert_eq!(chain.find(chain.base().inode).unwrap().path, images.path("base.raw"));
    assert_eq!(codes(&look(&images.path("top"))), []);
}

#[test]
fn a_single_layer_is_a_chain() {
    let images = three_layers();
    let chain = open(&images.path("base.raw"), Raw).unwrap();
    assert_eq!(chain.layers().count(), 1);
    assert_eq!(chain.base().inode, chain.active().inode);
}

#[test]
fn a_raw_disk_is_never_read_as_anything_else() {
    let images = three_layers();
    // A guest that owns a raw disk writes a header into it that names a file of the host.
    let evil = images.create("evil", &["-u", "-b", "/etc/shadow", "-F", "raw"], "1M");
    let chain = open(&evil, Raw).unwrap();
    assert_eq!(chain.layers().count(), 1);
    images.create("above", &["-u", "-b", "evil", "-F", "raw"], "1M");
    let chain = open(&images.path("above"), Qcow2).unwrap();
    assert_eq!(chain.layers().count(), 2);
}

#[test]
fn a_missing_layer() {
    let images = three_layers();
    let base = images.path("base.raw");
    fs::remove_file(&base).unwrap();
    let text = format!("{} does not exist, and {} names it", base.display(), images.path("middle").display());
    assert_refused(&images.path("top"), &base, "layer-missing", &text);
    assert_refused(&images.path("none"), &images.path("none"), "layer-missing", "/none does not exist");
}

#[test]
fn a_backing_file_without_a_format() {
    let images = three_layers();
    let extension = images.extension("middle", BACKING_FORMAT);
    images.patch("middle", extension, &0x1234_5678_u32.to_be_bytes());
    let middle = images.path("middle");
    assert_refused(
        &images.path("top"),
        &middle,
        "backing-format-missing",
        "names base.raw as its backing file",
    );
}

#[test]
fn a_backing_format_that_is_not_handled() {
    let images = three_layers();
    images.qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "base.raw", "-F", "vmdk", "middle"]);
    let middle = images.path("middle");
    assert_refused(&images.path("top"), &middle, "backing-format-unsupported", "of format vmdk");
}

#[test]
fn backing_names_that_are_not_files() {
    for name in
        ["json:{\"driver\":\"nbd\"}", "nbd://host/x", "nbd:unix:/x", "file:base.raw", "fat:rw:/etc", "a:b"]
    {
        assert!(is_protocol(name.as_ref()));
        let images = three_layers();
        images.create("active", &["-u", "-b", "base.raw", "-F", "raw"], "10M");
        let header = fs::read(images.path("active")).unwrap();
        let at = header.windows(8).position(|window| window == b"base.raw").unwrap();
        images.patch("active", at, name.as_bytes());
        images.patch("active", 16, &u32::try_from(name.len()).unwrap().to_be_bytes());
        let active = images.path("active");
        assert_refused(&active, &active, "backing-not-a-file", &format!("{name:?}"));
    }
    for name in ["base.raw", "./a:b", "/srv/a:b", ""] {
        assert!(!is_protocol(name.as_ref()), "{name}");
    }
}

#[test]
fn a_backing_file_elsewhere_is_refused_unless_allowed_by_name() {
    let images = three_layers();
    let elsewhere = three_layers();
    let base = elsewhere.path("top");
    let active = images.create("active", &["-b", base.to_str().unwrap(), "-F", "qcow2"], "10M");
    let text = format!("neither below {} nor allowed by name", images.dir().display());
    assert_refused(&active, &active, "backing-outside", &text);

    // Neither `..` nor a symlink is a way out.
    let up = Path::new("..").join(elsewhere.dir().file_name().unwrap()).join("top");
    images.create("active", &["-b", up.to_str().unwrap(), "-F", "qcow2"], "10M");
    assert_refused(&active, &active, "backing-outside", base.to_str().unwrap());
    symlink(&base, images.path("link")).unwrap();
    images.overlay("active", "link");
    assert_refused(&active, &active, "backing-outside", base.to_str().unwrap());

    // One file allows itself, and not its neighbour below.
    let allow = |allowed: PathBuf| ChainPolicy { allowed: vec![allowed], ..ChainPolicy::default() };
    let error = Chain::open(&active, Qcow2, &allow(base.clone())).unwrap_err();
    assert_eq!(error.path(), base, "{error}");
    let chain = Chain::open(&active, Qcow2, &allow(elsewhere.dir().to_owned())).unwrap();
    assert_eq!(chain.layers().count(), 4);
    assert_eq!(codes(&check(&active, Qcow2, &allow(elsewhere.dir().to_owned()))), []);
    // A name that merely begins the same is another directory.
    let similar = PathBuf::from(format!("{}x", images.dir().display()));
    fs::create_dir(&similar).unwrap();
    fs::copy(images.path("base.raw"), similar.join("base.raw")).unwrap();
    let named = similar.join("base.raw");
    images.create("active", &["-b", named.to_str().unwrap(), "-F", "raw"], "10M");
    let error = open(&active, Qcow2).unwrap_err();
    fs::remove_dir_all(&similar).unwrap();
    assert_eq!(error.code(), "backing-outside");
}

#[test]
fn q7_a_loop_of_one_and_of_three() {
    let images = three_layers();
    images.qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "top", "-F", "qcow2", "middle"]);
    let (top, middle) = (images.path("top"), images.path("middle"));
    assert_refused(&top, &middle, "chain-loop", "above it in the same chain");
    // Under another name it is the same file.
    fs::hard_link(&top, images.path("twin")).unwrap();
    images.qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "twin", "-F", "qcow2", "middle"]);
    assert_refused(&top, &middle, "chain-loop", "twin");
    images.qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "middle", "-F", "qcow2", "middle"]);
    assert_refused(&middle, &middle, "chain-loop", "middle");
}

#[test]
fn a_chain_without_end_is_left_after_256_layers() {
    let images = Images::new();
    images.create("l000", &[], "1M");
    let overlay = fs::read(images.create("l001", &["-u", "-b", "l000", "-F", "qcow2"], "1M")).unwrap();
    let name_at = overlay.windows(4).position(|window| window == b"l000").unwrap();
    for depth in 1..300 {
        let mut bytes = overlay.clone();
        bytes[name_at..name_at + 4].copy_from_slice(format!("l{:03}", depth - 1).as_bytes());
        fs::write(images.path(&format!("l{depth:03}")), bytes).unwrap();
    }
    assert_eq!(open(&images.path("l255"), Qcow2).unwrap().layers().count(), 256);
    assert_refused(&images.path("l256"), &images.path("l001"), "chain-too-deep", "its layer 256");
    assert_eq!(open(&images.path("l299"), Qcow2).unwrap_err().code(), "chain-too-deep");
}

#[test]
fn an_unsound_layer_is_named() {
    let images = three_layers();
    images.patch("middle", 20, &99_u32.to_be_bytes());
    assert_refused(
        &images.path("top"),
        &images.path("middle"),
        "header-unsound",
        "cluster_bits at byte 20 is 99",
    );
    let images = three_layers();
    fs::remove_file(images.path("middle")).unwrap();
    fs::create_dir(images.path("middle")).unwrap();
    assert_refused(&images.path("top"), &images.path("middle"), "layer-unreadable", "neither a regular file");
}

#[test]
fn features_that_are_not_handled() {
    let images = three_layers();
    images.patch("middle", 79, &[0x80]);
    assert_refused(&images.path("top"), &images.path("middle"), "features-unknown", "incompatible bits [7]");
    let active = images.create("active", &["-o", "data_file=secret"], "1M");
    assert_refused(&active, &active, "data-file", "(secret)");
}

#[test]
fn marks_that_qemu_left() {
    let images = three_layers();
    images.patch("middle", 79, &[3]);
    let findings = look(&images.path("top"));
    assert_eq!(codes(&findings), [(Severity::Error, "marked-corrupt"), (Severity::Warning, "marked-dirty")]);
    assert!(findings.iter().all(|finding| finding.path == images.path("middle")));
    // The active layer of a VM that runs with lazy refcounts is always marked.
    images.patch("middle", 79, &[0]);
    images.patch("top", 79, &[1]);
    assert_eq!(codes(&look(&images.path("top"))), [(Severity::Info, "marked-dirty")]);
}

#[test]
fn sizes_that_make_no_sense() {
    let images = three_layers();
    images.create("small", &["-b", "middle", "-F", "qcow2"], "5M");
    let findings = look(&images.path("small"));
    assert_eq!(codes(&findings), [(Severity::Warning, "overlay-smaller")]);
    assert!(findings[0].message.contains("5 MiB") && findings[0].message.contains("10 MiB"), "{findings:?}");
    let raw = |name: &str, size| fs::File::create(images.path(name)).unwrap().set_len(size).unwrap();
    raw("base.raw", 10 << 20 | 1);
    assert!(codes(&look(&images.path("top"))).contains(&(Severity::Warning, "size-odd")));
    raw("base.raw", 0);
    assert!(codes(&look(&images.path("top"))).contains(&(Severity::Warning, "size-zero")));
}

#[test]
fn a_base_that_changed_after_its_overlay_was_made() {
    let images = three_layers();
    let top = images.path("top");
    let middle = images.path("middle");
    let set = |time: SystemTime| fs::File::open(&middle).unwrap().set_modified(time).unwrap();
    let born = fs::metadata(&top).unwrap().created().expect("the test directory's file system keeps births");
    // The guest writes to the base until the point in time, which is later than the making of the overlay.
    set(born + Duration::from_secs(59));
    assert_eq!(codes(&look(&top)), []);
    set(born + Duration::from_secs(61));
    let findings = look(&top);
    assert_eq!(codes(&findings), [(Severity::Warning, "base-newer")]);
    assert!(
        findings[0].path == middle && findings[0].message.contains("the making of its overlay"),
        "{findings:?}"
    );

    // What the catalogue knows counts more, in both directions.
    let known = |time: SystemTime| ChainPolicy {
        last_changes: [(middle.clone(), Timestamp::try_from(time).unwrap())].into(),
        ..ChainPolicy::default()
    };
    assert_eq!(codes(&check(&top, Qcow2, &known(born + Duration::from_secs(60)))), []);
    let findings = check(&top, Qcow2, &known(born + Duration::from_secs(58)));
    assert_eq!(codes(&findings), [(Severity::Error, "base-newer")]);
    // A clock that jumps is no panic.
    set(SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 33));
    assert_eq!(codes(&look(&top)), [(Severity::Warning, "base-newer")]);
}

#[test]
fn a_real_write_into_a_frozen_layer_is_seen() {
    let images = three_layers();
    let an_hour_ago = SystemTime::now() - Duration::from_secs(3600);
    fs::File::open(images.path("middle")).unwrap().set_modified(an_hour_ago).unwrap();
    let chain = open(&images.path("top"), Qcow2).unwrap();
    let frozen = chain.layers().map(|layer| (layer.path.clone(), layer.mtime)).collect();
    let policy = ChainPolicy { last_changes: frozen, ..ChainPolicy::default() };
    images.qemu_io("middle", "read 0 1M");
    images.qemu_io("top", "write -P 1 0 64k");
    assert_eq!(
        codes(&check(&images.path("top"), Qcow2, &policy)),
        [],
        "reading, and writing above, is no change"
    );
    images.qemu_io("middle", "write -P 1 0 64k");
    assert_eq!(codes(&check(&images.path("top"), Qcow2, &policy)), [(Severity::Error, "base-newer")]);
}

#[test]
fn a_link_to_the_active_layer_hides_its_neighbours_from_qemu() {
    let images = three_layers();
    let elsewhere = Images::new();
    let link = elsewhere.path("disk");
    symlink(images.path("top"), &link).unwrap();
    assert_eq!(open(&link, Qcow2).unwrap().layers().count(), 3, "resolved beside the real file");
    let findings = look(&link);
    assert_eq!(codes(&findings), [(Severity::Warning, "named-through-link")]);
    // A link in the same directory is harmless.
    symlink("top", images.path("current")).unwrap();
    assert_eq!(codes(&look(&images.path("current"))), []);
}

#[test]
fn overlays_are_found_by_what_they_name() {
    let images = three_layers();
    let dir = images.dir();
    let found = |base: &str| {
        let overlays = overlays_of(dir, &images.path(base)).unwrap();
        let names: Vec<_> = overlays
            .found
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        (names, overlays.doubtful.len())
    };
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert_eq!(found("base.raw"), (names(&["middle"]), 0));
    assert_eq!(found("top"), (names(&[]), 0));

    // By absolute name, through a link to the directory, by another name of the same file.
    images.overlay("absolute", images.path("middle").to_str().unwrap());
    symlink(dir, images.path("here")).unwrap();
    images.overlay("linked", "here/middle");
    fs::hard_link(images.path("middle"), images.path("twin")).unwrap();
    images.overlay("twins", "twin");
    // Neither a link to an overlay, nor a pipe, nor a short file is an overlay, and nothing waits for them.
    symlink("top", images.path("link-to-top")).unwrap();
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(rustix::fs::CWD, images.path("pipe"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    fs::write(images.path("short"), b"QF").unwrap();
    assert_eq!(found("middle"), (names(&["absolute", "linked", "top", "twins"]), 0));

    // What cannot be read may be an overlay of anything.
    images.overlay("damaged", "middle");
    images.patch("damaged", 20, &99_u32.to_be_bytes());
    let header = fs::read(images.path("top")).unwrap();
    fs::write(images.path("protocol"), &header).unwrap();
    let at = header.windows(6).position(|window| window == b"middle").unwrap();
    images.patch("protocol", at, b"a:ddle");
    let doubtful = overlays_of(dir, &images.path("base.raw")).unwrap().doubtful;
    let reasons: Vec<_> = doubtful.iter().map(|(path, error)| (path.clone(), error.code())).collect();
    let expected = [("damaged", "header-unsound"), ("protocol", "backing-not-a-file")];
    assert_eq!(reasons, expected.map(|(name, code)| (images.path(name), code)));

    // A base that is gone still has overlays.
    fs::remove_file(images.path("middle")).unwrap();
    fs::remove_file(images.path("twin")).unwrap();
    assert_eq!(found("middle").0, names(&["absolute", "linked", "top"]));
    let error = overlays_of(Path::new("/nonexistent"), dir).unwrap_err().to_string();
    assert!(error.starts_with("cannot list /nonexistent"), "{error}");
}
