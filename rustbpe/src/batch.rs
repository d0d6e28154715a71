//! A column of texts as Arrow lays it out, work units cut from it, and the threads that take them.

use crate::scanner::Pattern;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread;

/// Why a call ended early.
#[derive(Debug, PartialEq)]
pub enum Failure {
    Stopped,
    Invalid(String),
}

/// Two words shared with the caller, who looks at them while a call runs on another thread.
pub struct Control<'a> {
    pub stop: &'a AtomicU64,
    pub done: &'a AtomicU64,
}

impl Control<'_> {
    pub fn check(&self) -> Result<(), Failure> {
        match self.stop.load(Relaxed) {
            0 => Ok(()),
            _ => Err(Failure::Stopped),
        }
    }
}

pub enum Offsets<'a> {
    Small(&'a [i32]),
    Large(&'a [i64]),
}

/// Row r is `data[offset(r)..offset(r + 1)]`.
pub struct Batch<'a> {
    data: &'a [u8],
    offsets: Offsets<'a>,
    first_row: usize, // what the caller calls row 0, for messages
}

/// What one thread does at a time: whole rows, or a span of one long row.
#[derive(Debug, PartialEq)]
pub struct Unit {
    pub rows: Range<usize>,
    pub bytes: Range<usize>,
}

/// Large enough to hide the cost of handing out, small enough that two threads end at the same time (a 4 MB batch has
/// 16).
pub(crate) const UNIT_BYTES: usize = 1 << 18;

impl<'a> Batch<'a> {
    /// Checks that the offsets ascend within the data.
    pub fn new(data: &'a [u8], offsets: Offsets<'a>, first_row: usize) -> Result<Self, Failure> {
        let batch = Batch { data, offsets, first_row };
        let entries = match batch.offsets {
            Offsets::Small(offsets) => offsets.len(),
            Offsets::Large(offsets) => offsets.len(),
        };
        let ascending = (1..entries).all(|row| batch.offset(row - 1) <= batch.offset(row));
        if entries == 0 || batch.offset(0) < 0 || !ascending || batch.offset(entries - 1) > data.len() as i64 {
            return Err(Failure::Invalid("offsets do not ascend within the text buffer".into()));
        }
        Ok(batch)
    }

    pub fn rows(&self) -> usize {
        match self.offsets {
            Offsets::Small(offsets) => offsets.len() - 1,
            Offsets::Large(offsets) => offsets.len() - 1,
        }
    }

    fn offset(&self, row: usize) -> i64 {
        match self.offsets {
            Offsets::Small(offsets) => i64::from(offsets[row]),
            Offsets::Large(offsets) => offsets[row],
        }
    }

    pub fn row(&self, row: usize) -> Range<usize> {
        self.offset(row) as usize..self.offset(row + 1) as usize
    }

    /// The part of `row` that lies in `unit`, refused when it is not UTF-8.
    pub fn text(&self, row: usize, unit: &Unit) -> Result<&'a [u8], Failure> {
        let span = self.row(row);
        let text = &self.data[span.start.max(unit.bytes.start)..span.end.min(unit.bytes.end)];
        match std::str::from_utf8(text) {
            Ok(_) => Ok(text),
            Err(_) => Err(Failure::Invalid(format!("row {} is not valid UTF-8", self.first_row + row))),
        }
    }

    /// Cuts the rows into units of about UNIT_BYTES, in order. A row that is longer is cut where an ASCII letter is
    /// followed by a space: a pretoken ends there in all patterns but Whole, whatever stands around.
    pub fn units(&self, pattern: Pattern) -> Vec<Unit> {
        let (mut units, mut first) = (Vec::new(), 0);
        while first < self.rows() {
            let start = self.row(first).start;
            let mut end = first + 1;
            while end < self.rows() && self.row(end).end - start <= UNIT_BYTES {
                end += 1;
            }
            let mut bytes = start..self.row(end - 1).end;
            while bytes.len() > UNIT_BYTES && pattern != Pattern::Whole {
                let Some(cut) = self.safe_cut(bytes.start + UNIT_BYTES..bytes.end) else { break };
                units.push(Unit { rows: first..end, bytes: bytes.start..cut });
                bytes.start = cut;
            }
            units.push(Unit { rows: first..end, bytes });
            first = end;
        }
        units
    }

    fn safe_cut(&self, within: Range<usize>) -> Option<usize> {
        let (start, text) = (within.start, &self.data[within]);
        let found = text.windows(2).position(|two| two[0].is_ascii_alphabetic() && two[1] == b' ')?;
        Some(start + found + 1)
    }
}

/// Runs `work(state, unit number)` for all units, one thread per state, and gives the results in order of the units.
/// The first failure (by unit) ends everything.
pub fn run_units<S: Send, T: Send>(
    states: &mut [S],
    units: usize,
    work: impl Fn(&mut S, usize) -> Result<T, Failure> + Sync,
) -> Result<Vec<T>, Failure> {
    let next = AtomicUsize::new(0);
    let take = |state: &mut S| {
        let mut results = Vec::new();
        loop {
            let unit = next.fetch_add(1, Relaxed);
            if unit >= units {
                return results;
            }
            let result = work(state, unit);
            if result.is_err() {
                next.store(units, Relaxed);
            }
            results.push((unit, result));
        }
    };
    let threads = states.len().min(units).max(1);
    let (first, others) = states[..threads].split_first_mut().expect("at least one state");
    let mut results = thread::scope(|scope| {
        let handles: Vec<_> = others.iter_mut().map(|state| scope.spawn(|| take(state))).collect();
        let mut results = take(first);
        for handle in handles {
            results.extend(handle.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        results
    });
    results.sort_unstable_by_key(|(unit, _)| *unit);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_cover_every_byte_once_and_cut_only_after_words() {
        let long = "word ".repeat(2 * UNIT_BYTES / 5 + 7);
        let data = format!("ab{long}{}", "x".repeat(3 * UNIT_BYTES)).into_bytes();
        let offsets = [0, 1, 1, 2, 2 + long.len() as i64, data.len() as i64];
        let batch = Batch::new(&data, Offsets::Large(&offsets), 0).unwrap();
        assert_eq!(batch.units(Pattern::Whole).len(), 3);
        let units = batch.units(Pattern::Gpt2);
        assert_eq!(units.first().unwrap(), &Unit { rows: 0..3, bytes: 0..2 });
        assert_eq!(units.last().unwrap(), &Unit { rows: 4..5, bytes: 2 + long.len()..data.len() });
        for two in units.windows(2) {
            assert_eq!(two[0].bytes.end, two[1].bytes.start);
            if two[0].rows == two[1].rows {
                assert_eq!(&data[two[1].bytes.start - 1..two[1].bytes.start + 1], b"d ");
            }
        }
    }

    #[test]
    fn bad_offsets_are_refused() {
        for offsets in [vec![], vec![-1, 1], vec![0, 2, 1], vec![0, 4]] {
            assert!(Batch::new(b"abc", Offsets::Large(&offsets), 0).is_err(), "{offsets:?}");
        }
    }

    #[test]
    fn first_failure_wins_and_results_keep_their_order() {
        let square = |_: &mut (), unit: usize| Ok(unit * unit);
        assert_eq!(run_units(&mut [(), ()], 4, square), Ok(vec![0, 1, 4, 9]));
        let fail = |_: &mut (), unit: usize| if unit < 2 { Ok(()) } else { Err(Failure::Invalid(unit.to_string())) };
        assert_eq!(run_units(&mut [()], 9, fail), Err(Failure::Invalid("2".into())));
    }
}
