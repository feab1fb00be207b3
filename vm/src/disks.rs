//! A VM's disks as QEMU shows them.
//!
//! [`find`] is pure: replies of QEMU in, disks out. It looks through filters (a throttle on top), tells
//! the format node from the protocol node, and says of every drive that cannot be snapshotted why not.

use std::collections::HashMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use agent_client::{BlockGraph, BlockInfo, BlockNode, DirtyBitmap};
use model::{ByteSize, DiskName, ImageFormat};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, VmDefinition};

/// Drivers that stand above a format node and pass everything through.
const FILTERS: [&str; 3] = ["throttle", "copy-on-read", "preallocate"];
/// Most filters above one format node that are looked through.
const MAX_FILTERS: usize = 16;
/// Most layers below that are taken.
const MAX_LAYERS: usize = 512;

/// One drive of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The name that snapctl uses: the user's alias, or the qdev id, `-drive` id or node-name.
    pub name: DiskName,
    /// Every name that finds it, `name` first.
    pub names: Vec<String>,
    /// Whether `name` is an alias that the user gave it.
    pub aliased: bool,
    /// What is in it.
    pub content: Content,
}

/// What a drive holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A writable image that an overlay can stand on.
    Layer(ActiveLayer),
    /// Nothing that a snapshot has to hold: left out, and said so.
    Skipped(Skip),
    /// A writable disk that cannot be snapshotted. A snapshot without it has to be asked for.
    Unfit(String),
}

/// Why a drive is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// No medium is in it.
    Empty,
    /// The guest cannot write to it.
    ReadOnly,
    /// It holds the firmware's code or variables.
    Firmware,
}

impl Skip {
    /// The reason, for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Empty => "no medium",
            Self::ReadOnly => "read-only",
            Self::Firmware => "firmware flash",
        }
    }
}

/// A disk's active layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActiveLayer {
    /// The format node.
    pub node: String,
    /// The format.
    pub format: ImageFormat,
    /// The image as QEMU names it, made absolute.
    pub path: PathBuf,
    /// What the guest sees.
    pub virtual_size: ByteSize,
    /// What the user chose for it.
    pub options: NodeOptions,
    /// The dirty bitmaps on it.
    pub bitmaps: Vec<DirtyBitmap>,
    /// Nodes from the device down to the protocol node, then those of the layers below.
    pub nodes: Vec<String>,
    /// The layers below, the nearest first.
    pub below: Vec<LowerLayer>,
}

/// A layer below the active one, as QEMU has it open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LowerLayer {
    /// The format node.
    pub node: String,
    /// The image, made absolute; none if QEMU does not say which file it is.
    pub path: Option<PathBuf>,
}

/// Options of a node that the user chose and that its overlay has to have too.
///
/// Source: qapi/block-core.json, BlockdevCacheInfo and BlockdevDetectZeroesOptions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeOptions {
    /// Past the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Flush requests of the guest are ignored.
    pub no_flush: bool,
    /// What is done with writes of zeroes: `off`, `on` or `unmap`.
    pub detect_zeroes: String,
    /// The id of the object that holds the key, where the image is encrypted with LUKS. The key itself is QEMU's alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_secret: Option<String>,
}

impl NodeOptions {
    fn of(node: &BlockNode) -> Self {
        let BlockNode { cache, detect_zeroes, .. } = node;
        let key_secret = None;
        Self {
            direct: cache.direct,
            no_flush: cache.no_flush,
            detect_zeroes: detect_zeroes.clone(),
            key_secret,
        }
    }
}

impl Disk {
    /// Its active layer, if it has one that can be snapshotted.
    pub fn layer(&self) -> Option<&ActiveLayer> {
        match &self.content {
            Content::Layer(layer) => Some(layer),
            Content::Skipped(_) | Content::Unfit(_) => None,
        }
    }
}

