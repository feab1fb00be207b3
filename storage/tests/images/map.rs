//! The map of a chain against three other readers: QEMU, imago and qcow2-rs, on images of every variant.

use std::fs;
use std::path::{Path, PathBuf};

use imago::{FormatAccess, FormatDriverBuilder, Mapping, PermissiveImplicitOpenGate};
use model::ImageFormat;
use qcow2_rs::meta::MappingSource;
use serde_json::Value;
use storage::chain::{Chain, ChainPolicy};
use storage::map::{Stretch, of_chain};
use storage::qcow2::map::{Extent, Kind, Map};
use storage::qcow2::{Header, Qcow2Error, inside};

use crate::entry;
use crate::qcow2::Dice;
use crate::support::Images;

/// What every reader can tell of a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Zero,
    /// Data that stands at this byte of this layer.
    Data(usize, u64),
    /// Data that is compressed in this layer.
    Compressed(usize),
}

type Runs = Vec<(u64, u64, Class)>;

/// Neighbours that are one as one, so that readers with other habits can be compared.
fn runs(stretches: impl IntoIterator<Item = (u64, u64, Class)>) -> Runs {
    let mut runs: Runs = Vec::new();
    for (start, length, class) in stretches.into_iter().filter(|(_, length, _)| *length > 0) {
        match (runs.last_mut(), class) {
            (Some((_, before, last)), class) if *last == class && !matches!(class, Class::Data(..)) => {
                *before += length;
            }
            (Some((_, before, Class::Data(layer, offset))), Class::Data(now, further))
                if *layer == now && *offset + *before == further =>
            {
                *before += length;
            }
            _ => runs.push((start, length, class)),
        }
    }
    runs
}

fn chain(path: &Path, format: ImageFormat) -> Chain {
    Chain::open(path, format, &ChainPolicy::default()).unwrap()
}

fn ours(path: &Path) -> Runs {
    let mut all = Vec::new();
    of_chain::<Qcow2Error>(&chain(path, ImageFormat::Qcow2), &mut |stretch| {
        all.push(stretch);
        Ok(())
    })
    .unwrap();
    runs(all.into_iter().map(|Stretch { start, length, kind, depth }| {
        let class = match kind {
            Kind::Data { offset } => Class::Data(depth, offset),
            Kind::Compressed => Class::Compressed(depth),
            Kind::Zero => Class::Zero,
            Kind::Unallocated => panic!("nothing is unallocated in a chain"),
        };
        (start, length, class)
    }))
}

/// Source: qemu-img(1) "map", JSON.
fn qemu(images: &Images, name: &str) -> Runs {
    let text = images.qemu_img(&["map", "-f", "qcow2", "--output=json", name]);
    let map: Vec<Value> = serde_json::from_str(&text).unwrap();
    runs(map.iter().map(|entry| {
        let number = |key: &str| entry[key].as_u64();
        let depth = usize::try_from(number("depth").unwrap()).unwrap();
        let class = match (entry["zero"].as_bool().unwrap(), number("offset")) {
            (true, _) => Class::Zero,
            (false, Some(offset)) => Class::Data(depth, offset),
            // Data without a place: compressed.
            (false, None) => Class::Compressed(depth),
        };
        (number("start").unwrap(), number("length").unwrap(), class)
    }))
}

/// Zeroes and data as imago tells them; it does not say from which layer. None where it does not read the image.
fn imago(path: &Path, size: u64) -> Option<Vec<(u64, u64, bool)>> {
    let built = imago::qcow2::Qcow2::<imago::file::File>::builder_path(path);
    let image = FormatAccess::new(built.open(PermissiveImplicitOpenGate::default()).ok()?);
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let (mapping, length) = image.get_mapping(at, size - at).unwrap();
        assert!(length > 0, "imago ends at {at} of {size}");
        found.push((at, length, matches!(mapping, Mapping::Zero { .. })));
        at += length;
    }
    Some(found)
}

/// What qcow2-rs says of one cluster of the active image.
#[derive(Debug, PartialEq, Eq)]
enum Cluster {
    Data(u64),
    Zero,
    Compressed,
    Absent,
}

