//! Learns merges: counts distinct pretokens, then merges the most frequent pair of neighbours again and again.
//!
//! Promises the merges of the naive algorithm (highest count first, ties to the smallest pair), whatever the number of
//! threads or the order of the texts. Memory follows the distinct pretokens, not the corpus.

use crate::batch::{run_units, Batch, Control, Failure};
use crate::scanner::{next, Pattern, Rules};
use crate::table::{pair_key, prefetch, ByteMap, PairMap, PairSlot, Piece, ShortKey, LOOKAHEAD};
use crate::with_rules;
use std::collections::{BinaryHeap, HashMap};
use std::sync::atomic::Ordering::Relaxed;

pub struct Trainer {
    pattern: Pattern,
    counters: Vec<Counter>, // one per thread
}

impl Trainer {
    pub fn new(pattern: Pattern, threads: usize) -> Self {
        Trainer { pattern, counters: (0..threads.max(1)).map(|_| Counter::default()).collect() }
    }

    /// Counts the pretokens of a batch. After a failure the counts hold part of it.
    pub fn feed(&mut self, batch: &Batch, control: &Control) -> Result<(), Failure> {
        let pattern = self.pattern;
        let units = batch.units(pattern);
        run_units(&mut self.counters, units.len(), |counter, number| {
            let unit = &units[number];
            control.check()?;
            for row in unit.rows.clone() {
                let text = batch.text(row, unit)?;
                with_rules!(pattern, R => counter.count::<R>(text));
            }
            control.done.fetch_add(unit.bytes.len() as u64, Relaxed);
            Ok(())
        })?;
        Ok(())
    }

    /// Up to `most` merges, fewer when no pair is left. Merge i makes token 256 + i; `control.done` counts them.
    pub fn train(&mut self, most: usize, control: &Control) -> Result<Vec<(u32, u32)>, Failure> {
        let mut counts = std::mem::take(&mut self.counters[0]);
        for other in &mut self.counters[1..] {
            counts.absorb(std::mem::take(other));
            control.check()?;
        }
        let mut merger = Merger::new(counts)?;
        let mut merges = Vec::new();
        while merges.len() < most {
            let Some((left, right)) = merger.most_frequent() else { break };
            merger.merge(left, right, 256 + merges.len() as u32, control)?;
            merges.push((left, right));
            control.done.store(merges.len() as u64, Relaxed);
        }
        Ok(merges)
    }
}

// -----------------------------------------------------------------------------
// 1. Counting

#[derive(Clone, Copy, Default)]
struct CountSlot {
    key: ShortKey,
    count: u64, // 0 is empty
}

#[derive(Default)]
struct Counter {
    short: Vec<CountSlot>,
    used: usize,
    long: ByteMap,
}

impl Counter {
    fn count<R: Rules>(&mut self, text: &[u8]) {
        let mut pieces = [Piece::default(); LOOKAHEAD];
        let mut at = 0;
        while at < text.len() {
            let mut count = 0;
            while count < LOOKAHEAD && at < text.len() {
                let piece = Piece::new(text, at, next::<R>(text, at));
                if let Some(slot) = self.short.get(piece.hash as usize & self.short.len().wrapping_sub(1)) {
                    prefetch(slot);
                }
                pieces[count] = piece;
                count += 1;
                at = piece.end;
            }
            for piece in &pieces[..count] {
                if piece.key == ShortKey::LONG {
                    *self.long.entry(&text[piece.start..piece.end]) += 1;
                } else {
                    self.add(piece.key, piece.hash, 1);
                }
            }
        }
    }

    #[inline(always)]
    fn add(&mut self, key: ShortKey, hash: u64, count: u64) {
        if 2 * self.used >= self.short.len() {
            self.grow();
        }
        let mask = self.short.len() - 1;
        let mut slot = hash as usize & mask;
        loop {
            let found = &mut self.short[slot];
            if found.key == key {
                found.count += count;
                return;
            }
            if found.count == 0 {
                *found = CountSlot { key, count };
                self.used += 1;
                return;
            }
            slot = (slot + 1) & mask;
        }
    }

    #[cold]
    fn grow(&mut self) {
        let size = (2 * self.short.len()).max(1 << 12);
        let old = std::mem::replace(&mut self.short, vec![CountSlot::default(); size]);
        self.used = 0;
        for slot in old.into_iter().filter(|slot| slot.count > 0) {
            self.add(slot.key, slot.key.hash(), slot.count);
        }
    }

