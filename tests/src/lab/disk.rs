//! A guest's disks: what they are made of, their images, and the words that QEMU wants for them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use super::run::{output, program};

/// Large enough for 14000 records, small enough to be copied in no time.
const DEFAULT_SIZE: u64 = 64 << 20;

/// The key of encrypted disks.
pub const KEY: &str = "correct horse battery staple";
/// The object of QEMU's that holds it.
pub const KEY_ID: &str = "lab-key";

/// The key as QEMU and its tools take it.
pub fn key() -> String {
    format!("secret,id={KEY_ID},data={KEY}")
}

/// What the guest sees the disk on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// `virtio-blk-pci`.
    VirtioBlk,
    /// `scsi-hd` on a `virtio-scsi-pci`.
    VirtioScsi,
}

/// How the command line names the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// `-blockdev` with node names `FILE-ID` and `FMT-ID`.
    Blockdev,
    /// The old `-drive if=none,id=drive-ID`.
    Drive,
}

/// The image's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Bytes as they are.
    Raw,
    /// A qcow2 image without a backing file.
    Qcow2,
    /// A qcow2 overlay on a raw base that holds the file system.
    Qcow2OnRaw,
}

impl Format {
    /// QEMU's name of the active layer's driver.
    pub fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 | Self::Qcow2OnRaw => "qcow2",
        }
    }
}

/// One disk to make, or to take as it is.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    /// The qdev id, which is the serial number too; at most 20 characters.
    pub id: String,
    /// Virtio-blk or virtio-scsi.
    pub bus: Bus,
    /// `-blockdev` or `-drive`.
    pub style: Style,
    /// The image's format.
    pub format: Format,
    /// Bytes.
    pub size: u64,
    /// Whether the device has an iothread of its own (for SCSI, its controller).
    pub iothread: bool,
    /// Whether the guest and QEMU may only read it.
    pub read_only: bool,
    /// Whether a throttle filter is the disk's top node (`-blockdev` only), named `thr-ID`.
    pub throttle: bool,
    /// Whether an ext4 file system is made on it, and mounted at `/data/ID`.
    pub filesystem: bool,
    /// Whether qcow2 encrypts it, with the key [`KEY`] in the object [`KEY_ID`].
    pub luks: bool,
    /// An image that exists already, to use instead of making one.
    pub image: Option<PathBuf>,
}

impl DiskSpec {
    /// A virtio-blk qcow2 disk of 64 MiB through `-blockdev`, with an ext4 file system.
    pub fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            bus: Bus::VirtioBlk,
            style: Style::Blockdev,
            format: Format::Qcow2,
            size: DEFAULT_SIZE,
            iothread: false,
            read_only: false,
            throttle: false,
            filesystem: true,
            luks: false,
            image: None,
        }
    }

    /// On this bus.
    pub fn bus(self, bus: Bus) -> Self {
        Self { bus, ..self }
    }

    /// On virtio-scsi.
    pub fn scsi(self) -> Self {
        self.bus(Bus::VirtioScsi)
    }

    /// In this style.
    pub fn style(self, style: Style) -> Self {
        Self { style, ..self }
    }

    /// Through the old `-drive`.
    pub fn drive(self) -> Self {
        self.style(Style::Drive)
    }

    /// In this format.
    pub fn format(self, format: Format) -> Self {
        Self { format, ..self }
    }

    /// As a raw image.
    pub fn raw(self) -> Self {
        self.format(Format::Raw)
    }

    /// Of this many bytes.
    pub fn size(self, size: u64) -> Self {
        Self { size, ..self }
    }

    /// With an iothread.
    pub fn iothread(self) -> Self {
        Self { iothread: true, ..self }
    }

    /// Read-only; it is not mounted.
    pub fn read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// With a throttle filter as its top node.
    pub fn throttle(self) -> Self {
        Self { throttle: true, ..self }
    }

    /// Encrypted by qcow2.
    pub fn luks(self) -> Self {
        Self { luks: true, ..self }
    }

    /// Empty, and not mounted.
    pub fn blank(self) -> Self {
        Self { filesystem: false, ..self }
    }

    /// From an image that is there already, such as a snapshot's layer.
    pub fn image(self, image: &Path) -> Self {
        Self { image: Some(image.to_owned()), ..self }
    }

    /// Whether the guest mounts it, so that the writer uses it.
    pub(super) fn mounted(&self) -> bool {
        self.filesystem && !self.read_only
    }
}

/// A guest's disk.
#[derive(Debug, Clone)]
pub struct Disk {
    /// What it was made from.
    pub spec: DiskSpec,
    /// The image that QEMU was started with: the active layer, until a snapshot is taken.
    pub path: PathBuf,
}