fn qcow2_rs(path: &Path, size: u64, cluster: u64) -> Vec<Cluster> {
    let path = path.to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async move {
        let params = qcow2_rs::dev::Qcow2DevParams::new(9, None, None, true, false);
        let device = qcow2_rs::utils::qcow2_setup_dev_tokio(&path, &params).await.unwrap();
        let mut found = Vec::new();
        for at in (0..size).step_by(usize::try_from(cluster).unwrap()) {
            let mapping = device.get_mapping(at).await.unwrap();
            found.push(match mapping.source {
                MappingSource::DataFile => Cluster::Data(mapping.cluster_offset.unwrap()),
                MappingSource::Zero => Cluster::Zero,
                MappingSource::Compressed => Cluster::Compressed,
                MappingSource::Backing | MappingSource::Unallocated => Cluster::Absent,
            });
        }
        found
    })
}

fn own_extents(path: &Path) -> Vec<Extent> {
    let header = Header::open(path).unwrap();
    let file = fs::File::open(path).unwrap();
    Map::new(&file, &header, path, 1 << 30).map(Result::unwrap).collect()
}

/// Which of the readers can be asked about a variant.
#[derive(Clone, Copy)]
struct Variant {
    options: &'static str,
    imago: bool,
    qcow2_rs: bool,
}

const fn all(options: &'static str) -> Variant {
    Variant { options, imago: true, qcow2_rs: true }
}

const fn imago_only(options: &'static str) -> Variant {
    Variant { options, imago: true, qcow2_rs: false }
}

const fn qemu_only(options: &'static str) -> Variant {
    Variant { options, imago: false, qcow2_rs: false }
}

/// Cluster sizes from the smallest to the largest, both versions, and each feature that changes the tables. imago refuses
/// zstd and extended entries, and qcow2-rs panics on clusters of 512 bytes and refuses data files (record 16).
const VARIANTS: [Variant; 13] = [
    imago_only("cluster_size=512"),
    all("cluster_size=4k"),
    all("cluster_size=64k"),
    all("cluster_size=64k,compat=0.10"),
    imago_only("cluster_size=512,compat=0.10"),
    all("cluster_size=2M"),
    all("cluster_size=64k,lazy_refcounts=on,refcount_bits=8"),
    all("preallocation=metadata"),
    qemu_only("compression_type=zstd"),
    qemu_only("extended_l2=on,cluster_size=16k"),
    qemu_only("extended_l2=on,cluster_size=64k"),
    imago_only("data_file=DATA"),
    imago_only("data_file=DATA,data_file_raw=on"),
];

/// Writes, zeroes and discards at places that the dice choose; every size of stretch.
fn scribble(images: &Images, name: &str, size: usize, dice: &mut Dice, zeroes: bool) {
    let mut commands = Vec::new();
    for round in 1..12 {
        let length = [512, 4096, 65536, 300_000, 1 << 20][dice.below(5)].min(size) / 512 * 512;
        let at = dice.below((size - length) / 512 + 1) * 512;
        match dice.below(5) {
            0 if zeroes => commands.push(format!("write -z {at} {length}")),
            1 if zeroes => commands.push(format!("write -zu {at} {length}")),
            2 => commands.push(format!("discard {at} {length}")),
            _ => commands.push(format!("write -P {round} {at} {length}")),
        }
    }
    for command in commands {
        images.qemu_io(name, &command);
    }
}

const SIZE: usize = (9 << 20) + 512;

/// QEMU tells holes in the image's own file too; without holes it tells what the tables say.
fn fill_holes(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, bytes).unwrap();
}

fn agrees_with_imago(path: &Path, mine: &Runs, size: u64, variant: Variant) {
    if !variant.imago {
        return;
    }
    let theirs = imago(path, size).unwrap_or_else(|| panic!("imago reads {}", variant.options));
    for (start, length, zero) in theirs {
        let overlapping = mine.iter().filter(|(at, count, _)| *at < start + length && start < at + count);
        for (at, _, class) in overlapping {
            assert_eq!(*class == Class::Zero, zero, "{} at {start} and {at}", variant.options);
        }
    }
}

fn compare(images: &Images, name: &str, variant: Variant) {
    let path = images.path(name);
    fill_holes(&path);
    let mine = ours(&path);
    assert_eq!(mine, qemu(images, name), "{} {name}", variant.options);
    let size = Header::open(&path).unwrap().virtual_size.0;
    assert_eq!(mine.iter().map(|(_, length, _)| length).sum::<u64>(), size);
    agrees_with_imago(&path, &mine, size, variant);
    if variant.qcow2_rs {
        let cluster = Header::open(&path).unwrap().cluster_size();
        let extents = own_extents(&path);
        for (index, theirs) in (0_u64..).zip(qcow2_rs(&path, size, cluster)) {
            let at = index * cluster;
            let extent = extents.iter().rfind(|extent| extent.start <= at).unwrap();
            let mine = match extent.kind {
                Kind::Data { offset } => Cluster::Data(offset + at - extent.start),
                Kind::Compressed => Cluster::Compressed,
                Kind::Zero => Cluster::Zero,
                Kind::Unallocated => Cluster::Absent,
            };
            assert_eq!(mine, theirs, "{} {name} at {at}", variant.options);
        }
    }
}

