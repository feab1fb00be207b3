//! `cargo xtask licences`: what is linked into snapctl, against the rules of `deny.toml`.
//!
//! Three questions, answered from `cargo metadata` alone, offline: is each licence allowed, is there one
//! version of each crate, and does each crate come from the registry. cargo-deny asks the same and more of
//! the same file, but takes minutes to build; so there is one list and nothing that could drift.
//!
//! Source: SPDX specification, annex "SPDX license expressions"; cargo-metadata(1); cargo-deny's manual.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// How metadata marks a crate of a registry.
const REGISTRY: &str = "registry+";

/// How deep parentheses may go.
const MAX_DEPTH: u8 = 16;

/// The rules, as cargo-deny has them.
#[derive(Deserialize)]
struct Policy {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    skip: Vec<Skip>,
}

/// A version beside which another one is tolerated.
#[derive(Deserialize)]
struct Skip {
    /// `NAME:VERSION`, where the version may be cut after any of its numbers.
    #[serde(rename = "crate")]
    spec: String,
    reason: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

/// The part of `cargo metadata` that matters. With a platform given, only what is built there is listed.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// None for a crate of the workspace.
    source: Option<String>,
}

/// Checks the whole workspace, dev-dependencies too, and prints one line; all faults at once if there are any.
///
/// # Errors
/// If a rule is broken, and if `deny.toml` or cargo's answer cannot be read. Offline it needs the crates to
/// have been fetched, which any build does.
pub fn run() -> anyhow::Result<()> {
    let policy = read_policy(&root().join("deny.toml"))?;
    let metadata: Metadata = metadata()?;
    let faults = faults(&policy, &metadata.packages);
    ensure!(faults.is_empty(), "{} faults against deny.toml:\n  {}", faults.len(), faults.join("\n  "));
    println!(
        "{} crates: each licence allowed, one version of each but {}",
        metadata.packages.len(),
        policy.bans.skip.iter().map(|skip| skip.spec.as_str()).collect::<Vec<_>>().join(", ")
    );
    Ok(())
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read_policy(path: &Path) -> anyhow::Result<Policy> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    toml::from_str(&text).with_context(|| path.display().to_string())
}

/// Asks cargo what is built for this host. Crates for other systems need not even have been fetched.
fn metadata<T: DeserializeOwned>() -> anyhow::Result<T> {
    let host = host_triple()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--locked", "--offline", "--filter-platform", &host])
        .current_dir(root())
        .output()
        .context("cargo metadata")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo metadata: {}", errors.trim_end());
    serde_json::from_slice(&output.stdout).context("cargo metadata")
}

fn host_triple() -> anyhow::Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("rustc -vV")?;
    let text = String::from_utf8(output.stdout).context("rustc -vV")?;
    text.lines()
        .find_map(|line| line.strip_prefix("host: ").map(str::to_owned))
        .context("rustc -vV names no host")
}

fn faults(policy: &Policy, packages: &[Package]) -> Vec<String> {
    let mut faults: Vec<String> =
        packages.iter().filter_map(|package| licence_fault(&policy.licenses.allow, package)).collect();
    faults.extend(packages.iter().filter_map(|package| source_fault(&policy.sources, package)));
    faults.extend(version_faults(&policy.bans.skip, packages));
    faults
}

fn licence_fault(allowed: &BTreeSet<String>, package: &Package) -> Option<String> {
    let Package { name, version, license, .. } = package;
    let Some(expression) = license else {
        return Some(format!("{name} {version} states no licence"));
    };
    match satisfied(expression, allowed) {
        Some(true) => None,
        Some(false) => Some(format!("{name} {version}: the licence `{expression}` is not allowed")),
        None => Some(format!("{name} {version}: `{expression}` is no licence expression")),
    }
}

fn source_fault(sources: &Sources, package: &Package) -> Option<String> {
    let source = package.source.as_ref()?;
    let known =
        source.strip_prefix(REGISTRY).is_some_and(|url| sources.allow_registry.iter().any(|r| r == url));
    (!known).then(|| format!("{} {} comes from {source}", package.name, package.version))
}

fn version_faults(skips: &[Skip], packages: &[Package]) -> Vec<String> {
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in packages {
        versions.entry(&package.name).or_default().insert(&package.version);
    }
    let mut faults = Vec::new();
    for skip in skips {
        let (name, version) = skip.spec.split_once(':').unwrap_or((&skip.spec, ""));
        let needed = versions.get_mut(name).is_some_and(|found| {
            let before = found.len();
            found.retain(|other| !is_version(other, version));
            before > 1 && found.len() < before
        });
        if !needed || skip.reason.is_empty() {
            faults.push(format!("the exception for {} is not needed, or says no reason", skip.spec));
        }
    }
    let several = versions.iter().filter(|(_, found)| found.len() > 1);
    faults.extend(several.map(|(name, found)| {
        let list: Vec<&str> = found.iter().copied().collect();
        format!("{name} is there at several versions: {}", list.join(", "))
    }));
    faults
}

/// Whether `version` begins with the numbers of `wanted`.
fn is_version(version: &str, wanted: &str) -> bool {
    let rest = version.strip_prefix(wanted);
    !wanted.is_empty() && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Whether somebody who accepts `allowed` may use what is under `expression`; `None` if it is none.
///
/// `/` between licences is an older way to write `OR`.
fn satisfied(expression: &str, allowed: &BTreeSet<String>) -> Option<bool> {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut reader = Reader { words: spaced.split_whitespace().collect(), at: 0, allowed };
    let verdict = reader.any_of(MAX_DEPTH)?;
    (reader.at == reader.words.len()).then_some(verdict)
}

/// Reads an expression; AND binds closer than OR.
struct Reader<'a> {
    words: Vec<&'a str>,
    at: usize,
    allowed: &'a BTreeSet<String>,
}

