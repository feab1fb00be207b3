//! An image that is read to make a volume of it; judged before any other program sees it.

use std::fs::File;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use model::ByteSize;
use serde::Serialize;
use serde_json::{Value, json};

use crate::chain::{Chain, ChainPolicy};
use crate::pool::{PoolError, VolumeFormat};
use crate::qcow2::{Encryption, MAGIC, ReadAt};
use crate::{file, vmdk};

/// Where an image is, and what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Source {
    /// The file or device.
    pub path: PathBuf,
    /// Its format, which somebody has said.
    pub format: VolumeFormat,
    /// The part of the file that is the image; all of it if none.
    pub part: Option<(u64, u64)>,
    /// The size that a guest sees; none for formats that only QEMU reads here.
    pub size: Option<ByteSize>,
    /// At most so much of it is data.
    pub allocated: ByteSize,
    /// Whether it stands on another image.
    pub backed: bool,
    /// Whether its data is encrypted.
    pub encrypted: bool,
}

impl Source {
    /// Looks at an image. A backing file has to lie below `root`, or beside the image if none is given.
    ///
    /// # Errors
    /// [`PoolError::Chain`], [`PoolError::Aes`], [`PoolError::Vmdk`], [`PoolError::Host`].
    pub fn look(path: &Path, format: VolumeFormat, root: Option<&Path>) -> Result<Self, PoolError> {
        let mut opened = file::open(path)?;
        let is_file = opened.metadata.is_file();
        let length = opened.size(path)?;
        let allocated =
            if is_file { crate::allocated(&opened.metadata).min(ByteSize(length)) } else { ByteSize(length) };
        let mut source = Self {
            path: path.to_owned(),
            format,
            part: None,
            size: None,
            allocated,
            backed: false,
            encrypted: false,
        };
        match format {
            VolumeFormat::Raw => source.size = Some(ByteSize(length)),
            VolumeFormat::Qcow2 => source.take_chain(root)?,
            VolumeFormat::Vmdk => source.size = Some(vmdk::read(path)?.capacity),
            VolumeFormat::Vhdx | VolumeFormat::Vdi => {}
        }
        Ok(source)
    }

    fn take_chain(&mut self, root: Option<&Path>) -> Result<(), PoolError> {
        let policy =
            ChainPolicy { allowed: root.map(Path::to_owned).into_iter().collect(), ..Default::default() };
        let chain = Chain::open(&self.path, model::ImageFormat::Qcow2, &policy)?;
        for layer in chain.layers() {
            match layer.header.as_ref().map(|header| header.encryption) {
                Some(Encryption::Aes) => return Err(PoolError::Aes { path: layer.path.clone() }),
                Some(Encryption::Luks) => self.encrypted = true,
                Some(Encryption::None) | None => {}
            }
        }
        self.size = Some(chain.active().virtual_size);
        self.backed = chain.active().backing.is_some();
        self.allocated = ByteSize(chain.layers().map(|layer| layer.allocated.0).fold(0, u64::saturating_add));
        Ok(())
    }

    /// Refuses a file that was taken for raw and begins like something else: its content would be taken for data.
    ///
    /// # Errors
    /// [`PoolError::LooksOther`]; [`PoolError::Host`].
    pub fn refuse_disguise(&self) -> Result<(), PoolError> {
        if self.format != VolumeFormat::Raw {
            return Ok(());
        }
        let mut head = [0; 8];
        let file = File::open(&self.path).map_err(HostError::io("open", &self.path))?;
        ReadAt::read_at(&file, &mut head, 0).map_err(HostError::io("read", &self.path))?;
        let looks = [
            (MAGIC.as_slice(), VolumeFormat::Qcow2),
            (vmdk::MAGIC.as_slice(), VolumeFormat::Vmdk),
            (b"vhdxfile".as_slice(), VolumeFormat::Vhdx),
        ];
        match looks.into_iter().find(|(magic, _)| head.starts_with(magic)) {
            Some((_, looks)) => {
                Err(PoolError::LooksOther { path: self.path.clone(), format: self.format, looks })
            }
            None => Ok(()),
        }
    }

    /// How QEMU's tools are told of it: every driver by name, nothing left to be guessed.
    ///
    /// Source: QAPI `BlockdevOptions`; the `json:` pseudo-protocol of qemu-img(1).
    pub fn qemu(&self) -> String {
        let protocol = match std::fs::metadata(&self.path).is_ok_and(|metadata| metadata.is_file()) {
            true => "file",
            false => "host_device",
        };
        // A source is never written to, and a sealed one could not be opened otherwise.
        let mut file: Value = json!({ "driver": protocol, "filename": self.path, "read-only": true });
        if let Some((offset, size)) = self.part {
            file = json!({ "driver": "raw", "offset": offset, "size": size, "file": file });
        }
        format!("json:{}", json!({ "driver": self.format.driver(), "file": file }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_only_seems_raw_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        for (bytes, sound) in
            [(&b"QFI\xfb\0\0\0\x03"[..], false), (b"KDMV", false), (b"x", true), (b"", true)]
        {
            std::fs::write(&path, bytes).unwrap();
            let source = Source::look(&path, VolumeFormat::Raw, None).unwrap();
            assert_eq!(source.refuse_disguise().is_ok(), sound, "{bytes:?}");
        }
    }

    #[test]
    fn names_for_qemu_hold_every_driver() {
        let source = Source {
            path: "/x/a,b:c.vmdk".into(),
            format: VolumeFormat::Vmdk,
            part: Some((512, 1024)),
            size: None,
            allocated: ByteSize(0),
            backed: false,
            encrypted: false,
        };
        let text = source.qemu();
        let options: Value = serde_json::from_str(text.strip_prefix("json:").unwrap()).unwrap();
        assert_eq!(options["file"]["offset"], 512);
        assert_eq!(options["file"]["file"]["filename"], "/x/a,b:c.vmdk");
    }
}