fn create(images: &Images, name: &str, variant: Variant, more: &[&str]) -> PathBuf {
    let options = variant.options.replace("DATA", &format!("{name}.data"));
    let size = SIZE.to_string();
    let words = [&["create", "-q", "-f", "qcow2", "-o", &options], more, &[name, &size]].concat();
    images.qemu_img(&words);
    images.path(name)
}

#[test]
fn four_readers_agree_on_every_variant() {
    let images = Images::new();
    let mut dice = Dice(0x5eed_0000_0000_0004);
    for (index, variant) in VARIANTS.into_iter().enumerate() {
        let name = format!("v{index}");
        let path = create(&images, &name, variant, &[]);
        // Version 2 has no zero clusters, and no writer makes them.
        let zeroes = Header::open(&path).unwrap().version > 2;
        scribble(&images, &name, SIZE, &mut dice, zeroes);
        if variant.options.contains("data_file") {
            // A data file is refused in a chain; the image alone can still be read.
            fill_holes(&path);
            fill_holes(&images.path(&format!("{name}.data")));
            let header = Header::open(&path).unwrap();
            let file = fs::File::open(&path).unwrap();
            let own = Map::new(&file, &header, &path, 1 << 30).map(|extent| {
                let Extent { start, length, kind } = extent.unwrap();
                let class = match kind {
                    Kind::Data { offset } => Class::Data(0, offset),
                    Kind::Compressed => Class::Compressed(0),
                    Kind::Zero | Kind::Unallocated => Class::Zero,
                };
                (start, length, class)
            });
            let own = runs(own);
            assert_eq!(own, qemu(&images, &name), "{}", variant.options);
            agrees_with_imago(&path, &own, header.virtual_size.0, variant);
            continue;
        }
        images.qemu_img(&["snapshot", "-c", "inside", &name]);
        let before = ours(&path);
        compare(&images, &name, variant);
        scribble(&images, &name, SIZE, &mut dice, zeroes);
        compare(&images, &name, variant);
        // What is inside reads as it did.
        let header = Header::open(&path).unwrap();
        let file = fs::File::open(&path).unwrap();
        let snapshots = inside::snapshots(&file, &header, &path).unwrap();
        assert_eq!(
            (snapshots.len(), snapshots[0].name.as_str(), snapshots[0].id.as_str()),
            (1, "inside", "1")
        );
        let kept = Map::of_snapshot(&file, &header, &path, 1 << 30, &snapshots[0]).map(|extent| {
            let Extent { start, length, kind } = extent.unwrap();
            (start, length, matches!(kind, Kind::Zero | Kind::Unallocated))
        });
        let zero_runs = |all: &mut dyn Iterator<Item = (u64, u64, bool)>| {
            let mut ends: Vec<(u64, bool)> = Vec::new();
            for (start, length, zero) in all {
                match ends.last_mut() {
                    Some((end, last)) if *last == zero => *end = start + length,
                    _ => ends.push((start + length, zero)),
                }
            }
            ends
        };
        let then = zero_runs(
            &mut before.into_iter().map(|(start, length, class)| (start, length, class == Class::Zero)),
        );
        assert_eq!(zero_runs(&mut kept.into_iter()), then, "{}", variant.options);
    }
}

#[test]
fn four_readers_agree_on_chains_and_compression() {
    let images = Images::new();
    let mut dice = Dice(0x5eed_0000_0000_0005);
    for (index, variant) in VARIANTS.into_iter().enumerate() {
        if variant.options.contains("data_file") || variant.options.contains("preallocation") {
            continue;
        }
        let (base, middle, top) = (format!("b{index}"), format!("m{index}"), format!("t{index}"));
        // A raw base that is shorter, then two overlays.
        fs::write(images.path(&base), vec![7; 5 << 20]).unwrap();
        create(&images, &middle, variant, &["-b", &base, "-F", "raw"]);
        let zeroes = Header::open(&images.path(&middle)).unwrap().version > 2;
        scribble(&images, &middle, SIZE, &mut dice, zeroes);
        create(&images, &top, variant, &["-b", &middle, "-F", "qcow2"]);
        scribble(&images, &top, SIZE, &mut dice, zeroes);
        // qcow2-rs takes every backing file for qcow2.
        fill_holes(&images.path(&middle));
        compare(&images, &top, Variant { qcow2_rs: false, ..variant });
        // imago does not tell holes of a raw file.
        fs::File::options().write(true).open(images.path(&base)).unwrap().set_len(7 << 20).unwrap();
        compare(&images, &top, Variant { qcow2_rs: false, imago: false, ..variant });

        let packed = format!("c{index}");
        let options = variant.options;
        images.qemu_img(&["convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", options, &top, &packed]);
        images.qemu_io(&packed, "write -P 99 1M 200k");
        assert!(ours(&images.path(&packed)).iter().any(|(.., class)| *class == Class::Compressed(0)));
        compare(&images, &packed, variant);
    }
}

