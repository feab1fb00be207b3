//! Pools: one contract for every kind, on real disks in the host VM; and what users meet.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use host::tied::Tie;
use host::watch::Watch;
use model::{ByteSize, Name};
use storage::PoolError;
use storage::pool::{
    Changed, KINDS, Kind, Pool, PoolDefinition, Request, Usage, Volume, VolumeFormat, Wanted, find, sweep,
};
use storage::volume::{CloneMethod, Effort, Here, NewVolume, WipeMethod, carry_out};
use tests::lab::{self, Cli, HostVm, Run, is_inside, run_test};
use toml::Table;

use crate::support::KILLED;

const MIB: u64 = 1 << 20;
const REFUSED: i32 = 7;

/// The disks of the host VM, and what is on them.
const LVM_DISK: &str = "/dev/vda";
const PARTITIONED: &str = "/dev/vdb";
const FORMATTED: &str = "/dev/vdc";
const BTRFS: &str = "/dev/vdd";

fn host_vm() -> HostVm {
    HostVm::default().disk(512).disk(256).disk(256).disk(256).modules(&["dm-thin-pool", "btrfs"])
}

/// Runs a program of the system's, and expects it to succeed.
fn sh(line: &str) -> Result<String> {
    let output = Command::new("sh").args(["-ec", line]).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{line}: {said}{}", String::from_utf8_lossy(&output.stderr));
    Ok(said)
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// Makes the places that the kinds want.
fn prepare_places() -> Result<()> {
    sh(&format!("pvcreate -q {LVM_DISK}; vgcreate -q vg0 {LVM_DISK}"))?;
    sh("lvcreate -q -L 128M -T vg0/pool0 --poolmetadatasize 4M -c 64k; lvcreate -q -y -L 8M -n root vg0")?;
    sh(&format!(
        "mkfs.ext4 -q {FORMATTED}; mkfs.btrfs -q {BTRFS}; mkdir /mnt/btrfs; mount {BTRFS} /mnt/btrfs"
    ))?;
    Ok(())
}

/// What a user would say to define a pool of this kind there.
fn options(kind: &str, dir: &Path) -> Result<Table> {
    let text = match kind {
        "dir" => format!("path = {:?}", dir.join("dir")),
        "fs" => format!("source = {FORMATTED:?}"),
        "btrfs" => "path = \"/mnt/btrfs/pool\"".to_owned(),
        "disk" => format!("device = {PARTITIONED:?}"),
        "lvm" => "vg = \"vg0\"".to_owned(),
        "lvm-thin" => "vg = \"vg0\"\nthin-pool = \"pool0\"".to_owned(),
        // A new kind is not tested by forgetting it.
        other => bail!("no place for a pool of kind {other} is made here"),
    };
    Ok(toml::from_str(&text)?)
}

/// Everything that a pool promises, whatever its kind.
struct Contract {
    name: Name,
    pool: Box<dyn Pool>,
    effort: Effort,
}

impl Contract {
    fn new(kind: &Kind, dir: &Path) -> Result<Self> {
        let pool = name(&format!("p-{}", kind.name));
        let mounts = dir.join("mounts");
        let request =
            Request { pool: &pool, options: options(kind.name, dir)?, mounts: &mounts, initialize: true };
        let definition = PoolDefinition::new(kind, &request, false)?;
        let again = PoolDefinition::new(kind, &Request { initialize: false, ..request }, false)?;
        ensure!(definition == again, "the place is not known again: {definition:?} {again:?}");
        let program = lab::snapctl()?.display().to_string();
        let tie = Tie { program, argument: "--tied".into() };
        let effort = Effort { tie, watch: Watch::default(), bandwidth: None };
        Ok(Self { pool: definition.open(&pool)?, name: pool, effort })
    }

    fn here(&self) -> Here<'_> {
        Here { name: &self.name, pool: self.pool.as_ref() }
    }

    fn create(&self, volume: &str, mib: u64) -> Result<Volume> {
        let wanted = NewVolume {
            size: Some(ByteSize(mib * MIB)),
            format: Some(VolumeFormat::Raw),
            ..NewVolume::default()
        };
        let plan = self.here().create(&name(volume), &wanted)?;
        carry_out(self.here(), &plan, &self.effort)?.context("a volume")
    }

    fn volumes(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> =
            self.pool.volumes()?.into_iter().filter(|v| !v.foreign).map(|v| v.name.to_string()).collect();
        names.sort();
        Ok(names)
    }

    fn usage(&self) -> Result<Usage> {
        Ok(self.pool.usage()?)
    }

    /// Starting and stopping; afterwards it is ready.
    fn starts_and_stops(&self) -> Result<()> {
        self.pool.start()?;
        self.pool.ready()?;
        ensure!(self.pool.start()? == Changed::AlreadySo, "starting twice is one start");
        self.create("kept", 4)?;
        let stopped = self.pool.stop()?;
        if stopped == Changed::Changed {
            let fault = self.pool.volumes().err().context("a stopped pool lists volumes")?;
            ensure!(matches!(fault, PoolError::NotStarted { .. }), "{fault}");
            ensure!(self.pool.stop()? == Changed::AlreadySo, "stopping twice is one stop");
            ensure!(self.pool.start()? == Changed::Changed);
        }
        ensure!(self.volumes()? == ["kept"]);
        Ok(())
    }

    /// Volumes: made, cloned, resized, wiped, removed.
    fn holds_volumes(&self) -> Result<()> {
        let volume = self.create("v1", 8)?;
        ensure!(volume.virtual_size == ByteSize(8 * MIB), "{volume:?}");
        let fault = self.create("v1", 8).err().context("a name twice")?;
        ensure!(matches!(fault.downcast_ref(), Some(PoolError::VolumeExists { .. })), "{fault:#}");
        let content = pattern(8 * MIB);
        write(volume.place.path(), &content)?;

        let plan = self.here().clone_of(&name("v1"), &name("c1"), None)?;
        let clone = carry_out(self.here(), &plan, &self.effort)?.context("a clone")?;
        ensure!(read(&clone)? == content, "the clone reads as the original");
        write(clone.place.path(), &[1; 4096])?;
        ensure!(read(&volume)? == content, "writing to the clone changes the original");

        let grown = carry_out(
            self.here(),
            &self.here().resize(&name("c1"), ByteSize(12 * MIB), false)?,
            &self.effort,
        )?;
        ensure!(grown.context("grown")?.virtual_size == ByteSize(12 * MIB));
        let fault = self.here().resize(&name("c1"), ByteSize(4 * MIB), false).err().context("it shrinks")?;
        ensure!(matches!(fault, PoolError::WouldShrink { .. }), "{fault}");
        carry_out(self.here(), &self.here().resize(&name("c1"), ByteSize(4 * MIB), true)?, &self.effort)?;

        for method in [WipeMethod::Zero, WipeMethod::Discard] {
            let wiped = carry_out(self.here(), &self.here().wipe(&name("c1"), method)?, &self.effort)?;
            ensure!(
                read(&wiped.context("wiped")?)?.iter().all(|byte| *byte == 0),
                "{method:?} leaves something"
            );
        }
        self.refuses_what_is_in_use(&volume)?;
        ensure!(self.volumes()? == ["c1", "kept", "v1"]);
        for volume in ["c1", "v1"] {
            carry_out(self.here(), &self.here().delete(&name(volume))?, &self.effort)?;
        }
        ensure!(self.volumes()? == ["kept"]);
        Ok(())
    }

    fn refuses_what_is_in_use(&self, volume: &Volume) -> Result<()> {
        let _open = File::open(volume.place.path())?;
        let here = self.here();
        let faults = [
            here.delete(&volume.name).err(),
            here.wipe(&volume.name, WipeMethod::Zero).err(),
            here.resize(&volume.name, ByteSize(64 * MIB), false).err(),
            here.clone_of(&volume.name, &name("x"), Some(CloneMethod::Copy)).err(),
        ];
        for fault in faults {
            let fault = fault.context("a volume in use was not refused")?;
            ensure!(
                matches!(&fault, PoolError::InUse { by, .. } if by.contains(&std::process::id().to_string())),
                "{fault}"
            );
        }
        Ok(())
    }

    /// A killed process leaves a draft, which is no volume and goes away.
    fn sweeps_drafts(&self) -> Result<()> {
        let before = self.usage()?.available;
        let wanted = Wanted { name: name("left"), format: VolumeFormat::Raw, size: ByteSize(4 * MIB) };
        let draft = self.pool.allocate(&wanted)?;
        ensure!(draft.place.path().exists(), "{draft:?}");
        ensure!(self.volumes()? == ["kept"], "a draft is no volume");
        ensure!(sweep(self.pool.as_ref())? == [name("left")]);
        ensure!(
            !draft.place.path().exists() && self.pool.drafts()?.is_empty(),
            "something is left of {draft:?}"
        );
        if self.pool.root().is_none() {
            ensure!(self.usage()?.available == before, "room is lost");
        }
        self.create("left", 4)?;
        carry_out(self.here(), &self.here().delete(&name("left"))?, &self.effort)?;
        Ok(())
    }

    /// What does not fit is refused, and nothing is left of it.
    fn refuses_what_does_not_fit(&self) -> Result<()> {
        if self.pool.capabilities()?.thin {
            return Ok(());
        }
        let fault = self.create("huge", 1 << 20).err().context("a terabyte fits")?;
        ensure!(matches!(fault.downcast_ref(), Some(PoolError::Full { .. })), "{fault:#}");
        ensure!(self.pool.drafts()?.is_empty());
        Ok(())
    }
}