/// Finds the drives in QEMU's replies, in QEMU's order.
///
/// `cwd` is QEMU's working directory, for images that it was given by a relative name.
pub fn find(
    definition: &VmDefinition,
    blocks: &[BlockInfo],
    nodes: &[BlockNode],
    graph: &BlockGraph,
    cwd: Option<&Path>,
) -> Vec<Disk> {
    let graph = Graph::new(nodes, graph);
    let mut disks: Vec<Disk> = blocks.iter().map(|block| disk(definition, block, &graph, cwd)).collect();
    name_apart(&mut disks);
    disks
}

/// Lets no two disks go by one name: a user's alias may be another disk's id. The name that both have finds neither
/// of them ([`select`]), and each goes by its first one that no other has.
fn name_apart(disks: &mut [Disk]) {
    let all: Vec<Vec<String>> = disks.iter().map(|disk| disk.names.clone()).collect();
    for (index, disk) in disks.iter_mut().enumerate() {
        let others = || all.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, names)| names);
        let own = disk.names.iter().find(|name| !others().any(|names| names.contains(name)));
        if let Some(own) = own {
            disk.name = DiskName::new(own);
        }
    }
}

/// Finds the disk that the user means by `name`.
///
/// # Errors
/// [`Error::NoSuchDisk`] with the names that there are; [`Error::AmbiguousDisk`] if several go by it.
pub fn select<'a>(vm: &model::Name, disks: &'a [Disk], name: &str) -> Result<&'a Disk, Error> {
    let named: Vec<&Disk> =
        disks.iter().filter(|disk| disk.names.iter().any(|known| known == name)).collect();
    let names = |disks: &[&Disk]| disks.iter().map(|disk| disk.name.to_string()).collect();
    match named.as_slice() {
        [one] => Ok(one),
        [] => Err(Error::NoSuchDisk {
            vm: vm.clone(),
            name: name.to_owned(),
            known: names(&disks.iter().collect::<Vec<_>>()),
        }),
        several => Err(Error::AmbiguousDisk { vm: vm.clone(), name: name.to_owned(), disks: names(several) }),
    }
}

/// The nodes through which QEMU has the file at `path` open: a format node, if there is one, before the protocol
/// node below it. A file is told by device and inode.
///
/// `cwd` is QEMU's working directory, for images that it was given by a relative name.
pub fn nodes_on(nodes: &[BlockNode], graph: &BlockGraph, cwd: Option<&Path>, path: &Path) -> Vec<String> {
    let Some(wanted) = inode(path) else { return Vec::new() };
    let id_of =
        |name: &str| graph.nodes.iter().find(|n| n.kind == "block-driver" && n.name == name).map(|n| n.id);
    let name_of =
        |id: u64| graph.nodes.iter().find(|n| n.id == id && n.kind == "block-driver").map(|n| n.name.clone());
    let protocols = nodes.iter().filter(|node| LOCAL.contains(&node.drv.as_str())).filter_map(|node| {
        let file = absolute(&node.file, cwd).ok()?;
        node.node_name.clone().filter(|_| inode(&file) == Some(wanted))
    });
    let mut found = Vec::new();
    for protocol in protocols {
        let above =
            graph.edges.iter().filter(|edge| edge.name == "file" && Some(edge.child) == id_of(&protocol));
        found.extend(above.filter_map(|edge| name_of(edge.parent)));
        found.push(protocol);
    }
    found
}

/// QEMU's drivers for files and block devices of this host.
const LOCAL: [&str; 2] = ["file", "host_device"];

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|found| identity(&found))
}

/// Which file it is; of a block device its number, since it has many nodes.
pub(crate) fn identity(metadata: &std::fs::Metadata) -> (u64, u64) {
    if metadata.file_type().is_block_device() {
        return (u64::MAX, metadata.rdev());
    }
    (metadata.dev(), metadata.ino())
}

struct Graph<'a> {
    nodes: HashMap<&'a str, &'a BlockNode>,
    /// (parent's name, role) to child's name.
    children: HashMap<(&'a str, &'a str), &'a str>,
}

