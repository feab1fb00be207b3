//! `snapctl prune` and `protect` on a real guest.

use anyhow::{Result, ensure};
use tests::lab::{self, Guest};

use crate::support::{Scene, assert_says, two_disks};

#[tokio::test]
async fn what_no_rule_keeps_goes_and_what_is_protected_stays() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    for name in ["a", "b", "c", "d"] {
        scene.guest.wait_records(2).await?;
        scene.run(&format!("create vm1 --name {name} --label name={name}")).await?.ok()?;
    }
    assert_says(&scene.run("protect vm1 a").await?.ok()?.stdout, &["a is now protected"]);
    assert_says(&scene.run("protect vm1 a").await?.ok()?.stdout, &["a is already protected"]);
    assert_says(&scene.run("list vm1").await?.ok()?.stdout, &["a (protected)"]);
    let refused = scene.run("delete vm1 b a").await?;
    assert_says(
        &refused.expect_code(7)?.stderr,
        &["snapshot a of vm1 is protected", "snapctl unprotect vm1 a"],
    );
    ensure!(scene.names().await? == ["a", "b", "c", "d"], "a refusal deleted something");

    let planned = scene.run("prune vm1 --keep-last 1 --keep-label name=b --dry-run").await?;
    let words = ["keep    d", "last", "delete  c", "label name=b", "protected", "1 would be deleted, 3 kept"];
    assert_says(&planned.ok()?.stdout, &words);
    ensure!(scene.names().await?.len() == 4, "a dry run did it");
    let pruned = scene.run("prune vm1 --keep-last 1 --keep-label name=b --json").await?.ok()?.json()?;
    ensure!(pruned["pruned"] == true && pruned["snapshots"][0]["kept_for"][0] == "last", "{pruned}");
    ensure!(scene.names().await? == ["a", "b", "d"]);
    scene.assert_sound().await?;

    scene.run("unprotect vm1 a").await?.ok()?;
    assert_says(&scene.run("prune vm1 --keep-last 1").await?.ok()?.stdout, &["2 deleted, 1 kept"]);
    assert_says(&scene.run("prune vm1 --keep-last 1").await?.ok()?.stdout, &["nothing to prune, 1 kept"]);
    scene.assert_sound().await?;
    // Nothing is kept by no rule.
    let none = scene.run("prune vm1").await?;
    assert_says(&none.expect_code(2)?.stderr, &["--keep-last"]);
    Ok(())
}
