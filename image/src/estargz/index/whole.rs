//! A TOC's JSON from its beginning to its end, as serde reads it. What is wrong with a TOC is told from here.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::super::toc::{TocEntry, TocError};
use super::Rules;
use super::build::Builder;
use super::record::Record;
use crate::layer::LayerIndex;

/// Reads a TOC of no more than [`TOC_JSON_MAX`](crate::estargz::TOC_JSON_MAX) bytes.
pub(super) fn read(json: &[u8], rules: &Rules) -> Result<LayerIndex, TocError> {
    let mut reading = Reading {
        builder: Builder::new(rules),
        error: None,
    };
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let outcome = Top(&mut reading)
        .deserialize(&mut deserializer)
        .and_then(|()| deserializer.end());
    match (outcome, reading.error) {
        (_, Some(error)) => Err(error),
        (Err(error), None) => Err(error.into()),
        (Ok(()), None) => reading.builder.finish(),
    }
}

/// What is read so far.
struct Reading {
    builder: Builder,
    /// What is wrong with the entries, which serde's errors cannot hold.
    error: Option<TocError>,
}

impl Reading {
    fn add(&mut self, entry: &TocEntry<'_>) -> Result<(), TocError> {
        let record = Record::new(entry)?;
        self.builder
            .add(record)
            .map_err(|refusal| refusal.about(&entry.name))
    }
}

/// The TOC's outermost object. Entries go to the builder one by one, so that memory follows what is kept of them.
struct Top<'b>(&'b mut Reading);

impl<'de> DeserializeSeed<'de> for Top<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Top<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a TOC object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = false;
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            if key == "entries" {
                if std::mem::replace(&mut seen, true) {
                    return Err(serde::de::Error::duplicate_field("entries"));
                }
                map.next_value_seed(Entries(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if seen {
            Ok(())
        } else {
            Err(serde::de::Error::missing_field("entries"))
        }
    }
}

struct Entries<'b>(&'b mut Reading);

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of TOC entries")
    }

    // Go writes an empty list as null.
    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        while let Some(entry) = sequence.next_element::<TocEntry<'de>>()? {
            if let Err(error) = self.0.add(&entry) {
                self.0.error = Some(error);
                return Err(serde::de::Error::custom("refused"));
            }
        }
        Ok(())
    }
}