impl Reader<'_> {
    fn any_of(&mut self, depth: u8) -> Option<bool> {
        let mut verdict = self.all_of(depth)?;
        while self.take("OR") {
            verdict |= self.all_of(depth)?;
        }
        Some(verdict)
    }

    fn all_of(&mut self, depth: u8) -> Option<bool> {
        let mut verdict = self.one(depth)?;
        while self.take("AND") {
            verdict &= self.one(depth)?;
        }
        Some(verdict)
    }

    fn one(&mut self, depth: u8) -> Option<bool> {
        if self.take("(") {
            let verdict = self.any_of(depth.checked_sub(1)?)?;
            return self.take(")").then_some(verdict);
        }
        let mut licence = self.word()?.to_owned();
        if self.take("WITH") {
            licence = format!("{licence} WITH {}", self.word()?);
        }
        Some(self.allowed.contains(&licence))
    }

    fn take(&mut self, word: &str) -> bool {
        let found = self.words.get(self.at) == Some(&word);
        self.at += usize::from(found);
        found
    }

    fn word(&mut self) -> Option<&str> {
        let word =
            self.words.get(self.at).filter(|word| !matches!(**word, "AND" | "OR" | "WITH" | "(" | ")"))?;
        self.at += 1;
        Some(word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(expression: &str) -> Option<bool> {
        let allowed = ["MIT", "Apache-2.0", "Unicode-3.0", "Apache-2.0 WITH LLVM-exception"];
        satisfied(expression, &allowed.map(str::to_owned).into())
    }

    fn package(name: &str, version: &str) -> Package {
        let source = Some("registry+https://example.org/index".to_owned());
        Package { name: name.into(), version: version.into(), license: Some("MIT".into()), source }
    }

    fn policy(skip: &[&str]) -> Policy {
        let skip = skip.iter().map(|spec| Skip { spec: (*spec).into(), reason: "why".into() }).collect();
        Policy {
            licenses: Licenses { allow: ["MIT".to_owned()].into() },
            bans: Bans { skip },
            sources: Sources { allow_registry: vec!["https://example.org/index".into()] },
        }
    }

    #[test]
    fn expressions_are_judged_as_spdx_says() {
        for (expression, expected) in [
            ("MIT", Some(true)),
            ("GPL-3.0-only", Some(false)),
            ("MIT OR GPL-3.0-only", Some(true)),
            ("MIT AND GPL-3.0-only", Some(false)),
            ("MIT/Apache-2.0", Some(true)),
            ("GPL-2.0/LGPL-2.1", Some(false)),
            ("(MIT OR GPL-2.0) AND Unicode-3.0", Some(true)),
            ("GPL-2.0 OR MIT AND GPL-3.0-only", Some(false)),
            ("(GPL-2.0 OR MIT) AND (Unicode-3.0)", Some(true)),
            ("Apache-2.0 WITH LLVM-exception OR GPL-2.0", Some(true)),
            ("Apache-2.0 WITH Other-exception", Some(false)),
            ("GPL-2.0 WITH LLVM-exception", Some(false)),
            ("mit", Some(false)),
            ("", None),
            ("MIT OR", None),
            ("OR MIT", None),
            ("MIT MIT", None),
            ("(MIT", None),
            ("MIT)", None),
            ("MIT WITH", None),
            ("MIT / / MIT", None),
        ] {
            assert_eq!(verdict(expression), expected, "{expression:?}");
        }
        assert_eq!(verdict(&format!("{}MIT{}", "(".repeat(1000), ")".repeat(1000))), None);
    }

    #[test]
    fn a_second_version_needs_an_exception_and_an_exception_a_second_version() {
        let two = [package("syn", "2.0.1"), package("syn", "3.0.0"), package("a", "1.0.0")];
        assert_eq!(faults(&policy(&["syn:2"]), &two), [] as [String; 0]);
        assert_eq!(faults(&policy(&["syn:2.0.1"]), &two), [] as [String; 0]);
        assert_eq!(faults(&policy(&[]), &two), ["syn is there at several versions: 2.0.1, 3.0.0"]);
        let fault = "the exception for a:1 is not needed, or says no reason";
        assert_eq!(faults(&policy(&["syn:2", "a:1"]), &two), [fault]);
        assert_eq!(faults(&policy(&["syn"]), &two).len(), 2, "without a version it would forgive all");
        assert!(!is_version("20.0.0", "2"));
    }

    #[test]
    fn a_crate_without_a_licence_or_from_elsewhere_is_a_fault() {
        let mut odd = package("odd", "1.0.0");
        (odd.license, odd.source) = (None, Some("git+https://example.org/odd".into()));
        let mut own = package("own", "1.0.0");
        own.source = None;
        assert_eq!(
            faults(&policy(&[]), &[odd, own]),
            ["odd 1.0.0 states no licence", "odd 1.0.0 comes from git+https://example.org/odd"]
        );
    }

    #[test]
    fn the_rules_of_this_house_can_be_read_and_allow_no_copyleft() {
        let policy = read_policy(&root().join("deny.toml")).unwrap();
        assert!(policy.licenses.allow.contains("MIT") && policy.licenses.allow.contains("Apache-2.0"));
        for binding in ["GPL", "LGPL", "AGPL", "MPL", "EUPL", "CDDL"] {
            assert!(!policy.licenses.allow.iter().any(|licence| licence.starts_with(binding)), "{binding}");
        }
        assert!(policy.bans.skip.iter().all(|skip| skip.spec.contains(':') && !skip.reason.is_empty()));
    }
}
