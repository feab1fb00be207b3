//! The header parser: right about real images, unharmed by others.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use model::ByteSize;
use proptest::prelude::{Just, ProptestConfig, any, prop, prop_assert_eq, prop_oneof, proptest};
use proptest::strategy::Strategy;
use storage::qcow2::{
    Autoclear, Compatible, Compression, Encryption, Fault, Header, Incompatible, Qcow2Error, is_pristine,
};

use crate::entry;
use crate::support::Images;

fn fault(path: &Path) -> Fault {
    match Header::open(path) {
        Err(Qcow2Error::Header { fault, .. }) => fault,
        other => panic!("{other:?}"),
    }
}

fn pristine(path: &Path) -> bool {
    is_pristine(&fs::File::open(path).unwrap(), path).unwrap()
}

#[test]
fn agrees_with_qemu_img_about_every_option() {
    let images = Images::new();
    images.create("base", &[], "10M");
    let secret = ["--object", "secret,id=s,data=x", "-o"];
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let cases: &[(&str, &[&str])] = &[
        ("plain", &[]),
        ("v2", &["-o", "compat=0.10"]),
        ("smallest clusters", &["-o", "cluster_size=512"]),
        ("largest clusters", &["-o", "cluster_size=2M"]),
        ("extended L2", &["-o", "extended_l2=on,cluster_size=128k"]),
        ("zstd", &["-o", "compression_type=zstd"]),
        ("lazy", &["-o", "lazy_refcounts=on"]),
        ("narrow refcounts", &["-o", "refcount_bits=1"]),
        ("wide refcounts", &["-o", "refcount_bits=64"]),
        ("data file", &["-o", "data_file=external,data_file_raw=on"]),
        ("backing", &["-b", "base", "-F", "qcow2"]),
        ("v2 backing", &["-o", "compat=0.10", "-b", "base", "-F", "qcow2"]),
        ("backing with 512 byte clusters", &["-o", "cluster_size=512", "-b", "./base", "-F", "qcow2"]),
        ("luks", &[&secret[..], &[luks]].concat()),
    ];
    for (name, options) in cases {
        let path = images.create(name, options, "20M");
        let header = Header::open(&path).unwrap();
        let info = images.info(name);
        let data = &info["format-specific"]["data"];
        assert_eq!(info["virtual-size"], header.virtual_size.0, "{name}");
        assert_eq!(info["cluster-size"], header.cluster_size(), "{name}");
        let text = |bytes: &std::ffi::OsStr| bytes.to_str().unwrap().to_owned();
        let backing = header.backing_file.as_deref().map(text);
        assert_eq!(info["backing-filename"].as_str(), backing.as_deref(), "{name}");
        assert_eq!(info["backing-filename-format"].as_str(), header.backing_format.as_deref(), "{name}");
        assert_eq!(data["data-file"].as_str(), header.data_file.as_deref().map(text).as_deref(), "{name}");
        assert_eq!(data["refcount-bits"], 1 << header.refcount_order, "{name}");
        assert_eq!(data["compat"], if header.version == 3 { "1.1" } else { "0.10" }, "{name}");
        let lazy = data["lazy-refcounts"].as_bool().unwrap_or(false);
        assert_eq!(lazy, header.compatible.lazy_refcounts(), "{name}");
        let extended = data["extended-l2"].as_bool().unwrap_or(false);
        assert_eq!(extended, header.incompatible.extended_l2(), "{name}");
        let zstd = data["compression-type"] == "zstd";
        assert_eq!(zstd, header.compression == Compression::Zstd, "{name}");
        assert_eq!(zstd, header.incompatible.compression(), "{name}");
        let luks = data["encrypt"]["format"] == "luks";
        assert_eq!(luks, header.encryption == Encryption::Luks, "{name}");
        assert_eq!(luks, header.luks_header.is_some(), "{name}");
        assert_eq!(header.incompatible.external_data(), header.data_file.is_some(), "{name}");
        assert!(header.incompatible.unknown().is_empty() && header.unknown_extensions.is_empty(), "{name}");
    }
}