/// Bytes that repeat nowhere.
fn pattern(length: u64) -> Vec<u8> {
    (0..length / 8).flat_map(|index| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1).to_le_bytes()).collect()
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = File::options().write(true).open(path)?;
    file.write_all_at(bytes, 0)?;
    Ok(file.sync_all()?)
}

fn read(volume: &Volume) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(volume.virtual_size.0)?];
    File::open(volume.place.path())?.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[tokio::test]
async fn i1_every_kind_of_pool_keeps_the_contract() -> Result<()> {
    if !is_inside() {
        return run_test(&host_vm(), "pools::i1_every_kind_of_pool_keeps_the_contract").await;
    }
    prepare_places()?;
    let dir = tempfile::tempdir()?;
    for kind in KINDS {
        let contract = Contract::new(kind, dir.path())?;
        let kept = || -> Result<()> {
            contract.starts_and_stops()?;
            contract.holds_volumes()?;
            contract.sweeps_drafts()?;
            contract.refuses_what_does_not_fit()
        };
        kept().with_context(|| format!("kind {}", kind.name))?;
        // Two kinds are in one volume group, where a name is one volume's.
        let last = contract.here().delete(&name("kept"))?;
        carry_out(contract.here(), &last, &contract.effort)?;
        eprintln!("{}: kept", kind.name);
    }
    // Nobody else's volume was touched, and cannot be.
    ensure!(sh("lvs --noheadings -o lv_name vg0")?.contains("root"));
    let contract = Contract::new(Kind::named("lvm")?, dir.path())?;
    let plan = contract.here().delete(&name("root"))?;
    let fault = carry_out(contract.here(), &plan, &contract.effort).err().context("root was removed")?;
    ensure!(matches!(fault, PoolError::Foreign { .. }), "{fault}");
    Ok(())
}

