//! What one QEMU can do, read from `query-qmp-schema`.
//!
//! Options come and go between releases, so a recipe is chosen by what the running QEMU says of itself
//! and never by its version number. Tests validate every command that snapctl sends against the schema
//! of each supported QEMU with [`Schema::validate`].

use std::collections::HashMap;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::error::{Error, Excerpt, printable};

/// Depth at which [`Schema::validate`] stops descending. QAPI types refer to themselves.
const MAX_DEPTH: usize = 32;

/// The schema of one QEMU.
///
/// Source: qapi/introspect.json; docs/devel/qapi-code-gen.rst, "Client JSON Protocol introspection".
#[derive(Debug)]
pub struct Schema {
    entities: HashMap<String, Entity>,
}

/// How a command does not fit a schema.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {fault}")]
pub struct Mismatch {
    /// Where: the command's name and the members below it, joined by dots.
    pub at: String,
    /// What does not fit.
    pub fault: String,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "meta-type", rename_all = "kebab-case")]
enum Entity {
    Builtin {
        #[serde(rename = "json-type")]
        json_type: String,
    },
    Enum {
        values: Vec<String>,
    },
    Array {
        #[serde(rename = "element-type")]
        element_type: String,
    },
    Object {
        #[serde(default)]
        members: Vec<Member>,
        tag: Option<String>,
        #[serde(default)]
        variants: Vec<Variant>,
    },
    Alternate {
        members: Vec<AlternateMember>,
    },
    Command {
        #[serde(rename = "arg-type")]
        arg_type: String,
    },
    Event {},
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Deserialize)]
struct Member {
    name: String,
    #[serde(rename = "type")]
    type_name: String,
    /// Present, as null, where the member may be left out.
    #[serde(default, deserialize_with = "present")]
    default: bool,
}

#[derive(Debug, Deserialize)]
struct Variant {
    case: String,
    #[serde(rename = "type")]
    type_name: String,
}

#[derive(Debug, Deserialize)]
struct AlternateMember {
    #[serde(rename = "type")]
    type_name: String,
}

fn present<'de, D: Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
    serde::de::IgnoredAny::deserialize(from).map(|_| true)
}

impl<'de> Deserialize<'de> for Schema {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Named {
            name: String,
            #[serde(flatten)]
            entity: Entity,
        }
        let list = Vec::<Named>::deserialize(from)?;
        Ok(Self { entities: list.into_iter().map(|named| (named.name, named.entity)).collect() })
    }
}

impl Schema {
    /// Reads a schema from the text of a reply to `query-qmp-schema`.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if it is none.
    pub fn parse(text: &str) -> Result<Self, Error> {
        serde_json::from_str(text).map_err(|fault| Error::Unexpected {
            command: "query-qmp-schema".to_owned(),
            detail: printable(&fault.to_string(), 200),
            excerpt: Excerpt::of(text.as_bytes()),
        })
    }

    /// Whether there is a command of this name.
    pub fn has_command(&self, name: &str) -> bool {
        matches!(self.entities.get(name), Some(Entity::Command { .. }))
    }

    /// Whether there is an event of this name.
    pub fn has_event(&self, name: &str) -> bool {
        matches!(self.entities.get(name), Some(Entity::Event {}))
    }

    /// Whether `command` takes the argument `argument` at its top level.
    pub fn has_argument(&self, command: &str, argument: &str) -> bool {
        let Some(Entity::Command { arg_type }) = self.entities.get(command) else { return false };
        match self.entities.get(arg_type) {
            Some(Entity::Object { members, .. }) => members.iter().any(|member| member.name == argument),
            _ => false,
        }
    }

    /// Whether `arguments` (an object, or null for none) are what `command` takes: every member known and
    /// of its type, none missing.
    ///
    /// # Errors
    /// The first [`Mismatch`] in the order of the schema.
    pub fn validate(&self, command: &str, arguments: &Value) -> Result<(), Mismatch> {
        let Some(Entity::Command { arg_type }) = self.entities.get(command) else {
            return Err(Mismatch { at: command.to_owned(), fault: "there is no such command".into() });
        };
        let empty = Value::Object(serde_json::Map::new());
        let arguments = if arguments.is_null() { &empty } else { arguments };
        self.fits(arg_type, arguments, command, 0)
    }

