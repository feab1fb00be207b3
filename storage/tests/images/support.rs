//! Images to test with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use tempfile::TempDir;

/// A directory of images that goes away with its test. Its path is real, without symlinks.
pub struct Images {
    dir: TempDir,
}

impl Images {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir_in(fs::canonicalize(std::env::temp_dir()).unwrap()).unwrap() }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// `qemu-img create -f qcow2 OPTIONS NAME SIZE`, run in the directory.
    pub fn create(&self, name: &str, options: &[&str], size: &str) -> PathBuf {
        let fixed = ["create", "-q", "-f", "qcow2"];
        self.qemu_img(&[&fixed, options, &[name, size]].concat());
        self.path(name)
    }

    /// An overlay of `base`, of format qcow2, which names it by its relative name.
    pub fn overlay(&self, name: &str, base: &str) -> PathBuf {
        self.qemu_img(&["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", name]);
        self.path(name)
    }

    pub fn qemu_img(&self, args: &[&str]) -> String {
        self.run("qemu-img", args)
    }

    /// One `qemu-io` command on an image.
    pub fn qemu_io(&self, image: &str, command: &str) -> String {
        self.run("qemu-io", &["-f", "qcow2", "-c", command, image])
    }

    pub fn info(&self, image: &str) -> serde_json::Value {
        let text = self.qemu_img(&["info", "-f", "qcow2", "--output=json", image]);
        serde_json::from_str(&text).unwrap()
    }

    /// As [`Images::info`], or none where QEMU refuses the image.
    pub fn try_info(&self, image: &str) -> Option<serde_json::Value> {
        let output = self.output("qemu-img", &["info", "-f", "qcow2", "--output=json", image]);
        output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    fn run(&self, program: &str, args: &[&str]) -> String {
        // QEMU measures how fast it derives keys, and gives up on a machine that is too busy to tell.
        let is_too_busy =
            |output: &Output| output.stderr.windows(18).any(|text| text == b"accurate CPU usage");
        let mut output = self.output(program, args);
        for _ in 0..20 {
            if output.status.success() || !is_too_busy(&output) {
                break;
            }
            output = self.output(program, args);
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn output(&self, program: &str, args: &[&str]) -> Output {
        Command::new(program).args(args).current_dir(self.dir()).output().unwrap_or_else(|e| {
            panic!("these tests need {program} (Debian and Ubuntu: apt install qemu-utils): {e}")
        })
    }

    /// Writes bytes into an image at an offset.
    pub fn patch(&self, name: &str, at: usize, bytes: &[u8]) {
        let mut image = fs::read(self.path(name)).unwrap();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(self.path(name), image).unwrap();
    }

    /// Where a header extension of this type starts.
    pub fn extension(&self, name: &str, kind: u32) -> usize {
        let image = fs::read(self.path(name)).unwrap();
        let found =
            (72..image.len().min(4096)).step_by(8).find(|at| image[*at..*at + 4] == kind.to_be_bytes());
        found.unwrap_or_else(|| panic!("{name} has no header extension {kind:#x}"))
    }
}

/// Runs `work` on a thread that lost these capabilities, as an unprivileged user lacks them.
pub fn without<T: Send>(lost: CapabilitySet, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut sets = capabilities(None).unwrap();
            sets.effective -= lost;
            // Only this thread's: Linux keeps capabilities for each thread.
            set_capabilities(None, sets).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}
