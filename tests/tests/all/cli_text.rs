//! What people read, without a VM: every help text and every message that needs none, as golden files; the
//! JSON that programs read; exit codes.
//!
//! `UPDATE_GOLDEN=1` writes the files anew; then `git diff` shows what a user would see change.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::lab::{Cli, Run};

use crate::support::assert_says;

/// The width that texts are wrapped to, whatever terminal the test runs in.
const WIDTH: (&str, &str) = ("COLUMNS", "100");

fn cli() -> Result<Cli> {
    // Times are shown in the local zone.
    Ok(Cli::new()?.env(WIDTH.0, WIDTH.1).env("TZ", "UTC"))
}

/// Compares `text` with the golden file, or writes it.
fn golden(name: &str, text: &str) -> Result<()> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1") {
        return Ok(std::fs::write(&file, text)?);
    }
    let known = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let differs = known.lines().zip(text.lines()).position(|(known, now)| known != now);
    let line = differs.unwrap_or_else(|| known.lines().count().min(text.lines().count()));
    ensure!(
        known == text,
        "{}:{}: known {:?}, now {:?}; if that is meant, run the test with UPDATE_GOLDEN=1",
        file.display(),
        line + 1,
        known.lines().nth(line),
        text.lines().nth(line)
    );
    Ok(())
}

/// Runs a command line as a person would type it, without quotes.
async fn run(cli: &Cli, line: &str) -> Result<Run> {
    cli.run(line.split_whitespace()).await
}

#[tokio::test]
async fn every_help_text_is_the_golden_one() -> Result<()> {
    let cli = cli()?;
    let mut text = String::new();
    let mut commands = vec![String::new()];
    while let Some(command) = commands.pop() {
        let help = run(&cli, &format!("{command} --help")).await?;
        help.ok()?;
        let words = help.stdout.lines().skip_while(|line| *line != "Commands:").skip(1);
        let below =
            words.take_while(|line| !line.is_empty()).filter_map(|line| line.split_whitespace().next());
        let below = below.filter(|word| *word != "help").map(|word| format!("{command} {word}"));
        let below: Vec<String> = below.collect();
        commands.extend(below.into_iter().rev());
        let own = match help.stdout.split_once("\nOptions of every command:") {
            Some((own, common)) if !command.is_empty() => {
                ensure!(common.contains("--json"), "{command}: {common}");
                own
            }
            _ => &help.stdout,
        };
        writeln!(text, "$ snapctl{command} --help\n{own}")?;
    }
    ensure!(text.matches("\n$ snapctl").count() > 20, "too few commands are found:\n{text}");
    golden("help.txt", &text)
}

/// Lines in order: each sees what those before it left.
const LINES: &str = "\
    list
    list vm1
    create vm1
    recover
    vm list
    vm discover --json extra
    creat vm1
    create
    create vm1 --quiesce=maybe
    create vm1 --max-freeze 1h
    create vm1 --max-freeze 0s
    create vm1 --max-freeze soon
    create vm1 --label red
    create vm1 --method thin
    create .hidden
    create vm1 --name a/b
    create vm1 --timeout -1
    vm add vm1
    vm add vm1 --qmp ROOT/qmp
    vm add vm1 --qmp ROOT/qmp --agent ROOT/qga --offline
    vm add vm1 --qmp ROOT/qmp --agent ROOT/qga --offline
    vm add vm1 --qmp ROOT/other --offline
    vm add vm2 --qmp ROOT/qmp2 --offline
    vm list
    vm show vm1
    create vm3
    create vm1
    create vm1 --quiesce
    create vm1 --dry-run
    show vm1 latest
    show vm1 20
    list vm1
    tree vm1
    check vm1
    disk list vm1
    disk path vm1 vda
    recover vm1
    guest status vm1
    guest call vm1 guest-info {
    vm call vm1 query-status [1]
    vm call vm1 query-status
    vm remove vm3
    vm remove vm1
    vm remove vm1
    list vm1
    version
    --version
    --wait
    ";

#[tokio::test]
async fn every_message_without_a_vm_is_the_golden_one() -> Result<()> {
    let cli = cli()?;
    let root = cli.root().display().to_string();
    let mut text = String::new();
    for line in LINES.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let run = run(&cli, &line.replace("ROOT", &root)).await?;
        let said = [run.stdout.as_str(), &run.stderr].concat().replace(&root, "ROOT");
        let said = said.replace(concat!("snapctl ", env!("CARGO_PKG_VERSION")), "snapctl VERSION");
        ensure!(!said.contains("panicked"), "{run:?}");
        writeln!(text, "$ snapctl {line}    # exits {}\n{said}", run.code)?;
    }
    golden("messages.txt", &text)
}

#[tokio::test]
async fn a_definition_that_cannot_be_understood_is_told_with_its_file() -> Result<()> {
    let cli = cli()?;
    let dir = cli.root().join("etc/snapctl/vms");
    std::fs::create_dir_all(&dir)?;
    for (text, says) in [
        ("qpm = \"/q\"", "unknown field `qpm`"),
        ("qmp = \"run/qmp\"", "not an absolute path"),
        ("qmp = \"/q\"\nagent = 7", "line 2: invalid type"),
        ("\u{1b}[2J", "line 1: "),
        ("qmp = \"/q\"\n\"\\u001b[2J\" = 1", "line 2: unknown field `\\u{1b}[2J`"),
    ] {
        std::fs::write(dir.join("vm1.toml"), text)?;
        let run = run(&cli, "create vm1").await?;
        assert_says(&run.expect_code(2)?.stderr, &["vm1.toml", says]);
        ensure!(!run.stderr.contains('\u{1b}'), "{run:?}");
    }
    // What cannot be understood can still be listed and removed.
    assert_says(&run(&cli, "vm list").await?.ok()?.stdout, &["vm1"]);
    run(&cli, "vm remove vm1").await?.ok()?;
    Ok(())
}