    fn fits(&self, type_name: &str, value: &Value, at: &str, depth: usize) -> Result<(), Mismatch> {
        let fault = |fault: String| Err(Mismatch { at: at.to_owned(), fault });
        if depth > MAX_DEPTH {
            return fault("nested too deeply to be checked".into());
        }
        match self.entities.get(type_name) {
            Some(Entity::Builtin { json_type }) if is_json_type(value, json_type) => Ok(()),
            Some(Entity::Builtin { json_type }) => fault(format!("{value} is no {json_type}")),
            Some(Entity::Enum { values }) => match value.as_str() {
                Some(text) if values.iter().any(|known| known == text) => Ok(()),
                _ => fault(format!("{value} is none of {}", values.join(", "))),
            },
            Some(Entity::Array { element_type }) => match value.as_array() {
                Some(items) => items.iter().enumerate().try_for_each(|(n, item)| {
                    self.fits(element_type, item, &format!("{at}[{n}]"), depth + 1)
                }),
                None => fault(format!("{value} is no array")),
            },
            Some(Entity::Alternate { members }) => {
                let mut fits = members.iter().map(|m| self.fits(&m.type_name, value, at, depth + 1));
                if fits.any(|fit| fit.is_ok()) {
                    Ok(())
                } else {
                    fault(format!("{value} fits no alternative"))
                }
            }
            Some(Entity::Object { members, tag, variants }) => match value.as_object() {
                Some(object) => self.fits_object(members, tag.as_deref(), variants, object, at, depth),
                None => fault(format!("{value} is no object")),
            },
            Some(Entity::Command { .. } | Entity::Event {} | Entity::Unknown) | None => {
                fault(format!("the schema does not define the type {type_name}"))
            }
        }
    }

    fn fits_object(
        &self,
        members: &[Member],
        tag: Option<&str>,
        variants: &[Variant],
        object: &serde_json::Map<String, Value>,
        at: &str,
        depth: usize,
    ) -> Result<(), Mismatch> {
        let chosen = tag.and_then(|tag| object.get(tag)).and_then(Value::as_str);
        let variant = variants.iter().find(|variant| Some(variant.case.as_str()) == chosen);
        let more = match variant.map(|variant| self.entities.get(&variant.type_name)) {
            Some(Some(Entity::Object { members, tag, variants })) => Some((members, tag, variants)),
            _ => None,
        };
        let all = || members.iter().chain(more.iter().flat_map(|(members, ..)| members.iter()));
        for member in all() {
            let path = format!("{at}.{}", member.name);
            match object.get(&member.name) {
                Some(value) => self.fits(&member.type_name, value, &path, depth + 1)?,
                None if member.default => {}
                None => return Err(Mismatch { at: path, fault: "is missing".into() }),
            }
        }
        // A variant with variants of its own is checked whole; its members are then known there.
        if let Some((_, Some(tag), variants)) = more.filter(|(_, _, variants)| !variants.is_empty()) {
            return self.fits_object(&[], Some(tag), variants, object, at, depth + 1);
        }
        match object.keys().find(|key| !all().any(|member| member.name == **key)) {
            Some(unknown) => Err(Mismatch { at: format!("{at}.{unknown}"), fault: "is not known".into() }),
            None => Ok(()),
        }
    }
}

fn is_json_type(value: &Value, json_type: &str) -> bool {
    match json_type {
        "string" => value.is_string(),
        "number" => value.is_number(),
        "int" => value.is_i64() || value.is_u64(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        _ => json_type == "value",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Schema {
        serde_json::from_value(json!([
            {"name": "blockdev-add", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
            {"name": "1", "meta-type": "object", "members": [
                {"name": "driver", "type": "2"},
                {"name": "read-only", "type": "bool", "default": null}],
                "tag": "driver", "variants": [{"case": "file", "type": "3"}, {"case": "null-co", "type": "0"}]},
            {"name": "0", "meta-type": "object", "members": []},
            {"name": "2", "meta-type": "enum", "values": ["file", "null-co"], "members": []},
            {"name": "3", "meta-type": "object", "members": [{"name": "filename", "type": "str"}]},
            {"name": "str", "meta-type": "builtin", "json-type": "string"},
            {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
            {"name": "STOP", "meta-type": "event", "arg-type": "0"},
            {"name": "later", "meta-type": "something-new", "x": 1}
        ]))
        .unwrap()
    }

    #[test]
    fn knows_commands_events_and_arguments() {
        let schema = schema();
        assert!(schema.has_command("blockdev-add") && !schema.has_command("STOP"));
        assert!(schema.has_event("STOP") && !schema.has_event("blockdev-add"));
        assert!(schema.has_argument("blockdev-add", "read-only"));
        assert!(!schema.has_argument("blockdev-add", "later"));
    }

    #[test]
    fn says_where_arguments_do_not_fit() {
        let schema = schema();
        let check = |value| schema.validate("blockdev-add", &value).map_err(|m| m.to_string());
        assert_eq!(check(json!({"driver": "file", "filename": "x"})), Ok(()));
        assert_eq!(check(json!({"driver": "null-co", "read-only": true})), Ok(()));
        let faults = [
            (json!({"driver": "file"}), "blockdev-add.filename: is missing"),
            (json!({"driver": "file", "filename": 1}), "blockdev-add.filename: 1 is no string"),
            (json!({"driver": "x"}), "blockdev-add.driver: \"x\" is none of file, null-co"),
            (json!({"driver": "null-co", "more": 1}), "blockdev-add.more: is not known"),
        ];
        for (value, text) in faults {
            assert_eq!(check(value), Err(text.to_owned()));
        }
    }
}