    fn absorb(&mut self, other: Counter) {
        for slot in other.short.iter().filter(|slot| slot.count > 0) {
            self.add(slot.key, slot.key.hash(), slot.count);
        }
        for (bytes, count) in other.long.iter() {
            *self.long.entry(bytes) += count;
        }
    }
}

// -----------------------------------------------------------------------------
// 2. Merging

/// One byte of one distinct pretoken. A token's id stands in its first and in its last cell, so that both neighbours of
/// a token are found in one step; cells between them are stale.
#[derive(Clone, Copy)]
struct Cell {
    token: u32,
    weight: u32, // where `weights` holds the pretoken's count: few counts are distinct, so that table stays in cache
}

const BOUNDARY: u32 = u32::MAX; // the cell between two pretokens
const DEAD: u32 = u32::MAX - 1; // was the first cell of a token that became the right half of another
const NONE: u32 = u32::MAX;

/// A pair that occurs or once occurred, and the places where it did: `pool[start..start + places]`, ascending, some
/// stale.
#[derive(Clone, Copy)]
struct Pair {
    key: u64,
    count: i64,
    start: usize,
    places: u32,
}

impl PairSlot for Pair {
    const EMPTY: Pair = Pair { key: u64::MAX, count: 0, start: 0, places: 0 };
    fn key(&self) -> u64 {
        self.key
    }
}

/// A pair that a merge creates, while its occurrences are being collected.
struct Fresh {
    neighbour: u32,
    is_left: bool,
    count: i64,
    places: u32,
}

struct Merger {
    cells: Vec<Cell>,
    weights: Vec<i64>,
    widths: Vec<u32>, // bytes of each token
    pairs: PairMap<Pair>,
    pool: Vec<u32>,
    heap: BinaryHeap<u128>, // count, then the pair inverted: ties to the smaller one; counts may be old
    // Scratch of one merge, kept to save the allocations:
    fresh: Vec<Fresh>,
    log: Vec<(u32, u32)>,  // (number in `fresh`, place), in order of discovery
    fresh_left: Vec<u32>,  // neighbour -> number in `fresh`
    fresh_right: Vec<u32>, // the same for neighbours on the right
}

impl Merger {
    fn new(counts: Counter) -> Result<Self, Failure> {
        let (cells, weights) = lay_out(counts)?;
        let mut merger = Merger {
            cells,
            weights,
            widths: vec![1; 256],
            pairs: PairMap::with_capacity(1 << 16),
            pool: Vec::new(),
            heap: BinaryHeap::new(),
            fresh: Vec::new(),
            log: Vec::new(),
            fresh_left: vec![NONE; 256],
            fresh_right: vec![NONE; 256],
        };
        merger.count_byte_pairs();
        Ok(merger)
    }

    /// Counts the pairs of bytes on a dense grid, then lists their places one pair after the other.
    fn count_byte_pairs(&mut self) {
        let mut grid = vec![(0i64, 0u32); 1 << 16];
        let pair_at = |two: &[Cell]| match (two[0].token, two[1].token) {
            (BOUNDARY, _) | (_, BOUNDARY) => None,
            (left, right) => Some((left << 8 | right) as usize),
        };
        for two in self.cells.windows(2) {
            if let Some(pair) = pair_at(two) {
                grid[pair].0 += self.weights[two[0].weight as usize];
                grid[pair].1 += 1;
            }
        }
        let mut starts = Vec::with_capacity(grid.len());
        let mut total = 0;
        for (pair, &(count, places)) in grid.iter().enumerate() {
            starts.push(total);
            if places > 0 {
                let key = pair_key(pair as u32 >> 8, pair as u32 & 255);
                self.pairs.insert(Pair { key, count, start: total, places });
                self.heap.push(heap_entry(count, key));
            }
            total += places as usize;
        }
        self.pool = vec![0; total];
        for (place, two) in self.cells.windows(2).enumerate() {
            if let Some(pair) = pair_at(two) {
                self.pool[starts[pair]] = place as u32;
                starts[pair] += 1;
            }
        }
    }

    /// The pair with the highest count. Counts only fall once a pair is listed, so an entry that is out of date is put
    /// back with its new count, and the first up-to-date one is the maximum.
    fn most_frequent(&mut self) -> Option<(u32, u32)> {
        while let Some(entry) = self.heap.pop() {
            let key = !(entry as u64);
            let count = self.pairs.get(key)?.count;
            if count as u64 == (entry >> 64) as u64 {
                return Some(((key >> 32) as u32, key as u32));
            }
            if count > 0 {
                self.heap.push(heap_entry(count, key));
            }
        }
        None
    }

