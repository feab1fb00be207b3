//! Whether the kernel has a feature, as a module or built in.
//!
//! Source: modules.builtin and modules.dep in /lib/modules (kbuild), proc(5).

use std::fs;
use std::path::{Path, PathBuf};

/// Whether a module is loaded, built in, or can be loaded. A kernel without any list of modules has what it has:
/// nothing can be said, and it counts as had.
pub(super) fn can_be_had(module: &str) -> bool {
    let plain = module.replace('-', "_");
    if Path::new("/sys/module").join(&plain).exists() {
        return true;
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let dir = PathBuf::from("/lib/modules").join(release.trim());
    let lists: Vec<String> = ["modules.builtin", "modules.dep"]
        .iter()
        .filter_map(|file| fs::read_to_string(dir.join(file)).ok())
        .collect();
    lists.is_empty() || lists.iter().any(|list| names(list, &plain))
}

/// Whether a list of files names the module: `kernel/net/bridge/bridge.ko.xz: kernel/net/802/stp.ko.xz`.
fn names(list: &str, module: &str) -> bool {
    list.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default();
        let file = path.rsplit('/').next().unwrap_or_default();
        file.split(".ko").next().is_some_and(|name| name.replace('-', "_") == module)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_in_the_kernels_lists() {
        let list = "kernel/net/bridge/bridge.ko: kernel/net/llc/llc.ko\nkernel/drivers/net/dm-mod.ko.xz:\n";
        assert!(names(list, "bridge"));
        assert!(names(list, "dm_mod"));
        assert!(!names(list, "llc"), "only what the line is about");
    }
}
