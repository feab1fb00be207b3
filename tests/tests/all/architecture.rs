//! The floors: what `docs/` promises about the workspace, against what cargo knows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// Where a crate stands: on a floor, or outside the house (`tests`, `xtask`).
type Floors = BTreeMap<String, Option<u8>>;

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

/// Of any kind: a test that imports upwards is an import too.
#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// Set for a crate of the workspace.
    path: Option<PathBuf>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(root().join(path)).context(path.to_owned())
}

fn packages() -> Result<Vec<Package>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--format-version=1", "--offline"])
        .current_dir(root())
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice::<Metadata>(&output.stdout)?.packages)
}

/// The cells of the rows of all tables in `text`, without heads and rulers.
fn rows(text: &str) -> Vec<Vec<&str>> {
    let lines: Vec<&str> = text.lines().collect();
    let is_ruler = |line: &str| line.starts_with("| ---");
    let is_row = |at: &usize| {
        let next_is_ruler = lines.get(at + 1).is_some_and(|line| is_ruler(line));
        lines[*at].starts_with('|') && !is_ruler(lines[*at]) && !next_is_ruler
    };
    let cells = |at: usize| lines[at].trim_matches('|').split('|').map(str::trim).collect();
    (0..lines.len()).filter(is_row).map(cells).collect()
}

/// The crate that a cell names in backquotes, if it names one and nothing else.
fn crate_name(cell: &str) -> Option<String> {
    let name = cell.strip_prefix('`')?.strip_suffix('`')?;
    name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)).then(|| name.to_owned())
}

fn section<'a>(text: &'a str, heading: &str) -> Result<&'a str> {
    let (_, rest) = text.split_once(&format!("\n{heading}\n")).with_context(|| format!("no {heading:?}"))?;
    Ok(rest.split_once("\n## ").map_or(rest, |(section, _)| section))
}

fn floors(text: &str) -> Result<Floors> {
    let mut floors = Floors::new();
    for row in rows(text) {
        let [floor, name, ..] = row[..] else { continue };
        let name = crate_name(name).with_context(|| format!("{name} is no crate"))?;
        let floor = match floor {
            "–" => None,
            number => Some(number.parse().with_context(|| format!("floor {number} of {name}"))?),
        };
        ensure!(floors.insert(name.clone(), floor).is_none(), "{name} is there twice");
    }
    Ok(floors)
}

/// Every crate that the table lacks, and every import that does not go down.
fn faults(floors: &Floors, packages: &[Package]) -> Vec<String> {
    let mut faults = Vec::new();
    for package in packages {
        let Some(own) = floors.get(&package.name) else {
            faults.push(format!("{} has no floor", package.name));
            continue;
        };
        for import in package.dependencies.iter().filter(|import| import.path.is_some()) {
            let fine = match (own, floors.get(&import.name).copied().flatten()) {
                (Some(own), Some(other)) => other < *own,
                (Some(_), None) => false,
                (None, Some(_)) => true,
                // `xtask` boots the lab's guests; nobody needs `xtask`.
                (None, None) => import.name == "tests",
            };
            if !fine {
                faults.push(format!("{} imports {}", package.name, import.name));
            }
        }
    }
    let there: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let gone = floors.keys().filter(|name| !there.contains(name.as_str()));
    faults.extend(gone.map(|name| format!("{name} is in the table and not in the workspace")));
    faults
}

#[test]
fn imports_go_down() -> Result<()> {
    let text = read("docs/architecture.md")?;
    let floors = floors(section(&text, "## Rooms")?)?;
    let packages = packages()?;
    assert!(packages.len() >= 11, "cargo lists {} crates", packages.len());
    assert_eq!(faults(&floors, &packages), [] as [String; 0]);
    Ok(())
}

#[test]
fn imports_up_beside_and_from_outside_are_found() -> Result<()> {
    let table = "| floor | crate |\n| --- | --- |\n| 3 | `up` |\n| 2 | `a` |\n| 2 | `b` |\n| 1 | `low` |\n\
                 | – | `tests` |\n| – | `xtask` |\n| 1 | `gone` |\n";
    let package = |name: &str, imports: &[&str]| Package {
        name: name.into(),
        dependencies: imports
            .iter()
            .map(|import| Dependency { name: (*import).into(), path: Some(PathBuf::new()) })
            .collect(),
    };
    let packages = [
        package("up", &["a", "b", "low"]),
        package("a", &["up", "b", "low", "tests"]),
        package("b", &[]),
        package("low", &["new"]),
        package("tests", &["up", "low", "xtask"]),
        package("xtask", &["tests", "a"]),
        package("new", &[]),
    ];
    assert_eq!(
        faults(&floors(table)?, &packages),
        [
            "a imports up",
            "a imports b",
            "a imports tests",
            "low imports new",
            "tests imports xtask",
            "new has no floor",
            "gone is in the table and not in the workspace",
        ]
    );
    Ok(())
}

#[test]
fn every_crate_from_outside_has_its_reason() -> Result<()> {
    let text = read("docs/decisions/0006-crates.md")?;
    let reasons: BTreeSet<String> =
        rows(&text).into_iter().filter_map(|row| crate_name(row.first()?)).collect();
    let packages = packages()?;
    let imports = packages.iter().flat_map(|package| &package.dependencies);
    let used: BTreeSet<&str> =
        imports.filter(|import| import.path.is_none()).map(|import| import.name.as_str()).collect();
    let unexplained: Vec<_> = used.iter().filter(|name| !reasons.contains(**name)).collect();
    assert!(unexplained.is_empty(), "without a line in record 6: {unexplained:?}");
    let manifest = read("Cargo.toml")?;
    let gone: Vec<_> = reasons.iter().filter(|name| !manifest.contains(&format!("\n{name} = "))).collect();
    assert!(gone.is_empty(), "a line in record 6 and not in Cargo.toml: {gone:?}");
    Ok(())
}
