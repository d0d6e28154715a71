//! Turns text into token ids, exactly as tiktoken does with the same ranks.
//!
//! tiktoken's rule: a pretoken that is a token is that token; otherwise merge, again and again, the leftmost of the
//! adjacent pairs whose joined bytes have the lowest id. A cache answers nearly all pretokens; the rest are merged.
//!
//! "Joined bytes" and "one pair per token" are the same thing: no symbol crosses the border of two neighbours about to
//! merge, so what happened inside is what happens to those bytes alone, and always ends in the same two halves.
//! `recover_merges` finds those halves once, which makes a table with one entry per token out of one with an entry per
//! way to cut each token.

use crate::batch::{run_units, Batch, Control, Failure, Unit};
use crate::scanner::{next, Pattern, Rules};
use crate::table::{pair_key, prefetch, ByteMap, PairMap, PairSlot, Piece, ShortKey, LOOKAHEAD};
use crate::with_rules;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Mutex;

const NONE: u32 = u32::MAX;

/// Ids that a slot of the cache holds, and that every write to the output writes at once.
pub(crate) const GROUP: usize = 4;

/// 16 MiB per thread. Encoding 100 MB at 32,768 tokens for the first time takes 0.65 s with 8, 0.60 with 16 and 0.53 with
/// 32 MiB on a Xeon with much L3; on a smaller one 8 MiB was 8 to 15 % slower than 16. The rest is for other threads.
const CACHE_LINES: usize = 1 << 18;

/// Up to this many bytes the best pair is looked for by scanning, beyond it with a heap: a scan over a few cache lines
/// beats a heap's bookkeeping, but its cost grows with the square.
const SCAN_BYTES: usize = 128;

/// An id as it is written: u16 where the vocabulary allows, else u32.
pub trait Id: Copy + Send {
    fn from_u32(id: u32) -> Self;
}

impl Id for u16 {
    #[inline(always)]
    fn from_u32(id: u32) -> Self {
        id as u16
    }
}

impl Id for u32 {
    #[inline(always)]
    fn from_u32(id: u32) -> Self {
        id
    }
}

pub struct Encoder {
    pattern: Pattern,
    tokens: ByteMap, // bytes -> 1 + id
    byte_ids: [u32; 256],
    byte_pairs: Vec<u32>, // id of two raw bytes, or NONE: the first step of every merge needs no hashing
    pairs: PairMap<MergeSlot>,
    seeded: Cache,
    idle: Mutex<Vec<Worker>>, // warm caches of earlier calls
}

#[derive(Clone, Copy)]
struct MergeSlot {
    key: u64,
    token: u32,
}

impl PairSlot for MergeSlot {
    const EMPTY: MergeSlot = MergeSlot { key: u64::MAX, token: NONE };
    fn key(&self) -> u64 {
        self.key
    }
}

/// What a call writes: ids of all rows one after the other, and per row how many.
pub struct Encoded {
    pub ids: usize,
    pub row_ids: Vec<u64>,
}

impl Encoder {
    /// `vocabulary[id]` is the bytes of token id. All 256 single bytes must be there, and no token twice.
    pub fn new(pattern: Pattern, vocabulary: &[&[u8]]) -> Result<Self, Failure> {
        let tokens = index_tokens(vocabulary)?;
        let mut byte_ids = [NONE; 256];
        for (byte, id) in byte_ids.iter_mut().enumerate() {
            *id = match tokens.get(&[byte as u8]) {
                Some(number) => number as u32 - 1,
                None => return Err(Failure::Invalid(format!("no token for the single byte {byte}"))),
            };
        }
        let mut encoder = Encoder {
            pattern,
            tokens,
            byte_ids,
            byte_pairs: vec![NONE; 1 << 16],
            pairs: PairMap::with_capacity(vocabulary.len()),
            seeded: Cache::seed(vocabulary),
            idle: Mutex::new(Vec::new()),
        };
        encoder.recover_merges(vocabulary)?;
        Ok(encoder)
    }