    /// Replaces every left-right by `token`. Costs one step per place where the pair ever was.
    fn merge(&mut self, left: u32, right: u32, token: u32, control: &Control) -> Result<(), Failure> {
        let key = pair_key(left, right);
        let pair = *self.pairs.get(key).expect("a pair that was counted");
        let (left_width, right_width) = (self.widths[left as usize], self.widths[right as usize]);
        self.widths.push(left_width + right_width);
        self.fresh_left.push(NONE);
        self.fresh_right.push(NONE);
        for number in 0..pair.places as usize {
            if number & 0xF_FFFF == 0 {
                control.check()?;
            }
            let place = self.pool[pair.start + number];
            let middle = place + left_width;
            if self.cells[place as usize].token != left || self.cells[middle as usize].token != right {
                continue;
            }
            let end = middle + right_width;
            let before = self.cells[place as usize - 1].token;
            let after = self.cells[end as usize].token;
            self.cells[middle as usize].token = DEAD;
            self.cells[place as usize].token = token;
            self.cells[end as usize - 1].token = token;
            let weight = self.weights[self.cells[place as usize].weight as usize];
            if before != BOUNDARY {
                self.collect(before, true, weight, place - self.widths[before as usize]);
            }
            if after != BOUNDARY {
                self.collect(after, false, weight, place);
            }
        }
        self.settle(left, right, token);
        self.pairs.get_mut(key).expect("still there").count = 0;
        Ok(())
    }

    /// Notes that the new token has met `neighbour` on one side; `place` is where the new pair begins.
    fn collect(&mut self, neighbour: u32, is_left: bool, weight: i64, place: u32) {
        let numbers = if is_left { &mut self.fresh_left } else { &mut self.fresh_right };
        let number = &mut numbers[neighbour as usize];
        if *number == NONE {
            *number = self.fresh.len() as u32;
            self.fresh.push(Fresh { neighbour, is_left, count: 0, places: 0 });
        }
        let fresh = &mut self.fresh[*number as usize];
        fresh.count += weight;
        fresh.places += 1;
        self.log.push((*number, place));
    }

    /// Takes the collected occurrences from the pairs they belonged to, and lists the new pairs.
    ///
    /// In `left right left right` the second merge finds the new token before it: the pair (token, left) that the first
    /// one noted is then (token, token), so its count is corrected, while (right, left) has already been reduced once
    /// and only once.
    fn settle(&mut self, left: u32, right: u32, token: u32) {
        let doubles = match self.fresh_left[token as usize] {
            NONE => 0,
            number => self.fresh[number as usize].count,
        };
        let mut start = self.pool.len();
        self.pool.resize(start + self.log.len(), 0);
        let mut starts = Vec::with_capacity(self.fresh.len());
        for fresh in self.fresh.drain(..) {
            let neighbour = fresh.neighbour;
            let (old, new) = if fresh.is_left {
                self.fresh_left[neighbour as usize] = NONE;
                (pair_key(neighbour, left), pair_key(neighbour, token))
            } else {
                self.fresh_right[neighbour as usize] = NONE;
                (pair_key(right, neighbour), pair_key(token, neighbour))
            };
            if neighbour != token {
                self.pairs.get_mut(old).expect("neighbours were a counted pair").count -= fresh.count;
            }
            let count = if !fresh.is_left && neighbour == left { fresh.count - doubles } else { fresh.count };
            if count > 0 {
                self.pairs.insert(Pair { key: new, count, start, places: fresh.places });
                self.heap.push(heap_entry(count, new));
            }
            starts.push(start);
            start += fresh.places as usize;
        }
        for (number, place) in self.log.drain(..) {
            self.pool[starts[number as usize]] = place;
            starts[number as usize] += 1;
        }
    }
}

fn heap_entry(count: i64, key: u64) -> u128 {
    u128::from(count as u64) << 64 | u128::from(!key)
}

