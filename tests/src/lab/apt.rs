//! Packages fetched and unpacked, never installed: the guest's kernel, its agent, a newer QEMU.
//!
//! The host's own package lists are asked first. Where they are missing or stale, a private apt state
//! inside the cache is filled from the same sources, so that no root is needed.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::run::{output, program};

/// Where apt keeps its sources, in the order in which they are looked at.
const SOURCES: [&str; 3] = [
    "/etc/apt/sources.list.d/debian.sources",
    "/etc/apt/sources.list.d/ubuntu.sources",
    "/etc/apt/sources.list",
];

/// A set of package lists to fetch from.
pub(super) struct Apt {
    options: Vec<String>,
}

/// The host's first main package source.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    signed_by: Option<String>,
}

impl Apt {
    /// The lists that the host has.
    pub(super) fn host() -> Self {
        Self { options: Vec::new() }
    }

    /// Lists of our own in `state`: the host's release with its updates, and `extra` suites.
    ///
    /// # Errors
    /// When the host's sources are not understood or the lists cannot be fetched (a suite that does
    /// not exist among them).
    pub(super) fn private(state: &Path, extra: &[&str]) -> Result<Self> {
        let codename = os_release("VERSION_CODENAME")?;
        let source = host_source()?;
        fs::create_dir_all(state.join("lists/partial"))?;
        fs::create_dir_all(state.join("cache/archives/partial"))?;
        let mut suites = vec![codename.clone(), format!("{codename}-updates")];
        suites.extend(extra.iter().map(|suite| format!("{codename}-{suite}")));
        let list = state.join("sources.list");
        fs::write(&list, source.one_line_each(&suites))?;
        let shown = |path: &str| state.join(path).display().to_string();
        let apt = Self {
            options: vec![
                format!("Dir::Etc::SourceList={}", list.display()),
                "Dir::Etc::SourceParts=/dev/null".to_owned(),
                format!("Dir::State::Lists={}", shown("lists")),
                format!("Dir::Cache={}", shown("cache")),
                // The cache may lie where apt's own user cannot go; nothing here needs that user.
                "APT::Sandbox::User=root".to_owned(),
                "Acquire::Languages=none".to_owned(),
            ],
        };
        output(apt.command("apt-get")?.args(["-q", "update", "--error-on=any"]))?;
        Ok(apt)
    }

    /// Returns the first package that `package` depends on whose name starts with `prefix`.
    pub(super) fn dependency(&self, package: &str, prefix: &str) -> Result<Option<String>> {
        let text = output(self.command("apt-cache")?.args(["depends", package]))?;
        let names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(names.map(str::to_owned).find(|name| name.starts_with(prefix)))
    }

    /// Fetches `packages` and unpacks them all into `into`.
    pub(super) fn unpack(&self, packages: &[&str], into: &Path) -> Result<()> {
        let debs = tempfile::tempdir_in(into.parent().context("no parent")?)?;
        output(self.command("apt-get")?.args(["-q", "download"]).args(packages).current_dir(debs.path()))?;
        fs::create_dir_all(into)?;
        for entry in fs::read_dir(debs.path())? {
            let deb = entry?.path();
            if deb.extension().is_some_and(|ext| ext == "deb") {
                output(Command::new(program("dpkg-deb")?).arg("-x").arg(&deb).arg(into))?;
            }
        }
        Ok(())
    }

    fn command(&self, name: &str) -> Result<Command> {
        let mut command = Command::new(program(name)?);
        command.env("LC_ALL", "C.UTF-8");
        for option in &self.options {
            command.args(["-o", option]);
        }
        Ok(command)
    }
}

impl Source {
    fn one_line_each(&self, suites: &[String]) -> String {
        let signed = self.signed_by.as_ref().map_or(String::new(), |key| format!("[signed-by={key}] "));
        suites.iter().map(|suite| format!("deb {signed}{} {suite} main\n", self.uri)).collect()
    }
}

/// Returns one value of `/etc/os-release`.
///
/// # Errors
/// When the file or the key is not there.
pub(super) fn os_release(key: &str) -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
    let mut lines = text.lines().filter_map(|line| line.split_once('='));
    let value = lines.find(|(name, _)| *name == key).map(|(_, value)| value.trim_matches('"').to_owned());
    value.with_context(|| format!("/etc/os-release has no {key}"))
}

fn host_source() -> Result<Source> {
    for path in SOURCES {
        let Ok(text) = fs::read_to_string(path) else { continue };
        let source = if path.ends_with(".sources") { from_stanzas(&text) } else { from_lines(&text) };
        if let Some(source) = source {
            return Ok(source);
        }
    }
    bail!("no package source with the component main in {}", SOURCES.join(", "))
}

/// Source: sources.list(5), "DEB822-STYLE FORMAT".
fn from_stanzas(text: &str) -> Option<Source> {
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            let mut lines = stanza.lines().filter_map(|line| line.split_once(':'));
            lines.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_owned())
        };
        let has = |name: &str, word: &str| field(name)?.split_whitespace().find(|w| *w == word).map(|_| ());
        has("Types", "deb")?;
        has("Components", "main")?;
        if field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no")) {
            return None;
        }
        // A key that is written into the stanza itself has no place on one line.
        let signed_by = field("Signed-By").filter(|key| key.starts_with('/'));
        Some(Source { uri: field("URIs")?.split_whitespace().next()?.to_owned(), signed_by })
    })
}

/// Source: sources.list(5), "ONE-LINE-STYLE FORMAT".
fn from_lines(text: &str) -> Option<Source> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?.to_owned();
        words.skip(1).find(|word| *word == "main")?;
        let signed_by = options.split_whitespace().find_map(|o| o.strip_prefix("signed-by="));
        Some(Source { uri, signed_by: signed_by.map(str::to_owned) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_of_sources_are_understood() {
        let stanzas = "Types: deb\n# old\nURIs: http://mirror.example/debian\nSuites: a a-updates\n\
             Components: main\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://other.example\nComponents: main\n";
        let expected =
            Source { uri: "http://mirror.example/debian".to_owned(), signed_by: Some("/k.gpg".to_owned()) };
        assert_eq!(from_stanzas(stanzas), Some(expected));
        let lines = "# deb http://no.example a main\ndeb-src http://no.example a main\n\
             deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian a main contrib\n";
        let expected =
            Source { uri: "http://mirror.example/debian".to_owned(), signed_by: Some("/k.gpg".to_owned()) };
        assert_eq!(from_lines(lines), Some(expected));
    }

    #[test]
    fn a_disabled_source_and_one_without_main_are_passed_over() {
        assert_eq!(from_stanzas("Enabled: no\nTypes: deb\nURIs: http://a.example\nComponents: main\n"), None);
        assert_eq!(from_lines("deb http://a.example bookworm contrib\n"), None);
    }
}
