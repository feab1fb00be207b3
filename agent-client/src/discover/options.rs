//! The syntax of QEMU's options: `a=b,c=d` with its habits, and JSON.
//!
//! Source: QEMU util/qemu-option.c `opts_do_parse`; qobject/qdict.c `qdict_flatten`.

use serde_json::Value;

use crate::error::printable;

/// Longest key of an option; longer ones are none of QEMU's.
const MAX_KEY: usize = 64;

/// Longest text of another process that is kept, in characters.
const MAX_TEXT: usize = 200;

/// The value of an option as keys and values, in order; nested JSON has dotted keys.
pub(super) struct Options(pub(super) Vec<(Vec<u8>, Vec<u8>)>);

impl Options {
    /// Reads `a=b,c=d`, where `,,` stands for a comma and the first key may be left out, or a JSON object.
    pub(super) fn parse(value: &[u8], implied: &str) -> Self {
        if value.first() == Some(&b'{') {
            let mut pairs = Vec::new();
            flatten(serde_json::from_slice(value).unwrap_or_default(), "", &mut pairs);
            return Self(pairs);
        }
        Self::parse_text(value, implied)
    }

    fn parse_text(mut rest: &[u8], implied: &str) -> Self {
        let mut pairs = Vec::new();
        while !rest.is_empty() {
            let equals = rest.iter().position(|byte| *byte == b'=').unwrap_or(rest.len());
            let comma = rest.iter().position(|byte| *byte == b',').unwrap_or(rest.len());
            let (pair, left) = if equals < comma {
                let (value, left) = take_value(&rest[equals + 1..]);
                ((rest[..equals].to_vec(), value), left)
            } else if pairs.is_empty() {
                let (value, left) = take_value(rest);
                ((implied.as_bytes().to_vec(), value), left)
            } else {
                (flag(&rest[..comma]), rest.get(comma + 1..).unwrap_or_default())
            };
            pairs.push(pair);
            rest = left;
        }
        Self(pairs)
    }

    /// The last value of a key, as QEMU takes it.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        self.0.iter().rev().find(|(name, _)| name == key.as_bytes()).map(|(_, value)| value.as_slice())
    }

    pub(super) fn text(&self, key: &str) -> Option<String> {
        self.get(key).map(text)
    }

    pub(super) fn switch(&self, key: &str) -> bool {
        matches!(self.get(key), Some(b"on" | b"yes" | b"true" | b"y"))
    }

    pub(super) fn has_prefix(&self, prefix: &str) -> bool {
        self.0.iter().any(|(name, _)| name.starts_with(prefix.as_bytes()))
    }
}

/// Makes text of an option fit to be shown.
pub(super) fn text(bytes: &[u8]) -> String {
    printable(&String::from_utf8_lossy(bytes), MAX_TEXT)
}

/// Takes a value up to the first single comma; returns it and what follows the comma.
fn take_value(bytes: &[u8]) -> (Vec<u8>, &[u8]) {
    let mut value = Vec::new();
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        if *byte == b',' {
            if bytes.get(at + 1) != Some(&b',') {
                return (value, &bytes[at + 1..]);
            }
            at += 1;
        }
        value.push(*byte);
        at += 1;
    }
    (value, &[])
}

/// A key without a value is a switch; an older habit puts `no` before it to turn it off.
fn flag(key: &[u8]) -> (Vec<u8>, Vec<u8>) {
    match key.strip_prefix(b"no") {
        Some(rest) => (rest.to_vec(), b"off".to_vec()),
        None => (key.to_vec(), b"on".to_vec()),
    }
}

/// Writes a JSON value as keys and values. serde_json's own limit on depth bounds the recursion.
fn flatten(value: Value, key: &str, pairs: &mut Vec<(Vec<u8>, Vec<u8>)>) {
    if key.len() > MAX_KEY {
        return;
    }
    let leaf = match value {
        Value::Object(map) => {
            for (name, value) in map {
                let dotted = if key.is_empty() { name } else { format!("{key}.{name}") };
                flatten(value, &dotted, pairs);
            }
            return;
        }
        Value::String(text) => text,
        Value::Bool(yes) => if yes { "on" } else { "off" }.into(),
        Value::Number(number) => number.to_string(),
        Value::Null | Value::Array(_) => return,
    };
    pairs.push((key.as_bytes().to_vec(), leaf.into_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_as_qemu_reads_them() {
        let pairs = |value: &str| {
            let options = Options::parse(value.as_bytes(), "id").0;
            options.iter().map(|(name, value)| format!("{}={}", text(name), text(value))).collect::<Vec<_>>()
        };
        assert_eq!(pairs("a,b=c"), ["id=a", "b=c"]);
        assert_eq!(pairs("a,,b,c=d,,e,f"), ["id=a,b", "c=d,e", "f=on"]);
        assert_eq!(pairs("x=1,nowait"), ["x=1", "wait=off"]);
        assert_eq!(pairs("x==,=y"), ["x==", "=y"]);
        assert_eq!(pairs(""), [] as [String; 0]);
        assert_eq!(pairs(r#"{"a":{"b":true,"c":[1]},"d":7}"#), ["a.b=on", "d=7"]);
        assert_eq!(pairs("{not json"), [] as [String; 0]);
    }

    #[test]
    fn a_hostile_value_costs_little() {
        let key = "k".repeat(1 << 20);
        let leaves: String = (0..100_000).map(|n| format!("\"{n}\":1,")).collect();
        let json = format!("{{\"{key}\":{{{leaves}\"x\":1}}}}");
        assert!(Options::parse(json.as_bytes(), "").0.is_empty());
    }
}