/// Writes the pretokens one after the other, boundaries between them, and collects their distinct counts.
fn lay_out(counts: Counter) -> Result<(Vec<Cell>, Vec<i64>), Failure> {
    let long = counts.long.iter().map(|(bytes, _)| bytes.len() + 1).sum::<usize>();
    let (mut weights, mut weight_of) = (vec![0], HashMap::new());
    let boundary = Cell { token: BOUNDARY, weight: 0 };
    let mut cells = Vec::with_capacity(1 + long + 8 * counts.used);
    cells.push(boundary);
    let mut lay = |bytes: &[u8], count: u64| {
        let weight = *weight_of.entry(count).or_insert_with(|| {
            weights.push(count as i64);
            weights.len() as u32 - 1
        });
        cells.extend(bytes.iter().map(|&byte| Cell { token: u32::from(byte), weight }));
        cells.push(boundary);
    };
    for slot in counts.short.iter().filter(|slot| slot.count > 0) {
        let (bytes, length) = slot.key.bytes();
        if length > 1 {
            lay(&bytes[..length], slot.count);
        }
    }
    for (bytes, count) in counts.long.iter() {
        lay(bytes, count);
    }
    if cells.len() >= DEAD as usize {
        let problem = format!("the distinct pretokens hold {} bytes; at most 4 GiB can be trained on", cells.len());
        return Err(Failure::Invalid(problem));
    }
    Ok((cells, weights))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Offsets;
    use std::sync::atomic::AtomicU64;

    fn train(pattern: Pattern, threads: usize, texts: &[&str], most: usize) -> Vec<(u32, u32)> {
        let (stop, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let control = Control { stop: &stop, done: &done };
        let mut offsets = vec![0i64];
        texts.iter().for_each(|text| offsets.push(offsets.last().unwrap() + text.len() as i64));
        let data = texts.concat();
        let mut trainer = Trainer::new(pattern, threads);
        trainer.feed(&Batch::new(data.as_bytes(), Offsets::Large(&offsets), 0).unwrap(), &control).unwrap();
        trainer.train(most, &control).unwrap()
    }

    /// The definition: recount everything, merge the best pair, repeat.
    fn naive(pattern: Pattern, texts: &[&str], most: usize) -> Vec<(u32, u32)> {
        let mut words: Vec<Vec<u32>> = Vec::new();
        for text in texts {
            let mut at = 0;
            while at < text.len() {
                let end = with_rules!(pattern, R => next::<R>(text.as_bytes(), at));
                words.push(text.as_bytes()[at..end].iter().map(|&byte| u32::from(byte)).collect());
                at = end;
            }
        }
        let mut merges = Vec::new();
        while merges.len() < most {
            let mut counts = HashMap::new();
            for two in words.iter().flat_map(|word| word.windows(2)) {
                *counts.entry((two[0], two[1])).or_insert(0) += 1;
            }
            let Some((&pair, _)) = counts.iter().max_by_key(|(&pair, &count)| (count, std::cmp::Reverse(pair))) else {
                break;
            };
            let token = 256 + merges.len() as u32;
            for word in &mut words {
                let mut at = 0;
                while at + 1 < word.len() {
                    if (word[at], word[at + 1]) == pair {
                        word[at] = token;
                        word.remove(at + 1);
                    }
                    at += 1;
                }
            }
            merges.push(pair);
        }
        merges
    }

    #[test]
    fn repeats_ties_and_overlaps_match_the_definition() {
        let mut state = 1u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for round in 0..300 {
            let letters = 1 + round % 4; // few letters: many ties and runs that overlap themselves
            let text: String =
                (0..200).map(|_| if random(9) == 0 { ' ' } else { (b'a' + random(letters) as u8) as char }).collect();
            let texts = [&text[..90], &text[90..]];
            let expected = naive(Pattern::Nanochat, &texts, 60);
            assert_eq!(train(Pattern::Nanochat, 1, &texts, 60), expected, "{texts:?}");
            assert_eq!(train(Pattern::Nanochat, 3, &texts, 60), expected, "{texts:?}");
        }
    }

    #[test]
    fn a_long_run_of_one_letter_takes_one_merge_per_doubling() {
        let merges = train(Pattern::Gpt2, 1, &[&"a".repeat(1 << 20)], 100);
        assert_eq!(merges[..3], [(97, 97), (256, 256), (257, 257)]);
        assert_eq!(merges.len(), 20);
    }

    #[test]
    fn a_stopped_call_says_so() {
        let (stop, done) = (AtomicU64::new(1), AtomicU64::new(0));
        let control = Control { stop: &stop, done: &done };
        let batch = Batch::new(b"some text", Offsets::Large(&[0, 9]), 0).unwrap();
        assert_eq!(Trainer::new(Pattern::Gpt4, 1).feed(&batch, &control), Err(Failure::Stopped));
    }
}