impl<'a> Graph<'a> {
    fn new(nodes: &'a [BlockNode], graph: &'a BlockGraph) -> Self {
        let names: HashMap<u64, &str> = graph
            .nodes
            .iter()
            .filter(|node| node.kind == "block-driver")
            .map(|node| (node.id, node.name.as_str()))
            .collect();
        let edge = |edge: &'a agent_client::GraphEdge| {
            Some(((*names.get(&edge.parent)?, edge.name.as_str()), *names.get(&edge.child)?))
        };
        Self {
            nodes: nodes.iter().filter_map(|node| Some((node.node_name.as_deref()?, node))).collect(),
            children: graph.edges.iter().filter_map(edge).collect(),
        }
    }

    fn child(&self, parent: &str, role: &str) -> Option<&'a BlockNode> {
        self.nodes.get(self.children.get(&(parent, role))?).copied()
    }

    /// The layers below a format node, each with its protocol node, the nearest first.
    fn below(&self, format_node: &str) -> Vec<(&'a BlockNode, Option<&'a BlockNode>)> {
        let mut below: Vec<(&BlockNode, Option<&BlockNode>)> = Vec::new();
        let mut backing = self.child(format_node, "backing");
        while let Some((node, name)) = backing.and_then(|node| Some((node, node.node_name.as_deref()?)))
            && below.len() < MAX_LAYERS
        {
            below.push((node, self.child(name, "file")));
            backing = self.child(name, "backing");
        }
        below
    }
}

fn disk(definition: &VmDefinition, block: &BlockInfo, graph: &Graph<'_>, cwd: Option<&Path>) -> Disk {
    let mut names = own_names(block);
    let content = content(block, graph, cwd);
    if let Content::Layer(layer) = &content {
        names.extend(layer.nodes.iter().cloned());
    }
    let alias = definition.disks.iter().find(|(_, alias)| names.contains(&alias.device));
    if let Some((alias, _)) = alias {
        names.insert(0, alias.clone());
    }
    let mut seen = Vec::new();
    names.retain(|name| {
        !name.is_empty() && !seen.contains(name) && {
            seen.push(name.clone());
            true
        }
    });
    let name = names.first().map_or("(unnamed)", String::as_str);
    Disk { name: DiskName::new(name), aliased: alias.is_some(), content, names }
}

/// The names that QEMU has for the drive itself: qdev id, QOM path, `-drive` id, top node.
fn own_names(block: &BlockInfo) -> Vec<String> {
    let mut names = Vec::new();
    if let Some(qdev) = &block.qdev {
        names.extend(qdev_id(qdev).map(str::to_owned));
    }
    names.push(block.device.clone());
    names.extend(block.inserted.iter().filter_map(|node| node.node_name.clone()));
    names.extend(block.qdev.clone());
    names
}

/// The id in a device's QOM path: `vda` in `/machine/peripheral/vda/virtio-backend`.
fn qdev_id(qdev: &str) -> Option<&str> {
    match qdev.strip_prefix("/machine/peripheral/") {
        Some(rest) => rest.split('/').next(),
        None if qdev.starts_with('/') => None,
        None => Some(qdev),
    }
}

/// Whether it is flash that holds the firmware's code or variables.
pub(crate) fn is_firmware(block: &BlockInfo) -> bool {
    let qdev = block.qdev.as_deref().unwrap_or_default();
    qdev.starts_with("/machine/system.flash") || block.device.starts_with("pflash")
}

fn content(block: &BlockInfo, graph: &Graph<'_>, cwd: Option<&Path>) -> Content {
    let Some(inserted) = &block.inserted else { return Content::Skipped(Skip::Empty) };
    if is_firmware(block) {
        return Content::Skipped(Skip::Firmware);
    }
    if inserted.ro {
        return Content::Skipped(Skip::ReadOnly);
    }
    match layer(inserted, graph, cwd) {
        Ok(layer) => Content::Layer(layer),
        Err(why) => Content::Unfit(why),
    }
}