#[tokio::test]
async fn i2_a_thin_pool_refuses_before_it_is_full() -> Result<()> {
    if !is_inside() {
        return run_test(&host_vm(), "pools::i2_a_thin_pool_refuses_before_it_is_full").await;
    }
    sh(&format!("pvcreate -q {LVM_DISK}; vgcreate -q vg0 {LVM_DISK}"))?;
    sh("lvcreate -q -L 64M -T vg0/pool0 --poolmetadatasize 2M -c 64k")?;
    let dir = tempfile::tempdir()?;
    let contract = Contract::new(Kind::named("lvm-thin")?, dir.path())?;
    let volume = contract.create("v1", 1024)?;
    ensure!(contract.usage()?.thin.context("thin")?.data_percent < 5.0);
    write(volume.place.path(), &pattern(60 * MIB))?;
    // A fresh look: what was seen before is remembered by the pool.
    let contract = Contract::new(Kind::named("lvm-thin")?, dir.path())?;
    let usage = contract.usage()?.thin.context("thin")?;
    ensure!(usage.data_percent > 90.0, "{usage:?}");
    let faults = [
        contract.create("v2", 8).err(),
        contract
            .here()
            .clone_of(&name("v1"), &name("c1"), None)
            .map_err(Into::into)
            .and_then(|plan| carry_out(contract.here(), &plan, &contract.effort).map_err(anyhow::Error::from))
            .err(),
        contract
            .here()
            .resize(&name("v1"), ByteSize(2048 * MIB), false)
            .map_err(Into::into)
            .and_then(|plan| carry_out(contract.here(), &plan, &contract.effort).map_err(anyhow::Error::from))
            .err(),
    ];
    for fault in faults {
        let fault = fault.context("a full pool took more")?;
        ensure!(
            matches!(fault.downcast_ref(), Some(PoolError::OverThreshold { what: "data", .. })),
            "{fault:#}"
        );
    }
    ensure!(contract.volumes()? == ["v1"] && contract.pool.drafts()?.is_empty());
    // Deleting makes room again, so that is never refused.
    carry_out(contract.here(), &contract.here().delete(&name("v1"))?, &contract.effort)?;
    contract.create("v2", 8)?;
    Ok(())
}