#[test]
fn counts_bitmaps_and_internal_snapshots() {
    let images = Images::new();
    let path = images.create("a", &[], "10M");
    images.qemu_img(&["bitmap", "--add", "a", "one"]);
    images.qemu_img(&["bitmap", "--add", "a", "two"]);
    images.qemu_img(&["snapshot", "-c", "inside", "a"]);
    let header = Header::open(&path).unwrap();
    assert_eq!((header.bitmaps, header.internal_snapshots), (Some(2), 1));
    assert!(header.autoclear.bitmaps());
}

#[test]
fn every_fault_is_named_with_its_place_and_limit() {
    let images = Images::new();
    images.create("base", &[], "1M");
    images.create("a", &["-b", "base", "-F", "qcow2"], "1M");
    let whole = fs::read(images.path("a")).unwrap();
    let format = images.extension("a", 0xe279_2aca);
    let patched = |at: usize, bytes: &[u8]| {
        fs::write(images.path("a"), &whole).unwrap();
        images.patch("a", at, bytes);
        fault(&images.path("a"))
    };
    let out_of_range = |at: usize, bytes: &[u8]| match patched(at, bytes) {
        Fault::OutOfRange { field, at: place, value, .. } => {
            assert!(place >= at as u64 && place < (at + 8) as u64, "{field} at {place}");
            (field, value)
        }
        other => panic!("{at}: {other:?}"),
    };
    assert_eq!(patched(0, b"QFI\0"), Fault::Magic { found: *b"QFI\0" });
    assert_eq!(patched(4, &1_u32.to_be_bytes()), Fault::Version(1));
    assert_eq!(patched(4, &4_u32.to_be_bytes()), Fault::Version(4));
    for bits in [0_u32, 8, 22, 63, 64, u32::MAX] {
        assert_eq!(out_of_range(20, &bits.to_be_bytes()), ("cluster_bits", bits.into()));
    }
    assert_eq!(out_of_range(24, &u64::MAX.to_be_bytes()), ("size", u64::MAX));
    // 1 EiB needs more L1 entries than the header has.
    assert_eq!(
        patched(24, &(1_u64 << 60).to_be_bytes()),
        Fault::OutOfRange { field: "l1_size", at: 36, value: 1, least: 1 << 31, most: 4 << 20 }
    );
    assert_eq!(out_of_range(32, &3_u32.to_be_bytes()), ("crypt_method", 3));
    assert_eq!(out_of_range(36, &u32::MAX.to_be_bytes()), ("l1_size", u32::MAX.into()));
    assert_eq!(out_of_range(40, &(1_u64 << 63).to_be_bytes()), ("l1_table_offset", 1 << 63));
    let misaligned = Fault::Misaligned { field: "l1_table_offset", at: 40, value: 7, cluster: 65536 };
    assert_eq!(patched(40, &7_u64.to_be_bytes()), misaligned);
    assert_eq!(out_of_range(56, &0_u32.to_be_bytes()), ("refcount_table_clusters", 0));
    assert_eq!(out_of_range(56, &129_u32.to_be_bytes()), ("refcount_table_clusters", 129));
    assert_eq!(out_of_range(60, &65537_u32.to_be_bytes()), ("nb_snapshots", 65537));
    assert_eq!(out_of_range(96, &7_u32.to_be_bytes()), ("refcount_order", 7));
    assert_eq!(out_of_range(100, &96_u32.to_be_bytes()), ("header_length", 96));
    assert_eq!(out_of_range(100, &u32::MAX.to_be_bytes()), ("header_length", u32::MAX.into()));
    assert_eq!(out_of_range(104, &[1]), ("compression_type", 1));
    assert_eq!(out_of_range(8, &65537_u64.to_be_bytes()), ("backing_file_offset", 65537));
    assert_eq!(out_of_range(16, &1024_u32.to_be_bytes()), ("backing_file_size", 1024));
    let name = Header::parse(&whole).unwrap().backing_file.unwrap();
    let name_at = whole.windows(name.len()).position(|w| w == name.as_bytes()).unwrap();
    assert!(matches!(patched(name_at, b"\0"), Fault::NotAName { field: "the backing file name", .. }));
    assert!(matches!(patched(format + 8, b"\x1b"), Fault::NotAName { field: "the backing file format", .. }));
    assert_eq!(out_of_range(format + 4, &16_u32.to_be_bytes()).1, 16);
    assert_eq!(out_of_range(format + 4, &u32::MAX.to_be_bytes()).1, u64::from(u32::MAX));
    // The feature table, turned into a second backing format.
    let table = images.extension("a", 0x6803_f857);
    let mut second = 0xe279_2aca_u32.to_be_bytes().to_vec();
    second.extend_from_slice(&[0, 0, 0, 3]);
    second.extend_from_slice(b"raw");
    assert!(matches!(patched(table, &second), Fault::Twice { name: "backing file format", .. }));
}