fn layer(top: &BlockNode, graph: &Graph<'_>, cwd: Option<&Path>) -> Result<ActiveLayer, String> {
    let name =
        |node: &BlockNode| node.node_name.clone().ok_or("QEMU gives one of its nodes no name".to_owned());
    let mut nodes = vec![name(top)?];
    let mut node = top;
    while FILTERS.contains(&node.drv.as_str()) {
        let below = nodes.last().and_then(|above| graph.child(above, "file"));
        node =
            below.filter(|_| nodes.len() < MAX_FILTERS).ok_or("what is below its filter cannot be seen")?;
        nodes.push(name(node)?);
    }
    let format_node = name(node)?;
    let key_secret = key_secret(node)?;
    if graph.child(&format_node, "data-file").is_some() {
        return Err("its qcow2 image keeps its data in an external file".into());
    }
    let (format, protocol) = match node.drv.as_str() {
        "qcow2" => (ImageFormat::Qcow2, graph.child(&format_node, "file")),
        "raw" => (ImageFormat::Raw, graph.child(&format_node, "file")),
        "file" | "host_device" => (ImageFormat::Raw, Some(node)),
        other => {
            return Err(format!(
                "its image is opened by QEMU's {other:?} driver, and raw and qcow2 are known"
            ));
        }
    };
    let protocol = protocol.ok_or("the file below its image cannot be seen")?;
    if !LOCAL.contains(&protocol.drv.as_str()) {
        return Err(format!("its image is reached over {:?}, not in a local file", protocol.drv));
    }
    if format == ImageFormat::Raw && node.file != protocol.file {
        return Err("its raw image is a part of a file (offset or size)".into());
    }
    let protocol_name = name(protocol)?;
    if nodes.last() != Some(&protocol_name) {
        nodes.push(protocol_name);
    }
    // A job on a node of a layer below works on the disk too, and the user may know the disk by one of them.
    let below = graph.below(&format_node);
    nodes.extend(below.iter().flat_map(|(node, file)| [Some(*node), *file]).flatten().filter_map(node_name));
    let below = below.into_iter().filter_map(|(node, file)| {
        let path = absolute(&file.unwrap_or(node).file, cwd).ok();
        Some(LowerLayer { node: node_name(node)?, path })
    });
    let below = below.collect();
    Ok(ActiveLayer {
        node: format_node,
        format,
        path: absolute(&protocol.file, cwd)?,
        options: NodeOptions { key_secret, ..NodeOptions::of(node) },
        bitmaps: node.dirty_bitmaps.clone(),
        virtual_size: ByteSize(node.image.virtual_size),
        nodes,
        below,
    })
}

/// The id of the secret of an image that qcow2 itself encrypts; none if it is not encrypted.
///
/// QEMU tells it as part of the name that it puts together: the key is one of the options without which the image could not
/// be opened again. Source: block.c, `bdrv_refresh_filename`; block/qcow2.c, `qcow2_strong_runtime_opts`.
fn key_secret(node: &BlockNode) -> Result<Option<String>, String> {
    if !node.encrypted && node.drv != "luks" {
        return Ok(None);
    }
    if node.drv != "qcow2" || node.image.encryption() != Some("luks") {
        return Err(
            "its image is encrypted, not by qcow2 with LUKS, and an overlay would hold the guest's data in clear".into()
        );
    }
    let options = node.file.strip_prefix("json:").and_then(|text| serde_json::from_str::<Value>(text).ok());
    let secret = options.as_ref().and_then(|options| {
        let flat = options.get("encrypt.key-secret");
        flat.or_else(|| options.get("encrypt")?.get("key-secret"))?.as_str()
    });
    let secret = secret.ok_or("its image is encrypted, and QEMU does not tell by which secret")?;
    Ok(Some(secret.to_owned()))
}

fn node_name(node: &BlockNode) -> Option<String> {
    node.node_name.clone()
}

