//! Takes apart what a read from a fanotify group returns: `struct fanotify_event_metadata` of linux/fanotify.h.
//!
//! Called by [`crate::Recorder`]. A pure function over bytes, without any I/O; descriptors come out as plain numbers.
//!
//! Layout, native endian: `u32 event_len, u8 vers, u8 reserved, u16 metadata_len, u64 mask, i32 fd, i32 pid`, then
//! information records up to `event_len`, which are skipped.

/// Size of the fixed part.
pub const METADATA_LEN: usize = 24;
/// `FANOTIFY_METADATA_VERSION`.
const VERSION: u8 = 3;

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// `FAN_*` bits.
    pub mask: u64,
    /// The file's descriptor, owned by whoever reads the event; negative: none, or the error that opening it gave.
    pub fd: i32,
    /// Who did it.
    pub pid: i32,
}

/// Why bytes are not events. The kernel never sends such; what follows in the buffer is lost then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Fewer bytes than one event has, or than an event says it has.
    #[error("an event is cut off after {0} bytes")]
    CutOff(usize),
    /// Another version of the structure.
    #[error("an event has version {0} instead of {VERSION}")]
    Version(u8),
    /// Lengths that contradict each other.
    #[error("an event of {event} bytes has metadata of {metadata} bytes")]
    Length {
        /// Of the whole event.
        event: usize,
        /// Of its fixed part.
        metadata: usize,
    },
}

/// The events in a buffer, in order. Ends after the first malformed one.
pub fn events(bytes: &[u8]) -> impl Iterator<Item = Result<Event, Malformed>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let result = first(rest);
        rest = match &result {
            Ok((_, after)) => after,
            Err(_) => &[],
        };
        Some(result.map(|(event, _)| event))
    })
}

/// The first event and what comes after it.
fn first(bytes: &[u8]) -> Result<(Event, &[u8]), Malformed> {
    let cut_off = Malformed::CutOff(bytes.len());
    let (head, _) = bytes.split_first_chunk::<METADATA_LEN>().ok_or(cut_off)?;
    let [
        e0,
        e1,
        e2,
        e3,
        version,
        _,
        m0,
        m1,
        mask @ ..,
        f0,
        f1,
        f2,
        f3,
        p0,
        p1,
        p2,
        p3,
    ] = *head;
    if version != VERSION {
        return Err(Malformed::Version(version));
    }
    let event = usize::try_from(u32::from_ne_bytes([e0, e1, e2, e3])).unwrap_or(usize::MAX);
    let metadata = usize::from(u16::from_ne_bytes([m0, m1]));
    if metadata < METADATA_LEN || event < metadata {
        return Err(Malformed::Length { event, metadata });
    }
    let after = bytes.get(event..).ok_or(cut_off)?;
    let event = Event {
        mask: u64::from_ne_bytes(mask),
        fd: i32::from_ne_bytes([f0, f1, f2, f3]),
        pid: i32::from_ne_bytes([p0, p1, p2, p3]),
    };
    Ok((event, after))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, proptest};

    use super::{Event, METADATA_LEN, Malformed, VERSION, events};

    fn encode(event: &Event, extra: usize) -> Vec<u8> {
        let mut bytes = u32::try_from(METADATA_LEN + extra)
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        bytes.extend([VERSION, 0]);
        bytes.extend(u16::try_from(METADATA_LEN).unwrap().to_ne_bytes());
        bytes.extend(event.mask.to_ne_bytes());
        bytes.extend(event.fd.to_ne_bytes());
        bytes.extend(event.pid.to_ne_bytes());
        bytes.extend(vec![0xaa; extra]);
        bytes
    }

    #[test]
    fn malformed_events_end_the_buffer() {
        let event = Event {
            mask: 0x1020,
            fd: 7,
            pid: 9,
        };
        let good = encode(&event, 0);
        let mut version = good.clone();
        version[4] = 2;
        let mut long = good.clone();
        long[0] = 200;
        let mut short = good.clone();
        short[0] = 8;
        let mut empty = good.clone();
        empty[0] = 0;
        let length = |event| Malformed::Length { event, metadata: 24 };
        for (bad, expected) in [
            (good[..23].to_vec(), Malformed::CutOff(23)),
            (version, Malformed::Version(2)),
            (long, Malformed::CutOff(24)),
            (short, length(8)),
            (empty, length(0)),
        ] {
            let bytes = [good.clone(), bad].concat();
            let got: Vec<_> = events(&bytes).collect();
            assert_eq!(got, [Ok(event), Err(expected)]);
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_parsed(list in prop::collection::vec((any::<u64>(), any::<i32>(), any::<i32>(), 0_usize..64), 0..50)) {
            let list: Vec<(Event, usize)> =
                list.into_iter().map(|(mask, fd, pid, extra)| (Event { mask, fd, pid }, extra)).collect();
            let bytes: Vec<u8> = list.iter().flat_map(|(event, extra)| encode(event, *extra)).collect();
            let parsed: Result<Vec<_>, _> = events(&bytes).collect();
            assert_eq!(parsed.unwrap(), list.into_iter().map(|(event, _)| event).collect::<Vec<_>>());
        }

        #[test]
        fn any_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            assert!(events(&bytes).count() <= bytes.len() / METADATA_LEN + 1);
        }
    }
}