#[test]
fn a_fault_tells_a_person_what_and_where() {
    let images = Images::new();
    let path = images.create("a", &[], "1M");
    images.patch("a", 20, &99_u32.to_be_bytes());
    let text = Header::open(&path).unwrap_err().to_string();
    let shown = path.display();
    assert_eq!(
        text,
        format!("{shown} is not a sound qcow2 image: cluster_bits at byte 20 is 99; 9 to 21 is possible")
    );
    fs::write(&path, "plain text\n").unwrap();
    let text = Header::open(&path).unwrap_err().to_string();
    assert!(text.ends_with("it begins with plai, a qcow2 image begins with QFI\\xfb"), "{text}");
    fs::write(&path, b"QFI\xfb\0\0").unwrap();
    let text = Header::open(&path).unwrap_err().to_string();
    assert!(text.ends_with("version takes bytes 4 to 8, and the image ends at 6"), "{text}");
}

#[test]
fn a_header_beyond_the_first_page_is_read_too() {
    let images = Images::new();
    images.create("base", &[], "1M");
    images.overlay("a", "base");
    // The name may lie anywhere in the first cluster.
    let name = b"far/away";
    images.patch("a", 60_000, name);
    images.patch("a", 8, &60_000_u64.to_be_bytes());
    images.patch("a", 16, &8_u32.to_be_bytes());
    let header = Header::open(&images.path("a")).unwrap();
    assert_eq!(header.backing_file.unwrap().as_bytes(), name);
    assert_eq!(images.info("a")["backing-filename"], "far/away", "QEMU agrees");
}