pub(crate) fn absolute(file: &str, cwd: Option<&Path>) -> Result<PathBuf, String> {
    let path = Path::new(file.strip_prefix("file:").unwrap_or(file));
    if path.starts_with("/dev/fdset") {
        return Err("its image was given to QEMU as an open descriptor; its path is not known".into());
    }
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    let cwd = cwd.ok_or("its image was given by a relative name, and QEMU's directory is not known")?;
    Ok(cwd.join(path))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, drv: &str, file: &str) -> Value {
        json!({"node-name": name, "drv": drv, "file": file, "ro": false,
               "image": {"filename": file, "format": drv, "virtual-size": 1024}})
    }

    fn find_one(block: Value, nodes: Value, edges: &[(&str, &str, &str)], definition: &VmDefinition) -> Disk {
        let nodes: Vec<BlockNode> = serde_json::from_value(nodes).unwrap();
        let id = |name: &str| nodes.iter().position(|node| node.node_name.as_deref() == Some(name)).unwrap();
        let graph = json!({
            "nodes": nodes.iter().enumerate().map(|(id, node)| json!({"id": id, "type": "block-driver", "name": node.node_name})).collect::<Vec<_>>(),
            "edges": edges.iter().map(|(parent, role, child)| json!({"parent": id(parent), "child": id(child), "name": role})).collect::<Vec<_>>(),
        });
        let block: BlockInfo = serde_json::from_value(block).unwrap();
        let graph = serde_json::from_value(graph).unwrap();
        find(definition, &[block], &nodes, &graph, Some(Path::new("/vm"))).remove(0)
    }

    fn plain() -> VmDefinition {
        VmDefinition { qmp: "/q".into(), agent: None, disks: Default::default() }
    }

    #[test]
    fn a_blockdev_disk_is_found_by_all_its_names() {
        let mut nodes = json!([node("d0", "qcow2", "/i/a.qcow2"), node("f0", "file", "/i/a.qcow2")]);
        // Spelt as QEMU does: this one member has an underscore.
        nodes[0]["detect_zeroes"] = json!("unmap");
        nodes[0]["cache"] = json!({"writeback": true, "direct": true, "no-flush": false});
        let block =
            json!({"device": "", "qdev": "/machine/peripheral/vda/virtio-backend", "inserted": nodes[0]});
        let mut definition = plain();
        definition.disks.insert("data".into(), crate::DiskAlias { device: "d0".into() });
        let disk = find_one(block, nodes, &[("d0", "file", "f0")], &definition);
        assert_eq!(disk.name.as_str(), "data");
        assert_eq!(disk.names, ["data", "vda", "d0", "/machine/peripheral/vda/virtio-backend", "f0"]);
        let layer = disk.layer().unwrap();
        assert_eq!((layer.node.as_str(), layer.format), ("d0", ImageFormat::Qcow2));
        assert_eq!(layer.path, Path::new("/i/a.qcow2"));
        let options = NodeOptions { direct: true, detect_zeroes: "unmap".into(), ..NodeOptions::default() };
        assert_eq!(layer.options, options);
    }

    #[test]
    fn a_drive_with_a_throttle_and_a_relative_name_is_found() {
        let nodes = json!([
            node("t0", "throttle", "a.raw"),
            node("#block1", "raw", "a.raw"),
            node("#block2", "file", "a.raw")
        ]);
        let block = json!({"device": "drive0", "qdev": "sda", "inserted": nodes[0]});
        let edges = [("t0", "file", "#block1"), ("#block1", "file", "#block2")];
        let disk = find_one(block, nodes, &edges, &plain());
        assert_eq!(disk.names, ["sda", "drive0", "t0", "#block1", "#block2"]);
        let layer = disk.layer().unwrap();
        assert_eq!((layer.node.as_str(), layer.path.as_path()), ("#block1", Path::new("/vm/a.raw")));
    }

    #[test]
    fn the_secret_of_an_encrypted_image_is_found_as_qemu_tells_it() {
        for options in [json!({"encrypt.key-secret": "sec0"}), json!({"encrypt": {"key-secret": "sec0"}})] {
            let mut image = node("d0", "qcow2", &format!("json:{options}"));
            image["encrypted"] = json!(true);
            image["image"]["format-specific"] =
                json!({"type": "qcow2", "data": {"encrypt": {"format": "luks"}}});
            let block = json!({"device": "", "qdev": "va", "inserted": image});
            let nodes = json!([image, node("f0", "file", "/i/a.qcow2")]);
            let disk = find_one(block, nodes, &[("d0", "file", "f0")], &plain());
            assert_eq!(disk.layer().unwrap().options.key_secret.as_deref(), Some("sec0"));
        }
    }

    #[test]
    fn a_disk_on_a_block_device_is_one_like_the_others() {
        let nodes = json!([node("a", "raw", "/dev/vg/x"), node("b", "host_device", "/dev/vg/x")]);
        let block = json!({"device": "x", "inserted": nodes[0]});
        let disk = find_one(block, nodes, &[("a", "file", "b")], &plain());
        let layer = disk.layer().unwrap();
        assert_eq!((layer.path.as_path(), layer.format), (Path::new("/dev/vg/x"), ImageFormat::Raw));
    }

    #[test]
    fn what_cannot_be_snapshotted_says_why() {
        let unfit = |nodes: Value, edges: &[(&str, &str, &str)]| {
            let block = json!({"device": "x", "inserted": nodes[0]});
            match find_one(block, nodes, edges, &plain()).content {
                Content::Unfit(why) => why,
                other => panic!("{other:?}"),
            }
        };
        let on = [("a", "file", "b")];
        let why = unfit(json!([node("a", "raw", "nbd://h"), node("b", "nbd", "nbd://h")]), &on);
        assert!(why.contains("\"nbd\""), "{why}");
        let why = unfit(json!([node("a", "raw", "json:{}"), node("b", "file", "/x")]), &on);
        assert!(why.contains("part of a file"), "{why}");
        let why = unfit(json!([node("a", "luks", "/x"), node("b", "file", "/x")]), &on);
        assert!(why.contains("encrypted"), "{why}");
        let mut old = node("a", "qcow2", "json:{\"encrypt.key-secret\": \"s\"}");
        old["encrypted"] = json!(true);
        old["image"]["format-specific"] = json!({"type": "qcow2", "data": {"encrypt": {"format": "aes"}}});
        let why = unfit(json!([old, node("b", "file", "/x")]), &on);
        assert!(why.contains("encrypted"), "{why}");
        let why = unfit(json!([node("a", "qcow2", "/x"), node("b", "file", "/dev/fdset/3")]), &on);
        assert!(why.contains("descriptor"), "{why}");
        let why = unfit(json!([node("a", "vmdk", "/x")]), &[]);
        assert!(why.contains("\"vmdk\""), "{why}");
    }

    #[test]
    fn empty_read_only_and_firmware_drives_are_skipped() {
        let skip = |block| match find_one(block, json!([]), &[], &plain()).content {
            Content::Skipped(skip) => skip,
            other => panic!("{other:?}"),
        };
        assert_eq!(skip(json!({"device": "cd", "removable": true})), Skip::Empty);
        let mut image = node("a", "raw", "/x");
        let flash = json!({"device": "pflash1", "qdev": "/machine/system.flash1", "inserted": image});
        assert_eq!(skip(flash), Skip::Firmware);
        image["ro"] = json!(true);
        assert_eq!(skip(json!({"device": "cd", "inserted": image})), Skip::ReadOnly);
    }

    #[test]
    fn an_unknown_disk_is_told_with_the_known_ones() {
        let disk = find_one(json!({"device": "cd"}), json!([]), &[], &plain());
        let fault = select(&"vm1".parse().unwrap(), &[disk], "vdz").unwrap_err();
        assert!(matches!(fault, Error::NoSuchDisk { known, .. } if known == ["cd"]));
    }
}
