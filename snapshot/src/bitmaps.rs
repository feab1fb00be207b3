//! Dirty bitmaps follow the disk: they are on its active layer, and on no layer below.
//!
//! A bitmap belongs to a node. When an overlay takes the place of the active layer it gets a bitmap of the same name
//! that holds what the old one holds, in the same transaction, so that nothing is missed between the two. When the active
//! layer is committed down, its bitmaps go down with it. One that was left behind below would speak of another time when its
//! layer is written to again, so that none is.
//!
//! After a revert a disk has none: what its new active layer differs in from a backup is not known, and the next backup reads
//! everything.

use std::cell::Cell;

use agent_client::{BitmapOfNode, BlockNode, DirtyBitmap, Qmp, Transaction, TransactionAction};
use serde::{Deserialize, Serialize};

use crate::error::StepError;
use crate::jobs::tell;

/// A dirty bitmap that follows its disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapPlan {
    /// Its name.
    pub name: String,
    /// Bytes for each bit.
    pub granularity: u32,
    /// Whether it is kept in the image when QEMU ends.
    pub persistent: bool,
    /// Whether it records writes.
    pub recording: bool,
}

/// Those that follow: the ones that somebody named. What an inconsistent one should hold nobody knows.
pub(crate) fn following(bitmaps: &[DirtyBitmap]) -> Vec<BitmapPlan> {
    let follows = |bitmap: &DirtyBitmap| {
        let name = bitmap.name.clone().filter(|_| !bitmap.inconsistent)?;
        let DirtyBitmap { granularity, persistent, recording, .. } = *bitmap;
        Some(BitmapPlan { name, granularity, persistent, recording })
    };
    bitmaps.iter().filter_map(follows).collect()
}

/// One that something uses, so that it cannot follow now.
pub(crate) fn busy(bitmaps: &[DirtyBitmap]) -> Option<&str> {
    bitmaps.iter().find(|bitmap| bitmap.busy).map(|bitmap| bitmap.name.as_deref().unwrap_or("(unnamed)"))
}

impl BitmapPlan {
    /// Moves it from one node to another.
    pub(crate) fn moved(&self, from: &str, to: &str) -> [TransactionAction; 3] {
        let [add, merge] = self.copied(from, to, self.persistent);
        [add, merge, removed(from, &self.name)]
    }

    fn copied(&self, from: &str, to: &str, persistent: bool) -> [TransactionAction; 2] {
        let (node, name) = (to.to_owned(), self.name.clone());
        let source = BitmapOfNode { node: from.to_owned(), name: name.clone() };
        let add = TransactionAction::BlockDirtyBitmapAdd {
            node: node.clone(),
            name: name.clone(),
            granularity: self.granularity,
            persistent,
            disabled: !self.recording,
        };
        [add, TransactionAction::BlockDirtyBitmapMerge { node, target: name, bitmaps: vec![source] }]
    }
}

fn removed(node: &str, name: &str) -> TransactionAction {
    TransactionAction::BlockDirtyBitmapRemove { node: node.to_owned(), name: name.to_owned() }
}

/// The bitmaps of an active layer that is committed down.
#[derive(Debug, Default)]
pub(crate) struct Descent {
    top: String,
    base: String,
    /// What the lower layer has, which speaks of another time.
    stale: Vec<String>,
    following: Vec<BitmapPlan>,
    /// They are there, as they were then: the guest may have written since.
    arrived: Cell<bool>,
}

impl Descent {
    /// What there is to do when the layer of node `top` is committed into that of node `base`.
    pub fn new(nodes: &[BlockNode], top: &str, base: &str) -> Self {
        let of = |name: &str| {
            let node = nodes.iter().find(|node| node.node_name.as_deref() == Some(name));
            node.map(|node| node.dirty_bitmaps.as_slice()).unwrap_or_default()
        };
        Self {
            top: top.to_owned(),
            base: base.to_owned(),
            stale: of(base).iter().filter_map(|bitmap| bitmap.name.clone()).collect(),
            following: following(of(top)),
            arrived: Cell::new(false),
        }
    }