#[test]
fn links_pipes_and_directories_are_not_images() {
    let images = Images::new();
    let image = images.create("a", &[], "1M");
    std::os::unix::fs::symlink(&image, images.path("link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        images.path("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    for (name, reason) in
        [("link", "symbolic link"), ("pipe", "neither"), (".", "neither"), ("none", "No such")]
    {
        let text = Header::open(&images.path(name)).unwrap_err().to_string();
        assert!(text.starts_with("cannot open ") && text.contains(reason), "{name}: {text}");
    }
}

#[test]
fn a_new_overlay_is_pristine_until_something_is_written() {
    for options in ["compat=1.1", "compat=0.10", "cluster_size=512", "extended_l2=on,cluster_size=64k"] {
        for (command, stays) in [
            ("read 0 1M", true),
            ("flush", true),
            ("write -P 1 5M 512", false),
            ("write -z 5M 64k", false),
            ("discard 5M 1M", false),
            ("write -b -P 1 0 64k", false),
        ] {
            let images = Images::new();
            images.create("base", &[], "10M");
            images.qemu_io("base", "write 0 10M");
            let path = images.create("a", &["-o", options, "-b", "base", "-F", "qcow2"], "10M");
            assert!(pristine(&path), "{options}");
            images.qemu_io("a", command);
            let mapped = images.qemu_img(&["map", "-f", "qcow2", "--output=json", "a"]);
            let map: serde_json::Value = serde_json::from_str(&mapped).unwrap();
            let untouched = map.as_array().unwrap().iter().all(|extent| extent["depth"] == 1);
            let saved_memory = command.starts_with("write -b");
            // Version 2 has no zero clusters: QEMU leaves a discarded range to the backing file, or
            // writes zeros. Its own map decides.
            let expected = if options == "compat=0.10" && !saved_memory { untouched } else { stays };
            assert_eq!(pristine(&path), expected, "{options}: {command}: {mapped}");
            // Saved memory lies behind the end of the disk, where the map shows nothing.
            assert_eq!(untouched, expected || saved_memory, "{options}: {command}: {mapped}");
        }
    }
}

#[test]
fn an_internal_snapshot_or_a_mark_is_not_pristine() {
    let images = Images::new();
    let path = images.create("a", &[], "1M");
    images.qemu_img(&["snapshot", "-c", "inside", "a"]);
    assert!(!pristine(&path));

    let path = images.create("b", &[], "1M");
    images.patch("b", 79, &[2]);
    assert!(!pristine(&path), "marked corrupt");
    images.patch("b", 79, &[0x80]);
    assert!(!pristine(&path), "features not known here");
    images.patch("b", 79, &[1]);
    assert!(pristine(&path), "dirty says nothing about guest data");
}

#[test]
fn empty_l2_tables_are_pristine_and_the_last_bit_of_one_counts() {
    let images = Images::new();
    let path = images.create("a", &[], "1M");
    let l1 = usize::try_from(Header::open(&path).unwrap().l1_offset).unwrap();
    let mut image = fs::read(&path).unwrap();
    let l2 = image.len().next_multiple_of(65536);
    image.resize(l2 + 65536, 0);
    image[l1..l1 + 8].copy_from_slice(&(1 << 63 | l2 as u64).to_be_bytes());
    fs::write(&path, &image).unwrap();
    assert!(pristine(&path));
    image[l2 + 65535] = 1;
    fs::write(&path, &image).unwrap();
    assert!(!pristine(&path));
    image.truncate(l2 + 65535);
    fs::write(&path, &image).unwrap();
    let error = is_pristine(&image[..], &path).unwrap_err().to_string();
    assert!(error.contains("it is cut off: an L2 table"), "{error}");
    image.truncate(l1 + 4);
    let error = is_pristine(&image[..], &path).unwrap_err().to_string();
    assert!(error.contains("it is cut off: the L1 table"), "{error}");
}

#[test]
fn a_petabyte_of_nothing_is_answered_at_once() {
    let images = Images::new();
    // 1 PiB needs 2 MiB clusters: 2048 L1 entries.
    let path = images.create("a", &["-o", "cluster_size=2M"], "1P");
    assert!(pristine(&path));
}

/// Small numbers that look random and are the same in every run (xorshift64).
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }
}

/// Changes one to four fields: a whole field to a number at some limit, or a byte to anything.
fn mutate(image: &mut Vec<u8>, dice: &mut Dice) {
    const FIELDS: [usize; 22] =
        [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 68, 72, 76, 96, 100];
    const EDGES: [u32; 16] =
        [0, 1, 2, 3, 8, 9, 21, 22, 64, 104, 512, 1023, 1024, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];
    for _ in 0..=dice.below(4) {
        match dice.below(8) {
            0..4 => {
                let at = FIELDS[dice.below(FIELDS.len())];
                image[at..at + 4].copy_from_slice(&EDGES[dice.below(EDGES.len())].to_be_bytes());
            }
            4..7 => {
                let at = dice.below(768.min(image.len()));
                image[at] = dice.below(256).to_le_bytes()[0];
            }
            // Not cut below the fixed fields: those are cut in a test of their own.
            _ => image.truncate(112 + dice.below(image.len())),
        }
        image.resize(image.len().max(112), 0);
    }
}