#[tokio::test]
async fn json_documents_have_a_schema_and_errors_are_documents_too() -> Result<()> {
    let cli = cli()?;
    let document = async |line: &str, code: i32| run(&cli, line).await?.expect_code(code)?.json();
    assert_eq!(
        document("list --json", 0).await?,
        json!({ "schema": "snapctl.snapshots/1", "snapshots": [] })
    );
    assert_eq!(document("vm list --json", 0).await?, json!({ "schema": "snapctl.vms/1", "vms": [] }));
    assert_eq!(
        document("recover --json", 0).await?,
        json!({ "schema": "snapctl.recover/1", "recovered": [], "networks": [], "failed": [] })
    );
    let version = document("version --json", 0).await?;
    assert_eq!(keys(&version), ["schema", "version"]);
    assert_eq!(version["schema"], "snapctl.version/1");
    for (line, code) in [("create vm1 --json", 6), ("--json list vm1", 6), ("show vm1 latest --json", 6)] {
        let error = document(line, code).await?;
        assert_eq!(keys(&error), ["error", "schema"]);
        assert_eq!(error["schema"], "snapctl.error/1");
        assert_eq!(keys(&error["error"]), ["exit_code", "hint", "message"]);
        assert_eq!(error["error"]["exit_code"], code);
        assert_eq!(error["error"]["message"], "there is no VM named vm1");
    }
    let missing = cli.root().join("qmp").display().to_string();
    run(&cli, &format!("vm add vm1 --qmp {missing} --offline")).await?.ok()?;
    let error = document("create vm1 --json", 9).await?;
    assert_says(error["error"]["message"].as_str().context("message")?, &["not running", &missing]);
    let shown = document("vm show vm1 --json", 0).await?;
    assert_eq!(keys(&shown), ["agent", "definition", "disks", "schema", "snapshots", "status", "vm"]);
    Ok(())
}

/// The members of an object, in the order of the alphabet.
fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
    keys.sort_unstable();
    keys
}

#[tokio::test]
async fn quiet_keeps_hints_and_notes_to_itself() -> Result<()> {
    let cli = cli()?;
    let loud = run(&cli, "create vm1").await?;
    assert_says(&loud.expect_code(6)?.stderr, &["snapctl: there is no VM named vm1", "hint: "]);
    let quiet = run(&cli, "-q create vm1").await?;
    assert_eq!(quiet.expect_code(6)?.stderr, "snapctl: there is no VM named vm1\n");
    assert_eq!(run(&cli, "list").await?.ok()?.stderr, "no snapshots\n");
    assert_eq!(run(&cli, "list -q").await?.ok()?.stderr, "");
    Ok(())
}

/// `snapctl ... | head -1`: the reader goes away, and nobody complains.
#[tokio::test]
async fn a_reader_who_goes_away_is_no_fault() -> Result<()> {
    let cli = cli()?;
    run(&cli, &format!("vm add vm1 --qmp {} --offline", cli.root().join("qmp").display())).await?.ok()?;
    for line in
        ["vm list", "vm list --json", "version", "doctor", "completions bash", "--help", "create --help"]
    {
        let mut child = cli.spawn(line.split(' '), &[])?;
        drop(child.stdout.take());
        let output = child.wait_with_output().await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(said.is_empty(), "{line}: {said}");
        ensure!([Some(0), Some(1)].contains(&output.status.code()), "{line}: {:?}", output.status);
    }
    Ok(())
}

#[tokio::test]
async fn a_name_with_an_escape_sequence_reaches_no_terminal() -> Result<()> {
    let cli = cli()?;
    let lines: [&[&str]; 5] = [
        &["create", "vm\u{1b}[2J"],
        &["create", "vm1", "--name", "\u{1b}]0;x\u{7}"],
        &["create", "vm1", "--label", "\u{1b}[2J"],
        &["show", "vm1", "\u{1b}[2J"],
        &["\u{1b}[2J"],
    ];
    for line in lines {
        let run = cli.run(line.iter().copied()).await?;
        ensure!([2, 6].contains(&run.code), "{run:?}");
        ensure!(!run.stderr.contains('\u{1b}') && !run.stderr.contains('\u{7}'), "{run:?}");
    }
    Ok(())
}

#[tokio::test]
async fn state_that_cannot_be_used_is_told_with_its_file() -> Result<()> {
    let cli = cli()?;
    let state = cli.root().join("var/lib/snapctl");
    std::fs::create_dir_all(&state)?;
    let database: PathBuf = state.join("state.db");
    std::fs::write(&database, "this is no database, and was never one; it is a text of some length")?;
    let said = run(&cli, "list").await?;
    assert_says(&said.expect_code(1)?.stderr, &["state.db", "not a database"]);
    std::fs::remove_file(&database)?;
    std::fs::create_dir(&database)?;
    assert_says(&run(&cli, "list").await?.expect_code(1)?.stderr, &["state.db"]);
    Ok(())
}