/// Runs `snapctl` with words separated by blanks.
async fn run(cli: &Cli, line: &str) -> Result<Run> {
    cli.run(line.split_whitespace()).await
}

fn says(run: &Run, words: &[&str]) -> Result<()> {
    let text = format!("{}{}", run.stdout, run.stderr);
    for word in words {
        ensure!(text.contains(word), "{word:?} is not said: {run:#?}");
    }
    Ok(())
}

#[tokio::test]
async fn i3_an_empty_mount_point_is_never_written_to() -> Result<()> {
    if !is_inside() {
        let vm = HostVm::default().disk(64).disk(64);
        return run_test(&vm, "pools::i3_an_empty_mount_point_is_never_written_to").await;
    }
    let (ours, other) = ("/dev/vda", "/dev/vdb");
    sh(&format!("mkfs.ext4 -q {ours}; mkfs.ext4 -q {other}; mkdir -p /mnt/a; mount {ours} /mnt/a"))?;
    let cli = Cli::new()?;
    run(&cli, "pool define d1 dir --path /mnt/a/pool").await?.ok()?;
    run(&cli, "volume create d1 v1 1M --format raw").await?.ok()?;
    // Unmounted, and then another file system in its place: neither is taken for the pool.
    for disturb in
        ["umount /mnt/a; mkdir -p /mnt/a/pool", &format!("mount {other} /mnt/a; mkdir -p /mnt/a/pool")]
    {
        sh(disturb)?;
        for line in ["volume create d1 v2 1M", "pool start d1", "volume list d1", "pool refresh d1"] {
            let refused = run(&cli, line).await?;
            says(refused.expect_code(REFUSED)?, &["/mnt/a/pool", "no mark of this pool's"])?;
        }
        ensure!(fs::read_dir("/mnt/a/pool")?.count() == 0, "something was written there");
    }
    sh(&format!("umount /mnt/a; mount {ours} /mnt/a"))?;
    says(run(&cli, "volume list d1").await?.ok()?, &["v1"])?;

    // The same for a pool that mounts by itself: it finds its file system by UUID, and takes no other.
    sh("umount /mnt/a")?;
    run(&cli, &format!("pool define f1 fs --source {ours} --path /mnt/f")).await?.ok()?;
    run(&cli, "pool start f1").await?.ok()?;
    let busy = File::create("/mnt/f/busy")?;
    says(
        run(&cli, "pool stop f1").await?.expect_code(REFUSED)?,
        &["in use", &std::process::id().to_string()],
    )?;
    drop(busy);
    run(&cli, "pool stop f1").await?.ok()?;
    sh(&format!("mkfs.ext4 -q -F {ours}"))?;
    says(
        run(&cli, "pool start f1").await?.expect_code(REFUSED)?,
        &["was defined on ext4", "no device holds"],
    )?;
    let list = run(&cli, "pool list").await?;
    says(list.ok()?, &["f1", "not ready"])?;
    Ok(())
}

#[tokio::test]
async fn i4_killed_at_each_step_a_volume_is_there_or_is_not() -> Result<()> {
    let cli = Cli::new()?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("pool");
    run(&cli, &format!("pool define p1 dir --path {}", path.display())).await?.ok()?;
    run(&cli, "volume create p1 base 8M --format raw").await?.ok()?;
    write(&path.join("base.raw"), &pattern(8 * MIB))?;
    let lines = ["create p1 v1 8M", "clone p1 base v1", "convert p1 base v1 --format qcow2"];
    for line in lines {
        for (point, there) in
            [("volume.allocated", false), ("volume.filled", false), ("volume.published", true)]
        {
            let fault = format!("{point}=kill");
            let words = ["volume"].into_iter().chain(line.split_whitespace());
            let killed = cli.run_with(words, &[("SNAPCTL_FAULT", fault.as_str())]).await?;
            killed.expect_code(KILLED)?;
            let next = run(&cli, "pool refresh p1").await?;
            ensure!(next.ok()?.stderr.contains("recovered: volume v1") != there, "{line} {point}: {next:#?}");
            let mut files: Vec<String> = names_in(&path)?;
            files.retain(|file| file != ".snapctl-pool" && file != "base.raw");
            ensure!(files.len() == usize::from(there), "{line} killed at {point} leaves {files:?}");
            if there {
                run(&cli, "volume delete p1 v1").await?.ok()?;
            }
        }
        // A failure that is no crash leaves nothing by itself.
        let words = ["volume"].into_iter().chain(line.split_whitespace());
        let failed = cli.run_with(words, &[("SNAPCTL_FAULT", "volume.filled=fail")]).await?;
        failed.expect_code(1)?;
        ensure!(names_in(&path)?.len() == 2, "{:?}", names_in(&path)?);
    }
    Ok(())
}