    /// Lets the bitmaps of the lower layer be those of the upper one. Nothing writes to either meanwhile.
    pub async fn carry_out(&self, qmp: &Qmp) -> Result<(), StepError> {
        for persistent in [true, false] {
            let actions = self.actions(persistent);
            if actions.is_empty() {
                return Ok(());
            }
            match qmp.execute(&Transaction { actions }).await {
                Ok(_) => {
                    self.arrived.set(true);
                    return Ok(());
                }
                // A raw image, or an old qcow2, keeps none.
                Err(fault) if fault.is_refusal() => tracing::debug!("bitmaps of {}: {fault}", self.top),
                Err(fault) => return Err(fault.into()),
            }
        }
        tracing::warn!("the dirty bitmaps of {} cannot follow; the next backup reads everything", self.top);
        let actions: Vec<TransactionAction> = self.present().map(|name| removed(&self.base, name)).collect();
        if actions.is_empty() { Ok(()) } else { tell(qmp, &Transaction { actions }).await }
    }

    fn actions(&self, persistent: bool) -> Vec<TransactionAction> {
        let removals = self.present().map(|name| removed(&self.base, name));
        let copies = self
            .following
            .iter()
            .flat_map(|bitmap| bitmap.copied(&self.top, &self.base, persistent && bitmap.persistent));
        removals.chain(copies).collect()
    }

    /// What is on the lower layer now.
    fn present(&self) -> impl Iterator<Item = &str> {
        let arrived = self.arrived.get();
        let stale = self.stale.iter().map(String::as_str).filter(move |_| !arrived);
        stale.chain(self.following.iter().map(|bitmap| bitmap.name.as_str()).filter(move |_| arrived))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, bitmaps: &Value) -> BlockNode {
        let image = json!({"filename": "/i", "format": "qcow2", "virtual-size": 1024});
        serde_json::from_value(
            json!({"node-name": name, "drv": "qcow2", "dirty-bitmaps": bitmaps, "image": image}),
        )
        .unwrap()
    }

    fn bitmap(name: &str) -> Value {
        json!({"name": name, "granularity": 65536, "recording": true, "busy": false, "persistent": true})
    }

    fn words(actions: &[TransactionAction]) -> Vec<String> {
        let word = |action: &TransactionAction| {
            let action = serde_json::to_value(action).unwrap();
            let name =
                [&action["data"]["name"], &action["data"]["target"]].into_iter().find_map(Value::as_str);
            let kind = action["type"].as_str().unwrap().replace("block-dirty-bitmap-", "");
            format!("{kind} {} {}", action["data"]["node"].as_str().unwrap(), name.unwrap())
        };
        actions.iter().map(word).collect()
    }

    #[test]
    fn a_bitmap_moves_up_with_what_it_holds() {
        let plan = following(node("a", &json!([bitmap("daily")])).dirty_bitmaps.as_slice()).remove(0);
        assert_eq!(words(&plan.moved("a", "b")), ["add b daily", "merge b daily", "remove a daily"]);
    }

    #[test]
    fn unnamed_and_inconsistent_ones_stay_and_busy_ones_are_found() {
        let mut lost = bitmap("lost");
        lost["inconsistent"] = json!(true);
        let mut used = bitmap("used");
        used["busy"] = json!(true);
        let unnamed = json!({"granularity": 65536, "recording": true, "busy": false, "persistent": false});
        let bitmaps = node("a", &json!([lost, unnamed, used])).dirty_bitmaps;
        let names: Vec<String> = following(&bitmaps).into_iter().map(|bitmap| bitmap.name).collect();
        assert_eq!((names.as_slice(), busy(&bitmaps)), (["used".to_owned()].as_slice(), Some("used")));
    }

    #[test]
    fn what_goes_down_takes_the_place_of_what_was_left_there_also_a_second_time() {
        let nodes = [
            node("t", &json!([bitmap("new"), bitmap("both")])),
            node("b", &json!([bitmap("old"), bitmap("both")])),
        ];
        let descent = Descent::new(&nodes, "t", "b");
        let copies = ["add b new", "merge b new", "add b both", "merge b both"];
        let first: Vec<&str> = ["remove b old", "remove b both"].into_iter().chain(copies).collect();
        assert_eq!(words(&descent.actions(true)), first);
        descent.arrived.set(true);
        let second: Vec<&str> = ["remove b new", "remove b both"].into_iter().chain(copies).collect();
        assert_eq!(words(&descent.actions(true)), second);
    }
}