impl Disk {
    /// Makes the image in `dir`, or takes the one that the spec names.
    pub(super) fn make(spec: DiskSpec, dir: &Path) -> Result<Self> {
        if let Some(path) = spec.image.clone() {
            return Ok(Self { spec, path });
        }
        let raw = dir.join(format!("{}.raw", spec.id));
        make_raw(&raw, spec.size, spec.filesystem)?;
        let path = match spec.format {
            Format::Raw => raw,
            Format::Qcow2 => {
                let path = dir.join(format!("{}.qcow2", spec.id));
                convert(&raw, &path, spec.luks)?;
                std::fs::remove_file(&raw)?;
                path
            }
            Format::Qcow2OnRaw => {
                let path = dir.join(format!("{}.qcow2", spec.id));
                let base = raw.file_name().context("no file name")?;
                let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
                output(qemu_img()?.args(create).arg(base).arg(&path))?;
                path
            }
        };
        Ok(Self { spec, path })
    }

    /// The qdev id.
    pub fn id(&self) -> &str {
        &self.spec.id
    }

    /// The node name of the format node, where the command line gave it one.
    pub fn node(&self) -> Option<String> {
        (self.spec.style == Style::Blockdev).then(|| format!("fmt-{}", self.spec.id))
    }

    /// QEMU's arguments for this disk.
    pub(super) fn args(&self) -> Vec<String> {
        let spec = &self.spec;
        let mut args = Vec::new();
        if spec.luks {
            args.extend(["-object".to_owned(), key()]);
        }
        if spec.iothread {
            args.extend(["-object".to_owned(), format!("iothread,id=io-{}", spec.id)]);
        }
        let drive = match spec.style {
            Style::Blockdev => self.blockdev(&mut args),
            Style::Drive => self.drive(&mut args),
        };
        let iothread = if spec.iothread { format!(",iothread=io-{}", spec.id) } else { String::new() };
        let what = format!("drive={drive},id={id},serial={id}", id = spec.id);
        match spec.bus {
            Bus::VirtioBlk => args.extend(["-device".to_owned(), format!("virtio-blk-pci,{what}{iothread}")]),
            Bus::VirtioScsi => args.extend([
                "-device".to_owned(),
                format!("virtio-scsi-pci,id=bus-{}{iothread}", spec.id),
                "-device".to_owned(),
                format!("scsi-hd,bus=bus-{}.0,{what}", spec.id),
            ]),
        }
        args
    }

    fn blockdev(&self, args: &mut Vec<String>) -> String {
        let spec = &self.spec;
        let (file, format) = (format!("file-{}", spec.id), format!("fmt-{}", spec.id));
        let mut nodes = vec![
            json!({"driver": "file", "node-name": file, "filename": self.path, "read-only": spec.read_only,
                   "discard": "unmap"}),
            json!({"driver": spec.format.driver(), "node-name": format, "file": file,
                   "read-only": spec.read_only, "discard": "unmap"}),
        ];
        if spec.luks {
            nodes[1]["encrypt"] = json!({"format": "luks", "key-secret": KEY_ID});
        }
        let mut top = format;
        if spec.throttle {
            let group = format!("tg-{}", spec.id);
            args.extend(["-object".to_owned(), format!("throttle-group,id={group}")]);
            let filter = format!("thr-{}", spec.id);
            nodes.push(
                json!({"driver": "throttle", "node-name": filter, "throttle-group": group, "file": top}),
            );
            top = filter;
        }
        args.extend(nodes.iter().flat_map(|node| ["-blockdev".to_owned(), node.to_string()]));
        top
    }

    fn drive(&self, args: &mut Vec<String>) -> String {
        let spec = &self.spec;
        let name = format!("drive-{}", spec.id);
        let file = self.path.display().to_string().replace(',', ",,");
        let mut drive =
            format!("if=none,id={name},file={file},format={},discard=unmap", spec.format.driver());
        if spec.read_only {
            drive.push_str(",readonly=on");
        }
        args.extend(["-drive".to_owned(), drive]);
        name
    }
}

/// Returns a `qemu-img` to give arguments to.
pub(super) fn qemu_img() -> Result<Command> {
    Ok(Command::new(program("qemu-img")?))
}

/// How often an encrypted image is tried: QEMU measures how fast it makes keys, and fails on a busy machine.
const ATTEMPTS: u32 = 200;

fn convert(raw: &Path, qcow2: &Path, luks: bool) -> Result<()> {
    let mut convert = qemu_img()?;
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
    if luks {
        let how = format!("encrypt.format=luks,encrypt.key-secret={KEY_ID},encrypt.iter-time=100");
        convert.args(["--object", &key(), "-o", &how]);
    }
    convert.arg(raw).arg(qcow2);
    let attempts = if luks { ATTEMPTS } else { 1 };
    let mut done = output(&mut convert);
    for _ in 1..attempts {
        if done.is_err() {
            done = output(&mut convert);
        }
    }
    done.map(drop)
}

fn make_raw(path: &Path, size: u64, filesystem: bool) -> Result<()> {
    std::fs::File::create(path)?.set_len(size)?;
    if filesystem {
        // All is initialised here, so that the guest's kernel writes nothing that nobody asked for.
        let mut mke2fs = Command::new(program("mke2fs")?);
        mke2fs.args(["-q", "-F", "-t", "ext4", "-m", "0", "-E"]);
        output(mke2fs.arg("lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0").arg(path))?;
    }
    Ok(())
}