#[test]
fn dirty_bitmaps_are_read_as_qemu_exports_them() {
    let images = Images::new();
    for (granularity, cluster) in [("512", "4k"), ("64k", "64k"), ("1M", "512")] {
        let name = format!("g{granularity}");
        let path = images.create(&name, &["-o", &format!("cluster_size={cluster}")], "20M");
        images.qemu_img(&["bitmap", "--add", "-g", granularity, &name, "b0"]);
        for command in ["write 0 512", "write 3M 70k", "write 19M 1M"] {
            images.qemu_io(&name, command);
        }
        let header = Header::open(&path).unwrap();
        let file = fs::File::open(&path).unwrap();
        let bitmaps = inside::bitmaps(&file, &header, &path).unwrap();
        assert_eq!(bitmaps.len(), 1);
        let bitmap = &bitmaps[0];
        assert_eq!((bitmap.name.as_str(), bitmap.in_use, bitmap.auto), ("b0", false, true));
        let grain = 1_u64 << bitmap.granularity_bits;
        let spans = inside::dirty(&file, &header, &path, bitmap, 1 << 20).unwrap();
        let marked: Vec<(u64, u64)> =
            spans.iter().map(|span| (span.offset, span.offset + span.length)).collect();
        let up = |at: u64| at.next_multiple_of(grain).min(20 << 20);
        let expected =
            [(0, up(512)), ((3 << 20) / grain * grain, up((3 << 20) + (70 << 10))), (19 << 20, 20 << 20)];
        assert_eq!(marked, expected, "{granularity}");
    }
}

/// Ten thousand images with something changed in any of their tables: no panic, and nothing that takes long or much.
#[test]
fn ten_thousand_mutated_images() {
    const ROUNDS: usize = 10_000;
    let images = Images::new();
    let mut dice = Dice(0x5eed_0000_0000_0006);
    eprintln!("seed {:#x}", dice.0);
    let kinds = [
        "cluster_size=512",
        "cluster_size=4k,compat=0.10",
        "cluster_size=4k,lazy_refcounts=on",
        "extended_l2=on,cluster_size=16k",
        "cluster_size=4k,compression_type=zstd",
    ];
    let mut seeds = Vec::new();
    for (index, options) in kinds.into_iter().enumerate() {
        let name = format!("s{index}");
        images.create(&name, &["-o", options], "3M");
        for command in ["write -P 1 0 20k", "write -P 2 1M 4k", "write -c -P 3 2M 16k"] {
            images.qemu_io(&name, command);
        }
        if !options.contains("compat") {
            images.qemu_img(&["bitmap", "--add", &name, "b0"]);
            images.qemu_io(&name, "write -P 4 0 40k");
        }
        images.qemu_img(&["snapshot", "-c", "inside", &name]);
        images.qemu_io(&name, "write -P 5 0 8k");
        seeds.push(fs::read(images.path(&name)).unwrap());
    }
    let before = peak_memory();
    for round in 0..ROUNDS {
        let mut image = seeds[round % seeds.len()].clone();
        for _ in 0..=dice.below(4) {
            // Eight bytes that are an entry of some table as a rule: to a limit, to another place, or to anything.
            let at = dice.below(image.len() / 8) * 8;
            let value: u64 = match dice.below(6) {
                0 => u64::MAX,
                1 => 1 << 62 | dice.below(1 << 20) as u64,
                2 => 1 << 63 | (dice.below(image.len()) as u64 & !511),
                3 => dice.below(256) as u64,
                4 => 0,
                _ => dice.0,
            };
            image[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        if dice.below(20) == 0 {
            image.truncate(dice.below(image.len()));
        }
        entry::qcow2(&image);
    }
    let grown = peak_memory().saturating_sub(before);
    assert!(grown < 256 << 10, "{grown} KiB");
}

/// The most memory that this process has had, in KiB.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