    /// Finds for every token the two halves that merge into it, if merging ever makes it. Shorter tokens first: their
    /// merges are all that can happen inside a token before its last one.
    fn recover_merges(&mut self, vocabulary: &[&[u8]]) -> Result<(), Failure> {
        let (stop, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let control = Control { stop: &stop, done: &done };
        let mut by_length: Vec<usize> = (0..vocabulary.len()).filter(|&id| vocabulary[id].len() > 1).collect();
        by_length.sort_by_key(|&id| vocabulary[id].len());
        let mut merging = Merging::default();
        for id in by_length {
            let (bytes, token) = (vocabulary[id], id as u32);
            self.merge(bytes, &mut merging, &control)?;
            if let [left, right] = merging.ids[..] {
                self.pairs.insert(MergeSlot { key: pair_key(left, right), token });
            }
            if let [first, second] = *bytes {
                self.byte_pairs[usize::from(first) << 8 | usize::from(second)] = token;
            }
        }
        Ok(())
    }

    /// Ids that the output must have room for: no text has more ids than bytes, and each unit may write GROUP too many.
    pub fn room(bytes: usize, rows: usize) -> usize {
        bytes + GROUP * (rows + bytes / crate::batch::UNIT_BYTES + 1)
    }

    /// Encodes all rows into `out`, which has at least `room` places. The ids never name anything but `vocabulary`.
    pub fn encode<T: Id>(
        &self,
        batch: &Batch,
        threads: usize,
        out: &mut [T],
        control: &Control,
    ) -> Result<Encoded, Failure> {
        let units = batch.units(self.pattern);
        let mut regions = Vec::with_capacity(units.len());
        let mut rest = &mut *out;
        for unit in &units {
            let (region, after) = rest.split_at_mut(unit.bytes.len() + GROUP);
            regions.push(Mutex::new(region));
            rest = after;
        }
        let mut workers = self.take_workers(threads.min(units.len()).max(1));
        let encoded = run_units(&mut workers, units.len(), |worker, number| {
            control.check()?;
            let mut region = regions[number].lock().expect("each region is locked once");
            let unit = &units[number];
            let row_ids =
                with_rules!(self.pattern, R => self.encode_unit::<R, T>(batch, unit, worker, &mut region, control))?;
            control.done.fetch_add(unit.bytes.len() as u64, Relaxed);
            Ok(row_ids)
        });
        self.idle.lock().expect("never poisoned: no code under it panics").append(&mut workers);
        let encoded = encoded?;
        drop(regions);
        Ok(close_gaps(batch.rows(), &units, &encoded, out))
    }

    fn take_workers(&self, wanted: usize) -> Vec<Worker> {
        let mut idle = self.idle.lock().expect("never poisoned: no code under it panics");
        let kept = idle.len().saturating_sub(wanted);
        let mut workers = idle.split_off(kept);
        drop(idle);
        workers.resize_with(wanted, || Worker { cache: self.seeded.clone(), merging: Merging::default() });
        workers
    }

    fn encode_unit<R: Rules, T: Id>(
        &self,
        batch: &Batch,
        unit: &Unit,
        worker: &mut Worker,
        out: &mut [T],
        control: &Control,
    ) -> Result<Vec<u64>, Failure> {
        let (mut row_ids, mut written) = (Vec::with_capacity(unit.rows.len()), 0);
        for row in unit.rows.clone() {
            let before = written;
            written = self.encode_text::<R, T>(batch.text(row, unit)?, worker, out, written, control)?;
            row_ids.push((written - before) as u64);
        }
        Ok(row_ids)
    }

    /// Writes the ids of `text` from `out[written]` on and returns where they end.
    fn encode_text<R: Rules, T: Id>(
        &self,
        text: &[u8],
        worker: &mut Worker,
        out: &mut [T],
        mut written: usize,
        control: &Control,
    ) -> Result<usize, Failure> {
        let mut pieces = [Piece::default(); LOOKAHEAD];
        let mut at = 0;
        while at < text.len() {
            let mut count = 0;
            while count < LOOKAHEAD && at < text.len() {
                let piece = Piece::new(text, at, next::<R>(text, at));
                prefetch(worker.cache.line(piece.hash));
                pieces[count] = piece;
                count += 1;
                at = piece.end;
            }
            for piece in &pieces[..count] {
                if let Some((ids, count)) = worker.cache.get(piece) {
                    let group: &mut [T; GROUP] = (&mut out[written..written + GROUP]).try_into().expect("GROUP places");
                    *group = ids.map(T::from_u32);
                    written += count;
                } else {
                    written += self.encode_rare(&text[piece.start..piece.end], worker, &mut out[written..], control)?;
                }
            }
        }
        Ok(written)
    }

    /// A pretoken that is not in the cache.
    #[inline(never)]
    fn encode_rare<T: Id>(
        &self,
        piece: &[u8],
        worker: &mut Worker,
        out: &mut [T],
        control: &Control,
    ) -> Result<usize, Failure> {
        let merging = &mut worker.merging;
        match self.tokens.get(piece) {
            Some(number) => {
                merging.ids.clear();
                merging.ids.push(number as u32 - 1);
            }
            None => self.merge(piece, merging, control)?,
        }
        for (place, &id) in out.iter_mut().zip(&merging.ids) {
            *place = T::from_u32(id);
        }
        if piece.len() <= ShortKey::MAX_BYTES && merging.ids.len() <= GROUP {
            worker.cache.insert(ShortKey::pack(piece, 0, piece.len()), &merging.ids);
        }
        Ok(merging.ids.len())
    }

    #[inline(always)]
    fn merged(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(pair_key(left, right)).map_or(NONE, |slot| slot.token)
    }

    /// Leaves the ids that `piece` merges into in `merging.ids`.
    fn merge(&self, piece: &[u8], merging: &mut Merging, control: &Control) -> Result<(), Failure> {
        merging.ids.clear();
        merging.ids.extend(piece.iter().map(|&byte| self.byte_ids[usize::from(byte)]));
        merging.joins.clear();
        let pair = |two: &[u8]| self.byte_pairs[usize::from(two[0]) << 8 | usize::from(two[1])];
        merging.joins.extend(piece.windows(2).map(pair));
        merging.joins.push(NONE);
        if piece.len() <= SCAN_BYTES {
            self.merge_by_scan(merging);
            return Ok(());
        }
        self.merge_by_heap(merging, control)
    }

    fn merge_by_scan(&self, merging: &mut Merging) {
        let Merging { ids, joins, .. } = merging;
        loop {
            let (mut best, mut place) = (NONE, 0);
            for (i, &join) in joins.iter().enumerate() {
                if join < best {
                    (best, place) = (join, i);
                }
            }
            if best == NONE {
                return;
            }
            ids[place] = best;
            ids.remove(place + 1);
            joins.remove(place + 1);
            joins[place] = ids.get(place + 1).map_or(NONE, |&right| self.merged(best, right));
            if place > 0 {
                joins[place - 1] = self.merged(ids[place - 1], best);
            }
        }
    }

    /// The same for a long piece in O(n log n): symbols stay in place, linked to their neighbours; an entry of the heap
    /// counts only while its symbol still joins to the id the entry was made for.
    fn merge_by_heap(&self, merging: &mut Merging, control: &Control) -> Result<(), Failure> {
        let Merging { ids, joins, heap, links } = merging;
        let Ok(count) = u32::try_from(ids.len()) else {
            return Err(Failure::Invalid(format!("a pretoken of {} bytes; at most 4 GiB can be encoded", ids.len())));
        };
        links.clear();
        links.extend((0..count).map(|i| (i.wrapping_sub(1), i + 1))); // no neighbour: not below count
        control.check()?;
        let mut entries = std::mem::take(heap).into_vec();
        entries.clear();
        entries.extend((0..).zip(joins.iter()).filter(|(_, &join)| join != NONE).map(|(i, &join)| Reverse((join, i))));
        *heap = BinaryHeap::from(entries);
        let mut steps = 0u32;
        while let Some(Reverse((join, place))) = heap.pop() {
            steps = steps.wrapping_add(1);
            if steps & 0xFFFF == 0 {
                control.check()?;
            }
            if joins[place as usize] != join {
                continue;
            }
            let (before, gone) = links[place as usize];
            let after = links[gone as usize].1;
            ids[place as usize] = join;
            links[place as usize].1 = after;
            (ids[gone as usize], joins[gone as usize]) = (NONE, NONE);
            joins[place as usize] = NONE;
            if after < count {
                links[after as usize].0 = place;
            }
            for (left, right) in [(place, after), (before, place)] {
                if left < count && right < count {
                    let join = self.merged(ids[left as usize], ids[right as usize]);
                    joins[left as usize] = join;
                    if join != NONE {
                        heap.push(Reverse((join, left)));
                    }
                }
            }
        }
        ids.retain(|&id| id != NONE);
        Ok(())
    }
}

fn index_tokens(vocabulary: &[&[u8]]) -> Result<ByteMap, Failure> {
    let mut tokens = ByteMap::default();
    for (id, bytes) in vocabulary.iter().enumerate() {
        if bytes.is_empty() {
            return Err(Failure::Invalid(format!("token {id} is empty")));
        }
        let number = tokens.entry(bytes);
        if *number != 0 {
            return Err(Failure::Invalid(format!("tokens {} and {id} have the same bytes", *number - 1)));
        }
        *number = id as u64 + 1;
    }
    Ok(tokens)
}

/// Moves the ids of the units together and counts them by row.
fn close_gaps<T: Copy>(rows: usize, units: &[Unit], encoded: &[Vec<u64>], out: &mut [T]) -> Encoded {
    let mut row_ids = vec![0; rows];
    let (mut region, mut end) = (0, 0);
    for (unit, counts) in units.iter().zip(encoded) {
        let written = counts.iter().sum::<u64>() as usize;
        out.copy_within(region..region + written, end);
        end += written;
        region += unit.bytes.len() + GROUP;
        for (row, count) in unit.rows.clone().zip(counts) {
            row_ids[row] += count;
        }
    }
    Encoded { ids: end, row_ids }
}

/// Buffers of one thread.
struct Worker {
    cache: Cache,
    merging: Merging,
}

#[derive(Default)]
struct Merging {
    ids: Vec<u32>,
    joins: Vec<u32>, // joins[i]: what symbols i and i + 1 merge into, or NONE
    heap: BinaryHeap<Reverse<(u32, u32)>>,
    links: Vec<(u32, u32)>, // neighbours before and after
}

/// Pretokens of up to 15 bytes and up to GROUP ids: two to a cache line, the newer first; a third pushes the older one
/// out.
#[derive(Clone)]
struct Cache {
    lines: Vec<Line>,
}

#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Line([CacheSlot; 2]);

#[derive(Clone, Copy, Default)]
struct CacheSlot {
    key: ShortKey, // with the number of ids in the topmost four bits, above the length
    ids: [u32; GROUP],
}

impl Cache {
    /// Starts with all tokens, the most frequent last.
    fn seed(vocabulary: &[&[u8]]) -> Cache {
        let mut cache = Cache { lines: vec![Line::default(); CACHE_LINES] };
        for (id, bytes) in vocabulary.iter().enumerate().rev() {
            if bytes.len() <= ShortKey::MAX_BYTES {
                cache.insert(ShortKey::pack(bytes, 0, bytes.len()), &[id as u32]);
            }
        }
        cache
    }