/// Ten thousand headers with a few bytes changed, of images of every kind: none is a panic. One in fifty
/// is shown to QEMU too: what QEMU opens and this parser does not refuse, both read the same; and what this
/// parser alone refuses is refused for a reason of its own, which is that QEMU's reading is not the only one.
#[test]
fn ten_thousand_mutated_headers() {
    let images = Images::new();
    images.create("base", &[], "4M");
    let kinds: &[&[&str]] = &[
        &["-b", "base", "-F", "qcow2"],
        &["-o", "compat=0.10", "-b", "base", "-F", "qcow2"],
        &["-o", "extended_l2=on,cluster_size=16k,compression_type=zstd"],
        &["-o", "cluster_size=512,lazy_refcounts=on", "-b", "base", "-F", "raw"],
    ];
    let seeds: Vec<_> =
        kinds.iter().map(|options| fs::read(images.create("seed", options, "4M")).unwrap()).collect();
    let mut dice = Dice(0x5eed_0000_0000_0001);
    let (mut both, mut refused) = (0, 0);
    for round in 0..10_000 {
        let mut image = seeds[round % seeds.len()].clone();
        mutate(&mut image, &mut dice);
        entry::qcow2(&image);
        if round % 50 == 0 {
            fs::write(images.path("mutated"), &image).unwrap();
            match compare_with_qemu(&images, "mutated") {
                Compared::Same => both += 1,
                Compared::OnlyHereRefused(fault) => {
                    refused += 1;
                    // QEMU reads zeros behind the end, a name inside the fixed fields, and half a name.
                    let own_reason = match &fault {
                        Fault::NotAName { .. } | Fault::CutOff { .. } => true,
                        Fault::OutOfRange { field, .. } => *field == "backing_file_offset",
                        _ => false,
                    };
                    assert!(own_reason, "round {round}: {fault}");
                }
                Compared::RefusedByQemu => {}
            }
        }
    }
    // The test's own premise: some mutants are opened by both.
    assert!(both >= 20, "only {both} mutants were opened by both, {refused} by QEMU alone");
}

enum Compared {
    Same,
    OnlyHereRefused(Fault),
    RefusedByQemu,
}

fn compare_with_qemu(images: &Images, name: &str) -> Compared {
    let Some(info) = images.try_info(name) else { return Compared::RefusedByQemu };
    let header = match Header::open(&images.path(name)) {
        Ok(header) => header,
        Err(Qcow2Error::Header { fault, .. }) => return Compared::OnlyHereRefused(fault),
        Err(error) => panic!("{error}"),
    };
    // QEMU counts whole sectors.
    assert_eq!(info["virtual-size"], header.virtual_size.0 / 512 * 512);
    assert_eq!(info["cluster-size"], header.cluster_size());
    let backing = header.backing_file.map(|name| name.to_string_lossy().into_owned());
    assert_eq!(info["backing-filename"].as_str(), backing.as_deref());
    if backing.is_some() {
        assert_eq!(info["backing-filename-format"].as_str(), header.backing_format.as_deref());
    }
    Compared::Same
}

#[test]
fn an_image_that_ends_anywhere_is_no_panic() {
    let images = Images::new();
    images.create("base", &[], "1M");
    let image = fs::read(images.create("a", &["-b", "base", "-F", "qcow2"], "1M")).unwrap();
    for end in 0..1024 {
        entry::qcow2(&image[..end]);
        if end < 112 {
            assert!(matches!(Header::parse(&image[..end]), Err(Fault::CutOff { .. })), "{end}");
        }
    }
}