fn names_in(dir: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> =
        fs::read_dir(dir)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// A `snapctl` with a directory pool `p1`, and that directory.
async fn with_pool() -> Result<(Cli, tempfile::TempDir, PathBuf)> {
    let cli = Cli::new()?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("pool");
    run(&cli, &format!("pool define p1 dir --path {}", path.display())).await?.ok()?;
    Ok((cli, dir, path))
}

#[tokio::test]
async fn i5_images_travel_through_every_format_and_read_the_same() -> Result<()> {
    let (cli, dir, path) = with_pool().await?;
    run(&cli, "volume create p1 v1 16M --format raw").await?.ok()?;
    write(&path.join("v1.raw"), &pattern(3 * MIB))?;
    let identical = |one: &Path, format: &str, other: &Path, other_format: &str| {
        let (one, other) = (one.display(), other.display());
        sh(&format!("qemu-img compare -f {format} -F {other_format} {one} {other}"))
    };
    for format in ["qcow2", "vmdk", "vhdx", "vdi", "raw"] {
        let file = dir.path().join(format!("x.{format}"));
        run(&cli, &format!("volume export p1 v1 {}", file.display())).await?.ok()?;
        identical(&path.join("v1.raw"), "raw", &file, format)?;
        let imported = format!("i-{format}");
        run(&cli, &format!("volume import p1 {imported} {}", file.display())).await?.ok()?;
        identical(&path.join("v1.raw"), "raw", &path.join(format!("{imported}.qcow2")), "qcow2")?;
        let refused = run(&cli, &format!("volume export p1 v1 {}", file.display())).await?;
        says(refused.expect_code(REFUSED)?, &["exists already"])?;
    }
    // Sparse stays sparse.
    use std::os::unix::fs::MetadataExt;
    let blocks = fs::metadata(dir.path().join("x.raw"))?.blocks() * 512;
    ensure!(blocks <= 4 * MIB, "{blocks}");
    // An OVA is read where it lies.
    let vmdk = dir.path().join("disk.vmdk");
    sh(&format!(
        "qemu-img convert -f raw -O vmdk -o subformat=streamOptimized {} {}",
        path.join("v1.raw").display(),
        vmdk.display()
    ))?;
    sh(&format!(
        "cd {} && echo x >a.ovf && cp disk.vmdk disk2.vmdk && tar cf a.ova a.ovf disk.vmdk disk2.vmdk",
        dir.path().display()
    ))?;
    run(&cli, &format!("volume import p1 ova {}", dir.path().join("a.ova").display())).await?.ok()?;
    for volume in ["ova-1", "ova-2"] {
        identical(&path.join("v1.raw"), "raw", &path.join(format!("{volume}.qcow2")), "qcow2")?;
    }
    Ok(())
}

/// Lets a header name a backing file without its format, as no qemu-img of today does.
fn forget_backing_format(image: &Path) -> Result<()> {
    let bytes = fs::read(image)?;
    let kind = 0xe279_2aca_u32.to_be_bytes();
    let at = bytes.windows(4).position(|window| window == kind).context("no backing format")?;
    Ok(File::options().write(true).open(image)?.write_all_at(b"none", at as u64)?)
}

#[tokio::test]
async fn i6_images_that_lead_elsewhere_are_refused() -> Result<()> {
    let (cli, dir, path) = with_pool().await?;
    let outside = dir.path().join("secret.raw");
    fs::write(&outside, vec![7; MIB as usize])?;
    let inside = |name: &str| path.join(name).display().to_string();
    let out = outside.display().to_string();
    let make = [
        (
            "outside",
            format!("qemu-img create -q -f qcow2 -b {out} -F raw {} 1M", inside("outside.qcow2")),
            "nor allowed by name",
        ),
        (
            "unnamed",
            format!("qemu-img create -q -f qcow2 -u -F raw -b x.raw {} 1M", inside("unnamed.qcow2")),
            "not its format",
        ),
        (
            "json",
            format!(
                "qemu-img create -q -f qcow2 -u -F raw -b 'json:{{\"driver\":\"file\",\"filename\":\"{out}\"}}' {} 1M",
                inside("json.qcow2")
            ),
            "takes for a protocol",
        ),
        (
            "nbd",
            format!("qemu-img create -q -f qcow2 -u -F raw -b nbd:localhost:1 {} 1M", inside("nbd.qcow2")),
            "takes for a protocol",
        ),
        (
            "loop",
            format!("qemu-img create -q -f qcow2 -u -F qcow2 -b loop.qcow2 {} 1M", inside("loop.qcow2")),
            "in the same chain",
        ),
        (
            "data",
            format!(
                "qemu-img create -q -f qcow2 -o data_file={} {} 1M",
                dir.path().join("d.raw").display(),
                inside("data.qcow2")
            ),
            "external data file",
        ),
        (
            "extent",
            format!(
                "printf '# Disk DescriptorFile\\nversion=1\\nRW 2048 FLAT \"{out}\" 0\\n' >{}",
                inside("extent.vmdk")
            ),
            "an extent",
        ),
    ];
    for (volume, line, words) in &make {
        sh(line)?;
        if *volume == "unnamed" {
            forget_backing_format(&path.join("unnamed.qcow2"))?;
        }
        for verb in [
            format!("convert p1 {volume} new --format raw"),
            format!("clone p1 {volume} new"),
            format!("export p1 {volume} {}/new.raw", dir.path().display()),
        ] {
            let refused = run(&cli, &format!("volume {verb}")).await?;
            refused.expect_code(REFUSED)?;
            says(&refused, &[words])?;
        }
        ensure!(!path.join("new.raw").exists() && !dir.path().join("new.raw").exists());
    }
    // The same files from elsewhere.
    for (file, words) in [
        ("outside.qcow2", "nor allowed by name"),
        ("extent.vmdk", "an extent"),
        ("json.qcow2", "takes for a protocol"),
    ] {
        let refused = run(&cli, &format!("volume import p1 new {}", inside(file))).await?;
        says(refused.expect_code(REFUSED)?, &[words])?;
    }
    // AES: the header says so, and nobody reads ciphertext as data.
    let image = path.join("aes.qcow2");
    sh(&format!("qemu-img create -q -f qcow2 {} 1M", image.display()))?;
    let file = File::options().write(true).open(&image)?;
    file.write_all_at(&1u32.to_be_bytes(), 32)?;
    says(run(&cli, "volume clone p1 aes new").await?.expect_code(REFUSED)?, &["AES"])?;
    // A header whose sizes overflow.
    file.write_all_at(&u64::MAX.to_be_bytes(), 24)?;
    let broken = run(&cli, "volume clone p1 aes new").await?;
    says(broken.expect_code(REFUSED)?, &["cannot be used", "size"])?;
    says(run(&cli, "volume list").await?.ok()?, &["aes (broken)"])?;
    Ok(())
}

#[tokio::test]
async fn i7_a_linked_clone_freezes_what_it_stands_on_and_lets_go_of_it() -> Result<()> {
    let (cli, _dir, path) = with_pool().await?;
    run(&cli, "volume create p1 base 8M").await?.ok()?;
    run(&cli, "volume clone p1 base c1 --method backing").await?.ok()?;
    // It is frozen now, so that the next clone may stand on it without being asked.
    says(run(&cli, "volume show p1 base").await?.ok()?, &["sealed"])?;
    for line in ["delete p1 base", "resize p1 base 16M", "wipe p1 base"] {
        says(
            run(&cli, &format!("volume {line}")).await?.expect_code(REFUSED)?,
            &["backing file of", "c1.qcow2"],
        )?;
    }
    let info = sh(&format!("qemu-img info --output=json {}", path.join("c1.qcow2").display()))?;
    ensure!(
        info.contains("\"backing-filename\": \"base.qcow2\""),
        "a name that moves with the directory: {info}"
    );
    run(&cli, "volume delete p1 c1").await?.ok()?;
    let shown = run(&cli, "volume show p1 base").await?;
    ensure!(!shown.ok()?.stdout.contains("sealed"), "{shown:#?}");
    run(&cli, "volume delete p1 base").await?.ok()?;
    ensure!(names_in(&path)? == [".snapctl-pool"]);
    Ok(())
}

#[tokio::test]
async fn i8_find_tells_the_names_that_there_are() -> Result<()> {
    let (cli, _dir, _path) = with_pool().await?;
    run(&cli, "volume create p1 v1 1M").await?.ok()?;
    says(run(&cli, "volume show p1 v2").await?.expect_code(6)?, &["no volume named v2", "there are: v1"])?;
    says(run(&cli, "volume list p2").await?.expect_code(6)?, &["no pool named p2", "defined are: p1"])?;
    says(run(&cli, "pool define p2 zfs").await?.expect_code(2)?, &["the kinds are: dir, fs, btrfs"])?;
    says(run(&cli, "volume create p1 v2").await?.expect_code(2)?, &["SIZE"])?;
    let definition = cli.root().join("etc/snapctl/pools/p1.toml");
    ensure!(fs::read_to_string(definition)?.starts_with("type = \"dir\"\n"));
    let pool = Contract::new(Kind::named("dir")?, cli.root())?;
    ensure!(matches!(find(pool.pool.as_ref(), &pool.name, &name("x")), Err(PoolError::NoSuchVolume { .. })));
    Ok(())
}

/// A `snapctl` whose state is on a disk of its own.
struct OnDisk;

impl OnDisk {
    const DISK: &str = "/dev/vde";
    const ROOT: &str = "/srv/state";

    fn run(line: &str) -> Result<String> {
        let program = lab::snapctl()?;
        sh(&format!("{} --root {}/root {line}", program.display(), Self::ROOT))
    }

    fn path(pool: &str, volume: &str) -> Result<PathBuf> {
        let shown: serde_json::Value =
            serde_json::from_str(&Self::run(&format!("volume show {pool} {volume} --json"))?)?;
        Ok(shown["path"].as_str().context("path")?.into())
    }
}

/// The pools of the test, a name and what `pool define` is given.
const POOLS: [(&str, &str); 6] = [
    ("d1", "dir --path /srv/state/d1"),
    ("f1", "fs --source /dev/vdc"),
    ("b1", "btrfs --path /mnt/btrfs/b1"),
    ("k1", "disk --device /dev/vdb --initialize"),
    ("l1", "lvm --vg vg0"),
    ("t1", "lvm-thin --vg vg0 --thin-pool pool0"),
];

#[tokio::test]
async fn i9_pools_and_what_is_in_them_come_back_after_a_reboot() -> Result<()> {
    if is_inside() {
        return if sh("blkid /dev/vde").is_err() { before_the_reboot() } else { after_the_reboot() };
    }
    let dir = tempfile::tempdir()?;
    let mut vm = HostVm::default().modules(&["dm-thin-pool", "btrfs"]);
    for (index, mib) in [512_u64, 256, 256, 256, 128].into_iter().enumerate() {
        let file = dir.path().join(format!("disk{index}"));
        File::create(&file)?.set_len(mib * MIB)?;
        vm = vm.disk_file(&file);
    }
    let name = "pools::i9_pools_and_what_is_in_them_come_back_after_a_reboot";
    run_test(&vm, name).await?;
    run_test(&vm, name).await
}

fn before_the_reboot() -> Result<()> {
    prepare_places()?;
    sh(&format!(
        "mkfs.ext4 -q {}; mkdir -p {}; mount {} {}",
        OnDisk::DISK,
        OnDisk::ROOT,
        OnDisk::DISK,
        OnDisk::ROOT
    ))?;
    for (number, (pool, definition)) in (1_u8..).zip(POOLS) {
        OnDisk::run(&format!("pool define {pool} {definition} --autostart"))?;
        OnDisk::run(&format!("pool start {pool}"))?;
        OnDisk::run(&format!("volume create {pool} v-{pool} 8M --format raw"))?;
        write(&OnDisk::path(pool, &format!("v-{pool}"))?, &vec![number; MIB as usize])?;
    }
    sh("sync; umount /mnt/btrfs")?;
    Ok(())
}

fn after_the_reboot() -> Result<()> {
    sh(&format!(
        "mkdir -p {root} /mnt/btrfs; mount {} {root}; mount {BTRFS} /mnt/btrfs",
        OnDisk::DISK,
        root = OnDisk::ROOT
    ))?;
    // As a host without udev: nothing was activated by itself.
    ensure!(OnDisk::run("pool list")?.contains("not ready"));
    OnDisk::run("pool start --autostart")?;
    ensure!(!OnDisk::run("pool list")?.contains("not ready"), "{}", OnDisk::run("pool list")?);
    for (number, (pool, _)) in (1_u8..).zip(POOLS) {
        let path = OnDisk::path(pool, &format!("v-{pool}"))?;
        let mut bytes = vec![0; MIB as usize];
        File::open(&path)?.read_exact_at(&mut bytes, 0)?;
        ensure!(bytes.iter().all(|byte| *byte == number), "{pool}: another content");
        OnDisk::run(&format!("volume delete {pool} v-{pool}"))?;
        OnDisk::run(&format!("pool stop {pool}"))?;
        OnDisk::run(&format!("pool autostart {pool} --off"))?;
        OnDisk::run(&format!("pool remove {pool}"))?;
    }
    ensure!(OnDisk::run("pool list --json")?.contains("\"pools\":[]"));
    Ok(())
}

#[tokio::test]
async fn i10_volumes_are_made_as_they_are_asked_for() -> Result<()> {
    let (cli, dir, path) = with_pool().await?;
    let key = dir.path().join("key");
    fs::write(&key, "correct horse")?;
    let info = |name: &str| -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&sh(&format!("qemu-img info --output=json {}", path.join(name).display()))?)?)
    };
    for preallocation in ["off", "metadata", "falloc", "full"] {
        run(&cli, &format!("volume create p1 q-{preallocation} 8M --preallocation {preallocation}"))
            .await?
            .ok()?;
        let actual = info(&format!("q-{preallocation}.qcow2"))?["actual-size"].as_u64().context("size")?;
        let all = matches!(preallocation, "falloc" | "full");
        ensure!((actual >= 8 * MIB) == all, "{preallocation}: {actual}");
    }
    for preallocation in ["off", "falloc", "full"] {
        run(
            &cli,
            &format!("volume create p1 r-{preallocation} 8M --format raw --preallocation {preallocation}"),
        )
        .await?
        .ok()?;
        let actual = info(&format!("r-{preallocation}.raw"))?["actual-size"].as_u64().context("size")?;
        ensure!((actual >= 8 * MIB) == (preallocation != "off"), "{preallocation}: {actual}");
    }
    run(&cli, "volume create p1 v 8M --format vmdk").await?.ok()?;
    ensure!(info("v.vmdk")?["virtual-size"] == 8 * MIB);
    let no = run(&cli, "volume create p1 x 8M --format raw --preallocation metadata").await?;
    says(no.expect_code(2)?, &["only a qcow2 volume has tables"])?;
    let secret =
        run(&cli, &format!("volume create p1 secret 8M --encrypt luks --key-file {}", key.display())).await?;
    says(secret.ok()?, &["secret"])?;
    ensure!(info("secret.qcow2")?["format-specific"]["data"]["encrypt"]["format"] == "luks");
    says(run(&cli, "volume list p1").await?.ok()?, &["qcow2, encrypted"])?;
    // It is copied as it is, and never taken for what it is not.
    run(&cli, "volume clone p1 secret secret2").await?.ok()?;
    let no = run(&cli, "volume convert p1 secret plain --format raw").await?;
    says(no.expect_code(2)?, &["encrypted"])?;
    // The map is what QEMU says.
    run(&cli, "volume create p1 mapped 4M").await?.ok()?;
    sh(&format!("qemu-io -f qcow2 -c 'write -P 5 1M 64k' {}", path.join("mapped.qcow2").display()))?;
    let map = run(&cli, "volume show p1 mapped --map --json").await?.ok()?.json()?;
    let data: Vec<(u64, u64)> = map["map"]
        .as_array()
        .context("map")?
        .iter()
        .filter(|stretch| stretch["what"] == "data")
        .filter_map(|stretch| Some((stretch["start"].as_u64()?, stretch["length"].as_u64()?)))
        .collect();
    ensure!(data == [(MIB, 64 << 10)], "{map}");
    // A dry run makes nothing.
    let before = names_in(&path)?;
    for line in [
        "create p1 dry 8M",
        "clone p1 mapped dry",
        "delete p1 mapped",
        "resize p1 mapped 8M",
        "wipe p1 mapped",
    ] {
        says(run(&cli, &format!("volume {line} --dry-run")).await?.ok()?, &["would be done", "1."])?;
        ensure!(names_in(&path)? == before);
    }
    // Ctrl-C leaves nothing.
    run(&cli, "volume create p1 slow 64M --format raw --preallocation full").await?.ok()?;
    write(&path.join("slow.raw"), &pattern(32 * MIB))?;
    let child = cli
        .spawn(["volume", "convert", "p1", "slow", "fast", "--format", "qcow2", "--bandwidth", "1M"], &[])?;
    let pid = child.id().context("pid")?;
    tokio::time::sleep(std::time::Duration::from_millis(700)).await;
    sh(&format!("kill -INT {pid}"))?;
    let output = child.wait_with_output().await?;
    ensure!(output.status.code() == Some(130), "{output:?}");
    ensure!(!names_in(&path)?.iter().any(|name| name.contains("fast")), "{:?}", names_in(&path)?);
    Ok(())
}