    #[inline(always)]
    fn line(&self, hash: u64) -> &Line {
        &self.lines[hash as usize & (self.lines.len() - 1)]
    }

    #[inline(always)]
    fn get(&self, piece: &Piece) -> Option<([u32; GROUP], usize)> {
        for slot in &self.line(piece.hash).0 {
            if slot.key.low == piece.key.low && slot.key.high & (u64::MAX >> 4) == piece.key.high {
                return Some((slot.ids, (slot.key.high >> 60) as usize));
            }
        }
        None
    }

    fn insert(&mut self, key: ShortKey, ids: &[u32]) {
        let mask = self.lines.len() - 1;
        let line = &mut self.lines[key.hash() as usize & mask].0;
        line[1] = line[0];
        line[0].key = ShortKey { low: key.low, high: key.high | (ids.len() as u64) << 60 };
        line[0].ids = [0; GROUP];
        line[0].ids[..ids.len()].copy_from_slice(ids);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Offsets;

    fn vocabulary(words: &[&str]) -> Vec<Vec<u8>> {
        let bytes = (0..=255u8).map(|byte| vec![byte]);
        bytes.chain(words.iter().map(|word| word.as_bytes().to_vec())).collect()
    }

    fn encoder(words: &[&str]) -> Result<Encoder, Failure> {
        let owned = vocabulary(words);
        Encoder::new(Pattern::Gpt2, &owned.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    fn encode(encoder: &Encoder, threads: usize, texts: &[&str]) -> (Vec<u32>, Vec<u64>) {
        let (stop, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let control = Control { stop: &stop, done: &done };
        let mut offsets = vec![0i64];
        texts.iter().for_each(|text| offsets.push(offsets.last().unwrap() + text.len() as i64));
        let data = texts.concat();
        let batch = Batch::new(data.as_bytes(), Offsets::Large(&offsets), 0).unwrap();
        let mut out = vec![0u32; Encoder::room(data.len(), texts.len())];
        let encoded = encoder.encode(&batch, threads, &mut out, &control).unwrap();
        out.truncate(encoded.ids);
        (out, encoded.row_ids)
    }

    #[test]
    fn lowest_id_first_then_leftmost() {
        let bpe = encoder(&["bc", "ab", "aa", "abc", "abcd"]).unwrap();
        assert_eq!(encode(&bpe, 1, &["abca"]).0, [259, 97]); // bc before ab, then a + bc
        assert_eq!(encode(&bpe, 1, &["aaa"]).0, [258, 97]);
        let bpe = encoder(&["bc", "abcd"]).unwrap();
        assert_eq!(encode(&bpe, 1, &["abcd"]).0, [257]); // a whole pretoken, though merging never makes it
        assert_eq!(encode(&bpe, 1, &["abcde"]).0, [97, 256, 100, 101]);
    }

    #[test]
    fn scan_and_heap_agree() {
        let bpe = encoder(&["ab", "ba", "aa", "abab", "aab", "bb", "aaaa", "abb", "baab"]).unwrap();
        let (stop, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let control = Control { stop: &stop, done: &done };
        let mut state = 3u64;
        for length in 2..SCAN_BYTES {
            let piece: Vec<u8> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    b'a' + (state >> 40) as u8 % 2
                })
                .collect();
            let (mut scanned, mut heaped) = (Merging::default(), Merging::default());
            bpe.merge(&piece, &mut scanned, &control).unwrap();
            heaped.ids = piece.iter().map(|&byte| u32::from(byte)).collect();
            heaped.joins = piece.windows(2).map(|two| bpe.merged(u32::from(two[0]), u32::from(two[1]))).collect();
            heaped.joins.push(NONE);
            bpe.merge_by_heap(&mut heaped, &control).unwrap();
            assert_eq!(scanned.ids, heaped.ids);
        }
    }

    #[test]
    fn threads_units_and_rows_do_not_change_ids() {
        let bpe = encoder(&["th", "the", " the", " c", "at", " cat"]).unwrap();
        let long = "the cat the ".repeat(60_000); // three units
        let texts = ["", "the", "", &long, "cat"];
        let (ids, row_ids) = encode(&bpe, 1, &texts);
        assert_eq!(encode(&bpe, 3, &texts), (ids.clone(), row_ids.clone()));
        let one_by_one: Vec<u32> = texts.iter().flat_map(|text| encode(&bpe, 1, &[text]).0).collect();
        assert_eq!(ids, one_by_one);
        assert_eq!(row_ids.iter().sum::<u64>(), ids.len() as u64);
        assert_eq!((row_ids[0], row_ids[1], row_ids[2]), (0, 1, 0));
    }

    #[test]
    fn impossible_vocabularies_are_refused_by_name() {
        let problem = |words: &[&str]| encoder(words).err();
        assert_eq!(problem(&["ab", "ab"]), Some(Failure::Invalid("tokens 256 and 257 have the same bytes".into())));
        assert_eq!(problem(&[""]), Some(Failure::Invalid("token 256 is empty".into())));
        let missing = Encoder::new(Pattern::Gpt2, &[b"a"]).err();
        assert_eq!(missing, Some(Failure::Invalid("no token for the single byte 0".into())));
    }
}