/// A header that a writer could make, as bytes, and what it says.
fn sound_header() -> impl Strategy<Value = (Vec<u8>, Header)> {
    let name = prop::collection::vec(1_u8.., 1..1024).prop_map(OsString::from_vec);
    let format = prop_oneof![Just("raw".to_owned()), Just("qcow2".to_owned()), "[a-z0-9_-]{1,15}"];
    let backing = prop::option::of((name, prop::option::of(format)));
    let numbers = (13_u32..=21, 0..1_u64 << 40, 0_u32..=6, any::<u64>(), any::<u64>(), 0_u32..=65536);
    (backing, numbers, prop::collection::vec(1_u32..0x1000, 0..8)).prop_map(|(backing, numbers, unknown)| {
        let (cluster_bits, size, refcount_order, compatible, autoclear, internal_snapshots) = numbers;
        let (backing_file, backing_format) =
            backing.map_or((None, None), |(name, format)| (Some(name), format));
        let l2_maps = (1_u64 << cluster_bits) / 8 * (1 << cluster_bits);
        let header = Header {
            bitmap_directory: None,
            snapshots_offset: 0,
            version: 3,
            cluster_bits,
            virtual_size: ByteSize(size),
            backing_file,
            backing_format,
            data_file: None,
            encryption: Encryption::None,
            compression: Compression::Zlib,
            l1_entries: u32::try_from(size.div_ceil(l2_maps)).unwrap(),
            l1_offset: 3 << cluster_bits,
            refcount_table_offset: 1 << cluster_bits,
            refcount_table_clusters: 1,
            refcount_order,
            internal_snapshots,
            incompatible: Incompatible(autoclear & 0b10_0011),
            compatible: Compatible(compatible),
            autoclear: Autoclear(autoclear),
            bitmaps: None,
            luks_header: None,
            unknown_extensions: unknown,
        };
        (to_bytes(&header), header)
    })
}

fn to_bytes(header: &Header) -> Vec<u8> {
    let mut rest = Vec::new();
    let mut extension = |kind: u32, data: &[u8]| {
        rest.extend_from_slice(&kind.to_be_bytes());
        rest.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
        rest.extend_from_slice(data);
        rest.resize(rest.len().next_multiple_of(8), 0);
    };
    for kind in &header.unknown_extensions {
        extension(*kind, b"whatever");
    }
    if let Some(format) = &header.backing_format {
        extension(0xe279_2aca, format.as_bytes());
    }
    extension(0, b"");
    let name = header.backing_file.as_ref().map_or(&b""[..], |name| name.as_bytes());
    let name_at = if name.is_empty() { 0 } else { 112 + rest.len() as u64 };
    let mut bytes = Vec::new();
    bytes.extend_from_slice(b"QFI\xfb");
    bytes.extend_from_slice(&header.version.to_be_bytes());
    bytes.extend_from_slice(&name_at.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(&header.cluster_bits.to_be_bytes());
    bytes.extend_from_slice(&header.virtual_size.0.to_be_bytes());
    bytes.extend_from_slice(&0_u32.to_be_bytes());
    bytes.extend_from_slice(&header.l1_entries.to_be_bytes());
    bytes.extend_from_slice(&header.l1_offset.to_be_bytes());
    bytes.extend_from_slice(&header.refcount_table_offset.to_be_bytes());
    bytes.extend_from_slice(&header.refcount_table_clusters.to_be_bytes());
    bytes.extend_from_slice(&header.internal_snapshots.to_be_bytes());
    bytes.extend_from_slice(&0_u64.to_be_bytes());
    for features in [header.incompatible.0, header.compatible.0, header.autoclear.0] {
        bytes.extend_from_slice(&features.to_be_bytes());
    }
    bytes.extend_from_slice(&header.refcount_order.to_be_bytes());
    bytes.extend_from_slice(&112_u32.to_be_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&rest);
    bytes.extend_from_slice(name);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_a_writer_wrote_is_what_is_read((bytes, header) in sound_header()) {
        entry::qcow2(&bytes);
        prop_assert_eq!(Header::parse(&bytes), Ok(header));
    }

    #[test]
    fn any_bytes_behind_the_magic_number_are_no_panic(rest in prop::collection::vec(any::<u8>(), 0..600)) {
        entry::qcow2(&[&b"QFI\xfb\0\0\0\x03"[..], &rest].concat());
        entry::qcow2(&rest);
    }

    #[test]
    fn feature_bits_are_named_or_numbered(bits: u64) {
        let text = Incompatible(bits).to_string();
        let words = if text == "none" { 0 } else { text.split(", ").count() };
        prop_assert_eq!(words, bits.count_ones() as usize);
        prop_assert_eq!(Incompatible(bits).unknown().len(), (bits >> 5).count_ones() as usize);
    }
}
